/* exec/cuda.c: see cuda.h. */
#include "cuda.h"
#include "../kernels/blas.h"
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>

rg_status rgi_cuda_status(cudaError_t code, const char *what, const char *node, rg_error *e) {
  if (code == cudaSuccess) return RG_OK;
  return rgi_fail(e, RG_E_DEVICE, NULL, node, "%s: %s (%s)", what, cudaGetErrorString(code),
                  cudaGetErrorName(code));
}

void rgi_cuda_config(const rg_launch *l, cudaStream_t stream, cudaLaunchConfig_t *config,
                     cudaLaunchAttribute *attrs) {
  *config = (cudaLaunchConfig_t){.gridDim = {l->grid[0], l->grid[1], l->grid[2]},
                                 .blockDim = {l->block[0], l->block[1], l->block[2]},
                                 .dynamicSmemBytes = l->shared,
                                 .stream = stream,
                                 .attrs = attrs};
  if (l->cluster > 1) {
    attrs[0] = (cudaLaunchAttribute){.id = cudaLaunchAttributeClusterDimension};
    attrs[0].val.clusterDim.x = l->cluster;
    attrs[0].val.clusterDim.y = attrs[0].val.clusterDim.z = 1;
    config->numAttrs = 1;
  }
}

rg_status rgi_cuda_prepare(const rg_launch *l, rg_error *e) {
  enum { UNASKED = 48 << 10 };
  struct cudaFuncAttributes has;
  if (!l->function) return rgi_fail(e, RG_E_INTERNAL, NULL, NULL, "a launch without a kernel");
  if (l->shared == 0) return RG_OK;
  RGI_TRY(
      rgi_cuda_status(cudaFuncGetAttributes(&has, l->function), "asking about a kernel", NULL, e));
  if (has.sharedSizeBytes + l->shared <= UNASKED) return RG_OK;
  const int most = (int)l->shared > has.maxDynamicSharedSizeBytes ? (int)l->shared
                                                                  : has.maxDynamicSharedSizeBytes;
  return rgi_cuda_status(
      cudaFuncSetAttribute(l->function, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
      "shared memory of a kernel", NULL, e);
}

static rg_status prepare_once(rgi_cuda_known *known, const rg_launch *l, rg_error *e) {
  const size_t at = (uintptr_t)l->function / 16 % RGI_COUNT(known->function);
  if (known->function[at] == l->function && known->shared[at] >= l->shared) return RG_OK;
  RGI_TRY(rgi_cuda_prepare(l, e));
  known->function[at] = l->function;
  known->shared[at] = l->shared;
  return RG_OK;
}

static rg_status eager_launch(rg_cuda *base, const rg_launch *l) {
  rgi_cuda_eager *x = (rgi_cuda_eager *)base;
  if (!l->grid[0] || !l->grid[1] || !l->grid[2]) return RG_OK;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute attrs[1];
  void *args[1] = {(void *)(uintptr_t)l->params};
  RGI_TRY(x->known ? prepare_once(x->known, l, base->error) : rgi_cuda_prepare(l, base->error));
  rgi_cuda_config(l, x->stream, &config, attrs);
  return rgi_cuda_status(cudaLaunchKernelExC(&config, l->function, args), "launch", NULL,
                         base->error);
}

static rg_status eager_library(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                               void *arg) {
  rgi_cuda_eager *x = (rgi_cuda_eager *)base;
  rg_status status = record(arg, x->stream);
  return status == RG_OK ? RG_OK
                         : rgi_fail(base->error, status, NULL, NULL, "a library call failed");
}

static rg_status eager_collective(rg_cuda *base, rg_status (*record)(void *arg, void *stream),
                                  void *arg) {
  rgi_cuda_eager *x = (rgi_cuda_eager *)base;
  const rg_status status = record(arg, x->stream);
  return status == RG_OK ? RG_OK : rgi_fail(base->error, status, NULL, NULL, "a collective failed");
}

static rg_status eager_copy(rg_cuda *base, const rg_copy *c) {
  const rgi_cuda_eager *x = (rgi_cuda_eager *)base;
  const enum cudaMemcpyKind kind = rgi_cuda_kind(c);
  const cudaError_t code = c->rows == 1
                               ? cudaMemcpyAsync(c->to, c->from, c->width, kind, x->stream)
                               : cudaMemcpy2DAsync(c->to, c->to_pitch, c->from, c->from_pitch,
                                                   c->width, c->rows, kind, x->stream);
  return rgi_cuda_status(code, "a copy", NULL, base->error);
}

void rgi_cuda_eager_init(rgi_cuda_eager *x, cudaStream_t stream, rg_error *e) {
  *x = (rgi_cuda_eager){.base = {.launch = eager_launch,
                                 .library = eager_library,
                                 .collective = eager_collective,
                                 .copy = eager_copy,
                                 .error = e},
                        .stream = stream};
}
void rgi_cuda_eager_done(rgi_cuda_eager *x) {
  rgk_blas_destroy(x->base.blas);
  x->base.blas = NULL;
}

rg_status rgi_cuda_device(rg_gpu *out, rg_error *e) {
  int driver = 0, runtime = 0, n = 0, id = 0, major = 0, minor = 0, sms = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                    "no NVIDIA driver is loaded; plans need none, runs do (or take "
                    "--device cpu)");
  if (driver / 1000 < runtime / 1000)
    return rgi_fail(
        e, RG_E_DEVICE, NULL, NULL,
        "the NVIDIA driver speaks CUDA %d.%d; this build needs %d.%d: update the driver",
        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  RGI_TRY(rgi_cuda_status(cudaGetDeviceCount(&n), "counting GPUs", NULL, e));
  if (n == 0)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "no GPU is visible (CUDA_VISIBLE_DEVICES?)");
  RGI_TRY(rgi_cuda_status(cudaGetDevice(&id), "asking for the GPU", NULL, e));
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, id);
  *out = (rg_gpu){.cc = major * 10 + minor, .sms = sms};
  if (out->cc < 80)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                    "the GPU has compute capability %d.%d; 8.0 or newer is needed", major, minor);
  return RG_OK;
}

rg_status rgi_cuda_about(rg_gpu *out, char *name, size_t size, int64_t *memory, rg_error *e) {
  int id = 0;
  struct cudaDeviceProp about;
  RGI_TRY(rgi_cuda_device(out, e));
  RGI_TRY(rgi_cuda_status(cudaGetDevice(&id), "asking for the GPU", NULL, e));
  RGI_TRY(rgi_cuda_status(cudaGetDeviceProperties(&about, id), "asking for the GPU", NULL, e));
  if (name) snprintf(name, size, "%s", about.name);
  *memory = (int64_t)about.totalGlobalMem;
  return RG_OK;
}

/* ms of `times` copies, the first of them left out; 0: it failed. */
static float time_copies(void *to, const void *from, size_t bytes, int times,
                         enum cudaMemcpyKind kind, const cudaEvent_t *event) {
  float ms = 0;
  bool good = cudaMemcpyAsync(to, from, bytes, kind, NULL) == cudaSuccess &&
              cudaEventRecord(event[0], NULL) == cudaSuccess;
  for (int i = 1; i < times && good; i++)
    good = cudaMemcpyAsync(to, from, bytes, kind, NULL) == cudaSuccess;
  good = good && cudaEventRecord(event[1], NULL) == cudaSuccess &&
         cudaEventSynchronize(event[1]) == cudaSuccess &&
         cudaEventElapsedTime(&ms, event[0], event[1]) == cudaSuccess;
  return good ? ms : 0;
}

void rgi_cuda_host_rate(double *gbs) {
  const size_t bytes = (size_t)64 << 20;
  const int times = 9;
  void *host = NULL, *device = NULL;
  cudaEvent_t event[2] = {NULL, NULL};
  if (cudaHostAlloc(&host, bytes, cudaHostAllocDefault) == cudaSuccess &&
      cudaMalloc(&device, bytes) == cudaSuccess && cudaEventCreate(&event[0]) == cudaSuccess &&
      cudaEventCreate(&event[1]) == cudaSuccess) {
    const float out = time_copies(host, device, bytes, times, cudaMemcpyDeviceToHost, event),
                back = time_copies(device, host, bytes, times, cudaMemcpyHostToDevice, event),
                slower = out > back ? out : back;
    if (out > 0 && back > 0) *gbs = (double)bytes * (times - 1) / ((double)slower * 1e6);
  }
  for (int i = 0; i < 2; i++)
    if (event[i]) cudaEventDestroy(event[i]);
  cudaFree(device);
  cudaFreeHost(host);
  cudaGetLastError(); /* what failed was only asked */
}

void rgi_cuda_range_push(const char *name) {
  nvtxRangePushA(name);
}
void rgi_cuda_range_pop(void) {
  nvtxRangePop();
}
