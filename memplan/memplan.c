/* memplan/memplan.c: lifetimes of owners, their regions, in-place reuse, and the packing of scratch; see memplan.h. */
#include "memplan.h"
#include "pack.h"
#include <string.h>

/* One direction's scratch. */
typedef struct packing {
  rg_buffer *buffer;
  int32_t *block; /* buffer → block; workspaces: -1 - node */
  int n;
} packing;

typedef struct planner {
  rgi_graph *g; /* the copy that gets regions and addresses */
  const rgi_memory_options *o;
  rgi_memory *m;
  int32_t *first, *last; /* per owner: nodes; -1: never */
  int32_t *block_of;     /* per owner */
  int32_t *heir;         /* per block: the block that takes its bytes over, or -1 */
} planner;

static int64_t round_up(int64_t bytes) { return (bytes + RGI_ALIGN - 1) / RGI_ALIGN * RGI_ALIGN; }

static rg_status too_large(rg_error *e) {
  return rgi_fail(e, RG_E_OVERFLOW, NULL, NULL, "the plan's memory leaves the range of 64-bit integers");
}

static void find_lifetimes(planner *p) {
  const rgi_graph *g = p->g;
  for (int t = 0; t < g->ntensor; t++) p->first[t] = p->last[t] = -1;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int i = 0; i < rgi_nin(node) + rgi_nout(node); i++) {
      int t = i < rgi_nin(node) ? node->in[i] : node->out[i - rgi_nin(node)];
      if (t < 0) continue;
      int owner = rgi_owner(g, t);
      if (p->first[owner] < 0) p->first[owner] = n;
      p->last[owner] = n;
    }
  }
}

static void find_regions(planner *p) {
  rgi_graph *g = p->g;
  for (int t = 0; t < g->ntensor; t++) {
    rgi_tensor *x = &g->tensor[t];
    if (x->base >= 0) continue;
    if (x->producer < 0)
      x->region = RGI_R_INPUT;
    else if (!g->node[p->first[t]].backward && g->node[p->last[t]].backward)
      x->region = RGI_R_SAVED;
    else
      x->region = RGI_R_SCRATCH;
  }
  for (int i = 0; i < g->noutput; i++) g->tensor[rgi_owner(g, g->output[i].tensor)].region = RGI_R_OUTPUT;
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad >= 0) g->tensor[rgi_owner(g, g->input[i].grad)].region = RGI_R_OUTPUT;
}

static bool is_dense(const rgi_tensor *t) {
  int64_t stride = 1;
  for (int d = t->rank - 1; d >= 0; d--) {
    if (t->dim[d].c != 1 && t->stride[d] != stride) return false;
    stride *= t->dim[d].c;
  }
  return true;
}

static bool same_layout(const rgi_tensor *a, const rgi_tensor *b) {
  if (a->dtype != b->dtype || a->rank != b->rank || !is_dense(a) || !is_dense(b)) return false;
  for (int d = 0; d < a->rank; d++)
    if (a->dim[d].c != b->dim[d].c) return false;
  return true;
}

/* May node n's first output take the bytes of its first input? */
static bool in_place(const planner *p, int n) {
  const rgi_graph *g = p->g;
  const rgi_node *node = &g->node[n];
  if (p->o->no_inplace || p->o->no_reuse || !(node->op->flags & RG_OP_INPLACE)) return false;
  int x = rgi_nin(node) ? node->in[0] : -1, y = rgi_nout(node) ? node->out[0] : -1;
  if (x < 0 || y < 0 || g->tensor[x].base >= 0 || g->tensor[y].base >= 0) return false;
  if (g->tensor[x].region != RGI_R_SCRATCH || g->tensor[y].region != RGI_R_SCRATCH) return false;
  if (p->last[x] != n || p->first[y] != n || g->node[p->first[x]].backward != node->backward) return false;
  for (int i = 1; i < rgi_nin(node); i++)
    if (node->in[i] >= 0 && rgi_owner(g, node->in[i]) == x) return false;
  return same_layout(&g->tensor[x], &g->tensor[y]);
}

static rg_status make_blocks(planner *p, rg_error *e) {
  rgi_graph *g = p->g;
  rgi_memory *m = p->m;
  for (int t = 0; t < g->ntensor; t++) {
    p->block_of[t] = -1;
    rgi_region region = g->tensor[t].region;
    if (g->tensor[t].base >= 0 || (region != RGI_R_SAVED && region != RGI_R_SCRATCH)) continue;
    p->block_of[t] = m->nblock;
    m->block[m->nblock++] = (rgi_block){.tensor = t,
                                        .first = p->first[t],
                                        .last = p->last[t],
                                        .region = region,
                                        .size = rgi_bytes(&g->tensor[t]),
                                        .shares = -1};
  }
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  rg_status status = RG_OK;
  for (int n = 0; n < g->nnode && status == RG_OK; n++) {
    m->workspace[n] = -1;
    if (!g->node[n].op->workspace) continue;
    rg_call call;
    status = rgi_node_call(g, n, a, &call, e);
    if (status != RG_OK) break;
    call.threads = p->o->threads > 0 ? p->o->threads : 1;
    size_t size = g->node[n].op->workspace(&call);
    if (size == 0) continue;
    if (size > (size_t)INT64_MAX / 2) {
      status = too_large(e);
      break;
    }
    m->workspace_size[n] = (int64_t)size;
    m->block[m->nblock++] =
        (rgi_block){.tensor = -1, .first = n, .last = n, .region = RGI_R_SCRATCH, .size = (int64_t)size, .shares = -1};
  }
  rgi_arena_destroy(a);
  RGI_TRY(status);
  for (int b = 0; b < m->nblock; b++) p->heir[b] = -1;
  for (int n = 0; n < g->nnode; n++) {
    if (!in_place(p, n)) continue;
    int from = p->block_of[g->node[n].in[0]], to = p->block_of[g->node[n].out[0]];
    m->block[to].shares = from;
    p->heir[from] = to;
    m->inplace_gain += m->block[to].size;
  }
  return RG_OK;
}

static rg_status lay_saved(planner *p, rg_error *e) {
  rgi_memory *m = p->m;
  int64_t at = 0;
  for (int b = 0; b < m->nblock; b++) {
    rgi_block *x = &m->block[b];
    if (x->region != RGI_R_SAVED) continue;
    x->address = at;
    if (!rgi_add(at, x->size, &m->saved) || m->saved > INT64_MAX - RGI_ALIGN) return too_large(e);
    at = round_up(m->saved);
  }
  return RG_OK;
}

static bool backward_block(const planner *p, const rgi_block *b) { return p->g->node[b->first].backward; }

/* Scratch blocks of one direction as intervals; chains of in-place blocks are one interval. */
static rg_status gather(planner *p, bool backward, rgi_arena *a, packing *out, rg_error *e) {
  rgi_memory *m = p->m;
  out->n = 0;
  out->buffer = rgi_alloc_n(a, (size_t)m->nblock, sizeof *out->buffer);
  out->block = rgi_alloc_n(a, (size_t)m->nblock, sizeof *out->block);
  if (!out->buffer || !out->block) return rgi_nomem(e);
  for (int b = 0; b < m->nblock; b++) {
    const rgi_block *x = &m->block[b];
    if (x->region != RGI_R_SCRATCH || x->shares >= 0 || backward_block(p, x) != backward) continue;
    int end = b;
    while (p->heir[end] >= 0) end = p->heir[end];
    out->block[out->n] = b;
    out->buffer[out->n++] = (rg_buffer){.lower = x->first, .upper = m->block[end].last + 1, .size = x->size};
  }
  return RG_OK;
}

/* The most bytes alive at once, counted as they are packed: whole multiples of RGI_ALIGN, but for the topmost. */
static rg_status most_alive(const planner *p, const packing *s, int64_t *out, rg_error *e) {
  *out = 0;
  for (int n = 0; n < p->g->nnode; n++) {
    int64_t alive = 0, padding = 0;
    for (int i = 0; i < s->n; i++) {
      const rg_buffer *b = &s->buffer[i];
      if (b->lower > n || b->upper <= n) continue;
      if (b->size > INT64_MAX - RGI_ALIGN || !rgi_add(alive, round_up(b->size), &alive)) return too_large(e);
      int64_t pad = round_up(b->size) - b->size;
      if (b->size && pad > padding) padding = pad;
    }
    if (alive - padding > *out) *out = alive - padding;
  }
  return RG_OK;
}

typedef struct packed {
  int64_t size, bound, sum;
  bool optimal;
  int64_t explored;
  double seconds;
} packed;

static rg_status pack_direction(planner *p, bool backward, bool bound_only, packed *r, rg_error *e) {
  rgi_memory *m = p->m;
  rgi_arena *a = rgi_arena_create(p->g->ctx);
  if (!a) return rgi_nomem(e);
  packing s;
  rg_status status;
  *r = (packed){.optimal = true};
  RGI_GOTO(status, gather(p, backward, a, &s, e), done);
  RGI_GOTO(status, most_alive(p, &s, &r->bound, e), done);
  int64_t at = 0;
  for (int i = 0; i < s.n; i++) {
    s.buffer[i].offset = at;
    if (!rgi_add(at, s.buffer[i].size, &r->sum) || r->sum > INT64_MAX - RGI_ALIGN) {
      status = too_large(e);
      goto done;
    }
    at = round_up(r->sum);
  }
  r->size = r->sum;
  if (bound_only) goto done;
  if (!p->o->no_reuse && s.n > 0) {
    rg_pack_options options = {.seconds = p->o->seconds / 2, .align = RGI_ALIGN};
    rg_pack_result result;
    RGI_GOTO(status, rgi_pack(p->g->ctx, s.buffer, (size_t)s.n, &options, &result, e), done);
    r->size = result.peak;
    r->optimal = result.optimal;
    r->explored = result.nodes_explored;
    r->seconds = result.seconds;
  }
  for (int i = 0; i < s.n; i++)
    for (int b = s.block[i]; b >= 0; b = p->heir[b]) m->block[b].address = s.buffer[i].offset;
done:
  rgi_arena_destroy(a);
  return status;
}

static rg_status prepare(planner *p, const rgi_graph *g, const rgi_memory_options *o, rg_error *e) {
  if (!g->bound) return rgi_fail(e, RG_E_INTERNAL, NULL, g->name, "memory is planned for bound graphs only");
  RGI_TRY(rgi_graph_clone(g, &p->g, e));
  rgi_arena *a = p->g->arena;
  size_t nt = (size_t)g->ntensor, most = nt + (size_t)g->nnode;
  p->o = o;
  p->m = rgi_alloc(a, sizeof *p->m);
  p->first = rgi_alloc_n(a, nt, sizeof *p->first);
  p->last = rgi_alloc_n(a, nt, sizeof *p->last);
  p->block_of = rgi_alloc_n(a, nt, sizeof *p->block_of);
  p->heir = rgi_alloc_n(a, most, sizeof *p->heir);
  if (!p->m || !p->first || !p->last || !p->block_of || !p->heir) return rgi_nomem(e);
  p->m->block = rgi_alloc_n(a, most, sizeof *p->m->block);
  p->m->workspace = rgi_alloc_n(a, (size_t)g->nnode, sizeof *p->m->workspace);
  p->m->workspace_size = rgi_alloc_n(a, (size_t)g->nnode, sizeof *p->m->workspace_size);
  if (!p->m->block || !p->m->workspace || !p->m->workspace_size) return rgi_nomem(e);
  find_lifetimes(p);
  find_regions(p);
  RGI_TRY(make_blocks(p, e));
  return lay_saved(p, e);
}

rg_status rgi_memplan(const rgi_graph *g, const rgi_memory_options *o, rgi_graph **out, rgi_memory **mem, rg_error *e) {
  planner p = {0};
  packed forward, backward;
  rg_status status;
  *out = NULL;
  *mem = NULL;
  RGI_GOTO(status, prepare(&p, g, o, e), fail);
  RGI_GOTO(status, pack_direction(&p, false, false, &forward, e), fail);
  RGI_GOTO(status, pack_direction(&p, true, false, &backward, e), fail);
  rgi_memory *m = p.m;
  m->forward_scratch = forward.size;
  m->backward_scratch = backward.size;
  m->scratch = forward.size > backward.size ? forward.size : backward.size;
  m->forward_bound = forward.bound;
  m->backward_bound = backward.bound;
  m->forward_optimal = forward.optimal || forward.size == forward.bound;
  m->backward_optimal = backward.optimal || backward.size == backward.bound;
  m->explored = forward.explored + backward.explored;
  m->seconds = forward.seconds + backward.seconds;
  m->no_reuse = forward.sum > backward.sum ? forward.sum : backward.sum;
  for (int b = 0; b < m->nblock; b++) {
    const rgi_block *x = &m->block[b];
    if (x->tensor >= 0)
      p.g->tensor[x->tensor].address = x->address;
    else
      m->workspace[x->first] = x->address;
  }
  *out = p.g;
  *mem = m;
  return RG_OK;
fail:
  rgi_graph_destroy(p.g);
  return status;
}

rg_status rgi_memory_peak(const rgi_graph *g, const rgi_memory_options *o, bool bound_only, int64_t *saved,
                          int64_t *forward, int64_t *backward, rg_error *e) {
  planner p = {0};
  packed f, b;
  rg_status status;
  RGI_GOTO(status, prepare(&p, g, o, e), done);
  RGI_GOTO(status, pack_direction(&p, false, bound_only, &f, e), done);
  RGI_GOTO(status, pack_direction(&p, true, bound_only, &b, e), done);
  *saved = p.m->saved;
  *forward = bound_only && !o->no_reuse ? f.bound : f.size;
  *backward = bound_only && !o->no_reuse ? b.bound : b.size;
done:
  rgi_graph_destroy(p.g);
  return status;
}
