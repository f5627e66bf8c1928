/* recompute/mend.c: makes of a choice that takes too much one that has room, by flips. */
#include "search.h"
#include <math.h>

enum {
  FLIPS = 48, /* that a choice is mended by */
  STIRS = 4   /* a candidate, where no flip brings it nearer */
};

typedef struct point {
  int64_t figure;
  double excess; /* bytes above the room, at all places together */
  double ms;
} point;

static point look(rgi_mender *p, const uint64_t *set) {
  p->work += rgi_replay_work(p->m) * 3 / 2; /* of what hardly fits: more is made again */
  const rgi_taken x = rgi_replay_run(p->m->replay, set, p->used);
  const int64_t figure = rgi_figure(p->c, x), over = figure - p->room;
  return (point){figure,
                 over <= 0        ? 0
                 : p->c->of_saved ? (double)over
                                  : (double)rgi_replay_excess(
                                        p->m->replay, x.peak - x.saved - p->m->mem.comm - over),
                 rgi_model_ms(p->m, p->used) + x.wait_ms};
}

static void flip(uint64_t *set, int c) {
  if (rgi_has(set, c))
    rgi_drop(set, c);
  else
    rgi_put(set, c);
}

/* The flip that takes away the most bytes for its time; false: none does, within what is best. */
static bool flip_best(rgi_mender *p, uint64_t *set, point *now) {
  int best = -1;
  double most = 0;
  point then = *now;
  for (int i = 0; i < p->c->nfree; i++) {
    flip(set, p->c->free[i]);
    const point x = look(p, set);
    flip(set, p->c->free[i]);
    const double bytes = now->excess - x.excess, ms = fmax(x.ms - now->ms, 0) + 1e-3 * p->m->all_ms;
    if (x.ms >= p->best || bytes <= most * ms) continue;
    most = bytes / ms;
    best = p->c->free[i];
    then = x;
  }
  if (best < 0) return false;
  flip(set, best);
  *now = then;
  return true;
}

/* Two or three flips at once, near each other or far apart; false: none of so many brings it
 * nearer. */
static bool stir(rgi_mender *p, uint64_t *set, point *now) {
  const int n = p->c->nfree;
  for (int left = STIRS * n; left > 0; left--) {
    int of[3], count = 2 + rgi_draw(&p->random, 2),
               reach = rgi_draw(&p->random, 2) ? n
                       : n < 8                 ? n
                                               : 8;
    of[0] = rgi_draw(&p->random, n);
    for (int k = 1; k < count; k++) of[k] = (of[k - 1] + 1 + rgi_draw(&p->random, reach)) % n;
    for (int k = 0; k < count; k++) flip(set, p->c->free[of[k]]);
    const point x = look(p, set);
    const double before = now->excess;
    if (x.ms < p->best && x.excess <= before) {
      *now = x;
      if (x.excess < before) return true;
    } else {
      for (int k = 0; k < count; k++) flip(set, p->c->free[of[k]]);
    }
  }
  return false;
}

bool rgi_mend(rgi_mender *p, uint64_t *set) {
  point now = look(p, set);
  if (now.ms >= p->best) return false;
  for (int left = FLIPS; now.figure > p->room; left--)
    if (!left || (!flip_best(p, set, &now) && !stir(p, set, &now))) return false;
  for (int i = 0; i < p->c->nfree; i++) {
    const int c = p->c->free[i];
    if (!rgi_has(set, c)) continue;
    rgi_drop(set, c);
    const point x = look(p, set);
    if (x.figure > p->room || x.ms > now.ms)
      rgi_put(set, c);
    else
      now = x;
  }
  return now.ms < p->best;
}
