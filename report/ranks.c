/* report/ranks.c: what a plan for several ranks adds to reports: who sends what, how long that
 * would take by the device's profile, and how well each shard mode balances. */
#include "../cp/tables.h"
#include "report.h"

/* ms on the wire alone */
static double wire_ms(const rg_plan *plan, const rgi_step *s) {
  return s->cost.wire / (plan->profile->link_gbs * 1e6);
}

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

static bool sends(const rgi_step *s) {
  return s->call.op->flags & RG_OP_COMM && s->cost.wire > 0;
}

void rgi_report_ranks(const rg_plan *plan, rgi_buf *b) {
  char human[32];
  double forward = 0, backward = 0;
  if (plan->cp.ranks <= 1) return;
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
  rgi_buf_printf(b, "  %-28s %-15s %-9s %12s %10s\n", "collective", "op", "direction",
                 "a rank sends", "wire ms");
  for (int32_t i = 0; i < plan->nstep; i++) {
    const rgi_step *s = &plan->step[i];
    if (!sends(s)) continue;
    *(i < plan->nforward ? &forward : &backward) += s->cost.wire;
    rgi_buf_printf(b, "  %-28s %-15s %-9s %12s %10.4f\n", s->call.node, s->call.op->name,
                   i < plan->nforward ? "forward" : "backward",
                   rgi_human_bytes((int64_t)s->cost.wire, human), wire_ms(plan, s));
  }
  rgi_buf_printf(b, "  on the wire   %s forward", rgi_human_bytes((int64_t)forward, human));
  rgi_buf_printf(b, ", %s backward", rgi_human_bytes((int64_t)backward, human));
  rgi_buf_printf(b, "; comm memory %s\n", rgi_human_bytes(plan->sizes.comm, human));
}

void rgi_report_ranks_json(const rg_plan *plan, rgi_buf *b) {
  const char *gap = "";
  if (plan->cp.ranks <= 1) return;
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
        b, ", \"op\": \"%s\", \"direction\": \"%s\", \"wire_bytes\": %.0f, \"wire_ms\": %.6g}",
        s->call.op->name, i < plan->nforward ? "forward" : "backward", s->cost.wire,
        wire_ms(plan, s));
    gap = ",";
  }
  rgi_buf_printf(b, "]},\n");
}
