/* exec/cuda_steps.c: see cuda_steps.h. */
#include "cuda_steps.h"
#include "../kernels/session.h"

rg_call rgi_cuda_call(rg_session *s, int32_t i, int32_t *flag, rg_error *e) {
  const rgi_step *step = &s->plan->step[i];
  rg_call call = rgi_session_call(s, i, e);
  for (int32_t k = 0; k < step->nin + step->nout; k++) {
    rg_arg *a = s->arg + step->first_arg + k;
    if (!a->data && step->place[k].bind != RGI_AT_NOTHING) a->data = flag;
  }
  call.fault = flag;
  call.fault_id = -1 - i;
  return call;
}

static rg_status add_rule(const rg_session *s, int32_t k, rgk_lengths_params *p, rg_error *e) {
  const rg_plan *plan = s->plan;
  const rgi_check *c = &plan->check[k];
  if (p->nrule == RGK_LENGTH_RULES)
    return rgi_fail(e, RG_E_LIMIT, NULL, NULL, "more than %d rules govern one input of lengths",
                    RGK_LENGTH_RULES);
  int32_t r = p->nrule++;
  p->rule[r] = (rgk_lengths_rule){.offset = c->offset / 4,
                                  .n = c->n,
                                  .stride = c->stride,
                                  .starts = c->starts,
                                  .capacity = c->capacity,
                                  .id = k};
  if (c->starts || c->lengths < 0) return RG_OK;
  const rgi_check *with = &plan->check[c->lengths];
  for (int32_t i = 0; i < plan->nclean; i++)
    if (plan->clean[i].bind == with->bind) {
      p->starts[r] =
          (const int32_t *)(const void *)(s->current->data + plan->clean[i].offset + with->offset);
      p->starts_stride[r] = with->stride;
      p->starts_n[r] = with->n;
    }
  return RG_OK;
}

rg_status rgi_cuda_clean(rg_session *s, int32_t *flag, rg_cuda *x) {
  const rg_plan *plan = s->plan;
  for (int pass = 0; pass < 2; pass++) /* inputs with starts first: positions refer to them */
    for (int32_t i = 0; i < plan->nclean; i++) {
      const rgi_clean *c = &plan->clean[i];
      bool starts = false;
      rgk_lengths_params p = {.from = s->current->at[c->bind],
                              .to = (int32_t *)(void *)(s->current->data + c->offset),
                              .n = c->n,
                              .flag = flag};
      for (int32_t k = 0; k < plan->ncheck; k++)
        if (plan->check[k].bind == c->bind) {
          starts |= plan->check[k].starts;
          RGI_TRY(add_rule(s, k, &p, x->error));
        }
      if (starts != (pass == 0) || c->n == 0) continue;
      RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_lengths(),
                                        .grid = {1, 1, 1},
                                        .block = {RGK_LENGTHS_THREADS, 1, 1},
                                        .params = &p,
                                        .size = sizeof p}));
    }
  return RG_OK;
}
