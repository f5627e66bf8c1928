/* ops/cpu/gemm.c: packed, register-blocked matrix product; see gemm.h.
 *
 *   for chunks of n (NC), of k (KC):  pack B   panels of nr rows, k-major   [k][nr]   in L2
 *     for chunks of m (MC):           pack A   panels of mr rows, k-major   [k][mr]   in L2
 *       for panels of B, of A:        micro    an mr × nr block of C lives in registers over the
 *                                              whole chunk
 *
 * Ragged panels are padded with zeros and go through the same micro kernel into a buffer, so that
 * an element's bits do not depend on its place in a tile.
 */
#include "gemm.h"
#include "rows.h"

#define KC            RGI_GEMM_KC
#define ALWAYS_INLINE inline __attribute__((always_inline))

/* ---- packing ---- */

typedef float f4 __attribute__((vector_size(16)));
typedef int i4 __attribute__((vector_size(16)));

static const char *address(const rgi_mat *x, int64_t row, int64_t col) {
  int64_t e = (x->row ? x->row[row] : row) * x->stride;
  e += x->part ? (col / x->part) * x->part_stride + col % x->part : col;
  return (const char *)x->data + e * (int64_t)rg_dtype_size(x->type);
}

/* dst = columns [col, col + n) of a row. */
static void load_row(int isa, const rgi_mat *x, int64_t row, int64_t col, int64_t n, float *dst) {
  while (n > 0) {
    int64_t stretch = x->part ? x->part - col % x->part : n;
    if (stretch > n) stretch = n;
    rgi_load_by(isa, dst, x->type, address(x, row, col), stretch);
    dst += stretch, col += stretch, n -= stretch;
  }
}

/* Whether columns [col, col + n) of a row can be read in place. */
static bool in_place(const rgi_mat *x, int64_t col, int64_t n) {
  return x->type == RG_F32 && (!x->part || col % x->part + n <= x->part);
}

/* dst[k * width + r] = src[r][k] for r < 4 */
static void transpose4(const float *const src[4], int64_t kc, int64_t width, float *dst) {
  int64_t k = 0;
  for (; k + 4 <= kc; k += 4, dst += 4 * width) {
    f4 a, b, c, d;
    memcpy(&a, src[0] + k, 16), memcpy(&b, src[1] + k, 16);
    memcpy(&c, src[2] + k, 16), memcpy(&d, src[3] + k, 16);
    f4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5),
       ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    f4 cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5),
       cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    f4 r0 = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5),
       r1 = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
    f4 r2 = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5),
       r3 = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
    memcpy(dst, &r0, 16), memcpy(dst + width, &r1, 16);
    memcpy(dst + 2 * width, &r2, 16), memcpy(dst + 3 * width, &r3, 16);
  }
  for (; k < kc; k++, dst += width)
    for (int r = 0; r < 4; r++) dst[r] = src[r][k];
}

/* Rows of x are rows of the product: a panel is `width` of them, transposed. */
static void pack_across(int isa, const rgi_mat *x, int64_t i, int64_t n, int64_t k, int64_t kc,
                        int64_t width, float *dst) {
  float buffer[4][KC];
  const float *src[4];
  for (int64_t r = 0; r < width; r += 4) {
    int64_t rows = n - r < 0 ? 0 : n - r < 4 ? n - r : 4;
    for (int64_t s = 0; s < 4; s++) {
      if (s >= rows) {
        memset(buffer[s], 0, (size_t)kc * 4);
        src[s] = buffer[s];
      } else if (in_place(x, x->col0 + k, kc)) {
        src[s] = (const float *)address(x, x->row0 + i + r + s, x->col0 + k);
      } else {
        load_row(isa, x, x->row0 + i + r + s, x->col0 + k, kc, buffer[s]);
        src[s] = buffer[s];
      }
    }
    if (width - r >= 4) {
      transpose4(src, kc, width, dst + r);
    } else {
      for (int64_t s = 0; s < width - r; s++)
        for (int64_t t = 0; t < kc; t++) dst[t * width + r + s] = src[s][t];
    }
  }
}

/* Rows of x are terms of the sum: a panel is `width` columns of each. */
static void pack_along(int isa, const rgi_mat *x, int64_t i, int64_t n, int64_t k, int64_t kc,
                       int64_t width, float *dst) {
  bool direct = in_place(x, x->col0 + i, n);
  for (int64_t t = 0; t < kc; t++, dst += width) {
    if (direct)
      memcpy(dst, address(x, x->row0 + k + t, x->col0 + i), (size_t)n * 4);
    else
      load_row(isa, x, x->row0 + k + t, x->col0 + i, n, dst);
    if (n < width) memset(dst + n, 0, (size_t)(width - n) * 4);
  }
}

/* Rows (or columns) [i, i + n) over terms [k, k + kc), as panels of `width`. */
static void pack(int isa, const rgi_mat *x, int64_t i, int64_t n, int64_t k, int64_t kc,
                 int64_t width, float *dst) {
  for (int64_t p = 0; p < n; p += width, dst += width * kc) {
    int64_t rows = n - p < width ? n - p : width;
    if (x->k_rows)
      pack_along(isa, x, i + p, rows, k, kc, width, dst);
    else
      pack_across(isa, x, i + p, rows, k, kc, width, dst);
  }
}

/* ---- micro kernels: c[mr, nr] (+)= Σ_t a[t][mr] · b[t][nr] ---- */

typedef void (*micro_fn)(int64_t kc, const float *a, const float *b, float *c, int64_t ldc,
                         bool add);

/* VECS vectors of LANES floats wide, MR rows high. The loops over rows and vectors
 * unroll, so that `sum` is registers. */
#define MICRO(NAME, TARGET, VEC, LANES, MR, VECS, LOAD, STORE, SET1, FMA, ADD)                \
  TARGET static void NAME(int64_t kc, const float *a, const float *b, float *c, int64_t ldc,  \
                          bool add) {                                                         \
    VEC sum[MR][VECS];                                                                        \
    _Pragma("GCC unroll 16") for (int i = 0; i < MR; i++)                                     \
        _Pragma("GCC unroll 16") for (int j = 0; j < VECS; j++) sum[i][j] = SET1(0.0f);       \
    for (int64_t t = 0; t < kc; t++, a += MR, b += VECS * LANES) {                            \
      VEC right[VECS];                                                                        \
      _Pragma("GCC unroll 16") for (int j = 0; j < VECS; j++) right[j] = LOAD(b + j * LANES); \
      _Pragma("GCC unroll 16") for (int i = 0; i < MR; i++) {                                 \
        VEC left = SET1(a[i]);                                                                \
        _Pragma("GCC unroll 16") for (int j = 0; j < VECS; j++) sum[i][j] =                   \
            FMA(left, right[j], sum[i][j]);                                                   \
      }                                                                                       \
    }                                                                                         \
    _Pragma("GCC unroll 16") for (int i = 0; i < MR; i++)                                     \
        _Pragma("GCC unroll 16") for (int j = 0; j < VECS; j++) {                             \
      float *at = c + i * ldc + j * LANES;                                                    \
      STORE(at, add ? ADD(LOAD(at), sum[i][j]) : sum[i][j]);                                  \
    }                                                                                         \
  }

static ALWAYS_INLINE f4 load4(const float *p) {
  f4 v;
  memcpy(&v, p, 16);
  return v;
}
static ALWAYS_INLINE void store4(float *p, f4 v) {
  memcpy(p, &v, 16);
}
static ALWAYS_INLINE f4 set4(float x) {
  return (f4){x, x, x, x};
}
#define FMA4(a, b, c) ((a) * (b) + (c))
#define ADD4(a, b)    ((a) + (b))
MICRO(micro_base, , f4, 4, 4, 2, load4, store4, set4, FMA4, ADD4)

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
MICRO(micro_avx2, __attribute__((target("avx2,fma"))), __m256, 8, 6, 2, _mm256_loadu_ps,
      _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps)
MICRO(micro_avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), __m512, 16,
      12, 2, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps)
#endif

/* mr divides RGI_GEMM_MC and nr divides RGI_GEMM_NC, so padded panels fit the workspace. */
typedef struct micro_kernel {
  micro_fn run;
  int mr, nr;
} micro_kernel;

static micro_kernel choose(int isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= 2) return (micro_kernel){micro_avx512, 12, 32};
  if (isa == 1) return (micro_kernel){micro_avx2, 6, 16};
#endif
  (void)isa;
  return (micro_kernel){micro_base, 4, 8};
}

/* ---- the product ---- */

static void block(const micro_kernel *u, int64_t m, int64_t n, int64_t kc, const float *a,
                  const float *b, float *c, int64_t ldc, bool add) {
  float buffer[12 * RGI_GEMM_NR];
  for (int64_t j = 0; j < n; j += u->nr)
    for (int64_t i = 0; i < m; i += u->mr) {
      const float *pa = a + i * kc, *pb = b + j * kc;
      float *to = c + i * ldc + j;
      if (i + u->mr <= m && j + u->nr <= n) {
        u->run(kc, pa, pb, to, ldc, add);
        continue;
      }
      u->run(kc, pa, pb, buffer, u->nr, false);
      int64_t rows = m - i < u->mr ? m - i : u->mr, cols = n - j < u->nr ? n - j : u->nr;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < cols; s++) {
          float value = buffer[r * u->nr + s];
          to[r * ldc + s] = add ? to[r * ldc + s] + value : value;
        }
    }
}

void rgi_gemm(int isa, void *work, int64_t m, int64_t n, int64_t k, const rgi_mat *a,
              const rgi_mat *b, float *c, int64_t ldc, bool add) {
  micro_kernel u = choose(isa);
  float *pb = work, *pa = pb + (int64_t)KC * (RGI_GEMM_NC + RGI_GEMM_NR);
  for (int64_t i = 0; k == 0 && i < m; i++) /* an empty sum is +0, and adding that to -0 gives +0 */
    for (int64_t j = 0; j < n; j++) c[i * ldc + j] = add ? c[i * ldc + j] + 0.0f : 0.0f;
  for (int64_t j = 0; j < n; j += RGI_GEMM_NC) {
    int64_t nc = n - j < RGI_GEMM_NC ? n - j : RGI_GEMM_NC;
    for (int64_t t = 0; t < k; t += KC) {
      int64_t kc = k - t < KC ? k - t : KC;
      pack(isa, b, j, nc, t, kc, u.nr, pb);
      for (int64_t i = 0; i < m; i += RGI_GEMM_MC) {
        int64_t mc = m - i < RGI_GEMM_MC ? m - i : RGI_GEMM_MC;
        pack(isa, a, i, mc, t, kc, u.mr, pa);
        block(&u, mc, nc, kc, pa, pb, c + i * ldc + j, ldc, add || t > 0);
      }
    }
  }
}

rgi_tiling rgi_gemm_tiling(int64_t m, int64_t n, int threads) {
  rgi_tiling t = {.m = RGI_GEMM_MC, .n = RGI_GEMM_NC};
  for (;;) {
    t.across = (n + t.n - 1) / t.n;
    t.count = t.across * ((m + t.m - 1) / t.m);
    if (t.count >= 2 * (int64_t)threads) return t;
    bool wide = t.n > 128 && n > t.n / 2, high = t.m > 48 && m > t.m / 2;
    if (!wide && !high) return t;
    if (wide && (!high || t.n > t.m))
      t.n /= 2;
    else
      t.m /= 2;
  }
}
