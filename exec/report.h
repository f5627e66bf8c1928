/* exec/report.h: shared between the files that report on plans. */
#ifndef RGI_REPORT_H
#define RGI_REPORT_H

#include "plan.h"

/* Which kernels step i takes, or NULL. */
const char *rgi_report_path(const rg_plan *plan, int32_t i);
void rgi_report_kernels(const rg_plan *plan, rgi_buf *b);
void rgi_report_dot(const rg_plan *plan, rgi_buf *b);

#endif
