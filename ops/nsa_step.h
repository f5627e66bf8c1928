/* ops/nsa_step.h: what nodes of a step of single tokens tell their kernels (cmp_topk.c, slc_swa.c),
 * alone or as parts of one (nsa_step.c). */
#ifndef RGI_NSA_STEP_H
#define RGI_NSA_STEP_H

#include "../kernels/attn/decode.h"
#include "attn.h"
#include "cuda/attn.h"
#include "cuda/topk.h"
#include "part.h"

typedef struct rgi_cmp_topk {
  rgk_attn attn;
  rgk_topk topk;
  rgk_pages pages;
} rgi_cmp_topk;
void rgi_cmp_topk_view(const rg_call *c, rgi_cmp_topk *of);

typedef struct rgi_slc_swa {
  rgk_attn selected, window;
  rgk_pages pages;
  rgk_decode_pair pair; /* which branches there are */
} rgi_slc_swa;
/* `own`, if any, is place `own_at` of the other branches, which are a list otherwise. */
void rgi_slc_swa_view(const rg_call *c, const rg_arg *own, int own_at, rgi_slc_swa *of);

bool rgi_joins_nsa(const rg_call *choice, const rg_call *sum, bool split);

#endif
