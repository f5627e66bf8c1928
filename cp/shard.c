/* cp/shard.c: the rewrite of a forward graph for one of several ranks: what each axis 0 counts,
 * what is refused, and which form of its inputs every node gets (parts.h).
 *
 *     row-wise     on the rank's own rows, tokens or blocks; once a slot where inputs are made so
 *                  and no weight would be read twice
 *     query-wise   once a slot: the slot's queries, all keys and compressed keys, cu_seqlens_k the
 *                  batch's, q_offset the position of each piece; where queries see a window, the
 *                  slot's keys and a halo before them
 *     block-wise   once a slot: its rows and those that its blocks reach before and after them,
 *                  sequences as cp_blocks has them; rows that are not the slot's are dropped
 *     views        in the form that is asked for
 *     no tokens    as it is, on every rank
 *
 * Nothing here knows an op by its name.
 */
#include "shard.h"
#include "parts.h"
#include "tables.h"
#include <stdio.h>

enum { BOTH = RGI_SLOTS, MOST_PORTS = 64 };

static const char *pointer_of(const rgi_graph *g, const rgi_node *n) {
  return n->origin >= 0 ? g->origin[n->origin].pointer : NULL;
}

static rg_status refuse(const rgi_parts *p, const rgi_node *n, const char *port, rg_error *e,
                        const char *why) {
  char where[256];
  const char *pointer = pointer_of(p->from, n);
  snprintf(where, sizeof where, "%s%s%s", pointer ? pointer : "", port ? "/in/" : "",
           port ? port : "");
  return rgi_fail(e, RG_E_POLICY, where, n->name, "with context parallelism %s", why);
}

/* ---- what axis 0 counts ---- */

/* Is `cu` the starts of compressed rows? *tokens: those it is made of. */
static bool counts_blocks(const rgi_graph *g, int32_t cu, int32_t *tokens) {
  const int n = g->tensor[cu].producer;
  if (n < 0 || !g->node[n].op->rules || !g->node[n].op->rules->counts_blocks) return false;
  *tokens = g->node[n].in[0];
  return true;
}

/* The lengths tensor that everything with tokens has. Compressed rows that a node makes may have
 * lengths too. */
static rg_status find_lengths(rgi_parts *p, rg_error *e) {
  const rgi_graph *g = p->from;
  p->cu = -1;
  for (int t = 0; t < g->ntensor; t++) {
    const int32_t cu = g->tensor[t].seqlens;
    int32_t tokens;
    if (cu < 0) continue;
    const int n = g->tensor[t].producer;
    if (n >= 0 && counts_blocks(g, cu, &tokens)) continue;
    const char *pointer = n < 0 ? "/inputs" : pointer_of(g, &g->node[n]);
    if (g->tensor[cu].producer >= 0)
      return rgi_fail(e, RG_E_POLICY, pointer, g->tensor[t].name,
                      "with context parallelism rows of \"%s\" can't be several for each token",
                      g->tensor[t].name);
    if (p->cu >= 0 && p->cu != cu)
      return rgi_fail(
          e, RG_E_POLICY, pointer, g->tensor[t].name,
          "with context parallelism all tokens have one lengths tensor; \"%s\" is counted "
          "by \"%s\", others by \"%s\"",
          g->tensor[t].name, g->tensor[cu].name, g->tensor[p->cu].name);
    p->cu = cu;
    const int64_t rows = g->tensor[t].dim[0].c;
    if (p->rows && rows != p->rows)
      return rgi_fail(
          e, RG_E_POLICY, pointer, g->tensor[t].name,
          "with context parallelism all tokens are one axis; \"%s\" has %lld rows, others "
          "%lld",
          g->tensor[t].name, (long long)rows, (long long)p->rows);
    p->rows = rows;
  }
  if (p->cu >= 0) return RG_OK;
  return rgi_fail(
      e, RG_E_POLICY, "/inputs", NULL,
      "no tensor has sequences, so there are no tokens to share out among %d ranks; name "
      "their lengths on some node",
      p->policy->ranks);
}

static bool has_tokens(const rgi_parts *p, const rgi_node *n) {
  for (int i = 0; i < rgi_nin(n); i++)
    if (n->in[i] >= 0 && p->form[n->in[i]].axis != RGI_WHOLE) return true;
  return false;
}

static void set_axis(rgi_parts *p, const rgi_node *n, rgi_axis axis) {
  for (int i = 0; i < rgi_nout(n); i++)
    if (n->out[i] >= 0) p->form[n->out[i]].axis = axis;
}

/* A view keeps what axis 0 counts, or is refused. */
static rg_status classify_view(rgi_parts *p, const rgi_node *n, rg_error *e) {
  const rgi_graph *g = p->from;
  const int32_t x = n->in[0];
  for (int i = 0; i < rgi_nout(n); i++) {
    const rgi_tensor *y = &g->tensor[n->out[i]];
    bool kept = y->rank > 0 && rgi_dim_equal(y->dim[0], g->tensor[x].dim[0]);
    if (rgi_nin(n) == 1) kept = kept && y->stride[0] == g->tensor[x].stride[0];
    if (p->form[x].axis == RGI_TOKENS) kept = kept && y->seqlens == p->cu;
    if (!kept) return refuse(p, n, NULL, e, "a view must keep axis 0, the tokens, as it is");
  }
  set_axis(p, n, p->form[x].axis);
  return RG_OK;
}

/* The first tensor on a port with `flag`, or -1. */
static int32_t on_port(const rgi_node *n, uint32_t flag) {
  for (int q = 0; q < n->op->nin; q++)
    for (int i = n->in_begin[q]; i < n->in_begin[q + 1]; i++)
      if (n->op->in[q].flags & flag && n->in[i] >= 0) return n->in[i];
  return -1;
}
/* Does a row-wise node work on compressed rows? */
static bool over_blocks(const rgi_parts *p, const rgi_node *n) {
  const int32_t t = on_port(n, RG_PORT_ROWS);
  return n->op->flags & RG_OP_ROWWISE && t >= 0 && p->form[t].axis == RGI_BLOCKS;
}
/* Lengths of a node's keys where these are compressed rows, or -1. */
static int32_t block_lengths(const rgi_parts *p, const rgi_node *n) {
  const int32_t t = on_port(n, RG_PORT_KSEQLENS);
  int32_t tokens;
  return t >= 0 && counts_blocks(p->from, t, &tokens) && tokens == p->cu ? t : -1;
}

static rg_status check_lengths(rgi_parts *p, const rgi_node *n, int q, int32_t t, rg_error *e) {
  const rg_op *op = n->op;
  int32_t tokens;
  if (op->in[q].flags & RG_PORT_SEQLENS && over_blocks(p, n)) {
    if (op->in[q].flags & RG_PORT_OPTIONAL && counts_blocks(p->from, t, &tokens)) return RG_OK;
    return refuse(p, n, op->in[q].name, e, "rows of blocks are counted by block_starts or not");
  }
  if (t == p->cu || (op->in[q].flags & RG_PORT_KSEQLENS && t == block_lengths(p, n))) return RG_OK;
  return refuse(p, n, op->in[q].name, e, "queries and keys are the same tokens");
}

/* Ports take tokens, blocks and neither as their flags say. */
static rg_status check_ports(rgi_parts *p, const rgi_node *n, rg_error *e) {
  const rg_op *op = n->op;
  const bool over = over_blocks(p, n), keys = block_lengths(p, n) >= 0;
  for (int q = 0; q < op->nin; q++)
    if (op->in[q].flags & RG_PORT_OFFSETS && over)
      return refuse(p, n, NULL, e, "an op that counts positions takes rows of tokens");
  for (int q = 0; q < op->nin; q++)
    for (int i = n->in_begin[q]; i < n->in_begin[q + 1]; i++) {
      const uint32_t flags = op->in[q].flags;
      const int32_t t = n->in[i];
      if (t < 0) continue;
      if (flags & RG_PORT_OFFSETS)
        return refuse(p, n, op->in[q].name, e,
                      "positions follow from the ranks: leave this port out");
      if (flags & (RG_PORT_SEQLENS | RG_PORT_KSEQLENS)) {
        RGI_TRY(check_lengths(p, n, q, t, e));
        continue;
      }
      const bool block = flags & RG_PORT_BLOCKS || (flags & RG_PORT_ROWS && over) ||
                         (flags & RG_PORT_KROWS && keys);
      const rgi_axis want = block                                    ? RGI_BLOCKS
                            : flags & (RG_PORT_ROWS | RG_PORT_KROWS) ? RGI_TOKENS
                                                                     : RGI_WHOLE;
      const bool each = want == RGI_BLOCKS && rgi_blocks_are_rows(n);
      if (p->form[t].axis != want && !(each && p->form[t].axis == RGI_TOKENS))
        return refuse(p, n, op->in[q].name, e,
                      want == RGI_TOKENS   ? "this port takes rows of tokens"
                      : want == RGI_BLOCKS ? "this port takes rows of blocks"
                                           : "this port takes what all ranks have, not tokens");
    }
  return RG_OK;
}

static rg_status classify(rgi_parts *p, const rgi_node *n, rg_error *e) {
  const rg_op *op = n->op;
  const uint32_t wise = op->flags & (RG_OP_ROWWISE | RG_OP_QUERYWISE | RG_OP_BLOCKWISE);
  if (op->flags & RG_OP_COMM) return refuse(p, n, NULL, e, "a spec has no collectives of its own");
  if (!has_tokens(p, n)) return RG_OK;
  if (op->flags & RG_OP_VIEW) return classify_view(p, n, e);
  if (!wise)
    return refuse(p, n, NULL, e, "an op must say that it works row by row; this one doesn't");
  RGI_TRY(check_ports(p, n, e));
  for (int q = 0; q < op->nout; q++)
    for (int i = n->out_begin[q]; i < n->out_begin[q + 1]; i++) {
      if (n->out[i] < 0) continue;
      const bool rows = p->from->tensor[n->out[i]].seqlens == p->cu;
      const bool blocks = wise & RG_OP_BLOCKWISE || over_blocks(p, n);
      if (!blocks && !rows)
        return refuse(p, n, NULL, e, "what it makes must have the rows that it reads");
      p->form[n->out[i]].axis = blocks ? RGI_BLOCKS : RGI_TOKENS;
    }
  return RG_OK;
}

/* ---- capacity ---- */

static int64_t lcm(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

/* Chunks are multiples of every stride and hold a kernel but one row. */
static rg_status check_capacity(rgi_parts *p, rg_error *e) {
  const rgi_graph *g = p->from;
  const int64_t chunks = RGI_SLOTS * (int64_t)p->policy->ranks;
  int64_t unit = 1, least = 1;
  const char *pointer = "/inputs";
  for (int n = 0; n < g->nnode; n++) {
    const rg_op *op = g->node[n].op;
    if (!(op->flags & RG_OP_BLOCKWISE)) continue;
    const int64_t stride = g->node[n].attr[rgi_attribute(op, "stride")].i;
    const int64_t kernel = g->node[n].attr[rgi_attribute(op, "kernel")].i;
    unit = lcm(unit, stride);
    if (kernel - 1 > least) least = kernel - 1;
    pointer = pointer_of(g, &g->node[n]);
  }
  const int64_t chunk = (least + unit - 1) / unit * unit, all = chunk * chunks;
  int64_t legal = (p->rows + unit * chunks - 1) / (unit * chunks) * (unit * chunks);
  if (legal < all) legal = all;
  if (p->rows > INT32_MAX)
    return rgi_fail(e, RG_E_LIMIT, pointer, NULL, "%lld rows; context parallelism takes 2^31 - 1",
                    (long long)p->rows);
  if (p->rows == legal) return RG_OK;
  return rgi_fail(
      e, RG_E_SHAPE, pointer, NULL,
      "%lld rows do not divide among %d ranks: a rank has two chunks, each a multiple of "
      "%lld rows and no fewer than %lld; the next capacity that does is %lld",
      (long long)p->rows, p->policy->ranks, (long long)unit, (long long)chunk, (long long)legal);
}

/* ---- windows ---- */

static bool reads_keys(const rgi_node *n, int32_t t) {
  for (int q = 0; q < n->op->nin; q++)
    for (int i = n->in_begin[q]; i < n->in_begin[q + 1]; i++)
      if (n->in[i] == t && n->op->in[q].flags & (RG_PORT_KROWS | RG_PORT_BLOCKS)) return true;
  return false;
}

/* Does another node need all of the keys that node k reads? */
static bool gathered_anyhow(const rgi_parts *p, int k) {
  const rgi_node *n = &p->from->node[k];
  for (int i = 0; i < rgi_nin(n); i++)
    for (int m = 0; m < p->from->nnode && n->in[i] >= 0; m++)
      if (p->window[m].left < 0 && reads_keys(n, n->in[i]) &&
          reads_keys(&p->from->node[m], n->in[i]))
        return true;
  return false;
}

/* A node whose queries see a window reads keys out of a halo, if that is no longer than a chunk and
 * nobody else needs all keys: then these are gathered, and there for all. */
static rg_status find_windows(rgi_parts *p, rg_error *e) {
  const rgi_graph *g = p->from;
  p->window = rgi_alloc_n(p->to->arena, (size_t)g->nnode + 1, sizeof *p->window);
  rgi_arena *a = rgi_arena_create(g->ctx);
  rg_status status = p->window && a ? RG_OK : rgi_nomem(e);
  for (int i = 0; i < g->nnode && status == RG_OK; i++) {
    const rgi_node *n = &g->node[i];
    rgi_window *w = &p->window[i];
    rg_call call;
    *w = (rgi_window){-1, 1};
    if (!(n->op->flags & RG_OP_QUERYWISE) || !n->op->rules || !n->op->rules->window ||
        block_lengths(p, n) >= 0)
      continue;
    status = rgi_node_call(g, i, a, &call, e);
    call.gpu = p->gpu;
    const bool some = status == RG_OK && n->op->rules->window(&call, &w->left, &w->tile);
    w->left = some && w->left + w->tile - 1 <= p->chunk ? w->left + w->tile - 1 : -1;
  }
  rgi_arena_destroy(a);
  for (bool again = status == RG_OK; again;) {
    again = false;
    for (int i = 0; i < g->nnode; i++)
      if (p->window[i].left >= 0 && gathered_anyhow(p, i)) {
        p->window[i].left = -1;
        again = true;
      }
  }
  return status;
}

/* ---- placing ---- */

/* Input i on port q of node n, in the form that `slot` (BOTH: own) takes. */
static rg_status input(rgi_parts *p, const rgi_node *n, int q, int32_t t, int slot, int32_t *out,
                       rg_error *e) {
  const rg_op *op = n->op;
  const uint32_t flags = op->in[q].flags;
  const bool blockwise = op->flags & RG_OP_BLOCKWISE;
  const rgi_reach reach = blockwise ? rgi_part_reach(n) : (rgi_reach){0};
  if (!has_tokens(p, n)) return rgi_part_own(p, t, out, e);
  if (flags & RG_PORT_SEQLENS && blockwise) return rgi_part_blocks(p, reach, slot, out, e);
  if (flags & RG_PORT_SEQLENS) { /* rows of blocks that none has are zeros, and stay unread */
    *out = over_blocks(p, n) ? -1 : p->starts[slot];
    return RG_OK;
  }
  if (flags & RG_PORT_ROWS && blockwise)
    return rgi_part_halo(p, t, reach.left, reach.right, slot, out, e);
  if (flags & RG_PORT_ROWS)
    return slot == BOTH ? rgi_part_own(p, t, out, e) : rgi_part_slot(p, t, slot, out, e);
  const int64_t left = p->window[p->at].left;
  if (flags & RG_PORT_KROWS && left >= 0) return rgi_part_halo(p, t, left, 0, slot, out, e);
  if (flags & (RG_PORT_KROWS | RG_PORT_BLOCKS)) return rgi_part_all(p, t, out, e);
  if (flags & RG_PORT_PAIR) return rgi_part_pair(p, t, out, e);
  return rgi_part_own(p, t, out, e);
}

/* Inputs of node n for a slot, and how many each port has; ports for keys' lengths and positions
 * are bound whether the spec did or not. */
static rg_status inputs(rgi_parts *p, const rgi_node *n, int slot, int *nin, int32_t *in,
                        rg_error *e) {
  int at = 0;
  for (int q = 0; q < n->op->nin; q++) {
    const uint32_t flags = n->op->in[q].flags;
    nin[q] = n->in_begin[q + 1] - n->in_begin[q];
    if (flags & (RG_PORT_KSEQLENS | RG_PORT_OFFSETS)) {
      int32_t keys = block_lengths(p, n), pos = p->pos[slot];
      if (keys < 0)
        keys = p->cu;
      else
        RGI_TRY(rgi_part_own(p, keys, &keys, e));
      if (p->window[p->at].left >= 0)
        RGI_TRY(rgi_part_keys(p, p->window[p->at], slot, &keys, &pos, e));
      nin[q] = 1;
      in[at++] = flags & RG_PORT_OFFSETS ? pos : keys;
      continue;
    }
    for (int i = n->in_begin[q]; i < n->in_begin[q + 1]; i++, at++) {
      in[at] = -1;
      if (n->in[i] >= 0) RGI_TRY(input(p, n, q, n->in[i], slot, &in[at], e));
    }
  }
  return RG_OK;
}

/* Node n once more: for a slot, or (BOTH) for all rows that the rank has. */
static rg_status place(rgi_parts *p, const rgi_node *n, int slot, rg_error *e) {
  rgi_graph *g = p->to;
  const bool blocks = n->op->flags & RG_OP_BLOCKWISE;
  const rgi_reach reach = blocks ? rgi_part_reach(n) : (rgi_reach){0};
  int nin[MOST_PORTS], nout[MOST_PORTS];
  int32_t *in = rgi_alloc_n(g->arena, (size_t)(rgi_nin(n) + n->op->nin) + 1, sizeof *in);
  int32_t *out = rgi_alloc_n(g->arena, (size_t)rgi_nout(n) + 1, sizeof *out);
  char suffix[16] = "";
  if (!in || !out) return rgi_nomem(e);
  RGI_TRY(inputs(p, n, slot, nin, in, e));
  if (slot != BOTH) snprintf(suffix, sizeof suffix, ".s%d", slot);
  for (int q = 0; q < n->op->nout; q++) nout[q] = n->out_begin[q + 1] - n->out_begin[q];
  for (int i = 0; i < rgi_nout(n); i++) {
    const int32_t t = n->out[i];
    out[i] = t;
    if (t < 0 || slot == BOTH) continue;
    out[i] = rgi_part_tensor(p, g->tensor[t].name, blocks ? ".made" : suffix,
                             blocks || over_blocks(p, n) ? -1 : p->starts[slot]);
    if (out[i] < 0) return rgi_nomem(e);
  }
  const char *name = rgi_format(g->arena, "%s%s", n->name, suffix);
  if (!name) return rgi_nomem(e);
  RGI_TRY(rgi_part_node(p, name, n->op, n->attr, n->origin, nin, in, nout, out, e));
  g->node[g->nnode - 1].kind = n->kind;
  for (int i = 0; i < rgi_nout(n); i++) {
    const int32_t t = n->out[i];
    if (t < 0) continue;
    rgi_form *f = &p->form[t];
    f->made = f->made || slot == BOTH;
    f->slotted = slot != BOTH;
    if (slot == BOTH) continue;
    const int64_t rows = p->from->tensor[t].dim[0].c / (RGI_SLOTS * (int64_t)p->policy->ranks);
    if (blocks)
      RGI_TRY(
          rgi_part_rows(p, out[i], reach.left / reach.stride, rows, -1, ".own", &f->slot[slot], e));
    else
      f->slot[slot] = out[i];
  }
  return RG_OK;
}

/* Once a slot, so that what attention made is read where it is; but no weight twice. */
static bool by_slots(const rgi_parts *p, const rgi_node *n) {
  bool any = false;
  if (n->op->flags & (RG_OP_QUERYWISE | RG_OP_BLOCKWISE)) return true;
  for (int i = 0; i < rgi_nin(n); i++) {
    const int32_t t = n->in[i];
    if (t < 0 || p->from->tensor[t].dtype == RG_I32) continue;
    if (p->form[t].axis == RGI_WHOLE) return false;
    any = any || p->form[t].slotted;
  }
  return any;
}

static rg_status place_all(rgi_parts *p, rg_error *e) {
  for (int i = 0; i < p->from->nnode; i++) {
    const rgi_node *n = &p->from->node[i];
    p->at = i;
    if (n->op->flags & RG_OP_VIEW) continue;
    const bool tokens = has_tokens(p, n);
    if (n->op->nin > MOST_PORTS || n->op->nout > MOST_PORTS)
      return rgi_fail(e, RG_E_INTERNAL, NULL, n->name, "%s has too many ports", n->op->name);
    if (tokens && by_slots(p, n)) {
      for (int s = 0; s < RGI_SLOTS; s++) RGI_TRY(place(p, n, s, e));
    } else {
      RGI_TRY(place(p, n, BOTH, e));
    }
  }
  for (int i = 0; i < p->from->noutput; i++) {
    const rgi_io *io = &p->from->output[i];
    int32_t t;
    char pointer[160];
    p->at = p->from->tensor[io->tensor].producer;
    if (p->form[io->tensor].axis == RGI_WHOLE) {
      snprintf(pointer, sizeof pointer, "/outputs/%s", io->name);
      return rgi_fail(e, RG_E_POLICY, pointer, NULL,
                      "with context parallelism every output has tokens; \"%s\" has none",
                      io->name);
    }
    RGI_TRY(rgi_part_own(p, io->tensor, &t, e));
    p->to->output[i].sharded = true;
  }
  return RG_OK;
}

/* ---- the pass ---- */

static rg_status begin(rgi_parts *p, rg_error *e) {
  const rgi_graph *g = p->from;
  p->form = rgi_alloc_n(p->to->arena, (size_t)g->ntensor + 1, sizeof *p->form);
  if (!p->form) return rgi_nomem(e);
  RGI_TRY(find_lengths(p, e));
  for (int t = 0; t < g->ntensor; t++) {
    p->form[t] = (rgi_form){
        .self = t, .pair = -1, .slot = {-1, -1}, .all = -1, .made = g->tensor[t].producer < 0};
    if (p->form[t].made && g->tensor[t].seqlens >= 0) p->form[t].axis = RGI_TOKENS;
  }
  for (int n = 0; n < g->nnode; n++) RGI_TRY(classify(p, &g->node[n], e));
  RGI_TRY(check_capacity(p, e));
  p->chunk = p->rows / (RGI_SLOTS * (int64_t)p->policy->ranks);
  RGI_TRY(find_windows(p, e));
  /* tensors keep their ids and get their shapes anew */
  p->to->nnode = 0;
  for (int t = 0; t < g->ntensor; t++) {
    rgi_tensor *x = &p->to->tensor[t];
    if (x->producer >= 0) x->base = -1;
    x->producer = -1;
    x->seqlens = -1;
  }
  for (int i = 0; i < g->ninput; i++) {
    rgi_tensor *x = &p->to->tensor[g->input[i].tensor];
    if (p->form[g->input[i].tensor].axis != RGI_TOKENS) continue;
    x->dim[0] = rgi_dim_of(p->rows / p->policy->ranks);
    rgi_dense_strides(x);
    p->to->input[i].sharded = true;
  }
  RGI_TRY(rgi_parts_begin(p, e));
  for (int t = 0; t < g->ntensor; t++)
    if (p->form[t].axis == RGI_TOKENS) p->to->tensor[t].seqlens = p->starts[BOTH];
  return RG_OK;
}

rg_status rgi_cp_shard(const rgi_graph *g, const rgi_cp_policy *policy, const rg_gpu *gpu,
                       rgi_graph **out, int64_t *rows, rg_error *e) {
  rgi_parts p = {.policy = policy, .gpu = gpu, .from = g};
  const rgi_io *state = rgi_state_of(g, -1);
  rg_status status;
  *out = NULL;
  if (state)
    return rgi_fail(e, RG_E_POLICY, "/state", NULL,
                    "with context parallelism a graph has no state; this one has '%s'",
                    state->name);
  RGI_TRY(rgi_graph_clone(g, &p.to, e));
  RGI_GOTO(status, begin(&p, e), failed);
  RGI_GOTO(status, place_all(&p, e), failed);
  RGI_GOTO(status, rgi_compact(p.to, e), failed);
  RGI_GOTO(status, rgi_verify(p.to, "cp", e), failed);
  *rows = p.rows;
  *out = p.to;
  return RG_OK;
failed:
  rgi_graph_destroy(p.to);
  return status;
}
