/* exec/session_steps.c: what a backend asks of a session: where a step's bytes are now, and
 * whether a step kept to them. */
#include "session.h"

void *rgi_session_resolve(const rg_session *s, rgi_place at) {
  char *base = NULL;
  if (at.bind >= 0) {
    rg_role role = s->plan->bindable[at.bind].info.role;
    base = rgi_role_forward(role) ? s->current->at[at.bind] : s->bound[at.bind];
  } else if (at.bind == RGI_AT_SAVED) {
    base = s->current->data;
  } else if (at.bind == RGI_AT_SCRATCH) {
    base = s->scratch;
  } else if (at.bind == RGI_AT_HOST) {
    base = s->current->host;
  }
  return base ? base + at.offset : NULL;
}

rg_call rgi_session_call(rg_session *s, int32_t i, rg_error *e) {
  const rgi_step *step = &s->plan->step[i];
  rg_arg *arg = s->arg + step->first_arg;
  for (int32_t k = 0; k < step->nin + step->nout; k++)
    arg[k].data = rgi_session_resolve(s, step->place[k]);
  rg_call call = step->call;
  call.in = arg;
  call.out = arg + step->nin;
  call.workspace =
      step->workspace >= 0 && step->workspace_size ? s->scratch + step->workspace : NULL;
  call.error = e;
  if (call.op->flags & RG_OP_COMM) {
    call.comm = s->comm;
    call.comm_block = s->own_comm.data;
  }
  return call;
}

static rg_status check_guards(rg_session *s, const rgi_backend *reader, const rgi_owned_block *b,
                              bool *whole, rg_error *e) {
  unsigned char zone[2][RGI_GUARD];
  if (!b->memory) return RG_OK;
  RGI_TRY(reader->read(s, zone[0], b->data - RGI_GUARD, RGI_GUARD, e));
  RGI_TRY(reader->read(s, zone[1], b->data + b->size, RGI_GUARD, e));
  for (int i = 0; i < RGI_GUARD; i++)
    *whole = *whole && zone[0][i] == RGI_GUARD_BYTE && zone[1][i] == RGI_GUARD_BYTE;
  return RG_OK;
}

rg_status rgi_session_after_step(rg_session *s, int32_t i, rg_error *e) {
  const rgi_step *step = &s->plan->step[i];
  const rgi_node *node = &s->plan->graph->node[step->node];
  bool whole = true;
  RGI_TRY(check_guards(s, s->backend, &s->own_saved, &whole, e));
  RGI_TRY(check_guards(s, s->backend, &s->own_scratch, &whole, e));
  RGI_TRY(check_guards(s, s->backend, &s->own_comm, &whole, e));
  RGI_TRY(check_guards(s, &rgi_cpu_backend, &s->own_host, &whole, e));
  if (!whole)
    return rgi_fail(e, RG_E_INTERNAL, NULL, node->name, "op \"%s\" wrote outside the arena",
                    node->op->name);
  int64_t end = step->workspace + step->workspace_size;
  if (step->workspace_size && end > s->touched_scratch) s->touched_scratch = end;
  return RG_OK;
}
