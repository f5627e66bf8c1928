/* memplan/memplan.c: who owns bytes, for how long, in which region; then the addresses.

       saved     |a|  b  |c|                 laid end to end: all of it lives at the turn
       scratch   forward blocks, packed      time is the node; both directions start at 0 of the
                 backward blocks, packed     same scratch
       host      |d| e |                     end to end, in a block that is not the device's

   Views and joins move no bytes, so they neither begin nor end a life. An owner lives from the
   first node that writes any of its aliases to the last one that reads any. Owners joined by
   in-place reuse are packed as one buffer.
 */
#include "memplan.h"
#include "../graph/order.h"
#include "pack.h"
#include <string.h>

/* What the packer may do for both directions where no time is given: about 2 s of a core. */
static const int64_t WORK = INT64_C(2000000000);

typedef struct planner {
  const rgi_graph *g;
  const rgi_memory_options *o;
  rgi_arena *arena;
  int32_t nforward;      /* nodes before the turn */
  int32_t *first, *last; /* per owner, -1: no node touches it */
  bool *saved;           /* per owner: written before the turn, read after it */
  rgi_region *region;    /* per owner */
  int32_t *block_of;     /* per owner, or -1 */
  bool enough;           /* stop at the first packing within the capacity */
  rgi_memory *m;
} planner;

static bool moves_bytes(const rgi_node *n) {
  return !(n->op->flags & RG_OP_VIEW);
}

/* ---- lifetimes and regions ---- */

static void touch(planner *p, int32_t tensor, int32_t node) {
  if (tensor < 0) return;
  int owner = rgi_owner(p->g, tensor);
  if (p->first[owner] < 0) p->first[owner] = node;
  p->last[owner] = node;
  if (p->g->node[node].backward && !p->g->node[p->first[owner]].backward) p->saved[owner] = true;
}

static rg_status find_lifetimes(planner *p, rg_error *e) {
  const rgi_graph *g = p->g;
  size_t n = (size_t)g->ntensor;
  p->first = rgi_alloc_n(p->arena, n, sizeof *p->first);
  p->last = rgi_alloc_n(p->arena, n, sizeof *p->last);
  p->saved = rgi_alloc_n(p->arena, n, sizeof *p->saved);
  p->block_of = rgi_alloc_n(p->arena, n, sizeof *p->block_of);
  p->region = rgi_alloc_n(p->arena, n, sizeof *p->region);
  if (!p->first || !p->last || !p->saved || !p->block_of || !p->region) return rgi_nomem(e);
  for (size_t i = 0; i < n; i++) p->first[i] = p->last[i] = p->block_of[i] = -1;
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *node = &g->node[k];
    if (!node->backward) p->nforward = k + 1;
    if (!moves_bytes(node)) continue;
    for (int i = 0; i < rgi_nin(node); i++) touch(p, node->in[i], k);
    for (int i = 0; i < rgi_nout(node); i++) touch(p, node->out[i], k);
  }
  return RG_OK;
}

/* The caller's memory: inputs, then what must end up in outputs and gradients. */
static rg_status find_regions(planner *p, rg_error *e) {
  const rgi_graph *g = p->g;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base < 0)
      p->region[t] = g->tensor[t].producer < 0 ? RGI_R_INPUT
                     : g->tensor[t].host       ? RGI_R_HOST
                     : p->saved[t]             ? RGI_R_SAVED
                                               : RGI_R_SCRATCH;
  for (int32_t i = 0; i < g->noutput + g->ninput; i++) {
    const rgi_io *io = i < g->noutput ? &g->output[i] : &g->input[i - g->noutput];
    int32_t tensor = i < g->noutput ? io->tensor : io->want == RGI_GRAD_NONE ? -1 : io->grad;
    if (tensor < 0) continue;
    int owner = rgi_owner(g, tensor);
    bool accumulates = i >= g->noutput && io->want == RGI_GRAD_ACCUMULATE;
    if (p->region[owner] == RGI_R_INPUT && !accumulates)
      return rgi_fail(e, RG_E_INTERNAL, NULL, NULL,
                      "\"%s\" would have to be written into \"%s\", which is an input",
                      g->tensor[tensor].name, g->tensor[owner].name);
    p->region[owner] = RGI_R_OUTPUT;
  }
  return RG_OK;
}

/* ---- blocks ---- */

static rg_status add_block(planner *p, rgi_block block) { /* room was made for all */
  block.shares = -1;
  if (block.tensor >= 0) p->block_of[block.tensor] = p->m->nblock;
  p->m->block[p->m->nblock++] = block;
  return RG_OK;
}

rg_status rgi_memory_workspaces(const rgi_graph *g, const rgi_memory_options *o, int64_t *size,
                                rg_error *e) {
  rg_status status = RG_OK;
  rgi_arena *scratch = rgi_arena_create(g->ctx);
  if (!scratch) return rgi_nomem(e);
  for (int32_t k = 0; k < g->nnode; k++) {
    size[k] = 0;
    if (!g->node[k].op->workspace || !moves_bytes(&g->node[k])) continue;
    rg_call call;
    RGI_GOTO(status, rgi_node_call(g, k, scratch, &call, e), done);
    call.threads = o->threads > 0 ? o->threads : 1;
    call.gpu = o->gpu;
    size_t bytes = g->node[k].op->workspace(&call);
    if (bytes > INT64_MAX / 4) {
      status = rgi_fail(e, RG_E_OVERFLOW, NULL, g->node[k].name,
                        "a workspace of %zu bytes is too large", bytes);
      goto done;
    }
    size[k] = (int64_t)bytes;
  }
done:
  rgi_arena_destroy(scratch);
  return status;
}

static rg_status make_blocks(planner *p, rg_error *e) {
  const rgi_graph *g = p->g;
  rgi_memory *m = p->m;
  m->workspace = rgi_alloc_n(p->arena, (size_t)g->nnode + 1, sizeof *m->workspace);
  m->workspace_size = rgi_alloc_n(p->arena, (size_t)g->nnode + 1, sizeof *m->workspace_size);
  m->block = rgi_alloc_n(p->arena, (size_t)g->nnode + (size_t)g->ntensor + 1, sizeof *m->block);
  if (!m->workspace || !m->workspace_size || !m->block) return rgi_nomem(e);
  for (int32_t k = 0; k < g->nnode; k++) m->workspace[k] = -1;
  RGI_TRY(rgi_memory_workspaces(g, p->o, m->workspace_size, e));
  for (int32_t t = 0; t < g->ntensor; t++) {
    const rgi_tensor *x = &g->tensor[t];
    if (x->base >= 0 || p->region[t] < RGI_R_SAVED) continue;
    if (p->first[t] < 0) continue; /* only views of it, which nobody reads */
    add_block(p, (rgi_block){t, p->first[t], p->last[t], p->region[t], rgi_bytes(x), 0, -1});
  }
  for (int32_t k = 0; k < g->nnode; k++)
    if (m->workspace_size[k] > 0)
      add_block(p, (rgi_block){-1, k, k, RGI_R_SCRATCH, m->workspace_size[k], 0, -1});
  return RG_OK;
}

/* ---- in place ---- */

static bool dense(const rgi_tensor *x) {
  rgi_tensor d = *x;
  rgi_dense_strides(&d);
  for (int32_t i = 0; i < x->rank; i++)
    if (x->dim[i].c > 1 && x->stride[i] != d.stride[i]) return false;
  return true;
}

bool rgi_memory_alike(const rgi_graph *g, int32_t k) {
  const rgi_node *node = &g->node[k];
  if (!(node->op->flags & RG_OP_INPLACE) || !rgi_nin(node) || !rgi_nout(node)) return false;
  int32_t in = node->in[0], out = node->out[0];
  if (in < 0 || out < 0 || g->tensor[out].base >= 0) return false;
  const rgi_tensor *a = &g->tensor[in], *b = &g->tensor[out];
  if (a->dtype != b->dtype || a->offset != 0 || rgi_bytes(a) != rgi_bytes(b) || !dense(a) ||
      !dense(b))
    return false;
  int32_t owner = rgi_owner(g, in);
  for (int i = 1; i < rgi_nin(node); i++)
    if (node->in[i] >= 0 && rgi_owner(g, node->in[i]) == owner) return false;
  for (int i = 1; i < rgi_nout(node); i++)
    if (node->out[i] >= 0 && rgi_owner(g, node->out[i]) == owner) return false;
  return true;
}

/* The block whose bytes node k's first output may take over, or -1. */
static int32_t reusable(const planner *p, int32_t k) {
  const rgi_graph *g = p->g;
  if (!rgi_memory_alike(g, k)) return -1;
  int32_t owner = rgi_owner(g, g->node[k].in[0]), out = g->node[k].out[0];
  int32_t from = p->block_of[owner], to = p->block_of[out];
  if (from < 0 || to < 0 || p->m->block[from].region != RGI_R_SCRATCH ||
      p->m->block[to].region != RGI_R_SCRATCH)
    return -1;
  if (p->last[owner] != k || p->first[out] != k || p->m->block[from].size < p->m->block[to].size)
    return -1;
  return from;
}

static void share_in_place(planner *p) {
  for (int32_t k = 0; k < p->g->nnode; k++) {
    int32_t from = reusable(p, k);
    if (from < 0) continue;
    rgi_block *to = &p->m->block[p->block_of[p->g->node[k].out[0]]];
    to->shares = from;
    p->m->inplace_gain += to->size;
  }
}

/* ---- addresses ---- */

static rg_status total_overflow(rg_error *e) {
  return rgi_fail(e, RG_E_OVERFLOW, NULL, NULL, "the plan's bytes add up to more than 64 bits");
}

/* End to end from *end; blocks that share bytes follow their first. */
static rg_status lay(planner *p, rgi_region region, int backward, int64_t *end, rg_error *e) {
  rgi_memory *m = p->m;
  for (int32_t i = 0; i < m->nblock; i++) {
    rgi_block *b = &m->block[i];
    if (b->region != region || (backward >= 0 && (b->first >= p->nforward) != backward)) continue;
    if (*end > INT64_MAX / 4 || b->size > INT64_MAX / 4) return total_overflow(e);
    b->address = rgi_aligned(*end);
    if (b->size > 0) *end = b->address + b->size;
  }
  return RG_OK;
}

typedef struct packing {
  rg_buffer *buffer;
  int32_t *of; /* per block: its buffer, or -1 */
  size_t n;
} packing;

/* One buffer per chain of in-place blocks of a direction. */
static rg_status gather(const planner *p, bool backward, rgi_arena *a, packing *out, rg_error *e) {
  const rgi_memory *m = p->m;
  out->n = 0;
  out->buffer = rgi_alloc_n(a, (size_t)m->nblock + 1, sizeof *out->buffer);
  out->of = rgi_alloc_n(a, (size_t)m->nblock + 1, sizeof *out->of);
  if (!out->buffer || !out->of) return rgi_nomem(e);
  for (int32_t i = 0; i < m->nblock; i++) out->of[i] = -1;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->region != RGI_R_SCRATCH || b->shares >= 0 || (b->first >= p->nforward) != backward)
      continue;
    out->of[i] = (int32_t)out->n;
    out->buffer[out->n++] = (rg_buffer){b->first, b->last + 1, b->size, 0};
  }
  /* A block's heirs begin when it ends; a few passes over short chains find them all. */
  for (bool again = true; again;) {
    again = false;
    for (int32_t i = 0; i < m->nblock; i++) {
      const rgi_block *b = &m->block[i];
      if (b->shares < 0 || out->of[i] >= 0 || out->of[b->shares] < 0) continue;
      out->of[i] = out->of[b->shares];
      rg_buffer *x = &out->buffer[out->of[i]];
      if (b->last + 1 > x->upper) x->upper = b->last + 1;
      again = true;
    }
  }
  return RG_OK;
}

/* Where branches may run side by side, a buffer is taken from the first node that need not be over
 * before all its users to the last one that need not wait for them. */
static rg_status widen(const planner *p, bool backward, rgi_arena *a, packing *q, rg_error *e) {
  const rgi_graph *g = p->g;
  rgi_order order;
  RGI_TRY(rgi_order_find(g, a, &order, e));
  const size_t words = (size_t)order.words;
  uint64_t *users = rgi_alloc_n(a, q->n * words + 1, sizeof *users);
  if (!users) return rgi_nomem(e);
  const int32_t from = backward ? p->nforward : 0, to = backward ? g->nnode : p->nforward;
  for (int32_t k = from; k < to; k++) {
    const rgi_node *node = &g->node[k];
    for (int32_t i = 0; i < rgi_nin(node) + rgi_nout(node); i++) {
      int32_t t = i < rgi_nin(node) ? node->in[i] : node->out[i - rgi_nin(node)];
      int32_t block = t < 0 ? -1 : p->block_of[rgi_owner(g, t)];
      if (block >= 0 && q->of[block] >= 0) rgi_put(users + (size_t)q->of[block] * words, k);
    }
  }
  for (int32_t i = 0; i < p->m->nblock; i++)
    if (p->m->block[i].tensor < 0 && q->of[i] >= 0)
      rgi_put(users + (size_t)q->of[i] * words, p->m->block[i].first);
  /* the nodes that are over before all users */
  uint64_t *over = rgi_alloc_n(a, words, sizeof *over);
  int32_t *user = rgi_alloc_n(a, (size_t)g->nnode + 1, sizeof *user);
  if (!over || !user) return rgi_nomem(e);
  for (size_t b = 0; b < q->n; b++) {
    rg_buffer *x = &q->buffer[b];
    int32_t n = 0;
    for (int32_t u = from; u < to; u++)
      if (rgi_has(users + b * words, u)) user[n++] = u;
    for (size_t w = 0; w < words; w++) {
      over[w] = UINT64_MAX;
      for (int32_t i = 0; i < n; i++) over[w] &= rgi_before(&order, user[i])[w];
    }
    for (int32_t k = from; k < to; k++) {
      bool waits = !rgi_has(over, k);
      for (int32_t i = 0; i < n && waits; i++) waits = rgi_has(rgi_before(&order, k), user[i]);
      if (waits || rgi_has(over, k)) continue;
      if (k < x->lower) x->lower = k;
      if (k + 1 > x->upper) x->upper = k + 1;
    }
  }
  return RG_OK;
}

/* Most bytes alive at one node. The topmost block needs no rounding. */
static rg_status most_alive(const planner *p, const packing *q, rgi_arena *a, int64_t *out,
                            rg_error *e) {
  int64_t *sum = rgi_alloc_n(a, (size_t)p->g->nnode + 1, sizeof *sum);
  int64_t *pad = rgi_alloc_n(a, (size_t)p->g->nnode + 1, sizeof *pad);
  if (!sum || !pad) return rgi_nomem(e);
  *out = 0;
  for (size_t i = 0; i < q->n; i++) {
    const rg_buffer *b = &q->buffer[i];
    if (b->size > INT64_MAX / 4) return total_overflow(e);
    int64_t size = rgi_aligned(b->size);
    if (b->size == 0) continue;
    for (int64_t k = b->lower; k < b->upper; k++) {
      if (!rgi_add(sum[k], size, &sum[k])) return total_overflow(e);
      if (size - b->size > pad[k]) pad[k] = size - b->size;
    }
  }
  for (int32_t k = 0; k < p->g->nnode; k++)
    if (sum[k] - pad[k] > *out) *out = sum[k] - pad[k];
  return RG_OK;
}

static rg_status pack_direction(planner *p, bool backward, bool bound_only, double seconds,
                                int64_t *work, rg_error *e) {
  rgi_memory *m = p->m;
  packing q;
  int64_t bound, size = 0;
  bool optimal = false;
  rg_status status;
  rgi_arena *a = rgi_arena_create(p->g->ctx);
  if (!a) return rgi_nomem(e);
  RGI_GOTO(status, gather(p, backward, a, &q, e), done);
  if (p->o->lanes) RGI_GOTO(status, widen(p, backward, a, &q, e), done);
  RGI_GOTO(status, most_alive(p, &q, a, &bound, e), done);
  if (!bound_only && !p->o->no_reuse) {
    rg_pack_options options = {.seconds = seconds, .align = RGI_ALIGN};
    rg_pack_result result;
    const bool by_work = p->o->seconds <= 0;
    int64_t again = *work;
    const int64_t room = p->o->capacity - p->o->comm - m->saved; /* may well be no room at all */
    if (p->enough && room > 0) options.capacity = room;
    RGI_GOTO(status,
             rgi_pack(p->g->ctx, q.buffer, q.n, &options, by_work ? work : NULL, &result, e), done);
    if (!p->enough && room > 0 && result.peak > room) {
      options.capacity = room;
      RGI_GOTO(status,
               rgi_pack(p->g->ctx, q.buffer, q.n, &options, by_work ? &again : NULL, &result, e),
               done);
    }
    size = result.peak;
    optimal = result.optimal;
    m->explored += result.nodes_explored;
    m->seconds += result.seconds;
    for (int32_t i = 0; i < m->nblock; i++)
      if (q.of[i] >= 0) m->block[i].address = q.buffer[q.of[i]].offset;
  }
  *(backward ? &m->backward_bound : &m->forward_bound) = bound;
  *(backward ? &m->backward_scratch : &m->forward_scratch) = size;
  *(backward ? &m->backward_optimal : &m->forward_optimal) = optimal;
done:
  rgi_arena_destroy(a);
  return status;
}

static rg_status plan(planner *p, bool bound_only, rg_error *e) {
  rgi_memory *m = p->m;
  if (!p->g->bound)
    return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "memory planned before all extents are known");
  RGI_TRY(find_lifetimes(p, e));
  RGI_TRY(find_regions(p, e));
  RGI_TRY(make_blocks(p, e));
  m->saved = m->reserved = p->o->reserved;
  RGI_TRY(lay(p, RGI_R_SAVED, -1, &m->saved, e));
  RGI_TRY(lay(p, RGI_R_HOST, -1, &m->host, e));
  int64_t forward = 0, both = 0;
  RGI_TRY(lay(p, RGI_R_SCRATCH, 0, &forward, e));
  both = forward;
  RGI_TRY(lay(p, RGI_R_SCRATCH, 1, &both, e));
  m->no_reuse = both;
  if (!p->o->no_reuse && !p->o->no_inplace) share_in_place(p);
  const double seconds = p->o->seconds;
  const int64_t share = WORK / 2 / (p->o->part > 1 ? p->o->part : 1);
  int64_t work = share;
  RGI_TRY(pack_direction(p, false, bound_only, seconds / 2, &work, e));
  work += share;
  RGI_TRY(pack_direction(p, true, bound_only, seconds - m->seconds, &work, e));
  if (p->o->taken) *p->o->taken += 2 * share - work;
  if (p->o->no_reuse) {
    m->forward_scratch = forward;
    m->backward_scratch = both > forward ? both : 0;
  }
  m->scratch = m->forward_scratch > m->backward_scratch ? m->forward_scratch : m->backward_scratch;
  return RG_OK;
}

/* ---- entry ---- */

rg_status rgi_memplan(const rgi_graph *g, const rgi_memory_options *o, rgi_graph **out,
                      rgi_memory **mem, rg_error *e) {
  *out = NULL;
  *mem = NULL;
  rgi_graph *copy;
  RGI_TRY(rgi_graph_clone(g, &copy, e));
  planner p = {
      .g = copy, .o = o, .arena = copy->arena, .m = rgi_alloc(copy->arena, sizeof(rgi_memory))};
  rg_status status = p.m ? plan(&p, false, e) : rgi_nomem(e);
  if (status != RG_OK) {
    rgi_graph_destroy(copy);
    return status;
  }
  for (int32_t t = 0; t < copy->ntensor; t++) {
    if (copy->tensor[t].base >= 0) continue;
    copy->tensor[t].region = p.region[t];
    copy->tensor[t].address = p.block_of[t] >= 0 ? p.m->block[p.block_of[t]].address : 0;
  }
  for (int32_t i = 0; i < p.m->nblock; i++)
    if (p.m->block[i].tensor < 0) p.m->workspace[p.m->block[i].first] = p.m->block[i].address;
  *out = copy;
  *mem = p.m;
  return RG_OK;
}

rg_status rgi_memory_peak(const rgi_graph *g, const rgi_memory_options *o, bool bound_only,
                          int64_t *saved, int64_t *forward, int64_t *backward, rg_error *e) {
  rgi_memory m = {0};
  rgi_arena *arena = rgi_arena_create(g->ctx);
  if (!arena) return rgi_nomem(e);
  planner p = {.g = g, .o = o, .arena = arena, .enough = o->capacity > 0, .m = &m};
  rg_status status = plan(&p, bound_only, e);
  rgi_arena_destroy(arena);
  if (status != RG_OK) return status;
  *saved = m.saved;
  *forward = bound_only && !o->no_reuse ? m.forward_bound : m.forward_scratch;
  *backward = bound_only && !o->no_reuse ? m.backward_bound : m.backward_scratch;
  return RG_OK;
}
