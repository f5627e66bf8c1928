/* tests/harness/optest_cuda.c: the same op tests on a GPU. With REGRAPH_TEST_DEVICE=cuda every
 * ot_run goes through cuda_steps instead of run_cpu; nothing else of a test changes. With
 * REGRAPH_TEST_RAW=1 too, outputs and workspace hold nothing before the run and the workspace has
 * no guards: compute-sanitizer is to find what guards and poison would, and reads of what was never
 * written besides. */
#include "optest_internal.h"
#include <stdlib.h>
#include <string.h>

bool ot_on_gpu(void) {
  const char *device = getenv("REGRAPH_TEST_DEVICE");
  return device && strcmp(device, "cuda") == 0;
}

#ifndef REGRAPH_CUDA

int ot_capability(void) {
  return 0;
}

const char *ot_run_gpu(ot_call *c, rg_call *call, rg_arg *in, int nin, rg_arg *out, int nout,
                       int poison) {
  (void)call, (void)in, (void)nin, (void)out, (void)nout, (void)poison;
  c->status = RG_E_DEVICE;
  return "REGRAPH_TEST_DEVICE=cuda, but this build has no CUDA";
}

#else
#include "exec/cuda.h"
#include <stdio.h>

enum { GUARD = 4096, PATTERN = 0x5c };

/* A host block and its copy on the device. */
struct mirror {
  char *host, *device;
  size_t bytes;
  bool written, owned; /* owned: the memory at `device` is its own */
};

/* Memory for tensors whose rows lie far apart: the rows of one lie between those of another. */
struct far {
  char *device;
  size_t pitch, bytes, used; /* from row to row; in all; of each row */
};
enum { FAR_POOLS = 8 };

#define CUDA(call)                                                                       \
  do {                                                                                   \
    cudaError_t code_ = (call);                                                          \
    if (code_ != cudaSuccess && !text)                                                   \
      text = ot_text(c->t, "%s: %s: %s", c->op->name, #call, cudaGetErrorString(code_)); \
  } while (0)

static bool raw(void) {
  return getenv("REGRAPH_TEST_RAW") != NULL;
}

static bool is_dense(const ot_tensor *a) {
  int64_t n = 1;
  for (int d = a->arg.rank - 1; d >= 0; n *= a->arg.dim[d--])
    if (a->arg.stride[d] != n) return false;
  return true;
}

static char *far_memory(ot_call *c, struct far *pool, size_t pitch, size_t row, int64_t rows,
                        const char **wrong) {
  const char *text = NULL;
  row = (row + 255) & ~(size_t)255;
  for (int i = 0; i < FAR_POOLS; i++) {
    struct far *f = &pool[i];
    if (!f->device) {
      f->pitch = pitch;
      f->bytes = pitch * (size_t)rows;
      CUDA(cudaMalloc((void **)&f->device, f->bytes));
    }
    if (text || f->pitch != pitch || f->bytes < pitch * (size_t)rows || f->used + row > pitch)
      continue;
    f->used += row;
    return f->device + f->used - row;
  }
  *wrong = text ? text : "no room on the GPU for rows far apart";
  return NULL;
}

/* Device address of the argument, whose block is mirrored once however many arguments look into it.
 * A tensor without a block (wrapped or far memory) is mirrored as the span of its rows. */
static const char *mirror(ot_call *c, struct mirror *m, int *n, struct far *pool,
                          const ot_tensor *a, rg_arg *arg, bool written) {
  const char *text = NULL;
  char *host = a->block;
  size_t bytes = a->bytes;
  if (!host) {
    int64_t span = 1;
    for (int d = 0; d < a->arg.rank; d++) span += (a->arg.dim[d] - 1) * a->arg.stride[d];
    host = a->arg.data;
    bytes = a->n > 0 ? (size_t)span * rg_dtype_size(a->arg.dtype) : 0;
  }
  for (int i = 0; i < *n; i++)
    if (m[i].host == host && m[i].bytes == bytes) {
      m[i].written |= written;
      arg->data = m[i].device + ((char *)a->arg.data - host);
      return NULL;
    }
  struct mirror *x = &m[(*n)++];
  *x = (struct mirror){.host = host, .bytes = bytes, .written = written, .owned = true};
  if (!a->block && a->arg.rank > 1 && bytes >= (size_t)1 << 30) {
    size_t size = rg_dtype_size(a->arg.dtype), pitch = (size_t)a->arg.stride[0] * size;
    x->owned = false;
    x->device = far_memory(c, pool, pitch, bytes - (size_t)(a->arg.dim[0] - 1) * pitch,
                           a->arg.dim[0], &text);
  } else {
    CUDA(cudaMalloc((void **)&x->device, bytes ? bytes : 256));
  }
  if (text) return text;
  size_t dense = (size_t)a->n * rg_dtype_size(a->arg.dtype),
         before = (size_t)((char *)a->arg.data - host);
  if (a->block && written && raw() && before + dense <= bytes && is_dense(a)) {
    CUDA(cudaMemcpy(x->device, host, before, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(x->device + before + dense, host + before + dense, bytes - before - dense,
                    cudaMemcpyHostToDevice));
  } else if (a->block) {
    CUDA(cudaMemcpy(x->device, host, bytes, cudaMemcpyHostToDevice));
  } else { /* row by row: what lies between may be terabytes of nothing */
    size_t size = rg_dtype_size(a->arg.dtype);
    for (int64_t r = 0; r < (a->arg.rank ? a->arg.dim[0] : 1) && a->n; r++) {
      int64_t row = 1;
      for (int d = 1; d < a->arg.rank; d++) row += (a->arg.dim[d] - 1) * a->arg.stride[d];
      size_t at = a->arg.rank ? (size_t)(r * a->arg.stride[0]) * size : 0;
      CUDA(cudaMemcpy(x->device + at, host + at, (size_t)row * size, cudaMemcpyHostToDevice));
    }
  }
  arg->data = x->device + ((char *)a->arg.data - host);
  return text;
}

static const char *fetch(ot_call *c, const struct mirror *m, const ot_tensor *a) {
  const char *text = NULL;
  if (a->block) {
    CUDA(cudaMemcpy(m->host, m->device, m->bytes, cudaMemcpyDeviceToHost));
    return text;
  }
  size_t size = rg_dtype_size(a->arg.dtype);
  for (int64_t r = 0; r < (a->arg.rank ? a->arg.dim[0] : 1) && a->n; r++) {
    int64_t row = 1;
    for (int d = 1; d < a->arg.rank; d++) row += (a->arg.dim[d] - 1) * a->arg.stride[d];
    size_t at = a->arg.rank ? (size_t)(r * a->arg.stride[0]) * size : 0;
    CUDA(cudaMemcpy(m->host + at, m->device + at, (size_t)row * size, cudaMemcpyDeviceToHost));
  }
  return text;
}

/* Mirrors the tensors of one side in the order in which optest.c flattened them. */
static const char *mirror_all(ot_call *c, struct mirror *m, int *n, struct far *pool,
                              const struct binding *list, int count, const rg_port *port, int nport,
                              rg_arg *arg, bool written) {
  int at = 0;
  for (int p = 0; p < nport; p++)
    for (int i = 0; i < count; i++) {
      if (list[i].port != p || (!list[i].tensor && !(port[p].flags & RG_PORT_LIST))) continue;
      if (list[i].tensor) {
        const char *text = mirror(c, m, n, pool, list[i].tensor, &arg[at], written);
        if (text) return text;
      }
      at++;
    }
  return NULL;
}

int ot_capability(void) {
  rg_error error = {0};
  rg_gpu gpu;
  return ot_on_gpu() && !rgi_cuda_device(&gpu, &error) ? ot_cc(gpu.cc) : 0;
}

const char *ot_run_gpu(ot_call *c, rg_call *call, rg_arg *in, int nin, rg_arg *out, int nout,
                       int poison) {
  struct mirror m[2 * OT_MAX_TENSORS];
  struct far pool[FAR_POOLS] = {0};
  rg_error error = {0};
  rg_gpu gpu;
  int n = 0;
  const char *text = NULL;
  (void)nin, (void)nout;
  if (!c->op->cuda_steps) return ot_text(c->t, "%s has no CUDA implementation", c->op->name);
  c->status = rgi_cuda_device(&gpu, &error);
  if (c->status) return ot_text(c->t, "%s", error.message);
  gpu.cc = ot_cc(gpu.cc);
  call->gpu = &gpu;
  call->error = &error;
  size_t size = c->op->workspace ? c->op->workspace(call) : 0, guard = raw() ? 0 : GUARD,
         total = raw() ? size : ((size + 255) & ~(size_t)255) + 2 * GUARD;
  char *work = NULL, *host_work = malloc(total + 1);
  if (!host_work) abort();
  text = mirror_all(c, m, &n, pool, c->in, c->nin, c->op->in, c->op->nin, in, false);
  if (!text) text = mirror_all(c, m, &n, pool, c->out, c->nout, c->op->out, c->op->nout, out, true);
  memset(host_work, PATTERN, total);
  memset(host_work + guard, poison, size);
  CUDA(cudaMalloc((void **)&work, total ? total : 256));
  if (!raw()) CUDA(cudaMemcpy(work, host_work, total, cudaMemcpyHostToDevice));
  call->in = in;
  call->out = out;
  call->workspace = work + guard;
  if (!text) {
    rgi_cuda_eager x;
    rgi_cuda_eager_init(&x, 0, &error);
    c->status = c->op->cuda_steps(call, &x.base);
    if (c->status) text = ot_text(c->t, "%s: cuda_steps: %s", c->op->name, error.message);
    CUDA(cudaDeviceSynchronize());
    rgi_cuda_eager_done(&x);
  }
  if (!text && !raw()) {
    CUDA(cudaMemcpy(host_work, work, total, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < total && !text; i++)
      if ((i < guard || i >= guard + size) && host_work[i] != PATTERN)
        text = ot_text(c->t, "%s wrote outside its workspace of %zu bytes", c->op->name, size);
  }
  for (int side = 0; side < 2; side++) { /* inputs come back too: the caller compares them */
    const struct binding *list = side ? c->out : c->in;
    for (int i = 0; i < (side ? c->nout : c->nin) && !text; i++) {
      const ot_tensor *a = list[i].tensor;
      for (int k = 0; k < n && a && !text; k++)
        if (m[k].host == (a->block ? a->block : a->arg.data)) text = fetch(c, &m[k], a);
    }
  }
  for (int i = 0; i < n; i++)
    if (m[i].owned) cudaFree(m[i].device);
  for (int i = 0; i < FAR_POOLS; i++) cudaFree(pool[i].device);
  cudaFree(work);
  free(host_work);
  if (getenv("REGRAPH_TEST_VERBOSE"))
    fprintf(stderr, "%s: %s\n", c->op->name, c->op->cuda_path ? c->op->cuda_path(call) : "?");
  return text;
}
#endif
