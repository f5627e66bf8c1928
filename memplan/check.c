/* memplan/check.c: the independent checker of a memory plan: the dumbest code that can be right.
 *
 * Starts over from the graph: which nodes touch which bytes, who is alive when, which regions must hold what.
 * Then compares every two blocks. Shares nothing with the planner, not even its helpers.
 */
#include "memplan.h"

typedef struct life {
  int32_t first, last; /* -1: untouched */
} life;

static rg_status broken(const rgi_graph *g, int32_t tensor, int32_t node, rg_error *e, const char *what) {
  return rgi_fail(e, RG_E_INTERNAL, NULL, node >= 0 ? g->node[node].name : NULL, "memory plan: %s%s%s",
                  tensor >= 0 ? g->tensor[tensor].name : "", tensor >= 0 ? " " : "", what);
}

static int32_t owner_of(const rgi_graph *g, int32_t tensor) {
  return g->tensor[tensor].base < 0 ? tensor : g->tensor[tensor].base;
}

/* Reads (or writes) any alias of `owner`? Views move no bytes. */
static bool touches(const rgi_graph *g, int32_t node, int32_t owner) {
  const rgi_node *n = &g->node[node];
  if (n->op->flags & RG_OP_VIEW) return false;
  for (int32_t i = 0; i < n->in_begin[n->op->nin]; i++)
    if (n->in[i] >= 0 && owner_of(g, n->in[i]) == owner) return true;
  for (int32_t i = 0; i < n->out_begin[n->op->nout]; i++)
    if (n->out[i] >= 0 && owner_of(g, n->out[i]) == owner) return true;
  return false;
}

static life life_of(const rgi_graph *g, int32_t owner) {
  life l = {-1, -1};
  for (int32_t k = 0; k < g->nnode; k++)
    if (touches(g, k, owner)) {
      if (l.first < 0) l.first = k;
      l.last = k;
    }
  return l;
}

/* The caller supplies it: an output, or a gradient that was asked for. */
static bool is_result(const rgi_graph *g, int32_t owner) {
  for (int32_t i = 0; i < g->noutput; i++)
    if (owner_of(g, g->output[i].tensor) == owner) return true;
  for (int32_t i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE && g->input[i].grad >= 0 && owner_of(g, g->input[i].grad) == owner)
      return true;
  return false;
}

static int64_t bytes_of(const rgi_tensor *x) {
  int64_t bytes = (int64_t)rg_dtype_size(x->dtype);
  for (int32_t i = 0; i < x->rank; i++) bytes *= x->dim[i].c;
  return bytes;
}

/* One owner: right region, one block of the right size and life exactly where it is due. */
static rg_status check_owner(const rgi_graph *g, const rgi_memory *m, int32_t t, rg_error *e) {
  const rgi_tensor *x = &g->tensor[t];
  life l = life_of(g, t);
  rgi_region due;
  if (is_result(g, t))
    due = RGI_R_OUTPUT;
  else if (x->producer < 0)
    due = RGI_R_INPUT;
  else if (l.first >= 0 && !g->node[l.first].backward && g->node[l.last].backward)
    due = RGI_R_SAVED;
  else
    due = RGI_R_SCRATCH;
  if (x->region != due) return broken(g, t, -1, e, "is in the wrong region");
  int32_t found = 0;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->tensor != t) continue;
    found++;
    if (b->region != due || b->address != x->address) return broken(g, t, -1, e, "and its block disagree");
    if (b->size != bytes_of(x)) return broken(g, t, -1, e, "has a block of another size");
    if (b->first != l.first || b->last != l.last)
      return broken(g, t, -1, e, "has a block with another lifetime");
  }
  bool needs = (due == RGI_R_SAVED || due == RGI_R_SCRATCH) && l.first >= 0;
  if (found != needs) return broken(g, t, -1, e, "has too many blocks, or too few");
  return RG_OK;
}

static rg_status check_workspaces(const rgi_graph *g, const rgi_memory *m, rg_error *e) {
  for (int32_t k = 0; k < g->nnode; k++) {
    int32_t found = 0;
    for (int32_t i = 0; i < m->nblock; i++) {
      const rgi_block *b = &m->block[i];
      if (b->tensor >= 0 || b->first != k) continue;
      found++;
      if (b->last != k || b->region != RGI_R_SCRATCH || b->size != m->workspace_size[k] ||
          b->address != m->workspace[k])
        return broken(g, -1, k, e, "a workspace and its block disagree");
    }
    if (found != (m->workspace_size[k] > 0))
      return broken(g, -1, k, e, "a workspace without a block, or with several");
  }
  return RG_OK;
}

/* Does `heir` take over the bytes of `b`, at a node that allows it? */
static bool handed_over(const rgi_graph *g, const rgi_memory *m, const rgi_block *b, const rgi_block *heir) {
  if (heir->shares < 0 || &m->block[heir->shares] != b || b->tensor < 0 || heir->tensor < 0) return false;
  if (b->last != heir->first || b->address != heir->address || heir->size > b->size) return false;
  const rgi_node *n = &g->node[b->last];
  int32_t nin = n->in_begin[n->op->nin], readers = 0;
  if (!(n->op->flags & RG_OP_INPLACE) || nin < 1 || n->in[0] < 0 || n->out[0] != heir->tensor) return false;
  for (int32_t i = 0; i < nin; i++)
    if (n->in[i] >= 0 && owner_of(g, n->in[i]) == b->tensor) readers++;
  return readers == 1 && owner_of(g, n->in[0]) == b->tensor && g->tensor[n->in[0]].offset == 0;
}

static rg_status check_pair(const rgi_graph *g, const rgi_memory *m, const rgi_block *a, const rgi_block *b,
                            rg_error *e) {
  if (a->region != b->region || a->size == 0 || b->size == 0) return RG_OK;
  if (a->address + a->size <= b->address || b->address + b->size <= a->address) return RG_OK;
  bool apart = a->region == RGI_R_SCRATCH && (a->last < b->first || b->last < a->first);
  if (apart || handed_over(g, m, a, b) || handed_over(g, m, b, a)) return RG_OK;
  return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "memory plan: %s and %s overlap",
                  a->tensor >= 0 ? g->tensor[a->tensor].name : "a workspace",
                  b->tensor >= 0 ? g->tensor[b->tensor].name : "a workspace");
}

rg_status rgi_memory_check(const rgi_graph *g, const rgi_memory *m, rg_error *e) {
  int64_t saved = 0, forward = 0, backward = 0;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base < 0) RGI_TRY(check_owner(g, m, t, e));
  RGI_TRY(check_workspaces(g, m, e));
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->address < 0 || b->address % RGI_ALIGN || b->size < 0 || b->address > INT64_MAX - b->size)
      return broken(g, b->tensor, -1, e, "has a bad address");
    if (b->size > 0) {
      int64_t *end = b->region == RGI_R_SAVED ? &saved : g->node[b->first].backward ? &backward : &forward;
      if (b->address + b->size > *end) *end = b->address + b->size;
    }
    for (int32_t j = 0; j < i; j++) RGI_TRY(check_pair(g, m, b, &m->block[j], e));
  }
  if (saved != m->saved || forward != m->forward_scratch || backward != m->backward_scratch)
    return broken(g, -1, -1, e, "a region does not end with its last block");
  if (m->scratch != (forward > backward ? forward : backward))
    return broken(g, -1, -1, e, "scratch is misstated");
  return RG_OK;
}
