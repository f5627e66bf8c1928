/* cli/timing.h: medians per node of a plan on drawn arrays, for `bench` and `tune`. */
#ifndef CLI_TIMING_H
#define CLI_TIMING_H

#include "data.h"

typedef struct timing_row {
  rg_node_time node; /* of the last run */
  rg_node_work work; /* at the lengths that were bound */
  double *ms;        /* per repeat; in ascending order once the median is taken */
  double median;
} timing_row;

typedef struct timing {
  data_set data;
  timing_row *row; /* per step */
  int nrow;
  double *forward, *backward; /* ms per repeat */
  double forward_ms, backward_ms;
} timing;

/* Draws the arrays of the cli's plan and binds them to its session; with a backward if there are
 * gradients. */
rg_status timing_prepare(cli *c, timing *t);
/* One warm-up, then medians of c->args.repeat runs; on a GPU whole directions are replayed as
 * graphs, too, if `whole`. More than `seconds` (0: no limit) and three runs are enough. */
rg_status timing_measure(cli *c, timing *t, bool whole, double seconds);
void timing_free(const cli *c, timing *t);

#endif
