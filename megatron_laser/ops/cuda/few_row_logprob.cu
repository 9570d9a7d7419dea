// Statistics of few hidden rows in one read of the weight, for Hopper (sm_90a): per row and program the maximum of the
// logits, the sum of their exponentials relative to it, and the label's logit.
//
// One producer warp feeds a ring of shared-memory stages through the copy engine; two consumer warpgroups multiply. The
// weight is the left operand (64 of its rows per instruction), the few hidden rows are the right one (N = 16 to 128),
// so that few rows are not padded to 64. Each consumer warpgroup owns 128 of a tile's 256 columns of logits. Programs take
// tiles p, p + P, ...; every value in memory has one writer and every sum a fixed order.
//
// Reference: PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions" (descriptors, fragment layout) and
// "cp.async.bulk.tensor"; CUDA driver API, cuTensorMapEncodeTiled. No headers: the file also compiles without the rest
// of the toolkit.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {  // opaque; CUtensorMap of the driver
  unsigned char bytes[128];
};

constexpr int TILE_COLUMNS = 256;  // rows of the weight per tile
constexpr int DEPTH = 64;          // 128 bytes of bfloat16: one swizzled row
constexpr int ROW_BYTES = DEPTH * 2;
constexpr int CONSUMER_WARPS = 8;
constexpr int THREADS = 384;  // a producer warpgroup and two consumer warpgroups
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

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

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_tile(u32 target, const TensorMap* map, int k, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target), "l"(map), "r"(barrier), "r"(k), "r"(row), "l"(policy)
      : "memory");
}

// K-major operand with a 128-byte swizzle: groups of 8 rows are 1024 bytes apart, the leading offset is not used.
__device__ __forceinline__ u64 operand(u32 address) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(1) << 16) |
         (static_cast<u64>(1024 >> 4) << 32) | (static_cast<u64>(1) << 62);
}

// d [64, N] += a [64, 16] b [N, 16]^T, bfloat16 in, float32 out; the sum starts anew unless `accumulate`.
template <int N>
struct Wgmma;

template <>
struct Wgmma<16> {
  __device__ static void run(float (&d)[8], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7 "
        "}, %8, %9, p, 1, 1, 0, 0;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<32> {
  __device__ static void run(float (&d)[16], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15 "
        "}, %16, %17, p, 1, 1, 0, 0;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<64> {
  __device__ static void run(float (&d)[32], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

template <>
struct Wgmma<128> {
  __device__ static void run(float (&d)[64], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
        "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The 8 lanes that hold the same hidden row have the same lane % 4.
__device__ __forceinline__ float column_max(float value) {
  for (int step = 4; step < 32; step *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}
__device__ __forceinline__ float column_sum(float value) {
  for (int step = 4; step < 32; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// exp(from - to), 0 for from = -inf, also when `to` is.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == NEGATIVE_INFINITY ? 0.0f : __expf(from - to);
}

template <int N>
__device__ __forceinline__ void statistics(const TensorMap& hidden, const TensorMap& weight, const long long* labels,
                                           float* partials, int rows, int columns, int depth_steps,
                                           long long first_column, int column_tiles) {
  using L = Layout<N>;
  extern __shared__ unsigned char raw[];
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
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  for (int index = threadIdx.x; index < CONSUMER_WARPS * N; index += THREADS) {
    warp_maximum[index] = NEGATIVE_INFINITY;
    warp_total[index] = 0.0f;
    if (index < N) label_logit[index] = 0.0f;
  }
  __syncthreads();

  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      u64 once, often;  // the weight is read once, the hidden rows by every program
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
      asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
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

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
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
    // The compiler does not know that the sums were in flight: nothing may read them before this point.
#pragma unroll
    for (int index = 0; index < N / 2; ++index)
      asm volatile("" : "+f"(logits[0][index]), "+f"(logits[1][index])::"memory");
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

  asm volatile("bar.sync 1, 256;" ::: "memory");  // the consumers
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
  extern "C" __global__ void __launch_bounds__(THREADS, 1) few_row_logprob_##N(                                   \
      const __grid_constant__ TensorMap hidden, const __grid_constant__ TensorMap weight, const long long* labels, \
      float* partials, int rows, int columns, int depth_steps, long long first_column, int column_tiles) {         \
    statistics<N>(hidden, weight, labels, partials, rows, columns, depth_steps, first_column, column_tiles);       \
  }
FEW_ROWS(16)
FEW_ROWS(32)
FEW_ROWS(64)
FEW_ROWS(128)
