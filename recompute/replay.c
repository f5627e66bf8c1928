/* recompute/replay.c: what a choice takes, without making its graph.

   Goes through the same motions as rewrite.c and memplan.c on plain arrays: which tensors backward
   reads as clones, where each clone stands, what forward no longer computes, how long every owner
   lives, which outputs take over dying inputs, and how many bytes are alive at every node. The sum
   is memplan's own lower bound of the packed peak, short of it by less than RGI_ALIGN where sizes
   are not whole multiples; memplan still has the last word. Microseconds a choice instead of
   milliseconds: this is what makes searching possible.

       place      0 … turn - 1      the forward nodes that are left
                  turn …            backward nodes, each clone directly before its first reader
       id         t                 tensor t of the graph
                  t + ntensor       its clone

   Clones read what comes back from the host where their input is away, so a copy back stands before
   the first of them; a GPU's copies then move to their windows (windows.c).
 */
#include "search.h"
#include <string.h>

typedef struct step {
  int32_t in, out; /* first of its edges; they end where the next node's begin */
  int32_t candidate;
  bool view, backward, inplace, options; /* options: has optional outputs */
  int64_t workspace, bare;               /* rounded up; bare: without optional outputs */
  double ms, bare_ms;                    /* where there are windows */
  bool copy;
} step;

struct rgi_replay {
  const rgi_graph *g;
  int32_t nt, nforward;
  step *node;                /* [nnode + 1] */
  int32_t *in, *out;         /* edges: tensors, -1: absent */
  bool *optional;            /* out edge: gone if nobody reads it */
  int32_t *owner, *producer; /* per tensor: the graph's, next to each other */
  int32_t *made, nmade;      /* tensors that forward makes: what may have a clone */
  int64_t *bytes;            /* per tensor */
  bool *caller;              /* per tensor: its owner is the caller's memory */
  bool *output; /* per tensor: its owner is a declared output, which never has a clone */
  int64_t pad;  /* most that rounding added to one block */
  int64_t reserved, comm;
  bool no_reuse, no_inplace;
  int32_t words;    /* of a set */
  int32_t *fetched; /* per tensor: what comes back of it, or -1 */
  int32_t *due;     /* per tensor that comes back: the node it is there for, with nothing computed
                       again; else -1 */
  bool windows;     /* copies move to where they begin or end */
  double wait_ms;   /* for them, with nothing computed again */
  /* of the choice at hand */
  bool *again;          /* per tensor: backward reads a clone of it */
  int32_t *stand_in;    /* per tensor: the id that backward reads in its place */
  int32_t *owner_back;  /* … and that id's owner */
  int32_t *owner_again; /* per tensor: the owner of its clone */
  bool *node_again;     /* per node: has a clone, or is a view of one */
  bool *placed;         /* per node: its clone, or what it brings back, has its place */
  bool *read;           /* per id */
  bool *forward_needed; /* per node */
  int32_t *place;       /* per node of backward's own; rgi_replay_scratch() */
  int32_t *sequence;    /* per place: node, or ~node for a clone */
  int32_t nsequence, turn;
  rgi_lane lane;
  int32_t *reordered;
  int32_t *first, *last; /* per id: places; first -1: nobody touches it */
  int32_t *own;          /* per id: the last of backward's own nodes that needs it, or -1 */
  int32_t *self;         /* per id: itself */
  int32_t *root;         /* per id: whose bytes it has taken over, itself if none */
  int32_t *end;          /* per root: the last place of all that share its bytes */
  int64_t *alive;        /* per place: what begins there less what has ended … */
  int64_t *waits;        /* … of it, clones that wait for other clones alone */
  int64_t total;         /* scratch bytes if nothing shared */
};

/* Calls that lack their optional outputs: what nobody reads is not asked for. */
static rg_status without_options(const rgi_graph *g, rgi_graph **out, rg_error *e) {
  rgi_graph *bare;
  RGI_TRY(rgi_graph_clone(g, &bare, e));
  for (int32_t k = 0; k < bare->nnode; k++) {
    const rgi_node *n = &bare->node[k];
    for (int p = 0; p < n->op->nout; p++)
      for (int32_t i = n->out_begin[p]; i < n->out_begin[p + 1]; i++)
        if (n->op->out[p].flags & RG_PORT_OPTIONAL) n->out[i] = -1;
  }
  *out = bare;
  return RG_OK;
}

static rg_status bare_workspaces(const rgi_graph *g, const rgi_memory_options *mem, int64_t *size,
                                 rg_error *e) {
  rgi_graph *bare;
  RGI_TRY(without_options(g, &bare, e));
  const rg_status status = rgi_memory_workspaces(bare, mem, size, e);
  rgi_graph_destroy(bare);
  return status;
}

/* How long everything takes, if copies run beside it. */
static rg_status find_times(rgi_replay *r, const rgi_profile *profile, rgi_arena *a, rg_error *e) {
  const rgi_graph *g = r->g;
  rgi_graph *bare;
  for (int32_t k = 0; k < g->nnode; k++) r->windows |= r->node[k].copy && profile && profile->cuda;
  if (!r->windows) return RG_OK;
  RGI_TRY(rgi_lane_open(&r->lane, 2 * (size_t)g->nnode, a, e));
  r->reordered = rgi_alloc_n(a, 2 * (size_t)g->nnode + 1, sizeof *r->reordered);
  if (!r->reordered) return rgi_nomem(e);
  RGI_TRY(without_options(g, &bare, e));
  rg_status status = RG_OK;
  for (int32_t k = 0; k < g->nnode && status == RG_OK; k++) {
    status = rgi_node_ms(g, k, profile, a, &r->node[k].ms, e);
    if (status == RG_OK) status = rgi_node_ms(bare, k, profile, a, &r->node[k].bare_ms, e);
  }
  rgi_graph_destroy(bare);
  return status;
}

/* What backward reads in place of t, by what `again` says. */
static void find_stand_in(rgi_replay *r, int32_t t) {
  const int32_t owner = r->owner[t], back = r->fetched[owner];
  /* a part of a join that has no clone itself owns its own bytes */
  r->owner_again[t] = (r->again[owner] ? owner : t) + r->nt;
  r->stand_in[t] = r->again[t] ? t + r->nt : back >= 0 ? back : t;
  r->owner_back[t] = r->again[t] ? r->owner_again[t] : r->owner[r->stand_in[t]];
}

static rg_status flatten(rgi_replay *r, const rgi_memory_options *mem, const int *candidate_of,
                         rgi_arena *a, rg_error *e) {
  const rgi_graph *g = r->g;
  int32_t nin = 0, nout = 0;
  int64_t *workspace = rgi_alloc_n(a, (size_t)g->nnode + 1, sizeof *workspace);
  int64_t *bare = rgi_alloc_n(a, (size_t)g->nnode + 1, sizeof *bare);
  if (!workspace || !bare) return rgi_nomem(e);
  RGI_TRY(rgi_memory_workspaces(g, mem, workspace, e));
  RGI_TRY(bare_workspaces(g, mem, bare, e));
  for (int32_t k = 0; k < g->nnode; k++) {
    const rgi_node *n = &g->node[k];
    step *s = &r->node[k];
    *s = (step){.in = nin, .out = nout, .candidate = -1, .backward = n->backward};
    s->view = n->op->flags & RG_OP_VIEW;
    s->inplace = rgi_memory_alike(g, k);
    s->copy = rgi_is_copy(g, k);
    s->workspace = rgi_aligned(workspace[k]);
    s->bare = rgi_aligned(bare[k]);
    if (s->workspace - workspace[k] > r->pad) r->pad = s->workspace - workspace[k];
    if (s->bare - bare[k] > r->pad) r->pad = s->bare - bare[k];
    if (!n->backward) r->nforward = k + 1;
    if (!n->backward && !s->view && n->origin >= 0 && n->kind == RGI_PRIMAL)
      s->candidate = candidate_of[n->origin];
    for (int i = 0; i < rgi_nin(n); i++) r->in[nin++] = n->in[i];
    for (int p = 0; p < n->op->nout; p++)
      for (int i = n->out_begin[p]; i < n->out_begin[p + 1]; i++) {
        r->optional[nout] = n->op->out[p].flags & RG_PORT_OPTIONAL;
        s->options |= r->optional[nout] && n->out[i] >= 0;
        r->out[nout++] = n->out[i];
      }
  }
  r->node[g->nnode] = (step){.in = nin, .out = nout};
  for (int32_t t = 0; t < g->ntensor; t++) {
    r->owner[t] = rgi_owner(g, t);
    r->producer[t] = g->tensor[t].producer;
  }
  for (int32_t i = 0; i < g->noutput; i++) r->caller[g->output[i].tensor] = true;
  for (int32_t i = 0; i < g->ninput; i++)
    if (g->input[i].want != RGI_GRAD_NONE && g->input[i].grad >= 0)
      r->caller[rgi_owner(g, g->input[i].grad)] = true;
  for (int32_t i = 0; i < g->noutput; i++) r->output[g->output[i].tensor] = true;
  for (int32_t t = 0; t < g->ntensor; t++)
    if (g->tensor[t].base < 0) {
      r->bytes[t] = rgi_bytes(&g->tensor[t]);
      const int64_t pad = rgi_aligned(r->bytes[t]) - r->bytes[t];
      if (pad > r->pad) r->pad = pad;
      /* nor is what waits in the host's memory in any block that counts */
      if (g->tensor[t].producer < 0 || g->tensor[t].host) r->caller[t] = true;
    }
  for (int32_t t = 0; t < g->ntensor; t++) r->fetched[t] = r->due[t] = -1;
  for (int32_t k = 0; k < g->nnode; k++) {
    const int t = rgi_brings_back(g, k);
    if (t < 0) continue;
    r->fetched[t] = g->node[k].out[0];
    r->due[g->node[k].out[0]] = k;
  }
  for (int32_t t = 0; t < g->ntensor; t++) {
    r->caller[t] = r->caller[rgi_owner(g, t)];
    r->output[t] = r->output[rgi_owner(g, t)];
  }
  for (int32_t t = 0; t < g->ntensor; t++) find_stand_in(r, t);
  for (int32_t id = 0; id < 2 * r->nt; id++) r->self[id] = id;
  for (int32_t i = 0; i < r->node[r->nforward].out; i++)
    if (r->out[i] >= 0) r->made[r->nmade++] = r->out[i];
  return RG_OK;
}

/* What comes back is there for backward's own node behind the copy, once that is in its place. */
static void find_due(rgi_replay *r) {
  int32_t next = -1;
  for (int32_t i = r->nsequence - 1; i >= r->turn; i--) {
    const step *s = &r->node[r->sequence[i]];
    if (!s->copy) next = r->sequence[i];
    if (s->copy && r->due[r->out[s->out]] >= 0) r->due[r->out[s->out]] = next;
  }
}

rg_status rgi_replay_create(const rgi_graph *g, const rgi_profile *profile,
                            const rgi_memory_options *mem, const int *candidate_of, int ncandidate,
                            rgi_arena *a, rgi_replay **out, rg_error *e) {
  rgi_replay *r = rgi_alloc(a, sizeof *r);
  if (!r) return rgi_nomem(e);
  *r = (rgi_replay){.g = g,
                    .nt = g->ntensor,
                    .reserved = mem->reserved,
                    .comm = mem->comm,
                    .no_reuse = mem->no_reuse};
  r->no_inplace = mem->no_inplace;
  r->words = rgi_words(ncandidate);
  size_t nn = (size_t)g->nnode + 1, nt = (size_t)g->ntensor + 1, nin = 1, nout = 1;
  for (int32_t k = 0; k < g->nnode; k++)
    nin += (size_t)rgi_nin(&g->node[k]), nout += (size_t)rgi_nout(&g->node[k]);
  r->node = rgi_alloc_n(a, nn, sizeof *r->node);
  r->in = rgi_alloc_n(a, nin, sizeof *r->in);
  r->out = rgi_alloc_n(a, nout, sizeof *r->out);
  r->optional = rgi_alloc_n(a, nout, sizeof *r->optional);
  r->owner = rgi_alloc_n(a, nt, sizeof *r->owner);
  r->producer = rgi_alloc_n(a, nt, sizeof *r->producer);
  r->bytes = rgi_alloc_n(a, nt, sizeof *r->bytes);
  r->caller = rgi_alloc_n(a, nt, sizeof *r->caller);
  r->fetched = rgi_alloc_n(a, nt, sizeof *r->fetched);
  r->due = rgi_alloc_n(a, nt, sizeof *r->due);
  r->place = rgi_alloc_n(a, nn, sizeof *r->place);
  r->output = rgi_alloc_n(a, nt, sizeof *r->output);
  r->made = rgi_alloc_n(a, nout, sizeof *r->made);
  r->again = rgi_alloc_n(a, nt, sizeof *r->again);
  r->stand_in = rgi_alloc_n(a, nt, sizeof *r->stand_in);
  r->owner_back = rgi_alloc_n(a, nt, sizeof *r->owner_back);
  r->owner_again = rgi_alloc_n(a, nt, sizeof *r->owner_again);
  r->node_again = rgi_alloc_n(a, nn, sizeof *r->node_again);
  r->placed = rgi_alloc_n(a, nn, sizeof *r->placed);
  r->read = rgi_alloc_n(a, 2 * nt, sizeof *r->read);
  r->forward_needed = rgi_alloc_n(a, nn, sizeof *r->forward_needed);
  r->sequence = rgi_alloc_n(a, 2 * nn, sizeof *r->sequence);
  r->first = rgi_alloc_n(a, 2 * nt, sizeof *r->first);
  r->last = rgi_alloc_n(a, 2 * nt, sizeof *r->last);
  r->own = rgi_alloc_n(a, 2 * nt, sizeof *r->own);
  r->self = rgi_alloc_n(a, 2 * nt, sizeof *r->self);
  r->root = rgi_alloc_n(a, 2 * nt, sizeof *r->root);
  r->end = rgi_alloc_n(a, 2 * nt, sizeof *r->end);
  r->alive = rgi_alloc_n(a, 2 * nn, sizeof *r->alive);
  r->waits = rgi_alloc_n(a, 2 * nn, sizeof *r->waits);
  if (!r->node || !r->in || !r->out || !r->optional || !r->owner || !r->producer || !r->bytes ||
      !r->caller || !r->fetched || !r->made || !r->stand_in || !r->owner_back || !r->owner_again ||
      !r->due || !r->place || !r->output || !r->again || !r->node_again || !r->placed || !r->read ||
      !r->forward_needed || !r->sequence || !r->first || !r->last || !r->own || !r->self ||
      !r->root || !r->end || !r->alive || !r->waits)
    return rgi_nomem(e);
  *out = r;
  RGI_TRY(flatten(r, mem, candidate_of, a, e));
  RGI_TRY(find_times(r, profile, a, e));
  uint64_t *none = rgi_alloc_n(a, (size_t)r->words + 1, sizeof *none);
  if (!none) return rgi_nomem(e);
  r->wait_ms = rgi_replay_run(r, none, NULL).wait_ms;
  find_due(r);
  return RG_OK;
}

/* ---- where everything stands ---- */

/* Which tensors backward reads as clones. */
static void find_clones(rgi_replay *r, const uint64_t *set) {
  for (int32_t k = 0; k < r->nforward; k++) {
    const step *s = &r->node[k];
    bool again = s->view ? s->in < s[1].in : s->candidate >= 0 && rgi_has(set, s->candidate);
    for (int32_t i = s->in; i < s[1].in && s->view && again; i++)
      again = r->in[i] >= 0 && r->again[r->in[i]];
    r->node_again[k] = again;
    for (int32_t i = s->out; i < s[1].out; i++)
      if (r->out[i] >= 0) r->again[r->out[i]] = again && !r->output[r->out[i]];
  }
  for (int32_t i = 0; i < r->nmade; i++) find_stand_in(r, r->made[i]);
}

/* Puts the clones, and the copies back, that `node`'s inputs come from at the end of the sequence,
 * and marks what is read. */
static void place_inputs(rgi_replay *r, int32_t node) {
  for (int32_t i = r->node[node].in; i < r->node[node + 1].in; i++) {
    const int32_t t = r->in[i];
    if (t < 0) continue;
    const int32_t id = r->stand_in[t];
    r->read[id] = true;
    if (id == t) continue;
    const int32_t p = r->producer[id < r->nt ? id : t];
    if (r->placed[p]) continue;
    r->placed[p] = true;
    place_inputs(r, p);
    if (!r->node[p].view) r->sequence[r->nsequence++] = id < r->nt ? p : ~p;
  }
}

/* What forward still computes, from the last node to the first. */
static void find_forward(rgi_replay *r) {
  for (int32_t k = r->nforward - 1; k >= 0; k--) {
    const step *s = &r->node[k];
    bool needed = false;
    for (int32_t i = s->out; i < s[1].out; i++)
      needed = needed || (r->out[i] >= 0 && (r->read[r->out[i]] || r->output[r->out[i]]));
    r->forward_needed[k] = needed;
    for (int32_t i = s->in; i < s[1].in && needed; i++)
      if (r->in[i] >= 0) r->read[r->in[i]] = true;
  }
}

/* ---- how long everything lives ---- */

static void touch(rgi_replay *r, int32_t id, int32_t place) {
  if (r->first[id] < 0) r->first[id] = place;
  r->last[id] = place;
}

/* Is it an optional output that nobody reads, so that the node is not asked for it? */
static bool left_out(const rgi_replay *r, int32_t i, bool clone) {
  const int32_t t = r->out[i];
  return r->optional[i] && !r->read[clone ? t + r->nt : t] && (clone || !r->caller[t]);
}

static void touch_node(rgi_replay *r, int32_t node, bool clone, int32_t place) {
  const step *s = &r->node[node];
  const int32_t *const owner = clone ? r->owner_again : r->owner;
  const bool forward = !clone && !s->backward;
  for (int32_t i = s->in; i < s[1].in; i++) {
    if (r->in[i] < 0) continue;
    const int32_t id = (forward ? r->owner : r->owner_back)[r->in[i]];
    touch(r, id, place);
    /* what may be taken over there needs no bytes beside what takes it over */
    if (!clone) r->own[id] = place - (i == s->in && s->inplace);
  }
  for (int32_t i = s->out; i < s[1].out; i++)
    if (r->out[i] >= 0 && !left_out(r, i, clone)) touch(r, owner[r->out[i]], place);
}

static bool saved(const rgi_replay *r, int32_t id) {
  return id < r->nt && r->first[id] < r->turn && r->last[id] >= r->turn;
}

static bool in_scratch(const rgi_replay *r, int32_t id) {
  return r->first[id] >= 0 && !saved(r, id) && (id >= r->nt || !r->caller[id]);
}

/* Outputs that take over the bytes of an input which dies there. */
static void share(rgi_replay *r, int32_t node, bool clone, int32_t place) {
  const step *s = &r->node[node];
  if (!s->inplace) return;
  const int32_t in = r->in[s->in];
  const int32_t from = (clone || s->backward ? r->owner_back : r->owner)[in];
  const int32_t to = r->out[s->out] + (clone ? r->nt : 0);
  if ((clone ? r->owner_again : r->owner)[r->out[s->out]] != to || !in_scratch(r, from) ||
      !in_scratch(r, to))
    return;
  if (r->last[from] != place || r->first[to] != place) return;
  const int32_t root = r->root[from];
  r->root[to] = root;
  if (r->last[to] > r->end[root]) r->end[root] = r->last[to];
  if (!clone) r->own[from] = place; /* its bytes are the output's now, and count */
}

static void each_place(rgi_replay *r, void (*f)(rgi_replay *, int32_t, bool, int32_t)) {
  for (int32_t i = 0; i < r->nsequence; i++) {
    const int32_t n = r->sequence[i];
    f(r, n < 0 ? ~n : n, n < 0, i);
  }
}

static void add_workspace(rgi_replay *r, int32_t node, bool clone, int32_t place) {
  const step *s = &r->node[node];
  int64_t bytes = s->workspace;
  for (int32_t i = s->out; i < s[1].out && s->options; i++)
    if (r->out[i] >= 0 && left_out(r, i, clone)) bytes = s->bare;
  if (!bytes) return;
  r->alive[place] += bytes;
  r->alive[place + 1] -= bytes;
  r->total += bytes;
}

/* ---- the whole ---- */

static void place_all(rgi_replay *r) {
  memset(r->placed, 0, (size_t)r->g->nnode * sizeof *r->placed);
  memset(r->read, 0, 2 * (size_t)r->nt * sizeof *r->read);
  r->nsequence = r->nforward;
  for (int32_t k = r->nforward; k < r->g->nnode; k++) {
    if (r->placed[k]) continue;
    r->placed[k] = true;
    place_inputs(r, k);
    if (!r->node[k].view) r->sequence[r->nsequence++] = k;
  }
  find_forward(r);
  r->turn = 0;
  for (int32_t k = 0; k < r->nforward; k++)
    if (!r->node[k].view && r->forward_needed[k]) r->sequence[r->turn++] = k;
  const int32_t backward = r->nsequence - r->nforward;
  memmove(r->sequence + r->turn, r->sequence + r->nforward, (size_t)backward * sizeof *r->sequence);
  r->nsequence = r->turn + backward;
}

/* Moves the copies of places first … end - 1; returns what is waited for. */
static double move_copies(rgi_replay *r, int32_t first, int32_t end, bool backward) {
  rgi_lane *w = &r->lane;
  w->n = end - first;
  for (int32_t i = 0; i < w->n; i++) {
    const int32_t n = r->sequence[first + i];
    const step *s = &r->node[n < 0 ? 0 : n];
    w->copy[i] = n >= 0 && s->copy;
    w->ms[i] = n < 0 ? 0 : s->ms;
    for (int32_t k = s->out; n >= 0 && k < s[1].out; k++)
      if (r->out[k] >= 0 && left_out(r, k, false)) w->ms[i] = s->bare_ms;
  }
  const double wait = rgi_lane_place(w, backward);
  for (int32_t i = 0; i < w->n; i++) r->reordered[i] = r->sequence[first + w->next[i]];
  memcpy(r->sequence + first, r->reordered, (size_t)w->n * sizeof *r->sequence);
  return wait;
}

/* Adds up the owners' bytes: saved ones end to end, scratch into r->alive at first and after
 * last. */
static int64_t add_owners(rgi_replay *r) {
  int64_t end = r->reserved;
  for (int32_t id = 0; id < 2 * r->nt; id++) {
    if (r->first[id] < 0 || (id < r->nt && r->caller[id])) continue;
    const int64_t bytes = r->bytes[id < r->nt ? id : id - r->nt], rounded = rgi_aligned(bytes);
    if (saved(r, id)) {
      end = rgi_aligned(end) + bytes;
    } else if (r->root[id] == id) {
      r->alive[r->first[id]] += rounded;
      r->alive[r->end[id] + 1] -= rounded;
      r->total += rounded;
    }
  }
  return end;
}

rgi_taken rgi_replay_run(rgi_replay *r, const uint64_t *set, uint64_t *used) {
  double wait = 0;
  find_clones(r, set);
  place_all(r);
  if (r->windows)
    wait = move_copies(r, 0, r->turn, false) + move_copies(r, r->turn, r->nsequence, true);
  const size_t ids = 2 * (size_t)r->nt;
  memset(r->first, -1, ids * sizeof *r->first);
  memset(r->last, -1, ids * sizeof *r->last);
  memset(r->own, -1, ids * sizeof *r->own);
  memcpy(r->root, r->self, ids * sizeof *r->root);
  each_place(r, touch_node);
  memcpy(r->end, r->last, ids * sizeof *r->end);
  if (!r->no_inplace && !r->no_reuse) each_place(r, share);
  const int32_t end = r->nsequence;
  memset(r->alive, 0, ((size_t)end + 1) * sizeof *r->alive);
  r->total = 0;
  each_place(r, add_workspace);
  rgi_taken x = {.saved = add_owners(r), .wait_ms = wait > r->wait_ms ? wait - r->wait_ms : 0};
  int64_t sum = 0, most = 0;
  for (int32_t i = 0; i < end; i++) {
    sum += r->alive[i];
    if (sum > most) most = sum, x.crowd = 0;
    x.crowd += sum == most;
    r->alive[i] = sum;
  }
  if (r->no_reuse) most = r->total;
  x.peak = x.saved + r->comm + (most > r->pad ? most - r->pad : 0);
  if (used) {
    for (int32_t w = 0; w < r->words; w++) used[w] = 0;
    for (int32_t i = r->turn; i < r->nsequence; i++)
      if (r->sequence[i] < 0) rgi_put(used, r->node[~r->sequence[i]].candidate);
  }
  return x;
}

/* Bytes that do not count at places from … to - 1. */
static void wait_for(rgi_replay *r, int64_t bytes, int32_t from, int32_t to) {
  if (from >= to) return;
  r->waits[from] += bytes;
  r->waits[to] -= bytes;
}

int64_t rgi_replay_scratch(rgi_replay *r) {
  const int32_t end = r->nsequence;
  int64_t waits = 0, most = r->pad;
  memset(r->waits, 0, ((size_t)end + 1) * sizeof *r->waits);
  for (int32_t i = r->turn; i < end; i++)
    if (r->sequence[i] >= 0) r->place[r->sequence[i]] = i;
  for (int32_t id = 0; id < 2 * r->nt; id++) {
    const bool back = id < r->nt && r->due[id] >= 0;
    if (r->first[id] < 0 || (id < r->nt && !back)) continue;
    const int64_t bytes = rgi_aligned(r->bytes[id < r->nt ? id : id - r->nt]);
    const int32_t due = back ? r->place[r->due[id]] : r->first[id], own = r->own[id] + 1;
    wait_for(r, bytes, r->first[id], due);
    wait_for(r, bytes, own > due ? own : due, r->last[id] + 1);
  }
  for (int32_t i = 0; i < end; i++) {
    waits += r->waits[i];
    if (i < r->turn || r->sequence[i] < 0 || r->node[r->sequence[i]].copy) continue;
    if (r->alive[i] - waits > most) most = r->alive[i] - waits;
  }
  return most - r->pad;
}

int64_t rgi_replay_alive(const rgi_replay *r, int32_t t) {
  int32_t i = r->turn;
  for (int32_t k = 0; i < r->nsequence; i++)
    if (r->sequence[i] >= 0 && !r->node[r->sequence[i]].copy && k++ == t) break;
  return r->alive[i] > r->pad ? r->alive[i] - r->pad : 0;
}

int64_t rgi_replay_excess(const rgi_replay *r, int64_t scratch) {
  int64_t sum = 0;
  for (int32_t i = 0; i < r->nsequence; i++)
    if (r->alive[i] - r->pad > scratch) sum += r->alive[i] - r->pad - scratch;
  return sum;
}
