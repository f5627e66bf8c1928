/* memplan/check.c: the independent checker of a memory plan: the dumbest code that can be right.

   Starts over from the graph: which nodes touch which bytes, who is alive when, which regions must
   hold what. Then compares every two blocks that could collide: those of saved and host memory,
   which all wait for the turn together, where their addresses meet; those of scratch where their
   lives do. Shares nothing with the planner, not even its helpers. Trusts nothing that it is given
   of the plan: a number is looked at before it is used as an index.
 */
#include "memplan.h"
#include <stdio.h>
#include <stdlib.h>

typedef struct life {
  int32_t first, last; /* -1: untouched */
} life;

/* What the graph asks for, and which blocks answer. */
typedef struct facts {
  life *life;         /* [ntensor] of owners */
  bool *result;       /* [ntensor] of owners: the caller supplies it, an output, or a gradient that
                         was asked for */
  int32_t *block;     /* [ntensor] one of its blocks */
  int32_t *found;     /* [ntensor] how many it has */
  int32_t *workspace; /* [nnode] one of its blocks */
  int32_t *rooms;     /* [nnode] how many it has */
} facts;

static rg_status broken(const rgi_graph *g, int32_t tensor, int32_t node, rg_error *e,
                        const char *what) {
  return rgi_fail(e, RG_E_INTERNAL, NULL, node >= 0 ? g->node[node].name : NULL,
                  "memory plan: %s%s%s", tensor >= 0 ? g->tensor[tensor].name : "",
                  tensor >= 0 ? " " : "", what);
}

/* "cmp_o [256, 512) of scratch", "the workspace of topk [0, 64) of scratch" */
static const char *describe(const rgi_graph *g, const rgi_block *b, char *text, size_t size) {
  snprintf(text, size, "%s%s [%lld, %lld) of %s", b->tensor < 0 ? "the workspace of " : "",
           b->tensor < 0 ? g->node[b->first].name : g->tensor[b->tensor].name,
           (long long)b->address, (long long)(b->address + b->size), rgi_region_name(b->region));
  return text;
}

static int32_t owner_of(const rgi_graph *g, int32_t tensor) {
  return g->tensor[tensor].base < 0 ? tensor : g->tensor[tensor].base;
}

static void touch(const rgi_graph *g, facts *f, int32_t tensor, int32_t node) {
  if (tensor < 0) return;
  life *l = &f->life[owner_of(g, tensor)];
  if (l->first < 0) l->first = node;
  l->last = node;
}

/* Reading or writing any alias is touching the owner; views move no bytes. */
static void find_facts(const rgi_graph *g, const rgi_memory *m, facts *f) {
  for (int32_t t = 0; t < g->ntensor; t++) f->life[t] = (life){-1, -1};
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    if (n->op->flags & RG_OP_VIEW) continue;
    for (int32_t i = 0; i < n->in_begin[n->op->nin]; i++) touch(g, f, n->in[i], k);
    for (int32_t i = 0; i < n->out_begin[n->op->nout]; i++) touch(g, f, n->out[i], k);
  }
  for (int32_t i = 0; i < g->noutput; i++) f->result[owner_of(g, g->output[i].tensor)] = true;
  for (int32_t i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE && g->input[i].grad >= 0)
      f->result[owner_of(g, g->input[i].grad)] = true;
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    if (b->tensor >= 0) {
      f->block[b->tensor] = i;
      f->found[b->tensor]++;
    } else {
      f->workspace[b->first] = i;
      f->rooms[b->first]++;
    }
  }
}

static int64_t bytes_of(const rgi_tensor *x) {
  int64_t bytes = (int64_t)rg_dtype_size(x->dtype);
  for (int32_t i = 0; i < x->rank; i++) bytes *= x->dim[i].c;
  return bytes;
}

/* Every number in a block is one that may be used. */
static rg_status check_block(const rgi_graph *g, const rgi_memory *m, int32_t i, rg_error *e) {
  const rgi_block *b = &m->block[i];
  if (b->tensor < -1 || b->tensor >= g->ntensor || b->first < 0 || b->first >= g->nnode ||
      b->last < b->first || b->last >= g->nnode || b->shares < -1 || b->shares >= m->nblock ||
      b->shares == i)
    return rgi_fail(e, RG_E_INTERNAL, NULL, NULL,
                    "memory plan: block %d has a tensor, node or block that is not there", (int)i);
  const int32_t node = b->tensor < 0 ? b->first : -1;
  if (b->region != RGI_R_SAVED && b->region != RGI_R_SCRATCH && b->region != RGI_R_HOST)
    return broken(g, b->tensor, node, e, "has a block outside saved and scratch");
  if (b->tensor >= 0 && g->tensor[b->tensor].base >= 0)
    return broken(g, b->tensor, -1, e, "looks into another tensor and yet has a block");
  if (b->size < 0) return broken(g, b->tensor, node, e, "has a block of negative size");
  if (b->address < 0 || b->address > INT64_MAX - b->size)
    return broken(g, b->tensor, node, e, "has a block whose address is out of range");
  if (b->region == RGI_R_SAVED && b->address < m->reserved)
    return broken(g, b->tensor, node, e, "has a block in bytes that are reserved");
  if (b->address % RGI_ALIGN)
    return broken(g, b->tensor, node, e, "has a block that is not aligned");
  return RG_OK;
}

/* One owner: right region, one block of the right size and life exactly where it is due. */
static rg_status check_owner(const rgi_graph *g, const rgi_memory *m, const facts *f, int32_t t,
                             rg_error *e) {
  const rgi_tensor *x = &g->tensor[t];
  const life l = f->life[t];
  rgi_region due;
  if (f->result[t])
    due = RGI_R_OUTPUT;
  else if (x->producer < 0)
    due = RGI_R_INPUT;
  else if (x->host)
    due = RGI_R_HOST;
  else if (l.first >= 0 && !g->node[l.first].backward && g->node[l.last].backward)
    due = RGI_R_SAVED;
  else
    due = RGI_R_SCRATCH;
  if (x->region != due)
    return rgi_fail(e, RG_E_INTERNAL, NULL, NULL,
                    "memory plan: %s is in the wrong region, %s; expected %s", x->name,
                    (unsigned)x->region <= RGI_R_HOST ? rgi_region_name(x->region) : "none",
                    rgi_region_name(due));
  if (f->found[t] == 1) {
    const rgi_block *b = &m->block[f->block[t]];
    if (b->region != due || b->address != x->address)
      return broken(g, t, -1, e, "and its block disagree");
    if (b->size != bytes_of(x)) return broken(g, t, -1, e, "has a block of another size");
    if (b->first != l.first || b->last != l.last)
      return broken(g, t, -1, e, "has a block with another lifetime");
  }
  if (due == RGI_R_HOST && (l.first < 0 || g->node[l.first].backward || !g->node[l.last].backward))
    return broken(g, t, -1, e, "does not wait from forward to backward");
  bool needs = (due == RGI_R_SAVED || due == RGI_R_SCRATCH || due == RGI_R_HOST) && l.first >= 0;
  if (f->found[t] != needs)
    return broken(g, t, -1, e, f->found[t] ? "has a block too many" : "has no block");
  return RG_OK;
}

static rg_status check_workspace(const rgi_graph *g, const rgi_memory *m, const facts *f, int32_t k,
                                 rg_error *e) {
  const rg_op *op = g->node[k].op;
  int64_t size = m->workspace_size[k];
  if (size < 0) return broken(g, -1, k, e, "a workspace of negative size");
  if (size > 0 && (!op->workspace || op->flags & RG_OP_VIEW))
    return broken(g, -1, k, e, "a workspace for an op that asks for none");
  if (size == 0 && m->workspace[k] != -1)
    return broken(g, -1, k, e, "an address for a workspace of no bytes");
  if (f->rooms[k] != (size > 0))
    return broken(g, -1, k, e, "a workspace without a block, or with several");
  if (size == 0) return RG_OK;
  const rgi_block *b = &m->block[f->workspace[k]];
  if (b->last != k || b->region != RGI_R_SCRATCH || b->size != size ||
      b->address != m->workspace[k] || b->shares >= 0)
    return broken(g, -1, k, e, "a workspace and its block disagree");
  return RG_OK;
}

/* Are the elements one after the other, in order, from the first byte of the owner? */
static bool in_order(const rgi_tensor *x) {
  int64_t step = 1;
  for (int32_t i = x->rank - 1; i >= 0; i--) {
    if (x->dim[i].c != 1 && x->stride[i] != step) return false;
    step *= x->dim[i].c;
  }
  return x->offset == 0;
}

/* Does `heir` take over exactly the bytes of `b`, at a node that allows it? Then element i of
 * the output stands where element i of the first input stood, and nothing else of the node
 * looks there. */
static bool handed_over(const rgi_graph *g, const rgi_memory *m, const rgi_block *b,
                        const rgi_block *heir) {
  if (heir->shares < 0 || &m->block[heir->shares] != b || b->tensor < 0 || heir->tensor < 0)
    return false;
  if (b->last != heir->first || b->address != heir->address || heir->size > b->size) return false;
  const rgi_node *n = &g->node[b->last];
  int32_t nin = n->in_begin[n->op->nin], nout = n->out_begin[n->op->nout], uses = 0;
  if (!(n->op->flags & RG_OP_INPLACE) || nin < 1 || nout < 1 || n->in[0] < 0 ||
      n->out[0] != heir->tensor)
    return false;
  for (int32_t i = 0; i < nin; i++)
    if (n->in[i] >= 0 && owner_of(g, n->in[i]) == b->tensor) uses++;
  for (int32_t i = 0; i < nout; i++)
    if (n->out[i] >= 0 && owner_of(g, n->out[i]) == b->tensor) uses++;
  const rgi_tensor *in = &g->tensor[n->in[0]], *out = &g->tensor[heir->tensor];
  return uses == 1 && owner_of(g, n->in[0]) == b->tensor && in->dtype == out->dtype &&
         bytes_of(in) == bytes_of(out) && in_order(in) && in_order(out);
}

static rg_status check_pair(const rgi_graph *g, const rgi_memory *m, const rgi_block *a,
                            const rgi_block *b, rg_error *e) {
  if (a->address + a->size <= b->address || b->address + b->size <= a->address) return RG_OK;
  bool apart = a->region == RGI_R_SCRATCH && (a->last < b->first || b->last < a->first);
  if (apart || handed_over(g, m, a, b) || handed_over(g, m, b, a)) return RG_OK;
  char one[220], other[220];
  int32_t together = a->first > b->first ? a->first : b->first;
  return rgi_fail(e, RG_E_INTERNAL, NULL, g->node[together].name,
                  "memory plan: %s and %s overlap while both are alive",
                  describe(g, a, one, sizeof one), describe(g, b, other, sizeof other));
}

static rg_status check_size(const char *what, int64_t said, int64_t found, rg_error *e) {
  if (said == found) return RG_OK;
  return rgi_fail(e, RG_E_INTERNAL, NULL, NULL,
                  "memory plan: %s is said to have %lld bytes; its last block ends at %lld", what,
                  (long long)said, (long long)found);
}

static rg_status check_bound(const char *direction, int64_t bound, int64_t size, rg_error *e) {
  if (bound >= 0 && bound <= size) return RG_OK;
  return rgi_fail(e, RG_E_INTERNAL, NULL, NULL,
                  "memory plan: the lower bound of %s is %lld bytes; the scratch found has %lld",
                  direction, (long long)bound, (long long)size);
}

/* ---- which pairs to look at ---- */

static int by_address(const void *x, const void *y) {
  const rgi_block *a = *(const rgi_block *const *)x, *b = *(const rgi_block *const *)y;
  return (a->address > b->address) - (a->address < b->address);
}

static int by_birth(const void *x, const void *y) {
  const rgi_block *a = *(const rgi_block *const *)x, *b = *(const rgi_block *const *)y;
  return (a->first > b->first) - (a->first < b->first);
}

/* Blocks of one region that are not empty, into list[nblock]; returns how many. */
static int32_t blocks_of(const rgi_memory *m, rgi_region region, const rgi_block **list,
                         int (*order)(const void *, const void *)) {
  int32_t n = 0;
  for (int32_t i = 0; i < m->nblock; i++)
    if (m->block[i].region == region && m->block[i].size > 0) list[n++] = &m->block[i];
  if (n) qsort(list, (size_t)n, sizeof *list, order);
  return n;
}

/* All that wait for the turn are alive together: each against those that begin before it ends. */
static rg_status check_waiting(const rgi_graph *g, const rgi_memory *m, rgi_region region,
                               const rgi_block **list, rg_error *e) {
  const int32_t n = blocks_of(m, region, list, by_address);
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = i + 1; j < n && list[j]->address < list[i]->address + list[i]->size; j++)
      RGI_TRY(check_pair(g, m, list[i], list[j], e));
  return RG_OK;
}

/* Each block of scratch against those before it that are still alive when it is born; list[0 …
 * alive) has those. */
static rg_status check_scratch(const rgi_graph *g, const rgi_memory *m, const rgi_block **list,
                               rg_error *e) {
  const int32_t n = blocks_of(m, RGI_R_SCRATCH, list, by_birth);
  int32_t alive = 0;
  for (int32_t i = 0; i < n; i++) {
    const rgi_block *b = list[i];
    int32_t kept = 0;
    for (int32_t j = 0; j < alive; j++) {
      if (list[j]->last < b->first) continue;
      RGI_TRY(check_pair(g, m, list[j], b, e));
      list[kept++] = list[j];
    }
    list[kept++] = b;
    alive = kept;
  }
  return RG_OK;
}

static rg_status check_all(const rgi_graph *g, const rgi_memory *m, const facts *f,
                           const rgi_block **list, rg_error *e) {
  int64_t saved = m->reserved, host = 0, forward = 0, backward = 0;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base < 0) RGI_TRY(check_owner(g, m, f, t, e));
  for (int32_t k = 0; k < g->nnode; k++) RGI_TRY(check_workspace(g, m, f, k, e));
  RGI_TRY(check_waiting(g, m, RGI_R_SAVED, list, e));
  RGI_TRY(check_waiting(g, m, RGI_R_HOST, list, e));
  RGI_TRY(check_scratch(g, m, list, e));
  for (int32_t i = 0; i < m->nblock; i++) {
    const rgi_block *b = &m->block[i];
    int64_t *end = b->region == RGI_R_SAVED     ? &saved
                   : b->region == RGI_R_HOST    ? &host
                   : g->node[b->first].backward ? &backward
                                                : &forward;
    if (b->size > 0 && b->address + b->size > *end) *end = b->address + b->size;
  }
  RGI_TRY(check_size("saved", m->saved, saved, e));
  RGI_TRY(check_size("host", m->host, host, e));
  RGI_TRY(check_size("forward scratch", m->forward_scratch, forward, e));
  RGI_TRY(check_size("backward scratch", m->backward_scratch, backward, e));
  RGI_TRY(check_size("scratch", m->scratch, forward > backward ? forward : backward, e));
  RGI_TRY(check_bound("forward", m->forward_bound, m->forward_scratch, e));
  return check_bound("backward", m->backward_bound, m->backward_scratch, e);
}

rg_status rgi_memory_check(const rgi_graph *g, const rgi_memory *m, rg_error *e) {
  for (int32_t i = 0; i < m->nblock; i++) RGI_TRY(check_block(g, m, i, e));
  rgi_arena *a = rgi_arena_create(g->ctx);
  if (!a) return rgi_nomem(e);
  const size_t nt = (size_t)g->ntensor + 1, nn = (size_t)g->nnode + 1;
  facts f = {.life = rgi_alloc_n(a, nt, sizeof *f.life),
             .result = rgi_alloc_n(a, nt, sizeof *f.result),
             .block = rgi_alloc_n(a, nt, sizeof *f.block),
             .found = rgi_alloc_n(a, nt, sizeof *f.found),
             .workspace = rgi_alloc_n(a, nn, sizeof *f.workspace),
             .rooms = rgi_alloc_n(a, nn, sizeof *f.rooms)};
  const rgi_block **list = rgi_alloc_n(a, (size_t)m->nblock + 1, sizeof *list);
  rg_status status;
  if (!f.life || !f.result || !f.block || !f.found || !f.workspace || !f.rooms || !list) {
    status = rgi_nomem(e);
  } else {
    find_facts(g, m, &f);
    status = check_all(g, m, &f, list, e);
  }
  rgi_arena_destroy(a);
  return status;
}
