/* tests/harness/num.h: the gates of the numerics page, packs of sequences, and
 * one attention case end to end.
 */
#ifndef NUM_H
#define NUM_H

#include "../../ops/ops.h"
#include "../ref/ref.h"
#include "optest.h"

/* The stock ops' descriptors. */
#define RGI_OP(x) extern const rg_op rgi_op_##x;
#include "../../ops/op_list.h"
#undef RGI_OP

/* Gate on relRMS for an output, or a gradient whose softmax logits were multiplied by `hot`. */
double num_gate(rg_dtype dtype);
double num_grad_gate(rg_dtype dtype, double hot);
#define NUM_LSE_GATE 1e-5

/* Lengths that broke others, for blocks of 32 and 64 tokens: 0, 1, kernel ± 1, block ± 1, 507, … */
extern const int32_t num_lengths[];
extern const int num_nlengths;

/* ---- packs ---- */

typedef struct num_pack {
  int64_t B, T; /* capacities: T is `slack` more than the live tokens */
  int64_t live;
  int32_t *cu;       /* [B+1] */
  ot_tensor *tensor; /* the same, as i32 [B+1] */
} num_pack;

num_pack num_pack_new(ot *t, int64_t B, const int32_t *length, int64_t slack);
ot_tensor *num_ints(ot *t, int64_t n, const int32_t *x);
/* Poisons rows [live, T) and, of compressed tensors (stride > 0), every row that is no block. */
void num_poison_dead(ot_tensor *a, const num_pack *p, int64_t kernel, int64_t stride);
/* Rows that num_poison_dead poisons must be zero bits. */
bool num_dead_is_zero(const ot_tensor *a, const num_pack *p, int64_t kernel, int64_t stride);

/* ---- attention ---- */

typedef enum num_idx {
  NUM_IDX_RANDOM, /* ascending blocks among those the query may see, own block included, −1 tail */
  NUM_IDX_SHORT,  /* rows cut short at random; every fifth all −1 */
  NUM_IDX_SAME,   /* all queries choose block 0 and the last possible */
  /* also blocks past the query and past the end, doubled entries, negative numbers */
  NUM_IDX_GARBAGE,
  NUM_IDX_FUTURE /* every third row has nothing but a block that is still to come */
} num_idx;

typedef struct num_attn {
  const char *name;
  ref_kind kind;
  rg_dtype dtype;
  int64_t H, KH, D, DV;
  int64_t B;
  const int32_t *length;
  const int32_t *length_k; /* NULL: length */
  const int32_t *offset;   /* NULL: none */
  int64_t kernel, stride;  /* REF_CMP */
  int64_t block, top_n;    /* REF_SLC */
  num_idx idx;
  bool one_idx;               /* for all KV heads */
  int64_t window_left;        /* REF_SWA */
  double softcap, scale, hot; /* hot 0: 1 */
  bool sinks, outliers, d_lse;
  bool wide_grads; /* d.* in f32 */
  bool latent;     /* v is the first columns of k, the same memory */
  bool joined;     /* … and d.k the gradient of both */
  int strided;     /* q, k, v, o and gradients with holes, of so many times 3 and 5 elements */
  double floor;    /* of relRMS, in units of one element's rms; 0: 1e-3 */
  double floor_grad;
  double o_gate; /* 0: num_gate */
  int isa;       /* CPU level + 1; 0: the best there is */
} num_attn;

/* The tensors of a case, filled; dead rows poisoned. */
typedef struct num_attn_run {
  num_attn a;
  num_pack pack, pack_k;
  int64_t TK; /* rows of k, v */
  ot_tensor *q, *k, *v, *idx, *offset, *sinks;
  ot_tensor *o, *lse;               /* outputs of the op */
  ot_tensor *d_o, *d_lse;           /* gradients that come in */
  ot_tensor *delta;                 /* not NULL: the backward call gets it instead of o */
  ot_tensor *dq, *dk, *dv, *dsinks; /* gradients that go out; joined: no dv */
  ot_call *forward, *backward;
} num_attn_run;

num_attn_run num_attn_new(ot *t, num_attn a);
/* Same inputs, element for element, in fresh memory (strided if asked). */
num_attn_run num_attn_again(ot *t, const num_attn_run *r, bool strided);
/* Sequence b of the case, on its own. */
num_attn_run num_attn_alone(ot *t, const num_attn_run *r, int64_t b);
/* n of its queries from `first` on, with all of its keys: their offset says where they are. */
num_attn_run num_attn_queries(ot *t, const num_attn_run *r, int64_t b, int64_t first, int64_t n);
/* Builds the forward call (o and lse are fresh); the backward call needs a forward that ran. */
void num_attn_calls(ot *t, num_attn_run *r);
/* The oracle's view of the inputs. */
ref_attn num_attn_ref(ot *t, const num_attn_run *r);
/* Runs both directions on two threads and asserts every gate; the returned sentence names the
 * case. */
const char *num_attn_check(ot *t, num_attn a);

const rg_op *num_attn_op(ref_kind kind);
const rg_op *num_attn_bwd_op(ref_kind kind);

#endif
