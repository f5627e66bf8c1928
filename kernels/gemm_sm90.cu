/* kernels/gemm_sm90.cu: the products of gemm.h on Hopper's tensor cores, 16-bit types.

   A block of two warpgroups computes 128 x WIDTH of C, 64 rows each, fp32 accumulators in
   registers. Tiles 64 deep pass through a ring of stages in shared memory (gemm_fill.cuh, whose
   layout is the tensor cores' 128-byte swizzle).

       stage   A 128 x 64 (16 KiB) | B WIDTH x 64     overlaid at the end by C [128][WIDTH+4] floats
 */
#include "gemm_fill.cuh"
#include "device/wgmma.cuh"

using namespace rgk;

namespace {

enum { DEPTH = 64, LOOK = 8 };

template <int MODE, int WIDTH> struct shape {
  enum { M = RGK_GEMM_M, N = WIDTH, DEPTH = ::DEPTH, THREADS = RGK_GEMM_THREADS };
  /* as rgk_gemm_stages */
  static const int STAGES = WIDTH == 256 ? 4 : MODE == RGK_BACKWARD ? 3 : 6;
  static const int BLOCKS = STAGES == 3 ? 2 : 1;
};

template <class T, int MODE, int WIDTH, bool ANY>
__global__ void __launch_bounds__(RGK_GEMM_THREADS, shape<MODE, WIDTH>::BLOCKS)
    gemm_wgmma(const __grid_constant__ rgk_gemm p) {
  using S = shape<MODE, WIDTH>;
  constexpr int STAGES = S::STAGES, AHEAD = STAGES - 2;
  constexpr uint32_t BYTES = gemm_bytes<S>, PANEL = gemm_panel<S>;
  constexpr int LD = WIDTH + 4;
  constexpr bool A_MN = MODE == RGK_SUM, B_MN = MODE != RGK_FORWARD; /* depth across memory */
  extern __shared__ char unaligned[];
  __shared__ gemm_row rows[RGK_GEMM_M];
  char *const shared = unaligned + (-smem_at(unaligned) & 1023);
  const uint32_t ring = smem_at(shared);
  const int tid = threadIdx.x, group = tid / 128;
  const gemm_tile t = gemm_find_tile(p);
  const int64_t m0 = (int64_t)t.m * RGK_GEMM_M, head = MODE == RGK_SUM ? blockIdx.z / p.split : 0;
  int64_t k0 = 0, end = p.k;
  if (MODE == RGK_SUM) {
    const int64_t live = gemm_live(p);
    k0 = blockIdx.z % p.split * p.chunk;
    end = k0 + p.chunk < live ? k0 + p.chunk : live;
  }
  bool any = MODE == RGK_SUM;
  if (tid < RGK_GEMM_M) {
    rows[tid] = gemm_find_row(p, m0 + tid);
    any |= rows[tid].lo < rows[tid].hi;
  }
  __shared__ int from[LOOK][DEPTH]; /* sums: rows of B, of the steps to come */
  if (MODE == RGK_SUM && !ANY)
    for (int i = tid; i < (AHEAD + 1) * DEPTH; i += RGK_GEMM_THREADS)
      from[i / DEPTH][i % DEPTH] = (int)gemm_sum_row(p, k0 + i, end);
  if (!__syncthreads_or(any)) end = k0; /* nothing but zeros */
  const int steps = end > k0 ? (int)((end - k0 + DEPTH - 1) / DEPTH) : 0;
  gemm_fill<T, MODE, S> next;
  if constexpr (MODE == RGK_SUM)
    next.begin(p, t, head, k0);
  else
    next.begin(p, rows, t);
  auto load = [&](int step, int stage) {
    if constexpr (ANY)
      gemm_load_any<T, MODE, S>(p, rows, t, head, ring + stage * BYTES, k0 + (int64_t)step * DEPTH,
                                end);
    else if constexpr (MODE == RGK_SUM)
      next.load(p, ring + stage * BYTES, from[step % LOOK]);
    else
      next.load(p, ring + stage * BYTES);
  };

  float c[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i < steps) load(i, i);
    copies_commit();
  }
  int stage = 0, free = AHEAD;
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    copies_wait<AHEAD - 1>();
    proxy_fence();
    /* the stage is there for all, and all are done with the products of two steps ago */
    __syncthreads();
    const uint32_t at = ring + stage * BYTES;
    /* 64 rows of A are as many bytes as a panel */
    const uint32_t a = at + group * PANEL, b = at + gemm_a_bytes<S>;
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < DEPTH / 16; d++)
      wgmma<T, WIDTH>::template ss<A_MN, B_MN>(
          c, A_MN ? desc_mn(a + d * 2048, PANEL) : desc_k(a + d * 32),
          B_MN ? desc_mn(b + d * 2048, PANEL) : desc_k(b + d * 32), i > 0 || d > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (i + AHEAD < steps) load(i + AHEAD, free);
    copies_commit();
    if (MODE == RGK_SUM && !ANY && tid < DEPTH)
      from[(i + AHEAD + 1) % LOOK][tid] =
          (int)gemm_sum_row(p, k0 + (int64_t)(i + AHEAD + 1) * DEPTH + tid, end);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    free = free + 1 == STAGES ? 0 : free + 1;
  }
  wgmma_wait<0>();
  wgmma_keep(c);
  copies_wait<0>();
  if (steps == 0)
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i++) c[i] = 0.0f;
  __syncthreads();

  float *const tile = (float *)shared;
  const int row = tid / 32 * 16 + tid % 32 / 4;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; j++) {
    const int column = 8 * j + tid % 4 * 2;
    *(float2 *)(tile + row * LD + column) = make_float2(c[4 * j], c[4 * j + 1]);
    *(float2 *)(tile + (row + 8) * LD + column) = make_float2(c[4 * j + 2], c[4 * j + 3]);
  }
  __syncthreads();
  char *to = (char *)p.c + (MODE == RGK_SUM ? (int64_t)blockIdx.z * p.c_split * 4 : 0);
  gemm_finish<RGK_GEMM_M, WIDTH, LD, RGK_GEMM_THREADS>(p, tile, rows, t.n, to);
}

template <class T, int MODE> const void *instance(int width, bool any) {
  if (any) return (const void *)gemm_wgmma<T, MODE, 128, true>;
  return width == 256 ? (const void *)gemm_wgmma<T, MODE, 256, false>
                      : (const void *)gemm_wgmma<T, MODE, 128, false>;
}
template <class T> const void *of_type(int mode, int width, bool any) {
  if (mode == RGK_FORWARD) return instance<T, RGK_FORWARD>(width, any);
  return mode == RGK_BACKWARD ? instance<T, RGK_BACKWARD>(width, any)
                              : instance<T, RGK_SUM>(width, any);
}

} // namespace

const void *rgk_gemm_wgmma(rg_dtype t, int mode, int width, bool any) {
  return t == RG_F16 ? of_type<__half>(mode, width, any) : of_type<__nv_bfloat16>(mode, width, any);
}
