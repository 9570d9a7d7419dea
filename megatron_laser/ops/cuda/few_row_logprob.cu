// Statistics of few hidden rows in one read of the weight: per row and program the maximum of the logits, the sum of their
// exponentials relative to it, and the label's logit. Here the weight is the left operand; few_row_pairs.cu has the other form.
//
// One producer warp feeds a ring of shared-memory stages through the copy engine; two consumer warpgroups multiply. The
// weight is the left operand (64 of its rows per instruction), the few hidden rows are the right one (N = 16 to 128),
// so that few rows are not padded to 64. Each consumer warpgroup owns 128 of a tile's 256 columns of logits. Programs take
// tiles p, p + P, ...; every value in memory has one writer and every sum a fixed order.

constexpr int TILE_COLUMNS = 256;  // rows of the weight per tile
constexpr int DEPTH = 64;          // 128 bytes of bfloat16: one swizzled row
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int CONSUMER_WARPS = 8;
constexpr int THREADS = 384;  // a producer warpgroup and two consumer warpgroups

template <int N>
struct Layout {
  static constexpr int STAGES = N <= 64 ? 5 : 4;
  static constexpr int WEIGHT_BYTES = TILE_COLUMNS * ROW_BYTES;
  static constexpr int HIDDEN_BYTES = N * ROW_BYTES;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + HIDDEN_BYTES;
  // Then: the running maximum and sum of each consumer warp, the labels' logits, the barriers. The copies with a
  // 128-byte swizzle need 1024-byte alignment, hence the slack.
  static constexpr int STATE_BYTES = (2 * CONSUMER_WARPS + 1) * N * 4;
  static constexpr int TOTAL_BYTES = 1024 + STAGES * STAGE_BYTES + STATE_BYTES + 2 * STAGES * 8;
};

// The 8 lanes that hold the same hidden row have the same lane % 4.
DEVICE float column_max(float value) {
  for (int step = 4; step < 32; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}
DEVICE float column_sum(float value) {
  for (int step = 4; step < 32; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// exp(from - to), 0 for from = -inf, also when `to` is.
DEVICE float rescale(float from, float to) {
  return from == NEGATIVE_INFINITY ? 0.0f : __expf(from - to);
}

template <int N>
DEVICE void statistics(const TensorMap& hidden, const TensorMap& weight, const long long* labels,
                                           float* partials, int rows, int columns, int depth_steps,
                                           long long first_column, int column_tiles) {
  using L = Layout<N>;
  unsigned char* raw = dynamic_shared();
  const u32 base = (shared_address(raw) + 1023) / 1024 * 1024;
  unsigned char* aligned = raw + (base - shared_address(raw));
  float* warp_maximum = reinterpret_cast<float*>(aligned + L::STAGES * L::STAGE_BYTES);
  float* warp_total = warp_maximum + CONSUMER_WARPS * N;
  float* label_logit = warp_total + CONSUMER_WARPS * N;
  const u32 full = shared_address(label_logit + N);
  const u32 empty = full + L::STAGES * 8;
  const int first_row = blockIdx.x * N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < L::STAGES; ++stage) {
      barrier_init(full + stage * 8, 1);
      barrier_init(empty + stage * 8, CONSUMER_WARPS);
    }
    barriers_visible();
  }
  for (int index = threadIdx.x; index < CONSUMER_WARPS * N; index += THREADS) {
    warp_maximum[index] = NEGATIVE_INFINITY;
    warp_total[index] = 0.0f;
    if (index < N) label_logit[index] = 0.0f;
  }
  __syncthreads();

  if (warp < 4) {
    registers_give<40>();
    if (threadIdx.x == 0) {
      const u64 once = read_once(), often = read_often();
      int stage = 0;
      u32 phase = 0;
      for (int tile = blockIdx.y; tile < column_tiles; tile += gridDim.y) {
        for (int step = 0; step < depth_steps; ++step) {
          barrier_wait(empty + stage * 8, phase ^ 1);
          barrier_expect(full + stage * 8, L::STAGE_BYTES);
          const u32 target = base + stage * L::STAGE_BYTES;
          copy_tile(target, &weight, step * DEPTH, tile * TILE_COLUMNS, full + stage * 8, once);
          copy_tile(target + L::WEIGHT_BYTES, &hidden, step * DEPTH, first_row, full + stage * 8, often);
          if (++stage == L::STAGES) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }

  registers_take<232>();
  const int consumer = warp - 4;          // 0 to 7
  const int half = consumer / 4 * 128;    // this warpgroup's columns within a tile
  const int own_column = half + consumer % 4 * 16 + lane / 4;
  int stage = 0;
  u32 phase = 0;
  for (int tile = blockIdx.y; tile < column_tiles; tile += gridDim.y) {
    float logits[2][N / 2];
    int previous = -1;
    for (int step = 0; step < depth_steps; ++step) {
      barrier_wait(full + stage * 8, phase);
      const u32 weight_tile = base + stage * L::STAGE_BYTES + half * ROW_BYTES;
      const u32 hidden_tile = base + stage * L::STAGE_BYTES + L::WEIGHT_BYTES;
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; ++k) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          Wgmma<N>::run(logits[part], operand(weight_tile + part * 64 * ROW_BYTES + k * 32),
                        operand(hidden_tile + k * 32), step > 0 || k > 0);
        }
      }
      wgmma_commit();
      // The step before this one has been multiplied: its stage may be filled again.
      wgmma_wait<1>();
      if (previous >= 0 && lane == 0) barrier_arrive(empty + previous * 8);
      previous = stage;
      if (++stage == L::STAGES) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int index = 0; index < N / 2; ++index) wgmma_landed(logits[0][index]), wgmma_landed(logits[1][index]);
    if (lane == 0) barrier_arrive(empty + previous * 8);

    // Thread's values of a hidden row: columns own_column + 64 part + 8 (0 or 1) of the tile.
    const int column = tile * TILE_COLUMNS + own_column;
#pragma unroll
    for (int index = 0; index < N / 4; ++index) {
      const int row = index / 2 * 8 + lane % 4 * 2 + index % 2;
      const long long label = first_row + row < rows ? labels[first_row + row] - first_column : -1;
      float value[4], maximum = NEGATIVE_INFINITY, total = 0.0f;
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int at = column + part / 2 * 64 + part % 2 * 8;
        const float logit = logits[part / 2][index / 2 * 4 + part % 2 * 2 + index % 2];
        value[part] = at < columns ? logit : NEGATIVE_INFINITY;
        if (at < columns && label == at) label_logit[row] = logit;  // one thread of one program at most
        maximum = fmaxf(maximum, value[part]);
      }
      maximum = column_max(maximum);
#pragma unroll
      for (int part = 0; part < 4; ++part) total += rescale(value[part], maximum);
      total = column_sum(total);
      if (lane < 4) {
        float* running = warp_maximum + consumer * N + row;
        float* sum = warp_total + consumer * N + row;
        const float merged = fmaxf(*running, maximum);
        *sum = *sum * rescale(*running, merged) + total * rescale(maximum, merged);
        *running = merged;
      }
      __syncwarp();
    }
  }

  consumers_sync(256);
  const int row = threadIdx.x - 128;
  if (row < N && first_row + row < rows) {
    float maximum = NEGATIVE_INFINITY, total = 0.0f;
    for (int other = 0; other < CONSUMER_WARPS; ++other) maximum = fmaxf(maximum, warp_maximum[other * N + row]);
    for (int other = 0; other < CONSUMER_WARPS; ++other)
      total += warp_total[other * N + row] * rescale(warp_maximum[other * N + row], maximum);
    const long long plane = static_cast<long long>(gridDim.y) * rows;
    float* target = partials + static_cast<long long>(blockIdx.y) * rows + first_row + row;
    target[0] = maximum;
    target[plane] = total;
    target[2 * plane] = label_logit[row];
  }
}

#define FEW_ROWS(N)                                                                                              \
  KERNEL(THREADS) few_row_logprob_##N(PARAMETER TensorMap hidden, PARAMETER TensorMap weight, const long long* labels, \
                                      float* partials, int rows, int columns, int depth_steps,                    \
                                      long long first_column, int column_tiles) {                                 \
    statistics<N>(hidden, weight, labels, partials, rows, columns, depth_steps, first_column, column_tiles);       \
  }
FEW_ROWS(16)
FEW_ROWS(32)
FEW_ROWS(64)
FEW_ROWS(128)
