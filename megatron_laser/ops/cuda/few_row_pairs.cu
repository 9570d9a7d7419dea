// Statistics of few hidden rows as in few_row_logprob.cu, with the rows as the left operand: 64 to a consumer warpgroup, and a
// tile of N columns of the weight as the right one. N need only be a multiple of 8, so a shard can be cut into as many
// tiles as there are multiprocessors (19008 = 132 x 144), where tiles of 256 would leave half of them idle.
//
// Narrow tiles would have every program read all hidden rows through L2. Programs therefore work in pairs (a cluster of two):
// each copies its own tile of the weight and half of the hidden rows, the latter into both. A stage may be filled again only
// when the consumers of both programs have left it. Both take the same number of tiles; one beyond the shard reads zeros
// from the copy engine and is masked.
//
// A thread holds 2 rows and N / 4 columns of a tile, so almost all of the reduction stays inside the thread.

template <int ROWS, int N>
struct PairLayout {
  static constexpr int WARPGROUPS = ROWS / 64;
  static constexpr int PAIR_THREADS = 128 + 128 * WARPGROUPS;
  static constexpr int WEIGHT_BYTES = N * ROW_BYTES;
  static constexpr int HIDDEN_BYTES = ROWS * ROW_BYTES;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + HIDDEN_BYTES;
  // As many stages as fit into 227 KB with the slack for alignment and 16 bytes of barriers each; 8 are enough.
  static constexpr int FITTING = (227 * 1024 - 1024) / (STAGE_BYTES + 16);
  static constexpr int STAGES = FITTING < 8 ? FITTING : 8;
  static constexpr int TOTAL_BYTES = 1024 + STAGES * (STAGE_BYTES + 16);
  static_assert(N % 8 == 0 && WEIGHT_BYTES % 1024 == 0, "the hidden rows begin at a multiple of 1024 bytes");
};

// The 4 lanes that hold the same hidden row are neighbours.
DEVICE float row_max(float value) {
  for (int step = 1; step < 4; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}
DEVICE float row_sum(float value) {
  for (int step = 1; step < 4; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <int ROWS, int N>
DEVICE void pair_statistics(const TensorMap& hidden, const TensorMap& weight, const long long* labels, float* partials,
                            int rows, int columns, int depth_steps, long long first_column, int rounds) {
  using L = PairLayout<ROWS, N>;
  unsigned char* raw = dynamic_shared();
  const u32 base = (shared_address(raw) + 1023) / 1024 * 1024;
  const u32 full = base + L::STAGES * L::STAGE_BYTES;
  const u32 empty = full + L::STAGES * 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 rank = cluster_rank();

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::STAGES; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, 2 * 4 * L::WARPGROUPS);  // the consumer warps of both programs
    }
    barriers_visible();
  }
  cluster_sync();  // the other program's barriers are used below

  if (warp < 4) {
    registers_give<40>();
    if (threadIdx.x == 0) {
      const u64 once = read_once(), often = read_often();
      int stage = 0;
      u32 phase = 0;
      for (int round = 0; round < rounds; ++round) {
        const int first = (round * gridDim.x + blockIdx.x) * N;
        for (int step = 0; step < depth_steps; ++step) {
          barrier_wait_cluster(empty + stage * 8, phase ^ 1);
          // This program's tile and both halves of the hidden rows, one of them sent by the other program.
          barrier_expect(full + stage * 8, L::STAGE_BYTES);
          const u32 target = base + stage * L::STAGE_BYTES;
          const u32 half = target + L::WEIGHT_BYTES + rank * (ROWS / 2) * ROW_BYTES;
          copy_tile(target, &weight, step * DEPTH, first, full + stage * 8, once);
          copy_tile_to_both(half, &hidden, step * DEPTH, rank * (ROWS / 2), full + stage * 8, often);
          if (++stage == L::STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    registers_take<232>();
    const int group = warp / 4 - 1;
    // Rows of this thread: own_row and own_row + 8; its columns of a tile: 8 j + lane % 4 * 2 + (0 or 1).
    const int own_row = group * 64 + warp % 4 * 16 + lane / 4;
    long long label[2];
    float maximum[2], total[2], label_logit[2];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = own_row + part * 8;
      label[part] = row < rows ? labels[row] - first_column : -1;
      maximum[part] = NEGATIVE_INFINITY, total[part] = 0.0f, label_logit[part] = 0.0f;
    }
    int stage = 0;
    u32 phase = 0;
    for (int round = 0; round < rounds; ++round) {
      float logits[N / 2];
      int previous = -1;
      for (int step = 0; step < depth_steps; ++step) {
        barrier_wait(full + stage * 8, phase);
        const u32 weight_tile = base + stage * L::STAGE_BYTES;
        const u32 hidden_tile = weight_tile + L::WEIGHT_BYTES + group * 64 * ROW_BYTES;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DEPTH / 16; ++k)
          Wgmma<N>::run(logits, operand(hidden_tile + k * 32), operand(weight_tile + k * 32), step > 0 || k > 0);
        wgmma_commit();
        // The step before this one has been multiplied: its stage may be filled again, by either program.
        wgmma_wait<1>();
        if (previous >= 0 && lane < 2) barrier_arrive_at(empty + previous * 8, lane);
        previous = stage;
        if (++stage == L::STAGES) stage = 0, phase ^= 1;
      }
      wgmma_wait<0>();
#pragma unroll
      for (int index = 0; index < N / 2; ++index) wgmma_landed(logits[index]);
      if (lane < 2) barrier_arrive_at(empty + previous * 8, lane);

      const int first = (round * gridDim.x + blockIdx.x) * N;
      const int column = first + lane % 4 * 2;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // The label's column as a distance from this thread's first one, or -1: 32 bits from here on.
        const long long distance = label[part] - column;
        const int wanted = label[part] >= 0 && label[part] < columns && distance >= 0 && distance < N
                               ? static_cast<int>(distance)
                               : -1;
        float largest = NEGATIVE_INFINITY;
#pragma unroll
        for (int index = 0; index < N / 4; ++index) {
          const int at = index / 2 * 8 + index % 2;
          float& logit = logits[index / 2 * 4 + part * 2 + index % 2];
          if (at == wanted) label_logit[part] = logit;  // one thread of one program at most
          if (column + at >= columns) logit = NEGATIVE_INFINITY;
          largest = fmaxf(largest, logit);
        }
        const float merged = fmaxf(maximum[part], row_max(largest));
        const float zero = merged == NEGATIVE_INFINITY ? 0.0f : merged;  // -inf - -inf is NaN
        float sum = 0.0f;
#pragma unroll
        for (int index = 0; index < N / 4; ++index)
          sum += __expf(logits[index / 2 * 4 + part * 2 + index % 2] - zero);
        total[part] = total[part] * rescale(maximum[part], merged) + row_sum(sum);
        maximum[part] = merged;
      }
    }
    const long long plane = static_cast<long long>(gridDim.x) * rows;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int row = own_row + part * 8;
      const float logit = row_sum(label_logit[part]);  // of the four lanes three have 0
      if (lane % 4 == 0 && row < rows) {
        float* target = partials + static_cast<long long>(blockIdx.x) * rows + row;
        target[0] = maximum[part];
        target[plane] = total[part];
        target[2 * plane] = logit;
      }
    }
  }
  __syncwarp();
  cluster_sync();  // the other program may still send to this one's memory and barriers
}

#define FEW_ROW_PAIRS(ROWS, N)                                                                                   \
  KERNEL_OF_PAIRS(128 + 2 * ROWS)                                                                                 \
  few_row_pairs_##ROWS##_##N(PARAMETER TensorMap hidden, PARAMETER TensorMap weight, const long long* labels,      \
                             float* partials, int rows, int columns, int depth_steps, long long first_column,      \
                             int rounds) {                                                                         \
    pair_statistics<ROWS, N>(hidden, weight, labels, partials, rows, columns, depth_steps, first_column, rounds);  \
  }
#define FEW_ROW_PAIRS_OF(N) FEW_ROW_PAIRS(64, N) FEW_ROW_PAIRS(128, N)
FEW_ROW_PAIRS_OF(96)
FEW_ROW_PAIRS_OF(128)
FEW_ROW_PAIRS_OF(144)
FEW_ROW_PAIRS_OF(192)
FEW_ROW_PAIRS_OF(256)
