/* cp/cuda_nccl.c: see nccl.h. Communicators do not block: after each call NCCL is asked how it
 * stands until it has answered, so that a failure elsewhere can end the wait. No thread is inside
 * NCCL without the lock, and none may enter once the communicator is aborted.
 *
 * Around each collective the stream writes two stamps to memory of the host, captured or not: how
 * many have begun and ended. A watch looks at them: a collective that begun and does not end within
 * the deadline waits for a rank that did not come, and the meeting point finds out which. */
#include "nccl.h"
#include "../kernels/cp.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__has_include)
#if __has_include(<nccl.h>)
#include <nccl.h>
#define HAVE_NCCL 1
#endif
#endif

#ifndef HAVE_NCCL
rg_status rgi_nccl_open(rg_comm *meeting, rgi_stuck *stuck, const rg_context *ctx, double deadline,
                        rgi_nccl **out, rg_error *e) {
  (void)meeting, (void)stuck, (void)ctx, (void)deadline, (void)out;
  return rgi_fail(e, RG_E_COMM, NULL, NULL, "this build was made without nccl.h");
}
rg_status rgi_nccl_all_gather(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  (void)n, (void)send, (void)recv, (void)bytes, (void)stream;
  return rgi_fail(e, RG_E_COMM, NULL, node, "this build was made without nccl.h");
}
rg_status rgi_nccl_all_to_all(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  return rgi_nccl_all_gather(n, node, send, recv, bytes, stream, e);
}
rg_status rgi_nccl_halo(rgi_nccl *n, const char *node, const rg_halo *h, size_t bytes, void *stream,
                        rg_error *e) {
  return rgi_nccl_all_gather(n, node, h, NULL, bytes, stream, e);
}
void rgi_nccl_abort(rgi_nccl *n) {
  (void)n;
}
void rgi_nccl_close(rgi_nccl *n) {
  (void)n;
}
#else

/* MOST_CTAS: multiprocessors that collectives take from what they hide behind, and hold while they
 * wait for a rank: 32 carry up to half as much again, and cost more than that (docs/benchmarks.md,
 * "Wires of two GPUs"). */
enum { LEAST_VERSION = 21800, MOST_CTAS = 16, NAMES = 512, WATCH_MS = 50 };

#define EACH(F)         \
  F(GetVersion)         \
  F(GetUniqueId)        \
  F(GetErrorString)     \
  F(CommInitRankConfig) \
  F(CommGetAsyncError)  \
  F(CommFinalize)       \
  F(CommDestroy)        \
  F(CommAbort)          \
  F(GroupStart)         \
  F(GroupEnd)           \
  F(AllGather)          \
  F(Send)               \
  F(Recv)

static struct {
  char missing[256];
#define MEMBER(name) __typeof__(nccl##name) *name;
  EACH(MEMBER)
} nccl;
static pthread_once_t once = PTHREAD_ONCE_INIT;

struct rgi_nccl {
  const rg_context *ctx;
  rg_comm *meeting;
  rgi_stuck *stuck;
  ncclComm_t comm;
  double deadline;
  pthread_mutex_t lock; /* whoever calls NCCL; aborted, names */
  bool aborted;
  /* {begun, ended, index of the name of the one begun last}, written by the device */
  volatile int32_t *stamp;
  int32_t *stamp_on_device;
  char *name[NAMES];
  int names;
  pthread_t watch, ender;
  bool watching, ends; /* these threads run */
  pthread_mutex_t ending;
  pthread_cond_t ended;
  bool closes;
};

static void open_library(void) {
  const char *path = getenv("REGRAPH_NCCL");
  if (!path || !path[0]) path = "libnccl.so.2";
  void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!library) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(nccl.missing, sizeof nccl.missing, "%s", dlerror());
    return;
  }
#define FIND(what)                                     \
  *(void **)&nccl.what = dlsym(library, "nccl" #what); \
  if (!nccl.what) snprintf(nccl.missing, sizeof nccl.missing, "%s has no nccl" #what, path);
  EACH(FIND)
}

static rg_status cuda(cudaError_t code, const char *what, rg_error *e) {
  if (code == cudaSuccess) return RG_OK;
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "%s: %s", what, cudaGetErrorString(code));
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static void nap(void) {
  nanosleep(&(struct timespec){.tv_nsec = 100 * 1000}, NULL);
}

/* ---- calls: with the lock ---- */

/* How a call that gave `code` ends; without the lock while it waits. */
static rg_status settle(rgi_nccl *n, ncclResult_t code, const char *node, rg_error *e) {
  const double until = now() + n->deadline;
  while ((code == ncclInProgress || code == ncclSuccess) && !n->aborted) {
    ncclResult_t state = ncclSuccess;
    if (nccl.CommGetAsyncError(n->comm, &state) != ncclSuccess) state = ncclInternalError;
    code = state;
    if (code != ncclInProgress) break;
    pthread_mutex_unlock(&n->lock);
    nap();
    pthread_mutex_lock(&n->lock);
    if (now() > until)
      return rgi_fail(e, RG_E_COMM, NULL, node, "NCCL did not answer within %g s", n->deadline);
  }
  if (n->aborted) {
    const rg_status status = n->meeting->check(n->meeting, e);
    return status != RG_OK ? status
                           : rgi_fail(e, RG_E_COMM, NULL, node, "the communicator is aborted");
  }
  if (code == ncclSuccess) return RG_OK;
  return rgi_fail(e, RG_E_COMM, NULL, node, "NCCL: %s", nccl.GetErrorString(code));
}

static int name_of(rgi_nccl *n, const char *what, const char *node) {
  char text[160];
  snprintf(text, sizeof text, "%s %s", what, node);
  for (int i = 0; i < n->names; i++)
    if (strcmp(n->name[i], text) == 0) return i;
  if (n->names == NAMES) return NAMES - 1;
  const size_t size = strlen(text) + 1;
  char *copy = rgi_malloc(n->ctx, size);
  if (!copy) return n->names ? n->names - 1 : 0;
  memcpy(copy, text, size);
  n->name[n->names] = copy;
  return n->names++;
}

static rg_status stamp(const rgi_nccl *n, bool ends, int name, cudaStream_t stream, rg_error *e) {
  rgk_cp_stamp_params p = {.stamp = n->stamp_on_device, .ends = ends, .name = name};
  void *args[1] = {&p};
  return cuda(cudaLaunchKernel(rgk_cp_stamp(), (dim3){1, 1, 1}, (dim3){1, 1, 1}, args, 0, stream),
              "a stamp", e);
}

typedef ncclResult_t enqueue(rgi_nccl *n, const void *send, void *recv, const rg_halo *h,
                             size_t bytes, cudaStream_t stream);

static rg_status collective(rgi_nccl *n, enqueue *work, const char *what, const char *node,
                            const void *send, void *recv, const rg_halo *h, size_t bytes,
                            cudaStream_t stream, rg_error *e) {
  if (bytes == 0) return RG_OK;
  pthread_mutex_lock(&n->lock);
  rg_status status = n->aborted ? settle(n, ncclSuccess, node, e) : RG_OK;
  const int name = status == RG_OK ? name_of(n, what, node) : 0;
  if (status == RG_OK) status = stamp(n, false, name, stream, e);
  if (status == RG_OK) status = settle(n, work(n, send, recv, h, bytes, stream), node, e);
  if (status == RG_OK) status = stamp(n, true, name, stream, e);
  pthread_mutex_unlock(&n->lock);
  return status;
}

static ncclResult_t do_gather(rgi_nccl *n, const void *send, void *recv, const rg_halo *h,
                              size_t bytes, cudaStream_t stream) {
  (void)h;
  return nccl.AllGather(send, recv, bytes, ncclInt8, n->comm, stream);
}

static ncclResult_t do_exchange(rgi_nccl *n, const void *send, void *recv, const rg_halo *h,
                                size_t bytes, cudaStream_t stream) {
  (void)h;
  ncclResult_t code = nccl.GroupStart();
  for (int r = 0; r < n->meeting->size && code == ncclSuccess; r++) {
    const size_t at = (size_t)r * bytes;
    code = nccl.Send((const char *)send + at, bytes, ncclInt8, r, n->comm, stream);
    if (code == ncclSuccess)
      code = nccl.Recv((char *)recv + at, bytes, ncclInt8, r, n->comm, stream);
  }
  const ncclResult_t end = nccl.GroupEnd();
  return code == ncclSuccess ? end : code;
}

static ncclResult_t do_halo(rgi_nccl *n, const void *send, void *recv, const rg_halo *h,
                            size_t bytes, cudaStream_t stream) {
  (void)send, (void)recv;
  const int rank = n->meeting->rank;
  ncclResult_t code = nccl.GroupStart();
  for (int after = 0; after < 2 && code == ncclSuccess; after++) {
    const int peer = after ? rank + 1 : rank - 1;
    if (peer < 0 || peer >= n->meeting->size) continue;
    code = nccl.Send(after ? h->to_next : h->to_previous, bytes, ncclInt8, peer, n->comm, stream);
    if (code == ncclSuccess)
      code = nccl.Recv(after ? h->from_next : h->from_previous, bytes, ncclInt8, peer, n->comm,
                       stream);
  }
  const ncclResult_t end = nccl.GroupEnd();
  return code == ncclSuccess ? end : code;
}

rg_status rgi_nccl_all_gather(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  return collective(n, do_gather, "all_gather", node, send, recv, NULL, bytes, stream, e);
}
rg_status rgi_nccl_all_to_all(rgi_nccl *n, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  return collective(n, do_exchange, "all_to_all", node, send, recv, NULL, bytes, stream, e);
}
rg_status rgi_nccl_halo(rgi_nccl *n, const char *node, const rg_halo *h, size_t bytes, void *stream,
                        rg_error *e) {
  if (n->meeting->size == 1) return RG_OK;
  return collective(n, do_halo, "halo", node, NULL, NULL, h, bytes, stream, e);
}

/* ---- the watch ---- */

static void *keep_watch(void *arg) {
  rgi_nccl *n = arg;
  int32_t begun = 0;
  double since = now();
  bool told = false;
  pthread_mutex_lock(&n->ending);
  while (!n->closes) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += WATCH_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_cond_timedwait(&n->ended, &n->ending, &until);
    if (n->stamp[0] != begun || n->stamp[1] == begun) begun = n->stamp[0], since = now();
    pthread_mutex_lock(&n->lock);
    const int at = n->stamp[2];
    const char *name = at >= 0 && at < n->names ? n->name[at] : "a collective";
    ncclResult_t state = ncclSuccess;
    if (!n->aborted && nccl.CommGetAsyncError(n->comm, &state) != ncclSuccess)
      state = ncclInternalError;
    const bool broken = !n->aborted && state != ncclSuccess && state != ncclInProgress;
    const bool stuck = !n->aborted && now() - since > n->deadline;
    pthread_mutex_unlock(&n->lock);
    if (told || (!broken && !stuck)) continue;
    told = true;
    if (stuck) {
      n->stuck(n->meeting, name);
    } else {
      rg_error e = {0};
      rgi_fail(&e, RG_E_COMM, NULL, NULL, "NCCL failed on rank %d: %s (its last: %s)",
               n->meeting->rank, nccl.GetErrorString(state), name);
      n->meeting->abort(n->meeting, &e);
    }
  }
  pthread_mutex_unlock(&n->ending);
  return NULL;
}

/* ---- life ---- */

/* NCCL ends what runs on the GPU at once, and comes back when all graphs with its collectives are
 * gone. */
static void *end_all(void *comm) {
  nccl.CommAbort(comm);
  return NULL;
}

void rgi_nccl_abort(rgi_nccl *n) {
  if (!n) return;
  pthread_mutex_lock(&n->lock);
  if (!n->aborted && n->comm) n->ends = rgi_thread_start(&n->ender, end_all, n->comm) == 0;
  n->aborted = true;
  pthread_mutex_unlock(&n->lock);
}

/* Graphs of others may still be there: then the communicator is left to the thread that waits. */
static void join_ender(rgi_nccl *n) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += (time_t)n->deadline + 1;
  if (n->ends && pthread_timedjoin_np(n->ender, NULL, &until) != 0) pthread_detach(n->ender);
}

void rgi_nccl_close(rgi_nccl *n) {
  if (!n) return;
  if (n->watching) {
    pthread_mutex_lock(&n->ending);
    n->closes = true;
    pthread_cond_signal(&n->ended);
    pthread_mutex_unlock(&n->ending);
    pthread_join(n->watch, NULL);
  }
  if (n->comm && !n->aborted) {
    rg_error ignored = {0};
    pthread_mutex_lock(&n->lock);
    const rg_status status = settle(n, nccl.CommFinalize(n->comm), NULL, &ignored);
    if (status == RG_OK) nccl.CommDestroy(n->comm);
    pthread_mutex_unlock(&n->lock);
    if (status != RG_OK) rgi_nccl_abort(n);
  }
  join_ender(n);
  if (n->stamp) cudaFreeHost((void *)(uintptr_t)n->stamp);
  for (int i = 0; i < n->names; i++) rgi_free(n->ctx, n->name[i]);
  pthread_cond_destroy(&n->ended);
  pthread_mutex_destroy(&n->ending);
  pthread_mutex_destroy(&n->lock);
  rgi_free(n->ctx, n);
}

typedef struct greeting {
  int32_t version, device; /* device: its number in this process */
  cudaUUID_t gpu;
  ncclUniqueId id;
} greeting;

/* The first rank that is on r's GPU, where that is not r itself; else -1. */
static int shares_gpu(const greeting *all, int r) {
  for (int other = 0; other < r; other++)
    if (memcmp(&all[other].gpu, &all[r].gpu, sizeof all[r].gpu) == 0) return other;
  return -1;
}

/* Rank 0's id for all; the same library everywhere, a GPU for each. */
static rg_status greet(rg_comm *meeting, const rg_context *ctx, ncclUniqueId *id, rg_error *e) {
  greeting mine = {0};
  int version = 0;
  nccl.GetVersion(&version);
  mine.version = version;
  if (version < LEAST_VERSION)
    return rgi_fail(e, RG_E_COMM, NULL, NULL, "NCCL is of version %d.%d.%d; expected 2.18 or later",
                    version / 10000, version / 100 % 100, version % 100);
  struct cudaDeviceProp gpu;
  int device = 0;
  RGI_TRY(cuda(cudaGetDevice(&device), "which GPU is taken", e));
  RGI_TRY(cuda(cudaGetDeviceProperties(&gpu, device), "what GPU that is", e));
  mine.device = device;
  mine.gpu = gpu.uuid;
  if (meeting->rank == 0 && nccl.GetUniqueId(&mine.id) != ncclSuccess)
    return rgi_fail(e, RG_E_COMM, NULL, NULL, "NCCL makes no id for its ranks");
  greeting *all = rgi_malloc(ctx, (size_t)meeting->size * sizeof *all);
  if (!all) return rgi_nomem(e);
  rg_status status = meeting->all_gather(meeting, "NCCL's start", &mine, all, sizeof mine, NULL, e);
  for (int r = 1; r < meeting->size && status == RG_OK; r++)
    if (all[r].version != all[0].version)
      status = rgi_fail(e, RG_E_COMM, NULL, NULL,
                        "rank %d has NCCL %d.%d.%d, rank 0 %d.%d.%d: another library version", r,
                        all[r].version / 10000, all[r].version / 100 % 100, all[r].version % 100,
                        all[0].version / 10000, all[0].version / 100 % 100, all[0].version % 100);
  for (int r = 1; r < meeting->size && status == RG_OK; r++)
    if (shares_gpu(all, r) >= 0)
      status =
          rgi_fail(e, RG_E_COMM, NULL, NULL,
                   "ranks %d and %d are on one GPU (cuda:%d of rank %d); expected one for each "
                   "rank: LOCAL_RANK and CUDA_VISIBLE_DEVICES choose it; ranks that share one "
                   "run as threads (--cp without a launcher)",
                   shares_gpu(all, r), r, all[r].device, r);
  if (status == RG_OK) *id = all[0].id;
  rgi_free(ctx, all);
  return status;
}

/* Each kind once, not captured: connections are made at the first use. */
static rg_status warm_up(rgi_nccl *n, rg_error *e) {
  const size_t piece = 256, all = piece * (size_t)n->meeting->size;
  char *memory = NULL;
  cudaStream_t stream = NULL;
  rg_status status = cuda(cudaMalloc((void **)&memory, 2 * all + 4 * piece), "memory", e);
  if (status == RG_OK)
    status = cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream", e);
  const rg_halo h = {memory, memory + piece, memory + 2 * piece, memory + 3 * piece};
  char *send = memory + 4 * piece, *recv = send + all;
  if (status == RG_OK) status = rgi_nccl_all_gather(n, "start-up", send, recv, piece, stream, e);
  if (status == RG_OK) status = rgi_nccl_all_to_all(n, "start-up", send, recv, piece, stream, e);
  if (status == RG_OK) status = rgi_nccl_halo(n, "start-up", &h, piece, stream, e);
  for (const double until = now() + n->deadline; status == RG_OK;) {
    const cudaError_t code = cudaStreamQuery(stream);
    if (code == cudaSuccess) break;
    if (code != cudaErrorNotReady) status = cuda(code, "NCCL's first collectives", e);
    if (n->aborted) status = n->meeting->check(n->meeting, e);
    if (status == RG_OK && now() > until)
      status = rgi_fail(e, RG_E_COMM, NULL, NULL,
                        "NCCL's first collectives did not end within %g s", n->deadline);
    nap();
  }
  if (stream) cudaStreamDestroy(stream);
  if (memory && status == RG_OK) cudaFree(memory); /* else it would wait for what hangs */
  return status;
}

rg_status rgi_nccl_open(rg_comm *meeting, rgi_stuck *stuck, const rg_context *ctx, double deadline,
                        rgi_nccl **out, rg_error *e) {
  ncclUniqueId id;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  pthread_once(&once, open_library);
  if (nccl.missing[0])
    return rgi_fail(e, RG_E_COMM, NULL, NULL,
                    "NCCL is needed for several GPUs and was not found (%s); install libnccl2 or "
                    "nvidia-nccl, or name the file in REGRAPH_NCCL",
                    nccl.missing);
  RGI_TRY(greet(meeting, ctx, &id, e));
  rgi_nccl *n = rgi_malloc(ctx, sizeof *n);
  if (!n) return rgi_nomem(e);
  *n = (rgi_nccl){.ctx = ctx, .meeting = meeting, .stuck = stuck, .deadline = deadline};
  *out = n; /* from here on closed by the meeting */
  pthread_mutex_init(&n->lock, NULL);
  pthread_mutex_init(&n->ending, NULL);
  pthread_cond_init(&n->ended, NULL);
  RGI_TRY(cuda(cudaHostAlloc((void **)(uintptr_t)&n->stamp, 64, cudaHostAllocMapped), "memory", e));
  memset((void *)(uintptr_t)n->stamp, 0, 64);
  RGI_TRY(
      cuda(cudaHostGetDevicePointer((void **)&n->stamp_on_device, (void *)(uintptr_t)n->stamp, 0),
           "memory", e));
  config.blocking = 0;
  config.maxCTAs = MOST_CTAS;
  pthread_mutex_lock(&n->lock);
  const ncclResult_t code =
      nccl.CommInitRankConfig(&n->comm, meeting->size, id, meeting->rank, &config);
  const rg_status status = settle(n, code, NULL, e);
  pthread_mutex_unlock(&n->lock);
  RGI_TRY(status);
  RGI_TRY(warm_up(n, e));
  n->watching = rgi_thread_start(&n->watch, keep_watch, n) == 0;
  return n->watching ? RG_OK : rgi_fail(e, RG_E_NOMEM, NULL, NULL, "no thread for NCCL's watch");
}
#endif
