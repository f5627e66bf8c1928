/* tests/unit/test_paged.c: a serving step's bookkeeping: what paged_batch makes of lengths and
 * tables, good and bad, and that kv_append writes the rows it should and no other byte. */
#include "run_util.h"

#include <math.h>
#include <stdint.h>

enum { T = 40, B = 5, M = 4, P = 24, PAGE = 16, KH = 2, D = 6, DV = 3 };

/* HND keeps heads outside of rows; a transpose shows it as the ops want it. */
static const char *spec_text(bool hnd, const char *dtype, const char *kv, char *text) {
  const char *shape = hnd ? "[\"P\", 2, 16, %d]" : "[\"P\", 16, 2, %d]";
  char k[64], v[64];
  snprintf(k, sizeof k, shape, D);
  snprintf(v, sizeof v, shape, DV);
  sprintf(text,
          "{\"regraph\": 1, \"inputs\": {\n"
          "  \"k\": {\"shape\": [\"T\", 2, %d], \"dtype\": \"%s\"}, \"v\": {\"shape\": [\"T\", 2, "
          "%d], \"dtype\": \"%s\"},\n"
          "  \"lengths\": {\"shape\": [\"B\"], \"dtype\": \"i32\"}, \"context\": {\"shape\": "
          "[\"B\"], \"dtype\": \"i32\"},\n"
          "  \"pages\": {\"shape\": [\"B\", \"M\"], \"dtype\": \"i32\"}},\n"
          " \"state\": {\"k_cache\": {\"shape\": %s, \"dtype\": \"%s\", \"next\": \"k1\"},\n"
          "  \"v_cache\": {\"shape\": %s, \"dtype\": \"%s\", \"next\": \"v1\"}},\n"
          " \"nodes\": [%s\n"
          "  {\"name\": \"batch\", \"op\": \"paged_batch\", \"in\": {\"rows\": \"k\", \"cache\": "
          "\"%s\", \"lengths\": \"lengths\",\n"
          "    \"context\": \"context\", \"pages\": \"pages\"}},\n"
          "  {\"name\": \"append\", \"op\": \"kv_append\", \"in\": {\"k\": \"k\", \"v\": \"v\", "
          "\"cu_seqlens\": \"batch.cu_seqlens\",\n"
          "    \"context\": \"batch.context\", \"pages\": \"batch.pages\", \"k_cache\": \"%s\", "
          "\"v_cache\": \"%s\"},\n"
          "    \"out\": {\"k_cache\": \"k1\", \"v_cache\": \"v1\"}}],\n"
          " \"outputs\": {\"starts\": \"batch.cu_seqlens\", \"offset\": \"batch.offset\", "
          "\"context\": \"batch.context\",\n"
          "  \"pages\": \"batch.pages\", \"last\": \"batch.last\"}}",
          D, dtype, DV, dtype, k, kv, v, kv,
          hnd ? "{\"name\": \"kt\", \"op\": \"transpose\", \"in\": {\"x\": \"k_cache\"}, \"out\": "
                "{\"y\": \"kn\"}, \"attrs\": {\"perm\": [0, 2, 1, 3]}},\n"
                "{\"name\": \"vt\", \"op\": \"transpose\", \"in\": {\"x\": \"v_cache\"}, \"out\": "
                "{\"y\": \"vn\"}, \"attrs\": {\"perm\": [0, 2, 1, 3]}},"
              : "",
          hnd ? "kn" : "k_cache", hnd ? "kn" : "k_cache", hnd ? "vn" : "v_cache");
  return text;
}

typedef struct world {
  rg_context *ctx;
  rg_spec *spec;
  rg_plan *plan;
  rg_session *session;
  buffers io;
  bool hnd;
  rg_dtype kv;
  int32_t *lengths, *context, *pages;                /* given … */
  int32_t *starts, *offset, *checked, *table, *last; /* … and made */
} world;

static world open_world(bool hnd, rg_dtype dtype, rg_dtype kv) {
  rg_error e = {0};
  char text[4096];
  world w = {.hnd = hnd, .kv = kv};
  CR_OK(rg_context_create(NULL, &w.ctx, &e), &e);
  w.spec = load_spec(w.ctx, spec_text(hnd, rg_dtype_name(dtype), rg_dtype_name(kv), text));
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"M", M, NULL}, {"P", P, NULL}};
  rg_plan_options o = {.set = set, .nset = 4, .device = test_device(), .threads = 2};
  CR_OK(rg_plan_create(w.spec, NULL, &o, &w.plan, &e), &e);
  CR_OK(rg_session_create(w.plan, &(rg_session_options){.debug_poison = true}, &w.session, &e), &e);
  make_buffers(w.plan, 7, 0, NULL, &w.io);
  bind_all(w.session, &w.io);
  w.lengths = buffer(&w.io, RG_INPUT, "lengths");
  w.context = buffer(&w.io, RG_INPUT, "context");
  w.pages = buffer(&w.io, RG_INPUT, "pages");
  w.starts = buffer(&w.io, RG_OUTPUT, "starts");
  w.offset = buffer(&w.io, RG_OUTPUT, "offset");
  w.checked = buffer(&w.io, RG_OUTPUT, "context");
  w.table = buffer(&w.io, RG_OUTPUT, "pages");
  w.last = buffer(&w.io, RG_OUTPUT, "last");
  return w;
}

static void close_world(world *w) {
  free_buffers(&w->io);
  rg_session_destroy(w->session);
  rg_plan_destroy(w->plan);
  rg_spec_destroy(w->spec);
  rg_context_destroy(w->ctx);
}

/* What should stand in a cache after the step: `was` with the rows of sound sequences. */
static void expect(const world *w, const char *rows, const char *cache, int width,
                   const void *was) {
  const size_t size = rg_dtype_size(w->kv);
  rg_dtype from = RG_F32;
  for (int i = 0; i < w->io.n; i++)
    if (w->io.info[i].role == RG_INPUT && strcmp(w->io.info[i].name, rows) == 0)
      from = w->io.info[i].dtype;
  const char *x = buffer(&w->io, RG_INPUT, rows);
  char *want = malloc((size_t)(P * PAGE * KH * width) * size);
  memcpy(want, was, (size_t)(P * PAGE * KH * width) * size);
  for (int b = 0; b < B; b++)
    for (int t = w->starts[b]; t < w->starts[b + 1] && w->checked[b]; t++) {
      const int p = w->checked[b] - w->starts[b + 1] + t, page = w->pages[b * M + p / PAGE];
      for (int h = 0; h < KH; h++)
        for (int d = 0; d < width; d++) {
          const int to = w->hnd ? ((page * KH + h) * PAGE + p % PAGE) * width + d
                                : ((page * PAGE + p % PAGE) * KH + h) * width + d;
          float f;
          rg_convert(RG_F32, &f, from, x + (size_t)((t * KH + h) * width + d) * rg_dtype_size(from),
                     1);
          rg_convert(w->kv, want + (size_t)to * size, RG_F32, &f, 1);
        }
    }
  cr_assert_eq(
      memcmp(want, buffer(&w->io, RG_STATE, cache), (size_t)(P * PAGE * KH * width) * size), 0,
      "%s", cache);
  free(want);
}

/* A step; `fault` NULL: none, else what the error says. */
static void step(world *w, const char *fault) {
  rg_error e = {0};
  const size_t size = rg_dtype_size(w->kv), k_bytes = P * PAGE * KH * D * size,
               v_bytes = P * PAGE * KH * DV * size;
  void *k = malloc(k_bytes), *v = malloc(v_bytes);
  memcpy(k, buffer(&w->io, RG_STATE, "k_cache"), k_bytes);
  memcpy(v, buffer(&w->io, RG_STATE, "v_cache"), v_bytes);
  if (fault)
    FAILS(try_forward(w->session, &w->io, &e), RG_E_DATA, fault);
  else
    CR_OK(try_forward(w->session, &w->io, &e), &e);
  expect(w, "k", "k_cache", D, k);
  expect(w, "v", "v_cache", DV, v);
  free(k);
  free(v);
}

/* Sequences of some tokens on pages of their own, in no order. */
static void fill(world *w, uint64_t *seed) {
  int32_t page[P];
  int left = T, next = 0;
  for (int i = 0; i < P; i++) {
    const int k = (int)(next_random(seed) % (uint32_t)(i + 1));
    page[i] = page[k];
    page[k] = i;
  }
  for (int b = 0; b < B; b++) {
    w->context[b] = (int32_t)(next_random(seed) % (M * PAGE + 1));
    w->lengths[b] = (int32_t)(next_random(seed) % (uint32_t)(w->context[b] + 1));
    if (w->lengths[b] > left) w->lengths[b] = left;
    left -= w->lengths[b];
    for (int m = 0; m < M; m++)
      w->pages[b * M + m] = m * PAGE < w->context[b] ? page[next++] : INT32_MIN; /* nobody looks */
  }
}

Test(paged, rows_go_to_their_pages) {
  static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
  uint64_t seed = 11;
  for (int k = 0; k < 9; k++)
    for (int hnd = 0; hnd < 2; hnd++) {
      world w = open_world(hnd, types[k % 3], types[k / 3]);
      for (int n = 0; n < 20; n++) {
        fill(&w, &seed);
        if (n == 0) memset(w.lengths, 0, B * sizeof *w.lengths);
        step(&w, NULL);
        for (int b = 0, at = 0; b < B; b++) {
          cr_assert_eq(w.starts[b], at);
          at += w.lengths[b];
          cr_assert_eq(w.starts[b + 1], at);
          cr_assert_eq(w.checked[b], w.context[b]);
          cr_assert_eq(w.offset[b], w.context[b] - w.lengths[b]);
          cr_assert_eq(w.last[b], w.lengths[b] ? at - 1 : -1);
          for (int m = 0; m < M; m++)
            cr_assert_eq(w.table[b * M + m], m * PAGE < w.context[b] ? w.pages[b * M + m] : -1);
        }
      }
      close_world(&w);
    }
}

/* Sequence 2 of five has each fault in turn: it is named, the others are served as ever. */
Test(paged, a_fault_stays_in_its_sequence) {
  static const struct {
    int32_t length, context, page;
    const char *says;
    int rows; /* what it keeps in the pack */
  } bad[] = {
      {3, M * PAGE + 1, 9, "context[2] is 65; expected 0 to 64", 3},
      {3, INT32_MAX, 9, "context[2] is 2147483647", 3},
      {0, -1, 9, "context[2] is -1", 0},
      {3, 2, 9, "lengths[2] is 3; expected 0 to 2", 3},
      {-1, 2, 9, "lengths[2] is -1", 0},
      {INT32_MIN, 20, 9, "lengths[2] is -2147483648", 0},
      {3, 20, -1, "pages[2][1] is -1", 3},
      {3, 20, P, "pages[2][1] is 24; expected a page, 0 to 23", 3},
      {3, 20, INT32_MAX, "pages[2][1] is 2147483647", 3},
  };
  world w = open_world(false, RG_F32, RG_BF16);
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    for (int b = 0; b < B; b++) {
      w.lengths[b] = b == 2 ? bad[i].length : 2 + b;
      w.context[b] = b == 2 ? bad[i].context : 17 + b;
      for (int m = 0; m < M; m++) w.pages[b * M + m] = b * M + m;
    }
    w.pages[2 * M + 1] = bad[i].page;
    step(&w, bad[i].says);
    for (int b = 0; b < B; b++) {
      const int rows = b == 2 ? bad[i].rows : 2 + b;
      cr_assert_eq(w.starts[b + 1] - w.starts[b], rows, "fault %zu", i);
      cr_assert_eq(w.checked[b], b == 2 ? 0 : 17 + b);
      cr_assert_eq(w.last[b], b == 2 ? -1 : w.starts[b] + rows - 1);
      for (int m = 0; m < M; m++)
        cr_assert_eq(w.table[b * M + m], b == 2 || m > 1 ? -1 : b * M + m);
    }
  }
  close_world(&w);
}

/* More tokens than the plan has rows: those that fit are served, the next is named. */
Test(paged, rows_run_out) {
  world w = open_world(true, RG_F32, RG_F32);
  for (int b = 0; b < B; b++) {
    w.lengths[b] = b == 4 ? 1 : 15;
    w.context[b] = 20;
    for (int m = 0; m < M; m++) w.pages[b * M + m] = b * M + m;
  }
  step(&w, "lengths[2] is 15, and only 10 of 40 rows are left");
  static const int32_t starts[] = {0, 15, 30, 40, 40, 40}, context[] = {20, 20, 0, 0, 0};
  cr_assert_eq(memcmp(w.starts, starts, sizeof starts), 0);
  cr_assert_eq(memcmp(w.checked, context, sizeof context), 0);
  close_world(&w);
}

/* Any numbers at all: nothing outside of the caches is touched (sanitizers look on), and what comes
 * out is a batch that other ops may believe. */
Test(paged, any_numbers) {
  uint64_t seed = 99;
  world w = open_world(false, RG_BF16, RG_F16);
  static const int32_t odd[] = {-1,           0,         1,        P, P - 1, PAGE, M * PAGE,
                                M * PAGE + 1, INT32_MAX, INT32_MIN};
  for (int n = 0; n < 400; n++) {
    fill(&w, &seed);
    for (uint32_t k = next_random(&seed) % 6; k > 0; k--) {
      const int32_t value = odd[next_random(&seed) % 10];
      const uint32_t at = next_random(&seed);
      switch (at % 3) {
      case 0: w.lengths[at / 3 % B] = value; break;
      case 1: w.context[at / 3 % B] = value; break;
      default: w.pages[at / 3 % (B * M)] = value; break;
      }
    }
    rg_error e = {0};
    const rg_status status = try_forward(w.session, &w.io, &e);
    cr_assert(status == RG_OK || status == RG_E_DATA, "%s", e.message);
    for (int b = 0; b < B; b++) {
      cr_assert_leq(w.starts[b], w.starts[b + 1]);
      cr_assert(w.checked[b] >= 0 && w.checked[b] <= M * PAGE);
      cr_assert(w.offset[b] >= 0 && w.offset[b] <= w.checked[b]);
      for (int m = 0; m < M; m++) cr_assert(w.table[b * M + m] >= -1 && w.table[b * M + m] < P);
    }
    cr_assert_leq(w.starts[B], T);
  }
  close_world(&w);
}
