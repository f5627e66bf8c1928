/* ops/cuda/columns.h: what rows.c does for ops whose kernels' headers name other maps than its
 * own. */
#ifndef RGI_CUDA_COLUMNS_H
#define RGI_CUDA_COLUMNS_H

#include "../ops.h"

/* The first columns of fp32 `sum` += `part`, which is as wide as those; then, if it is another
 * tensor, `to` = sum, or with `add` `to` += sum. */
rg_status rgi_cuda_add_columns(const rg_arg *sum, const rg_arg *part, const rg_arg *to, bool add,
                               rg_cuda *x);

#endif
