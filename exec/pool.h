/* exec/pool.h: a small thread pool. One caller at a time; the caller works too.

   Promises: rgi_pool_run hands out tasks 0 … n-1 (dynamically), returns when all are done,
   allocates nothing. The same signature as rg_call.parallel, so a runner passes `rgi_pool_run` and
   the pool straight into calls.
 */
#ifndef RGI_POOL_H
#define RGI_POOL_H

#include "../graph/base.h"

typedef struct rgi_pool rgi_pool;
/* threads >= 1 counts the caller; borrows ctx. */
rg_status rgi_pool_create(const rg_context *ctx, int threads, rgi_pool **out, rg_error *e);
void rgi_pool_destroy(rgi_pool *p);
int rgi_pool_threads(const rgi_pool *p);
void rgi_pool_run(void *pool, int64_t ntask, void (*fn)(void *arg, int64_t task, int thread),
                  void *arg);

#endif
