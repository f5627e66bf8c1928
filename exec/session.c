/* exec/session.c: one plan at work on the CPU: memory, bindings, and the two runs.
 *
 * A session owns a thread pool, the copy of the plan's argument lists that its runs patch, and (unless the
 * caller supplies it) the arena: one saved and one scratch block of exactly rg_sizes.saved and .scratch
 * bytes.
 *
 *     create ──bind──▶ forward ──▶ backward      each forward remembers, with its saved block, where its
 * inputs and ▲       │  ▲        │          outputs stood; the backward on that block reads them there
 *                 └───────┘  └────────┘
 *
 * A run allocates nothing. Memory is found at creation and when a saved block is bound for the first time.
 *
 * debug_poison: before a forward the arena and all bound outputs hold a pattern that is NaN in every float
 * type and a negative number as i32; before a backward, scratch and the gradients do. Blocks that the session
 * owns stand between guard zones, checked after every step:
 *
 *     | guard 256 | saved or scratch … | guard 256 |
 */
#include "pool.h"
#include "plan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { GUARD = 256, GUARD_BYTE = 0xc5 };
/* 0xffa5 is a NaN in f16 and bf16, twice it is one in f32; no op writes it on purpose (idx tails are -1). */
static const uint16_t POISON = 0xffa5;

/* A saved block that has been bound, and the forward whose values it holds. */
typedef struct saved_block {
  struct saved_block *next;
  char *data;
  bool forwarded;
  void **at; /* [nbindable]: inputs and outputs of that forward */
} saved_block;

typedef struct owned_block { /* memory the session asked for */
  void *memory;
  char *data; /* past the guard */
  int64_t size;
} owned_block;

struct rg_session {
  rgi_arena *arena;
  const rg_plan *plan;
  rgi_pool *pool;
  bool poison;
  rg_allocator memory; /* of owned blocks */
  owned_block own_saved, own_scratch;
  char *scratch;
  saved_block *blocks, *current;
  void **bound; /* [nbindable] */
  rg_arg *arg;  /* [nargs] */
  double *ms;   /* [nstep] */
  int64_t touched_saved, touched_scratch;
};

/* ---- memory ---- */

static void *malloc_256(void *user, size_t size) {
  (void)user;
  void *p = NULL;
  return posix_memalign(&p, RGI_ALIGN, size) ? NULL : p;
}
static void free_256(void *user, void *ptr) {
  (void)user;
  free(ptr);
}

static rg_status own_block(rg_session *s, int64_t size, owned_block *b, rg_error *e) {
  int64_t guard = s->poison ? GUARD : 0, slack = 0;
  if (size == 0) return RG_OK;
  b->memory = s->memory.alloc(s->memory.user, (size_t)(size + 2 * guard));
  if (b->memory &&
      (uintptr_t)b->memory % RGI_ALIGN != 0) { /* not an allocator for arenas: align the block ourselves */
    s->memory.free(s->memory.user, b->memory);
    slack = RGI_ALIGN - 1;
    b->memory = s->memory.alloc(s->memory.user, (size_t)(size + 2 * guard + slack));
  }
  if (!b->memory)
    return rgi_fail(e, RG_E_NOMEM, NULL, NULL, "the arena's allocator refused %lld bytes",
                    (long long)(size + 2 * guard + slack));
  b->data = (char *)b->memory + guard;
  b->data += -(uintptr_t)b->data % RGI_ALIGN;
  b->size = size;
  if (guard) {
    memset(b->data - GUARD, GUARD_BYTE, GUARD);
    memset(b->data + size, GUARD_BYTE, GUARD);
  }
  return RG_OK;
}

static bool guards_whole(const owned_block *b) {
  if (!b->memory) return true;
  const unsigned char *low = (const unsigned char *)b->data - GUARD,
                      *high = (const unsigned char *)b->data + b->size;
  for (int i = 0; i < GUARD; i++)
    if (low[i] != GUARD_BYTE || high[i] != GUARD_BYTE) return false;
  return true;
}

/* Tensors are made of 2- and 4-byte elements, so an odd last byte (a workspace's) counts as part of its pair.
 */
static void poison(void *data, int64_t size) {
  char *p = data;
  for (int64_t i = 0; i + 2 <= size; i += 2) memcpy(p + i, &POISON, 2);
  if (size & 1) memcpy(p + size - 1, &POISON, 1);
}

/* Highest written byte + 1. */
static int64_t high_water(const char *p, int64_t size) {
  if (size & 1) {
    if (memcmp(p + size - 1, &POISON, 1) != 0) return size;
    size--;
  }
  while (size && memcmp(p + size - 2, &POISON, 2) == 0) size -= 2;
  return size;
}

/* ---- life ---- */

static rg_status check_block(const void *block, const char *what, rg_error *e) {
  if ((uintptr_t)block % RGI_ALIGN == 0) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the %s block stands at %p; expected a multiple of %d", what,
                  block, RGI_ALIGN);
}

static rg_status use_saved(rg_session *s, void *data, rg_error *e) {
  for (saved_block *b = s->blocks; b; b = b->next)
    if (b->data == data) {
      s->current = b;
      return RG_OK;
    }
  saved_block *b = rgi_alloc(s->arena, sizeof *b);
  void **at = rgi_alloc_n(s->arena, (size_t)s->plan->nbindable + 1, sizeof *at);
  if (!b || !at) return rgi_nomem(e);
  *b = (saved_block){.next = s->blocks, .data = data, .at = at};
  s->blocks = s->current = b;
  return RG_OK;
}

static rg_status fill_session(rg_session *s, const rg_session_options *o, rg_error *e) {
  const rg_plan *plan = s->plan;
  s->bound = rgi_alloc_n(s->arena, (size_t)plan->nbindable + 1, sizeof *s->bound);
  s->arg = rgi_alloc_n(s->arena, (size_t)plan->nargs + 1, sizeof *s->arg);
  s->ms = rgi_alloc_n(s->arena, (size_t)plan->nstep + 1, sizeof *s->ms);
  if (!s->bound || !s->arg || !s->ms) return rgi_nomem(e);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *step = &plan->step[i];
    rg_arg *arg = s->arg + step->first_arg;
    if (step->nin) memcpy(arg, step->call.in, (size_t)step->nin * sizeof *arg);
    if (step->nout) memcpy(arg + step->nin, step->call.out, (size_t)step->nout * sizeof *arg);
  }
  RGI_TRY(rgi_pool_create(plan->ctx, plan->threads, &s->pool, e));
  if (o->saved) {
    RGI_TRY(check_block(o->saved, "saved", e));
    RGI_TRY(use_saved(s, o->saved, e));
  } else {
    RGI_TRY(own_block(s, plan->sizes.saved, &s->own_saved, e));
    RGI_TRY(use_saved(s, s->own_saved.data, e));
  }
  if (o->scratch) {
    RGI_TRY(check_block(o->scratch, "scratch", e));
    s->scratch = o->scratch;
  } else {
    RGI_TRY(own_block(s, plan->sizes.scratch, &s->own_scratch, e));
    s->scratch = s->own_scratch.data;
  }
  return RG_OK;
}

rg_status rg_session_create(const rg_plan *plan, const rg_session_options *options, rg_session **out,
                            rg_error *e) {
  static const rg_session_options defaults = {0};
  const rg_session_options *o = options ? options : &defaults;
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the session is NULL");
  *out = NULL;
  if (!plan) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan is NULL");
  if (plan->cuda)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                    "the plan is for a cuda device; this build runs on the CPU only");
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
  s->memory = o->arena ? *o->arena : (rg_allocator){malloc_256, free_256, NULL};
  rg_status status = fill_session(s, o, e);
  if (status != RG_OK) {
    rg_session_destroy(s);
    return status;
  }
  *out = s;
  return RG_OK;
}

void rg_session_destroy(rg_session *s) {
  if (!s) return;
  rgi_pool_destroy(s->pool);
  if (s->own_scratch.memory) s->memory.free(s->memory.user, s->own_scratch.memory);
  if (s->own_saved.memory) s->memory.free(s->memory.user, s->own_saved.memory);
  rgi_arena_destroy(s->arena);
}

/* ---- binding ---- */

static const char *role_name(rg_role role) {
  static const char *const name[] = {"input", "output", "gradient of output", "gradient of input"};
  return (unsigned)role < 4 ? name[role] : "tensor of unknown role";
}

static rg_status null_session(rg_error *e) {
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session is NULL");
}

rg_status rg_session_bind(rg_session *s, rg_role role, const char *name, void *ptr, size_t bytes,
                          rg_error *e) {
  if (!s) return null_session(e);
  if (!name) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the name of the tensor to bind is NULL");
  const rg_plan *plan = s->plan;
  for (int32_t i = 0; i < plan->nbindable; i++) {
    const rg_tensor_info *t = &plan->bindable[i].info;
    if (t->role != role || strcmp(t->name, name) != 0) continue;
    if (ptr && bytes != (size_t)t->bytes)
      return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%zu bytes bound to the %s \"%s\"; expected %lld", bytes,
                      role_name(role), name, (long long)t->bytes);
    if ((uintptr_t)ptr % rg_dtype_size(t->dtype) != 0)
      return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the %s \"%s\" is bound to %p; expected a multiple of %zu",
                      role_name(role), name, ptr, rg_dtype_size(t->dtype));
    s->bound[i] = ptr;
    return RG_OK;
  }
  /* Not there: say which names there are of this role. */
  const char *near = NULL, *names[64];
  int n = 0;
  for (int32_t i = 0; i < plan->nbindable && n < RGI_COUNT(names); i++)
    if (plan->bindable[i].info.role == role) names[n++] = plan->bindable[i].info.name;
  near = n ? rgi_nearest(name, names, n) : NULL;
  if (near)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan has no %s \"%s\"; did you mean \"%s\"?",
                    role_name(role), name, near);
  return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan has no %s \"%s\"; it has %d of that role%s%s%s",
                  role_name(role), name, n, n ? ", such as \"" : "", n ? names[0] : "", n ? "\"" : "");
}

rg_status rg_session_bind_saved(rg_session *s, void *saved, rg_error *e) {
  if (!s) return null_session(e);
  if (!saved) saved = s->own_saved.data;
  if (!saved && s->plan->sizes.saved)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the saved block is NULL; expected %lld bytes",
                    (long long)s->plan->sizes.saved);
  if (saved != s->own_saved.data) RGI_TRY(check_block(saved, "saved", e));
  return use_saved(s, saved, e);
}

rg_status rg_session_bind_scratch(rg_session *s, void *scratch, rg_error *e) {
  if (!s) return null_session(e);
  if (!scratch) scratch = s->own_scratch.data;
  if (!scratch && s->plan->sizes.scratch)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the scratch block is NULL; expected %lld bytes",
                    (long long)s->plan->sizes.scratch);
  if (scratch != s->own_scratch.data) RGI_TRY(check_block(scratch, "scratch", e));
  s->scratch = scratch;
  return RG_OK;
}

/* Everything that a run of this direction touches is bound. A tensor of no bytes needs no memory. */
static rg_status check_bound(const rg_session *s, bool backward, rg_error *e) {
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const rg_tensor_info *t = &s->plan->bindable[i].info;
    bool gradient = t->role == RG_GRAD_IN || t->role == RG_GRAD_OUT;
    if (gradient && !backward) continue;
    if (!s->bound[i] && t->bytes)
      return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the %s \"%s\" is not bound; expected %lld bytes for the %s",
                      role_name(t->role), t->name, (long long)t->bytes, backward ? "backward" : "forward");
  }
  return RG_OK;
}

/* ---- contents that the host can check before a run ---- */

static int32_t entry(const rg_session *s, const rgi_check *c, int64_t i) {
  const int32_t *data = (const int32_t *)(const void *)((const char *)s->bound[c->bind] + c->offset);
  return data[i * c->stride];
}

static rg_status bad_entry(const rg_session *s, const rgi_check *c, int64_t i, rg_error *e,
                           const char *format, ...) __attribute__((format(printf, 5, 6)));
static rg_status bad_entry(const rg_session *s, const rgi_check *c, int64_t i, rg_error *e,
                           const char *format, ...) {
  char expected[256];
  va_list args;
  va_start(args, format);
  vsnprintf(expected, sizeof expected, format, args);
  va_end(args);
  return rgi_fail(e, RG_E_DATA, NULL, NULL, "%s[%lld] is %d; expected %s",
                  s->plan->bindable[c->bind].info.name, (long long)i, entry(s, c, i), expected);
}

static rg_status check_contents(const rg_session *s, rg_error *e) {
  for (int32_t k = 0; k < s->plan->ncheck; k++) {
    const rgi_check *c = &s->plan->check[k];
    if (c->n == 0) continue;
    if (c->starts) {
      if (entry(s, c, 0) != 0) return bad_entry(s, c, 0, e, "0, where the first sequence starts");
      for (int64_t i = 1; i < c->n; i++)
        if (entry(s, c, i) < entry(s, c, i - 1))
          return bad_entry(s, c, i, e, "at least %d, the entry before it", entry(s, c, i - 1));
      if (entry(s, c, c->n - 1) > c->capacity)
        return bad_entry(s, c, c->n - 1, e, "at most %lld, the rows there are", (long long)c->capacity);
      continue;
    }
    const rgi_check *starts = c->lengths >= 0 ? &s->plan->check[c->lengths] : NULL;
    for (int64_t i = 0; i < c->n; i++) {
      int64_t length =
          starts && i + 1 < starts->n ? (int64_t)entry(s, starts, i + 1) - entry(s, starts, i) : 0;
      if (entry(s, c, i) < 0) return bad_entry(s, c, i, e, "0 or more");
      if (entry(s, c, i) + length > INT32_MAX)
        return bad_entry(s, c, i, e, "at most %lld, so that positions fit 32 bits",
                         (long long)(INT32_MAX - length));
    }
  }
  return RG_OK;
}

/* ---- running ---- */

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

static void *resolve(const rg_session *s, rgi_place at) {
  char *base = NULL;
  if (at.bind >= 0) {
    rg_role role = s->plan->bindable[at.bind].info.role;
    base = role == RG_INPUT || role == RG_OUTPUT ? s->current->at[at.bind] : s->bound[at.bind];
  } else if (at.bind == RGI_AT_SAVED) {
    base = s->current->data;
  } else if (at.bind == RGI_AT_SCRATCH) {
    base = s->scratch;
  }
  return base ? base + at.offset : NULL;
}

static rg_status run_step(rg_session *s, int32_t i, rg_error *e) {
  const rgi_step *step = &s->plan->step[i];
  const rgi_node *node = &s->plan->graph->node[step->node];
  rg_arg *arg = s->arg + step->first_arg;
  for (int32_t k = 0; k < step->nin + step->nout; k++) arg[k].data = resolve(s, step->place[k]);
  rg_call call = step->call;
  call.in = arg;
  call.out = arg + step->nin;
  call.workspace = step->workspace >= 0 && step->workspace_size ? s->scratch + step->workspace : NULL;
  call.parallel = rgi_pool_run;
  call.pool = s->pool;
  call.error = e;
  double start = now_ms();
  rg_status status = node->op->run_cpu(&call);
  s->ms[i] = now_ms() - start;
  if (status != RG_OK) return rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
  if (s->poison) {
    if (!guards_whole(&s->own_saved) || !guards_whole(&s->own_scratch))
      return rgi_fail(e, RG_E_INTERNAL, NULL, node->name, "op \"%s\" wrote outside the arena",
                      node->op->name);
    int64_t end = step->workspace + step->workspace_size;
    if (step->workspace_size && end > s->touched_scratch) s->touched_scratch = end;
  }
  return RG_OK;
}

/* Fills what the run is going to write with NaN: scratch, the caller's tensors of `role`; sums keep what they
 * hold. */
static void poison_targets(rg_session *s, rg_role role) {
  poison(s->scratch, s->plan->sizes.scratch);
  for (int32_t i = 0; i < s->plan->nbindable; i++) {
    const rg_tensor_info *t = &s->plan->bindable[i].info;
    if (t->role == role && !t->accumulates) poison(s->bound[i], t->bytes);
  }
}

static void measure(rg_session *s) {
  int64_t saved = high_water(s->current->data, s->plan->sizes.saved);
  int64_t scratch = high_water(s->scratch, s->plan->sizes.scratch);
  if (saved > s->touched_saved) s->touched_saved = saved;
  if (scratch > s->touched_scratch) s->touched_scratch = scratch;
}

rg_status rg_session_forward(rg_session *s, rg_error *e) {
  if (!s) return null_session(e);
  s->current->forwarded = false;
  RGI_TRY(check_bound(s, false, e));
  RGI_TRY(check_contents(s, e));
  memcpy(s->current->at, s->bound, (size_t)s->plan->nbindable * sizeof *s->bound);
  if (s->poison) {
    s->touched_saved = s->touched_scratch = 0;
    poison(s->current->data, s->plan->sizes.saved);
    poison_targets(s, RG_OUTPUT);
  }
  for (int32_t i = 0; i < s->plan->nforward; i++) RGI_TRY(run_step(s, i, e));
  if (s->poison) measure(s);
  s->current->forwarded = true;
  return RG_OK;
}

rg_status rg_session_backward(rg_session *s, rg_error *e) {
  if (!s) return null_session(e);
  bool any = false;
  for (int32_t i = 0; i < s->plan->nbindable; i++) any |= s->plan->bindable[i].info.role == RG_GRAD_OUT;
  if (!any)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan has no gradients, so there is no backward to run");
  if (!s->current->forwarded)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "backward without a forward on the bound saved block before it");
  RGI_TRY(check_bound(s, true, e));
  if (s->poison) poison_targets(s, RG_GRAD_OUT);
  for (int32_t i = s->plan->nforward; i < s->plan->nstep; i++) RGI_TRY(run_step(s, i, e));
  if (s->poison) measure(s);
  return RG_OK;
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
                        .model_ms = step->ms};
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
  const char *src = resolve(s, at);
  if (!src && bytes) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "\"%s\" is not bound", tensor);
  if (bytes) copy_dense(&g->tensor[t], 0, src, dst);
  return RG_OK;
}

rg_status rg_session_touched(const rg_session *s, int64_t *saved, int64_t *scratch) {
  if (!s || !saved || !scratch || !s->poison) return RG_E_USAGE;
  *saved = s->touched_saved;
  *scratch = s->touched_scratch;
  return RG_OK;
}
