/* tests/ref/ref.h: the oracle. Every stock op, forward and backward, naively and in fp64, written
   from the semantics page alone; shares no code with ops/.

   All float tensors are dense, row-major arrays of double that hold values already rounded to their
   storage type. cu are the sequence starts [B+1]. Rows past the last live token (and rows that
   belong to no block, of compressed tensors) are never read and come out as zero. Output pointers
   may be NULL where a gradient is not wanted. Gradients overwrite, they do not accumulate. Nothing
   here is fast, and nothing fails but for host memory (then it aborts).
 */
#ifndef REF_H
#define REF_H

#include <stdbool.h>
#include <stdint.h>

/* ---- attention ----
 *
 *   x_j = scale · q·k_j                over the visible keys j
 *   s_j = x_j, or softcap · tanh(x_j / softcap)
 *   lse = log(Σ exp s_j + exp sink)    p_j = exp(s_j − lse)    o = Σ p_j v_j
 *
 * A row with no key and no sink: o = 0, lse = −inf, no gradient. */

typedef enum ref_kind { REF_CMP, REF_SLC, REF_SWA } ref_kind;

typedef struct ref_attn {
  ref_kind kind;
  int64_t T, TK;           /* rows of q and of k, v (for REF_CMP: of the compressed tensors) */
  int64_t B, H, KH, D, DV; /* query head h reads KV head h / (H / KH) */
  const double *q;         /* [T, H, D] */
  const double *k;         /* [TK, KH, D] */
  const double *v;         /* [TK, KH, DV] */
  const int32_t *cu;       /* [B+1] */
  const int32_t *cu_k;     /* [B+1] in tokens, also for REF_CMP; NULL: cu */
  const int32_t *q_offset; /* [B] position of a sequence's first query; NULL: 0 */
  const double *sinks;     /* [H] or NULL */
  double scale;            /* 0: 1/sqrt(D) */
  double softcap;          /* 0: none */
  int64_t kernel, stride;  /* REF_CMP: i sees block j iff i >= j·stride + kernel − 1 */
  bool one_idx;            /* idx has one row a query, for all KV heads */
  const int32_t *idx;      /* REF_SLC [T, KH, top_n]: keys of these blocks, position <= i. An entry
                              that is negative, out of range or not larger than all before it in
                              its row is ignored */
  int64_t block, top_n;
  int64_t window_left; /* REF_SWA: keys i − window_left … i; −1: all up to i */
} ref_attn;

/* o [T, H, DV], lse [T, H] (rows of no sequence: o = 0, lse = 0) */
void ref_attn_forward(const ref_attn *a, double *o, double *lse);
/* d_o [T, H, DV]; d_lse [T, H] or NULL; dq, dk, dv as q, k, v; dsinks [H] */
void ref_attn_backward(const ref_attn *a, const double *d_o, const double *d_lse, double *dq,
                       double *dk, double *dv, double *dsinks);

/* ---- compress_kv, K or V on its own ----
 *
 * Blocks of a sequence: j = 0 … floor((L − kernel) / stride), in rows floor(cu[b] / stride) + j. */

typedef enum ref_method { REF_MEAN, REF_LINEAR, REF_SWIGLU, REF_SIGMOID_MUL } ref_method;

typedef struct ref_compress {
  ref_method method;
  int64_t T, B, KH, D, kernel, stride;
  const double *x; /* [T, KH, D] */
  const double *w; /* [D or 2D, kernel·D], unused for the mean */
  const int32_t *cu;
} ref_compress;

int64_t ref_blocks(int64_t length, int64_t kernel, int64_t stride);
/* y [T / stride, KH, D] */
void ref_compress_forward(const ref_compress *a, double *y);
void ref_compress_backward(const ref_compress *a, const double *dy, double *dx, double *dw);

/* ---- pool: row j of a sequence, in row floor(cu[b] / stride) + j, from the `kernel` tokens before
 * (j + 1) · stride ---- */

typedef enum ref_pool_method { REF_POOL_SOFTMAX, REF_POOL_MAX, REF_POOL_MIN } ref_pool_method;

typedef struct ref_pool {
  ref_pool_method method;
  int64_t T, B, KH, W, kernel, stride; /* W: of a row; x has kernel / stride times as many */
  const double *x, *z;                 /* [T, KH, kernel / stride · W] */
  const double *bias;                  /* [stride, kernel / stride · W] or NULL */
  const int32_t *cu;
} ref_pool;

/* y [T / stride, KH, W] */
void ref_pool_forward(const ref_pool *a, double *y);
/* dx, dz as x; dbias as bias, or NULL */
void ref_pool_backward(const ref_pool *a, const double *dy, double *dx, double *dz, double *dbias);

/* ---- topk ------------------------------------------------------------------------------------ */

typedef struct ref_topk {
  int64_t T, TK, B, H, KH, D;
  const double *q;                     /* [T, H, D] */
  const double *k;                     /* [TK, KH, D], compressed keys */
  const double *lse;                   /* [T, H] of the compressed attention, for softmax */
  const double *weight;                /* [T, H] for relu; NULL: 1 */
  const int32_t *cu, *cu_k, *q_offset; /* as in attention */
  int64_t kernel, stride, block, top_n, init, local;
  double scale, softcap;
  /* rank by the raw product, summed over the group; or by the positive part of it times weight;
   * neither: by probability */
  bool dot, relu;
  bool max;      /* of the keys in a block the largest score, not the sum */
  int64_t share; /* dot: queries that choose alike, by the sum of their scores; 0: 1 */
  bool tail;     /* without local: the query's own block is kept while it is not complete */
} ref_topk;

/* idx [T, KH, top_n]. scores [T, KH, nblock], if not NULL: the fp64 score of each candidate (b <=
 * i / block; without local, complete ones and a kept tail; +inf where forced), NaN where b is no
 * candidate. max_logit, if not NULL: largest |logit| met. */
void ref_topk_forward(const ref_topk *a, int32_t *idx, double *scores, int64_t nblock,
                      double *max_logit);

/* ---- index_loss: KL(p | softmax of the index's scores) over the keys of a row of idx ---- */

typedef struct ref_index {
  int64_t T, TK, B, H, KH, D; /* of the attention; `I` heads of idx share its heads out evenly */
  int64_t J, I, C;            /* heads and width of the index: q [T, J, C], k [TK, I, C] */
  const double *q, *k, *lse, *index_q, *index_k;
  const double *weight; /* [T, J]; NULL: 1 */
  const int32_t *idx;   /* [T, I, top_n], entries as in attention */
  const int32_t *cu, *cu_k, *q_offset;
  int64_t block, top_n;
  double scale, index_scale; /* scale 0: 1/sqrt(D) */
  bool relu;
} ref_index;

/* loss [T, I] */
void ref_index_forward(const ref_index *a, double *loss);
/* dq [T, J, C], dk [TK, I, C], dw [T, J] */
void ref_index_backward(const ref_index *a, const double *dloss, double *dq, double *dk,
                        double *dw);

/* ---- combine and merge; `rows` live rows of T ---- */

typedef enum ref_act { REF_SIGMOID, REF_SOFTMAX, REF_NONE } ref_act;

/* out [T, H, D] = Σ_n act(gate[t, h, n]) · o[n] */
void ref_combine_forward(ref_act act, int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                         const double *const *o, const double *gate, double *out);
/* d_o: n arrays; dgate [T, H, n] */
void ref_combine_backward(ref_act act, int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                          const double *const *o, const double *gate, const double *dout,
                          double *const *d_o, double *dgate);
/* out = Σ exp(lse_n − lse) o_n, lse = log Σ exp lse_n; all −inf: 0 and −inf */
void ref_merge_forward(int64_t T, int64_t rows, int64_t H, int64_t D, int n, const double *const *o,
                       const double *const *lse, double *out, double *out_lse);
/* dlse may be NULL (zero) */
void ref_merge_backward(int64_t T, int64_t rows, int64_t H, int64_t D, int n,
                        const double *const *o, const double *const *lse, const double *dout,
                        const double *dlse, double *const *d_o, double *const *d_lse);

/* ---- rows and elements ----------------------------------------------------------------------- */

/* y [T, out] = x [T, in] · wᵀ [out, in] + b [out] (b may be NULL) */
void ref_linear_forward(int64_t T, int64_t rows, int64_t in, int64_t out, const double *x,
                        const double *w, const double *b, double *y);
void ref_linear_backward(int64_t T, int64_t rows, int64_t in, int64_t out, const double *x,
                         const double *w, const double *dy, double *dx, double *dw, double *db);
/* Rotates the pairs (c, c + D/2) by position · theta^(−2c/D); position from the sequence, plus
 * q_offset[b] if given. inverse: the other way round, which is also the backward. */
void ref_rope(int64_t T, int64_t B, int64_t H, int64_t D, double theta, const int32_t *cu,
              const int32_t *q_offset, bool inverse, const double *x, double *y);
/* The same over any pairs: `angle` [D/2] of one position, `length` of what is turned; interleaved:
 * pairs are (2c, 2c + 1). */
void ref_rope_by(int64_t T, int64_t B, int64_t H, int64_t D, const double *angle, double length,
                 bool interleaved, const int32_t *cu, const int32_t *q_offset, bool inverse,
                 const double *x, double *y);
/* YaRN (Peng et al. 2023) as transformers computes it: angle [D/2], returns the length. attention
 * 0: by the factor. */
double ref_yarn(int64_t D, double theta, double factor, double original, double beta_fast,
                double beta_slow, double attention, bool truncate, double *angle);
/* y = x / sqrt(mean x² + eps) · w over the last axis; w [D] may be NULL */
void ref_rmsnorm_forward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                         const double *w, double *y);
void ref_rmsnorm_backward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                          const double *w, const double *dy, double *dx, double *dw);
/* y = (x − mean) / sqrt(variance + eps) · w + b; w, b [D] may be NULL */
void ref_layernorm_forward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                           const double *w, const double *b, double *y);
void ref_layernorm_backward(int64_t n, int64_t live, int64_t D, double eps, const double *x,
                            const double *w, const double *dy, double *dx, double *dw, double *db);
/* Elementwise over n, of which the first `live` count. */
void ref_add(int64_t n, int64_t live, const double *a, const double *b, double *y);
void ref_mul(int64_t n, int64_t live, const double *a, const double *b, double *y);
void ref_mul_backward(int64_t n, int64_t live, const double *a, const double *b, const double *dy,
                      double *da, double *db);
void ref_silu(int64_t n, int64_t live, const double *x, double *y);
void ref_silu_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx);
/* max(x, 0) */
void ref_relu(int64_t n, int64_t live, const double *x, double *y);
void ref_relu_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx);
void ref_sigmoid(int64_t n, int64_t live, const double *x, double *y);
void ref_sigmoid_backward(int64_t n, int64_t live, const double *x, const double *dy, double *dx);
/* Copies n elements, zero past `live` (rounding to the new type is the caller's). */
void ref_cast(int64_t n, int64_t live, const double *x, double *y);
/* y [outer, Σ width[i]] from x[i] [outer, width[i]] */
void ref_concat(int64_t outer, int64_t live, int n, const int64_t *width, const double *const *x,
                double *y);

#endif
