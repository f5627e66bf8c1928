/* ops/part.c: see part.h. */
#include "part.h"

static int in_port(const rg_call *c, const char *name, bool first) {
  const int q = first ? rgi_first_in_port(c->op, name) : -1;
  return q >= 0 ? q : rgi_in_port(c->op, name);
}
static int out_port(const rg_call *c, const char *name, bool first) {
  const int q = first ? rgi_first_out_port(c->op, name) : -1;
  return q >= 0 ? q : rgi_out_port(c->op, name);
}
static const rg_arg *input(const rg_call *c, const char *name, bool first) {
  const int in = in_port(c, name, first), out = out_port(c, name, first);
  return in >= 0 ? rg_in(c, in) : out >= 0 ? rg_out(c, out) : NULL;
}

static void part_of(const rg_call *c, const rg_op *op, bool first, rgi_part *p) {
  p->call = *c;
  p->call.op = op;
  for (int i = 0; i < op->nattr; i++) {
    const rg_attr *a = &op->attrs[i];
    const int from = rgi_attribute(c->op, a->name);
    p->attr[i] = from >= 0 ? c->attr[from] : (rg_value){.i = (int64_t)a->def, .f = a->def};
  }
  int32_t n = 0;
  for (int q = 0; q < op->nin; q++) {
    const rg_arg *x = input(c, op->in[q].name, first);
    p->in_begin[q] = n;
    if (x) p->in[n++] = *x;
  }
  p->in_begin[op->nin] = n;
  n = 0;
  for (int q = 0; q < op->nout; q++) {
    const int from = out_port(c, op->out[q].name, first);
    const rg_arg *x = from >= 0 ? rg_out(c, from) : NULL;
    p->out_begin[q] = n;
    if (x) p->out[n++] = *x;
  }
  p->out_begin[op->nout] = n;
  p->call.attr = p->attr;
  p->call.in = p->in;
  p->call.in_begin = p->in_begin;
  p->call.out = p->out;
  p->call.out_begin = p->out_begin;
}

void rgi_part_of(const rg_call *c, const rg_op *op, rgi_part *p) {
  part_of(c, op, false, p);
}
void rgi_part_of_first(const rg_call *c, const rg_op *op, rgi_part *p) {
  part_of(c, op, true, p);
}

void rgi_part_cost(const rgi_part *p, rg_cost *sum) {
  rg_cost one = {0};
  p->call.op->cost(&p->call, &one);
  sum->flops += one.flops;
  sum->exps += one.exps;
  sum->bytes += one.bytes;
}
