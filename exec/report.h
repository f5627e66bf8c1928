/* exec/report.h: shared between the files that report on plans. */
#ifndef RGI_REPORT_H
#define RGI_REPORT_H

#include "plan.h"

/* Where the model's times come from: "measured at …; profile 0123abcd, shipped". */
void rgi_report_times(const rg_plan *plan, char *text, size_t size);
/* Which kernels step i takes, or NULL. */
const char *rgi_report_path(const rg_plan *plan, int32_t i);
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b);
/* Nothing where there is one rank (report_cp.c). */
void rgi_report_ranks(const rg_plan *plan, rgi_buf *b);
void rgi_report_ranks_json(const rg_plan *plan, rgi_buf *b);
/* RG_E_DEVICE: a block of `bytes` was refused; says what is free and which tensors are largest. */
rg_status rgi_report_no_memory(const rg_plan *plan, int64_t bytes, int64_t have, int64_t all,
                               rg_error *e);
void rgi_report_dot(const rg_plan *plan, rgi_buf *b);

#endif
