/* graph/verify.c: the numbered invariants of ir.h, checked after every stage. A
 * violation is a bug of ours.
 */
#include "ir.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct verifier {
  const rgi_graph *g;
  const char *stage;
  rg_error *e;
} verifier;

static rg_status broken(const verifier *v, int invariant, const char *where, const char *what) {
  return rgi_fail(v->e, RG_E_INTERNAL, NULL, where,
                  "invariant I%d does not hold after %s: \"%s\" %s", invariant, v->stage, where,
                  what);
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The name that occurs twice among n, or NULL. `names` is sorted in place. */
static const char *twice(const char **names, int n) {
  qsort(names, (size_t)n, sizeof *names, by_text);
  for (int i = 1; i < n; i++)
    if (strcmp(names[i - 1], names[i]) == 0) return names[i];
  return NULL;
}

static rg_status check_names(const verifier *v, rgi_arena *a) {
  const rgi_graph *g = v->g;
  int most = g->ntensor > g->nnode ? g->ntensor : g->nnode;
  const char **names = rgi_alloc_n(a, (size_t)most, sizeof *names);
  if (!names) return rgi_nomem(v->e);
  for (int t = 0; t < g->ntensor; t++) names[t] = g->tensor[t].name;
  const char *twin = twice(names, g->ntensor);
  if (twin) return broken(v, 1, twin, "names two tensors");
  for (int n = 0; n < g->nnode; n++) names[n] = g->node[n].name;
  twin = twice(names, g->nnode);
  return twin ? broken(v, 1, twin, "names two nodes") : RG_OK;
}

/* I1, I2, I3 */
static rg_status check_links(const verifier *v, rgi_arena *a) {
  const rgi_graph *g = v->g;
  int *written = rgi_alloc_n(a, (size_t)g->ntensor, sizeof *written);
  if (!written) return rgi_nomem(v->e);
  for (int t = 0; t < g->ntensor; t++) {
    const rgi_tensor *x = &g->tensor[t];
    if (x->producer >= g->nnode || x->base >= g->ntensor || x->base == t)
      return broken(v, 1, x->name, "has a bad id");
  }
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int p = 0; p < node->op->nin; p++)
      if (!(node->op->in[p].flags & RG_PORT_OPTIONAL) && rgi_in(node, p) < 0 &&
          !(node->op->in[p].flags & RG_PORT_LIST))
        return broken(v, 1, node->name, "lacks a required input");
    if (node->after >= 0 && (node->after >= g->ntensor || g->tensor[node->after].producer >= n))
      return broken(v, 3, node->name, "waits for what is produced later");
    for (int i = 0; i < rgi_nin(node); i++) {
      int t = node->in[i];
      if (t < -1 || t >= g->ntensor)
        return broken(v, 1, node->name, "reads a tensor that is not there");
      if (t < 0) continue;
      if (g->tensor[t].producer >= n)
        return broken(v, 3, node->name, "reads what is produced later");
    }
    for (int i = 0; i < rgi_nout(node); i++) {
      int t = node->out[i];
      if (t < -1 || t >= g->ntensor)
        return broken(v, 1, node->name, "writes a tensor that is not there");
      if (t < 0) continue;
      if (g->tensor[t].producer != n || written[t]++)
        return broken(v, 2, g->tensor[t].name, "has no single producer");
    }
    if (n > 0 && g->node[n - 1].backward && !node->backward)
      return broken(v, 3, node->name, "is a forward node behind a backward node");
  }
  for (int t = 0; t < g->ntensor; t++)
    if (g->tensor[t].producer >= 0 && !written[t])
      return broken(v, 2, g->tensor[t].name, "is written by nobody");
  return RG_OK;
}

/* I4: inference run again on a copy says the same. */
static rg_status check_inference(const verifier *v) {
  const rgi_graph *g = v->g;
  rgi_graph *again;
  RGI_TRY(rgi_graph_clone(g, &again, v->e));
  rg_status status = RG_OK;
  for (int n = 0; n < again->nnode && status == RG_OK; n++)
    status = rgi_infer_node(again, n, NULL, v->e);
  for (int t = 0; t < g->ntensor && status == RG_OK; t++) {
    const rgi_tensor *x = &g->tensor[t], *y = &again->tensor[t];
    bool same = x->dtype == y->dtype && x->rank == y->rank && x->base == y->base;
    for (int d = 0; same && d < x->rank; d++) {
      same = rgi_dim_equal(x->dim[d], y->dim[d]);
      if (g->bound) same = same && rgi_dim_known(x->dim[d]) && x->stride[d] == y->stride[d];
    }
    if (g->bound) same = same && x->offset == y->offset;
    if (!same) status = broken(v, 4, x->name, "is not what its op infers");
  }
  rgi_graph_destroy(again);
  return status;
}

/* I5, I6 */
static rg_status check_aliases(const verifier *v) {
  const rgi_graph *g = v->g;
  for (int t = 0; t < g->ntensor; t++) {
    const rgi_tensor *x = &g->tensor[t];
    if (x->base < 0) continue;
    const rgi_tensor *owner = &g->tensor[x->base];
    if (owner->base >= 0) return broken(v, 5, x->name, "looks into a tensor that is itself a view");
    if (owner->dtype != x->dtype) return broken(v, 5, x->name, "looks into bytes of another dtype");
    if (!g->bound) continue;
    int64_t last = x->offset;
    bool empty = false;
    for (int d = 0; d < x->rank; d++) {
      if (x->dim[d].c == 0) empty = true;
      last += (x->dim[d].c - 1) * x->stride[d];
    }
    if (!empty && (x->offset < 0 || last >= rgi_elements(owner)))
      return broken(v, 5, x->name, "leaves the bytes it looks into");
  }
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int p = 0; p < node->op->nout; p++)
      for (int i = node->out_begin[p]; i < node->out_begin[p + 1]; i++) {
        if (node->out[i] < 0 || node->op->flags & RG_OP_VIEW) continue;
        int owner = rgi_owner(g, node->out[i]);
        if (g->tensor[owner].producer >= 0 || owner == node->out[i]) continue;
        /* the only graph inputs that are written: buffers that gradients accumulate into */
        bool accumulates = false;
        for (int k = 0; k < g->ninput; k++)
          accumulates = accumulates || (g->input[k].want == RGI_GRAD_ACCUMULATE &&
                                        g->tensor[owner].grad_of == g->input[k].tensor);
        if (!accumulates && !(rgi_state_of(g, owner) && node->op->out[p].flags & RG_PORT_STATE))
          return broken(v, 6, g->tensor[owner].name, "is an input and yet written");
      }
  }
  return RG_OK;
}

/* I6: whoever reads an in-place sum's old version comes before the node that writes the next. */
static rg_status check_sums(const verifier *v) {
  const rgi_graph *g = v->g;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int i = 0; i < rgi_nin(node); i++) {
      int t = node->in[i];
      if (t < 0 || node->op->flags & RG_OP_VIEW) continue;
      for (int o = 0; o < rgi_nout(node); o++) {
        int y = node->out[o];
        if (y < 0 || g->tensor[y].base < 0 || g->tensor[y].base != rgi_owner(g, t) ||
            g->tensor[y].offset != g->tensor[t].offset)
          continue;
        for (int later = n + 1; later < g->nnode; later++)
          for (int k = 0; k < rgi_nin(&g->node[later]); k++)
            if (g->node[later].in[k] == t)
              return broken(v, 6, g->tensor[t].name, "is read after its next version was written");
      }
    }
  }
  return RG_OK;
}

/* I7, I8 */
static rg_status check_surface(const verifier *v) {
  const rgi_graph *g = v->g;
  bool differentiated = false;
  for (int n = 0; n < g->nnode; n++) differentiated = differentiated || g->node[n].backward;
  for (int i = 0; i < g->noutput; i++) {
    const rgi_io *io = &g->output[i];
    if (io->tensor < 0 || io->tensor >= g->ntensor || g->tensor[io->tensor].base >= 0 ||
        g->tensor[io->tensor].producer < 0)
      return broken(v, 7, io->name, "is an output without bytes of its own");
  }
  for (int i = 0; i < g->ninput; i++) {
    const rgi_io *io = &g->input[i];
    if (io->tensor < 0 || io->tensor >= g->ntensor || g->tensor[io->tensor].producer >= 0)
      return broken(v, 7, io->name, "is an input that a node produces");
    if (differentiated && io->want != RGI_GRAD_NONE && io->grad < 0)
      return broken(v, 7, io->name, "has no gradient");
    if (io->grad >= 0 &&
        rgi_bytes(&g->tensor[io->grad]) / (int64_t)rg_dtype_size(g->tensor[io->grad].dtype) !=
            rgi_elements(&g->tensor[io->tensor]))
      return broken(v, 7, io->name, "has a gradient of another shape");
  }
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    int lengths = -1;
    for (int p = 0; p < node->op->nin; p++)
      if (node->op->in[p].flags & RG_PORT_SEQLENS) lengths = rgi_in(node, p);
    if (lengths < 0) continue;
    for (int p = 0; p < node->op->nin; p++) {
      if (!(node->op->in[p].flags & RG_PORT_ROWS)) continue;
      for (int i = node->in_begin[p]; i < node->in_begin[p + 1]; i++)
        if (node->in[i] >= 0 && g->tensor[node->in[i]].seqlens >= 0 &&
            g->tensor[node->in[i]].seqlens != lengths)
          return broken(v, 8, node->name, "reads rows of other sequences than its lengths say");
    }
  }
  return RG_OK;
}

/* I10 of node n, which makes the next version of what it reads as its input i. */
static rg_status check_version(const verifier *v, int n, int i, int next) {
  const rgi_graph *g = v->g;
  const rgi_node *node = &g->node[n];
  bool partial = false;
  const int old = rgi_version(g, node->in[i], &partial), owner = rgi_owner(g, node->in[i]);
  if (next < 0) return broken(v, 10, node->name, "reads state on a port and makes no next version");
  if (!(node->op->flags & RG_OP_STATE) || node->backward)
    return broken(v, 10, node->name, "may not write state");
  if (partial) return broken(v, 10, node->name, "writes a part of state");
  if (!rgi_state_of(g, owner) || g->tensor[next].base != owner)
    return broken(v, 10, g->tensor[next].name, "is the next version of what is no state");
  for (int m = 0; m < g->nnode; m++)
    for (int k = 0; k < rgi_nin(&g->node[m]); k++) {
      const int t = g->node[m].in[k];
      if ((m == n && k == i) || t < 0 || rgi_version(g, t, NULL) != old) continue;
      if (m > n) return broken(v, 10, g->node[m].name, "reads state after its next was written");
      if (rgi_next_in(&g->node[m], k, NULL) >= 0)
        return broken(v, 10, g->tensor[old].name, "has two next versions");
    }
  return RG_OK;
}

static rg_status check_state(const verifier *v) {
  const rgi_graph *g = v->g;
  for (int n = 0; n < g->nnode; n++)
    for (int p = 0; p < g->node[n].op->nin; p++)
      for (int i = g->node[n].in_begin[p]; i < g->node[n].in_begin[p + 1]; i++)
        if (g->node[n].op->in[p].flags & RG_PORT_STATE && g->node[n].in[i] >= 0)
          RGI_TRY(check_version(v, n, i, rgi_next_in(&g->node[n], i, NULL)));
  for (int i = 0; i < g->ninput; i++) {
    const rgi_io *io = &g->input[i];
    if (!io->state) continue;
    if (io->next < 0 || io->next >= g->ntensor || rgi_owner(g, io->next) != io->tensor)
      return broken(v, 10, io->name, "is state whose next version has other bytes");
    const int last = rgi_version(g, io->next, NULL);
    if (last == io->tensor || rgi_next_version(g, last, NULL) >= 0)
      return broken(v, 10, io->name, "is state of which `next` is not the last version");
  }
  return RG_OK;
}

static const char *reader_port(const rg_port *port, const char *kind, char *buffer, size_t size) {
  snprintf(buffer, size, "%s.%s", kind, port->name + 6);
  return buffer;
}

/* I9 */
static rg_status check_stand_ins(const verifier *v) {
  const rgi_graph *g = v->g;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    for (int p = 0; p < node->op->nin; p++) {
      char name[64];
      const int t = rgi_in(node, p);
      if (t >= 0 && node->backward && strncmp(node->op->in[p].name, "sum.", 4) == 0) {
        snprintf(name, sizeof name, "acc.%s", node->op->in[p].name + 4);
        const int acc = rgi_in_port(node->op, name);
        if (acc < 0 || rgi_in(node, acc) >= 0)
          return broken(v, 9, node->name, "has a sum beside one that it adds to in place");
      }
      if (t < 0 || strncmp(node->op->in[p].name, "delta.", 6) != 0) continue;
      const int out =
                    rgi_in_port(node->op, reader_port(&node->op->in[p], "out", name, sizeof name)),
                grad =
                    rgi_in_port(node->op, reader_port(&node->op->in[p], "grad", name, sizeof name));
      if (out < 0 || grad < 0 || rgi_in(node, out) >= 0)
        return broken(v, 9, node->name, "has a delta beside what it stands for");
      const int d = rgi_in(node, grad);
      if (d < 0 || g->tensor[d].producer != g->tensor[t].producer || g->tensor[t].producer < 0)
        return broken(v, 9, node->name, "has a delta of another gradient than it reads");
    }
  }
  return RG_OK;
}

rg_status rgi_verify(const rgi_graph *g, const char *stage, rg_error *e) {
  verifier v = {g, stage, e};
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  rg_status status = check_names(&v, a);
  if (status == RG_OK) status = check_links(&v, a);
  rgi_arena_destroy(a);
  RGI_TRY(status);
  RGI_TRY(check_aliases(&v));
  RGI_TRY(check_state(&v));
  if (g->bound) RGI_TRY(check_sums(&v));
  RGI_TRY(check_surface(&v));
  RGI_TRY(check_stand_ins(&v));
  return check_inference(&v);
}
