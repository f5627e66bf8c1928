/* exec/work.c: what a step has to do at the lengths of the batch that is bound, where the plan's
 * cost is that of its capacities: ten thousand sequences of one token are no sequence of ten
 * thousand.
 *
 * An op's cost is a function of shapes, so it is asked once a sequence, with the shapes of a call
 * that had that sequence alone, for products and exponentials; and once with all live rows for
 * bytes, since a weight is read once. An axis that no port flag calls rows (compressed keys) keeps
 * its capacity, which ops bound by what their queries see; a step without lengths works on all
 * rows. */
#include "session.h"
#include <string.h>

typedef struct starts {
  int32_t *at; /* [n + 1], as bound */
  int64_t n;   /* sequences */
} starts;

/* Where lengths stand now: as bound, where the host may look at that; else what the last forward
 * left in the saved block. NULL: nothing is bound, or no forward has been. */
static const char *find_starts(const rg_session *s, rgi_place at) {
  for (int32_t i = 0; i < s->plan->nclean && s->backend->on_host && at.bind == RGI_AT_SAVED; i++) {
    const rgi_clean *c = &s->plan->clean[i];
    if (at.offset >= c->offset && at.offset < c->offset + c->n * (int64_t)sizeof(int32_t))
      at = (rgi_place){c->bind, at.offset - c->offset};
  }
  if (at.bind >= 0) return s->bound[at.bind] ? (const char *)s->bound[at.bind] + at.offset : NULL;
  return s->current->forwarded ? rgi_session_resolve(s, at) : NULL;
}

/* The sequence starts on the port with `flag`; at NULL if none is bound there, or a node makes them
 * whose result is gone by now. Free at. */
static rg_status read_starts(rg_session *s, const rgi_step *step, uint32_t flag, starts *out,
                             rg_error *e) {
  const rg_op *op = step->call.op;
  *out = (starts){0};
  for (int p = 0; p < op->nin; p++) {
    const rg_arg *a = op->in[p].flags & flag ? rg_in(&step->call, p) : NULL;
    const rgi_place at = a ? step->place[step->call.in_begin[p]] : (rgi_place){RGI_AT_NOTHING, 0};
    if (!a || a->dim[0] < 1 || at.bind == RGI_AT_SCRATCH) continue;
    const char *from = find_starts(s, at);
    const size_t size = (size_t)((a->dim[0] - 1) * a->stride[0] + 1) * sizeof(int32_t);
    if (!from)
      return rgi_fail(e, RG_E_USAGE, NULL, step->call.node, "the node's lengths are not bound");
    if (!(out->at = rgi_malloc(s->plan->ctx, size))) return rgi_nomem(e);
    out->n = a->dim[0] - 1;
    RGI_TRY(s->backend->read(s, out->at, from, size, e));
    for (int64_t i = 1; i <= out->n; i++) out->at[i] = out->at[i * a->stride[0]];
    return RG_OK;
  }
  return RG_OK;
}

/* Rows of sequence b; lengths that break a rule count as the run took them: cut off. */
static int64_t length(const starts *x, int64_t b) {
  int64_t n = (int64_t)x->at[b + 1] - x->at[b];
  return n < 0 ? 0 : n;
}

static void resize(const rg_port *port, int nport, const int32_t *begin, rg_arg *arg, int64_t rows,
                   int64_t key_rows, int64_t sequences) {
  for (int p = 0; p < nport; p++)
    for (int32_t i = begin[p]; i < begin[p + 1]; i++) {
      const uint32_t flags = port[p].flags;
      if (arg[i].rank < 1) continue;
      const int64_t full = arg[i].dim[0];
      if (flags & RG_PORT_ROWS) arg[i].dim[0] = rows < full ? rows : full;
      if (flags & RG_PORT_KROWS) arg[i].dim[0] = key_rows < full ? key_rows : full;
      if (flags & (RG_PORT_SEQLENS | RG_PORT_KSEQLENS)) arg[i].dim[0] = sequences + 1;
      if (flags & RG_PORT_OFFSETS) arg[i].dim[0] = sequences;
    }
}

/* The op's cost for so many rows; `arg` holds a copy of the call's arguments. */
static rg_cost cost_of(const rgi_step *step, rg_arg *arg, int64_t rows, int64_t key_rows,
                       int64_t sequences) {
  rg_cost cost = {0};
  rg_call call = step->call;
  memcpy(arg, step->call.in, (size_t)step->nin * sizeof *arg);
  memcpy(arg + step->nin, step->call.out, (size_t)step->nout * sizeof *arg);
  resize(call.op->in, call.op->nin, call.in_begin, arg, rows, key_rows, sequences);
  resize(call.op->out, call.op->nout, call.out_begin, arg + step->nin, rows, key_rows, sequences);
  call.in = arg;
  call.out = arg + step->nin;
  call.op->cost(&call, &cost);
  return cost;
}

static rg_cost live_cost(const rgi_step *step, rg_arg *arg, const starts *q, const starts *k) {
  rg_cost sum = {0}, one = {0};
  int64_t rows = 0, key_rows = 0, before = -1, keys_before = -1;
  for (int64_t b = 0; b < q->n; b++) {
    const int64_t n = length(q, b), m = k->at && b < k->n ? length(k, b) : n;
    rows += n;
    key_rows += m;
    if (n == 0) continue;
    if (n != before || m != keys_before) one = cost_of(step, arg, n, m, 1);
    before = n;
    keys_before = m;
    sum.flops += one.flops;
    sum.exps += one.exps;
  }
  sum.bytes = cost_of(step, arg, rows, key_rows, q->n).bytes;
  return sum;
}

rg_status rg_session_node_work(rg_session *s, size_t i, rg_node_work *out, rg_error *e) {
  if (!s || !out || i >= (size_t)s->plan->nstep)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_session_node_work needs a session, one of its steps and a place");
  const rgi_step *step = &s->plan->step[i];
  rg_cost cost = step->cost;
  starts q = {0}, k = {0};
  rg_arg *arg = rgi_malloc(s->plan->ctx, (size_t)(step->nin + step->nout + 1) * sizeof *arg);
  rg_status status = arg ? RG_OK : rgi_nomem(e);
  if (status == RG_OK) status = read_starts(s, step, RG_PORT_SEQLENS, &q, e);
  if (status == RG_OK) status = read_starts(s, step, RG_PORT_KSEQLENS, &k, e);
  if (status == RG_OK && q.at && step->call.op->cost) cost = live_cost(step, arg, &q, &k);
  if (status == RG_OK)
    *out = (rg_node_work){.flops = cost.flops,
                          .bytes = cost.bytes,
                          .roofline_ms =
                              rgi_profile_roofline_ms(s->plan->profile, step->dtype, &cost)};
  rgi_free(s->plan->ctx, k.at);
  rgi_free(s->plan->ctx, q.at);
  rgi_free(s->plan->ctx, arg);
  return status;
}
