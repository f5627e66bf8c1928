/* ops/cpu/attn_simd.h: attention's vector kernels, in terms of a vector of W floats. Included once
 * by each of attn_base.c, attn_avx2.c and attn_avx512.c, which set TARGET, W, NV (vectors a
 * register tile is wide), the name of the table, and the handful of operations that plain vector
 * arithmetic does not express: v_set, v_fma, v_max (second operand where one is NaN), v_hmax,
 * v_exp2i (2^n for integral n), v_round, v_load_half.
 *
 * Leaves tiling, packing and masks' meaning to attn.c.
 */

enum { MR = 6, GROUP = 16 / W };

RGI_INLINE TARGET vf v_load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
RGI_INLINE TARGET void v_store(float *p, vf v) {
  memcpy(p, &v, sizeof v);
}
/* m ? a : b, lanes of m all ones or all zeros */
RGI_INLINE TARGET vf v_select(vi m, vf a, vf b) {
  return (vf)((m & (vi)a) | (~m & (vi)b));
}
RGI_INLINE TARGET vi v_iota(void) {
  vi v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}

/* ---- products ---- */

/* C[R, NVEC * W], summing chains of `step` terms. What it reads and writes, gemm has watched. */
RGI_INLINE TARGET RGI_WATCHED void tile(const int R, const int NVEC, const rgi_attn_gemm *g,
                                        const float *a, const float *b, float *c) {
  const int64_t a_row = g->a_row, a_col = g->a_col, ldb = g->ldb, ldc = g->ldc;
  bool add = g->add;
  for (int64_t left = g->k; left > 0; left -= g->step, add = true) {
    vf acc[MR][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < NVEC; v++) acc[r][v] = (vf){0};
    }
    for (int64_t i = left < g->step ? left : g->step; i > 0; i--) {
      vf bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NVEC; v++) bv[v] = v_load(b + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        vf av = v_set(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < NVEC; v++) acc[r][v] = v_fma(av, bv[v], acc[r][v]);
      }
      a += a_col;
      b += ldb;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < NVEC; v++) {
        float *p = c + r * ldc + v * W;
        v_store(p, add ? v_load(p) + acc[r][v] : acc[r][v]);
      }
    }
  }
}

typedef void tile_fn(const rgi_attn_gemm *g, const float *a, const float *b, float *c);
#define TILE(R, NVEC)                                                                      \
  TARGET RGI_WATCHED static void tile_##R##_##NVEC(const rgi_attn_gemm *g, const float *a, \
                                                   const float *b, float *c) {             \
    tile(R, NVEC, g, a, b, c);                                                             \
  }
#define TILES(NVEC) \
  TILE(1, NVEC) TILE(2, NVEC) TILE(3, NVEC) TILE(4, NVEC) TILE(5, NVEC) TILE(6, NVEC)
#define ROW(NVEC) \
  { tile_1_##NVEC, tile_2_##NVEC, tile_3_##NVEC, tile_4_##NVEC, tile_5_##NVEC, tile_6_##NVEC }

TILES(1)
TILES(2)
#if NV == 4
TILES(3)
TILES(4)
static tile_fn *const tile_table[NV][MR] = {ROW(1), ROW(2), ROW(3), ROW(4)};
#else
static tile_fn *const tile_table[NV][MR] = {ROW(1), ROW(2)};
#endif

/* One of A's strides is 1. */
static void watch(const rgi_attn_gemm *g) {
  const bool rows = g->a_col == 1;
  const int64_t n = (g->n + 15) / 16 * 16, row = rows ? g->a_row : g->a_col;
  for (int64_t i = 0; i < (rows ? g->m : g->k); i++) rgi_watch(g->a + i * row, rows ? g->k : g->m);
  for (int64_t i = 0; i < g->k; i++) rgi_watch(g->b + i * g->ldb, n);
  for (int64_t i = 0; i < g->m; i++) rgi_watch(g->c + i * g->ldc, n);
}

TARGET static void gemm(const rgi_attn_gemm *g) {
  const int64_t vectors = (g->n + 15) / 16 * GROUP;
  watch(g);
  for (int64_t v = 0; v < vectors; v += NV) {
    tile_fn *const *fn = tile_table[vectors - v < NV ? vectors - v - 1 : NV - 1];
    /* Rows in equal shares: 16 is 6 + 5 + 5. */
    for (int64_t r = 0, left = (g->m + MR - 1) / MR; left > 0; left--) {
      int64_t rows = (g->m - r + left - 1) / left;
      fn[rows - 1](g, g->a + r * g->a_row, g->b + v * W, g->c + r * g->ldc + v * W);
      r += rows;
    }
  }
}

/* Four rows at a time, to have four chains in flight. */
TARGET static void dots(int64_t rows, int64_t n, const float *a, const float *b, int64_t ld,
                        float *out) {
  float last[4] = {0};
  for (int64_t r = 0; r < rows; r += 4) {
    const float *pa[4], *pb[4];
    float *sum = rows - r >= 4 ? out + r : last;
    for (int i = 0; i < 4; i++) {
      int64_t row = r + i < rows ? r + i : r;
      pa[i] = a + row * ld, pb[i] = b + row * ld;
    }
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int64_t e = 0; e < n; e++) {
      s0 = s_fma(pa[0][e], pb[0][e], s0);
      s1 = s_fma(pa[1][e], pb[1][e], s1);
      s2 = s_fma(pa[2][e], pb[2][e], s2);
      s3 = s_fma(pa[3][e], pb[3][e], s3);
    }
    sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
    if (sum == last) memcpy(out + r, last, (size_t)(rows - r) * sizeof(float));
  }
}

TARGET static void squares(int64_t rows, int64_t n, const float *a, int64_t ld, float *out) {
  for (int64_t r = 0; r < rows; r++, a += ld) {
    vf sum[GROUP];
    float lane[16];
    int64_t i = 0;
    for (int g = 0; g < GROUP; g++) sum[g] = (vf){0};
    for (; i + 16 <= n; i += 16)
      for (int g = 0; g < GROUP; g++) {
        vf x = v_load(a + i + g * W);
        sum[g] = v_fma(x, x, sum[g]);
      }
    for (int g = 0; g < GROUP; g++) v_store(lane + g * W, sum[g]);
    for (; i < n; i++) lane[i % 16] = s_fma(a[i], a[i], lane[i % 16]);
    for (int half = 8; half > 0; half /= 2)
      for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    out[r] = lane[0];
  }
}

/* ---- elementary functions ---- */

/* e^r - 1 for |r| <= ln(2)/2, relative error about 1e-7: r + r^2/2! + … + r^8/8! */
RGI_INLINE TARGET vf expm1_core(vf r) {
  vf p = v_fma(v_set(1.0f / 40320), r, v_set(1.0f / 5040));
  p = v_fma(p, r, v_set(1.0f / 720));
  p = v_fma(p, r, v_set(1.0f / 120));
  p = v_fma(p, r, v_set(1.0f / 24));
  p = v_fma(p, r, v_set(1.0f / 6));
  p = v_fma(p, r, v_set(0.5f));
  return v_fma(p * r, r, r);
}

/* x = n ln 2 + r */
RGI_INLINE TARGET vf reduce(vf x, vf *n) {
  *n = v_round(x * 1.44269504f);
  vf r = v_fma(*n, v_set(-0x1.62e4p-1f), x); /* the leading bits of ln 2: exact for |n| < 2^10 */
  return v_fma(*n, v_set(-0x1.7f7d1cp-20f), r);
}

/* e^x; 0 below the normal range, at most about 2e38; NaN stays. */
RGI_INLINE TARGET vf v_exp(vf x) {
  vf n, y = v_max(v_set(-87.0f), x);
  y = -v_max(v_set(-88.0f), -y);
  vf r = reduce(y, &n);
  vf e = v_exp2i(n) * (1.0f + expm1_core(r));
  return v_select(x < v_set(-87.0f), (vf){0}, e);
}

/* tanh(x) = E / (E + 2) with E = e^(2|x|) - 1, which keeps its digits near 0. */
RGI_INLINE TARGET vf v_tanh(vf x) {
  const vi sign_bit = (vi){0} + INT32_MIN;
  vi sign = (vi)x & sign_bit;
  vf n, y = (vf)((vi)x & ~sign_bit);
  y = -v_max(v_set(-30.0f), -2.0f * y); /* beyond 15 it is 1 */
  vf r = reduce(y, &n), scale = v_exp2i(n);
  vf e = v_fma(scale, expm1_core(r), scale - 1.0f);
  return (vf)((vi)(e / (e + 2.0f)) | sign);
}

/* ---- softmax ---- */

RGI_INLINE TARGET vi visible(vi column, int32_t lo, int32_t hi) {
  return (vi)(column >= lo) & (vi)(column < hi);
}

RGI_INLINE TARGET vf logit(vf s, vf scale, float softcap) {
  s = s * scale;
  if (softcap > 0) s = v_tanh(s * (1.0f / softcap)) * softcap;
  return s;
}

/* Scales the products to logits, masks them; returns the largest. */
RGI_INLINE TARGET float logits_row(float *s, const rgi_attn_softmax *x, int32_t lo, int32_t hi,
                                   const bool capped) {
  const vi iota = v_iota();
  const vf scale = v_set(x->scale), none = v_set(-INFINITY);
  const bool full = lo <= x->c0 && hi >= x->c1;
  vf top = none;
  for (int c = x->c0; c < x->c1; c += W) {
    vf y = logit(v_load(s + c), scale, capped ? x->softcap : 0);
    if (!full) y = v_select(visible(iota + c, lo, hi), y, none);
    top = v_max(y, top);
    v_store(s + c, y);
  }
  return v_hmax(top);
}

TARGET static void softmax(const rgi_attn_softmax *x) {
  float base[RGI_ATTN_ROWS + 16], shrink[RGI_ATTN_ROWS + 16];
  const int rows = x->r1 - x->r0;
  for (int i = 0; i < rows; i++) {
    int r = x->r0 + i;
    float *s = x->s + (int64_t)r * RGI_ATTN_KEYS;
    float top = x->softcap > 0 ? logits_row(s, x, x->lo[r], x->hi[r], true)
                               : logits_row(s, x, x->lo[r], x->hi[r], false);
    float old = x->m[r], m = top > old ? top : old;
    x->m[r] = m;
    base[i] = m > -INFINITY ? m : 0; /* nothing seen yet: any finite base keeps the zeros zero */
    shrink[i] = old > -INFINITY ? old - base[i] : 0; /* then l and o are zero and need no factor */
  }
  for (int i = rows; i < (rows + W - 1) / W * W; i++) shrink[i] = 0;
  for (int i = 0; i < rows; i += W) v_store(shrink + i, v_exp(v_load(shrink + i)));

  for (int i = 0; i < rows; i++) {
    int r = x->r0 + i;
    float *s = x->s + (int64_t)r * RGI_ATTN_KEYS, *l = x->l + (int64_t)r * 16;
    const vf m = v_set(base[i]);
    vf sum[GROUP];
    for (int g = 0; g < GROUP; g++) sum[g] = v_load(l + g * W) * shrink[i];
    for (int c = x->c0; c < x->c1; c += 16)
      for (int g = 0; g < GROUP; g++) {
        vf p = v_exp(v_load(s + c + g * W) - m);
        sum[g] = sum[g] + p;
        v_store(s + c + g * W, p);
      }
    for (int g = 0; g < GROUP; g++) v_store(l + g * W, sum[g]);
    if (shrink[i] == 1.0f) continue;
    float *o = x->o + r * x->ldo;
    for (int64_t e = 0; e < x->ldo; e += W) v_store(o + e, v_load(o + e) * shrink[i]);
  }
}

RGI_INLINE TARGET void dsoftmax_row(float *s, float *dp, const rgi_attn_dsoftmax *x, int r,
                                    const bool capped) {
  const vi iota = v_iota();
  const int32_t lo = x->lo[r], hi = x->hi[r];
  const bool full = lo <= x->c0 && hi >= x->c1;
  const vf scale = v_set(x->scale), lse = v_set(x->lse[r]), delta = v_set(x->delta[r]);
  for (int c = x->c0; c < x->c1; c += W) {
    vi seen = visible(iota + c, lo, hi);
    vf y = logit(v_load(s + c), scale, capped ? x->softcap : 0), p = v_exp(y - lse);
    if (!full) p = v_select(seen, p, (vf){0});
    v_store(s + c, p);
    if (!dp) continue;
    vf ds = p * (v_load(dp + c) - delta);
    if (capped) {
      vf t = y * (1.0f / x->softcap);
      ds = ds * ((1.0f - t) * (1.0f + t));
    }
    if (!full) ds = v_select(seen, ds, (vf){0});
    v_store(dp + c, ds);
  }
}

TARGET static void dsoftmax(const rgi_attn_dsoftmax *x) {
  for (int r = x->r0; r < x->r1; r++) {
    float *s = x->s + (int64_t)r * RGI_ATTN_KEYS,
          *dp = x->dp ? x->dp + (int64_t)r * RGI_ATTN_KEYS : NULL;
    if (x->softcap > 0) {
      dsoftmax_row(s, dp, x, r, true);
    } else {
      dsoftmax_row(s, dp, x, r, false);
    }
  }
}

/* ---- small change ---- */

TARGET static void load(float *dst, rg_dtype type, const void *src, int64_t n) {
  const uint16_t *h = src;
  int64_t i = 0;
  if (type == RG_F32) {
    memcpy(dst, src, (size_t)n * sizeof(float));
    return;
  }
  for (; i + W <= n; i += W) v_store(dst + i, v_load_half(h + i, type == RG_BF16));
  rgi_load(dst + i, type, h + i, n - i);
}

const rgi_attn_isa TABLE = {gemm, softmax, dsoftmax, load, dots, squares};
