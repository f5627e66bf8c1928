/* kernels/gemm_sm90.cu: the products of gemm.h on Hopper's tensor cores, 16-bit types.
 *
 * A block of two warpgroups computes 128 x WIDTH of C, 64 rows each, fp32 accumulators in registers. Tiles 64
 * deep pass through a ring of stages in shared memory. All threads fill them with cp.async, which zeroes what
 * is not valid by itself and takes any gather of 16-byte pieces; where addresses do not allow that, pieces
 * are put together from single elements, and the products stay the same bit for bit.
 *
 *     stage   A 128 x 64 (16 KiB) | B WIDTH x 64           overlaid at the end by C [128][WIDTH+4] as floats
 *
 * Both operands are kept the way memory holds them, 128-byte rows with the 16-byte pieces of row r swapped by
 * r mod 8 (the tensor cores' 128-byte swizzle):
 *     depth along memory   row = a row of the tile, 64 deep                 A forward, backward; B forward
 *     depth across memory  row = a depth, 64 columns; panels of 64 x 64     A, B of sums; B backward
 */
#include "device/gemm.cuh"
#include "device/wgmma.cuh"

using namespace rgk;

namespace {

enum { DEPTH = 64, A_BYTES = RGK_GEMM_M * DEPTH * 2, PANEL = 64 * 128 };

__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
/* Piece of eight elements to shared memory; at(e) is where element e lies, NULL: zero. */
template <class T, class F>
__device__ __forceinline__ void put_piece(uint32_t to, bool vec, const void *somewhere, F at) {
  if (vec) {
    const T *from = at(0);
    copy16(to, from ? from : somewhere, from != nullptr);
    return;
  }
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint16_t *x = (const uint16_t *)at(2 * i), *y = (const uint16_t *)at(2 * i + 1);
    w[i] = (x ? *x : 0u) | (y ? (uint32_t)*y : 0u) << 16;
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}

/* Depth along memory: this thread's piece of row `row`, of depth 8·along. */
__device__ __forceinline__ int along() { return threadIdx.x & 7; }
__device__ __forceinline__ uint32_t along_at(int row) { return row * 128 + ((along() ^ (row & 7)) << 4); }
/* Depth across memory, W columns: this thread's pieces have columns 8·across … */
template <int W> __device__ __forceinline__ int across() { return threadIdx.x & (W / 8 - 1); }
template <int W> __device__ __forceinline__ uint32_t across_at(int depth) {
  return across<W>() / 8 * PANEL + depth * 128 + (((across<W>() & 7) ^ (depth & 7)) << 4);
}

template <class T, int MODE, int WIDTH>
__device__ __forceinline__ void load_stage(const rgk_gemm &p, const gemm_row *rows, gemm_tile t, int64_t head,
                                           uint32_t a, int64_t k0, int64_t end) {
  const uint32_t b = a + A_BYTES;
  const int tid = threadIdx.x;
  if constexpr (MODE == RGK_SUM) {
    const int64_t m = (int64_t)t.m * RGK_GEMM_M + across<RGK_GEMM_M>() * 8;
    const T *base = (const T *)p.a + head * p.a_head + m;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int deep = tid / (RGK_GEMM_M / 8) + 16 * j;
      const int64_t r = k0 + deep;
      const bool there = gemm_sum_row(p, r, end) >= 0;
      put_piece<T>(a + across_at<RGK_GEMM_M>(deep), p.va, p.a,
                   [&](int e) { return there && m + e < p.m ? base + r * p.lda + e : nullptr; });
    }
    const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8, n_at = gemm_sum_column(p, n);
    const T *b_base = (const T *)p.b + head * p.b_head;
#pragma unroll
    for (int j = 0; j < WIDTH / 32; j++) {
      const int deep = tid / (WIDTH / 8) + 2048 / WIDTH * j;
      const int64_t from = gemm_sum_row(p, k0 + deep, end);
      const T *row = b_base + from * p.ldb;
      put_piece<T>(b + across_at<WIDTH>(deep), p.vb, p.b, [&](int e) {
        return from >= 0 && n + e < p.n ? row + (e ? gemm_sum_column(p, n + e) : n_at) : nullptr;
      });
    }
  } else {
    const gemm_step s = gemm_step_at(p, (int)k0);
    const int k = (int)k0 + along() * 8;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int row = (tid >> 3) + 32 * j;
      put_piece<T>(a + along_at(row), p.va, p.a, [&](int e) { return gemm_a<T>(p, rows[row], s, k + e); });
    }
    if constexpr (MODE == RGK_FORWARD) {
#pragma unroll
      for (int j = 0; j < WIDTH / 32; j++) {
        const int row = (tid >> 3) + 32 * j;
        const int64_t c = gemm_column(p, t.n, WIDTH, row);
        put_piece<T>(b + along_at(row), p.vb, p.b, [&](int e) { return gemm_b_forward<T>(p, c, k + e); });
      }
    } else {
      const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8;
#pragma unroll
      for (int j = 0; j < WIDTH / 32; j++) {
        const int deep = tid / (WIDTH / 8) + 2048 / WIDTH * j;
        put_piece<T>(b + across_at<WIDTH>(deep), p.vb, p.b,
                     [&](int e) { return gemm_b_backward<T>(p, s, (int)k0 + deep, n + e); });
      }
    }
  }
}

template <int MODE, int WIDTH> struct shape {
  static const int STAGES = WIDTH == 256 ? 4 : MODE == RGK_BACKWARD ? 3 : 6; /* as rgk_gemm_stages */
  static const int BLOCKS = STAGES == 3 ? 2 : 1, BYTES = A_BYTES + WIDTH * DEPTH * 2;
};

template <class T, int MODE, int WIDTH>
__global__ void __launch_bounds__(RGK_GEMM_THREADS, shape<MODE, WIDTH>::BLOCKS)
    gemm_wgmma(const __grid_constant__ rgk_gemm p) {
  constexpr int STAGES = shape<MODE, WIDTH>::STAGES, BYTES = shape<MODE, WIDTH>::BYTES, AHEAD = STAGES - 2;
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
  if (!__syncthreads_or(any)) end = k0; /* nothing but zeros */
  const int steps = end > k0 ? (int)((end - k0 + DEPTH - 1) / DEPTH) : 0;

  float c[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i < steps)
      load_stage<T, MODE, WIDTH>(p, rows, t, head, ring + i * BYTES, k0 + i * DEPTH, end);
    commit_copies();
  }
  int stage = 0, fill = AHEAD;
  for (int i = 0; i < steps; i++) {
    wait_copies<AHEAD - 1>();
    proxy_fence();
    __syncthreads(); /* the stage is there for all, and all are done with the products of two steps ago */
    const uint32_t at = ring + stage * BYTES;
    const uint32_t a = at + group * PANEL, b = at + A_BYTES; /* 64 rows of A are as many bytes as a panel */
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < DEPTH / 16; d++)
      wgmma<T, WIDTH>::template ss<A_MN, B_MN>(
          c, A_MN ? desc_mn(a + d * 2048, PANEL) : desc_k(a + d * 32),
          B_MN ? desc_mn(b + d * 2048, PANEL) : desc_k(b + d * 32), i > 0 || d > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (i + AHEAD < steps)
      load_stage<T, MODE, WIDTH>(p, rows, t, head, ring + fill * BYTES, k0 + (int64_t)(i + AHEAD) * DEPTH, end);
    commit_copies();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    fill = fill + 1 == STAGES ? 0 : fill + 1;
  }
  wgmma_wait<0>();
  wgmma_keep(c);
  wait_copies<0>();
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
  gemm_finish<RGK_GEMM_M, WIDTH, LD>(p, tile, rows, m0, t.n, to);
}

template <class T> const void *of_type(int mode, int width) {
  if (mode == RGK_FORWARD)
    return width == 256 ? (const void *)gemm_wgmma<T, RGK_FORWARD, 256>
                        : (const void *)gemm_wgmma<T, RGK_FORWARD, 128>;
  if (mode == RGK_BACKWARD)
    return width == 256 ? (const void *)gemm_wgmma<T, RGK_BACKWARD, 256>
                        : (const void *)gemm_wgmma<T, RGK_BACKWARD, 128>;
  return width == 256 ? (const void *)gemm_wgmma<T, RGK_SUM, 256> : (const void *)gemm_wgmma<T, RGK_SUM, 128>;
}

} // namespace

const void *rgk_gemm_wgmma(rg_dtype t, int mode, int width) {
  return t == RG_F16 ? of_type<__half>(mode, width) : of_type<__nv_bfloat16>(mode, width);
}
