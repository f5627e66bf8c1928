/* kernels/gemm_sm90.cu: the products of gemm.h on Hopper's tensor cores, 16-bit types.

   A block of two warpgroups computes 128 x WIDTH of C, 64 rows each, fp32 accumulators in
   registers. Tiles 64 deep pass through a ring of stages in shared memory. All threads fill them
   with cp.async, which zeroes what is not valid by itself and takes any gather of 16-byte pieces;
   where addresses do not allow that, pieces are put together from single elements, and the products
   stay the same bit for bit.

       stage   A 128 x 64 (16 KiB) | B WIDTH x 64     overlaid at the end by C [128][WIDTH+4] floats

   Both operands are kept the way memory holds them, 128-byte rows with the 16-byte pieces of row r
   swapped by r mod 8 (the tensor cores' 128-byte swizzle):
       depth along memory   row = a row of the tile, 64 deep              A forward, backward;
                                                                          B forward
       depth across memory  row = a depth, 64 columns; panels of 64 x 64  A, B of sums; B backward
 */
#include "gemm.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"

using namespace rgk;

namespace {

enum { DEPTH = 64, A_BYTES = RGK_GEMM_M * DEPTH * 2, PANEL = 64 * 128, LOOK = 8 };

/* Depth along memory: this thread's piece of row `row`, of depth 8·along. */
__device__ __forceinline__ int along() {
  return threadIdx.x & 7;
}
__device__ __forceinline__ uint32_t along_at(int row) {
  return row * 128 + ((along() ^ (row & 7)) << 4);
}
/* Depth across memory, W columns: this thread's pieces have columns 8·across … and depths deep,
 * deep + STEP … */
template <int W> __device__ __forceinline__ int across() {
  return threadIdx.x & (W / 8 - 1);
}
template <int W> __device__ __forceinline__ int deep() {
  return threadIdx.x / (W / 8);
}
template <int W> __device__ __forceinline__ uint32_t across_at(int depth) {
  return across<W>() / 8 * PANEL + depth * 128 + (((across<W>() & 7) ^ (depth & 7)) << 4);
}

/* What fills stages. begin() once, then load() for every step in turn. Sums look their rows up in
 * `ring`, which is filled a step ahead. */
template <class T, int MODE, int WIDTH> struct fill {
  enum { EACH = WIDTH / 32, STEP = 2048 / WIDTH }; /* pieces of B of a thread */
  const T *a[4], *b[2];
  int lo[4], hi[4];
  int64_t b_step, wrap; /* from one piece of B to the next; from a part's end to the next part */
  int k, part, in;      /* of A; k is this thread's depth */
  int bk, b_part, b_in;
  uint32_t a_at, b_at, columns; /* columns: bit j: piece j of B has a column */

  __device__ __forceinline__ void begin(const rgk_gemm &p, const gemm_row *rows, gemm_tile t) {
    const int tid = threadIdx.x;
    k = along() * 8;
    part = 0, in = k;
    while (in >= p.part) in -= p.part, part++;
    a_at = along_at(tid >> 3);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const gemm_row &r = rows[(tid >> 3) + 32 * j];
      a[j] = (const T *)p.a + r.a;
      lo[j] = r.lo, hi[j] = r.hi;
    }
    columns = 0;
    if constexpr (MODE == RGK_FORWARD) {
      b_at = along_at(tid >> 3);
      b_step = 32 * p.ldb;
#pragma unroll
      for (int j = 0; j < EACH; j++)
        if (gemm_column(p, t.n, WIDTH, (tid >> 3) + 32 * j) >= 0) columns |= 1u << j;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int64_t c = gemm_column(p, t.n, WIDTH, (tid >> 3) + i * WIDTH / 2);
        b[i] = (const T *)p.b + (c < 0 ? 0 : c) * p.ldb + k;
      }
    } else {
      const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8;
      b_at = across_at<WIDTH>(deep<WIDTH>());
      b_step = STEP * p.ldb;
      wrap = p.b_part - p.part * p.ldb;
      bk = deep<WIDTH>();
      b_part = 0, b_in = bk;
      while (b_in >= p.part) b_in -= p.part, b_part++;
      columns = n < p.n;
      b[0] = (const T *)p.b + n;
    }
  }

  __device__ __forceinline__ void load(const rgk_gemm &p, uint32_t stage) {
    const int64_t off = part * p.a_part + in;
    const bool inside = k < p.k;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const bool there = inside && part >= lo[j] && part < hi[j];
      copy16(stage + a_at + j * 4096, there ? a[j] + off : (const T *)p.a, there);
    }
    const uint32_t to = stage + A_BYTES + b_at;
    if constexpr (MODE == RGK_FORWARD) {
      const T *from[2] = {b[0], b[1]};
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const bool there = inside && (columns >> j & 1);
        copy16(to + j * 4096, there ? from[j / (EACH / 2)] : (const T *)p.b, there);
        from[j / (EACH / 2)] += b_step;
      }
      b[0] += DEPTH, b[1] += DEPTH;
    } else {
      const T *from = b[0] + b_in * p.ldb + b_part * p.b_part;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        const bool there = columns && bk + STEP * j < p.k;
        const T *at = b_in + STEP * j < p.part ? from : from + wrap;
        copy16(to + j * STEP * 128, there ? at : (const T *)p.b, there);
        from += b_step;
      }
      bk += DEPTH, b_in += DEPTH;
      while (b_in >= p.part) b_in -= p.part, b_part++;
    }
    k += DEPTH, in += DEPTH;
    while (in >= p.part) in -= p.part, part++;
  }
};

template <class T, int WIDTH> struct fill<T, RGK_SUM, WIDTH> {
  static const int EACH = WIDTH / 32, STEP = 2048 / WIDTH;
  const T *a, *b;
  bool a_there, b_there;
  uint32_t a_at, b_at;

  __device__ __forceinline__ void begin(const rgk_gemm &p, gemm_tile t, int64_t head, int64_t k0) {
    const int64_t m = (int64_t)t.m * RGK_GEMM_M + across<RGK_GEMM_M>() * 8;
    const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8;
    a = (const T *)p.a + head * p.a_head + m + (k0 + deep<RGK_GEMM_M>()) * p.lda;
    b = (const T *)p.b + head * p.b_head + gemm_sum_column(p, n);
    a_there = m < p.m, b_there = n < p.n;
    a_at = across_at<RGK_GEMM_M>(deep<RGK_GEMM_M>());
    b_at = across_at<WIDTH>(deep<WIDTH>());
  }
  __device__ __forceinline__ void load(const rgk_gemm &p, uint32_t stage, const int *row) {
    const T *from = a;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const bool there = a_there && row[deep<RGK_GEMM_M>() + 16 * j] >= 0;
      copy16(stage + a_at + j * 2048, there ? from : (const T *)p.a, there);
      from += 16 * p.lda;
    }
    a += DEPTH * p.lda;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int r = row[deep<WIDTH>() + STEP * j];
      const bool there = b_there && r >= 0;
      copy16(stage + A_BYTES + b_at + j * STEP * 128, there ? b + r * p.ldb : (const T *)p.b,
             there);
    }
  }
};

/* The same for any addresses: pieces are put together from elements; at(e) is where element e lies,
 * NULL: zero. */
template <class T, class F> __device__ __forceinline__ void put_piece(uint32_t to, F at) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint16_t *x = (const uint16_t *)at(2 * i), *y = (const uint16_t *)at(2 * i + 1);
    w[i] = (x ? *x : 0u) | (y ? (uint32_t)*y : 0u) << 16;
  }
  put16(to, w);
}

template <class T, int MODE, int WIDTH>
__device__ __forceinline__ void load_any(const rgk_gemm &p, const gemm_row *rows, gemm_tile t,
                                         int64_t head, uint32_t a, int64_t k0, int64_t end) {
  const uint32_t b = a + A_BYTES;
  const int tid = threadIdx.x;
  if constexpr (MODE == RGK_SUM) {
    const int64_t m = (int64_t)t.m * RGK_GEMM_M + across<RGK_GEMM_M>() * 8;
    const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8;
#pragma unroll 1
    for (int d = deep<RGK_GEMM_M>(); d < DEPTH; d += 16) {
      const bool there = gemm_sum_row(p, k0 + d, end) >= 0;
      const T *row = (const T *)p.a + head * p.a_head + (k0 + d) * p.lda;
      put_piece<T>(a + across_at<RGK_GEMM_M>(d),
                   [&](int e) { return there && m + e < p.m ? row + m + e : nullptr; });
    }
#pragma unroll 1
    for (int d = deep<WIDTH>(); d < DEPTH; d += 2048 / WIDTH) {
      const int64_t from = gemm_sum_row(p, k0 + d, end);
      const T *row = (const T *)p.b + head * p.b_head + from * p.ldb;
      put_piece<T>(b + across_at<WIDTH>(d), [&](int e) {
        return from >= 0 && n + e < p.n ? row + gemm_sum_column(p, n + e) : nullptr;
      });
    }
  } else {
    const gemm_step s = gemm_step_at(p, (int)k0);
    const int k = (int)k0 + along() * 8;
#pragma unroll 1
    for (int row = tid >> 3; row < RGK_GEMM_M; row += 32)
      put_piece<T>(a + along_at(row), [&](int e) { return gemm_a<T>(p, rows[row], s, k + e); });
    if constexpr (MODE == RGK_FORWARD) {
#pragma unroll 1
      for (int row = tid >> 3; row < WIDTH; row += 32) {
        const int64_t c = gemm_column(p, t.n, WIDTH, row);
        put_piece<T>(b + along_at(row), [&](int e) { return gemm_b_forward<T>(p, c, k + e); });
      }
    } else {
      const int64_t n = (int64_t)t.n * WIDTH + across<WIDTH>() * 8;
#pragma unroll 1
      for (int d = deep<WIDTH>(); d < DEPTH; d += 2048 / WIDTH)
        put_piece<T>(b + across_at<WIDTH>(d),
                     [&](int e) { return gemm_b_backward<T>(p, s, (int)k0 + d, n + e); });
    }
  }
}

template <int MODE, int WIDTH> struct shape {
  /* as rgk_gemm_stages */
  static const int STAGES = WIDTH == 256 ? 4 : MODE == RGK_BACKWARD ? 3 : 6;
  static const int BLOCKS = STAGES == 3 ? 2 : 1, BYTES = A_BYTES + WIDTH * DEPTH * 2;
};

template <class T, int MODE, int WIDTH, bool ANY>
__global__ void __launch_bounds__(RGK_GEMM_THREADS, shape<MODE, WIDTH>::BLOCKS)
    gemm_wgmma(const __grid_constant__ rgk_gemm p) {
  constexpr int STAGES = shape<MODE, WIDTH>::STAGES, BYTES = shape<MODE, WIDTH>::BYTES,
                AHEAD = STAGES - 2;
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
  fill<T, MODE, WIDTH> next;
  if constexpr (MODE == RGK_SUM)
    next.begin(p, t, head, k0);
  else
    next.begin(p, rows, t);
  auto load = [&](int step, int stage) {
    if constexpr (ANY)
      load_any<T, MODE, WIDTH>(p, rows, t, head, ring + stage * BYTES, k0 + (int64_t)step * DEPTH,
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
    const uint32_t a = at + group * PANEL, b = at + A_BYTES;
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
  gemm_finish<RGK_GEMM_M, WIDTH, LD>(p, tile, rows, t.n, to);
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
