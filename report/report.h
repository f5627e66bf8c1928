/* report/report.h: shared between the files that report on plans.

   All of them read finished plans only. A writer that runs out of memory sets b->failed.
 */
#ifndef RGI_REPORT_H
#define RGI_REPORT_H

#include "../exec/plan.h"

enum { RGI_TIMES = 1280 };

/* Where the model's times come from (flow.c): "measured at …; profile 0123abcd, shipped". */
void rgi_report_times(const rg_plan *plan, char *text, size_t size);
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b);
/* Nothing where there is one rank (ranks.c). */
void rgi_report_ranks(const rg_plan *plan, rgi_buf *b);
void rgi_report_ranks_json(const rg_plan *plan, rgi_buf *b);
void rgi_report_json(const rg_plan *plan, rgi_buf *b);
void rgi_report_trace(const rg_plan *plan, const rg_report_options *o, rgi_buf *b);
void rgi_report_page(const rg_plan *plan, const rg_report_options *o, rgi_buf *b);
/* Are the texts that options bring what they should be? */
rg_status rgi_page_check(const rg_plan *plan, const rg_report_options *o, rg_error *e);
void rgi_report_dot(const rg_plan *plan, rgi_buf *b);

/* Shortest text a reader can rely on, with a dot whatever the locale; 0 for what JSON can't say. */
void rgi_json_number(rgi_buf *b, double x);
const char *rgi_role_key(rg_role role); /* "grad_in" */

/* ---- what flows between nodes (flow.c) ---- */

/* What becomes of a node's work, and how: bits. */
enum {
  RGI_MARK_KEPT = 1 << 0,      /* stays in saved memory for the backward */
  RGI_MARK_AGAIN = 1 << 1,     /* is given up and computed again, or computes again */
  RGI_MARK_OFFLOADED = 1 << 2, /* waits for the backward in the host's memory */
  RGI_MARK_IN_PLACE = 1 << 3,  /* writes over what it read last */
  RGI_MARK_FUSED = 1 << 4,     /* a part of a gradient that was taken apart */
  RGI_MARKS = 5
};
const char *rgi_mark_name(int bit); /* "in place" of bit 3 */

typedef struct rgi_flow {
  const rg_plan *plan;
  bool *lengths;   /* per tensor: sequence starts or positions, which every op takes */
  int32_t *step;   /* per node, or -1: a view */
  uint32_t *marks; /* per node */
  /* who reads tensor t, in order, each once: reader[begin[t] … begin[t + 1]) */
  int32_t *begin, *reader;
} rgi_flow;
/* False where memory ran out; close in either case. */
bool rgi_flow_open(rgi_flow *f, const rg_plan *plan);
void rgi_flow_close(rgi_flow *f);
/* What the caller binds this tensor as, or a buffer that it is added to; NULL: it is the plan's. */
const rg_tensor_info *rgi_flow_bound(const rg_plan *plan, int32_t tensor);

#endif
