/* ops/cpu/topk_simd.h: the score kernels, written with the compiler's vectors; included once per
 * CPU level by topk.c, with
 *   TK_NAME(x)  x with the level's suffix   TK_TARGET  the function attribute of the level
 *   TK_BYTES    bytes of a vector           TK_KEYS    keys whose sums stay in registers together
 *   TK_ISA      the level
 *   TK_CLEAR    clears the vectors' upper halves, where there are such: gcc 12 does not after a
 *               call of `raw`, which leaves them alone; instructions of the older set are slow then
 */
#define vf        TK_NAME(vf)
#define vi        TK_NAME(vi)
#define vu        TK_NAME(vu)
#define vh        TK_NAME(vh)
#define vd        TK_NAME(vd)
#define vl        TK_NAME(vl)
#define vs        TK_NAME(vs)
#define vg        TK_NAME(vg)
#define v4        TK_NAME(v4)
#define W         TK_NAME(W)
#define V         TK_NAME(V)
#define VD        TK_NAME(VD)
#define exp_parts TK_NAME(exp_parts)
#define exp_f     TK_NAME(exp_f)
#define exp_d     TK_NAME(exp_d)
#define cap       TK_NAME(cap)
#define load_q    TK_NAME(load_q)
#define load_k    TK_NAME(load_k)
#define dots_of   TK_NAME(dots_of)
#define dots      TK_NAME(dots)
#define logits    TK_NAME(logits)
#define TK_INLINE static inline __attribute__((always_inline)) TK_TARGET

typedef float vf __attribute__((vector_size(TK_BYTES), may_alias));
typedef int32_t vi __attribute__((vector_size(TK_BYTES), may_alias));
typedef uint32_t vu __attribute__((vector_size(TK_BYTES), may_alias));
/* as many floats as vd has doubles */
typedef float vh __attribute__((vector_size(TK_BYTES / 2), may_alias));
typedef double vd __attribute__((vector_size(TK_BYTES), may_alias));
typedef uint64_t vl __attribute__((vector_size(TK_BYTES), may_alias));
typedef int64_t vs __attribute__((vector_size(TK_BYTES), may_alias));
typedef int32_t vg __attribute__((vector_size(TK_BYTES / 2), may_alias)); /* widens to vs */
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));

enum {
  W = TK_BYTES / 4,           /* floats of a vector */
  V = RGI_TOPK_LANES / W,     /* float vectors of a tile's lanes */
  VD = RGI_TOPK_LANES * 2 / W /* double vectors of them */
};

/* ---- elementary functions; comparisons give lanes of all ones or all zeros ---- */

/* x = n·ln 2 + r with abs(r) <= ln 2 / 2: returns e^r - 1, and 2^n. x in [-87, 89].
 * Taylor to r^7 (off by 5e-9). */
TK_INLINE vf exp_parts(vf x, vf *power) {
  const float magic = 0x1.8p23f; /* x + magic has the integer nearest to x in its low bits */
  vf t = x * 0x1.715476p+0f + magic, n = t - magic;
  vf r = x - n * 0x1.63p-1f;   /* the first 9 bits of ln 2, rounded up: an exact product … */
  r = r + n * 0x1.bd0106p-13f; /* … less what that is too much */
  vf p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  *power = (vf)(((vu)t - 0x4b400000u + 127u) << 23);
  return p * (r * r) + r;
}

/* e^x; 0 below e^-87, infinite above e^88.7, NaN for NaN. */
TK_INLINE vf exp_f(vf x) {
  vf low = (vf){0} - 87.0f, high = (vf){0} + 89.0f, power;
  vi under = (vi)(x < low), over = (vi)(x > high);
  x = (vf)((under & (vi)low) | (over & (vi)high) | (~(under | over) & (vi)x));
  vf e = exp_parts(x, &power);
  return (vf)(~under & (vi)(e * power + power));
}

/* c·tanh(s/c), accurate relative to itself: tanh(y) = m / (m + 2) with m = e^2y - 1
 * formed without cancellation. */
TK_INLINE vf cap(vf s, float c) {
  vi sign = (vi)s & (vi)((vu){0} + 0x80000000u);
  vf y = (vf)((vi)s ^ sign) / c * 2.0f, most = (vf){0} + 24.0f, power; /* tanh(12) rounds to 1 */
  vi over = (vi)(y > most);
  vf m = exp_parts((vf)((over & (vi)most) | (~over & (vi)y)), &power);
  m = m * power + (power - 1.0f);
  return (vf)((vi)(m / (m + 2.0f) * c) ^ sign);
}

/* e^x in double: 0 below e^-708, infinite from e^710. Taylor to r^12 (off by 2e-16). */
TK_INLINE vd exp_d(vd x) {
  const double magic = 0x1.8p52;
  vd low = (vd){0} - 708.0, high = (vd){0} + 710.0;
  vl under = (vl)(x < low), over = (vl)(x > high);
  x = (vd)((under & (vl)low) | (over & (vl)high) | (~(under | over) & (vl)x));
  vd t = x * 0x1.71547652b82fep+0 + magic, n = t - magic;
  vd r = x - n * 0x1.62e42fefap-1; /* 37 bits of ln 2: an exact product */
  r = r - n * 0x1.cf79abc9e3b3ap-40;
  vd p = r * (1.0 / 479001600) + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * (r * r) + r;
  vd power = (vd)(((vl)t - 0x4338000000000000u + 1023u) << 52);
  return (vd)(~under & (vl)(p * power + power));
}

/* ---- packing ---- */

/* Queries of head h into [d, LANES], four lanes at a time; lanes past n are zero. */
static TK_TARGET void load_q(const rgi_topk_tile *t, int64_t h, float *out) {
  const size_t size = rg_dtype_size(t->dtype);
  const int64_t d = t->d;
  for (int lane = 0; lane < RGI_TOPK_LANES; lane += 4) {
    const float *row[4];
    for (int r = 0; r < 4; r++) {
      const char *src =
          (const char *)t->q + ((lane + r) * t->q_row + h * t->q_head) * (int64_t)size;
      float *dst = t->row + r * d;
      row[r] = dst;
      if (lane + r >= t->n)
        memset(dst, 0, (size_t)d * 4);
      else if (t->dtype == RG_F32)
        row[r] = (const float *)(const void *)src;
      else
        rgi_load_by(TK_ISA, dst, t->dtype, src, d);
    }
    int64_t i = 0;
    for (; i + 4 <= d; i += 4) { /* a 4 × 4 transpose */
      v4 a = *(const v4 *)(row[0] + i), b = *(const v4 *)(row[1] + i);
      v4 c = *(const v4 *)(row[2] + i), e = *(const v4 *)(row[3] + i);
      v4 ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5),
         ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      v4 ce0 = __builtin_shufflevector(c, e, 0, 4, 1, 5),
         ce1 = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      float *o = out + i * RGI_TOPK_LANES + lane;
      *(v4 *)o = __builtin_shufflevector(ab0, ce0, 0, 1, 4, 5);
      *(v4 *)(o + RGI_TOPK_LANES) = __builtin_shufflevector(ab0, ce0, 2, 3, 6, 7);
      *(v4 *)(o + 2 * RGI_TOPK_LANES) = __builtin_shufflevector(ab1, ce1, 0, 1, 4, 5);
      *(v4 *)(o + 3 * RGI_TOPK_LANES) = __builtin_shufflevector(ab1, ce1, 2, 3, 6, 7);
    }
    for (; i < d; i++)
      for (int r = 0; r < 4; r++) out[i * RGI_TOPK_LANES + lane + r] = row[r][i];
  }
}

/* Keys [key, key + n) into pack_k. */
static TK_TARGET void load_k(const rgi_topk_tile *t, int64_t key, int64_t n) {
  const int64_t size = (int64_t)rg_dtype_size(t->k_dtype);
  for (int64_t j = key; j < key + n; j++)
    rgi_load_by(TK_ISA, t->pack_k + (j - key) * t->d, t->k_dtype,
                t->cache ? rgi_paged_row(t->cache, t->table, t->before + j, t->head)
                         : (const char *)t->k + j * t->k_row * size,
                t->d);
}

/* ---- q·k ---- */

/* n (a constant) keys against two vectors of lanes. */
TK_INLINE void dots_of(const float *q, const float *k, int64_t d, const int n, float *out) {
  vf a[TK_KEYS], b[TK_KEYS];
  TK_UNROLL
  for (int j = 0; j < n; j++) a[j] = b[j] = (vf){0};
  for (int64_t i = 0; i < d; i++) {
    vf q0 = *(const vf *)(q + i * RGI_TOPK_LANES), q1 = *(const vf *)(q + i * RGI_TOPK_LANES + W);
    TK_UNROLL
    for (int j = 0; j < n; j++) {
      a[j] += q0 * k[j * d + i];
      b[j] += q1 * k[j * d + i];
    }
  }
  TK_UNROLL
  for (int j = 0; j < n; j++) {
    *(vf *)(out + j * RGI_TOPK_LANES) = a[j];
    *(vf *)(out + j * RGI_TOPK_LANES + W) = b[j];
  }
}

/* out [n, LANES] = k [n, d] · q [d, LANES] */
static TK_TARGET void dots(const float *q, const float *k, int64_t d, int64_t n, float *out) {
  for (int v = 0; v < V; v += 2) {
    int64_t j = 0;
    for (; j + TK_KEYS <= n; j += TK_KEYS)
      dots_of(q + v * W, k + j * d, d, TK_KEYS, out + j * RGI_TOPK_LANES + v * W);
    for (; j + TK_KEYS / 3 <= n; j += TK_KEYS / 3)
      dots_of(q + v * W, k + j * d, d, TK_KEYS / 3, out + j * RGI_TOPK_LANES + v * W);
    for (; j < n; j++) dots_of(q + v * W, k + j * d, d, 1, out + j * RGI_TOPK_LANES + v * W);
  }
}

/* The same, scaled and capped. */
static TK_TARGET void logits(const rgi_topk_tile *t, int64_t h, int64_t n, float *out) {
  dots(t->pack_q + h * t->d * RGI_TOPK_LANES, t->pack_k, t->d, n, out);
  for (int64_t i = 0; i < n * RGI_TOPK_LANES; i += W) {
    vf s = *(vf *)(out + i) * t->scale;
    *(vf *)(out + i) = t->softcap > 0 ? cap(s, t->softcap) : s;
  }
}

/* ---- scores ---- */

/* Blocks that key j touches, kept within [block0, block1), and how much of the
 * key lies in one, in strides. */
#define TK_FOR_BLOCKS(t, j, block0, block1)                             \
  int64_t first_ = (j) * (t)->stride, last_ = first_ + (t)->kernel - 1; \
  int64_t b0_ = first_ / (t)->block, b1_ = last_ / (t)->block + 1;      \
  for (int64_t b = b0_ > (block0) ? b0_ : (block0); b < (b1_ < (block1) ? b1_ : (block1)); b++)
#define TK_OVERLAP(t, b)                                                        \
  (((last_ + 1 < ((b) + 1) * (t)->block ? last_ + 1 : ((b) + 1) * (t)->block) - \
    (first_ > (b) * (t)->block ? first_ : (b) * (t)->block)) /                  \
   (t)->stride)

static TK_TARGET void TK_NAME(fast)(const rgi_topk_tile *t, int64_t block0, int64_t block1) {
  float s[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  float p[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  float *score = t->score;
  memset(score + block0 * RGI_TOPK_LANES, 0,
         (size_t)(block1 - block0) * RGI_TOPK_LANES * sizeof *score);
  for (int64_t h = 0; h < t->heads; h++) load_q(t, h, t->pack_q + h * t->d * RGI_TOPK_LANES);
  for (int64_t key = t->key0; key < t->key1; key += RGI_TOPK_KEYS) {
    int64_t n = t->key1 - key < RGI_TOPK_KEYS ? t->key1 - key : RGI_TOPK_KEYS;
    load_k(t, key, n);
    memset(p, 0, sizeof p);
    for (int64_t h = 0; h < t->heads; h++) {
      const float *lse = t->pack_lse + h * RGI_TOPK_LANES;
      logits(t, h, n, s);
      for (int64_t j = 0; j < n; j++)
        for (int v = 0; v < V; v++) {
          vi seen = (vi)((vi){0} + (int32_t)(key + j) < *(const vi *)(t->visible + v * W));
          vf x = *(vf *)(s + j * RGI_TOPK_LANES + v * W) - *(const vf *)(lse + v * W);
          *(vf *)(p + j * RGI_TOPK_LANES + v * W) += (vf)(seen & (vi)exp_f(x));
        }
    }
    for (int64_t j = 0; j < n; j++) {
      TK_FOR_BLOCKS(t, key + j, block0, block1) {
        int64_t overlap = TK_OVERLAP(t, b);
        float w = (float)overlap;
        for (int v = 0; v < V; v++) {
          vf *at = (vf *)(score + b * RGI_TOPK_LANES + v * W);
          vf x = *(vf *)(p + j * RGI_TOPK_LANES + v * W);
          vi above = (vi)(x > *at);
          if (t->max)
            *at = (vf)((above & (vi)x) | (~above & (vi)*at));
          else
            *at += x * w;
        }
      }
    }
  }
}

static TK_TARGET void TK_NAME(wide)(const rgi_topk_tile *t, int64_t block0, int64_t block1) {
  float s[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  double p[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  double *score = t->score;
  memset(score + block0 * RGI_TOPK_LANES, 0,
         (size_t)(block1 - block0) * RGI_TOPK_LANES * sizeof *score);
  for (int64_t key = t->key0; key < t->key1; key += RGI_TOPK_KEYS) {
    int64_t n = t->key1 - key < RGI_TOPK_KEYS ? t->key1 - key : RGI_TOPK_KEYS;
    load_k(t, key, n);
    memset(p, 0, sizeof p);
    for (int64_t h = 0; h < t->heads; h++) {
      const float *lse = t->pack_lse + h * RGI_TOPK_LANES;
      logits(t, h, n, s);
      for (int64_t j = 0; j < n; j++)
        for (int v = 0; v < VD; v++) {
          vs visible = __builtin_convertvector(*(const vg *)(t->visible + v * (W / 2)), vs);
          vd x = __builtin_convertvector(*(vh *)(s + j * RGI_TOPK_LANES + v * (W / 2)), vd);
          vd e = exp_d(x - __builtin_convertvector(*(const vh *)(lse + v * (W / 2)), vd) + 300.0);
          *(vd *)(p + j * RGI_TOPK_LANES + v * (W / 2)) += (vd)((vl)(visible > key + j) & (vl)e);
        }
    }
    for (int64_t j = 0; j < n; j++) {
      TK_FOR_BLOCKS(t, key + j, block0, block1) {
        int64_t overlap = TK_OVERLAP(t, b);
        double w = (double)overlap;
        for (int v = 0; v < VD; v++) {
          vd *at = (vd *)(score + b * RGI_TOPK_LANES + v * (W / 2));
          vd x = *(vd *)(p + j * RGI_TOPK_LANES + v * (W / 2));
          vl above = (vl)(x > *at);
          if (t->max)
            *at = (vd)((above & (vl)x) | (~above & (vl)*at));
          else
            *at += x * w;
        }
      }
    }
  }
}

/* What key j counts for its lanes goes to its blocks: it is the block's score, or the best so
 * far. */
static TK_TARGET void TK_NAME(raw)(const rgi_topk_tile *t, int64_t j, const double *x,
                                   int64_t block0, int64_t block1) {
  TK_FOR_BLOCKS(t, j, block0, block1) {
    double *score = (double *)t->score + b * RGI_TOPK_LANES;
    for (int lane = 0; lane < RGI_TOPK_LANES; lane++)
      if (j < t->visible[lane] && (!t->max || x[lane] > score[lane])) score[lane] = x[lane];
  }
}

static TK_TARGET void TK_NAME(relu)(const rgi_topk_tile *t, int64_t block0, int64_t block1) {
  float s[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  float p[RGI_TOPK_KEYS * RGI_TOPK_LANES] __attribute__((aligned(64)));
  double *score = t->score, x[RGI_TOPK_LANES];
  for (int64_t i = block0 * RGI_TOPK_LANES; i < block1 * RGI_TOPK_LANES; i++) score[i] = -INFINITY;
  for (int64_t h = 0; h < t->heads; h++) load_q(t, h, t->pack_q + h * t->d * RGI_TOPK_LANES);
  for (int64_t key = t->key0; key < t->key1; key += RGI_TOPK_KEYS) {
    int64_t n = t->key1 - key < RGI_TOPK_KEYS ? t->key1 - key : RGI_TOPK_KEYS;
    load_k(t, key, n);
    memset(p, 0, sizeof p);
    for (int64_t h = 0; h < t->heads; h++) {
      const float *weight = t->pack_lse + h * RGI_TOPK_LANES;
      dots(t->pack_q + h * t->d * RGI_TOPK_LANES, t->pack_k, t->d, n, s);
      for (int64_t i = 0; i < n * RGI_TOPK_LANES; i += W) {
        vf y = *(vf *)(s + i);
        y = (vf)(~(vi)(y < 0) & (vi)y); /* NaN stays */
        *(vf *)(p + i) += y * *(const vf *)(weight + i % RGI_TOPK_LANES);
      }
    }
    for (int64_t j = 0; j < n; j++) {
      for (int lane = 0; lane < RGI_TOPK_LANES; lane++)
        x[lane] = (double)p[j * RGI_TOPK_LANES + lane];
      TK_NAME(raw)(t, key + j, x, block0, block1);
    }
  }
  TK_CLEAR;
}

/* Σ_h q_h·k = (Σ_h q_h)·k, in double: G times less work than head by head, and sums near zero keep
 * their digits. */
static TK_TARGET void TK_NAME(dot)(const rgi_topk_tile *t, int64_t block0, int64_t block1) {
  const size_t size = rg_dtype_size(t->dtype);
  const int64_t d = t->d;
  double *q = (double *)(void *)t->pack_q, *score = t->score;
  memset(q, 0, (size_t)d * RGI_TOPK_LANES * sizeof *q);
  for (int64_t lane = 0; lane < t->n; lane++) {
    const int64_t from = (t->first + lane) / t->share * t->share - t->first,
                  last = from + t->share < t->queries - t->first ? from + t->share
                                                                 : t->queries - t->first;
    if (lane > 0 && from < lane) { /* the lane before has the sum */
      for (int64_t i = 0; i < d; i++)
        q[i * RGI_TOPK_LANES + lane] = q[i * RGI_TOPK_LANES + lane - 1];
      continue;
    }
    for (int64_t r = from; r < last; r++)
      for (int64_t h = 0; h < t->heads; h++) {
        rgi_load_by(TK_ISA, t->row, t->dtype,
                    (const char *)t->q + (r * t->q_row + h * t->q_head) * (int64_t)size, d);
        for (int64_t i = 0; i < d; i++) q[i * RGI_TOPK_LANES + lane] += (double)t->row[i];
      }
  }
  for (int64_t i = block0 * RGI_TOPK_LANES; i < block1 * RGI_TOPK_LANES; i++) score[i] = -INFINITY;
  for (int64_t key = t->key0; key < t->key1; key += RGI_TOPK_KEYS) {
    int64_t n = t->key1 - key < RGI_TOPK_KEYS ? t->key1 - key : RGI_TOPK_KEYS;
    load_k(t, key, n);
    for (int64_t j = 0; j < n; j++) {
      const float *k = t->pack_k + j * d;
      vd sum[VD];
      for (int v = 0; v < VD; v++) sum[v] = (vd){0};
      for (int64_t i = 0; i < d; i++) TK_UNROLL
      for (int v = 0; v < VD; v++)
        sum[v] += *(vd *)(q + i * RGI_TOPK_LANES + v * (W / 2)) * (double)k[i];
      TK_NAME(raw)(t, key + j, (const double *)sum, block0, block1);
    }
  }
  TK_CLEAR;
}

#undef vf
#undef vi
#undef vu
#undef vh
#undef vd
#undef vl
#undef vs
#undef vg
#undef v4
#undef W
#undef V
#undef VD
#undef exp_parts
#undef exp_f
#undef exp_d
#undef cap
#undef load_q
#undef load_k
#undef dots_of
#undef dots
#undef logits
#undef TK_INLINE
#undef TK_FOR_BLOCKS
#undef TK_OVERLAP
#undef TK_NAME
#undef TK_TARGET
#undef TK_BYTES
#undef TK_KEYS
#undef TK_ISA
#undef TK_CLEAR
