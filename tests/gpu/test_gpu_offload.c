/* tests/gpu/test_gpu_offload.c: what leaves a GPU for the host's memory and comes back: the bits of
 * a plan that keeps it, in every way to run one; the host's bytes are those that were said; and
 * copies do run beside what computes (REGRAPH_SOAK=20000: so many replays).
 */
#include "on_gpu.h"
#include "tests/unit/run_util.h"

#ifdef REGRAPH_CUDA
#include <cuda_runtime_api.h>

enum { T = 700, B = 6 };
static const int lengths[B] = {147, 0, 138, 33, 301, 64};

typedef struct subject {
  rg_context *ctx;
  rg_spec *spec;
  buffers kept;
} subject;

static rg_plan *plan_with(const subject *x, const char *text) {
  rg_policy *policy = text ? load_policy(x->ctx, text) : NULL;
  rg_plan *plan = make_plan(x->spec, policy, T, B, 1);
  rg_policy_destroy(policy);
  return plan;
}

static rg_sizes sizes_of(const rg_plan *plan) {
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  return z;
}

static rg_session *open_session(const rg_plan *plan, const rg_session_options *o) {
  rg_error e = {0};
  rg_session *s = NULL;
  CR_OK(rg_session_create(plan, o, &s, &e), &e);
  return s;
}

static subject open_nsa(const char *dtype) {
  static char text[8192];
  rg_error e = {0};
  subject x = {0};
  CR_OK(rg_context_create(NULL, &x.ctx, &e), &e);
  rg_binding set[] = {
      {"D", 64, NULL}, {"kernel", 32, NULL}, {"stride", 16, NULL}, {"block", 64, NULL}};
  nsa_spec(dtype, false, text, sizeof text);
  CR_OK(rg_spec_load_text(x.ctx, text, strlen(text), "nsa", set, 4, &x.spec, &e), &e);
  rg_plan *plan = plan_with(&x, NULL);
  rg_session *s = open_session(plan, NULL);
  make_buffers(plan, 7, T, lengths, &x.kept);
  bind_all(s, &x.kept);
  run_both(s);
  fetch_all(s, &x.kept);
  for (int i = 0; i < x.kept.n; i++) x.kept.info[i].name = strdup(x.kept.info[i].name);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  return x;
}

static void close_nsa(subject *x) {
  free_buffers(&x->kept);
  rg_spec_destroy(x->spec);
  rg_context_destroy(x->ctx);
}

static char *pinned(int64_t size) {
  void *p;
  CUDA_OK(cudaHostAlloc(&p, (size_t)size + 512, cudaHostAllocDefault));
  memset(p, 0x5b, (size_t)size + 512);
  return p;
}

#define POLICY(more) "{ \"regraph_policy\": 1, " more " }"
static const char all[] = POLICY("\"nodes\": { \"*\": \"offload\" }");
static const char *const policies[] = {
    all, POLICY("\"nodes\": { \"slc_o\": \"offload\" }"),
    POLICY("\"nodes\": { \"*\": \"offload\" }, \"split_heads\": 1"),
    POLICY("\"nodes\": { \"*_o\": \"offload\", \"swa_o\": \"recompute\" }"),
    POLICY("\"nodes\": { \"cmp_o\": \"offload\" }, \"budget\": \"least\"")};

/* In a graph, step by step, and with NaN everywhere before: the bits of a plan that keeps all. */
static void same_as_kept(const char *dtype) {
  subject x = open_nsa(dtype);
  for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
    rg_plan *plan = plan_with(&x, policies[i]);
    for (int way = 0; way < 3; way++) {
      const rg_session_options o = {.eager = way == 1, .debug_poison = way == 2};
      rg_session *s = open_session(plan, &o);
      buffers b;
      make_buffers(plan, 7, T, lengths, &b);
      bind_all(s, &b);
      for (int run = 0; run < (way ? 1 : 20); run++) {
        run_both(s);
        if (run > 1 && run < 19) continue;
        fetch_all(s, &b);
        same_results(&x.kept, &b, policies[i]);
      }
      rg_session_destroy(s);
      free_buffers(&b);
    }
    rg_plan_destroy(plan);
  }
  close_nsa(&x);
}
Test(gpu_offload, same_as_kept) {
  NEEDS_GPU();
  same_as_kept("bf16");
  same_as_kept("f32");
}

/* What is touched of saved and scratch is what was predicted. */
Test(gpu_offload, predicted_is_measured) {
  NEEDS_GPU();
  subject x = open_nsa("bf16");
  for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
    rg_plan *plan = plan_with(&x, policies[i]);
    const rg_sizes z = sizes_of(plan);
    rg_session *s = open_session(plan, &(rg_session_options){.debug_poison = true});
    int64_t saved, scratch;
    buffers b;
    make_buffers(plan, 7, T, lengths, &b);
    bind_all(s, &b);
    run_both(s);
    cr_assert_eq(rg_session_touched(s, &saved, &scratch), RG_OK);
    cr_assert(saved == z.saved && scratch == z.scratch,
              "%s: saved %lld of %lld, scratch %lld of %lld", policies[i], (long long)saved,
              (long long)z.saved, (long long)scratch, (long long)z.scratch);
    rg_session_destroy(s);
    rg_plan_destroy(plan);
  }
  close_nsa(&x);
}

/* The caller's host block: all of it is written and not a byte more; it must be pinned. */
Test(gpu_offload, host_block) {
  NEEDS_GPU();
  subject x = open_nsa("bf16");
  rg_plan *plan = plan_with(&x, all);
  const rg_sizes z = sizes_of(plan);
  rg_error e = {0};
  rg_session *s = NULL;
  char *host = pinned(z.host);
  s = open_session(plan, &(rg_session_options){.host = host});
  buffers b;
  make_buffers(plan, 7, T, lengths, &b);
  bind_all(s, &b);
  run_both(s);
  fetch_all(s, &b);
  same_results(&x.kept, &b, "a host block of the caller's");
  int64_t end = z.host + 512;
  while (end > 0 && host[end - 1] == 0x5b) end--;
  cr_assert(end <= z.host && end > z.host - 16, "%lld of %lld", (long long)end, (long long)z.host);
  void *pageable;
  cr_assert_eq(posix_memalign(&pageable, 256, (size_t)z.host), 0);
  cr_assert_eq(rg_session_bind_host(s, pageable, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "pinned"), "%s", e.message);
  rg_session_destroy(s);
  e = (rg_error){0};
  s = NULL;
  cr_assert_eq(rg_session_create(plan, &(rg_session_options){.host = pageable}, &s, &e),
               RG_E_USAGE);
  free(pageable);
  rg_plan_destroy(plan);
  close_nsa(&x);
}

/* Several forwards in flight, each with a saved and a host block of its own, backwards in another
 * order, and addresses that come and go: copies are patched, or their graph is made anew. */
static void microbatches(const char *policy) {
  enum { N = 6 }; /* more than a session keeps graphs for */
  subject x = open_nsa("bf16");
  rg_plan *plan = plan_with(&x, policy);
  const rg_sizes z = sizes_of(plan);
  rg_session *s = open_session(plan, NULL),
             *one = open_session(plan, &(rg_session_options){.eager = true});
  rg_error e = {0};
  buffers b[N], want[N];
  void *saved[N], *host[N];
  for (int i = 0; i < N; i++) {
    make_buffers(plan, 20 + (uint64_t)i, T, lengths, &b[i]);
    make_buffers(plan, 20 + (uint64_t)i, T, lengths, &want[i]);
    bind_all(one, &want[i]);
    run_both(one);
    fetch_all(one, &want[i]);
    host[i] = pinned(z.host);
    CR_OK(rg_memory_alloc(plan, (size_t)z.saved, &saved[i], &e), &e);
  }
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < N; i++) {
      bind_all(s, &b[i]);
      CR_OK(rg_session_bind_saved(s, saved[i], &e), &e);
      CR_OK(rg_session_bind_host(s, host[(i + round) % N], &e), &e);
      CR_OK(rg_session_forward(s, &e), &e);
    }
    for (int k = 0; k < N; k++) {
      const int i = (k + 1 + round) % N;
      CR_OK(rg_session_bind_saved(s, saved[i], &e), &e);
      for (int j = 0; j < b[i].n; j++)
        if (b[i].info[j].role >= RG_GRAD_IN)
          CR_OK(rg_session_bind(s, b[i].info[j].role, b[i].info[j].name, b[i].device[j],
                                (size_t)b[i].info[j].bytes, &e),
                &e);
      CR_OK(rg_session_backward(s, &e), &e);
    }
    for (int i = 0; i < N; i++) {
      fetch_all(s, &b[i]);
      same_results(&want[i], &b[i], policy);
    }
  }
  rg_session_destroy(s);
  rg_session_destroy(one);
  rg_plan_destroy(plan);
  close_nsa(&x);
}
Test(gpu_offload, microbatches) {
  NEEDS_GPU();
  microbatches(all);
  microbatches(policies[2]); /* parts of rows, which the driver does not patch */
}

static int memcpy_nodes(cudaGraph_t graph) {
  size_t n = 0;
  int copies = 0;
  CUDA_OK(cudaGraphGetNodes(graph, NULL, &n));
  cudaGraphNode_t *node = malloc(n * sizeof(cudaGraphNode_t));
  CUDA_OK(cudaGraphGetNodes(graph, node, &n));
  for (size_t i = 0; i < n; i++) {
    enum cudaGraphNodeType type;
    CUDA_OK(cudaGraphNodeGetType(node[i], &type));
    copies += type == cudaGraphNodeTypeMemcpy;
  }
  free(node);
  return copies;
}

/* Someone else's capture takes steps and copies in. */
Test(gpu_offload, outer_capture) {
  NEEDS_GPU();
  subject x = open_nsa("bf16");
  for (size_t i = 0; i < sizeof policies / sizeof *policies; i++) {
    rg_plan *plan = plan_with(&x, policies[i]);
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_OK(cudaStreamCreate(&stream));
    rg_session *s = open_session(plan, &(rg_session_options){.stream = stream});
    buffers b;
    make_buffers(plan, 7, T, lengths, &b);
    bind_all(s, &b);
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    run_both(s);
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    cr_assert_geq(memcpy_nodes(graph), 2, "%s", policies[i]);
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int k = 0; k < 5; k++) CUDA_OK(cudaGraphLaunch(exec, stream));
    fetch_all(s, &b);
    same_results(&x.kept, &b, policies[i]);
    bind_all(s, &b); /* and the session's own graph afterwards */
    run_both(s);
    fetch_all(s, &b);
    same_results(&x.kept, &b, policies[i]);
    CUDA_OK(cudaGraphExecDestroy(exec));
    CUDA_OK(cudaGraphDestroy(graph));
    rg_session_destroy(s);
    rg_plan_destroy(plan);
  }
  close_nsa(&x);
}

/* Replays by the thousand, two microbatches in turn without waiting for either: always the same
 * bits. */
Test(gpu_offload, soak, .timeout = 900) {
  NEEDS_GPU();
  const char *asked = getenv("REGRAPH_SOAK");
  const int runs = asked ? atoi(asked) : 300, every = asked ? 250 : 50;
  subject x = open_nsa("bf16");
  rg_plan *plan = plan_with(&x, all);
  const rg_sizes z = sizes_of(plan);
  rg_session *s = open_session(plan, NULL);
  rg_error e = {0};
  buffers b[2];
  void *saved[2], *host[2];
  for (int i = 0; i < 2; i++) {
    make_buffers(plan, 7, T, lengths, &b[i]);
    upload_all(&b[i]);
    host[i] = pinned(z.host);
    CR_OK(rg_memory_alloc(plan, (size_t)z.saved, &saved[i], &e), &e);
  }
  for (int r = 0; r < runs; r++) {
    for (int pass = 0; pass < 4; pass++) { /* forward of both, backward of both */
      const int i = pass % 2;
      CR_OK(rg_session_bind_saved(s, saved[i], &e), &e);
      for (int k = 0; k < b[i].n; k++)
        if ((b[i].info[k].role >= RG_GRAD_IN) == (pass >= 2))
          CR_OK(rg_session_bind(s, b[i].info[k].role, b[i].info[k].name, b[i].device[k],
                                (size_t)b[i].info[k].bytes, &e),
                &e);
      if (pass < 2) {
        CR_OK(rg_session_bind_host(s, host[i], &e), &e);
        CR_OK(rg_session_forward(s, &e), &e);
      } else {
        CR_OK(rg_session_backward(s, &e), &e);
      }
    }
    if (r % every && r != runs - 1) continue;
    for (int i = 0; i < 2; i++) {
      fetch_all(s, &b[i]);
      same_results(&x.kept, &b[i], "soak");
      upload_all(&b[i]);
      for (int k = 0; k < b[i].n; k++) /* what is not written again shows next time */
        if (b[i].info[k].role == RG_OUTPUT || b[i].info[k].role == RG_GRAD_OUT)
          CUDA_OK(cudaMemset(b[i].device[k], 0x7e, (size_t)b[i].info[k].bytes));
    }
  }
  fprintf(stderr, "soak: %d replays of two microbatches, looked at every %d\n", runs, every);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  close_nsa(&x);
}

#endif
