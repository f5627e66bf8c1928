/* report/ranks.c: what a plan for several ranks adds to reports: who sends what, how long that
 * would take by the device's profile, and how well each shard mode balances. */
#include "../cp/tables.h"
#include "report.h"
#include <string.h>

/* ms on the wire alone */
static double wire_ms(const rg_plan *plan, const rgi_step *s) {
  return s->cost.wire / (plan->profile->link_gbs * 1e6);
}

/* ---- what is exposed ---- */

/* A direction as a GPU runs it: one collective at a time, in their order; beside it one other step,
 * those that the dearest collectives wait for first. */
typedef struct race {
  const rg_plan *plan;
  int32_t from, to, first; /* first: before it all are over */
  bool *over, *begun;      /* by step */
  double *leads, dearest;  /* from … to */
} race;

static bool sends(const rgi_step *s) {
  return s->call.op->flags & RG_OP_COMM && s->cost.wire > 0;
}

static bool ready(const race *r, int32_t i) {
  if (r->begun[i]) return false;
  for (const int32_t *p = r->plan->after[i]; *p >= 0; p++)
    if (!r->over[*p]) return false;
  return true;
}

static int32_t next(race *r, bool collective) {
  int32_t best = -1;
  while (r->first < r->to && r->over[r->first]) r->first++;
  for (int32_t i = r->first; i < r->to; i++) {
    if (sends(&r->plan->step[i]) != collective || !ready(r, i)) continue;
    if (collective || rgi_leads_first(r->leads[i - r->from], r->dearest)) return i;
    if (best < 0) best = i;
  }
  return best;
}

/* Adds to exposed[i] the ms in which step i is on the wire and nothing else runs; returns the ms of
 * the whole. */
static double run_race(race *r, double *exposed) {
  const rgi_step *step = r->plan->step;
  int32_t at[2] = {-1, -1}; /* what computes, what is on the wire */
  double left[2] = {0, 0}, all = 0;
  for (;;) {
    for (int k = 0; k < 2; k++) {
      if (at[k] >= 0 || (at[k] = next(r, k)) < 0) continue;
      r->begun[at[k]] = true;
      left[k] = step[at[k]].ms;
    }
    if (at[0] < 0 && at[1] < 0) return all;
    const int k = at[0] < 0 || (at[1] >= 0 && left[1] < left[0]);
    const double ms = left[k];
    if (at[0] < 0) exposed[at[1]] += ms;
    all += ms;
    r->over[at[k]] = true;
    at[k] = -1;
    left[!k] -= ms;
  }
}

/* exposed[i] of every step, all[] of both directions; the CPU has nothing beside its steps. */
static bool expose(const rg_plan *plan, double *exposed, double all[2]) {
  const size_t n = (size_t)plan->nstep + 1;
  bool *marks = rgi_malloc(plan->ctx, 2 * n * sizeof *marks);
  double *leads = rgi_malloc(plan->ctx, n * sizeof *leads);
  const bool room = marks && leads;
  if (room) memset(marks, 0, 2 * n * sizeof *marks);
  for (int d = 0; d < 2 && room; d++) {
    const int32_t from = d ? plan->nforward : 0, to = d ? plan->nstep : plan->nforward;
    all[d] = 0;
    for (int32_t i = from; i < to; i++) {
      exposed[i] = sends(&plan->step[i]) && !plan->cuda ? plan->step[i].ms : 0;
      all[d] += plan->step[i].ms;
    }
    if (!plan->cuda) continue;
    race r = {.plan = plan,
              .from = from,
              .to = to,
              .first = from,
              .over = marks,
              .begun = marks + n,
              .leads = leads,
              .dearest = rgi_plan_leads(plan, from, to, leads)};
    all[d] = run_race(&r, exposed);
  }
  rgi_free(plan->ctx, marks);
  rgi_free(plan->ctx, leads);
  return room;
}

/* ---- balance ---- */

/* Busiest rank over the mean, for `sequences` near-equal sequences that fill the capacity; 0 where
 * it can't be told. */
static double imbalance(const rg_plan *plan, rg_cp_mode mode, int64_t sequences) {
  const int64_t T = plan->cp.capacity, ranks = plan->cp.ranks;
  int32_t *cu = rgi_malloc(plan->ctx, (size_t)(sequences + 1) * sizeof *cu);
  if (!cu) return 0;
  cu[0] = 0;
  for (int64_t b = 0; b < sequences; b++)
    cu[b + 1] = cu[b] + (int32_t)(T / sequences + (b < T % sequences));
  const double most = (double)rgi_cp_load(mode, cu, sequences, T, (int)ranks);
  const double all = (double)rgi_cp_load(mode, cu, sequences, T, 1);
  rgi_free(plan->ctx, cu);
  return all > 0 ? most * (double)ranks / all : 0;
}

static int64_t sequences_of(const rg_plan *plan) {
  for (int32_t i = 0; i < plan->nbindable; i++)
    if (plan->bindable[i].info.seqlens && plan->bindable[i].info.dim[0] > 1)
      return plan->bindable[i].info.dim[0] - 1;
  return 1;
}

static const char *mode_name(rg_cp_mode mode) {
  static const char *const name[] = {"auto", "1", "2"};
  return name[mode];
}

/* ---- the report ---- */

void rgi_report_ranks(const rg_plan *plan, rgi_buf *b) {
  char human[32];
  double sent[2] = {0, 0}, seen[2] = {0, 0}, all[2];
  if (plan->cp.ranks <= 1) return;
  double *exposed = rgi_malloc(plan->ctx, ((size_t)plan->nstep + 1) * sizeof *exposed);
  if (!exposed || !expose(plan, exposed, all)) {
    b->failed = true;
    rgi_free(plan->ctx, exposed);
    return;
  }
  rgi_buf_printf(b, "ranks         %d", plan->cp.ranks);
  if (plan->cp.capacity) {
    const int64_t n = sequences_of(plan);
    rgi_buf_printf(b, ", %lld rows each, shard mode %s\n",
                   (long long)(plan->cp.capacity / plan->cp.ranks), mode_name(plan->cp.mode));
    rgi_buf_printf(
        b,
        "  balance of %lld near-equal sequence%s: busiest rank %.3f of the mean in mode 1, "
        "%.3f in mode 2\n",
        (long long)n, n == 1 ? "" : "s", imbalance(plan, RG_CP_BLOCKS, n),
        imbalance(plan, RG_CP_ZIGZAG, n));
  } else {
    rgi_buf_printf(b, "\n");
  }
  rgi_buf_printf(b, "  %-28s %-15s %-9s %12s %10s %10s\n", "collective", "op", "direction",
                 "a rank sends", "wire ms", "exposed ms");
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    if (!sends(s)) continue;
    sent[i >= plan->nforward] += s->cost.wire;
    seen[i >= plan->nforward] += exposed[i];
    rgi_buf_printf(b, "  %-28s %-15s %-9s %12s %10.4f %10.4f\n", s->call.node, s->call.op->name,
                   i < plan->nforward ? "forward" : "backward",
                   rg_human_bytes((int64_t)s->cost.wire, human), wire_ms(plan, s), exposed[i]);
  }
  rgi_free(plan->ctx, exposed);
  for (int d = 0; d < 2; d++)
    if (all[d] > 0)
      rgi_buf_printf(b, "  exposed       %.3f of %.3f ms %s, %.2f %%, by the model\n", seen[d],
                     all[d], d ? "backward" : "forward", 100 * seen[d] / all[d]);
  rgi_buf_printf(b, "  on the wire   %s forward", rg_human_bytes((int64_t)sent[0], human));
  rgi_buf_printf(b, ", %s backward", rg_human_bytes((int64_t)sent[1], human));
  rgi_buf_printf(b, "; comm memory %s\n", rg_human_bytes(plan->sizes.comm, human));
}

void rgi_report_ranks_json(const rg_plan *plan, rgi_buf *b) {
  const char *gap = "";
  double all[2];
  if (plan->cp.ranks <= 1) return;
  double *exposed = rgi_malloc(plan->ctx, ((size_t)plan->nstep + 1) * sizeof *exposed);
  if (!exposed || !expose(plan, exposed, all)) {
    b->failed = true;
    rgi_free(plan->ctx, exposed);
    return;
  }
  rgi_buf_printf(
      b, "  \"cp\": {\"ranks\": %d, \"mode\": \"%s\", \"rows\": %lld, \"comm_bytes\": %lld,",
      plan->cp.ranks, mode_name(plan->cp.mode), (long long)plan->cp.capacity,
      (long long)plan->sizes.comm);
  if (plan->cp.capacity) {
    const int64_t n = sequences_of(plan);
    rgi_buf_printf(b, " \"balance\": {\"1\": %.6g, \"2\": %.6g},", imbalance(plan, RG_CP_BLOCKS, n),
                   imbalance(plan, RG_CP_ZIGZAG, n));
  }
  rgi_buf_printf(b, "\n    \"collectives\": [");
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    if (!sends(s)) continue;
    rgi_buf_printf(b, "%s\n      {\"name\": ", gap);
    rgi_buf_json(b, s->call.node);
    rgi_buf_printf(
        b, ", \"op\": \"%s\", \"direction\": \"%s\", \"wire_bytes\": %.0f, \"wire_ms\": %.6g",
        s->call.op->name, i < plan->nforward ? "forward" : "backward", s->cost.wire,
        wire_ms(plan, s));
    rgi_buf_printf(b, ", \"exposed_ms\": %.6g}", exposed[i]);
    gap = ",";
  }
  rgi_free(plan->ctx, exposed);
  rgi_buf_printf(b, "]},\n");
}
