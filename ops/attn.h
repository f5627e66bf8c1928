/* ops/attn.h: what cmp_attn, slc_attn and swa_attn share whatever device runs them: attributes,
 * ports, checks, cost, and one description of a call.
 *
 * The three ops differ only in which keys a query sees. Each says that in an rgi_attn_kind, which
 * its descriptors carry as rules->kind; everything else about them is here. cpu/attn.h and
 * cuda/attn.h take the description from there.
 */
#ifndef RGI_ATTN_H
#define RGI_ATTN_H

#include "../graph/ir.h"
#include "ops.h"
#include "paged.h"

enum { RGI_ATTN_MAX_D = 576 };

/* Attributes 0 and 1 of every attention op; the rest is the op's. */
enum { RGI_ATTN_SCALE, RGI_ATTN_SOFTCAP, RGI_ATTN_OWN };
/* clang-format off */
#define RGI_ATTN_ATTRS                                                                             \
  {"scale", RG_ATTR_FLOAT, false, 0, 0, 0, NULL, "factor on the logits; 0: 1/sqrt(d_qk)"},         \
  {"softcap", RG_ATTR_FLOAT, false, 0, 1e30, 0, NULL,                                              \
   "c > 0: logits become c*tanh(logit/c); 0: off"}

/* Ports. Those of slc have idx after v, which moves the later ones up by one. */
#define RGI_ATTN_IN_QKV(key_flag, key_doc)                                                         \
  {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "queries; H a multiple of KH"},                 \
  {"k", "S,KH,D", key_flag, RG_D_FLOAT, 'F', 1, key_doc},                                          \
  {"v", "S,KH,E", key_flag, RG_D_FLOAT, 'F', 1, "values of the same rows"}
#define RGI_ATTN_IN_SEQ                                                                            \
  {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "sequence starts [B+1]"},             \
  {"cu_seqlens_k", "B1", RG_PORT_OPTIONAL | RG_PORT_KSEQLENS, RG_D(RG_I32), 0, -1,                 \
   "starts of the key sequences, in tokens; absent: those of the queries"},                        \
  {"q_offset", "B1-1", RG_PORT_OPTIONAL | RG_PORT_OFFSETS, RG_D(RG_I32), 0, -1,                    \
   "position of each sequence's first query; absent: 0"},                                          \
  {"sinks", "H", RG_PORT_OPTIONAL | RG_PORT_PAIR, RG_D_FLOAT, 'S', 0,                              \
   "a further logit per head that carries no value"}
#define RGI_ATTN_OUT RGI_ATTN_OUT_CUT(1)
#define RGI_ATTN_OUT_CUT(axis)                                                                     \
  {"o", "T,H,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', axis,                                              \
   "attention output; 0 in a row that sees no key"},                                               \
  {"lse", "T,H", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, axis,                           \
   "log of the softmax denominator, natural; -inf in a row that sees neither key nor sink"}
/* The same over pages; heads are not cut. */
#define RGI_ATTN_IN_PAGED_QKV(rows, doc)                                                           \
  {"q", "T,H,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "queries; H a multiple of KH"},                \
  {"k_cache", "P," rows ",KH,D", 0, RG_D_FLOAT, 'C', -1, doc},                                     \
  {"v_cache", "P," rows ",KH,E", 0, RG_D_FLOAT, 'C', -1, "values of the same rows"}
#define RGI_ATTN_IN_PAGED_SEQ                                                                      \
  {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "sequence starts [B+1]"},             \
  RGI_PAGED_IN,                                                                                    \
  {"sinks", "H", RG_PORT_OPTIONAL, RG_D_FLOAT, 'S', -1,                                            \
   "a further logit per head that carries no value"}
#define RGI_ATTN_OUT_PAGED RGI_ATTN_OUT_CUT(-1)
#define RGI_ATTN_IN_BWD(key_flag)                                                                  \
  {"out.o", "T,H,E", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1, "forward output"},       \
  {"out.lse", "T,H", RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "forward lse"},                             \
  {"grad.o", "T,H,E", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,                         \
   "gradient of o; absent: 0"},                                                                    \
  {"grad.lse", "T,H", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1,                         \
   "gradient of lse; absent: 0"},                                                                  \
  {"acc.q", "T,H,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1, "sum so far for d.q"},   \
  {"acc.k", "S,KH,D", RG_PORT_OPTIONAL | (key_flag), RG_D(RG_F32), 0, 1, "sum so far for d.k"},    \
  {"acc.v", "S,KH,E", RG_PORT_OPTIONAL | (key_flag), RG_D(RG_F32), 0, 1, "sum so far for d.v"},    \
  {"acc.sinks", "H", RG_PORT_OPTIONAL | RG_PORT_PAIR, RG_D(RG_F32), 0, 0,                          \
   "sum so far for d.sinks"},                                                                      \
  {"delta.o", "T,H", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1,                          \
   "out.o times grad.o, summed over the last axis, in place of out.o"},                            \
  {"sum.q", "T,H,D", RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D(RG_F32), 0, 1,                          \
   "sum so far for d.q, which is its end and not fp32: in place of acc.q"}
#define RGI_ATTN_OUT_BWD(key_flag)                                                                 \
  {"d.q", "T,H,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_ROWS, RG_D_FLOAT, 'F', 1,             \
   "gradient of q"},                                                                               \
  {"d.k", "S,KH,D", RG_PORT_GRAD | RG_PORT_OPTIONAL | (key_flag), RG_D_FLOAT, 'F', 1,              \
   "gradient of k"},                                                                               \
  {"d.v", "S,KH,E", RG_PORT_GRAD | RG_PORT_OPTIONAL | (key_flag), RG_D_FLOAT, 'F', 1,              \
   "gradient of v"},                                                                               \
  {"d.sinks", "H", RG_PORT_GRAD | RG_PORT_OPTIONAL | RG_PORT_PAIR, RG_D_FLOAT, 'S', 0,             \
   "gradient of sinks"}
/* clang-format on */

/* In-ports after q, k, v (and idx); add 1 for slc. */
enum {
  RGI_ATTN_CU = 3,
  RGI_ATTN_CU_K,
  RGI_ATTN_OFFSET,
  RGI_ATTN_SINKS,
  RGI_ATTN_OUT_O,
  RGI_ATTN_OUT_LSE,
  RGI_ATTN_GRAD_O,
  RGI_ATTN_GRAD_LSE,
  RGI_ATTN_ACC_Q,
  RGI_ATTN_ACC_K,
  RGI_ATTN_ACC_V,
  RGI_ATTN_ACC_SINKS,
  RGI_ATTN_DELTA,
  RGI_ATTN_SUM_Q
};
/* Over pages two of them are others: queries stand at the end of the context. */
enum { RGI_ATTN_CONTEXT = RGI_ATTN_CU_K, RGI_ATTN_PAGES };

/* ---- one call ---- */

typedef enum rgi_attn_mode { RGI_ATTN_SWA, RGI_ATTN_CMP, RGI_ATTN_SLC } rgi_attn_mode;

typedef struct rgi_attn {
  rgi_attn_mode mode;
  bool backward;
  int64_t window_left;    /* swa */
  int64_t kernel, stride; /* cmp */
  int64_t block;          /* slc; for the others as the CPU's tiles have it */
  float scale, softcap;
  /* S: rows of k, or those that a sequence has room for in its pages */
  int64_t T, H, S, KH, D, E, B, G, N;
  /* idx only for slc; NULL where not bound */
  const rg_arg *q, *k, *v, *idx, *cu, *cu_k, *offset, *sinks;
  bool paged; /* k and v are caches [P, rows of a page, KH, D or E] */
  rgi_paged pages;
  const rg_arg *o, *lse; /* forward writes them, backward reads them */
  /* backward; delta stands in for o; dq, dk, dv, dsinks are NULL where not wanted */
  const rg_arg *d_o, *d_lse, *delta, *dq, *dk, *dv, *dsinks;
  const rg_arg *sum_q;                 /* dq is this and the call's term, rounded once; or NULL */
  bool acc_q, acc_k, acc_v, acc_sinks; /* add to what is there */
  bool joined; /* v is the first columns of k: dk is the gradient of both, dv NULL */
  /* how the CPU cuts it (rgi_attn_cut of cpu/attn.h) */
  int64_t chunks, heads; /* a KV head's G query heads, cut into `chunks` parts of at most `heads` */
  int64_t queries;       /* of a row tile */
  int64_t parts, keys;   /* a block is cut into `parts` key tiles of at most `keys` */
  int64_t dp, ep;        /* D, E rounded up to 16 */
  const struct rgi_attn_isa *isa;
} rgi_attn;

/* The selection of row `row` for KV head h: its own, or the one there is for all. */
static inline const int32_t *rgi_attn_idx(const rgi_attn *a, int64_t row, int64_t h) {
  return rgi_at(a->idx, row, a->idx->dim[1] == 1 ? 0 : h);
}

/* Which keys a query sees. */
typedef struct rgi_attn_kind {
  rgi_attn_mode mode;
  bool paged;
  void (*own)(rgi_attn *a, const rg_value *attr);    /* reads the op's own attributes */
  rg_status (*check)(const rg_call *c, rg_error *e); /* beyond what holds for all three */
  double (*pairs)(const rgi_attn *a);                /* visible (query, key) pairs of one head */
} rgi_attn_kind;

/* For `check`: as many key rows as query rows, unless cu_seqlens_k says otherwise. */
rg_status rgi_attn_check_rows(const rg_call *c, rg_error *e);
/* For `pairs`, where position i sees min(i + 1, most) keys; most < 0: all i + 1. One sequence
 * of full length; where keys outnumber queries that have an offset, the queries are the last
 * of them. */
double rgi_attn_pairs(const rgi_attn *a, int64_t most);

/* ---- for the descriptors ---- */

rgi_attn rgi_attn_describe(const rg_call *c);
rg_status rgi_attn_check(const rg_call *c, rg_error *e);
void rgi_attn_cost(const rg_call *c, rg_cost *out);
size_t rgi_attn_workspace(const rg_call *c);
rg_status rgi_attn_run(const rg_call *c);
rg_status rgi_attn_steps(const rg_call *c, rg_cuda *x);
const char *rgi_attn_path(const rg_call *c);
extern const rgi_fusing rgi_attn_fusing; /* of a backward */
/* Does a kernel run both calls, over pages, and combine of so many branches whose rows are on 16
 * bytes (slc_swa.c)? */
bool rgi_joins_slc_swa(const rg_call *selected, const rg_call *window, int branches, bool split);

/* All of a descriptor but its name, doc, flags, backward and rules; its attributes are `attrs`. */
#define RGI_ATTN_OP(ins, outs) RGI_ATTN_OP_OF(ins, outs, attrs)
#define RGI_ATTN_OP_OF(ins, outs, list)                                                     \
  .abi = RG_OP_ABI, .in = ins, .nin = RGI_COUNT(ins), .out = outs, .nout = RGI_COUNT(outs), \
  .attrs = list, .nattr = RGI_COUNT(list), .check = rgi_attn_check, .cost = rgi_attn_cost,  \
  .workspace = rgi_attn_workspace, .run_cpu = rgi_attn_run, .cuda_steps = rgi_attn_steps,   \
  .cuda_path = rgi_attn_path

#endif
