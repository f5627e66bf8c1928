/* cp/cuda_device.c: see device.h. */
#include "device.h"
#include <cuda_runtime_api.h>

static rg_status check(cudaError_t code, const char *what, rg_error *e) {
  if (code == cudaSuccess) return RG_OK;
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "%s: %s (%s)", what, cudaGetErrorString(code),
                  cudaGetErrorName(code));
}

rg_status rgi_device_mark(void **event, void *stream, rg_error *e) {
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  RGI_TRY(check(cudaStreamIsCapturing(stream, &capture), "asking about a stream", e));
  if (capture != cudaStreamCaptureStatusNone)
    return rgi_fail(e, RG_E_COMM, NULL, NULL,
                    "the stream is being captured; ranks that are threads exchange step by step");
  if (!*event)
    RGI_TRY(check(cudaEventCreateWithFlags((cudaEvent_t *)event, cudaEventDisableTiming),
                  "creating an event", e));
  return check(cudaEventRecord(*event, stream), "recording an event", e);
}

rg_status rgi_device_wait(void *event, void *stream, rg_error *e) {
  return check(cudaStreamWaitEvent(stream, event, 0), "waiting for an event", e);
}

rg_status rgi_device_copy(void *to, const void *from, size_t bytes, void *stream, rg_error *e) {
  return check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream),
               "copying between ranks", e);
}

void rgi_device_forget(void *event) {
  if (event) cudaEventDestroy(event);
}
