/* bench/wires_gpu_bench.c: what NCCL's collectives do on the GPUs of this host when they are
 * captured and replayed: the figures behind the engine's defaults (cp/cuda_nccl.c) and `link_gbs`.
 *
 *     wires_gpu_bench [--most MIB] [--replays N]
 *
 *     rates     all-gather and all-to-all by bytes that a rank receives from the others: kernels on
 *               8, 16 and 32 multiprocessors, and copy engines (windows, CTA policy ZERO), beside
 *               bare copies between the GPUs
 *     chain     child graphs of both kinds in one line, replayed; what came is compared
 *     abort     one rank replays alone and is aborted: when its stream ends, and NCCL
 *
 * Ranks are threads, one a GPU. libnccl.so.2 is loaded, or the file that REGRAPH_NCCL names.
 * NCCL_NVLS_ENABLE=0 keeps NVLink multicast out of it.
 */
#include "gpu.h"
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#if defined(__has_include)
#if __has_include(<nccl.h>)
#include <nccl.h>
#define HAVE_NCCL 1
#endif
#endif

#ifndef HAVE_NCCL
int main(void) {
  fprintf(stderr, "this build was made without nccl.h\n");
  return 77;
}
#else

enum { MOST = 8, CHAIN = 24 };
#define MIB (1024.0 * 1024.0)

#define EACH(F)           \
  F(GetVersion)           \
  F(GetUniqueId)          \
  F(GetErrorString)       \
  F(CommInitRankConfig)   \
  F(CommGetAsyncError)    \
  F(CommDestroy)          \
  F(CommAbort)            \
  F(CommWindowRegister)   \
  F(CommWindowDeregister) \
  F(MemAlloc)             \
  F(MemFree)              \
  F(GroupStart)           \
  F(GroupEnd)             \
  F(AllGather)            \
  F(AlltoAll)
static struct {
#define MEMBER(name)  __typeof__(nccl##name) *name;
  EACH(MEMBER)
} nccl;

typedef enum { GATHER, EXCHANGE } kind;
typedef enum { KERNELS, WINDOWS, COPIES } engine;

static int ranks;
static size_t most = 1024;
static int64_t replays = 2000;
static ncclUniqueId id;
static pthread_barrier_t meet;
static double shared[MOST];
static char *all_send[MOST];

typedef struct rank {
  int r;
  cudaStream_t stream;
  ncclComm_t comm;
  char *send, *recv;
  ncclWindow_t window[2];
  bool windows;
} rank;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void nccl_ok(ncclResult_t code, const char *what) {
  if (code == ncclSuccess || code == ncclInProgress) return;
  fprintf(stderr, "%s: %s\n", what, nccl.GetErrorString(code));
  exit(1);
}
#define NCCL_OK(call) nccl_ok(nccl.call, #call)

static void settle(ncclComm_t comm) {
  ncclResult_t state;
  do NCCL_OK(CommGetAsyncError(comm, &state));
  while (state == ncclInProgress);
  nccl_ok(state, "NCCL");
}

static void together(void) {
  pthread_barrier_wait(&meet);
}
/* The largest of all ranks' x. */
static double largest(const rank *k, double x) {
  double max = 0;
  shared[k->r] = x;
  together();
  for (int r = 0; r < ranks; r++) max = shared[r] > max ? shared[r] : max;
  together();
  return max;
}

/* ---- a communicator with buffers for `most` ---- */

static void open_comm(rank *k, engine with, int ctas) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  const size_t bytes = most << 20;
  config.blocking = 0;
  if (ctas) config.maxCTAs = ctas;
  if (with == WINDOWS) config.CTAPolicy = NCCL_CTA_POLICY_ZERO;
  if (k->r == 0) NCCL_OK(GetUniqueId(&id));
  together();
  NCCL_OK(CommInitRankConfig(&k->comm, ranks, id, k->r, &config));
  settle(k->comm);
  k->windows = with == WINDOWS;
  if (k->windows) {
    NCCL_OK(MemAlloc((void **)&k->send, bytes));
    NCCL_OK(MemAlloc((void **)&k->recv, bytes));
    NCCL_OK(CommWindowRegister(k->comm, k->send, bytes, &k->window[0], NCCL_WIN_COLL_SYMMETRIC));
    settle(k->comm);
    NCCL_OK(CommWindowRegister(k->comm, k->recv, bytes, &k->window[1], NCCL_WIN_COLL_SYMMETRIC));
    settle(k->comm);
  } else {
    GPU_OK(cudaMalloc((void **)&k->send, bytes));
    GPU_OK(cudaMalloc((void **)&k->recv, bytes));
  }
  GPU_OK(cudaMemset(k->send, k->r + 1, bytes));
  all_send[k->r] = k->send;
  together();
}

static void close_comm(rank *k) {
  together();
  for (int i = 0; i < 2 && k->windows; i++) {
    NCCL_OK(CommWindowDeregister(k->comm, k->window[i]));
    settle(k->comm);
  }
  NCCL_OK(CommDestroy(k->comm));
  together();
  if (k->windows) {
    NCCL_OK(MemFree(k->send));
    NCCL_OK(MemFree(k->recv));
  } else {
    GPU_OK(cudaFree(k->send));
    GPU_OK(cudaFree(k->recv));
  }
}

/* ---- captures ---- */

/* `piece` bytes from each rank to each. */
static void enqueue(const rank *k, kind what, engine with, size_t piece) {
  if (with == COPIES) { /* pulled, without a word to whom they are from */
    for (int i = 1; i < ranks; i++) {
      const int from = (k->r + i) % ranks;
      GPU_OK(cudaMemcpyAsync(k->recv + (size_t)from * piece,
                             all_send[from] + (what == GATHER ? 0 : (size_t)k->r * piece), piece,
                             cudaMemcpyDeviceToDevice, k->stream));
    }
    return;
  }
  if (what == GATHER)
    NCCL_OK(AllGather(k->send, k->recv, piece, ncclInt8, k->comm, k->stream));
  else
    NCCL_OK(AlltoAll(k->send, k->recv, piece, ncclInt8, k->comm, k->stream));
  settle(k->comm);
}

static cudaGraph_t capture(const rank *k, kind what, engine with, size_t piece, int n) {
  cudaGraph_t graph;
  GPU_OK(cudaStreamBeginCapture(k->stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < n; i++) enqueue(k, what, with, piece);
  GPU_OK(cudaStreamEndCapture(k->stream, &graph));
  return graph;
}

/* Does each rank's piece stand where it belongs, at both ends? */
static int wrong(const rank *k, size_t piece, bool own) {
  int n = 0;
  for (int r = 0; r < ranks; r++)
    for (int end = 0; end < 2; end++) {
      char got = 0;
      GPU_OK(cudaMemcpy(&got, k->recv + (size_t)r * piece + (end ? piece - 1 : 0), 1,
                        cudaMemcpyDeviceToHost));
      n += got != r + 1 && (own || r != k->r);
    }
  return n;
}

/* ---- rates ---- */

static void rate(rank *k, kind what, engine with, const char *label) {
  static const char *const name[] = {"all_gather", "all_to_all"};
  if (k->r == 0) printf("%-11s %-28s", name[what], label);
  for (size_t mib = 1; mib <= most; mib *= 4) {
    const size_t piece = (mib << 20) / (size_t)ranks;
    const int n = mib < 64 ? 20 : 4, times = 3;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaEvent_t from, to;
    float ms = 0;
    GPU_OK(cudaMemset(k->recv, 0, mib << 20));
    GPU_OK(cudaEventCreate(&from));
    GPU_OK(cudaEventCreate(&to));
    enqueue(k, what, with, piece);
    GPU_OK(cudaStreamSynchronize(k->stream));
    graph = capture(k, what, with, piece, n);
    GPU_OK(cudaGraphInstantiate(&exec, graph, 0));
    together();
    GPU_OK(cudaGraphLaunch(exec, k->stream));
    GPU_OK(cudaStreamSynchronize(k->stream));
    together();
    GPU_OK(cudaEventRecord(from, k->stream));
    for (int i = 0; i < times; i++) GPU_OK(cudaGraphLaunch(exec, k->stream));
    GPU_OK(cudaEventRecord(to, k->stream));
    GPU_OK(cudaStreamSynchronize(k->stream));
    GPU_OK(cudaEventElapsedTime(&ms, from, to));
    const double seconds = largest(k, ms * 1e-3 / times / n);
    const int bad = (int)largest(k, wrong(k, piece, with != COPIES));
    if (k->r == 0)
      printf("  %4zu: %7.1f us %5.1f GB/s%s", mib, 1e6 * seconds,
             1e-9 * (double)(piece * (size_t)(ranks - 1)) / seconds, bad ? " WRONG" : "");
    GPU_OK(cudaGraphExecDestroy(exec));
    GPU_OK(cudaGraphDestroy(graph));
    GPU_OK(cudaEventDestroy(from));
    GPU_OK(cudaEventDestroy(to));
    together();
  }
  if (k->r == 0) printf("\n"), fflush(stdout);
}

static void rates(rank *k) {
  static const int ctas[] = {8, 16, 32};
  for (int i = 0; i < 3; i++) {
    char label[64];
    snprintf(label, sizeof label, "kernels, %d CTAs", ctas[i]);
    open_comm(k, KERNELS, ctas[i]);
    rate(k, GATHER, KERNELS, label);
    rate(k, EXCHANGE, KERNELS, label);
    close_comm(k);
  }
  open_comm(k, KERNELS, 0);
  rate(k, GATHER, COPIES, "copies between GPUs");
  close_comm(k);
}

static void copy_engines(rank *k) {
  open_comm(k, WINDOWS, 0);
  rate(k, GATHER, WINDOWS, "copy engines");
  rate(k, EXCHANGE, WINDOWS, "copy engines");
  close_comm(k);
}

/* ---- chain, abort ---- */

static cudaGraphExec_t chained(const rank *k, size_t piece) {
  cudaGraph_t whole;
  cudaGraphExec_t exec;
  cudaGraphNode_t last = NULL, node;
  GPU_OK(cudaGraphCreate(&whole, 0));
  for (int i = 0; i < CHAIN; i++) {
    cudaGraph_t child = capture(k, i & 1, KERNELS, piece, 1);
    GPU_OK(cudaGraphAddChildGraphNode(&node, whole, &last, i > 0, child));
    GPU_OK(cudaGraphDestroy(child));
    last = node;
  }
  GPU_OK(cudaGraphInstantiate(&exec, whole, cudaGraphInstantiateFlagUseNodePriority));
  GPU_OK(cudaGraphDestroy(whole));
  return exec;
}

static void chain(rank *k) {
  const size_t piece = (1 << 20) / (size_t)ranks;
  open_comm(k, KERNELS, 16);
  cudaGraphExec_t exec = chained(k, piece);
  GPU_OK(cudaMemset(k->recv, 0, most << 20));
  together();
  const double begun = now();
  for (int64_t i = 0; i < replays; i++) GPU_OK(cudaGraphLaunch(exec, k->stream));
  GPU_OK(cudaStreamSynchronize(k->stream));
  const double us = largest(k, 1e6 * (now() - begun) / (double)(replays * CHAIN));
  const int bad = (int)largest(k, wrong(k, piece, true));
  if (k->r == 0)
    printf("chain: %lld replays of %d child graphs, %.1f us a collective of 1 MiB%s\n",
           (long long)replays, CHAIN, us, bad ? ", WRONG" : "");
  GPU_OK(cudaGraphExecDestroy(exec));
  close_comm(k);
}

static void *abort_it(void *comm) {
  NCCL_OK(CommAbort(comm));
  shared[1] = now();
  return NULL;
}

static void abort_replay(rank *k) {
  pthread_t thread;
  open_comm(k, KERNELS, 16);
  cudaGraphExec_t exec = chained(k, 1 << 16);
  together();
  if (k->r == 0) {
    GPU_OK(cudaGraphLaunch(exec, k->stream));
    usleep(300 * 1000);
    const bool waits = cudaStreamQuery(k->stream) == cudaErrorNotReady;
    const double begun = now();
    pthread_create(&thread, NULL, abort_it, k->comm);
    const cudaError_t code = cudaStreamSynchronize(k->stream);
    const double ended = now();
    usleep(300 * 1000);
    const double destroyed = now();
    shared[1] = 0;
    GPU_OK(cudaGraphExecDestroy(exec));
    pthread_join(thread, NULL);
    printf("abort: the replay %s; its stream ended after %.1f ms (%s), CommAbort %.1f ms after "
           "the graph was destroyed\n",
           waits ? "waited" : "did NOT wait", 1e3 * (ended - begun), cudaGetErrorString(code),
           1e3 * (shared[1] - destroyed));
    fflush(stdout);
  } else {
    GPU_OK(cudaGraphExecDestroy(exec));
    NCCL_OK(CommAbort(k->comm));
  }
  together();
}

/* ---- ---- */

static void (*part)(rank *);

static void *work(void *arg) {
  rank *k = arg;
  GPU_OK(cudaSetDevice(k->r));
  for (int i = 0; i < ranks; i++)
    if (i != k->r && cudaDeviceEnablePeerAccess(i, 0) != cudaSuccess) cudaGetLastError();
  GPU_OK(cudaStreamCreateWithFlags(&k->stream, cudaStreamNonBlocking));
  part(k);
  return NULL;
}

static void run(void (*what)(rank *)) {
  pthread_t thread[MOST];
  rank k[MOST] = {{0}};
  part = what;
  for (int r = 0; r < ranks; r++) {
    k[r].r = r;
    pthread_create(&thread[r], NULL, work, &k[r]);
  }
  for (int r = 0; r < ranks; r++) pthread_join(thread[r], NULL);
}

int main(int argc, char **argv) {
  int version = 0;
  int64_t mib = (int64_t)most;
  const gpu_flag flags[] = {{"--most", NULL, &mib, NULL}, {"--replays", NULL, &replays, NULL}};
  gpu_flags(argc, argv, flags, 2);
  most = (size_t)mib;
  const char *path = getenv("REGRAPH_NCCL");
  void *library = dlopen(path && path[0] ? path : "libnccl.so.2", RTLD_NOW);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 77;
  }
#define FIND(what)                                         \
  *(void **)&nccl.what = dlsym(library, "nccl" #what);     \
  if (!nccl.what) {                                        \
    fprintf(stderr, "the library has no nccl" #what "\n"); \
    return 77;                                             \
  }
  EACH(FIND)
  GPU_OK(cudaGetDeviceCount(&ranks));
  if (ranks > MOST) ranks = MOST;
  NCCL_OK(GetVersion(&version));
  pthread_barrier_init(&meet, NULL, (unsigned)ranks);
  printf("%d GPUs, NCCL %d; MiB that a rank holds: time and GB/s received from others\n", ranks,
         version);
  fflush(stdout);
  run(chain);
  run(abort_replay);
  run(rates);
  run(copy_engines);
  return 0;
}
#endif
