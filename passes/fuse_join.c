/* passes/fuse_join.c: puts nodes together that one kernel serves; see fuse.h. */
#include "fuser.h"
#include <string.h>

/* The value that the attribute of this name has for node n, or NULL. */
static const rg_value *attr_named(const rgi_node *n, const char *name) {
  const int i = rgi_attribute(n->op, name);
  return i < 0 ? NULL : &n->attr[i];
}
static bool same_value(const rg_value *a, const rg_value *b) {
  return a->i == b->i && !(a->f < b->f) && !(a->f > b->f);
}

static int port_of_out(const rgi_node *n, int i) {
  int p = 0;
  while (i >= n->out_begin[p + 1]) p++;
  return p;
}

/* Nodes that one of `joined` is to stand for, and what it has. */
enum { MOST_JOINED = 3 };
typedef struct joint {
  const rg_op *joined;
  const char *link, *list;
  int count;
  const rgi_node *of[MOST_JOINED];
  int32_t rest[RGI_FUSE_PORTS]; /* of a list on `link` */
  int nrest, first, second, own;
  bool split_kv;
  int32_t in[RGI_FUSE_PORTS], out[RGI_FUSE_PORTS];
  int nin[RGI_FUSE_PORTS], nout[RGI_FUSE_PORTS];
  rg_value attr[RGI_FUSE_ATTRS];
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

/* The NAME of the first of the nodes that `joined` has as `name`; NULL: it is no such name, or one
 * that a node which is joint already has itself. */
static const char *of_first(const joint *j, const char *name) {
  for (int k = 0; k < j->count; k++)
    if (rgi_in_port(j->of[k]->op, name) >= 0 || rgi_out_port(j->of[k]->op, name) >= 0) return NULL;
  return rgi_of_first(name);
}
/* The first of the nodes that NAME is of: not the first one, where "first.NAME" is. */
static int from_node(const joint *j, const char *name) {
  return rgi_first_in_port(j->joined, name) >= 0 || rgi_first_out_port(j->joined, name) >= 0;
}

/* The tensor on the nodes' ports of this name; false: they have others. */
static bool common_input(const joint *j, const char *name, int32_t *t) {
  const char *first = of_first(j, name);
  bool any = false;
  *t = first ? rgi_fuse_in(j->of[0], first, 0) : -1;
  if (first) return true;
  for (int k = from_node(j, name); k < j->count; k++) {
    if (rgi_in_port(j->of[k]->op, name) < 0) continue;
    const int32_t x = rgi_fuse_in(j->of[k], name, 0);
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
  else if (strcmp(name, "own") == 0)
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
      const rgi_node *x = j->of[0];
      const int own = rgi_in_port(x->op, name); /* the first one's list, or what is left of one */
      const int n = own < 0 ? j->nrest : x->in_begin[own + 1] - x->in_begin[own];
      if (ins + n > RGI_FUSE_PORTS) return false;
      memcpy(j->in + ins, own < 0 ? j->rest : x->in + x->in_begin[own], (size_t)n * sizeof *j->in);
      j->nin[q] = n;
    } else {
      if (ins == RGI_FUSE_PORTS || !common_input(j, name, &j->in[ins])) return false;
      j->nin[q] = j->in[ins] >= 0;
    }
    ins += j->nin[q];
  }
  for (int k = 0; k < j->count; k++)
    if (!covers(j, j->of[k])) return false;
  for (int i = 0; i < j->joined->nattr; i++)
    if (!common_attr(j, j->joined->attrs[i].name, &j->attr[i])) return false;
  for (int q = 0; q < j->joined->nout; q++) {
    const char *name = j->joined->out[q].name, *first = of_first(j, name);
    if (j->joined->out[q].flags & RG_PORT_LIST) { /* the first one's */
      const rgi_node *x = j->of[0];
      const int own = rgi_out_port(x->op, name), n = x->out_begin[own + 1] - x->out_begin[own];
      if (outs + n + j->joined->nout > RGI_FUSE_PORTS) return false;
      memcpy(j->out + outs, x->out + x->out_begin[own], (size_t)n * sizeof *j->out);
      outs += j->nout[q] = n;
      continue;
    }
    j->out[outs] = first ? rgi_fuse_out(j->of[0], first, 0) : -1;
    /* the last node's, where several have one of this name */
    for (int k = j->count - 1; k >= from_node(j, name) && j->out[outs] < 0 && !first; k--)
      j->out[outs] = rgi_fuse_out(j->of[k], name, 0);
    j->nout[q] = j->out[outs] >= 0;
    outs += j->nout[q];
  }
  return true;
}

static rg_status fitting(const rgi_fuser *f, const rgi_node *n, const rgi_fusing *fusing, joint *j,
                         rg_error *e) {
  const rg_op *joined = rgi_find_op(f->g->ctx, fusing->joined);
  *j = (joint){.joined = joined,
               .link = fusing->link,
               .list = fusing->list,
               .own = -1,
               .split_kv = f->split_kv};
  if (joined && joined->nin <= RGI_FUSE_PORTS && joined->nout <= RGI_FUSE_PORTS &&
      joined->nattr <= RGI_FUSE_ATTRS)
    return RG_OK;
  return rgi_fail(e, RG_E_INTERNAL, NULL, n->name, "%s and %s do not fit each other", n->op->name,
                  fusing->joined);
}

/* `like`: the node whose place and name the new one has, and the other part of that name. */
static rg_status put_joint(rgi_fuser *f, joint *j, int32_t like, const char *suffix, rg_error *e) {
  for (int k = 0; k < j->count; k++) f->gone[j->of[k] - f->g->node] = true;
  f->report->fused++;
  f->report->split += j->split_kv && rgi_attribute(j->joined, "split_kv") >= 0;
  f->joints++;
  return rgi_fuse_add(f, like, suffix, j->joined, j->attr, j->in, j->nin, j->out, j->nout, like, -1,
                      e);
}

/* Does node n read state of which another makes a next version? It can't be put off then. */
static bool overtaken(const rgi_graph *g, int32_t n) {
  bool any = false;
  for (int i = 0; i < rgi_nin(&g->node[n]); i++) {
    const int v = g->node[n].in[i] < 0 ? -1 : rgi_version(g, g->node[n].in[i], NULL);
    int writer = n;
    any = any || (v >= 0 && rgi_next_version(g, v, &writer) >= 0 && writer != n);
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
    if (a->out[i] >= 0 && rgi_fuse_readers(g, m, a->out[i], &count) < n) return false;
  for (int i = b->in_begin[port]; i < b->in_begin[port + 1]; i++) {
    if (g->tensor[b->in[i]].producer != m) {
      if (j->nrest == RGI_FUSE_PORTS) return false;
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
    if (v >= 0 && rgi_next_version(g, v, NULL) >= 0 && rgi_fuse_readers(g, m, x, &count) < n)
      return false;
  }
  return true;
}

static rg_status join(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
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
  for (int i = 0; i < rgi_nout(j.of[0]) && !j.list; i++) /* where in a list of the first one's */
    if (j.of[0]->out[i] == t) j.own = i - j.of[0]->out_begin[port_of_out(j.of[0], i)];
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
static int32_t made_for(const rgi_fuser *f, int32_t t, const char *op) {
  const rgi_graph *g = f->g;
  const int32_t m = t < 0 || g->tensor[t].base >= 0 ? -1 : g->tensor[t].producer;
  if (m < 0 || f->gone[m] || strcmp(g->node[m].op->name, op) != 0) return -1;
  int all = 0;
  for (int i = 0; i < rgi_nout(&g->node[m]); i++) {
    const int32_t x = g->node[m].out[i];
    int count = 0;
    if (x >= 0) rgi_fuse_readers(g, m, x, &count);
    for (int k = 0; k < g->noutput && x >= 0; k++) count += g->output[k].tensor == x;
    for (int k = 0; k < g->ntensor && x >= 0; k++) count += g->tensor[k].base == x;
    all += count;
  }
  return all == 1 ? m : -1;
}

static rg_status join_list(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
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
    else if (j.nrest < RGI_FUSE_PORTS)
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

rg_status rgi_fuse_join(rgi_fuser *f, int32_t n, const rgi_fusing *fusing, rg_error *e) {
  return fusing->and_with ? join_list(f, n, fusing, e) : join(f, n, fusing, e);
}
