/* tests/harness/optest.h: runs one op the hard way and compares tensors.
 *
 * Everything belongs to an `ot` (one per test) and is freed by ot_end. Host memory that runs out
 * aborts.
 *
 *   tensor memory   | guard | e e e hole e e e hole … | guard |     strides are free
 *   workspace       | guard | exactly what the op asked for | guard |   poisoned, 256-aligned
 *
 * Guards and holes hold a pattern. ot_run poisons outputs and workspace, runs the op, and then
 * checks that it wrote every element of every output and nothing else, left its inputs alone, and
 * zeroed the rows past the last live token, and on x86-64 cleared the vectors' upper halves. What
 * it finds wrong is returned as a sentence; OT_OK turns that into a Criterion failure. Ops are
 * addressed by port and attribute names only.
 */
#ifndef OPTEST_H
#define OPTEST_H

#include <regraph/op.h>

#define OT_OK(expr)                                              \
  do {                                                           \
    const char *ot_text_ = (expr);                               \
    cr_assert(ot_text_ == NULL, "%s", ot_text_ ? ot_text_ : ""); \
  } while (0)

#define OT_MAX_TENSORS 64 /* bound to one call */

typedef struct ot ot;

ot *ot_begin(uint64_t seed);
void ot_end(ot *t);
void *ot_alloc(ot *t, size_t bytes); /* zeroed */
double *ot_doubles(ot *t, int64_t n);
int32_t *ot_ints(ot *t, int64_t n);
/* A formatted sentence that lives as long as t. */
const char *ot_text(ot *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Do ops run on a GPU (REGRAPH_TEST_DEVICE=cuda)? */
bool ot_on_gpu(void);
/* The compute capability whose kernels ops take there: the GPU's, or what REGRAPH_TEST_CC says; 0
 * where they don't run on one. */
int ot_capability(void);
/* Highest CPU level of this machine, see rg_call.isa. */
int ot_isa(void);

/* ---- random numbers: splitmix64 and Box-Muller, the same everywhere ---- */

uint64_t ot_random(ot *t);
double ot_uniform(ot *t); /* [0, 1) */
/* Likewise, but what is drawn next stays the same: for choices that joined a generator later, so
 * that seeds which are written down go on drawing what they drew. */
double ot_aside(const ot *t, uint64_t which);
double ot_normal(ot *t);
int64_t ot_below(ot *t, int64_t n); /* 0 … n−1 */

/* ---- tensors ---- */

typedef struct ot_tensor {
  rg_arg arg;   /* what the op sees */
  int64_t n;    /* elements */
  char *block;  /* the whole allocation, guards included */
  size_t bytes; /* of it */
} ot_tensor;

/* Dense row-major; pad (one number per axis, or NULL) adds elements to each axis' stride. */
ot_tensor *ot_new(ot *t, rg_dtype dtype, int rank, const int64_t *dim, const int64_t *pad);
#define OT_NEW(t, dtype, ...)                                                     \
  ot_new((t), (dtype), (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
         (int64_t[]){__VA_ARGS__}, NULL)
/* Same type and shape, fresh memory. */
ot_tensor *ot_like(ot *t, const ot_tensor *a, const int64_t *pad);
ot_tensor *ot_like_as(ot *t, const ot_tensor *a, rg_dtype dtype);
/* A tensor over memory of the caller's (no guards). */
ot_tensor *ot_wrap(ot *t, void *data, rg_dtype dtype, int rank, const int64_t *dim,
                   const int64_t *stride);

/* A tensor of a's shape and contents whose last row starts past 2^31 elements (sparse memory, no
 * guards); NULL if there are no such addresses to be had. Needs at least two rows. */
ot_tensor *ot_far(ot *t, const ot_tensor *a);

double ot_round(rg_dtype dtype, double x);  /* to nearest even */
void ot_set(ot_tensor *a, const double *x); /* dense, row-major; rounds */
double *ot_get(ot *t, const ot_tensor *a);
void ot_set_ints(ot_tensor *a, const int32_t *x);
int32_t *ot_get_ints(ot *t, const ot_tensor *a);
double ot_element(const ot_tensor *a, int64_t i); /* i-th in row-major order */
/* same shape, any strides; rounds if dtypes differ */
void ot_copy(ot_tensor *to, const ot_tensor *from);

void ot_fill_normal(ot *t, ot_tensor *a, double deviation);
void ot_fill_outliers(ot *t, ot_tensor *a); /* N(0,1) + N(0,100)·Bernoulli(0.001) */
void ot_fill(ot_tensor *a, double value);
/* Rows [from, to) of axis 0: NaN, or an absurd integer. */
void ot_poison_rows(ot_tensor *a, int64_t from, int64_t to);
void ot_fill_rows(ot_tensor *a, int64_t from, int64_t to, double value);

/* ---- calls ---- */

typedef struct ot_call ot_call;

ot_call *ot_call_new(ot *t, const rg_op *op);
/* Attributes start at their defaults. A name the op does not have makes ot_run fail. */
void ot_int(ot_call *c, const char *attr, int64_t value);
void ot_float(ot_call *c, const char *attr, double value);
void ot_choice(ot_call *c, const char *attr, const char *choice);
/* Binds a tensor; again on the same port appends (lists); NULL is an absent element. */
void ot_in(ot_call *c, const char *port, ot_tensor *a);
void ot_out(ot_call *c, const char *port, ot_tensor *a);
/* The same where the op has such a port; otherwise nothing. */
void ot_in_if(ot_call *c, const char *port, ot_tensor *a);
/* Swaps the tensors on a port for one other. */
void ot_rebind_in(ot_call *c, const char *port, ot_tensor *a);
void ot_rebind_out(ot_call *c, const char *port, ot_tensor *a);
bool ot_has_in(const rg_op *op, const char *port);
void ot_set_isa(ot_call *c, int isa); /* default: ot_isa() */

/* Runs on `threads` threads; threads < 0: −threads simulated by one, tasks handed out in reverse.
 * NULL, or what was wrong. */
const char *ot_run(ot_call *c, int threads);
/* Runs for each number of threads in turn and once in reverse order, then `repeats` times more,
 * each with another poison, and demands the same bits in all outputs. An output that
 * accumulates starts from the same contents. */
const char *ot_run_repeated(ot_call *c, int repeats);
/* For a backward op that is bound and ready: its gradients in fp32 must have the same bits whether
 * the others are wanted or not, and added to a sum on acc.* must give that sum plus the gradient
 * (threads and repeats bit-equal). Leaves the call's outputs bound elsewhere. */
const char *ot_check_sums(ot_call *c);
/* Runs the call once as it is and once with every tensor of two rows or more stretched so
 * that its last row starts past 2^31 elements: same bits wanted. Does not suit calls that
 * add to sums. Needs ot_far_possible. */
const char *ot_check_far(ot_call *c);
bool ot_far_possible(void);
/* What the op of the last ot_run says about taking a delta (rgi_delta of graph/ir.h). */
int ot_delta(const ot_call *c);
bool ot_rounds(const ot_call *c); /* and whether it takes sums on "sum.x" */
/* The status run_cpu or check returned in the last ot_run. */
rg_status ot_status(const ot_call *c);

/* ---- comparison ---- */

/* ‖x − ref‖ / max(‖ref‖, floor·√n); +inf if x has a NaN or an infinity that ref lacks. */
double ot_relrms(const ot_tensor *x, const double *ref, double floor);
/* Largest |x − ref| / max(1, |ref|); equal infinities differ by 0, unequal ones by +inf. */
double ot_lse_error(const ot_tensor *x, const double *ref);
bool ot_same_bits(const ot_tensor *a, const ot_tensor *b);
/* Rows of axis 0: a[row_a + r] against b[row_b + r] for r < n. */
bool ot_same_rows(const ot_tensor *a, int64_t row_a, const ot_tensor *b, int64_t row_b, int64_t n);
/* Is everything in rows [from, to) positive zero bits? */
bool ot_zero_rows(const ot_tensor *a, int64_t from, int64_t to);

/* Top-k against the oracle: every row must be ascending, candidates first, −1 last, of the right
 * count; an index that differs must be a near-tie, |gap| <= 1e-5 · max(1, max_logit) relative to
 * the larger score (scores below `floor` are equal); at least `overlap` of all indices must agree.
 * rows: live rows. NULL, or what was wrong. */
const char *ot_check_topk(ot *t, const ot_tensor *idx, int64_t rows, const int32_t *ref,
                          const double *scores, int64_t nblock, double max_logit, double floor,
                          double overlap);

#endif
