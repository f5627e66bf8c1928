/* tests/harness/optest_sums.c: checks that take a whole call and vary it: gradients not wanted,
 * gradients added to a sum, rows that lie gigabytes apart. */
#include "optest_internal.h"
#include <string.h>
#include <sys/mman.h>

/* Index of the in-port acc.X for the out-port d.X, or −1. */
static int sum_port(const rg_op *op, int out) {
  const char *name = op->out[out].name;
  if (strncmp(name, "d.", 2) != 0) return -1;
  for (int p = 0; p < op->nin; p++)
    if (strncmp(op->in[p].name, "acc.", 4) == 0 && strcmp(op->in[p].name + 4, name + 2) == 0)
      return p;
  return -1;
}

/* Each gradient as the only one wanted. */
static const char *check_single(ot_call *c, ot_tensor *const *all) {
  for (int i = 0; i < c->nout; i++) {
    if (!all[i]) continue;
    ot_tensor *only = ot_like(c->t, all[i], NULL);
    for (int k = 0; k < c->nout; k++) c->out[k].tensor = k == i ? only : NULL;
    const char *bad = ot_run(c, 2);
    if (bad) return bad;
    if (!ot_same_bits(only, all[i]))
      return ot_text(c->t, "%s: %s alone has other bits than with the rest", c->op->name,
                     c->op->out[c->out[i].port].name);
  }
  return NULL;
}

/* All gradients on top of random sums. */
static const char *check_added(ot_call *c, ot_tensor *const *all) {
  ot_tensor *start[OT_MAX_TENSORS], *sum[OT_MAX_TENSORS];
  int nin = c->nin;
  for (int i = 0; i < c->nout; i++) {
    c->out[i].tensor = sum[i] = NULL;
    if (!all[i]) continue;
    int port = sum_port(c->op, c->out[i].port);
    if (port < 0)
      return ot_text(c->t, "%s has no sum for %s", c->op->name, c->op->out[c->out[i].port].name);
    start[i] = ot_like(c->t, all[i], NULL);
    ot_fill_normal(c->t, start[i], 1);
    c->out[i].tensor = sum[i] = ot_like(c->t, all[i], NULL);
    ot_copy(sum[i], start[i]);
  }
  for (int i = 0; i < c->nout; i++) { /* lists keep their holes */
    int port = sum_port(c->op, c->out[i].port);
    if (port >= 0) c->in[c->nin++] = (struct binding){.port = port, .tensor = sum[i]};
  }
  const char *bad = ot_run_repeated(c, 1);
  c->nin = nin;
  if (bad) return bad;
  for (int i = 0; i < c->nout; i++) {
    if (!all[i]) continue;
    double *want = ot_get(c->t, start[i]), *gradient = ot_get(c->t, all[i]);
    for (int64_t n = 0; n < all[i]->n; n++) want[n] += gradient[n];
    double off = ot_relrms(sum[i], want, 0);
    if (!(off <= 2e-6))
      return ot_text(c->t, "%s: %s added to a sum is off by %.3g", c->op->name,
                     c->op->out[c->out[i].port].name, off);
  }
  return NULL;
}

const char *ot_check_sums(ot_call *c) {
  ot_tensor *all[OT_MAX_TENSORS];
  for (int i = 0; i < c->nout; i++) {
    all[i] = c->out[i].tensor ? ot_like_as(c->t, c->out[i].tensor, RG_F32) : NULL;
    c->out[i].tensor = all[i];
  }
  const char *bad = ot_run(c, 2);
  if (!bad) bad = check_single(c, all);
  if (!bad) bad = check_added(c, all);
  return bad;
}

/* ---- far apart ---- */

bool ot_far_possible(void) {
  size_t bytes = (size_t)64 << 30;
  void *at =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return false;
  munmap(at, bytes);
  return true;
}

static const char *stretch(ot_call *c, struct binding *list, int n) {
  for (int i = 0; i < n; i++) {
    const ot_tensor *a = list[i].tensor;
    if (!a || a->arg.rank < 2 || a->arg.dim[0] < 2) continue;
    if ((list[i].tensor = ot_far(c->t, a)) == NULL) return "no room for sparse tensors";
  }
  return NULL;
}

const char *ot_check_far(ot_call *c) {
  ot_tensor *near[OT_MAX_TENSORS];
  const char *bad = ot_run(c, 2);
  if (bad) return bad;
  for (int i = 0; i < c->nout; i++) near[i] = c->out[i].tensor;
  bad = stretch(c, c->in, c->nin);
  if (!bad) bad = stretch(c, c->out, c->nout);
  if (!bad) bad = ot_run(c, 2);
  for (int i = 0; i < c->nout && !bad; i++)
    if (near[i] && !ot_same_bits(near[i], c->out[i].tensor))
      bad = ot_text(c->t, "%s: %s has other bits where rows lie far apart", c->op->name,
                    c->op->out[c->out[i].port].name);
  return bad;
}
