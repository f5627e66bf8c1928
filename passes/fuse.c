/* passes/fuse.c: see fuse.h.

   Works on a copy: nodes are appended, then laid into the old order. Nodes are taken apart or
   joined first, then casts taken over. A part goes directly before the first reader of its
   gradient, or of what the rest makes (d.w), if that comes earlier; the rest goes after the last
   part. Where nodes may run side by side, memory is shared only by nodes of which one waits for the
   other: a part is then told to wait for the reader before it. Readers that do not wait for each
   other anyhow stay as they are.
 */
#include "fuse.h"
#include "../graph/order.h"
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

typedef struct fuser {
  const rgi_graph *g;
  rgi_graph *to;
  const rg_gpu *gpu;
  bool lanes, split_kv;
  bool again; /* nodes that are joint already are joined, nothing else */
  int joints;
  /* per node of `to`: the node of `g` that it goes before (rank among equals: age) */
  int32_t *before;
  int32_t capacity;
  bool *gone;      /* per node of g */
  rgi_order order; /* of g, with lanes */
  rgi_arena *scratch;
  rgi_fusions *report;
} fuser;

/* ---- looking ---- */

/* First node after n that reads t; *count: how often t is read, outputs of the graph included. */
static int32_t readers(const rgi_graph *g, int32_t n, int32_t t, int *count) {
  int32_t first = g->nnode;
  *count = 0;
  for (int32_t k = g->nnode - 1; k > n; k--)
    for (int i = 0; i < rgi_nin(&g->node[k]); i++)
      if (g->node[k].in[i] == t) first = k, ++*count;
  for (int i = 0; i < g->ninput; i++) *count += g->input[i].grad == t;
  return first;
}

static const rgi_fusing *fusing_of(const rg_op *op) {
  return op->rules ? op->rules->fusing : NULL;
}

/* Would the only reader of p->d, gradient of `of`, take a delta? Sets taker, order and ports. */
static rg_status find_taker(const fuser *f, int32_t n, int32_t of, part *p, rg_error *e) {
  const rgi_graph *g = f->g;
  int count;
  int32_t k = readers(g, n, p->d, &count);
  if (count != 1 || k == g->nnode || g->tensor[p->d].base >= 0) return RG_OK;
  const rgi_node *node = &g->node[k];
  const rgi_fusing *fusing = fusing_of(node->op);
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

static rg_status bytes_of(const fuser *f, const rgi_graph *g, int32_t n, double *sum, rg_error *e) {
  rg_call call;
  rg_cost cost = {0};
  RGI_TRY(rgi_node_call(g, n, f->scratch, &call, e));
  if (g->node[n].op->cost) g->node[n].op->cost(&call, &cost);
  *sum += cost.bytes;
  return RG_OK;
}

/* ---- building ---- */

/* A tensor of fp32 rows; -1 on NOMEM. */
static int add_rows(fuser *f, const char *kind, int32_t of) {
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

/* Appends a node of `op`, its ports filled by `fill`-ed arrays, to stand before node `place`
 * of g. */
static rg_status add_node(fuser *f, int32_t like, const char *suffix, const rg_op *op,
                          const rg_value *attr, const int32_t *in, const int *nin,
                          const int32_t *out, const int *nout, int32_t place, int32_t after,
                          rg_error *e) {
  rgi_graph *g = f->to;
  const rgi_node *old = &f->g->node[like];
  char *name = rgi_format(g->arena, "%s.%s", old->name, suffix);
  int m = name ? rgi_add_node(g, name, op, nin, nout, attr) : -1;
  if (m < 0) return rgi_nomem(e);
  rgi_node *node = &g->node[m];
  memcpy(node->in, in, (size_t)rgi_nin(node) * sizeof *in);
  memcpy(node->out, out, (size_t)rgi_nout(node) * sizeof *out);
  node->origin = old->origin;
  node->group = old->group;
  node->rank = old->rank;
  node->backward = old->backward;
  node->kind = old->kind;
  node->after = after;
  f->before[m] = place;
  return rgi_infer_node(g, m, NULL, e);
}

enum { MOST_PORTS = 16, MOST_ATTRS = 16 };

/* The tensor on the port of this name, element k of a list, else -1. */
static int32_t in_named(const rgi_node *n, const char *name, int k) {
  const int p = rgi_in_port(n->op, name);
  if (p < 0) return -1;
  if (!(n->op->in[p].flags & RG_PORT_LIST)) k = 0;
  return n->in_begin[p] + k < n->in_begin[p + 1] ? n->in[n->in_begin[p] + k] : -1;
}
static int32_t out_named(const rgi_node *n, const char *name, int k) {
  const int p = rgi_out_port(n->op, name);
  if (p < 0) return -1;
  return n->out_begin[p] + k < n->out_begin[p + 1] ? n->out[n->out_begin[p] + k] : -1;
}

/* Part k of node n. */
static rg_status add_part(fuser *f, int32_t n, const rg_op *op, int k, const part *p,
                          int32_t product, int32_t delta, rg_error *e) {
  const rgi_node *old = &f->g->node[n];
  int32_t in[MOST_PORTS], out[MOST_PORTS];
  int nin[MOST_PORTS], nout[MOST_PORTS], ins = 0, outs = 0;
  rg_value attr[MOST_ATTRS];
  char suffix[16];
  for (int q = 0; q < op->nin; q++) {
    in[ins] = in_named(old, op->in[q].name, k);
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
  return add_node(f, n, suffix, op, attr, in, nin, out, nout, p->place, p->after, e);
}

/* The node that makes the other outputs of the products. */
static rg_status add_rest(fuser *f, int32_t n, const rg_op *op, const int32_t *product, int count,
                          int32_t place, rg_error *e) {
  const rgi_node *old = &f->g->node[n];
  int32_t *in = rgi_alloc_n(f->scratch, (size_t)count + MOST_PORTS, sizeof *in), out[MOST_PORTS];
  int nin[MOST_PORTS], nout[MOST_PORTS], ins = 0, outs = 0;
  if (!in) return rgi_nomem(e);
  for (int q = 0; q < op->nin; q++) {
    const bool products = strcmp(op->in[q].name, "product") == 0;
    if (products)
      memcpy(in + ins, product, (size_t)count * sizeof *in);
    else
      in[ins] = in_named(old, op->in[q].name, 0);
    nin[q] = products ? count : in[ins] >= 0;
    ins += nin[q];
  }
  for (int q = 0; q < op->nout; q++) {
    out[outs] = out_named(old, op->out[q].name, 0);
    nout[q] = out[outs] >= 0;
    outs += nout[q];
  }
  return add_node(f, n, "rest", op, old->attr, in, nin, out, nout, place, -1, e);
}

/* ---- one node ---- */

/* With lanes: lines the takers up, each part after the taker before. False: some of them need not
 * wait for each other, or a part is needed (with the rest, which others read) before the taker that
 * it would wait for. */
static bool line_up(const fuser *f, part *part_of, int count) {
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
      int32_t k = readers(g, n, node->out[i], &count);
      any = true;
      if (k < *first) *first = k;
    }
  return any;
}

/* The entry for node n, new or that of another group that fared alike. */
static rg_status note(fuser *f, int32_t n, int parts, int deltas, const char *why, rgi_fusion **out,
                      rg_error *e) {
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

/* Node n of `to` reads t on port `on`, and nothing on port `off` any more. */
static rg_status move_input(fuser *f, int32_t n, int off, int on, int32_t t, rg_error *e) {
  rgi_node *node = &f->to->node[n];
  int32_t *in = rgi_alloc_n(f->to->arena, (size_t)rgi_nin(node) + 1, sizeof *in);
  int32_t *begin = rgi_alloc_n(f->to->arena, (size_t)node->op->nin + 1, sizeof *begin);
  if (!in || !begin) return rgi_nomem(e);
  int32_t at = 0;
  for (int q = 0; q < node->op->nin; q++) {
    begin[q] = at;
    if (q == off) continue;
    if (q == on) in[at++] = t;
    for (int i = node->in_begin[q]; i < node->in_begin[q + 1] && q != on; i++)
      in[at++] = node->in[i];
  }
  begin[node->op->nin] = at;
  node->in = in;
  node->in_begin = begin;
  return RG_OK;
}

static rg_status take_apart(fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *node = &g->node[n];
  const rg_op *op = rgi_find_op(g->ctx, fusing->part), *rest = rgi_find_op(g->ctx, fusing->rest);
  char d_name[64];
  snprintf(d_name, sizeof d_name, "d.%s", fusing->list);
  const int list = rgi_in_port(node->op, fusing->list), d_list = rgi_out_port(node->op, d_name);
  if (!op || !rest || list < 0 || d_list < 0 || op->nin > MOST_PORTS || op->nout > MOST_PORTS ||
      rest->nin > MOST_PORTS || rest->nout > MOST_PORTS || op->nattr != node->op->nattr + 2 ||
      op->nattr > MOST_ATTRS)
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
    *p = (part){.d = out_named(node, d_name, k),
                .taker = -1,
                .order = RGI_DELTA_CHAIN,
                .place = first,
                .after = -1};
    if (p->d >= 0) {
      const int32_t reader = readers(g, n, p->d, &times);
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
  RGI_TRY(bytes_of(f, g, n, &report->before, e));
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
      RGI_TRY(bytes_of(f, g, p->taker, &report->before, e));
      /* off the tensor that it no longer reads */
      RGI_TRY(move_input(f, p->taker, p->out_port, p->delta_port, delta, e));
    }
    RGI_TRY(add_part(f, n, op, k, p, product[k], delta, e));
    if (p->place > last) last = p->place;
    if (p->taker >= 0) RGI_TRY(bytes_of(f, f->to, p->taker, &report->after, e));
  }
  if (others) RGI_TRY(add_rest(f, n, rest, product, count, last, e));
  for (int32_t m = from; m < f->to->nnode; m++) RGI_TRY(bytes_of(f, f->to, m, &report->after, e));
  f->gone[n] = true;
  f->report->fused++;
  return RG_OK;
}

/* ---- casts ---- */

/* The port NAME of an in-port "sum.NAME", else NULL. */
static const char *summed(const rg_port *port) {
  return strncmp(port->name, "sum.", 4) == 0 ? port->name + 4 : NULL;
}

static int named_port(const rgi_node *n, const char *kind, const char *name) {
  char text[64];
  snprintf(text, sizeof text, "%s.%s", kind, name);
  return strcmp(kind, "d") == 0 ? rgi_out_port(n->op, text) : rgi_in_port(n->op, text);
}

static bool callers(const rgi_graph *g, int32_t t) {
  for (int i = 0; i < g->ninput; i++)
    if (g->input[i].grad == t) return g->tensor[t].base < 0;
  return false;
}

/* Cast c of a sum whose last term node n adds in place: n takes it over. */
static rg_status take_cast(fuser *f, int32_t c, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *cast = &g->node[c];
  if (strcmp(cast->op->name, "cast") != 0 || !cast->backward) return RG_OK;
  const int32_t sum = rgi_in(cast, 0), to = cast->out[0], n = g->tensor[sum].producer;
  int count;
  readers(g, n < 0 ? 0 : n, sum, &count);
  if (n < 0 || count != 1 || to < 0 || !callers(g, to) || g->tensor[to].dtype == RG_F32)
    return RG_OK;
  const rgi_node *old = &g->node[n];
  const rgi_fusing *fusing = fusing_of(old->op);
  if (!fusing || !fusing->rounds) return RG_OK;
  for (int q = 0; q < old->op->nin; q++) {
    const char *name = summed(&old->op->in[q]);
    if (!name) continue;
    const int acc = named_port(old, "acc", name), d = named_port(old, "d", name);
    if (acc < 0 || d < 0 || rgi_in(old, acc) < 0 || rgi_out(old, d) != sum) continue;
    rg_call call;
    RGI_TRY(rgi_node_call(g, n, f->scratch, &call, e));
    call.gpu = f->gpu;
    if (!fusing->rounds(&call)) continue;
    RGI_TRY(bytes_of(f, g, n, &f->report->cast_before, e));
    RGI_TRY(bytes_of(f, g, c, &f->report->cast_before, e));
    RGI_TRY(move_input(f, n, acc, q, rgi_in(old, acc), e));
    rgi_node *node = &f->to->node[n];
    node->out[node->out_begin[d]] = to;
    for (int32_t m = 0; m < f->to->nnode; m++)
      if (f->to->node[m].after == sum) f->to->node[m].after = to;
    f->gone[c] = true;
    f->report->casts++;
    RGI_TRY(rgi_infer_node(f->to, n, NULL, e));
    return bytes_of(f, f->to, n, &f->report->cast_after, e);
  }
  return RG_OK;
}

/* ---- two nodes of one kernel ---- */

/* The value that the attribute of this name has for node n, or NULL. */
static const rg_value *attr_named(const rgi_node *n, const char *name) {
  const int i = rgi_attribute(n->op, name);
  return i < 0 ? NULL : &n->attr[i];
}
static bool same_value(const rg_value *a, const rg_value *b) {
  return a->i == b->i && !(a->f < b->f) && !(a->f > b->f);
}

/* Nodes that one of `joined` is to stand for, and what it has. */
enum { MOST_JOINED = 3 };
typedef struct joint {
  const rg_op *joined;
  const char *link, *list;
  int count;
  const rgi_node *of[MOST_JOINED];
  int32_t rest[MOST_PORTS]; /* of a list on `link` */
  int nrest, first, second, own;
  bool split_kv;
  int32_t in[MOST_PORTS], out[MOST_PORTS];
  int nin[MOST_PORTS], nout[MOST_PORTS];
  rg_value attr[MOST_ATTRS];
} joint;

/* Does the first node make t for another, n? */
static bool handed_on(const joint *j, const rgi_node *n, int32_t t) {
  const rgi_node *first = j->of[0];
  bool any = false;
  for (int i = 0; n != first && t >= 0 && i < rgi_nout(first); i++) any = any || first->out[i] == t;
  return any;
}

/* Is all that node n has on ports and in attributes among those of `joined`, or the default? */
static bool covers(const joint *j, const rgi_node *n) {
  for (int q = 0; q < n->op->nin; q++) {
    const char *name = n->op->in[q].name;
    const bool known = rgi_in_port(j->joined, name) >= 0 || strcmp(name, j->link) == 0;
    if (!known && rgi_in(n, q) >= 0 && !handed_on(j, n, rgi_in(n, q))) return false;
  }
  for (int i = 0; i < n->op->nattr; i++) {
    const rg_attr *own = &n->op->attrs[i];
    const rg_value usual = {.i = (int64_t)own->def, .f = own->def};
    const bool number = own->type == RG_ATTR_FLOAT;
    if (rgi_attribute(j->joined, own->name) >= 0) continue;
    if (number ? n->attr[i].f < usual.f || n->attr[i].f > usual.f : n->attr[i].i != usual.i)
      return false;
  }
  return true;
}

/* "first.NAME" is the first node's NAME; of the others NAME is then. */
enum { FIRST = 6 };
static bool of_first(const char *name) {
  return strncmp(name, "first.", FIRST) == 0;
}
static int from_node(const joint *j, const char *name) {
  char own[64];
  snprintf(own, sizeof own, "first.%s", name);
  return rgi_in_port(j->joined, own) >= 0 || rgi_out_port(j->joined, own) >= 0;
}

/* The tensor on the nodes' ports of this name; false: they have others. */
static bool common_input(const joint *j, const char *name, int32_t *t) {
  bool any = false;
  *t = of_first(name) ? in_named(j->of[0], name + FIRST, 0) : -1;
  if (of_first(name)) return true;
  for (int k = from_node(j, name); k < j->count; k++) {
    if (rgi_in_port(j->of[k]->op, name) < 0) continue;
    const int32_t x = in_named(j->of[k], name, 0);
    if (handed_on(j, j->of[k], x)) continue;
    if (any && x != *t) return false;
    any = true;
    *t = x;
  }
  return true;
}
static bool common_attr(const joint *j, const char *name, rg_value *value) {
  const rg_value *found = NULL;
  for (int k = 0; k < j->count; k++) {
    const rg_value *x = attr_named(j->of[k], name);
    if (x && found && !same_value(x, found)) return false;
    if (x) found = x;
  }
  if (found)
    *value = *found;
  else if (j->count == MOST_JOINED && strcmp(name, "first") == 0)
    *value = (rg_value){.i = j->first, .set = true};
  else if (j->count == MOST_JOINED && strcmp(name, "second") == 0)
    *value = (rg_value){.i = j->second, .set = true};
  else if (j->list && strcmp(name, "own") == 0)
    *value = (rg_value){.i = j->own, .set = true};
  else if (strcmp(name, "split_kv") == 0)
    *value = (rg_value){.i = j->split_kv, .set = true};
  else
    return false;
  return true;
}

/* Do ports and attributes of `joined` say all that the nodes do, and the same of all? Fills in what
 * its node is to have. */
static bool merge(joint *j) {
  int ins = 0, outs = 0;
  for (int q = 0; q < j->joined->nin; q++) {
    const char *name = j->joined->in[q].name;
    if (j->joined->in[q].flags & RG_PORT_LIST) {
      if (ins + j->nrest > MOST_PORTS) return false;
      memcpy(j->in + ins, j->rest, (size_t)j->nrest * sizeof *j->in);
      j->nin[q] = j->nrest;
    } else {
      if (ins == MOST_PORTS || !common_input(j, name, &j->in[ins])) return false;
      j->nin[q] = j->in[ins] >= 0;
    }
    ins += j->nin[q];
  }
  for (int k = 0; k < j->count; k++)
    if (!covers(j, j->of[k])) return false;
  for (int i = 0; i < j->joined->nattr; i++)
    if (!common_attr(j, j->joined->attrs[i].name, &j->attr[i])) return false;
  for (int q = 0; q < j->joined->nout; q++) {
    const char *name = j->joined->out[q].name;
    j->out[outs] = of_first(name) ? out_named(j->of[0], name + FIRST, 0) : -1;
    /* the last node's, where several have one of this name */
    for (int k = j->count - 1; k >= from_node(j, name) && j->out[outs] < 0 && !of_first(name); k--)
      j->out[outs] = out_named(j->of[k], name, 0);
    j->nout[q] = j->out[outs] >= 0;
    outs += j->nout[q];
  }
  return true;
}

static rg_status fitting(const fuser *f, const rgi_node *n, const rgi_fusing *fusing, joint *j,
                         rg_error *e) {
  const rg_op *joined = rgi_find_op(f->g->ctx, fusing->joined);
  *j = (joint){.joined = joined,
               .link = fusing->link,
               .list = fusing->list,
               .own = -1,
               .split_kv = f->split_kv};
  if (joined && joined->nin <= MOST_PORTS && joined->nout <= MOST_PORTS &&
      joined->nattr <= MOST_ATTRS)
    return RG_OK;
  return rgi_fail(e, RG_E_INTERNAL, NULL, n->name, "%s and %s do not fit each other", n->op->name,
                  fusing->joined);
}

/* `like`: the node whose place and name the new one has, and the other part of that name. */
static rg_status put_joint(fuser *f, joint *j, int32_t like, const char *suffix, rg_error *e) {
  for (int k = 0; k < j->count; k++) f->gone[j->of[k] - f->g->node] = true;
  f->report->fused++;
  f->report->split += j->split_kv && rgi_attribute(j->joined, "split_kv") >= 0;
  f->joints++;
  return add_node(f, like, suffix, j->joined, j->attr, j->in, j->nin, j->out, j->nout, like, -1, e);
}

/* Does node n read state of which there is a next version? It can't be put off then. */
static bool overtaken(const rgi_graph *g, int32_t n) {
  bool any = false;
  for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
    const int v = g->node[n].in[i] < 0 ? -1 : rgi_version(g, g->node[n].in[i], NULL);
    any = any || (v >= 0 && rgi_next_version(g, v, NULL) >= 0);
  }
  return any;
}

/* The list of node n without what node m makes, and where that was. False: m can't be put off until
 * n, or makes several elements. */
static bool put_off(const rgi_graph *g, int32_t m, int32_t n, joint *j) {
  const rgi_node *a = &g->node[m], *b = &g->node[n];
  const int port = rgi_in_port(b->op, j->list);
  int count;
  if (overtaken(g, m)) return false;
  for (int i = 0; i < rgi_nout(a); i++)
    if (a->out[i] >= 0 && readers(g, m, a->out[i], &count) < n) return false;
  for (int i = b->in_begin[port]; i < b->in_begin[port + 1]; i++) {
    if (g->tensor[b->in[i]].producer != m) {
      if (j->nrest == MOST_PORTS) return false;
      j->rest[j->nrest++] = b->in[i];
    } else {
      if (j->own >= 0) return false;
      j->own = i - b->in_begin[port];
    }
  }
  return true;
}

/* May node n come as early as m? What it reads must be there, and nobody in between read state that
 * it overwrites. */
static bool comes_early(const rgi_graph *g, int32_t m, int32_t n) {
  const rgi_node *b = &g->node[n];
  int count;
  for (int i = 0; i < rgi_nin(b); i++) {
    const int32_t x = b->in[i];
    if (x < 0) continue;
    if (g->tensor[x].producer > m) return false;
    const int v = rgi_version(g, x, NULL);
    if (v >= 0 && rgi_next_version(g, v, NULL) >= 0 && readers(g, m, x, &count) < n) return false;
  }
  return true;
}

static rg_status join(fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *b = &g->node[n];
  const int port = rgi_in_port(b->op, fusing->link);
  const int32_t t = port < 0 ? -1 : rgi_in(b, port), m = t < 0 ? -1 : g->tensor[t].producer;
  joint j;
  if (!f->gpu || m < 0 || strcmp(g->node[m].op->name, fusing->with) != 0 || f->gone[m])
    return RG_OK;
  RGI_TRY(fitting(f, b, fusing, &j, e));
  j.of[j.count++] = &g->node[m];
  j.of[j.count++] = b;
  if (j.list ? !put_off(g, m, n, &j) : !comes_early(g, m, n)) return RG_OK;
  if (!merge(&j)) return RG_OK;
  rg_call first, call;
  RGI_TRY(rgi_node_call(g, m, f->scratch, &first, e));
  RGI_TRY(rgi_node_call(g, n, f->scratch, &call, e));
  first.gpu = call.gpu = f->gpu;
  if (!fusing->joins(&first, &call, f->split_kv)) return RG_OK;
  return j.list ? put_joint(f, &j, n, j.of[0]->name, e) : put_joint(f, &j, m, b->name, e);
}

/* The node of op `op` that makes t for node n, and nothing for anybody else; or -1. */
static int32_t made_for(const fuser *f, int32_t t, const char *op) {
  const rgi_graph *g = f->g;
  const int32_t m = t < 0 || g->tensor[t].base >= 0 ? -1 : g->tensor[t].producer;
  if (m < 0 || f->gone[m] || strcmp(g->node[m].op->name, op) != 0) return -1;
  int all = 0;
  for (int i = 0; i < rgi_nout(&g->node[m]); i++) {
    const int32_t x = g->node[m].out[i];
    int count = 0;
    if (x >= 0) readers(g, m, x, &count);
    for (int k = 0; k < g->noutput && x >= 0; k++) count += g->output[k].tensor == x;
    for (int k = 0; k < g->ntensor && x >= 0; k++) count += g->tensor[k].base == x;
    all += count;
  }
  return all == 1 ? m : -1;
}

static rg_status join_list(fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
  const rgi_graph *g = f->g;
  const rgi_node *c = &g->node[n];
  const int port = rgi_in_port(c->op, fusing->link);
  int32_t first = -1, second = -1;
  joint j;
  if (!f->gpu) return RG_OK;
  RGI_TRY(fitting(f, c, fusing, &j, e));
  for (int i = c->in_begin[port]; i < c->in_begin[port + 1]; i++) {
    const int32_t a = made_for(f, c->in[i], fusing->with),
                  b = made_for(f, c->in[i], fusing->and_with);
    if (a >= 0 && first < 0)
      first = a, j.first = i - c->in_begin[port];
    else if (b >= 0 && second < 0)
      second = b, j.second = i - c->in_begin[port];
    else if (j.nrest < MOST_PORTS)
      j.rest[j.nrest++] = c->in[i];
    else
      return RG_OK;
  }
  if (first < 0 || second < 0 || overtaken(g, first) || overtaken(g, second)) return RG_OK;
  j.of[j.count++] = &g->node[first];
  j.of[j.count++] = &g->node[second];
  j.of[j.count++] = c;
  if (!merge(&j)) return RG_OK;
  rg_call call[MOST_JOINED];
  for (int k = 0; k < j.count; k++) {
    RGI_TRY(rgi_node_call(g, (int)(j.of[k] - g->node), f->scratch, &call[k], e));
    call[k].gpu = f->gpu;
  }
  return fusing->joins_both(&call[0], &call[1], &call[2], f->split_kv)
             ? put_joint(f, &j, n, j.of[0]->name, e)
             : RG_OK;
}

/* ---- the pass ---- */

/* Lays the new nodes into the old order. */
static rg_status reorder(fuser *f, rg_error *e) {
  rgi_graph *to = f->to;
  const int32_t old = f->g->nnode;
  rgi_node *node = rgi_alloc_n(to->arena, (size_t)to->nnode + 1, sizeof *node);
  if (!node) return rgi_nomem(e);
  int32_t count = 0;
  for (int32_t n = 0; n <= old; n++) {
    for (int32_t m = old; m < to->nnode; m++)
      if (f->before[m] == n) node[count++] = to->node[m];
    if (n < old && !f->gone[n]) node[count++] = to->node[n];
  }
  to->node = node;
  to->nnode = to->node_capacity = count;
  /* producers; parts of joins */
  for (int32_t n = 0; n < count; n++) RGI_TRY(rgi_infer_node(to, n, NULL, e));
  return rgi_prune(to, e);
}

static rg_status fuse_all(fuser *f, rg_error *e) {
  const rgi_graph *g = f->g;
  int32_t room = g->nnode;
  for (int32_t n = 0; n < g->nnode; n++)
    if (fusing_of(g->node[n].op) && fusing_of(g->node[n].op)->part)
      room += rgi_nin(&g->node[n]) + 1;
    else if (fusing_of(g->node[n].op) && fusing_of(g->node[n].op)->joined)
      room++;
  f->gone = rgi_alloc_n(f->scratch, (size_t)g->nnode + 1, sizeof *f->gone);
  f->before = rgi_alloc_n(f->scratch, (size_t)room + 1, sizeof *f->before);
  if (!f->again)
    f->report->at = rgi_alloc_n(f->report->arena, (size_t)g->nnode + 1, sizeof *f->report->at);
  if (!f->gone || !f->before || !f->report->at) return rgi_nomem(e);
  if (f->lanes && !f->again) RGI_TRY(rgi_order_find(g, f->scratch, &f->order, e));
  for (int32_t n = 0; n < g->nnode; n++) {
    const rgi_fusing *fusing = fusing_of(g->node[n].op);
    if (fusing && fusing->part && !f->again) RGI_TRY(take_apart(f, n, fusing, e));
    if (fusing && fusing->joined)
      RGI_TRY(fusing->and_with ? join_list(f, n, fusing, e) : join(f, n, fusing, e));
  }
  for (int32_t n = 0; n < g->nnode && !f->again; n++) RGI_TRY(take_cast(f, n, e));
  return reorder(f, e);
}

rg_status rgi_fuse(const rgi_graph *g, const rg_gpu *gpu, bool lanes, bool split_kv,
                   rgi_graph **out, rgi_fusions **report, rg_error *e) {
  *out = NULL;
  *report = NULL;
  rgi_arena *arena = rgi_arena_create(g->ctx);
  fuser f = {.g = g,
             .gpu = gpu,
             .lanes = lanes,
             .split_kv = split_kv,
             .scratch = rgi_arena_create(g->ctx)};
  f.report = arena ? rgi_alloc(arena, sizeof *f.report) : NULL;
  if (f.report) *f.report = (rgi_fusions){.arena = arena};
  rg_status status = f.report && f.scratch ? rgi_graph_clone(g, &f.to, e) : rgi_nomem(e);
  if (status == RG_OK) status = fuse_all(&f, e);
  if (status == RG_OK && f.joints > 0) {
    rgi_graph *once = f.to;
    fuser more = {.g = once,
                  .gpu = gpu,
                  .split_kv = split_kv,
                  .again = true,
                  .scratch = f.scratch,
                  .report = f.report};
    status = rgi_graph_clone(once, &more.to, e);
    if (status == RG_OK) status = fuse_all(&more, e);
    f.to = more.to;
    rgi_graph_destroy(once);
  }
  if (status == RG_OK) status = rgi_verify(f.to, "fuse", e);
  rgi_arena_destroy(f.scratch);
  if (status != RG_OK) {
    rgi_graph_destroy(f.to);
    rgi_arena_destroy(arena);
    return status;
  }
  *out = f.to;
  *report = f.report;
  return RG_OK;
}

void rgi_fusions_destroy(rgi_fusions *f) {
  if (f) rgi_arena_destroy(f->arena);
}
