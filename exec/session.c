/* exec/session.c: one plan at work: memory, bindings, and the two runs; how steps are run is the
   backend's (backend.c says which), what it asks of a session for that is in session_steps.c.

   A session owns the copy of the plan's argument lists that its runs patch, and (unless the caller
   supplies it) the arena: one saved and one scratch block of exactly rg_sizes.saved and .scratch
   bytes.

       create ──bind──▶ forward ──▶ backward      each forward remembers, with its saved block,
                ▲       │  ▲        │             where its inputs and outputs stood; the backward
                └───────┘  └────────┘             on that block reads them there

   A run allocates nothing here (regraph.h says what a GPU's graphs take): memory is found at
   creation and when a saved block is bound for the first time. A call that is refused changes
   nothing.

   debug_poison: before a forward the arena and all bound outputs hold a pattern that is NaN in
   every float type and a negative number as i32; before a backward, scratch and the gradients do.
   Blocks that the session owns stand between guard zones, checked after every step:

       | guard 256 | saved or scratch … | guard 256 |
 */
#include "session.h"

#include <stdlib.h>
#include <string.h>

/* ---- memory ---- */

static rg_status no_host_memory(int64_t bytes, rg_error *e) {
  char need[32];
  return rgi_fail(e, RG_E_NOMEM, NULL, NULL,
                  "%s of the host's memory could not be had for what is offloaded; name fewer "
                  "nodes, or bound it by \"host\" in the policy",
                  rg_human_bytes(bytes, need));
}

static rg_status own_block(rg_session *s, const rg_allocator *from, int64_t size,
                           rgi_owned_block *b, rg_error *e) {
  const bool host = from == &s->backend->host;
  const rgi_backend *writer = host ? &rgi_cpu_backend : s->backend;
  int64_t guard = s->poison ? RGI_GUARD : 0, slack = 0;
  if (size == 0) return RG_OK;
  b->memory = from->alloc(from->user, (size_t)(size + 2 * guard));
  if (b->memory &&
      /* not an allocator for arenas: align the block ourselves */
      (uintptr_t)b->memory % RGI_ALIGN != 0) {
    from->free(from->user, b->memory);
    slack = RGI_ALIGN - 1;
    b->memory = from->alloc(from->user, (size_t)(size + 2 * guard + slack));
  }
  if (!b->memory)
    return host ? no_host_memory(size + 2 * guard + slack, e)
                : s->backend->no_memory(s, size + 2 * guard + slack, e);
  b->data = (char *)b->memory + guard;
  b->data += -(uintptr_t)b->data % RGI_ALIGN;
  b->size = size;
  if (guard) {
    RGI_TRY(writer->fill(s, b->data - RGI_GUARD, RGI_GUARD_BYTE, RGI_GUARD, e));
    RGI_TRY(writer->fill(s, b->data + size, RGI_GUARD_BYTE, RGI_GUARD, e));
  }
  return RG_OK;
}

/* Highest written byte + 1 of a poisoned block. Tensors are made of 2- and 4-byte elements, so an
 * odd last byte (a workspace's) counts as part of its pair. */
static rg_status high_water(rg_session *s, const char *p, int64_t size, int64_t *out, rg_error *e) {
  static const uint16_t poison = RGI_POISON;
  const char *host = s->window;
  *out = 0;
  for (int64_t end = size; end > 0 && *out == 0;) {
    int64_t from = (end - 1) / RGI_WINDOW * RGI_WINDOW, n = end - from;
    RGI_TRY(s->backend->read(s, s->window, p + from, (size_t)n, e));
    if (n & 1 && memcmp(host + n - 1, &poison, 1) != 0) *out = end;
    n &= ~(int64_t)1;
    end = from;
    /* each pair as the one before it, and so as the first: nothing was written */
    if (n && memcmp(host, &poison, 2) == 0 && memcmp(host + 2, host, (size_t)n - 2) == 0) continue;
    for (; n > 0 && *out == 0; n -= 2)
      if (memcmp(host + n - 2, &poison, 2) != 0) *out = from + n;
  }
  return RG_OK;
}

/* ---- life ---- */

static rg_status check_block(const rg_session *s, const void *block, const char *what,
                             rg_error *e) {
  const int align = s->backend->on_host ? RGI_HOST_ALIGN : RGI_ALIGN;
  if ((uintptr_t)block % (size_t)align == 0) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the %s block stands at %p; expected a multiple of %d",
                  what, block, align);
}

static rg_status check_host(const rg_session *s, const void *block, rg_error *e) {
  RGI_TRY(check_block(s, block, "host", e));
  return s->backend->check_host ? s->backend->check_host(s, block, e) : RG_OK;
}

static rg_status use_saved(rg_session *s, void *data, rg_error *e) {
  rgi_saved_block *b = NULL;
  for (rgi_saved_block *k = s->blocks; k; k = k->next) {
    if (k->data == data && !k->forgotten) {
      s->current = k;
      return RG_OK;
    }
    if (k->forgotten) b = k;
  }
  if (!b) {
    b = rgi_alloc(s->arena, sizeof *b);
    void **at = rgi_alloc_n(s->arena, (size_t)s->plan->nbindable + 1, sizeof *at);
    if (!b || !at) return rgi_nomem(e);
    *b = (rgi_saved_block){.next = s->blocks, .at = at};
    s->blocks = b;
  }
  b->data = data;
  b->host = NULL;
  b->forwarded = b->forgotten = false;
  s->current = b;
  return RG_OK;
}

static rg_status fill_session(rg_session *s, const rg_session_options *o, rg_error *e) {
  const rg_plan *plan = s->plan;
  s->bound = rgi_alloc_n(s->arena, (size_t)plan->nbindable + 1, sizeof *s->bound);
  s->arg = rgi_alloc_n(s->arena, (size_t)plan->nargs + 1, sizeof *s->arg);
  s->ms = rgi_alloc_n(s->arena, (size_t)plan->nstep + 1, sizeof *s->ms);
  s->span = rgi_alloc_n(s->arena, (size_t)plan->nbindable + 3, sizeof *s->span);
  if (s->poison) s->window = rgi_alloc(s->arena, RGI_WINDOW);
  if (!s->bound || !s->arg || !s->ms || !s->span || (s->poison && !s->window)) return rgi_nomem(e);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *step = &plan->step[i];
    rg_arg *arg = s->arg + step->first_arg;
    if (step->nin) memcpy(arg, step->call.in, (size_t)step->nin * sizeof *arg);
    if (step->nout) memcpy(arg + step->nin, step->call.out, (size_t)step->nout * sizeof *arg);
  }
  if (o->saved) {
    RGI_TRY(check_block(s, o->saved, "saved", e));
    RGI_TRY(use_saved(s, o->saved, e));
  } else {
    RGI_TRY(own_block(s, &s->memory, plan->sizes.saved, &s->own_saved, e));
    RGI_TRY(use_saved(s, s->own_saved.data, e));
  }
  if (o->scratch) {
    RGI_TRY(check_block(s, o->scratch, "scratch", e));
    s->scratch = o->scratch;
  } else {
    RGI_TRY(own_block(s, &s->memory, plan->sizes.scratch, &s->own_scratch, e));
    s->scratch = s->own_scratch.data;
  }
  RGI_TRY(own_block(s, &s->memory, plan->sizes.comm, &s->own_comm, e));
  if (o->host)
    RGI_TRY(check_host(s, o->host, e));
  else
    RGI_TRY(own_block(s, &s->backend->host, plan->sizes.host, &s->own_host, e));
  if (plan->sizes.host) s->current->host = o->host ? o->host : s->own_host.data;
  RGI_TRY(s->backend->create(s, o, e));
  return rgi_session_agree(s, e);
}

RGI_NO_TAIL(rg_session_options, host);

/* Is it a communicator of this library's, whose members are where they are expected? */
static bool counts(const rg_comm *c) {
  return c && c->abi == RG_OP_ABI;
}

static rg_status create_session(const rg_plan *plan, const rg_session_options *o, rg_session **out,
                                rg_error *e) {
  const rgi_backend *backend;
  if (!plan) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan is NULL");
  RGI_TRY(rgi_backend_of(plan, &backend, e));
  if (o->arena && (!o->arena->alloc || !o->arena->free))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the arena's allocator lacks alloc or free");
  rgi_arena *arena = rgi_arena_create(plan->ctx);
  rg_session *s = arena ? rgi_alloc(arena, sizeof *s) : NULL;
  if (!s) {
    rgi_arena_destroy(arena);
    return rgi_nomem(e);
  }
  s->arena = arena;
  s->plan = plan;
  s->poison = o->debug_poison;
  s->comm = o->comm;
  if (counts(s->comm)) s->comm->sessions++;
  s->backend = backend;
  s->memory = o->arena ? *o->arena : s->backend->memory;
  rg_status status = fill_session(s, o, e);
  if (status != RG_OK) {
    rg_session_destroy(s);
    return status;
  }
  *out = s;
  return RG_OK;
}

rg_status rg_session_create(const rg_plan *plan, const rg_session_options *options,
                            rg_session **out, rg_error *e) {
  rg_session_options o;
  rg_error own = {0};
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the session is NULL");
  *out = NULL;
  RGI_TRY(RGI_OPTIONS(rg_session_options, host, options, &o, e));
  const rg_status status = create_session(plan, &o, out, &own);
  return rgi_ranks_told(o.comm, status, &own, e);
}

void rg_session_destroy(rg_session *s) {
  if (!s) return;
  s->backend->destroy(s);
  if (counts(s->comm) && --s->comm->sessions == 0 && s->comm->leaving) s->comm->destroy(s->comm);
  if (s->own_host.memory) s->backend->host.free(s->backend->host.user, s->own_host.memory);
  if (s->own_comm.memory) s->memory.free(s->memory.user, s->own_comm.memory);
  if (s->own_scratch.memory) s->memory.free(s->memory.user, s->own_scratch.memory);
  if (s->own_saved.memory) s->memory.free(s->memory.user, s->own_saved.memory);
  rgi_arena_destroy(s->arena);
}

/* ---- binding ---- */

static rg_status null_session(rg_error *e) {
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session is NULL");
}

/* Everything that a run of this direction touches is bound. A tensor of no bytes needs no
 * memory. */
static rg_status check_bound(const rg_session *s, bool backward, rg_error *e) {
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const rg_tensor_info *t = &s->plan->bindable[i].info;
    bool gradient = t->role == RG_GRAD_IN || t->role == RG_GRAD_OUT;
    if (gradient && !backward) continue;
    if (!s->bound[i] && t->bytes)
      return rgi_fail(
          e, RG_E_USAGE, NULL, NULL, "the %s \"%s\" is not bound; expected %lld bytes for the %s",
          rgi_role_name(t->role), t->name, (long long)t->bytes, backward ? "backward" : "forward");
  }
  return RG_OK;
}

rg_status rg_session_bind_saved(rg_session *s, void *saved, rg_error *e) {
  if (!s) return null_session(e);
  if (!saved) saved = s->own_saved.data;
  if (!saved && s->plan->sizes.saved)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the saved block is NULL; expected %lld bytes",
                    (long long)s->plan->sizes.saved);
  if (saved != s->own_saved.data) RGI_TRY(check_block(s, saved, "saved", e));
  return use_saved(s, saved, e);
}

rg_status rg_session_adopt_saved(rg_session *s, void *saved, rg_error *e) {
  if (!s) return null_session(e);
  RGI_TRY(check_bound(s, false, e)); /* a backward reads there */
  RGI_TRY(rg_session_bind_saved(s, saved, e));
  if (s->plan->sizes.host && !s->current->host)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the saved block has no host block; bind both, then adopt");
  memcpy(s->current->at, s->bound, (size_t)s->plan->nbindable * sizeof *s->bound);
  s->current->forwarded = true;
  return RG_OK;
}

rg_status rg_session_forget_saved(rg_session *s, void *saved, rg_error *e) {
  if (!s) return null_session(e);
  for (rgi_saved_block *b = s->blocks; b; b = b->next)
    if (b->data == saved && !b->forgotten && saved != s->own_saved.data) {
      b->forwarded = false;
      b->forgotten = true;
      return RG_OK;
    }
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session was given no saved block at %p", saved);
}

rg_status rg_session_bind_host(rg_session *s, void *host, rg_error *e) {
  if (!s) return null_session(e);
  if (!s->plan->sizes.host) return RG_OK;
  if (!host) host = s->own_host.data;
  if (!host)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the host block is NULL; expected %lld bytes",
                    (long long)s->plan->sizes.host);
  if (host != s->own_host.data) RGI_TRY(check_host(s, host, e));
  for (rgi_saved_block *b = s->blocks; b; b = b->next)
    if (b == s->current ? b->host != host : b->host == host) {
      b->forwarded = false; /* what it had there is not, or will not be */
      b->host = NULL;
    }
  s->current->host = host;
  return RG_OK;
}

rg_status rg_session_bind_scratch(rg_session *s, void *scratch, rg_error *e) {
  if (!s) return null_session(e);
  if (!scratch) scratch = s->own_scratch.data;
  if (!scratch && s->plan->sizes.scratch)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the scratch block is NULL; expected %lld bytes",
                    (long long)s->plan->sizes.scratch);
  if (scratch != s->own_scratch.data) RGI_TRY(check_block(s, scratch, "scratch", e));
  s->scratch = scratch;
  return RG_OK;
}

rg_status rg_session_set_stream(rg_session *s, void *stream, rg_error *e) {
  if (!s) return null_session(e);
  return s->backend->set_stream(s, stream, e);
}

rg_status rg_session_synchronize(rg_session *s, rg_error *e) {
  if (!s) return null_session(e);
  return s->backend->synchronize(s, e);
}

/* ---- running ---- */

/* Fills what the run is going to write with NaN: scratch, the caller's tensors of `role`; sums keep
 * what they hold. */
static rg_status poison_targets(rg_session *s, rg_role role, rg_error *e) {
  RGI_TRY(s->backend->poison(s, s->scratch, s->plan->sizes.scratch, e));
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const rg_tensor_info *t = &s->plan->bindable[i].info;
    if (t->role == role && !t->accumulates)
      RGI_TRY(s->backend->poison(s, s->bound[i], t->bytes, e));
  }
  return RG_OK;
}

static rg_status measure(rg_session *s, rg_error *e) {
  int64_t saved, scratch;
  RGI_TRY(high_water(s, s->current->data, s->plan->sizes.saved, &saved, e));
  RGI_TRY(high_water(s, s->scratch, s->plan->sizes.scratch, &scratch, e));
  if (saved > s->touched_saved) s->touched_saved = saved;
  if (scratch > s->touched_scratch) s->touched_scratch = scratch;
  return RG_OK;
}

static rg_status forward(rg_session *s, rg_error *e) {
  RGI_TRY(check_bound(s, false, e));
  if (s->current->forgotten)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the session was told to forget the saved block that is bound; bind another "
                    "for the forward");
  if (s->plan->sizes.host && !s->current->host)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the bound saved block has no host block; expected %lld bytes for what is "
                    "offloaded (rg_session_bind_host)",
                    (long long)s->plan->sizes.host);
  RGI_TRY(rgi_session_overlap(s, false, e));
  RGI_TRY(s->backend->check(s, e));
  s->current->forwarded = false; /* not before: a refused call leaves the block as it was */
  memcpy(s->current->at, s->bound, (size_t)s->plan->nbindable * sizeof *s->bound);
  if (s->poison) {
    s->touched_saved = s->touched_scratch = 0;
    RGI_TRY(s->backend->poison(s, s->current->data, s->plan->sizes.saved, e));
    if (s->current->host)
      RGI_TRY(rgi_cpu_backend.poison(s, s->current->host, s->plan->sizes.host, e));
    RGI_TRY(poison_targets(s, RG_OUTPUT, e));
  }
  RGI_TRY(s->backend->run(s, false, e));
  if (s->poison) RGI_TRY(measure(s, e));
  s->current->forwarded = true;
  return e->status; /* what ops found wrong in rows and sequences, and left behind them (O6) */
}

static rg_status backward(rg_session *s, rg_error *e) {
  bool any = false;
  for (int32_t i = 0; i < s->plan->nbindable; i++)
    any |= s->plan->bindable[i].info.role == RG_GRAD_OUT;
  if (!any)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the plan has no gradients, so there is no backward to run");
  /* a lost session has no forward either: that is not what to tell */
  RGI_TRY(s->backend->alive(s, e));
  if (!s->current->forwarded)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "backward without a forward on the bound saved block before it");
  RGI_TRY(check_bound(s, true, e));
  RGI_TRY(rgi_session_overlap(s, true, e));
  if (s->poison) RGI_TRY(poison_targets(s, RG_GRAD_OUT, e));
  RGI_TRY(s->backend->run(s, true, e));
  return s->poison ? measure(s, e) : RG_OK;
}

rg_status rg_session_forward(rg_session *s, rg_error *e) {
  rg_error own = {0};
  return s ? rgi_ranks_told(s->comm, forward(s, &own), &own, e) : null_session(e);
}
rg_status rg_session_backward(rg_session *s, rg_error *e) {
  rg_error own = {0};
  return s ? rgi_ranks_told(s->comm, backward(s, &own), &own, e) : null_session(e);
}

/* ---- looking inside ---- */

rg_status rg_session_node_time(const rg_session *s, size_t i, rg_node_time *out) {
  if (!s || !out || i >= (size_t)s->plan->nstep) return RG_E_USAGE;
  const rgi_step *step = &s->plan->step[i];
  const rgi_node *node = &s->plan->graph->node[step->node];
  *out = (rg_node_time){.name = node->name,
                        .op = node->op->name,
                        .backward = node->backward,
                        .ms = s->ms[i],
                        .flops = step->cost.flops,
                        .bytes = step->cost.bytes,
                        .model_ms = step->ms,
                        .roofline_ms = step->roofline_ms};
  return RG_OK;
}

static char *copy_dense(const rgi_tensor *t, int axis, const char *src, char *dst) {
  size_t size = rg_dtype_size(t->dtype);
  if (axis == t->rank) {
    memcpy(dst, src, size);
    return dst + size;
  }
  if (axis == t->rank - 1 && t->stride[axis] == 1) {
    size_t row = (size_t)t->dim[axis].c * size;
    memcpy(dst, src, row);
    return dst + row;
  }
  for (int64_t i = 0; i < t->dim[axis].c; i++)
    dst = copy_dense(t, axis + 1, src + i * t->stride[axis] * (int64_t)size, dst);
  return dst;
}

static int32_t find_tensor(const rgi_graph *g, const char *name) {
  for (int32_t t = 0; t < g->ntensor; t++)
    if (strcmp(g->tensor[t].name, name) == 0) return t;
  for (int32_t i = 0; i < g->noutput; i++)
    if (strcmp(g->output[i].name, name) == 0) return g->output[i].tensor;
  return -1;
}

rg_status rg_session_read(rg_session *s, const char *tensor, void *dst, size_t bytes, rg_error *e) {
  if (!s) return null_session(e);
  if (!tensor || !dst)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the tensor's name or the destination is NULL");
  if (!s->current->forwarded)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "\"%s\" has no value before a forward", tensor);
  const rgi_graph *g = s->plan->graph;
  int32_t t = find_tensor(g, tensor);
  if (t < 0) return rgi_fail(e, RG_E_NAME, NULL, NULL, "the plan has no tensor \"%s\"", tensor);
  rgi_region region = g->tensor[rgi_owner(g, t)].region;
  if (region != RGI_R_SAVED && region != RGI_R_INPUT && region != RGI_R_OUTPUT)
    return rgi_fail(e, RG_E_NAME, NULL, NULL,
                    "\"%s\" is gone: its bytes are scratch and may have been reused", tensor);
  if ((int64_t)bytes != rgi_bytes(&g->tensor[t]))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%zu bytes for \"%s\"; expected %lld", bytes, tensor,
                    (long long)rgi_bytes(&g->tensor[t]));
  rgi_place at;
  RGI_TRY(rgi_plan_place(s->plan, t, &at, e));
  const char *src = rgi_session_resolve(s, at);
  if (!src && bytes) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "\"%s\" is not bound", tensor);
  if (!bytes) return RG_OK;
  if (s->backend->on_host) {
    copy_dense(&g->tensor[t], 0, src, dst);
    return RG_OK;
  }
  int64_t span = 1; /* over all strides */
  for (int a = 0; a < g->tensor[t].rank; a++)
    span += (g->tensor[t].dim[a].c - 1) * g->tensor[t].stride[a];
  size_t size = (size_t)span * rg_dtype_size(g->tensor[t].dtype);
  char *host = rgi_malloc(s->plan->ctx, size);
  if (!host) return rgi_nomem(e);
  rg_status status = s->backend->read(s, host, src, size, e);
  if (status == RG_OK) copy_dense(&g->tensor[t], 0, host, dst);
  rgi_free(s->plan->ctx, host);
  return status;
}

rg_status rg_session_touched(const rg_session *s, int64_t *saved, int64_t *scratch) {
  if (!s || !saved || !scratch || !s->poison) return RG_E_USAGE;
  *saved = s->touched_saved;
  *scratch = s->touched_scratch;
  return RG_OK;
}
