/* exec/cuda_steps.h: a session's steps as launches, for both ways of running them: a graph, or one
 * by one.
 *
 * `flag` is the device's address of words of host memory (rgk_fault of kernels.h), 0 until
 * something is wrong: what cleaning finds in lengths is {1 + check, entry, value}, what a step
 * finds {-1 - step, its own numbers}; the first of all is kept.
 */
#ifndef RGI_CUDA_STEPS_H
#define RGI_CUDA_STEPS_H

#include "cuda.h"
#include "session.h"

/* The call of step i with addresses filled in; what is of no bytes and unbound gets flag's: some
 * address all the same. */
rg_call rgi_cuda_call(rg_session *s, int32_t i, int32_t *flag, rg_error *e);
/* Hands over the launches that copy and clean lengths (kernels/session.h). */
rg_status rgi_cuda_clean(rg_session *s, int32_t *flag, rg_cuda *x);

#endif
