/* cp/parts.c: see parts.h. */
#include "parts.h"
#include <stdio.h>
#include <string.h>

enum { BOTH = RGI_SLOTS };

/* ---- nodes ---- */

int32_t rgi_part_tensor(rgi_parts *p, const char *name, const char *suffix, int32_t seqlens) {
  const char *wanted = rgi_format(p->to->arena, "%s%s", name, suffix);
  const char *free = wanted ? rgi_free_name(p->to, wanted) : NULL;
  const rgi_tensor t = {
      .name = free, .base = -1, .producer = -1, .seqlens = seqlens, .grad_of = -1};
  return free ? rgi_add_tensor(p->to, &t) : -1;
}

rg_status rgi_part_node(rgi_parts *p, const char *name, const rg_op *op, const rg_value *attr,
                        int origin, const int *nin, const int32_t *in, const int *nout,
                        const int32_t *out, rg_error *e) {
  rgi_graph *g = p->to;
  const int n = rgi_add_node(g, name, op, nin, nout, attr);
  if (n < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[n];
  if (rgi_nin(node)) memcpy(node->in, in, (size_t)rgi_nin(node) * sizeof *in);
  memcpy(node->out, out, (size_t)rgi_nout(node) * sizeof *out);
  node->origin = origin;
  node->rank = 0;
  if (p->at >= 0) {
    node->rank = p->from->node[p->at].rank;
    node->group = p->from->node[p->at].group;
  }
  const int from = p->at >= 0 ? p->from->node[p->at].origin : -1;
  return rgi_infer_node(g, n, from >= 0 ? g->origin[from].pointer : NULL, e);
}

/* The node of the pass itself that makes out[0 … nout) on port 0, under the first one's name. */
static rg_status add(rgi_parts *p, const char *op_name, const rg_value *attr, int origin,
                     const int *nin, const int32_t *in, int nout, const int32_t *out, rg_error *e) {
  const rg_op *op = rgi_find_op(p->to->ctx, op_name);
  const char *name = rgi_format(p->to->arena, "%s.%s", p->to->tensor[out[0]].name, op_name);
  if (!name) return rgi_nomem(e);
  return rgi_part_node(p, name, op, attr, origin, nin, in, &nout, out, e);
}

/* A new node of the spec's kind: policies and reports count what communicates by these. */
static rg_status add_origin(rgi_parts *p, const char *name, const char *op, int *out, rg_error *e) {
  rgi_graph *g = p->to;
  const int from = p->at >= 0 ? p->from->node[p->at].origin : -1;
  rgi_origin *more = rgi_alloc_n(g->arena, (size_t)g->norigin + 1, sizeof *more);
  if (!more) return rgi_nomem(e);
  if (g->norigin) memcpy(more, g->origin, (size_t)g->norigin * sizeof *more);
  *out = g->norigin++;
  more[*out] = (rgi_origin){
      .name = name, .op = rgi_find_op(g->ctx, op), .pointer = from >= 0 ? more[from].pointer : ""};
  g->origin = more;
  return RG_OK;
}

static const char *name_of(const rgi_parts *p, int32_t t) {
  return p->to->tensor[t].name;
}

static rg_value number(int64_t i) {
  return (rg_value){.i = i, .set = true};
}

rg_status rgi_part_rows(rgi_parts *p, int32_t t, int64_t first, int64_t n, int32_t seqlens,
                        const char *suffix, int32_t *out, rg_error *e) {
  const rg_value attr[] = {number(0), number(first), number(first + n)};
  *out = rgi_part_tensor(p, name_of(p, t), suffix, seqlens);
  if (*out < 0) return rgi_nomem(e);
  return add(p, "slice", attr, -1, (int[]){1}, &t, 1, out, e);
}

/* ---- tables ---- */

static rg_status add_tables(rgi_parts *p, rg_error *e) {
  static const char *const suffix[] = {".s0", ".s1", ".own"};
  const rg_op *op = rgi_find_op(p->to->ctx, "cp_rows");
  int32_t out[1 + 2 * (RGI_SLOTS + 1)];
  int origin;
  out[0] = p->order = rgi_part_tensor(p, "cp.order", "", -1);
  for (int i = 0; i <= RGI_SLOTS; i++) {
    out[1 + i] = p->starts[i] = rgi_part_tensor(p, name_of(p, p->cu), suffix[i], -1);
    out[2 + RGI_SLOTS + i] = p->pos[i] = rgi_part_tensor(p, "cp.pos", suffix[i], -1);
  }
  for (int i = 0; i < RGI_SLOTS * 2 + 3; i++)
    if (out[i] < 0) return rgi_nomem(e);
  const rg_value attr[] = {number(p->policy->ranks), number(p->rows), number(p->policy->mode)};
  RGI_TRY(add_origin(p, "cp.rows", "cp_rows", &origin, e));
  return rgi_part_node(p, "cp.rows", op, attr, origin, (int[]){1}, &p->cu,
                       (int[]){1, RGI_SLOTS + 1, RGI_SLOTS + 1}, out, e);
}

/* Inputs without tokens that have gradients: every rank has a part of these. */
static rg_status add_sums(rgi_parts *p, rg_error *e) {
  const rg_value attr[] = {number(p->policy->ranks), number(p->policy->wire_bf16)};
  for (int i = 0; i < p->from->ninput; i++) {
    const rgi_io *io = &p->from->input[i];
    rgi_form *f = &p->form[io->tensor];
    if (f->axis != RGI_WHOLE || io->want == RGI_GRAD_NONE) continue;
    p->to->input[i].partial = p->policy->local_weights;
    if (p->policy->local_weights) continue;
    f->self = rgi_part_tensor(p, name_of(p, io->tensor), ".shared", -1);
    if (f->self < 0) return rgi_nomem(e);
    RGI_TRY(add(p, "shared_weight", attr, -1, (int[]){1}, &io->tensor, 1, &f->self, e));
  }
  return RG_OK;
}

rg_status rgi_parts_begin(rgi_parts *p, rg_error *e) {
  const size_t nodes = (size_t)p->from->nnode + 1;
  p->at = -1;
  p->blocks = rgi_alloc_n(p->to->arena, nodes, sizeof *p->blocks);
  p->keys = rgi_alloc_n(p->to->arena, nodes, sizeof *p->keys);
  p->halo = rgi_alloc_n(p->to->arena, 2 * nodes, sizeof *p->halo); /* of k and of v */
  if (!p->blocks || !p->halo || !p->keys) return rgi_nomem(e);
  RGI_TRY(add_tables(p, e));
  return add_sums(p, e);
}

rgi_reach rgi_part_reach(const rgi_node *n) {
  const int64_t kernel = n->attr[rgi_attribute(n->op, "kernel")].i,
                stride = n->attr[rgi_attribute(n->op, "stride")].i;
  return n->op->rules && n->op->rules->block_ends ? (rgi_reach){kernel - stride, stride - 1, stride}
                                                  : (rgi_reach){0, kernel - 1, stride};
}

rg_status rgi_part_blocks(rgi_parts *p, rgi_reach r, int slot, int32_t *out, rg_error *e) {
  for (int i = 0; i < p->nblocks; i++)
    if (p->blocks[i].a == r.left && p->blocks[i].b == r.right && p->blocks[i].c == r.stride) {
      *out = p->blocks[i].slot[slot];
      return RG_OK;
    }
  rgi_asked *b = &p->blocks[p->nblocks++];
  *b = (rgi_asked){.a = r.left, .b = r.right, .c = r.stride};
  for (int s = 0; s < RGI_SLOTS; s++) {
    char suffix[48];
    snprintf(suffix, sizeof suffix, ".s%d", s);
    b->slot[s] = rgi_part_tensor(p, "cp.blocks", suffix, -1);
    if (b->slot[s] < 0) return rgi_nomem(e);
  }
  const rg_value attr[] = {number(p->policy->ranks), number(p->rows), number(r.left),
                           number(r.right), number(r.stride)};
  const int32_t in[] = {p->cu, p->order};
  *out = b->slot[slot];
  return add(p, "cp_blocks", attr, -1, (int[]){1, 1}, in, RGI_SLOTS, b->slot, e);
}

/* ---- forms ---- */

static const rgi_node *maker(const rgi_parts *p, int32_t t) {
  const int n = p->from->tensor[t].producer;
  return n < 0 ? NULL : &p->from->node[n];
}
static bool is_view(const rgi_node *n) {
  return n && n->op->flags & RG_OP_VIEW;
}
/* Several tensors seen as one: the parts of a head split. */
static bool is_join(const rgi_node *n) {
  return is_view(n) && rgi_nin(n) > 1;
}

static bool slotted(const rgi_parts *p, int32_t t) {
  const rgi_node *n = maker(p, t);
  if (!is_join(n)) return p->form[t].slotted;
  for (int i = 0; i < rgi_nin(n); i++)
    if (!slotted(p, n->in[i])) return false;
  return true;
}

/* Lengths of rows of t in a slot, or in both. */
static int32_t lengths(const rgi_parts *p, int32_t t, int slot) {
  return p->form[t].axis == RGI_TOKENS ? p->starts[slot] : -1;
}

/* The view that made t, in the form `slot` (BOTH: own); of all that it made. */
static rg_status look(rgi_parts *p, int32_t t, int slot, rg_error *e) {
  const rgi_node *n = maker(p, t);
  const rgi_node view = *n;
  rgi_graph *g = p->to;
  int32_t *in = rgi_alloc_n(g->arena, (size_t)rgi_nin(&view) + 1, sizeof *in);
  int32_t *out = rgi_alloc_n(g->arena, (size_t)rgi_nout(&view) + 1, sizeof *out);
  if (!in || !out) return rgi_nomem(e);
  for (int i = 0; i < rgi_nin(&view); i++)
    RGI_TRY(slot == BOTH ? rgi_part_own(p, view.in[i], &in[i], e)
                         : rgi_part_slot(p, view.in[i], slot, &in[i], e));
  char suffix[16];
  snprintf(suffix, sizeof suffix, ".s%d", slot);
  for (int i = 0; i < rgi_nout(&view); i++) {
    const int32_t y = view.out[i];
    out[i] = slot == BOTH ? y : rgi_part_tensor(p, name_of(p, y), suffix, lengths(p, y, slot));
    if (out[i] < 0) return rgi_nomem(e);
    if (slot == BOTH)
      p->form[y].made = true;
    else
      p->form[y].slot[slot] = out[i];
  }
  const char *name = slot == BOTH ? view.name : rgi_format(g->arena, "%s%s", view.name, suffix);
  if (!name) return rgi_nomem(e);
  const int nin[] = {rgi_nin(&view)}, nout[] = {rgi_nout(&view)};
  const int at = p->at;
  p->at = (int)(n - p->from->node);
  rg_status status = rgi_part_node(p, name, view.op, view.attr, view.origin, nin, in, nout, out, e);
  for (int i = 0; i < rgi_nout(&view) && status == RG_OK; i++)
    g->node[g->nnode - 1].kind = view.kind;
  p->at = at;
  return status;
}

/* May x's bytes stand inside another tensor? */
static bool may_move(const rgi_graph *g, int32_t x) {
  if (g->tensor[x].base >= 0 || g->tensor[x].producer < 0) return false;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base == x) return false;
  return true;
}

/* own := both slots, end to end. */
static rg_status assemble(rgi_parts *p, int32_t t, rg_error *e) {
  int32_t part[RGI_SLOTS];
  for (int s = 0; s < RGI_SLOTS; s++) {
    RGI_TRY(rgi_part_slot(p, t, s, &part[s], e));
    if (may_move(p->to, part[s])) continue;
    const int32_t in[] = {part[s], lengths(p, t, s)};
    part[s] = rgi_part_tensor(p, name_of(p, part[s]), ".copy", in[1]);
    if (part[s] < 0) return rgi_nomem(e);
    RGI_TRY(add(p, "cast", NULL, -1, (int[]){1, in[1] >= 0}, in, 1, &part[s], e));
  }
  const rg_value axis = number(0);
  p->form[t].made = true;
  return add(p, "join", &axis, -1, (int[]){RGI_SLOTS}, part, 1, &t, e);
}

rg_status rgi_part_own(rgi_parts *p, int32_t t, int32_t *out, rg_error *e) {
  const rgi_form *f = &p->form[t];
  *out = f->axis == RGI_WHOLE ? f->self : t;
  if (f->made) return RG_OK;
  if (slotted(p, t)) return assemble(p, t, e);
  if (is_view(maker(p, t))) {
    RGI_TRY(look(p, t, BOTH, e));
    return RG_OK;
  }
  return rgi_fail(e, RG_E_INTERNAL, NULL, name_of(p, t), "a rank has no form of it");
}

/* Is t an input whose gradient is wanted, or a view of one? */
static bool is_weight(const rgi_parts *p, int32_t t) {
  while (is_view(maker(p, t)) && !is_join(maker(p, t))) t = maker(p, t)->in[0];
  for (int i = 0; i < p->from->ninput; i++)
    if (p->from->input[i].tensor == t) return p->from->input[i].want != RGI_GRAD_NONE;
  return false;
}

/* t itself or, of a view, the same view of its input itself: past what sums over the ranks. */
static rg_status bare(rgi_parts *p, int32_t t, int32_t *out, rg_error *e) {
  const rgi_node *n = maker(p, t);
  *out = t;
  if (!n) return RG_OK;
  const rgi_node view = *n;
  rgi_graph *g = p->to;
  int32_t in, *made = rgi_alloc_n(g->arena, (size_t)rgi_nout(&view) + 1, sizeof *made);
  if (!made) return rgi_nomem(e);
  RGI_TRY(bare(p, view.in[0], &in, e));
  for (int i = 0; i < rgi_nout(&view); i++) {
    made[i] = rgi_part_tensor(p, name_of(p, view.out[i]), ".bare", -1);
    if (made[i] < 0) return rgi_nomem(e);
    if (view.out[i] == t) *out = made[i];
  }
  const char *name = rgi_format(g->arena, "%s.bare", view.name);
  if (!name) return rgi_nomem(e);
  const int nin[] = {1}, nout[] = {rgi_nout(&view)};
  RGI_TRY(rgi_part_node(p, name, view.op, view.attr, view.origin, nin, &in, nout, made, e));
  g->node[g->nnode - 1].kind = view.kind;
  return RG_OK;
}

rg_status rgi_part_pair(rgi_parts *p, int32_t t, int32_t *out, rg_error *e) {
  rgi_form *f = &p->form[t];
  if (f->axis != RGI_WHOLE || !is_weight(p, t)) return rgi_part_own(p, t, out, e);
  if (f->pair < 0) {
    const rg_value attr[] = {number(p->policy->ranks), number(p->policy->local_weights)};
    int32_t x;
    RGI_TRY(bare(p, t, &x, e));
    f->pair = rgi_part_tensor(p, name_of(p, t), ".pair", -1);
    if (f->pair < 0) return rgi_nomem(e);
    RGI_TRY(add(p, "pair", attr, -1, (int[]){1}, &x, 1, &f->pair, e));
  }
  *out = f->pair;
  return RG_OK;
}

rg_status rgi_part_slot(rgi_parts *p, int32_t t, int slot, int32_t *out, rg_error *e) {
  rgi_form *f = &p->form[t];
  if (f->axis == RGI_WHOLE) return rgi_part_own(p, t, out, e);
  if (f->slot[slot] < 0 && is_view(maker(p, t))) {
    RGI_TRY(look(p, t, slot, e));
  } else if (f->slot[slot] < 0) {
    char suffix[16];
    int32_t own;
    RGI_TRY(rgi_part_own(p, t, &own, e));
    const int64_t n = p->to->tensor[own].dim[0].c / RGI_SLOTS;
    snprintf(suffix, sizeof suffix, ".s%d", slot);
    RGI_TRY(rgi_part_rows(p, own, slot * n, n, lengths(p, t, slot), suffix, &f->slot[slot], e));
  }
  *out = f->slot[slot];
  return RG_OK;
}

rg_status rgi_part_all(rgi_parts *p, int32_t t, int32_t *out, rg_error *e) {
  rgi_form *f = &p->form[t];
  if (f->axis == RGI_WHOLE) return rgi_part_own(p, t, out, e);
  if (f->all < 0) {
    int32_t in[] = {-1, p->order, lengths(p, t, BOTH)};
    int origin;
    RGI_TRY(rgi_part_own(p, t, &in[0], e));
    const char *name = rgi_format(p->to->arena, "%s.gather", name_of(p, t));
    f->all = rgi_part_tensor(p, name_of(p, t), ".all", f->axis == RGI_TOKENS ? p->cu : -1);
    if (!name || f->all < 0) return rgi_nomem(e);
    RGI_TRY(add_origin(p, name, "all_gather", &origin, e));
    const rg_value attr[] = {number(p->policy->ranks), number(p->policy->wire_bf16)};
    RGI_TRY(rgi_part_node(p, name, rgi_find_op(p->to->ctx, "all_gather"), attr, origin,
                          (int[]){1, 1, in[2] >= 0}, in, (int[]){1}, &f->all, e));
  }
  *out = f->all;
  return RG_OK;
}

rg_status rgi_part_halo(rgi_parts *p, int32_t t, int64_t left, int64_t right, int slot,
                        int32_t *out, rg_error *e) {
  bool again = false;
  for (int i = 0; i < p->nhalo; i++) {
    const rgi_asked *h = &p->halo[i];
    again = again || h->tensor == t;
    if (h->tensor != t || h->a != left || h->b != right) continue;
    *out = h->slot[slot];
    return RG_OK;
  }
  int32_t in[] = {-1, p->order, p->starts[BOTH]};
  int origin;
  RGI_TRY(rgi_part_own(p, t, &in[0], e));
  rgi_asked *h = &p->halo[p->nhalo++];
  *h = (rgi_asked){.tensor = t, .a = left, .b = right};
  for (int s = 0; s < RGI_SLOTS; s++) {
    char suffix[32];
    snprintf(suffix, sizeof suffix, ".halo%d", s);
    h->slot[s] = rgi_part_tensor(p, name_of(p, t), suffix, -1);
    if (h->slot[s] < 0) return rgi_nomem(e);
  }
  rgi_arena *a = p->to->arena;
  const char *name =
      again ? rgi_format(a, "%s.halo.%lld.%lld", name_of(p, t), (long long)left, (long long)right)
            : rgi_format(a, "%s.halo", name_of(p, t));
  if (!name) return rgi_nomem(e);
  RGI_TRY(add_origin(p, name, "halo", &origin, e));
  const rg_value attr[] = {number(p->policy->ranks), number(left), number(right)};
  *out = h->slot[slot];
  return rgi_part_node(p, name, rgi_find_op(p->to->ctx, "halo"), attr, origin, (int[]){1, 1, 1}, in,
                       (int[]){RGI_SLOTS}, h->slot, e);
}

rg_status rgi_part_keys(rgi_parts *p, rgi_window w, int slot, int32_t *starts, int32_t *pos,
                        rg_error *e) {
  rgi_asked *k = NULL;
  for (int i = 0; i < p->nkeys && !k; i++)
    if (p->keys[i].a == w.left && p->keys[i].b == w.tile) k = &p->keys[i];
  if (!k) {
    int32_t out[2 * RGI_SLOTS];
    const int32_t in[] = {p->cu, p->order};
    k = &p->keys[p->nkeys++];
    *k = (rgi_asked){.a = w.left, .b = w.tile};
    for (int s = 0; s < RGI_SLOTS; s++) {
      char suffix[32];
      snprintf(suffix, sizeof suffix, ".s%d", s);
      out[s] = k->slot[s] = rgi_part_tensor(p, "cp.keys", suffix, -1);
      out[RGI_SLOTS + s] = k->pos[s] = rgi_part_tensor(p, "cp.keys.pos", suffix, -1);
      if (k->slot[s] < 0 || k->pos[s] < 0) return rgi_nomem(e);
    }
    const rg_value attr[] = {number(p->policy->ranks), number(p->rows), number(w.left),
                             number(w.tile)};
    const char *name = rgi_format(p->to->arena, "%s.cp_window", name_of(p, out[0]));
    if (!name) return rgi_nomem(e);
    RGI_TRY(rgi_part_node(p, name, rgi_find_op(p->to->ctx, "cp_window"), attr, -1, (int[]){1, 1},
                          in, (int[]){RGI_SLOTS, RGI_SLOTS}, out, e));
  }
  *starts = k->slot[slot];
  *pos = k->pos[slot];
  return RG_OK;
}
