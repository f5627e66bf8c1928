/* exec/cuda_session.c: runs a session's steps on a GPU.

   A direction's first run builds a graph, later ones replay it on the session's stream. For other
   addresses another is built, up to GRAPHS of them (microbatches take turns with a few sets of
   tensors); then the nearest is patched. Eager sessions (options.eager, REGRAPH_EAGER=1,
   debug_poison) launch step by step, as does a stream that is being captured by someone else.

   Lengths are cleaned on the device (cuda_steps.h); what was wrong with them, or what ops found in
   other contents, arrives in `flag`, words of host memory that the device writes, and is reported
   by the session's next call. A fault of the device makes the session dead: every later call fails
   at once with what was seen first.
 */
#include "../kernels/blas.h"
#include "../kernels/session.h"
#include "cuda_graph.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GRAPHS = 4, FLAG_WORDS = RGK_FAULT_TAKEN + 2 };

typedef struct device {
  int id;
  cudaStream_t stream;
  bool eager;
  rgi_cuda_graph graph[2][GRAPHS]; /* forward, backward */
  void **now;                      /* [rgi_cuda_addresses] of the run at hand */
  uint64_t runs;
  void *blas;
  int32_t *flag, *flag_on_device; /* as cuda_steps.h says */
  /* eager: [nstep + 2], one before each step of a direction, one after */
  cudaEvent_t *event;
  bool timed; /* events of the last run are recorded, ms[] not yet read */
  bool timed_backward;
  rgi_cuda_known known; /* eager */
  /* someone else's capture, where tensors are offloaded: copies have a stream of their own, and
   * mark[i], where it is not NULL, follows step i, which a step of the other stream waits for;
   * mark[nstep]: the start, and the end */
  cudaStream_t copies;
  cudaEvent_t *mark;
  char dead[512]; /* what killed the session */
} device;

static device *device_of(const rg_session *s) {
  return s->device;
}

/* ---- memory ---- */

static void *alloc_device(void *user, size_t size) {
  (void)user;
  void *p = NULL;
  if (cudaMalloc(&p, size) == cudaSuccess) return p;
  cudaGetLastError(); /* or a later check would report it */
  return NULL;
}
static void free_device(void *user, void *p) {
  (void)user;
  cudaFree(p);
}

/* Pinned, or the copy engine could not work by itself. */
static void *alloc_pinned(void *user, size_t size) {
  (void)user;
  void *p = NULL;
  if (cudaHostAlloc(&p, size, cudaHostAllocPortable) == cudaSuccess) return p;
  cudaGetLastError();
  return NULL;
}
static void free_pinned(void *user, void *p) {
  (void)user;
  cudaFreeHost(p);
}

static rg_status check_host(const rg_session *s, const void *host, rg_error *e) {
  const char *end = (const char *)host + s->plan->sizes.host - 1;
  struct cudaPointerAttributes first, last;
  if (!s->plan->sizes.host) return RG_OK;
  if (cudaPointerGetAttributes(&first, host) == cudaSuccess &&
      cudaPointerGetAttributes(&last, end) == cudaSuccess && first.type == cudaMemoryTypeHost &&
      last.type == cudaMemoryTypeHost)
    return RG_OK;
  cudaGetLastError();
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "the host block at %p is not pinned over its %lld bytes; expected memory of "
                  "cudaHostAlloc, or registered with cudaHostRegister",
                  host, (long long)s->plan->sizes.host);
}

static rg_status no_memory(const rg_session *s, int64_t bytes, rg_error *e) {
  size_t have = 0, all = 0;
  cudaMemGetInfo(&have, &all);
  return rgi_plan_no_memory(s->plan, bytes, (int64_t)have, (int64_t)all, e);
}

/* ---- failures ---- */

static rg_status alive(const rg_session *s, rg_error *e) {
  const device *d = device_of(s);
  if (!d->dead[0]) return RG_OK;
  return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "the session is lost since: %s", d->dead);
}

/* Turns an error of the device into the session's death, if it is one that CUDA does not get
 * over. */
static rg_status note(const rg_session *s, cudaError_t code, const char *what, const char *node,
                      rg_error *e) {
  device *d = device_of(s);
  if (code == cudaSuccess) return RG_OK;
  rg_status status = rgi_cuda_status(code, what, node, e);
  cudaGetLastError();
  if (cudaPeekAtLastError() != cudaSuccess || cudaFree(NULL) != cudaSuccess) /* it stays */
    snprintf(d->dead, sizeof d->dead, "%s%s%s: %s (%s)", node ? node : "", node ? ": " : "", what,
             cudaGetErrorString(code), cudaGetErrorName(code));
  return status;
}

/* What an earlier run found wrong: with lengths (what > 0), or in a step. */
typedef struct finding {
  int32_t what, number[RGK_FAULT_NUMBERS];
} finding;

/* Takes it out of the flag, so that it is told once. false: there is none. */
static bool take_finding(device *d, finding *out) {
  volatile int32_t *flag = d->flag;
  out->what = flag[0];
  if (out->what == 0) return false;
  for (int i = 0; i < RGK_FAULT_NUMBERS; i++) out->number[i] = flag[1 + i];
  flag[0] = 0;
  return true;
}

static rg_status wrong_lengths(const rg_plan *plan, const finding *f, rg_error *e) {
  const rgi_check *c = &plan->check[f->what - 1];
  if (c->starts)
    return rgi_fail(e, RG_E_DATA, NULL, NULL,
                    "%s[%d] was %d in an earlier run; expected starts from 0 that never fall and "
                    "end at most at "
                    "%lld: the run used them clamped",
                    plan->bindable[c->bind].info.name, f->number[0], f->number[1],
                    (long long)c->capacity);
  return rgi_fail(e, RG_E_DATA, NULL, NULL,
                  "%s[%d] was %d in an earlier run; expected 0 or more, and positions that fit 32 "
                  "bits: the run used "
                  "it clamped",
                  plan->bindable[c->bind].info.name, f->number[0], f->number[1]);
}

static rg_status wrong_in_step(rg_session *s, const finding *f, rg_error *e) {
  const rg_call call = rgi_session_call(s, -1 - f->what, e);
  return call.op->rules->fault(&call, f->number);
}

static rg_status check(rg_session *s, rg_error *e) {
  finding f;
  RGI_TRY(alive(s, e));
  if (!take_finding(device_of(s), &f)) return RG_OK;
  return f.what > 0 ? wrong_lengths(s->plan, &f, e) : wrong_in_step(s, &f, e);
}

/* ---- life ---- */

static bool is_copy(const rg_plan *plan, int32_t i) {
  return rgi_is_copy(plan->graph, plan->step[i].node);
}

static rg_status make_mark(device *d, int32_t i, rg_error *e) {
  if (d->mark[i]) return RG_OK;
  return rgi_cuda_status(cudaEventCreateWithFlags(&d->mark[i], cudaEventDisableTiming),
                         "creating an event", NULL, e);
}
static rg_status make_marks(rg_session *s, rg_error *e) {
  const rg_plan *plan = s->plan;
  device *d = device_of(s);
  if (!plan->sizes.host) return RG_OK;
  RGI_TRY(rgi_cuda_status(cudaStreamCreateWithFlags(&d->copies, cudaStreamNonBlocking),
                          "creating a stream", NULL, e));
  d->mark = rgi_alloc_n(s->arena, (size_t)plan->nstep + 1, sizeof(cudaEvent_t));
  if (!d->mark) return rgi_nomem(e);
  RGI_TRY(make_mark(d, plan->nstep, e));
  for (int32_t j = 0; j < plan->nstep; j++)
    for (const int32_t *p = plan->after[j]; *p >= 0; p++)
      if (is_copy(plan, j) != is_copy(plan, *p)) RGI_TRY(make_mark(d, *p, e));
  return RG_OK;
}

static rg_status create(rg_session *s, const rg_session_options *o, rg_error *e) {
  rg_gpu here;
  const char *eager = getenv("REGRAPH_EAGER");
  device *d = rgi_alloc(s->arena, sizeof *d);
  if (!d) return rgi_nomem(e);
  s->device = d;
  d->stream = o->stream;
  d->eager = o->eager || s->poison || (s->comm && !s->comm->captures) ||
             (eager && eager[0] && strcmp(eager, "0") != 0);
  d->now = rgi_alloc_n(s->arena, (size_t)rgi_cuda_addresses(s->plan), sizeof *d->now);
  if (!d->now) return rgi_nomem(e);
  RGI_TRY(rgi_cuda_device(&here, e));
  RGI_TRY(rgi_plan_runs_on(s->plan, &here, e));
  RGI_TRY(rgi_cuda_status(cudaGetDevice(&d->id), "asking for the GPU", NULL, e));
  RGI_TRY(rgi_cuda_status(
      cudaHostAlloc((void **)&d->flag, FLAG_WORDS * sizeof *d->flag, cudaHostAllocMapped),
      "host memory", NULL, e));
  memset(d->flag, 0, FLAG_WORDS * sizeof *d->flag);
  const void *turn = rgk_turn();
  if (!turn) return rgi_cuda_status(cudaGetLastError(), "asking for a kernel's variable", NULL, e);
  memcpy(d->flag + RGK_FAULT_TAKEN, &turn, sizeof turn);
  RGI_TRY(make_marks(s, e)); /* a stream that is captured would not have them made */
  RGI_TRY(rgi_cuda_status(cudaHostGetDevicePointer((void **)&d->flag_on_device, d->flag, 0),
                          "host memory", NULL, e));
  if (!d->eager) return RG_OK;
  d->event = rgi_alloc_n(s->arena, (size_t)s->plan->nstep + 2, sizeof(cudaEvent_t));
  if (!d->event) return rgi_nomem(e);
  for (int32_t i = 0; i < s->plan->nstep + 2; i++)
    RGI_TRY(rgi_cuda_status(cudaEventCreate(&d->event[i]), "creating an event", NULL, e));
  return RG_OK;
}

static void destroy(rg_session *s) {
  device *d = device_of(s);
  if (!d) return;
  if (!d->dead[0]) cudaStreamSynchronize(d->stream);
  for (int backward = 0; backward < 2; backward++)
    for (int k = 0; k < GRAPHS; k++)
      if (d->graph[backward][k].used) rgi_cuda_graph_destroy(s, &d->graph[backward][k]);
  for (int32_t i = 0; d->event && i < s->plan->nstep + 2; i++)
    if (d->event[i]) cudaEventDestroy(d->event[i]);
  for (int32_t i = 0; d->mark && i <= s->plan->nstep; i++)
    if (d->mark[i]) cudaEventDestroy(d->mark[i]);
  if (d->copies) cudaStreamDestroy(d->copies);
  rgk_blas_destroy(d->blas);
  if (d->flag) cudaFreeHost(d->flag);
}

/* ---- running ---- */

/* The graph in which fewest steps have moved; among equals the one that was not used for longest.
 * `fresh`: a place for another. */
static rgi_cuda_graph *nearest(rgi_cuda_graph *list, void *const *now, int32_t *moved,
                               rgi_cuda_graph **fresh) {
  rgi_cuda_graph *best = NULL;
  *fresh = NULL;
  for (int k = 0; k < GRAPHS; k++) {
    rgi_cuda_graph *g = &list[k];
    if (!g->used) {
      *fresh = g;
      continue;
    }
    const int32_t n = rgi_cuda_graph_moved(g, now);
    if (best && (n > *moved || (n == *moved && g->used > best->used))) continue;
    best = g;
    *moved = n;
    if (n < 0) break;
  }
  return best;
}

static rg_status replay(rg_session *s, bool backward, rg_error *e) {
  device *d = device_of(s);
  rgi_cuda_graph *fresh, *g;
  int32_t moved = 0;
  rgi_cuda_addresses_now(s, backward, d->now);
  g = nearest(d->graph[backward], d->now, &moved, &fresh);
  if (g && moved == RGI_NOT_THERE) {
    if (!fresh) {
      RGI_TRY(note(s, cudaStreamSynchronize(d->stream), "waiting for the runs", NULL, e));
      rgi_cuda_graph_destroy(s, fresh = g);
    }
    g = NULL;
  }
  if (!g || (fresh && 2 * moved > g->end - g->first)) { /* most of it would be patched */
    rg_status status =
        rgi_cuda_graph_create(s, backward, d->blas, d->flag_on_device, fresh, g ? NULL : e);
    d->blas = fresh->base.blas;
    if (!g && status != RG_OK) return status;
    if (status == RG_OK)
      g = fresh, moved = -1;
    else
      cudaGetLastError(); /* no room for another: the nearest will do */
  }
  g->base.blas = d->blas;
  if (moved >= 0) RGI_TRY(rgi_cuda_graph_update(s, g, d->now, e));
  d->blas = g->base.blas;
  g->used = ++d->runs;
  return note(s, cudaGraphLaunch(g->exec, d->stream),
              backward ? "launching the backward" : "launching the forward", NULL, e);
}

/* ---- copies beside the steps, in a stream that someone else captures ---- */

/* `later` goes on when what is in `first` is done. */
static rg_status follow(rg_session *s, cudaStream_t later, cudaStream_t first, rg_error *e) {
  device *d = device_of(s);
  const cudaEvent_t mark = d->mark[s->plan->nstep];
  RGI_TRY(note(s, cudaEventRecord(mark, first), "recording an event", NULL, e));
  return note(s, cudaStreamWaitEvent(later, mark, 0), "waiting for an event", NULL, e);
}

/* Before step i on its stream: what the other one has to be done with. */
static rg_status wait_for_marks(rg_session *s, int32_t i, cudaStream_t stream, rg_error *e) {
  const rg_plan *plan = s->plan;
  const device *d = device_of(s);
  for (const int32_t *p = plan->after[i]; *p >= 0; p++)
    if (is_copy(plan, *p) != is_copy(plan, i))
      RGI_TRY(
          note(s, cudaStreamWaitEvent(stream, d->mark[*p], 0), "waiting for an event", NULL, e));
  return RG_OK;
}

static rg_status launch_steps(rg_session *s, bool backward, int32_t from, int32_t to, bool time,
                              bool recorded, rg_error *e) {
  device *d = device_of(s);
  const bool beside = recorded && s->plan->sizes.host;
  rgi_cuda_eager x;
  rg_status status = RG_OK;
  rgi_cuda_eager_init(&x, d->stream, e);
  x.base.blas = d->blas;
  x.known = &d->known;
  if (!backward) status = rgi_cuda_clean(s, d->flag_on_device, &x.base);
  if (status == RG_OK && beside) status = follow(s, d->copies, d->stream, e);
  for (int32_t i = from; i < to && status == RG_OK; i++) {
    const rgi_node *node = &s->plan->graph->node[s->plan->step[i].node];
    if (beside) {
      x.stream = is_copy(s->plan, i) ? d->copies : d->stream;
      status = wait_for_marks(s, i, x.stream, e);
    }
    if (time)
      status = note(s, cudaEventRecord(d->event[i - from], d->stream), "timing", node->name, e);
    rg_call call = rgi_cuda_call(s, i, d->flag_on_device, e);
    rgi_cuda_range_push(node->name);
    if (status == RG_OK) status = node->op->cuda_steps(&call, &x.base);
    rgi_cuda_range_pop();
    if (status == RG_OK && beside && d->mark[i])
      status = note(s, cudaEventRecord(d->mark[i], x.stream), "recording an event", node->name, e);
    if (status != RG_OK) {
      status = rgi_fail(e, status, NULL, node->name, "op \"%s\" failed", node->op->name);
    } else if (s->poison) { /* debugging: the fault is this node's */
      status = note(s, cudaStreamSynchronize(d->stream), "running the node", node->name, e);
      if (status == RG_OK) status = rgi_session_after_step(s, i, e);
    }
  }
  if (status == RG_OK && beside) status = follow(s, d->stream, d->copies, e);
  if (time && status == RG_OK)
    status = note(s, cudaEventRecord(d->event[to - from], d->stream), "timing", NULL, e);
  d->blas = x.base.blas;
  d->timed = time && status == RG_OK;
  d->timed_backward = backward;
  return status;
}

/* Reads the times of the last eager run, if it is over. */
static void read_times(rg_session *s) {
  device *d = device_of(s);
  int32_t from = d->timed_backward ? s->plan->nforward : 0,
          to = d->timed_backward ? s->plan->nstep : s->plan->nforward;
  if (!d->timed || cudaEventSynchronize(d->event[to - from]) != cudaSuccess) return;
  for (int32_t i = from; i < to; i++) {
    float ms = 0;
    if (cudaEventElapsedTime(&ms, d->event[i - from], d->event[i - from + 1]) == cudaSuccess)
      s->ms[i] = ms;
  }
  d->timed = false;
}

static rg_status run(rg_session *s, bool backward, rg_error *e) {
  device *d = device_of(s);
  int before = d->id;
  int32_t from = backward ? s->plan->nforward : 0,
          to = backward ? s->plan->nstep : s->plan->nforward;
  enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  RGI_TRY(alive(s, e));
  if (s->comm && s->comm->check) RGI_TRY(s->comm->check(s->comm, e));
  cudaGetDevice(&before);
  if (before != d->id) cudaSetDevice(d->id);
  rg_status status = note(s, cudaStreamIsCapturing(d->stream, &capture),
                          "asking whether the stream is being captured", NULL, e);
  bool recorded = capture != cudaStreamCaptureStatusNone;
  if (status == RG_OK && !d->eager && !recorded) {
    status = replay(s, backward, e);
  } else if (status == RG_OK) {
    if (d->timed && !recorded) read_times(s);
    status = launch_steps(s, backward, from, to, d->eager && !recorded, recorded, e);
  }
  if (before != d->id) cudaSetDevice(before);
  return status;
}

/* ---- the rest of a backend ---- */

static rg_status synchronize(rg_session *s, rg_error *e) {
  RGI_TRY(alive(s, e));
  const cudaError_t code = cudaStreamSynchronize(device_of(s)->stream);
  if (s->comm && s->comm->check)
    RGI_TRY(s->comm->check(s->comm, e)); /* what was the first to fail */
  RGI_TRY(note(s, code, "waiting for the runs", NULL, e));
  read_times(s);
  return check(s, e);
}

static rg_status set_stream(rg_session *s, void *stream, rg_error *e) {
  RGI_TRY(alive(s, e));
  device_of(s)->stream = stream;
  return RG_OK;
}

static cudaStream_t stream_of(const rg_session *s) {
  /* guards are written before the backend's part is made */
  return s->device ? device_of(s)->stream : NULL;
}

static rg_status fill(rg_session *s, void *data, int byte, int64_t size, rg_error *e) {
  return rgi_cuda_status(cudaMemsetAsync(data, byte, (size_t)size, stream_of(s)), "filling memory",
                         NULL, e);
}

static rg_status poison(rg_session *s, void *data, int64_t size, rg_error *e) {
  rgk_poison_params p = {.data = data, .bytes = size, .pattern = RGI_POISON};
  rgi_cuda_eager x;
  RGI_TRY(alive(s, e));
  if (size == 0) return RG_OK;
  rgi_cuda_eager_init(&x, stream_of(s), e);
  return x.base.launch(&x.base, &(rg_launch){.function = rgk_poison(),
                                             .grid = {1024, 1, 1},
                                             .block = {256, 1, 1},
                                             .params = &p,
                                             .size = sizeof p});
}

static rg_status read_memory(rg_session *s, void *host, const void *from, size_t size,
                             rg_error *e) {
  RGI_TRY(alive(s, e));
  RGI_TRY(note(s, cudaMemcpyAsync(host, from, size, cudaMemcpyDeviceToHost, stream_of(s)),
               "reading memory", NULL, e));
  return note(s, cudaStreamSynchronize(stream_of(s)), "reading memory", NULL, e);
}

static rg_status copy(void *dst, const void *src, size_t bytes, bool to_host, rg_error *e) {
  return rgi_cuda_status(
      cudaMemcpy(dst, src, bytes, to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice),
      to_host ? "reading device memory" : "writing device memory", NULL, e);
}

const rgi_backend rgi_cuda_backend = {
    .memory = {alloc_device, free_device, NULL},
    .host = {alloc_pinned, free_pinned, NULL},
    .check_host = check_host,
    .create = create,
    .destroy = destroy,
    .alive = alive,
    .check = check,
    .run = run,
    .fill = fill,
    .poison = poison,
    .read = read_memory,
    .set_stream = set_stream,
    .synchronize = synchronize,
    .no_memory = no_memory,
    .copy = copy,
};
