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
#include <type_traits>

using namespace rgk;

namespace {

enum { DEPTH = 64, A_BYTES = RGK_GEMM_M * DEPTH * 2, PANEL = 64 * 128 };

__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void mma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Rows of 128 bytes, swizzled; 1024 bytes from one group of eight rows to the next, PANEL to the next panel. */
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(PANEL >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

#define R8(c, i)                                                                                             \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]),                \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define R64(c, i)                                                                                            \
  R8(c, i), R8(c, i + 8), R8(c, i + 16), R8(c, i + 24), R8(c, i + 32), R8(c, i + 40), R8(c, i + 48),         \
      R8(c, i + 56)
#define N64                                                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "     \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "     \
  "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "     \
  "%62, %63"
#define N128                                                                                                 \
  N64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "    \
      "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, "    \
      "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "     \
      "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MMA128(type)                                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" N64                         \
               "}, %64, %65, p, 1, 1, %67, %68;\n}\n"                                                        \
               : R64(c, 0)                                                                                   \
               : "l"(a), "l"(b), "r"(onto), "n"(TA), "n"(TB))
#define MMA256(type)                                                                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                 \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" N128                        \
               "}, %128, %129, p, 1, 1, %131, %132;\n}\n"                                                    \
               : R64(c, 0), R64(c, 64)                                                                       \
               : "l"(a), "l"(b), "r"(onto), "n"(TA), "n"(TB))

/* c += a·b, 16 deep; onto 0: c = a·b. TA, TB: the depth runs across memory. */
template <class T, int TA, int TB> __device__ __forceinline__ void mma(float (&c)[64], uint64_t a, uint64_t b, int onto) {
  if (std::is_same<T, __half>::value)
    MMA128("f16");
  else
    MMA128("bf16");
}
template <class T, int TA, int TB> __device__ __forceinline__ void mma(float (&c)[128], uint64_t a, uint64_t b, int onto) {
  if (std::is_same<T, __half>::value)
    MMA256("f16");
  else
    MMA256("bf16");
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
  constexpr int TA = MODE == RGK_SUM, TB = MODE != RGK_FORWARD, LD = WIDTH + 4;
  extern __shared__ char unaligned[];
  __shared__ gemm_row rows[RGK_GEMM_M];
  char *const shared = unaligned + (-shared_address(unaligned) & 1023);
  const uint32_t ring = shared_address(shared);
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
  for (int i = 0; i < WIDTH / 2; i++) c[i] = 0.0f;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i < steps)
      load_stage<T, MODE, WIDTH>(p, rows, t, head, ring + i * BYTES, k0 + i * DEPTH, end);
    commit_copies();
  }
  int stage = 0, fill = AHEAD;
  for (int i = 0; i < steps; i++) {
    wait_copies<AHEAD - 1>();
    fence_proxy();
    __syncthreads(); /* the stage is there for all, and all are done with the products of two steps ago */
    const uint32_t at = ring + stage * BYTES;
    const uint64_t a = describe(at + group * (TA ? PANEL : 64 * 128)), b = describe(at + A_BYTES);
    mma_begin();
#pragma unroll
    for (int d = 0; d < DEPTH / 16; d++)
      mma<T, TA, TB>(c, a + (TA ? d * 16 * 128 >> 4 : d * 32 >> 4), b + (TB ? d * 16 * 128 >> 4 : d * 32 >> 4), 1);
    mma_commit();
    mma_wait<1>();
    if (i + AHEAD < steps)
      load_stage<T, MODE, WIDTH>(p, rows, t, head, ring + fill * BYTES, k0 + (int64_t)(i + AHEAD) * DEPTH, end);
    commit_copies();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    fill = fill + 1 == STAGES ? 0 : fill + 1;
  }
  mma_wait<0>();
  wait_copies<0>();
  __syncthreads();

  /* Thread i of a warp holds rows i/4 and i/4 + 8, columns 8j + 2·(i mod 4) + {0, 1}. */
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
