/* tests/gpu/test_gpu_cp.c: ranks that are threads on one GPU, each with a stream and a session of
 * its own that runs step by step: what one rank gives, to the bit, at borders of every kind, so
 * that every family of kernels runs on slots at odd offsets; tables against the host's. */
#include "on_gpu.h"
#include "tests/unit/cp_case.h"

#ifdef REGRAPH_CUDA
#include "cp/comm.h"
#include "cp/tables.h"
#include "exec/cuda.h"
#include "graph/base.h"
#include <dlfcn.h>
#include <unistd.h>

static void *a_stream(void) {
  cudaStream_t s = NULL;
  cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
  return s;
}

/* ---- tables ---- */

enum { MOST_SEQS = 2000 };

static void *on_device(size_t bytes) {
  void *p = NULL;
  CUDA_OK(cudaMalloc(&p, bytes + 16));
  CUDA_OK(cudaMemset(p, 0x7e, bytes));
  return p;
}
static void launch(const void *kernel, const void *params, size_t size) {
  rg_error e = {0};
  rgi_cuda_eager x;
  rgi_cuda_eager_init(&x, NULL, &e);
  CR_OK(x.base.launch(&x.base, &(rg_launch){.function = kernel,
                                            .grid = {1, 1, 1},
                                            .block = {RGK_CP_THREADS, 1, 1},
                                            .params = params,
                                            .size = size}),
        &e);
}
static void same(const int32_t *want, const int32_t *device, int64_t n, const char *what,
                 uint64_t seed) {
  static int32_t got[2 * MOST_SEQS + 2 * RGK_CP_MOST_RANKS + 2];
  CUDA_OK(cudaMemcpy(got, device, (size_t)n * sizeof *got, cudaMemcpyDeviceToHost));
  for (int64_t i = 0; i < n; i++)
    cr_assert_eq(got[i], want[i], "seed %d: %s[%d] is %d, not %d", (int)seed, what, (int)i, got[i],
                 want[i]);
}

Test(gpu_cp, tables) {
  NEEDS_GPU();
  static int32_t cu[MOST_SEQS + 1], a[2 * MOST_SEQS + 2], b[2 * MOST_SEQS + 2], order[2048];
  int32_t *at_cu = on_device(sizeof cu), *at_order = on_device(sizeof order), *at[6];
  for (int i = 0; i < 6; i++) at[i] = on_device(sizeof a);
  for (uint64_t seed = 1; seed <= 300; seed++) {
    uint64_t state = seed * 977;
    static const int counts[] = {2, 3, 4, 8, 64, 1000}, strides[] = {1, 4, 16};
    const int ranks = counts[next_random(&state) % 6], stride = strides[next_random(&state) % 3];
    const int kernel = stride * (1 + (int)(next_random(&state) % 3));
    const int left = (int)(next_random(&state) % 500), tile = 1 + (int)(next_random(&state) % 200);
    const int64_t chunk = stride * (int64_t)(1 + next_random(&state) % 40);
    const int64_t T = chunk * 2 * ranks, most = seed % 5 == 0 ? MOST_SEQS : 1 + seed % 9;
    const int mode = (int)(next_random(&state) % 3), rank = (int)(next_random(&state) % ranks);
    for (int64_t i = 1; i <= most; i++) {
      const int64_t n = next_random(&state) % 4 ? next_random(&state) % (2 * T / most + 2) : 0;
      cu[i] = (int32_t)rgk_clamp(cu[i - 1] + n, 0, T);
    }
    CUDA_OK(cudaMemcpy(at_cu, cu, sizeof cu, cudaMemcpyHostToDevice));
    const rg_cp_mode chosen = rgi_cp_choose((rg_cp_mode)mode, cu, most, T, ranks);
    const rgk_cp_rows_params p = {.cu = at_cu,
                                  .nseq = most,
                                  .rows = T,
                                  .ranks = ranks,
                                  .rank = rank,
                                  .mode = mode,
                                  .order = at_order,
                                  .starts = {at[0], at[1], at[2]},
                                  .pos = {at[3], at[4], at[5]}};
    launch(rgk_cp_rows(), &p, sizeof p);
    for (int i = 0; i < 2 * ranks; i++) order[i] = (int32_t)rgk_cp_place(chosen, ranks, i);
    same(order, at_order, 2 * ranks, "order", seed);
    for (int slot = 0; slot < 2; slot++) {
      const int64_t lo = rgk_cp_chunk(chosen, ranks, rank, slot) * chunk;
      rgi_cp_pieces(cu, most, lo, lo + chunk, a, b);
      same(a, at[slot], most + 1, "starts", seed);
      same(b, at[3 + slot], most, "pos", seed);
      same(b, at[5] + slot * most, most, "both pos", seed);
      int32_t before = 0;
      CUDA_OK(cudaMemcpy(&before, at[2] + slot * most, 4, cudaMemcpyDeviceToHost));
      for (int64_t i = 0; i <= most; i++) a[i] += before;
      same(a, at[2] + slot * most, most + 1, "both starts", seed);
    }
    const rgk_cp_chunks_params blocks = {.cu = at_cu,
                                         .order = at_order,
                                         .nseq = most,
                                         .rows = T,
                                         .right = kernel - 1,
                                         .unit = stride,
                                         .ranks = ranks,
                                         .rank = rank,
                                         .starts = {at[0], at[1]}};
    rgk_cp_chunks_params window = blocks;
    window.left = left, window.right = 0, window.unit = tile;
    window.pos[0] = at[3], window.pos[1] = at[4];
    for (int ends = 0; ends < 2; ends++) {
      rgk_cp_chunks_params of = blocks;
      if (ends) of.left = kernel - stride, of.right = stride - 1;
      launch(rgk_cp_blocks(), &of, sizeof of);
      for (int slot = 0; slot < 2; slot++) {
        const int64_t lo = rgk_cp_chunk(chosen, ranks, rank, slot) * chunk;
        rgi_cp_blocks(cu, most, lo - of.left, lo + chunk + of.right, stride, a);
        same(a, at[slot], most + 2, ends ? "blocks by their ends" : "blocks", seed);
      }
    }
    launch(rgk_cp_window(), &window, sizeof window);
    for (int slot = 0; slot < 2; slot++) {
      const int64_t lo = rgk_cp_chunk(chosen, ranks, rank, slot) * chunk;
      rgi_cp_window(cu, most, lo, lo + chunk, left, tile, a, b);
      same(a, at[slot], most + 1, "windows", seed);
      same(b, at[3 + slot], most, "window pos", seed);
    }
  }
}

/* ---- ranks against one ---- */

typedef struct a_case {
  const char *example, *dtype, *policy;
  const char *set[6]; /* NAME=VALUE */
  int64_t T;
  const char *exact;
} a_case;

static rg_plan *plan_case(rg_context *ctx, const a_case *c, int ranks, const char *policy_text) {
  char path[512], name[6][32];
  rg_binding param[7] = {{"dtype", 0, c->dtype}}, set[] = {{"T", c->T, NULL}, {"B", 5, NULL}};
  size_t n = 1;
  for (int i = 0; i < 6 && c->set[i]; i++) {
    const char *is = strchr(c->set[i], '=');
    snprintf(name[i], sizeof name[i], "%.*s", (int)(is - c->set[i]), c->set[i]);
    param[n++] = (rg_binding){name[i], atoll(is + 1), NULL};
  }
  rg_plan_options o = {
      .set = set, .nset = 2, .device = "cuda", .threads = 1, .pack_seconds = 0.05, .cp = ranks};
  rg_policy *policy = policy_text ? load_policy(ctx, policy_text) : NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_error e = {0};
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, c->example);
  CR_OK(rg_spec_load_file(ctx, path, param, n, &spec, &e), &e);
  CR_OK(rg_plan_create(spec, policy, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  rg_policy_destroy(policy);
  return plan;
}

/* On 2, 3 and 4 ranks in both modes and by balance; borders at odd rows, empty sequences, one over
 * several chunks, dead rows. */
static void equal(const a_case *c) {
  const int T = (int)c->T;
  const int lengths[][5] = {{T / 2 + 7, 0, 1, T / 4 - 3, T / 8 + 1},
                            {T, 0, 0, 0, 0},
                            {33, 31, 500, 65, 1},
                            {T / 3, T / 3, T / 3, 0, 0}};
  static const char *const modes[] = {"\"auto\"", "1", "2"};
  rg_context *ctx = NULL;
  rg_error e = {0};
  ranks_stream = a_stream;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (int i = 0; i < 4; i++) {
    char policy[256], what[512];
    const int ranks = 2 + i % 3;
    snprintf(policy, sizeof policy, "{ \"regraph_policy\": 1, \"cp\": { \"mode\": %s }%s }",
             modes[i % 3], c->policy ? c->policy : "");
    snprintf(what, sizeof what, "%s, %s, %d ranks, lengths %d, %s", c->example, c->dtype, ranks, i,
             policy);
    rg_plan *one = plan_case(ctx, c, 1, NULL), *many = plan_case(ctx, c, ranks, policy);
    const double most = strcmp(c->dtype, "f32") == 0   ? 2e-6
                        : strcmp(c->dtype, "f16") == 0 ? 1e-3
                                                       : 8e-3;
    cp_compare(ctx, one, many, 5, T, lengths[i], c->exact, most, what);
    rg_plan_destroy(one);
    rg_plan_destroy(many);
  }
  rg_context_destroy(ctx);
}

#define EQUAL(name, ...)                 \
  Test(gpu_cp, name) {                   \
    NEEDS_GPU();                         \
    equal(&(const a_case){__VA_ARGS__}); \
  }
/* tuned: 16 query heads a key head, width 128 */
EQUAL(nsa_bf16, .example = "nsa", .dtype = "bf16", .set = {"H=16", "KH=1"}, .T = 3072,
      .exact = "q gate")
EQUAL(nsa_two_groups, .example = "nsa", .dtype = "bf16", .set = {"H=32", "KH=2"}, .T = 3072,
      .policy = ", \"preset\": \"all\", \"split_heads\": 1", .exact = "q gate")
EQUAL(nsa_few_heads, .example = "nsa", .dtype = "bf16", .set = {"H=8", "KH=2"}, .T = 1536,
      .exact = "q gate")
EQUAL(nsa_f16, .example = "nsa", .dtype = "f16", .set = {"H=16", "KH=1"}, .T = 1536,
      .exact = "q gate")
EQUAL(nsa_plain_f32, .example = "nsa", .dtype = "f32", .set = {"H=8", "KH=2", "D=64", "DV=64"},
      .T = 1536, .exact = "q gate")
EQUAL(nsa_odd_width, .example = "nsa", .dtype = "bf16", .set = {"H=6", "KH=2", "D=40", "DV=24"},
      .T = 1536, .exact = "q gate")
EQUAL(nsa_192, .example = "nsa", .dtype = "bf16", .set = {"H=16", "KH=1", "D=192", "DV=128"},
      .T = 1536, .exact = "q gate")
EQUAL(two_branch, .example = "two_branch", .dtype = "bf16", .T = 1536, .exact = "q gate")
EQUAL(moba, .example = "moba", .dtype = "bf16", .T = 1536 * 4, .exact = "")
EQUAL(dense_causal, .example = "dense_causal", .dtype = "bf16", .T = 1536, .exact = "q")
EQUAL(windows, .example = "sliding_window", .dtype = "bf16", .set = {"window=100"}, .T = 6144,
      .exact = "q")
EQUAL(windows_f32, .example = "sliding_window", .dtype = "f32",
      .set = {"D=64", "DV=64", "window=40"}, .T = 6144, .exact = "q")
EQUAL(windows_gathered, .example = "sliding_window", .dtype = "bf16", .T = 3072, .exact = "q")
EQUAL(nsa_linear, .example = "nsa_linear", .dtype = "bf16", .T = 1536)
EQUAL(nsa_layer, .example = "nsa_layer", .dtype = "bf16", .T = 1536)
EQUAL(csa, .example = "variants/csa", .dtype = "bf16",
      .set = {"H=16", "D=64", "HI=4", "DI=64", "top_n=20", "window=60"}, .T = 1536, .exact = "q")
EQUAL(quest, .example = "variants/quest", .dtype = "bf16", .set = {"H=16", "KH=2", "top_n=8"},
      .T = 1536, .exact = "q")

/* Twenty runs of one batch, all with the same bits. */
Test(gpu_cp, repeats) {
  NEEDS_GPU();
  const a_case c = {.example = "nsa", .dtype = "bf16", .set = {"H=16", "KH=1"}, .T = 3072};
  const int lengths[] = {1700, 0, 1, 700, 333};
  enum { RANKS = 4 };
  rg_context *ctx = NULL;
  rg_error e = {0};
  a_rank once[MOST_RANKS], often[MOST_RANKS];
  ranks_stream = a_stream;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_plan *plan = plan_case(ctx, &c, RANKS, "{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 } }");
  for (int r = 0; r < RANKS; r++) {
    once[r] = (a_rank){.plan = plan, .backward = true};
    make_buffers(plan, 4, c.T, lengths, &once[r].b);
    often[r] = (a_rank){.plan = plan, .backward = true, .repeats = 19};
    make_buffers(plan, 4, c.T, lengths, &often[r].b);
  }
  run_ranks(ctx, once, RANKS, 20);
  run_ranks(ctx, often, RANKS, 20);
  for (int r = 0; r < RANKS; r++) {
    cr_assert_eq(once[r].status, RG_OK, "%s", once[r].e.message);
    cr_assert_eq(often[r].status, RG_OK, "%s", often[r].e.message);
    same_results(&once[r].b, &often[r].b, "repeats");
  }
  rg_plan_destroy(plan);
  rg_context_destroy(ctx);
}

/* A rank that is not there: the other ends, and says so. */
Test(gpu_cp, failures) {
  NEEDS_GPU();
  const a_case c = {.example = "nsa", .dtype = "bf16", .set = {"H=16", "KH=1"}, .T = 1536};
  const int lengths[] = {1000, 0, 1, 300, 33};
  rg_context *ctx = NULL;
  rg_error e = {0};
  rg_comm *comm[2];
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_plan *plan = plan_case(ctx, &c, 2, NULL);
  a_rank here = {.plan = plan};
  CR_OK(rg_comm_threads(ctx, 2, 0.5, comm, &e), &e);
  make_buffers(plan, 4, c.T, lengths, &here.b);
  here.comm = comm[0];
  run_a_rank(&here);
  cr_assert_eq(here.status, RG_E_COMM);
  cr_assert(strstr(here.e.message, "rank 1 did not reach"), "%s", here.e.message);
  rg_comm_destroy(comm[1], NULL);
  rg_plan_destroy(plan);
  rg_context_destroy(ctx);
}

/* ---- one of several ranks, by itself: graphs with collectives, and all that they hide ---- */

/* What the others would send are this rank's own bytes. */
static rg_status copy_bytes(void *to, const void *from, size_t bytes, void *stream) {
  if (!stream) return memcpy(to, from, bytes) ? RG_OK : RG_E_INTERNAL;
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream) == cudaSuccess
             ? RG_OK
             : RG_E_DEVICE;
}
static rg_status alone_gather(rg_comm *c, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  rg_status status = RG_OK;
  (void)node, (void)e;
  for (int r = 0; r < c->size && status == RG_OK; r++) {
    status = copy_bytes((char *)recv + (size_t)r * bytes, send, bytes, stream);
    if (!stream) ((rgi_cp_hello *)recv)[r].rank = (uint32_t)r; /* as they greet each other */
  }
  return status;
}
static rg_status alone_exchange(rg_comm *c, const char *node, const void *send, void *recv,
                                size_t bytes, void *stream, rg_error *e) {
  (void)node, (void)e;
  return copy_bytes(recv, send, (size_t)c->size * bytes, stream);
}
static rg_status alone_halo(rg_comm *c, const char *node, const rg_halo *h, size_t bytes,
                            void *stream, rg_error *e) {
  rg_status status = RG_OK;
  (void)node, (void)e;
  if (c->rank > 0) status = copy_bytes(h->from_previous, h->to_previous, bytes, stream);
  if (c->rank + 1 < c->size && status == RG_OK)
    status = copy_bytes(h->from_next, h->to_next, bytes, stream);
  return status;
}
static rg_status alone_barrier(rg_comm *c, const char *node, rg_error *e) {
  (void)c, (void)node, (void)e;
  return RG_OK;
}
static void alone_abort(rg_comm *c, const rg_error *why) {
  (void)c, (void)why;
}

/* The graph, whose collectives and what they wait for have priorities, gives the bits of its steps
 * one by one; so do replays for other addresses. */
static void alone(const char *policy, int ranks, int rank) {
  const a_case c = {.example = "nsa", .dtype = "bf16", .set = {"H=32", "KH=2"}, .T = 3072};
  const int lengths[] = {1700, 0, 1, 700, 333};
  rg_comm comm = {.abi = RG_OP_ABI,
                  .size = ranks,
                  .rank = rank,
                  .all_gather = alone_gather,
                  .all_to_all = alone_exchange,
                  .halo = alone_halo,
                  .barrier = alone_barrier,
                  .abort = alone_abort,
                  .captures = true};
  rg_context *ctx = NULL;
  rg_error e = {0};
  buffers want, got[2];
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_plan *plan = plan_case(ctx, &c, ranks, policy);
  make_buffers(plan, 4, c.T, lengths, &want);
  for (int i = 0; i < 2; i++) make_buffers(plan, 4, c.T, lengths, &got[i]);
  for (int eager = 1; eager >= 0; eager--) {
    rg_session *s = NULL;
    rg_session_options o = {.size = sizeof o, .comm = &comm, .eager = eager, .stream = a_stream()};
    CR_OK(rg_session_create(plan, &o, &s, &e), &e);
    for (int run = 0; run < (eager ? 1 : 6); run++) {
      buffers *b = eager ? &want : &got[run & 1];
      bind_all(s, b);
      run_both(s);
      fetch_all(s, b);
      if (!eager) same_results(&want, b, policy);
    }
    rg_session_destroy(s);
  }
  rg_plan_destroy(plan);
  rg_context_destroy(ctx);
}

Test(gpu_cp, alone_replay) {
  NEEDS_GPU();
  alone("{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 } }", 2, 0);
  alone("{ \"regraph_policy\": 1, \"cp\": { \"mode\": 2 } }", 4, 3);
  alone("{ \"regraph_policy\": 1, \"cp\": { \"wire\": \"bf16\" } }", 4, 1);
  alone("{ \"regraph_policy\": 1, \"preset\": \"all\", \"split_heads\": 1 }", 4, 2);
}

/* ---- NCCL, with one rank: what can be seen of graphs with collectives on one GPU ---- */

static const char by_hand[] =
    "{ \"regraph\": 1, \"inputs\": { \"x\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"f32\", "
    "\"grad\": true } }, \"nodes\": [\n"
    "{ \"name\": \"g\", \"op\": \"all_gather\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"y\" "
    "}, \"attrs\": { \"ranks\": 1 } },\n"
    "{ \"name\": \"s\", \"op\": \"silu\", \"in\": { \"x\": \"y\" }, \"out\": { \"y\": \"z\" } },\n"
    "{ \"name\": \"r\", \"op\": \"reduce_scatter\", \"in\": { \"x\": \"z\" }, \"out\": { \"y\": "
    "\"u\" }, \"attrs\": { \"ranks\": 1 } },\n"
    "{ \"name\": \"a\", \"op\": \"all_reduce\", \"in\": { \"x\": \"u\" }, \"out\": { \"y\": \"v\" "
    "}, \"attrs\": { \"ranks\": 1 } },\n"
    "{ \"name\": \"h\", \"op\": \"halo\", \"in\": { \"x\": \"v\" }, \"out\": { \"y\": [\"w\"] }, "
    "\"attrs\": { \"ranks\": 1, \"left\": 3, \"right\": 2 } } ],\n"
    "\"outputs\": { \"u\": \"u\", \"w\": \"w\" } }";

static int recorded; /* calls of the engine */
static rg_status (*real_gather)(rg_comm *c, const char *node, const void *send, void *recv,
                                size_t bytes, void *stream, rg_error *e);
static rg_status count_gather(rg_comm *c, const char *node, const void *send, void *recv,
                              size_t bytes, void *stream, rg_error *e) {
  recorded += stream != NULL;
  return real_gather(c, node, send, recv, bytes, stream, e);
}

typedef struct nccl_case {
  rg_context *ctx;
  rg_spec *spec;
  rg_plan *plan;
  rg_comm *comm;
} nccl_case;

static nccl_case open_nccl(void) {
  nccl_case x = {0};
  rg_error e = {0};
  rg_binding set[] = {{"T", 96, NULL}};
  CR_OK(rg_context_create(NULL, &x.ctx, &e), &e);
  x.spec = load_spec(x.ctx, by_hand);
  rg_plan_options o = {.set = set, .nset = 1, .device = "cuda", .threads = 1};
  CR_OK(rg_plan_create(x.spec, NULL, &o, &x.plan, &e), &e);
  rg_comm_options c = {
      .ranks = 1, .port = 20000 + (int)(getpid() % 20000), .cuda = true, .deadline = 20};
  CR_OK(rg_comm_processes(x.ctx, &c, &x.comm, &e), &e);
  cr_assert(x.comm->captures);
  return x;
}
static void close_nccl(nccl_case *x) {
  rg_comm_destroy(x->comm, NULL);
  rg_plan_destroy(x->plan);
  rg_spec_destroy(x->spec);
  rg_context_destroy(x->ctx);
}
static rg_session *nccl_session(const nccl_case *x, bool eager, void *stream) {
  rg_session *s = NULL;
  rg_error e = {0};
  rg_session_options o = {.size = sizeof o, .comm = x->comm, .eager = eager, .stream = stream};
  CR_OK(rg_session_create(x->plan, &o, &s, &e), &e);
  return s;
}

/* The same bits step by step, replayed, rebound and within somebody else's capture. */
Test(gpu_cp, nccl_replay) {
  NEEDS_GPU();
  if (!dlopen("libnccl.so.2", RTLD_NOW)) cr_skip_test("no libnccl.so.2");
  enum { SETS = 7 };
  nccl_case x = open_nccl();
  rg_error e = {0};
  buffers want, got[SETS];
  cudaStream_t stream = a_stream();
  rg_session *eager = nccl_session(&x, true, stream), *replay = nccl_session(&x, false, stream);
  make_buffers(x.plan, 3, 96, NULL, &want);
  bind_all(eager, &want);
  run_both(eager);
  fetch_all(eager, &want);
  real_gather = x.comm->all_gather;
  x.comm->all_gather = count_gather;
  for (int turn = 0, before = 0; turn < 3; turn++, before = recorded) {
    for (int k = 0; k < SETS; k++) { /* more than there are graphs */
      if (turn == 0) make_buffers(x.plan, 3, 96, NULL, &got[k]);
      bind_all(replay, &got[k]);
      run_both(replay);
      fetch_all(replay, &got[k]);
      same_results(&want, &got[k], "replay");
    }
    cr_assert(turn == 0 ? recorded > 0 : recorded == before, "collectives were recorded anew");
  }
  const char *soak = getenv("REGRAPH_SOAK");
  const int replays = soak ? atoi(soak) : 200;
  for (int i = 0; i < replays; i++) run_both(replay);
  fetch_all(replay, &got[SETS - 1]);
  same_results(&want, &got[SETS - 1], "after many replays");

  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  for (int k = 0; k < got[0].n; k++)
    if (got[0].info[k].role == RG_OUTPUT)
      CUDA_OK(cudaMemset(got[0].device[k], 0, (size_t)got[0].info[k].bytes));
  for (int k = 0; k < got[0].n; k++)
    CR_OK(rg_session_bind(replay, got[0].info[k].role, got[0].info[k].name, got[0].device[k],
                          (size_t)got[0].info[k].bytes, &e),
          &e);
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run_both(replay);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < 3; i++) CUDA_OK(cudaGraphLaunch(exec, stream));
  fetch_all(replay, &got[0]);
  same_results(&want, &got[0], "captured by others");
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  rg_session_destroy(replay);
  rg_session_destroy(eager);
  close_nccl(&x);
}

/* Sessions before their communicator, or after it. */
Test(gpu_cp, nccl_teardown) {
  NEEDS_GPU();
  if (!dlopen("libnccl.so.2", RTLD_NOW)) cr_skip_test("no libnccl.so.2");
  for (int order = 0; order < 4; order++) {
    nccl_case x = open_nccl();
    rg_session *s = nccl_session(&x, false, NULL), *t = nccl_session(&x, order & 1, NULL);
    buffers b;
    make_buffers(x.plan, 3, 96, NULL, &b);
    bind_all(s, &b);
    bind_all(t, &b);
    run_both(s);
    run_both(t);
    if (order & 2) {
      rg_comm_destroy(x.comm, NULL);
      x.comm = NULL;
    }
    rg_session_destroy(s);
    rg_session_destroy(t);
    close_nccl(&x);
  }
}

/* An aborted communicator: the session's calls end and say why. */
Test(gpu_cp, nccl_abort) {
  NEEDS_GPU();
  if (!dlopen("libnccl.so.2", RTLD_NOW)) cr_skip_test("no libnccl.so.2");
  nccl_case x = open_nccl();
  rg_error e = {0}, why = {.status = RG_E_DATA, .message = "the data are spoilt"};
  rg_session *s = nccl_session(&x, false, NULL);
  buffers b;
  make_buffers(x.plan, 3, 96, NULL, &b);
  bind_all(s, &b);
  run_both(s);
  CR_OK(rg_session_synchronize(s, &e), &e);
  x.comm->abort(x.comm, &why);
  cr_assert_eq(rg_session_forward(s, &e), RG_E_COMM);
  cr_assert(strstr(e.message, "rank 0 failed: the data are spoilt"), "%s", e.message);
  rg_session_destroy(s);
  close_nccl(&x);
}
#endif
