/* exec/ranks.c: plans and sessions that are one of several ranks: what ranks must have in common,
 * and how the failure of one ends the runs of all. */
#include "../graph/policy.h"
#include "session.h"

/* ---- the plan ---- */

rg_status rgi_plan_ranks(rg_plan *plan, rg_error *e) {
  const char *first = NULL;
  int64_t comm = 0, ranks = plan->cp.ranks > 0 ? plan->cp.ranks : 1;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    if (!(s->call.op->flags & RG_OP_COMM)) continue;
    const int a = rgi_attribute(s->call.op, "ranks");
    const int64_t mine = a < 0 ? 1 : s->call.attr[a].i;
    if (!first && plan->cp.ranks <= 1) ranks = mine;
    if (mine != ranks)
      return rgi_fail(e, RG_E_VALUE, NULL, s->call.node,
                      "a collective of %lld ranks beside one of %lld (%s)", (long long)mine,
                      (long long)ranks, first ? first : "the policy's");
    first = s->call.node;
    if (s->comm_size > comm) comm = s->comm_size;
  }
  plan->cp.ranks = (int)ranks;
  plan->sizes.comm = comm;
  return RG_OK;
}

rg_status rgi_comm_bytes(const rgi_graph *g, int64_t *out, rg_error *e) {
  rgi_arena *a = rgi_arena_create(g->ctx);
  rg_status status = a ? RG_OK : rgi_nomem(e);
  *out = 0;
  for (int32_t n = 0; n < g->nnode && status == RG_OK; n++) {
    rg_call call;
    if (!g->node[n].op->comm_bytes) continue;
    status = rgi_node_call(g, n, a, &call, e);
    const int64_t bytes = status == RG_OK ? (int64_t)g->node[n].op->comm_bytes(&call) : 0;
    if (bytes > *out) *out = bytes;
  }
  rgi_arena_destroy(a);
  return status;
}

static void add_field(rg_plan *plan, const char *name, uint64_t hash) {
  plan->field[plan->nfield++] = (rgi_cp_field){name, hash};
}

static uint64_t hash_number(uint64_t hash, int64_t x) {
  return rgi_hash(hash, &x, sizeof x);
}

static uint64_t hash_policy(const rg_policy *p) {
  uint64_t h = RGI_HASH;
  if (!p) return h;
  h = hash_number(hash_number(hash_number(h, p->preset), p->budget), p->budget_of_saved);
  h = hash_number(hash_number(h, p->split_heads), p->split_kv);
  h = hash_number(hash_number(h, p->cp.local_weights), p->cp.wire_bf16);
  for (int i = 0; i < p->nrecompute; i++) h = rgi_hash_text(h, p->recompute[i]);
  for (int i = 0; i < p->nrule; i++)
    h = hash_number(rgi_hash_text(h, p->rule[i].name), p->rule[i].action);
  return h;
}

/* Every collective in its order: a rank that had others would wait for something else. */
static uint64_t hash_collectives(const rg_plan *plan) {
  uint64_t h = RGI_HASH;
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    if (!(s->call.op->flags & RG_OP_COMM)) continue;
    h = rgi_hash_text(rgi_hash_text(h, s->call.op->name), s->call.node);
    h = hash_number(h, s->comm_size);
  }
  return h;
}

rg_status rgi_plan_hash(rg_plan *plan, const rgi_graph *spec, const rg_policy *policy,
                        rg_error *e) {
  rgi_buf b;
  rg_text text;
  if (plan->cp.ranks <= 1) return RG_OK;
  rgi_buf_init(&b, plan->ctx);
  rgi_dump_text(spec, &b);
  RGI_TRY(rgi_buf_finish(&b, &text, e));
  uint64_t capacity = RGI_HASH, choice = RGI_HASH;
  for (int i = 0; i < plan->nfree; i++) capacity = hash_number(capacity, plan->free_value[i]);
  for (int i = 0; plan->choice && i < plan->choice->nnode; i++)
    choice = hash_number(choice, plan->choice->node[i].recomputed);
  add_field(plan, "library version", rgi_hash_text(RGI_HASH, rg_version()));
  add_field(plan, "number of ranks", hash_number(RGI_HASH, plan->cp.ranks));
  add_field(plan, "spec", rgi_hash_text(RGI_HASH, text.data));
  add_field(plan, "policy", hash_policy(policy));
  add_field(plan, "capacity", capacity);
  add_field(plan, "shard mode", hash_number(RGI_HASH, plan->cp.mode));
  add_field(
      plan, "device",
      hash_number(hash_number(hash_number(RGI_HASH, plan->cuda), plan->gpu.cc), plan->gpu.sms));
  add_field(plan, "choice of what to recompute", choice);
  add_field(plan, "list of collectives", hash_collectives(plan));
  rg_text_destroy(&text);
  return RG_OK;
}

/* ---- the session ---- */

rg_status rgi_session_agree(rg_session *s, rg_error *e) {
  const int ranks = s->plan->cp.ranks;
  rg_comm *c = s->comm;
  if (ranks <= 1 && !c) return RG_OK;
  if (!c)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "the plan is one of %d ranks; expected a communicator in the session's options",
                    ranks);
  if (c->abi != RG_OP_ABI)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the communicator is of ABI %u; this library has %d",
                    c->abi, RG_OP_ABI);
  rg_error own = {0};
  rg_status status = RG_OK;
  /* among plans for several ranks the others see which has another number of them */
  if (ranks > 1) status = rgi_cp_agree(s->plan->ctx, c, s->plan->field, s->plan->nfield, &own);
  if (status == RG_OK && c->size != ranks)
    status = rgi_fail(&own, RG_E_COMM, NULL, NULL,
                      "the plan is made for %d ranks, the communicator has %d", ranks, c->size);
  return status == RG_OK ? RG_OK : rgi_fail(e, status, NULL, NULL, "%s", own.message);
}

rg_status rgi_ranks_told(rg_comm *c, rg_status status, const rg_error *own, rg_error *e) {
  if (status == RG_OK) return RG_OK;
  if (c && c->abi == RG_OP_ABI) c->abort(c, own);
  if (e && e->status == RG_OK) *e = *own;
  return status;
}
