/* kernels/gemm_mma.cuh: the products of gemm.h by mma.sync, bf16 or fp16 with fp32 sums: any GPU
   since Ampere.

   A block of four warps computes M x N of C, each warp a quarter of it, its accumulators in
   registers. Tiles pass through a ring of three stages in shared memory (gemm_fill.cuh), over which
   C goes out at the end, 64 rows at a time.

                M, N   depth                large tiles read shared memory half as often;
       large    128     32                  small ones, with long steps, are for what has
       small     64     64                  few rows, and take any addresses

       | stage | stage | stage | sums: rows of B, of the next steps |      48 + 1 KiB
       | C (64 rows) | rows    | any addresses: where rows of A are |

   Each element of C is one accumulator that mma.sync adds to sixteen depths at a time, in order:
   its bits do not depend on the tile, nor on where in the tile it lies.
 */
#include "gemm_fill.cuh"

namespace rgk {
namespace {

template <bool LARGE> struct mma_tile {
  enum {
    M = rgk_gemm_mma_tile(LARGE),
    N = M,
    DEPTH = LARGE ? 32 : 64,
    THREADS = RGK_GEMM_MMA_THREADS,
    STAGES = RGK_GEMM_MMA_STAGES,
    LOOK = 4, /* steps whose rows of B are known */
    BLOCKS = LARGE ? 2 : 4,
    ANY = !LARGE,
    LD = N + 4 /* of C, floats */
  };
  static constexpr uint32_t C_BYTES = 64 * LD * 4, RING = STAGES * (M + N) * DEPTH * 2,
                            LEFT = RGK_GEMM_MMA_SHARED - RING;
  static_assert(C_BYTES + M * sizeof(gemm_row) <= RING && LOOK * DEPTH * sizeof(int) <= LEFT &&
                    (!ANY || M * sizeof(gemm_place) <= LEFT),
                "shared memory holds what it has to");
};

/* A warp's part of a stage's products: where it reads, and c += a b. */
template <class T, int MODE, class S> struct mma_part {
  enum { DEPTH = S::DEPTH, WM = S::M / 2, WN = S::N / 2 };
  static constexpr bool A_ACROSS = MODE == RGK_SUM, B_ACROSS = MODE != RGK_FORWARD;
  float c[WM / 16][WN / 2];
  uint32_t a, b;

  __device__ __forceinline__ void begin(int warp) {
    const int m = warp / 2 * WM, n = warp % 2 * WN;
    a = A_ACROSS ? m / 64 * gemm_panel<S> + on<64>(mma_at_columns<64>(0), m % 64 / 8)
                 : mma_at_rows<DEPTH>(0) + m * pitch(DEPTH);
    b = gemm_a_bytes<S> + (B_ACROSS
                               ? n / 64 * gemm_panel<S> + on<64>(mma_at_rows<64>(0), n % 64 / 8)
                               : mma_at_columns<DEPTH>(0) + n * pitch(DEPTH));
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 2; j++) c[i][j] = 0.0f;
  }
  __device__ __forceinline__ void multiply(uint32_t stage) {
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
      uint32_t y[WN / 16][4];
#pragma unroll
      for (int j = 0; j < WN / 16; j++)
        if constexpr (B_ACROSS)
          load_transposed(on<64>(stage + b + k * 16 * pitch(64), 2 * j), y[j]);
        else
          load_matrices(on<DEPTH>(stage + b, 2 * k) + j * 16 * pitch(DEPTH), y[j]);
#pragma unroll
      for (int i = 0; i < WM / 16; i++) {
        uint32_t x[4];
        if constexpr (A_ACROSS)
          load_transposed(on<64>(stage + a + k * 16 * pitch(64), 2 * i), x);
        else
          load_matrices(on<DEPTH>(stage + a, 2 * k) + i * 16 * pitch(DEPTH), x);
#pragma unroll
        for (int j = 0; j < WN / 8; j++) mma<T>(c[i] + 4 * j, x, y[j / 2] + j % 2 * 2);
      }
    }
  }
  /* To shared memory, rows LD apart, of which `first` is the first. */
  __device__ __forceinline__ void put(float *tile, int warp, int first) const {
    const int lane = threadIdx.x % 32, row = warp / 2 * WM - first + lane / 4,
              column = warp % 2 * WN + lane % 4 * 2;
    if (warp / 2 * WM < first || warp / 2 * WM >= first + 64) return;
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 8; j++) {
        float *const to = tile + (row + 16 * i) * S::LD + column + 8 * j;
        *(float2 *)to = make_float2(c[i][4 * j], c[i][4 * j + 1]);
        *(float2 *)(to + 8 * S::LD) = make_float2(c[i][4 * j + 2], c[i][4 * j + 3]);
      }
  }
};

template <class T, int MODE, class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS)
    gemm_mma(const __grid_constant__ rgk_gemm p) {
  enum { DEPTH = S::DEPTH, STAGES = S::STAGES, AHEAD = STAGES - 1, LOOK = S::LOOK };
  constexpr uint32_t BYTES = gemm_bytes<S>;
  extern __shared__ __align__(128) char shared[];
  gemm_row *const rows = (gemm_row *)(shared + S::C_BYTES);
  gemm_place *const places = (gemm_place *)(shared + S::RING);
  int(*const from)[DEPTH] = (int(*)[DEPTH])(shared + S::RING);
  const uint32_t ring = smem_at(shared);
  const int tid = threadIdx.x, warp = tid / 32;
  const bool any_address = S::ANY && rgk_gemm_any(&p);
  const gemm_tile t = gemm_find_tile(p);
  const int64_t m0 = (int64_t)t.m * S::M, head = MODE == RGK_SUM ? blockIdx.z / p.split : 0;
  int64_t k0 = 0, end = p.k;
  if (MODE == RGK_SUM) {
    const int64_t live = gemm_live(p);
    k0 = blockIdx.z % p.split * p.chunk;
    end = k0 + p.chunk < live ? k0 + p.chunk : live;
  }
  bool some = MODE == RGK_SUM;
  for (int r = tid; r < S::M; r += S::THREADS) {
    rows[r] = gemm_find_row(p, m0 + r);
    if (S::ANY && MODE != RGK_SUM) places[r] = rows[r];
    some |= rows[r].lo < rows[r].hi;
  }
  if (MODE == RGK_SUM)
    for (int i = tid; i < (AHEAD + 1) * DEPTH; i += S::THREADS)
      from[i / DEPTH][i % DEPTH] = (int)gemm_sum_row(p, k0 + i, end);
  if (!__syncthreads_or(some)) end = k0; /* nothing but zeros */
  const int steps = end > k0 ? (int)((end - k0 + DEPTH - 1) / DEPTH) : 0;
  gemm_fill<T, MODE, S> next;
  if constexpr (MODE == RGK_SUM)
    next.begin(p, t, head, k0);
  else
    next.begin(p, rows, t);
  __syncthreads(); /* stages lie over the rows */
  auto load = [&](int step, int stage) {
    const uint32_t to = ring + stage * BYTES;
    if (any_address)
      gemm_load_any<T, MODE, S>(p, places, t, head, to, k0 + (int64_t)step * DEPTH, end);
    else if constexpr (MODE == RGK_SUM)
      next.load(p, to, from[step % LOOK]);
    else
      next.load(p, to);
  };

  mma_part<T, MODE, S> part;
  part.begin(warp);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i < steps) load(i, i);
    copies_commit();
  }
  int stage = 0, free = AHEAD;
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    copies_wait<AHEAD - 1>();
    /* the stage is there for all, and all are done with the one before it */
    __syncthreads();
    if (i + AHEAD < steps) load(i + AHEAD, free);
    copies_commit();
    if (MODE == RGK_SUM && tid < DEPTH)
      from[(i + AHEAD + 1) % LOOK][tid] =
          (int)gemm_sum_row(p, k0 + (int64_t)(i + AHEAD + 1) * DEPTH + tid, end);
    part.multiply(ring + stage * BYTES);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    free = free + 1 == STAGES ? 0 : free + 1;
  }
  copies_wait<0>();
  __syncthreads();

  for (int r = tid; r < S::M; r += S::THREADS) rows[r] = gemm_find_row(p, m0 + r);
  char *to = (char *)p.c + (MODE == RGK_SUM ? (int64_t)blockIdx.z * p.c_split * 4 : 0);
#pragma unroll 1
  for (int first = 0; first < S::M; first += 64) {
    if (first > 0) __syncthreads();
    part.put((float *)shared, warp, first);
    __syncthreads();
    gemm_finish<64, S::N, S::LD, S::THREADS>(p, (const float *)shared, rows + first, t.n, to);
  }
}

template <class T, bool LARGE> const void *gemm_mma_instance(int mode) {
  using S = mma_tile<LARGE>;
  if (mode == RGK_FORWARD) return (const void *)gemm_mma<T, RGK_FORWARD, S>;
  return mode == RGK_BACKWARD ? (const void *)gemm_mma<T, RGK_BACKWARD, S>
                              : (const void *)gemm_mma<T, RGK_SUM, S>;
}

} // namespace
} // namespace rgk
