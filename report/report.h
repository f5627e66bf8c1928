/* report/report.h: shared between the files that report on plans. */
#ifndef RGI_REPORT_H
#define RGI_REPORT_H

#include "../exec/plan.h"

/* Where the model's times come from: "measured at …; profile 0123abcd, shipped". */
void rgi_report_times(const rg_plan *plan, char *text, size_t size);
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b);
/* Nothing where there is one rank (ranks.c). */
void rgi_report_ranks(const rg_plan *plan, rgi_buf *b);
void rgi_report_ranks_json(const rg_plan *plan, rgi_buf *b);
void rgi_report_dot(const rg_plan *plan, rgi_buf *b);

#endif
