/* cp/device.h: what communicators do with memory of a GPU: copies and events on streams (a
 * cudaStream_t behind void *). Only called where a stream is given: never in builds without
 * nvcc. */
#ifndef RGI_CP_DEVICE_H
#define RGI_CP_DEVICE_H

#include "../graph/base.h"

#ifdef REGRAPH_CUDA
/* Marks where the stream is now; makes the event at *event if there is none. RG_E_COMM while the
 * stream is being captured: marks of others could not be waited for. */
rg_status rgi_device_mark(void **event, void *stream, rg_error *e);
/* What comes on the stream waits for the mark. */
rg_status rgi_device_wait(void *event, void *stream, rg_error *e);
rg_status rgi_device_copy(void *to, const void *from, size_t bytes, void *stream, rg_error *e);
void rgi_device_forget(void *event); /* NULL is fine */
#else
static inline rg_status rgi_device_none(rg_error *e) {
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "this build has no GPU backend");
}
static inline rg_status rgi_device_mark(void **event, void *stream, rg_error *e) {
  (void)event, (void)stream;
  return rgi_device_none(e);
}
static inline rg_status rgi_device_wait(void *event, void *stream, rg_error *e) {
  (void)event, (void)stream;
  return rgi_device_none(e);
}
static inline rg_status rgi_device_copy(void *to, const void *from, size_t bytes, void *stream,
                                        rg_error *e) {
  (void)to, (void)from, (void)bytes, (void)stream;
  return rgi_device_none(e);
}
static inline void rgi_device_forget(void *event) {
  (void)event;
}
#endif

#endif
