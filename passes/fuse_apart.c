/* passes/fuse_apart.c: takes one node apart into parts and a rest; see fuse.h.

   A part goes directly before the first reader of its gradient, or of what the rest makes (d.w), if
   that comes earlier; the rest goes after the last part. Where nodes may run side by side, memory
   is shared only by nodes of which one waits for the other: a part is then told to wait for the
   reader before it. Readers that do not wait for each other anyhow stay as they are.
 */
#include "fuser.h"
#include <stdio.h>
#include <string.h>

typedef struct part {
  int32_t d;                /* the gradient it writes, or -1 */
  int32_t taker;            /* node that takes its delta, or -1 */
  rgi_delta order;          /* … in this order */
  int delta_port, out_port; /* of the taker */
  int32_t place;            /* goes before this node */
  int32_t after;            /* tensor of the taker before it, or -1 */
} part;

/* Would the only reader of p->d, gradient of `of`, take a delta? Sets taker, order and ports. */
static rg_status find_taker(const rgi_fuser *f, int32_t n, int32_t of, part *p, rg_error *e) {
  const rgi_graph *g = f->g;
  int count;
  int32_t k = rgi_fuse_readers(g, n, p->d, &count);
  if (count != 1 || k == g->nnode || g->tensor[p->d].base >= 0) return RG_OK;
  const rgi_node *node = &g->node[k];
  const rgi_fusing *fusing = rgi_fusing_of(node->op);
  if (!fusing || !fusing->delta) return RG_OK;
  for (int q = 0; q < node->op->nin; q++) {
    char name[64];
    if (strncmp(node->op->in[q].name, "grad.", 5) != 0 || rgi_in(node, q) != p->d) continue;
    snprintf(name, sizeof name, "out.%s", node->op->in[q].name + 5);
    const int out = rgi_in_port(node->op, name);
    snprintf(name, sizeof name, "delta.%s", node->op->in[q].name + 5);
    const int delta = rgi_in_port(node->op, name);
    if (out < 0 || delta < 0 || rgi_in(node, out) != of || rgi_in(node, delta) >= 0) continue;
    rg_call call;
    RGI_TRY(rgi_node_call(g, k, f->scratch, &call, e));
    call.gpu = f->gpu;
    p->order = fusing->delta(&call);
    if (p->order == RGI_DELTA_NONE) continue;
    p->taker = k;
    p->out_port = out;
    p->delta_port = delta;
  }
  return RG_OK;
}

/* A tensor of fp32 rows; -1 on NOMEM. */
static int add_rows(rgi_fuser *f, const char *kind, int32_t of) {
  rgi_graph *g = f->to;
  const char *name = rgi_format(g->arena, "%s.%s", kind, g->tensor[of].name);
  name = name ? rgi_free_name(g, name) : NULL;
  if (!name) return -1;
  rgi_tensor t = {.name = name,
                  .dtype = RG_F32,
                  .base = -1,
                  .producer = -1,
                  .seqlens = g->tensor[of].seqlens,
                  .grad_of = -1};
  return rgi_add_tensor(g, &t);
}

/* Part k of node n. */
static rg_status add_part(rgi_fuser *f, int32_t n, const rg_op *op, int k, const part *p,
                          int32_t product, int32_t delta, rg_error *e) {
  const rgi_node *old = &f->g->node[n];
  int32_t in[RGI_FUSE_PORTS], out[RGI_FUSE_PORTS];
  int nin[RGI_FUSE_PORTS], nout[RGI_FUSE_PORTS], ins = 0, outs = 0;
  rg_value attr[RGI_FUSE_ATTRS];
  char suffix[16];
  for (int q = 0; q < op->nin; q++) {
    in[ins] = rgi_fuse_in(old, op->in[q].name, k);
    nin[q] = in[ins] >= 0;
    ins += nin[q];
  }
  for (int q = 0; q < op->nout; q++) {
    const char *name = op->out[q].name;
    out[outs] = strcmp(name, "product") == 0 ? product : strcmp(name, "delta") == 0 ? delta : p->d;
    nout[q] = out[outs] >= 0;
    outs += nout[q];
  }
  memcpy(attr, old->attr, (size_t)old->op->nattr * sizeof *attr);
  attr[old->op->nattr] = (rg_value){.i = k, .set = true};
  attr[old->op->nattr + 1] = (rg_value){.i = p->order, .set = true};
  snprintf(suffix, sizeof suffix, "%d", k);
  return rgi_fuse_add(f, n, suffix, op, attr, in, nin, out, nout, p->place, p->after, e);
}

/* The node that makes the other outputs of the products. */
static rg_status add_rest(rgi_fuser *f, int32_t n, const rg_op *op, const int32_t *product,
                          int count, int32_t place, rg_error *e) {
  const rgi_node *old = &f->g->node[n];
  int32_t *in = rgi_alloc_n(f->scratch, (size_t)count + RGI_FUSE_PORTS, sizeof *in),
          out[RGI_FUSE_PORTS];
  int nin[RGI_FUSE_PORTS], nout[RGI_FUSE_PORTS], ins = 0, outs = 0;
  if (!in) return rgi_nomem(e);
  for (int q = 0; q < op->nin; q++) {
    const bool products = strcmp(op->in[q].name, "product") == 0;
    if (products)
      memcpy(in + ins, product, (size_t)count * sizeof *in);
    else
      in[ins] = rgi_fuse_in(old, op->in[q].name, 0);
    nin[q] = products ? count : in[ins] >= 0;
    ins += nin[q];
  }
  for (int q = 0; q < op->nout; q++) {
    out[outs] = rgi_fuse_out(old, op->out[q].name, 0);
    nout[q] = out[outs] >= 0;
    outs += nout[q];
  }
  return rgi_fuse_add(f, n, "rest", op, old->attr, in, nin, out, nout, place, -1, e);
}

/* With lanes: lines the takers up, each part after the taker before. False: some of them need not
 * wait for each other, or a part is needed (with the rest, which others read) before the taker that
 * it would wait for. */
static bool line_up(const rgi_fuser *f, part *part_of, int count) {
  const part *before = NULL;
  for (int32_t n = 0; n < f->g->nnode && f->lanes; n++)
    for (int k = 0; k < count; k++) {
      part *p = &part_of[k];
      if (p->taker != n) continue;
      if (before &&
          (!rgi_has(rgi_before(&f->order, n), before->taker) || p->place <= before->taker))
        return false;
      if (before) {
        const rgi_node *node = &f->g->node[before->taker];
        for (int i = rgi_nout(node) - 1; i >= 0; i--)
          if (node->out[i] >= 0) p->after = node->out[i];
      }
      before = p;
    }
  return true;
}

/* Is any output wanted but those of the list? *first: their first reader. */
static bool wants_rest(const rgi_graph *g, int32_t n, int list_out, int32_t *first) {
  const rgi_node *node = &g->node[n];
  bool any = false;
  *first = g->nnode;
  for (int q = 0; q < node->op->nout; q++)
    for (int i = node->out_begin[q]; i < node->out_begin[q + 1]; i++) {
      if (q == list_out || node->out[i] < 0) continue;
      int count;
      int32_t k = rgi_fuse_readers(g, n, node->out[i], &count);
      any = true;
      if (k < *first) *first = k;
    }
  return any;
}

/* The entry for node n, new or that of another group that fared alike. */
static rg_status note(rgi_fuser *f, int32_t n, int parts, int deltas, const char *why,
                      rgi_fusion **out, rg_error *e) {
  rgi_fusions *r = f->report;
  const rgi_node *node = &f->g->node[n];
  for (int i = 0; i < r->count; i++) {
    *out = &r->at[i];
    if (node->origin >= 0 && (*out)->origin == node->origin && (*out)->why == why &&
        (*out)->parts == parts && (*out)->deltas == deltas) {
      (*out)->nodes++;
      return RG_OK;
    }
  }
  *out = &r->at[r->count++];
  const char *name = node->origin >= 0 ? f->g->origin[node->origin].name : node->name;
  **out = (rgi_fusion){.name = rgi_strdup(r->arena, name),
                       .origin = node->origin,
                       .nodes = 1,
                       .parts = parts,
                       .deltas = deltas,
                       .why = why};
  return (*out)->name ? RG_OK : rgi_nomem(e);
}

rg_status rgi_fuse_apart(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *node = &g->node[n];
  const rg_op *op = rgi_find_op(g->ctx, fusing->part), *rest = rgi_find_op(g->ctx, fusing->rest);
  char d_name[64];
  snprintf(d_name, sizeof d_name, "d.%s", fusing->list);
  const int list = rgi_in_port(node->op, fusing->list), d_list = rgi_out_port(node->op, d_name);
  if (!op || !rest || list < 0 || d_list < 0 || op->nin > RGI_FUSE_PORTS ||
      op->nout > RGI_FUSE_PORTS || rest->nin > RGI_FUSE_PORTS || rest->nout > RGI_FUSE_PORTS ||
      op->nattr != node->op->nattr + 2 || op->nattr > RGI_FUSE_ATTRS)
    return rgi_fail(e, RG_E_INTERNAL, NULL, node->name, "%s and %s do not fit each other",
                    node->op->name, fusing->part);
  const int count = node->in_begin[list + 1] - node->in_begin[list];
  int32_t first, last = -1;
  const bool others = wants_rest(g, n, d_list, &first);
  part *part_of = rgi_alloc_n(f->scratch, (size_t)count, sizeof *part_of);
  int32_t *product = rgi_alloc_n(f->scratch, (size_t)count, sizeof *product);
  if (!part_of || !product) return rgi_nomem(e);
  int parts = 0, deltas = 0;
  rgi_fusion *report;
  for (int k = 0; k < count; k++) {
    part *p = &part_of[k];
    int times;
    *p = (part){.d = rgi_fuse_out(node, d_name, k),
                .taker = -1,
                .order = RGI_DELTA_CHAIN,
                .place = first,
                .after = -1};
    if (p->d >= 0) {
      const int32_t reader = rgi_fuse_readers(g, n, p->d, &times);
      if (reader < p->place) p->place = reader;
      RGI_TRY(find_taker(f, n, node->in[node->in_begin[list] + k], p, e));
    }
    parts += p->d >= 0 || others;
    deltas += p->taker >= 0;
  }
  static const char NONE[] = "no reader of its gradients takes a sum over them",
                    FEW[] = "its parts would read more than the sums spare",
                    APART[] = "readers of its gradients may run side by side";
  const char *why = deltas == 0                   ? NONE
                    : 2 * deltas < parts          ? FEW
                    : !line_up(f, part_of, count) ? APART
                                                  : NULL;
  RGI_TRY(note(f, n, parts, deltas, why, &report, e));
  if (why) return RG_OK;
  RGI_TRY(rgi_fuse_bytes(f, g, n, &report->before, e));
  const int32_t from = f->to->nnode;
  for (int k = 0; k < count; k++) {
    part *p = &part_of[k];
    const int32_t of = node->in[node->in_begin[list] + k];
    product[k] = -1;
    if (p->d < 0 && !others) continue;
    if (others && (product[k] = add_rows(f, "product", of)) < 0) return rgi_nomem(e);
    int32_t delta = -1;
    if (p->taker >= 0) {
      if ((delta = add_rows(f, "delta", of)) < 0) return rgi_nomem(e);
      RGI_TRY(rgi_fuse_bytes(f, g, p->taker, &report->before, e));
      /* off the tensor that it no longer reads */
      RGI_TRY(rgi_fuse_move(f, p->taker, p->out_port, p->delta_port, delta, e));
    }
    RGI_TRY(add_part(f, n, op, k, p, product[k], delta, e));
    if (p->place > last) last = p->place;
    if (p->taker >= 0) RGI_TRY(rgi_fuse_bytes(f, f->to, p->taker, &report->after, e));
  }
  if (others) RGI_TRY(add_rest(f, n, rest, product, count, last, e));
  for (int32_t m = from; m < f->to->nnode; m++)
    RGI_TRY(rgi_fuse_bytes(f, f->to, m, &report->after, e));
  f->gone[n] = true;
  f->report->fused++;
  return RG_OK;
}
