/* exec/backend.c: which backend runs a plan, and the memory it gives callers. */
#include "session.h"
#ifdef REGRAPH_CUDA
#include "cuda.h"
#endif

#include <string.h>

#ifndef REGRAPH_CUDA
static rg_status no_cuda(rg_error *e) {
  return rgi_fail(
      e, RG_E_DEVICE, NULL, NULL,
      "this build runs on the CPU only and makes plans for a GPU; one with -DREGRAPH_CUDA=ON, "
      "which needs nvcc, runs them");
}
#endif

rg_status rgi_backend_of(const rg_plan *plan, const rgi_backend **out, rg_error *e) {
  *out = &rgi_cpu_backend;
  if (!plan) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan is NULL");
  if (!plan->cuda) return RG_OK;
#ifdef REGRAPH_CUDA
  *out = &rgi_cuda_backend;
  return RG_OK;
#else
  return no_cuda(e);
#endif
}

rg_status rg_device_check(const char *device, rg_error *e) {
  if (!device || strcmp(device, "cpu") == 0) return RG_OK;
  if (strcmp(device, "cuda") != 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "unknown device \"%s\"; expected \"cpu\" or \"cuda\"", device);
#ifdef REGRAPH_CUDA
  rg_gpu gpu;
  return rgi_cuda_device(&gpu, e);
#else
  return no_cuda(e);
#endif
}

/* ---- memory for callers ---- */

rg_status rg_memory_alloc(const rg_plan *plan, size_t bytes, void **out, rg_error *e) {
  const rgi_backend *b;
  if (!out) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the out-pointer for the memory is NULL");
  *out = NULL;
  RGI_TRY(rgi_backend_of(plan, &b, e));
  *out = b->memory.alloc(b->memory.user, bytes ? bytes : 1);
  if (*out) return RG_OK;
  return rgi_fail(e, b->on_host ? RG_E_NOMEM : RG_E_DEVICE, NULL, NULL,
                  "%zu bytes of %s memory could not be had", bytes, b->on_host ? "host" : "device");
}

void rg_memory_free(const rg_plan *plan, void *ptr) {
  const rgi_backend *b;
  if (ptr && rgi_backend_of(plan, &b, NULL) == RG_OK) b->memory.free(b->memory.user, ptr);
}

static rg_status copy(const rg_plan *plan, void *dst, const void *src, size_t bytes, bool to_host,
                      rg_error *e) {
  const rgi_backend *b;
  RGI_TRY(rgi_backend_of(plan, &b, e));
  if (bytes && (!dst || !src))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "copying from or to NULL");
  return bytes ? b->copy(dst, src, bytes, to_host, e) : RG_OK;
}

rg_status rg_memory_write(const rg_plan *plan, void *dst, const void *src, size_t bytes,
                          rg_error *e) {
  return copy(plan, dst, src, bytes, false, e);
}
rg_status rg_memory_read(const rg_plan *plan, void *dst, const void *src, size_t bytes,
                         rg_error *e) {
  return copy(plan, dst, src, bytes, true, e);
}
