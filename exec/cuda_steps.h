/* exec/cuda_steps.h: a session's steps as launches, for both ways of running them: a graph, or one
 * by one.
 *
 * `flag` is device memory of RGI_FLAG_WORDS words, 0 until something is wrong: what cleaning finds
 * in lengths is {1 + check, entry, value}, what a step finds {-1 - step, its own numbers};
 * the first of all is kept (rgk_fault of kernels.h).
 */
#ifndef RGI_CUDA_STEPS_H
#define RGI_CUDA_STEPS_H

#include "cuda.h"
#include "session.h"

enum { RGI_FLAG_WORDS = 16 };

/* The call of step i with addresses filled in; what is of no bytes and unbound gets flag's: some
 * address all the same. */
rg_call rgi_cuda_call(rg_session *s, int32_t i, int32_t *flag, rg_error *e);
/* Hands over the launches that copy and clean lengths (kernels/session.h). */
rg_status rgi_cuda_clean(rg_session *s, int32_t *flag, rg_cuda *x);

#endif
