/* tests/gpu/test_gpu_session.c: what only a session on a GPU does: graphs, rebinding,
 * streams, capture by others, lengths checked on the device, running out of memory, and
 * replays by the thousand (REGRAPH_SOAK=20000).
 */
#include "on_gpu.h"
#include "tests/unit/run_util.h"

#ifdef REGRAPH_CUDA
#include <cuda_runtime_api.h>
#include <time.h>

enum { T = 700, B = 6 };
static const int some_lengths[B] = {147, 0, 138, 33, 301, 64};

typedef struct setup {
  rg_context *ctx;
  rg_spec *spec;
  rg_plan *plan;
} setup;

static setup open_nsa(const char *dtype, unsigned mask, int split) {
  static char text[8192], policy[512];
  rg_error e = {0};
  setup x = {0};
  CR_OK(rg_context_create(NULL, &x.ctx, &e), &e);
  rg_binding set[] = {
      {"D", 64, NULL}, {"kernel", 32, NULL}, {"stride", 16, NULL}, {"block", 64, NULL}};
  nsa_spec(dtype, false, text, sizeof text);
  CR_OK(rg_spec_load_text(x.ctx, text, strlen(text), "nsa", set, 4, &x.spec, &e), &e);
  rg_policy *p = load_policy(x.ctx, nsa_policy(mask, split, policy, sizeof policy));
  x.plan = make_plan(x.spec, p, T, B, 1);
  rg_policy_destroy(p);
  return x;
}

static void close_nsa(setup *x) {
  rg_plan_destroy(x->plan);
  rg_spec_destroy(x->spec);
  rg_context_destroy(x->ctx);
}

static rg_session *open_session(const setup *x, bool eager, void *stream) {
  rg_error e = {0};
  rg_session *s = NULL;
  rg_session_options o = {.eager = eager, .stream = stream};
  CR_OK(rg_session_create(x->plan, &o, &s, &e), &e);
  return s;
}

/* The same bits from a graph and step by step, a hundred times over. */
static void replay_is_eager(const char *dtype, unsigned mask, int split) {
  setup x = open_nsa(dtype, mask, split);
  rg_session *eager = open_session(&x, true, NULL), *replay = open_session(&x, false, NULL);
  buffers a, b;
  make_buffers(x.plan, 3, T, some_lengths, &a);
  make_buffers(x.plan, 3, T, some_lengths, &b);
  bind_all(eager, &a);
  bind_all(replay, &b);
  run_both(eager);
  fetch_all(eager, &a);
  finite_results(&a, dtype);
  for (int i = 0; i < 100; i++) {
    run_both(replay);
    if (i % 10 && i != 1) continue;
    fetch_all(replay, &b);
    same_results(&a, &b, dtype);
  }
  rg_session_destroy(eager);
  rg_session_destroy(replay);
  close_nsa(&x);
}
Test(gpu_session, replay_is_eager) {
  NEEDS_GPU();
  replay_is_eager("f32", 0, 0);
  replay_is_eager("bf16", 0, 0);
  replay_is_eager("f16", 0x3f, 0);
  replay_is_eager("bf16", 0x3f, 1);
}

/* Recompute and head split change nothing on tuned widths either. */
Test(gpu_session, recompute_is_keep) {
  NEEDS_GPU();
  buffers kept = {0}, got;
  for (int split = 0; split < 2; split++)
    for (unsigned mask = 0; mask < 64; mask = mask ? mask * 2 : 1) {
      setup x = open_nsa("bf16", mask == 32 ? 63 : mask, split);
      rg_session *s = open_session(&x, false, NULL);
      make_buffers(x.plan, 4, T, some_lengths, &got);
      bind_all(s, &got);
      run_both(s);
      fetch_all(s, &got);
      for (int i = 0; i < got.n; i++) got.info[i].name = strdup(got.info[i].name);
      if (!kept.n)
        kept = got;
      else
        same_results(&kept, &got, "recompute or split");
      rg_session_destroy(s);
      close_nsa(&x);
    }
}

/* What a process holds. Device memory is everybody's on that GPU: others come and go, so a reading
 * is the most that was free at any time of a quarter of the soak; a leak lowers it from quarter to
 * quarter. */
typedef struct held {
  size_t device_free, host; /* bytes */
} held;
static void look_at_memory(held *h) {
  size_t free_now = 0, all, pages = 0;
  cudaMemGetInfo(&free_now, &all);
  if (free_now > h->device_free) h->device_free = free_now;
  FILE *f = fopen("/proc/self/statm", "r");
  if (!f) return;
  if (fscanf(f, "%*u %zu", &pages) == 1) h->host = pages * 4096;
  fclose(f);
}

/* Random lengths and random addresses, against eager every so often; after the first quarter
 * neither the device's memory nor the host's grows. */
Test(gpu_session, soak, .timeout = 900) {
  NEEDS_GPU();
  const char *asked = getenv("REGRAPH_SOAK");
  const int runs = asked ? atoi(asked) : 300, every = asked ? 100 : 20;
  enum { SETS = 6 }; /* more than a session keeps graphs for */
  setup x = open_nsa("bf16", 0x15, 0);
  cudaStream_t stream[2];
  for (int i = 0; i < 2; i++) CUDA_OK(cudaStreamCreate(&stream[i]));
  rg_session *eager = open_session(&x, true, NULL), *replay = open_session(&x, false, NULL);
  buffers set[SETS], check;
  uint64_t state = 99;
  for (int i = 0; i < SETS; i++) {
    make_buffers(x.plan, 5 + (uint64_t)i, T, some_lengths, &set[i]);
    upload_all(&set[i]);
  }
  make_buffers(x.plan, 5, T, some_lengths, &check);
  bind_all(eager, &check);
  held quarter[4] = {{0}};
  for (int r = 0; r < runs; r++) {
    buffers *b = &set[next_random(&state) % SETS];
    rg_error e = {0};
    int lengths[B], left = T;
    for (int k = 0; k < B; k++) {
      lengths[k] = (int)(next_random(&state) % 3 ? next_random(&state) % (uint32_t)(left + 1) : 0);
      left -= lengths[k];
    }
    CUDA_OK(cudaDeviceSynchronize());
    CR_OK(rg_session_set_stream(replay, stream[r % 2], &e), &e);
    for (int i = 0; i < b->n; i++) {
      if (b->info[i].seqlens) {
        fill_starts(b->data[i], B + 1, T, lengths);
        CR_OK(rg_memory_write(x.plan, b->device[i], b->data[i], (size_t)b->info[i].bytes, &e), &e);
      }
      CR_OK(rg_session_bind(replay, b->info[i].role, b->info[i].name, b->device[i],
                            (size_t)b->info[i].bytes, &e),
            &e);
    }
    run_both(replay);
    if (r % 16 == 0) look_at_memory(&quarter[(int64_t)r * 4 / runs]);
    if (r % every) continue;
    fetch_all(replay, b);
    for (int i = 0; i < b->n; i++) { /* inputs alike */
      if (b->info[i].role != RG_INPUT && b->info[i].role != RG_GRAD_IN) continue;
      CR_OK(rg_memory_write(x.plan, check.device[i], b->data[i], (size_t)b->info[i].bytes, &e), &e);
    }
    run_both(eager);
    fetch_all(eager, &check);
    same_results(&check, b, "soak");
  }
  for (int i = 0; i < 4; i++)
    fprintf(stderr, "soak: quarter %d: %.1f MiB free on the device, %.1f MiB of the host held\n",
            i + 1, (double)quarter[i].device_free / 1048576, (double)quarter[i].host / 1048576);
  if (asked && runs >= 4000) {
    cr_assert(quarter[3].device_free + (2 << 20) >= quarter[1].device_free,
              "device memory shrinks");
    cr_assert(quarter[3].host <= quarter[1].host + (4 << 20), "host memory grows");
  }
  fprintf(stderr, "soak: %d replays agree with eager every %d\n", runs, every);
  rg_session_destroy(eager);
  rg_session_destroy(replay);
  close_nsa(&x);
}

/* Several forwards in flight, each with its own saved memory; backwards in another order. */
Test(gpu_session, microbatches) {
  NEEDS_GPU();
  enum { N = 3 };
  setup x = open_nsa("bf16", 0, 0);
  rg_session *s = open_session(&x, false, NULL), *one = open_session(&x, false, NULL);
  rg_error e = {0};
  rg_sizes z;
  buffers b[N], want;
  void *saved[N];
  cr_assert_eq(rg_plan_sizes(x.plan, &z), RG_OK);
  for (int i = 0; i < N; i++) {
    make_buffers(x.plan, 20 + (uint64_t)i, T, some_lengths, &b[i]);
    CR_OK(rg_memory_alloc(x.plan, (size_t)z.saved, &saved[i], &e), &e);
    bind_all(s, &b[i]);
    CR_OK(rg_session_bind_saved(s, saved[i], &e), &e);
    CR_OK(rg_session_forward(s, &e), &e);
  }
  for (int k = 0; k < N; k++) {
    int i = (k + 1) % N;
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
    make_buffers(x.plan, 20 + (uint64_t)i, T, some_lengths, &want);
    bind_all(one, &want);
    run_both(one);
    fetch_all(one, &want);
    same_results(&want, &b[i], "a microbatch");
  }
  rg_session_destroy(s);
  rg_session_destroy(one);
  close_nsa(&x);
}

/* Someone else's capture takes the steps in; replaying it gives the same bits. */
Test(gpu_session, outer_capture) {
  NEEDS_GPU();
  setup x = open_nsa("bf16", 0x2, 0);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamCreate(&stream));
  rg_session *s = open_session(&x, false, stream);
  buffers a, b;
  make_buffers(x.plan, 8, T, some_lengths, &a);
  make_buffers(x.plan, 8, T, some_lengths, &b);
  bind_all(s, &a);
  run_both(s);
  fetch_all(s, &a);
  bind_all(s, &b);
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run_both(s);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < 3; i++) CUDA_OK(cudaGraphLaunch(exec, stream));
  fetch_all(s, &b);
  same_results(&a, &b, "captured by someone else");
  buffers c; /* and the session's own graph still knows its addresses */
  make_buffers(x.plan, 8, T, some_lengths, &c);
  bind_all(s, &c);
  run_both(s);
  fetch_all(s, &c);
  same_results(&a, &c, "after the capture");
  rg_session_destroy(s);
  close_nsa(&x);
}

/* Lengths that break rules are clamped on the device and reported by the next call. */
Test(gpu_session, wrong_lengths) {
  NEEDS_GPU();
  setup x = open_nsa("bf16", 0, 0);
  rg_session *s = open_session(&x, false, NULL);
  rg_error e = {0};
  buffers b, good;
  static const int32_t wrong[][B + 1] = {{0, 100, 50, 200, 200, 300, 400},
                                         {3, 100, 150, 200, 200, 300, 400},
                                         {0, 100, 150, 200, 200, 300, T + 9},
                                         {0, -5, 150, 200, 200, 300, 2147483647}};
  make_buffers(x.plan, 9, T, some_lengths, &good);
  bind_all(s, &good);
  run_both(s);
  fetch_all(s, &good);
  for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
    make_buffers(x.plan, 9, T, some_lengths, &b);
    for (int i = 0; i < b.n; i++)
      if (b.info[i].seqlens) memcpy(b.data[i], wrong[k], sizeof wrong[k]);
    bind_all(s, &b);
    run_both(s);
    e = (rg_error){0};
    cr_assert_eq(rg_session_synchronize(s, &e), RG_E_DATA);
    cr_assert(strstr(e.message, "cu_seqlens["), "%s", e.message);
    e = (rg_error){0};
    CR_OK(rg_session_synchronize(s, &e), &e); /* reported once */
    bind_all(s, &good);
    buffers again;
    make_buffers(x.plan, 9, T, some_lengths, &again);
    bind_all(s, &again);
    run_both(s);
    fetch_all(s, &again);
    same_results(&good, &again, "after wrong lengths");
  }
  rg_session_destroy(s);
  close_nsa(&x);
}

/* What was wrong with a run's lengths is reported by a call that returns it: not lost to a backward
 * that is refused for another reason, nor to a forward that is not bound. */
Test(gpu_session, wrong_lengths_after_refusals) {
  NEEDS_GPU();
  setup x = open_nsa("bf16", 0, 0);
  rg_session *s = open_session(&x, false, NULL);
  rg_error e = {0};
  rg_sizes z;
  void *other = NULL;
  buffers b;
  cr_assert_eq(rg_session_backward(s, &e), RG_E_USAGE); /* nothing bound yet */
  e = (rg_error){0};
  cr_assert_eq(rg_plan_sizes(x.plan, &z), RG_OK);
  CR_OK(rg_memory_alloc(x.plan, (size_t)z.saved, &other, &e), &e);
  make_buffers(x.plan, 9, T, some_lengths, &b);
  for (int i = 0; i < b.n; i++)
    if (b.info[i].seqlens) ((int32_t *)b.data[i])[B] = T + 9;
  bind_all(s, &b);
  CR_OK(rg_session_forward(s, &e), &e);
  CUDA_OK(cudaDeviceSynchronize());
  CR_OK(rg_session_bind_saved(s, other, &e), &e);
  cr_assert_eq(rg_session_backward(s, &e), RG_E_USAGE);
  e = (rg_error){0};
  CR_OK(rg_session_bind(s, RG_INPUT, "q", NULL, 0, &e), &e);
  cr_assert_eq(rg_session_forward(s, &e), RG_E_USAGE);
  e = (rg_error){0};
  cr_assert_eq(rg_session_synchronize(s, &e), RG_E_DATA, "%s", e.message);
  cr_assert(strstr(e.message, "cu_seqlens["), "%s", e.message);
  e = (rg_error){0};
  CR_OK(rg_session_synchronize(s, &e), &e);
  rg_session_destroy(s);
  rg_memory_free(x.plan, other);
  close_nsa(&x);
}

/* An output over an input is refused by its address; nothing is enqueued. */
Test(gpu_session, overlap) {
  NEEDS_GPU();
  setup x = open_nsa("bf16", 0, 0);
  rg_session *s = open_session(&x, false, NULL);
  rg_error e = {0};
  buffers b;
  make_buffers(x.plan, 9, T, some_lengths, &b);
  bind_all(s, &b);
  run_both(s);
  for (int i = 0; i < b.n; i++)
    if (b.info[i].role == RG_INPUT && strcmp(b.info[i].name, "q") == 0)
      CR_OK(rg_session_bind(s, RG_OUTPUT, "o", b.device[i], (size_t)b.info[i].bytes, &e), &e);
  cr_assert_eq(rg_session_forward(s, &e), RG_E_USAGE);
  cr_assert(strstr(e.message, "\"o\"") && strstr(e.message, "\"q\""), "%s", e.message);
  e = (rg_error){0};
  CR_OK(rg_session_backward(s, &e), &e); /* of the forward before */
  CR_OK(rg_session_synchronize(s, &e), &e);
  rg_session_destroy(s);
  close_nsa(&x);
}

/* More than the device has: an error with figures, and the plan can still be used. */
Test(gpu_session, out_of_memory) {
  NEEDS_GPU();
  setup x = open_nsa("bf16", 0, 0);
  rg_error e = {0};
  rg_session *s = NULL;
  rg_binding set[] = {{"T", INT64_C(1) << 30, NULL}, {"B", 1, NULL}};
  rg_plan_options o = {.set = set, .nset = 2, .device = "cuda", .pack_seconds = 0.1};
  rg_plan *big = NULL;
  CR_OK(rg_plan_create(x.spec, NULL, &o, &big, &e), &e);
  cr_assert_eq(rg_session_create(big, NULL, &s, &e), RG_E_DEVICE);
  cr_assert(strstr(e.message, "needed") && strstr(e.message, "free") &&
                strstr(e.message, "largest"),
            "%s", e.message);
  e = (rg_error){0};
  CR_OK(rg_session_create(x.plan, NULL, &s, &e), &e);
  rg_session_destroy(s);
  rg_plan_destroy(big);
  close_nsa(&x);
}

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}
static int ascending(const void *a, const void *b) {
  return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

/* What a launch costs the host: with unchanged addresses, with two sets of tensors in turn (each
 * has graphs of its own), and with more sets than graphs are kept, so that every node is patched.
 * Printed; the bound asserted is loose because machines differ. */
enum { SETS = 6 };
Test(gpu_session, host_cost) {
  NEEDS_GPU();
  enum { RUNS = 240 };
  static const int used[] = {1, 2, SETS};
  setup x = open_nsa("bf16", 0, 0);
  rg_session *s = open_session(&x, false, NULL);
  rg_error e = {0};
  buffers b[SETS];
  double us[2][RUNS];
  for (int i = 0; i < SETS; i++) {
    make_buffers(x.plan, 30, T, some_lengths, &b[i]);
    bind_all(s, &b[i]);
    run_both(s);
  }
  for (int k = 0; k < 3; k++) {
    for (int r = -SETS; r < RUNS; r++) {
      const buffers *to = &b[(r + SETS) % used[k]];
      for (int i = 0; i < to->n; i++)
        CR_OK(rg_session_bind(s, to->info[i].role, to->info[i].name, to->device[i],
                              (size_t)to->info[i].bytes, &e),
              &e);
      CUDA_OK(cudaDeviceSynchronize());
      double t0 = now_us();
      CR_OK(rg_session_forward(s, &e), &e);
      double t1 = now_us();
      CUDA_OK(cudaDeviceSynchronize());
      double t2 = now_us();
      CR_OK(rg_session_backward(s, &e), &e);
      if (r < 0) continue;
      us[0][r] = t1 - t0;
      us[1][r] = now_us() - t2;
    }
    for (int d = 0; d < 2; d++) {
      qsort(us[d], RUNS, sizeof(double), ascending);
      fprintf(stderr, "host cost, %d sets of addresses, %s: %.1f us\n", used[k],
              d ? "backward" : "forward", us[d][RUNS / 2]);
      cr_assert_lt(us[d][RUNS / 2], 500);
    }
  }
  rg_session_destroy(s);
  close_nsa(&x);
}

/* More sets of addresses than graphs are kept, in turn, some tensors shared:
 * always the bits of eager runs. */
Test(gpu_session, many_sets_of_addresses) {
  NEEDS_GPU();
  setup x = open_nsa("f16", 0x9, 0);
  rg_session *eager = open_session(&x, true, NULL), *replay = open_session(&x, false, NULL);
  buffers want[SETS], got[SETS];
  rg_error e = {0};
  for (int i = 0; i < SETS; i++) {
    make_buffers(x.plan, 40 + (uint64_t)i, T, some_lengths, &want[i]);
    make_buffers(x.plan, 40 + (uint64_t)i, T, some_lengths, &got[i]);
    bind_all(eager, &want[i]);
    run_both(eager);
    fetch_all(eager, &want[i]);
  }
  for (int r = 0; r < 5 * SETS; r++) {
    const int k = (r < 2 * SETS ? r : r * r + r / 3) % SETS; /* in turn, then in a jumble */
    bind_all(replay, &got[k]);
    run_both(replay);
    fetch_all(replay, &got[k]);
    same_results(&want[k], &got[k], "one of many sets");
    if (r % 4 != 3) continue;
    const int j = (k + 1) % SETS; /* one tensor from elsewhere: the same numbers in another place */
    upload_all(&got[j]);
    for (int i = 0; i < got[j].n; i++)
      if (got[j].info[i].role == RG_OUTPUT)
        CR_OK(rg_session_bind(replay, RG_OUTPUT, got[j].info[i].name, got[j].device[i],
                              (size_t)got[j].info[i].bytes, &e),
              &e);
    run_both(replay);
    fetch_all(replay, &got[j]);
    for (int i = 0; i < got[j].n; i++)
      if (got[j].info[i].role == RG_OUTPUT)
        cr_assert_eq(memcmp(got[j].data[i], want[k].data[i], (size_t)got[j].info[i].bytes), 0);
  }
  rg_session_destroy(eager);
  rg_session_destroy(replay);
  close_nsa(&x);
}

#endif
