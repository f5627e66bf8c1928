/* ops/cpu/rows.h: elementwise work over strided tensors of one shape, and the small pieces every
 * row-wise op needs.
 *
 * A walk visits tensors of one shape in runs: stretches of elements that are contiguous in all of
 * them. Trailing axes that lie densely in every tensor are folded into one run, so a dense tensor
 * is a single long one. Runs never straddle the last live row: each is live or dead as a whole. How
 * the walk is cut into tasks changes no result, since elements do not depend on each other.
 *
 *     rgi_walk w;
 *     rgi_walk_begin(&w, y, live);
 *     rgi_walk_with(&w, x);
 *     rgi_walk_run(c, &w, fn, user);
 *
 * calls fn(user, run), which finds its elements by rgi_run_at(run, x) and rgi_run_at(run, y),
 * run->n of them, and whether they are live in run->live.
 *
 * The structural ops' CPU functions (cast, add, zero, concat, accumulate) live here too; their
 * descriptors do not.
 */
#ifndef RGI_CPU_ROWS_H
#define RGI_CPU_ROWS_H

#include "../ops.h"

/* ---- walks ---- */

typedef struct rgi_walk {
  int rank;                 /* at least 1: a scalar is walked as one element */
  int64_t dim[RG_MAX_RANK]; /* the common shape */
  int64_t live;             /* rows of axis 0 that are live */
  /* axes inner … rank-1 are dense in every tensor; 0: all of it is one run */
  int inner;
} rgi_walk;

typedef struct rgi_run {
  int inner;
  int64_t index[RG_MAX_RANK]; /* of the axes before `inner` */
  int64_t start;              /* elements into the dense part */
  int64_t n;
  bool live;
  int thread;
} rgi_run;

typedef void (*rgi_run_fn)(void *user, const rgi_run *run);

/* `live` counts rows of axis 0; larger than the extent means all. */
void rgi_walk_begin(rgi_walk *w, const rg_arg *shape, int64_t live);
/* Adds a tensor of the same shape. */
void rgi_walk_with(rgi_walk *w, const rg_arg *a);
void rgi_walk_run(const rg_call *c, const rgi_walk *w, rgi_run_fn fn, void *user);

/* First element of the run in tensor a. */
static inline void *rgi_run_at(const rgi_run *r, const rg_arg *a) {
  int64_t e = r->start;
  for (int i = 0; i < r->inner; i++) e += r->index[i] * a->stride[i];
  return (char *)a->data + e * (int64_t)rg_dtype_size(a->dtype);
}

/* ---- live rows and sequences ---- */

/* Live rows of axis 0: cu[B] where a lengths tensor is bound, else all of them. */
static inline int64_t rgi_live_rows(const rg_arg *cu, int64_t rows) {
  return cu ? ((const int32_t *)cu->data)[cu->dim[0] - 1] : rows;
}
/* The sequence that row `row` (< cu[nseq]) belongs to. cu [nseq+1] */
int64_t rgi_sequence_of(const int32_t *cu, int64_t nseq, int64_t row);

/* ---- elements, by CPU level ---- */

/* rgi_load and rgi_store, with the conversions of f16 and bf16 in SIMD where c->isa has them. */
void rgi_load_by(int isa, float *dst, rg_dtype type, const void *src, int64_t n);
void rgi_store_by(int isa, void *dst, rg_dtype type, const float *src, int64_t n);
/* What a gradient does with its value: add to the fp32 sum that is there, or overwrite. */
static inline void rgi_put_grad(int isa, bool add, void *dst, rg_dtype type, const float *src,
                                int64_t n) {
  if (add)
    rgi_store_add(dst, src, n);
  else
    rgi_store_by(isa, dst, type, src, n);
}

#define RGI_PIECE 256 /* floats converted at a time, on the stack */

/* exp(x) within 2 units in the last place for |x| <= 87, beyond that exp(±87); NaN stays NaN. Free
 * of branches (the clamp compares integers), so that loops over it vectorise. */
static inline float rgi_exp(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint32_t sign = u & 0x80000000u, size = u ^ sign;
  bool beyond = (size > 0x42ae0000u) & (size <= 0x7f800000u); /* past 87, and no NaN */
  size = beyond ? 0x42ae0000u : size;
  u = sign | size;
  memcpy(&x, &u, 4);
  /* 1.5 * 2^23: the integer n lands in the low bits */
  float shifted = x * 1.44269504f + 12582912.0f;
  float n = shifted - 12582912.0f;
  /* ln 2 in two parts; n * the first is exact */
  float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p =
      /* (e^r - 1 - r) / r^2, interpolated at the Chebyshev points of |r| <= ln(2) / 2 */
      1.392625083e-3f;
  p = p * r + 8.363232884e-3f;
  p = p * r + 4.166655421e-2f;
  p = p * r + 1.666657667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  bits = (bits + 127u) << 23; /* the low bits of `shifted` are n, modulo 512 */
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}
static inline float rgi_sigmoid(float x) {
  return 1.0f / (1.0f + rgi_exp(-x));
}

/* Bytes of all inputs and outputs, each once: rg_cost.bytes of most ops. Sums taken in place count
 * twice. */
double rgi_call_bytes(const rg_call *c);
static inline double rgi_arg_elements(const rg_arg *a) {
  double n = 1;
  for (int i = 0; i < a->rank; i++) n *= (double)a->dim[i];
  return n;
}

/* ---- run_cpu of structural ops (port order as listed) ---- */

/* in x, cu_seqlens?; out y: float to float, or a copy of i32 */
rg_status rgi_run_cast(const rg_call *c);
/* in a (list), cu_seqlens?; out y: sum in list order, in fp32 */
rg_status rgi_run_add(const rg_call *c);
rg_status rgi_run_concat(const rg_call *c); /* in x (list), cu_seqlens?; out y; attr[0].i: axis */
/* in acc f32, x; out y = acc's bytes; attr[0].i: axis, attr[1].i: start */
rg_status rgi_run_accumulate(const rg_call *c);

#endif
