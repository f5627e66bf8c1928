/* tests/unit/cp_case.h: one spec on one rank and on several, the same batch shared out; results
 * compared. */
#ifndef CP_CASE_H
#define CP_CASE_H

#include "ranks_util.h"

#include <math.h>
#include <stdarg.h>

/* Rows that slot `slot` of a rank has of a tensor with `rows` rows for the batch's T. */
static inline rg_range cp_range(const buffers *whole, const rg_cp_info *cp, int rank, int slot,
                                int64_t rows) {
  rg_range r[2];
  rg_error e = {0};
  for (int i = 0; i < whole->n; i++) {
    if (!whole->info[i].seqlens) continue;
    CR_OK(rg_cp_rows(whole->data[i], (size_t)whole->info[i].dim[0], cp->capacity, cp->ranks,
                     cp->mode, rank, r, &e),
          &e);
    return (rg_range){r[slot].begin * rows / cp->capacity, r[slot].end * rows / cp->capacity};
  }
  cr_assert(false, "no sequence starts");
  return r[0];
}

/* Copies between a rank's tensors and the whole ones: to the rank, or back. */
static inline void cp_copy(const buffers *whole, a_rank *r, const rg_cp_info *cp, bool back) {
  for (int i = 0; i < r->b.n; i++) {
    const rg_tensor_info *t = &r->b.info[i];
    const bool result = t->role == RG_OUTPUT || t->role == RG_GRAD_OUT;
    if (back && !result) continue;
    char *all = buffer(whole, t->role, t->name), *mine = r->b.data[i];
    if (!t->sharded) {
      if (!back) memcpy(mine, all, (size_t)t->bytes);
      if (back)
        memcpy(all, mine, (size_t)t->bytes); /* the same on every rank: checked by cp_same */
      continue;
    }
    const int64_t rows = t->dim[0] * cp->ranks, row = t->bytes / t->dim[0];
    for (int slot = 0; slot < 2; slot++) {
      const rg_range at = cp_range(whole, cp, r->rank, slot, rows);
      char *there = all + at.begin * row, *here = mine + slot * (t->dim[0] / 2) * row;
      cr_assert_eq(at.end - at.begin, t->dim[0] / 2);
      if (back)
        memcpy(there, here, (size_t)((at.end - at.begin) * row));
      else
        memcpy(here, there, (size_t)((at.end - at.begin) * row));
    }
  }
}

/* What ranks have in common is the same on all of them, if summed. */
static inline void cp_same(const a_rank *r, int ranks) {
  for (int i = 0; i < r[0].b.n; i++)
    for (int k = 1; k < ranks; k++)
      if (!r[0].b.info[i].sharded)
        cr_assert_eq(memcmp(r[0].b.data[i], r[k].b.data[i], (size_t)r[0].b.info[i].bytes), 0,
                     "%s differs between rank 0 and %d", r[0].b.info[i].name, k);
}

/* Relative root mean square; `where` (or NULL) gets the number that is farthest off, and how many
 * are about as far. */
static inline double cp_error(const rg_tensor_info *t, const void *got, const void *want,
                              char (*where)[160]) {
  const size_t n = (size_t)t->bytes / rg_dtype_size(t->dtype);
  float *x = malloc(n * sizeof *x + 4), *y = malloc(n * sizeof *y + 4);
  rg_convert(RG_F32, x, t->dtype, got, n);
  rg_convert(RG_F32, y, t->dtype, want, n);
  double off = 0, all = 0;
  for (size_t i = 0; i < n; i++) {
    off += ((double)x[i] - y[i]) * ((double)x[i] - y[i]);
    all += (double)y[i] * y[i];
  }
  size_t worst = 0, many = 0, last = 0;
  for (size_t i = 0; i < n; i++)
    if (!(fabs((double)x[i] - y[i]) <= fabs((double)x[worst] - y[worst]))) worst = i;
  for (size_t i = 0; i < n; i++)
    if (!(fabs((double)x[i] - y[i]) < fabs((double)x[worst] - y[worst]) / 8)) many++, last = i;
  if (n && where)
    snprintf(*where, sizeof *where, "%g for %g at %zu of %zu, %zu like it, the last at %zu",
             (double)x[worst], (double)y[worst], worst, n, many, last);
  free(x), free(y);
  return all > 0 ? sqrt(off / all) : sqrt(off);
}

/* The same data through both plans. `exact` names gradients that must be bit-equal, as outputs are;
 * the others are within `most`. NULL: so are outputs. */
static inline void cp_compare(rg_context *ctx, const rg_plan *one, const rg_plan *many,
                              uint64_t seed, int64_t T, const int *lengths, const char *exact,
                              double most, const char *what) {
  const bool poison = !test_on_gpu(); /* there it would wait after every step */
  a_rank alone = {.plan = one, .poison = poison}, rank[MOST_RANKS];
  buffers want, got;
  rg_cp_info cp;
  rg_plan_cp(many, &cp);
  make_buffers(one, seed, T, lengths, &want);
  make_buffers(one, seed, T, lengths, &got);
  rg_tensor_info t;
  for (size_t i = 0; rg_plan_tensor(one, i, &t) == RG_OK; i++)
    alone.backward |= t.role == RG_GRAD_OUT;
  alone.b = want;
  run_a_rank(&alone);
  cr_assert_eq(alone.status, RG_OK, "%s: %s", what, alone.e.message);
  for (int r = 0; r < cp.ranks; r++) {
    rank[r] = (a_rank){.rank = r, .plan = many, .backward = alone.backward, .poison = poison};
    make_buffers(many, seed, T, lengths, &rank[r].b);
    cp_copy(&got, &rank[r], &cp, false);
  }
  rg_sizes z;
  rg_plan_sizes(many, &z);
  run_ranks(ctx, rank, cp.ranks, 30);
  for (int r = 0; r < cp.ranks; r++) {
    cr_assert_eq(rank[r].status, RG_OK, "%s: rank %d: %s (%s)", what, r, rank[r].e.message,
                 rank[r].e.node);
    cr_assert(poison ? rank[r].asked > z.predicted_peak : rank[r].asked == z.predicted_peak);
    cp_copy(&got, &rank[r], &cp, true);
  }
  cp_same(rank, cp.ranks);
  for (int i = 0; i < want.n; i++) {
    const rg_tensor_info *x = &want.info[i];
    const bool bits =
        exact && (x->role == RG_OUTPUT || (x->role == RG_GRAD_OUT && strstr(exact, x->name)));
    if (x->role != RG_OUTPUT && x->role != RG_GRAD_OUT) continue;
    if (bits) {
      const unsigned char *a = want.data[i], *b = got.data[i];
      int64_t k = memcmp(a, b, (size_t)x->bytes) == 0 ? x->bytes : 0;
      while (k < x->bytes && a[k] == b[k]) k++;
      cr_assert_eq(k, x->bytes, "%s: %s %s differs at byte %lld of %lld", what,
                   x->role == RG_OUTPUT ? "output" : "gradient of", x->name, (long long)k,
                   (long long)x->bytes);
    } else {
      /* a few numbers, each a sum over all rows whose terms may cancel, say little relative to
       * themselves */
      char where[160] = "";
      const double off = cp_error(x, got.data[i], want.data[i], &where);
      cr_assert(off <= most, "%s: %s %s is off by %g, more than %g: %s", what,
                x->role == RG_OUTPUT ? "output" : "gradient of", x->name, off, most, where);
    }
  }
  for (int r = 0; r < cp.ranks; r++) free_buffers(&rank[r].b);
  free_buffers(&want);
  free_buffers(&got);
}

#endif
