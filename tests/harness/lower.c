/* tests/harness/lower.c: see lower.h. */
#include "lower.h"

#include <string.h>

/* Words that are no addresses hardly ever begin like this. */
static const uint64_t high[2] = {UINT64_C(0x3a5b0), UINT64_C(0x2c3d0)};
enum { PLACES = 4096 };

char *lo_address(rgi_place at, int set) {
  return (char *)(uintptr_t)((high[set] << 32) + ((uint64_t)(at.bind - RGI_AT_NOTHING) << 36) +
                             (uint64_t)at.offset);
}
bool lo_is_address(uint64_t word, int set) {
  return word >> 36 >= high[set] >> 4 && word >> 36 < (high[set] >> 4) + PLACES;
}

int64_t lo_bytes(const rgi_step *s, int k) {
  const rg_arg *a = k < s->nin ? &s->call.in[k] : &s->call.out[k - s->nin];
  int64_t n = 1;
  for (int i = 0; i < a->rank; i++) {
    if (a->dim[i] == 0) return 0;
    n += (a->dim[i] - 1) * a->stride[i];
  }
  return n * (int64_t)rg_dtype_size(a->dtype);
}

typedef struct recorder {
  rg_cuda base;
  lo_list *list;
} recorder;

static lo_launch *add(lo_list *l) {
  if (l->n == l->capacity) {
    l->capacity = l->capacity ? 2 * l->capacity : 256;
    lo_launch *more = ot_alloc(l->t, (size_t)l->capacity * sizeof *more);
    if (l->n) memcpy(more, l->at, (size_t)l->n * sizeof *more);
    l->at = more;
  }
  l->at[l->n].step = l->step;
  return &l->at[l->n++];
}

static rg_status take_launch(rg_cuda *base, const rg_launch *l) {
  lo_list *list = ((recorder *)base)->list;
  uint64_t *params = ot_alloc(list->t, (l->size + 15) / 8 * 8);
  memcpy(params, l->params, l->size);
  lo_launch *to = add(list);
  to->launch = *l;
  to->params = params;
  return RG_OK;
}

static rg_status take_library(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                              void *arg) {
  (void)record, (void)arg;
  add(((recorder *)base)->list)->library = true;
  return RG_OK;
}

static rg_status take_collective(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                                 void *arg) {
  return take_library(base, record, arg);
}

static rg_status take_copy(rg_cuda *base, const rg_copy *c) {
  lo_launch *to = add(((recorder *)base)->list);
  to->copies = true;
  to->copy = *c;
  return RG_OK;
}

/* What lay on the stack before shows in parameters that were not filled in. */
static __attribute__((noinline)) void scribble(int byte) {
  char stack[1 << 14];
  memset(stack, byte, sizeof stack);
  __asm__ volatile("" : : "r"(stack) : "memory");
}

const char *lo_ask(ot *t, const rg_plan *plan, int set, lo_list *out) {
  static int asked;
  *out = (lo_list){.t = t};
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    const rgi_node *node = &plan->graph->node[s->node];
    rg_error error = {0};
    recorder r = {.base = {.launch = take_launch,
                           .library = take_library,
                           .collective = take_collective,
                           .copy = take_copy,
                           .blas = t,
                           .error = &error},
                  .list = out};
    rg_arg *arg = ot_alloc(t, (size_t)(s->nin + s->nout + 1) * sizeof *arg);
    rg_call call = s->call;
    for (int k = 0; k < s->nin + s->nout; k++) {
      arg[k] = k < s->nin ? call.in[k] : call.out[k - s->nin];
      if (s->place[k].bind != RGI_AT_NOTHING) arg[k].data = lo_address(s->place[k], set);
    }
    call.in = arg;
    call.out = arg + s->nin;
    call.workspace =
        s->workspace_size ? lo_address((rgi_place){RGI_AT_SCRATCH, s->workspace}, set) : NULL;
    call.comm_block = (void *)(uintptr_t)LO_COMM;
    call.error = &error;
    out->step = i;
    scribble(++asked);
    rg_status status = node->op->cuda_steps(&call, &r.base);
#ifndef REGRAPH_CUDA
    if (status == RG_E_DEVICE) { /* tensor maps and library products need CUDA */
      out->skipped++;
      continue;
    }
#endif
    if (status != RG_OK) return ot_text(t, "%s: %s", node->name, error.message);
  }
  return NULL;
}
