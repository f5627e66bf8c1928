/* ops/cuda/attn.h: attention on a GPU: the families of kernels, and which one takes a call.

   A family (plain, wgmma, …) says whether it takes a shape, how much workspace it needs and hands
   over its launches. Families are asked in order of preference; the last one, plain, takes
   everything.
 */
#ifndef RGI_CUDA_ATTN_H
#define RGI_CUDA_ATTN_H

#include "../../kernels/attn/attn.h"
#include "../../kernels/attn/topk.h"
#include "../../kernels/pages.h"
#include "../attn.h"
#include "shared.h"

typedef struct rgi_attn_family {
  const char *name;
  unsigned modes; /* of calls it is asked about: 1 << RGK_SWA and so on */
  bool tokens;    /* of selected blocks: asked about those of one key alone */
  /* NULL: it takes the call. Else why not, a few words. Looks at shapes, types, `aligned`
   * and the GPU only, at data pointers just for presence (while planning they are a dummy,
   * not NULL, where a tensor is bound). */
  const char *(*refuses)(const rgk_attn *a, const rg_gpu *gpu);
  size_t (*workspace)(const rgk_attn *a, const rg_gpu *gpu); /* NULL: none */
  rg_status (*steps)(const rgk_attn *a, const rg_gpu *gpu, void *workspace, rg_cuda *x);
  /* of a backward: the order in which it sums o times d_o, if it takes a delta instead */
  rgi_delta delta;
  bool rounds; /* of a backward: takes dq_sum */
} rgi_attn_family;

enum { RGI_ATTN_DENSE = 1 << RGK_SWA | 1 << RGK_CMP, RGI_ATTN_SELECTED = 1 << RGK_SLC };

/* Families, each in a file of its own: ops/cuda/attn_plain.c, … */
extern const rgi_attn_family rgi_attn_gather_fwd;                      /* ops/cuda/gather.c */
extern const rgi_attn_family rgi_attn_tokens_fwd, rgi_attn_tokens_bwd; /* ops/cuda/tokens.c */
extern const rgi_attn_family rgi_attn_tokens_joined; /* the same: of rgi_attn.joined */
extern const rgi_attn_family rgi_attn_select_fwd, rgi_attn_select_bwd; /* ops/cuda/select.c */
extern const rgi_attn_family rgi_attn_mma_bwd;                         /* ops/cuda/mma_bwd.c */
extern const rgi_attn_family rgi_attn_plain_fwd, rgi_attn_plain_bwd;
extern const rgi_attn_family rgi_attn_flash_fwd, rgi_attn_flash_bwd;
extern const rgi_attn_family rgi_attn_mma_fwd; /* ops/cuda/mma_fwd.c */
/* Of keys in pages, forward: Hopper's for swa and cmp, for selected blocks (each refuses as above;
 * neither needs a workspace), and plain, which takes all. */
typedef struct rgi_paged_family {
  const char *name;
  const char *(*refuses)(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu);
  rg_status (*steps)(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu, rg_cuda *x);
} rgi_paged_family;
extern const rgi_paged_family rgi_paged_flash_fwd, rgi_paged_gather_fwd;
rg_status rgi_attn_plain_paged(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                               rg_cuda *x);
/* A step of single tokens: attention over compressed keys and the choice of blocks in one launch
 * (kernels/attn/decode.h), the bits of both. Same queries, keys and scale. */
bool rgi_decode_takes(const rgk_attn *a, const rgk_topk *p, const rgk_pages *pages,
                      const rg_gpu *gpu, bool split);
size_t rgi_decode_workspace(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu);
rg_status rgi_decode_step(const rgk_attn *a, const rgk_topk *topk, const rgk_pages *pages,
                          const rg_gpu *gpu, void *workspace, rg_cuda *x);
/* slc of single tokens over pages (kernels/attn/decode_sm90.cuh), the bits of rgi_paged_gather_fwd,
 * which takes it too. */
bool rgi_decode_takes_selected(const rgk_attn *a, const rgk_pages *pages);
rg_status rgi_decode_selected(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu,
                              rg_cuda *x);
/* Both, and the sum of all branches, in one launch; *p says which branches (kernels/attn/decode.h),
 * the rest is filled in. */
struct rgk_decode_pair;
bool rgi_decode_takes_pair(const rgk_attn *selected, const rgk_attn *window, const rgk_pages *pages,
                           const rg_gpu *gpu, bool split);
rg_status rgi_decode_pair(const rgk_attn *selected, const rgk_attn *window, const rgk_pages *pages,
                          const rg_gpu *gpu, struct rgk_decode_pair *p, rg_cuda *x);

/* All of a layer's: rgi_decode_step's, and rgi_decode_pair's of what is chosen there, in one
 * launch. Takes what both take, of as many tokens as it is the fastest for; split, where a token's
 * keys are shared out, of any number. */
bool rgi_decode_takes_layer(const rgk_attn *compressed, const rg_gpu *gpu, bool split);
struct rgk_append_means; /* kv_step's, in the same launch; or NULL */
rg_status rgi_decode_layer(const rgk_attn *compressed, const rgk_topk *topk,
                           const rgk_pages *compressed_pages, const rgk_attn *selected,
                           const rgk_attn *window, const rgk_pages *pages,
                           const struct rgk_decode_pair *pair, const struct rgk_append_means *step,
                           const rg_gpu *gpu, void *workspace, rg_cuda *x);
size_t rgi_decode_split_workspace(const rgk_attn *a, const rgk_pages *pages, const rg_gpu *gpu);
rg_status rgi_decode_split(const rgk_attn *compressed, const rgk_topk *topk,
                           const rgk_pages *compressed_pages, const rgk_attn *selected,
                           const rgk_attn *window, const rgk_pages *pages,
                           const struct rgk_decode_pair *pair, const rg_gpu *gpu, void *workspace,
                           rg_cuda *x);

/* What kernels are told of a call over pages. */
rgk_attn rgi_cuda_paged_view(const rgi_attn *a, rgk_pages *pages);
/* A multiple of every key tile that forward and backward may take for these widths: where a
 * sequence's keys may begin later than at its start without changing a bit. */
int64_t rgi_cuda_key_tile(int64_t D, int64_t E);

/* Heads wider than 256 fit in no less. */
static inline bool rgi_cuda_attn_much_shared(const rg_gpu *gpu) {
  return rgi_cuda_block_kb(gpu) == 227;
}
static inline bool rgi_cuda_attn_little_shared(const rg_gpu *gpu) {
  return rgi_cuda_block_kb(gpu) == 99;
}

size_t rgi_cuda_attn_workspace(const rg_call *c, const rgi_attn *a);
rg_status rgi_cuda_attn_steps(const rg_call *c, const rgi_attn *a, rg_cuda *x);
/* Of a backward call: the order of its delta, NONE where other kernels would run with a delta
 * than without. */
rgi_delta rgi_cuda_attn_delta(const rg_call *c, const rgi_attn *a);
bool rgi_cuda_attn_rounds(const rg_call *c, const rgi_attn *a); /* of a backward: takes sum.q */
const char *rgi_cuda_attn_path(const rg_call *c, const rgi_attn *a);

#endif
