/* tests/gpu/test_gpu_serve.c: serving steps with the kernels that a GPU of today takes, at widths
 * of models. (Whatever else is said of serving, tests/unit/test_serve.c says on a GPU too, with
 * plain kernels.)
 */
#include "on_gpu.h"
#include "serve_gpu.h"

#ifdef REGRAPH_CUDA
#include <cuda_runtime_api.h>

enum { SEQUENCES = 4 };
static const int length[SEQUENCES] = {900, 129, 1, 1400};
/* Pages of all sequences, in no order. */
static void deal_pages(uint64_t *seed, const layer *l, int32_t *table, int M, int P) {
  int32_t *pool = malloc((size_t)P * sizeof *pool);
  int next = 0;
  for (int i = 0; i < P; i++) {
    const int k = below(seed, i + 1);
    pool[i] = pool[k];
    pool[k] = i;
  }
  for (int b = 0; b < SEQUENCES; b++)
    for (int m = 0; m < M; m++) table[b * M + m] = m * l->page < length[b] ? pool[next++] : -1;
  free(pool);
}

/* All sequences as one batch, each in one step: what other schedules are held against. */
static void run_at_once(steps *s, const int32_t *table) {
  rg_error e = {0};
  for (int i = 0; i < 4; i++)
    memcpy(buffer(&s->s.io, RG_INPUT, serve_given[i]),
           buffer(&s->whole->io, RG_INPUT, serve_given[i]),
           (size_t)s->T * row_bytes(&s->s.io, RG_INPUT, serve_given[i]));
  for (int b = 0; b < SEQUENCES; b++) s->lengths[b] = s->context[b] = length[b];
  memcpy(s->pages, table, (size_t)(SEQUENCES * s->M) * sizeof *table);
  CR_OK(try_forward(s->s.session, &s->s.io, &e), &e);
}

/* Some way to cut the sequences into steps of at most T rows, in any slots of B. */
static void run_schedule(rg_context *ctx, const layer *l, const side *whole, int T, int B, int M,
                         bool one_by_one, uint64_t seed, const char *what) {
  int pages = 3, done[SEQUENCES] = {0}, *of = malloc((size_t)B * sizeof *of);
  for (int b = 0; b < SEQUENCES; b++) pages += (length[b] + l->page - 1) / l->page;
  int32_t *table = malloc((size_t)(SEQUENCES * M) * sizeof *table);
  deal_pages(&seed, l, table, M, pages);
  steps s = open_steps(ctx, l, whole, SEQUENCES, length, T, B, M, pages, what);
  for (bool more = true; more;) {
    int left = T;
    more = false;
    for (int i = 0; i < B; i++) { /* who sits where */
      const int k = below(&seed, i + 1);
      of[i] = of[k];
      of[k] = i;
    }
    for (int b = 0; b < B; b++) {
      const int q = of[b] = of[b] < SEQUENCES ? of[b] : -1;
      int n = 0;
      if (q >= 0) {
        const int rest = length[q] - done[q], most = rest < left ? rest : left;
        /* tokens one by one at a sequence's end, or all along where it is long already */
        n = one_by_one && rest <= 40 ? most > 0
            : one_by_one             ? most - (most == rest ? 40 : 0)
                                     : below(&seed, most + 1);
        done[q] += n;
        left -= n;
        more = more || done[q] < length[q];
      }
      s.lengths[b] = n;
      s.context[b] = q >= 0 ? done[q] : 0;
      for (int m = 0; m < M; m++) s.pages[b * M + m] = q >= 0 ? table[q * M + m] : -1;
    }
    step(&s, of, NULL, -1);
  }
  close_steps(&s);
  free(table);
  free(of);
}

/* ---- page_copy ---- */

/* Three caches, of 16-byte and of odd pages, one seen as its transpose. */
static const char copies[] =
    "{\"regraph\": 1, \"inputs\": {\"pages\": {\"shape\": [\"F\", 2], \"dtype\": \"i32\"}},\n"
    " \"state\": {\n"
    "  \"a\": {\"shape\": [9, 2, 4, 8], \"dtype\": \"bf16\", \"next\": \"a1\"},\n"
    "  \"b\": {\"shape\": [9, 5, 3], \"dtype\": \"f16\", \"next\": \"b1\"},\n"
    "  \"c\": {\"shape\": [9, 7], \"dtype\": \"i32\", \"next\": \"c1\"}},\n"
    " \"nodes\": [\n"
    "  {\"name\": \"turn\", \"op\": \"transpose\", \"in\": {\"x\": \"a\"}, \"out\": {\"y\": "
    "\"at\"}, \"attrs\": {\"perm\": [0, 2, 1, 3]}},\n"
    "  {\"name\": \"copy\", \"op\": \"page_copy\", \"in\": {\"cache\": [\"at\", \"b\", "
    "\"c\"], \"pages\": \"pages\"},\n"
    "   \"out\": {\"cache\": [\"a1\", \"b1\", \"c1\"]}}],\n"
    " \"outputs\": {\"now\": \"c1\"}}";

/* Lists of `entries`, all but four of which are none. */
static void copied_or_none(int entries) {
  static const struct {
    int32_t pages[4][2];
    const char *says; /* NULL: all is well */
  } list[] = {
      {{{0, 2}, {-1, -1}, {5, 1}, {0, 8}}, NULL},
      {{{0, 2}, {-1, -1}, {0, 9}, {9, 1}}, "pages[2][1] is 9; expected a page, 0 to 8, or two -1"},
      {{{3, 3}, {-1, 5}, {0, 1}, {2, 4}}, "pages[1][0] is -1"},
      {{{0, 2}, {-2, -2}, {0, 1}, {2, 4}}, "pages[0] writes page 2, which pages[3] reads"},
      {{{0, 2}, {1, 7}, {3, 7}, {-1, -1}}, "pages[1] writes page 7, which pages[2] writes, too"},
      {{{6, 6}, {7, 0}, {-1, -1}, {-1, -1}}, NULL},
      {{{INT32_MAX, 1}, {-1, -1}, {-1, -1}, {0, INT32_MIN}}, "pages[0][0] is 2147483647"},
  };
  rg_error e = {0};
  rg_context *ctx;
  rg_plan *plan;
  rg_session *s;
  buffers io;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = load_spec(ctx, copies);
  const rg_plan_options o = {.device = "cuda", .set = &(rg_binding){"F", entries, NULL}, .nset = 1};
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  CR_OK(rg_session_create(plan, NULL, &s, &e), &e);
  make_buffers(plan, 1, 0, NULL, &io);
  static const char *const name[] = {"a", "b", "c"};
  static const size_t page[] = {128, 30, 28};
  for (int k = 0; k < 3; k++)
    for (size_t i = 0; i < 9 * page[k]; i++)
      ((unsigned char *)buffer(&io, RG_STATE, name[k]))[i] = (unsigned char)(i * 7 + i / page[k]);
  bind_all(s, &io);
  for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
    unsigned char was[3][9 * 128];
    for (int k = 0; k < 3; k++) memcpy(was[k], buffer(&io, RG_STATE, name[k]), 9 * page[k]);
    memset(buffer(&io, RG_INPUT, "pages"), 0xff, (size_t)entries * sizeof list[i].pages[0]);
    memcpy(buffer(&io, RG_INPUT, "pages"), list[i].pages, sizeof list[i].pages);
    if (list[i].says)
      FAILS(try_forward(s, &io, &e), RG_E_DATA, list[i].says);
    else
      CR_OK(try_forward(s, &io, &e), &e);
    for (int n = 0; n < 4 && !list[i].says; n++)
      for (int k = 0; k < 3 && list[i].pages[n][0] >= 0; k++)
        memmove(was[k] + (size_t)list[i].pages[n][1] * page[k],
                was[k] + (size_t)list[i].pages[n][0] * page[k], page[k]);
    for (int k = 0; k < 3; k++)
      cr_assert_eq(memcmp(was[k], buffer(&io, RG_STATE, name[k]), 9 * page[k]), 0, "list %zu: %s",
                   i, name[k]);
  }
  free_buffers(&io);
  rg_session_destroy(s);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(gpu_serve, pages_are_copied_or_none) {
  NEEDS_GPU();
  copied_or_none(4);
  copied_or_none(70);
}

/* ---- schedules ---- */

/* Whatever the schedule, the batch's size, the capacity and the order of pages: the same bits. And
 * `same` outputs say what the unpaged graph says. */
static void any_schedule(const layer *l, const char *const *same, int count, const char *what) {
  rg_error e = {0};
  rg_context *ctx;
  uint64_t seed = 77;
  int total = 0;
  serve_native = true;
  for (int b = 0; b < SEQUENCES; b++) total += length[b];
  const int M = (1400 + l->page - 1) / l->page, P = SEQUENCES * M;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  side whole = run_whole(ctx, l, 5, SEQUENCES, length, 0);
  steps s = open_steps(ctx, l, &whole, SEQUENCES, length, total, SEQUENCES, M, P, what);
  int32_t *table = malloc((size_t)(SEQUENCES * M) * sizeof *table);
  deal_pages(&seed, l, table, M, P);
  run_at_once(&s, table);
  for (int i = 0; i < count; i++) /* the same tiles, over pages or not */
    cr_assert_eq(memcmp(buffer(&whole.io, RG_OUTPUT, same[i]), buffer(&s.s.io, RG_OUTPUT, same[i]),
                        (size_t)total * row_bytes(&s.s.io, RG_OUTPUT, same[i])),
                 0, "%s: %s of the unpaged graph", what, same[i]);
  int undecided = 0, first = total - length[SEQUENCES - 1];
  for (int t = first + l->top_n * l->block; t < total && l->alike != 0; t += 7)
    undecided += oracle_chooses(l, &whole.io, t, t - first + 1, NULL, what);
  cr_assert(undecided > 0 || l->alike == 0, "%s", what);
  run_schedule(ctx, l, &s.s, 300, 5, M, false, 1, "steps of any size");
  run_schedule(ctx, l, &s.s, 1500, 64, 8 * M, true, 2, "prompts, then one by one");
  run_schedule(ctx, l, &s.s, 64, 4, M + 1, true, 3, "64 rows");
  run_schedule(ctx, l, &s.s, 300, 300, M, true, 4, "one of 300");
  layer few = *l;
  few.few = true; /* slc, swa and combine are one launch, where kernels take them */
  run_schedule(ctx, &few, &s.s, 300, 300, M, true, 5, "one of 300, joined");
  run_schedule(ctx, &few, &s.s, 150, 150, M, true, 6, "one of 150, in one launch");
  free(table);
  close_steps(&s);
  close_side(&whole);
  rg_context_destroy(ctx);
}

Test(gpu_serve, any_schedule_gives_the_same_bits, .timeout = 300) {
  NEEDS_GPU();
  layer l = wide;
  static const char *const all[] = {"swa_o", "swa_lse", "cmp_o",   "cmp_lse",
                                    "idx",   "slc_o",   "slc_lse", "o"};
  any_schedule(&l, all, 8, "bf16");
  l.H = 8, l.page = 64, l.hnd = true, l.q = l.kv = RG_F16, l.k_method = 1, l.v_method = 2;
  any_schedule(&l, all, 2, "f16, groups of four, HND, learned");
}

/* What leaves a choice to more than fp32 sums, or to the order of blocks; then where softmax has to
 * move its reference: wherever it goes on to earlier keys, or to later ones, late, for keys of one
 * warp; and numbers that are hardly any. */
enum {
  PLAIN,
  HEADS_ALIKE = 1,
  KEYS_AGAIN = 2,
  FALLING = 4,
  RISING = 8,
  LATE = 16,
  ONE_WARP = 32,
  EXTREME = 64
};

/* What the first of a key's D is, in row `row` of n: a step up is 12 and more powers of two. */
static float first_of_key(int kind, int b, int row, int n) {
  const int after = (n - 1 - row) / 64;
  switch (kind) {
  case FALLING: return (float)(after % 200);
  case RISING: return (float)(row / 64 % 200);
  case LATE: return row < 40 || (row >= n - 505 && row < n - 480) ? 6.0f : 0.0f;
  case ONE_WARP: return row % 64 / 16 == b % 4 ? (float)(after % 200) : 0.0f;
  default: break; /* the last ones are not seen by any head */
  }
  if (row >= n - 150) return -INFINITY;
  if (row == n / 2 && b % 2) return NAN;
  return row % 448 == 71 ? 1e30f : after % 3 ? (float)after : -1e30f;
}

/* The same for all keys of a step's sequences, and q to go with it: every fourth head looks
 * elsewhere. */
static void move_references(const buffers *io, const layer *l, const int *context, int B,
                            int kind) {
  const float looks = 100, no = kind == EXTREME ? looks : 0;
  for (int cmp = 0; cmp < 2; cmp++) {
    const int rows = cmp ? l->page / l->stride : l->page, each = l->page / rows;
    char *const x = buffer(io, RG_STATE, cmp ? "ck" : "kc");
    for (int b = 0, page = 0; b < B; b++)
      for (int m = 0; m * l->page < context[b]; m++, page++)
        for (int i = 0; i < rows * l->KH; i++) {
          const float value =
              first_of_key(kind, b, m * rows + i / l->KH, (context[b] + each - 1) / each);
          rg_convert(l->kv, x + ((size_t)(page * rows * l->KH + i) * l->D) * 2, RG_F32, &value, 1);
        }
  }
  for (int i = 0; i < B * l->H; i++)
    rg_convert(l->q, (char *)buffer(io, RG_INPUT, "q") + (size_t)i * l->D * 2, RG_F32,
               i % 4 == 3 ? &no : &looks, 1);
}

/* Single tokens have kernels of their own where a step has no more rows than sequences. Over long
 * contexts of large logits, whose softmax has to move its reference: the bits of other kernels.
 * HEADS_ALIKE: heads of a token agree on a few blocks, beside which the others score next to
 * nothing. KEYS_AGAIN: 64 rows of compressed keys, over and over. */
static void single_tokens(int H, int D, int most, float large, int kind) {
  enum { B = 6, OUT = 8, SIDES = 5, SOME = 80, MANY = 400 };
  /* two blocks of threads a token; kernels of many tokens; one block of threads a token, blocks
   * chosen nearly first; several tokens a block, slc, swa and combine in one launch; all of a
   * layer in one */
  static const int rows[SIDES] = {B, B + 3, SOME, MANY, SOME},
                   sequences[SIDES] = {B, B, SOME, MANY, SOME};
  static const char *const made[OUT] = {"cmp_o",   "cmp_lse", "idx",     "slc_o",
                                        "slc_lse", "swa_o",   "swa_lse", "o"};
  layer l = wide;
  l.H = H, l.KH = H / 16, l.D = l.DV = D, l.softmax = D == 64;
  const int M = (most + l.page - 1) / l.page,
            context[B] = {most, 1, most / 2 + 17, 0, most < 4133 ? most - 9 : 4133, most / 3};
  int P = 0;
  for (int b = 0; b < B; b++) P += (context[b] + l.page - 1) / l.page;
  rg_error e = {0};
  rg_context *ctx;
  side s[SIDES];
  uint64_t seed = (uint64_t)most;
  serve_native = true;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (int k = 0; k < SIDES; k++) {
    l.few = k >= 3;
    const rg_binding set[] = {
        {"T", rows[k], NULL}, {"B", sequences[k], NULL}, {"M", M, NULL}, {"P", P, NULL}};
    rg_plan_options o = serve_options(set, 4);
    s[k] = (side){.spec = steps_spec(ctx, &l)};
    CR_OK(rg_plan_create(s[k].spec, NULL, &o, &s[k].plan, &e), &e);
    CR_OK(rg_session_create(s[k].plan, NULL, &s[k].session, &e), &e);
    make_buffers(s[k].plan, 1, 0, NULL, &s[k].io);
    for (int i = 0; i < s[k].io.n; i++) {
      const rg_tensor_info *t = &s[k].io.info[i];
      if (t->role == RG_STATE && k == 0)
        fill_floats(t, s[k].io.data[i], (uint64_t)i);
      else if (t->role == RG_STATE)
        memcpy(s[k].io.data[i], buffer(&s[0].io, RG_STATE, t->name), (size_t)t->bytes);
      const size_t again = 64 * row_bytes(&s[k].io, RG_STATE, "ck") / (size_t)(l.page / l.stride);
      char *x = s[k].io.data[i];
      if (k == 0 && strcmp(t->name, "ck") == 0 && kind & KEYS_AGAIN)
        for (size_t n = again; n < (size_t)t->bytes; n++) x[n] = x[n - again];
    }
    int32_t *lengths = buffer(&s[k].io, RG_INPUT, "lengths"),
            *all = buffer(&s[k].io, RG_INPUT, "context"),
            *pages = buffer(&s[k].io, RG_INPUT, "pages");
    memset(buffer(&s[k].io, RG_INPUT, "forks"), 0xff, 4 * sizeof(int32_t));
    int page = 0;
    for (int b = 0; b < sequences[k]; b++) {
      all[b] = b < B ? context[b] : 0;
      lengths[b] = all[b] > 0;
      for (int m = 0; m < M; m++) pages[b * M + m] = m * l.page < all[b] ? page++ : -1;
    }
    for (int i = 0; i < 4; i++) { /* the same rows */
      const size_t size = row_bytes(&s[k].io, RG_INPUT, serve_given[i]);
      char *x = buffer(&s[k].io, RG_INPUT, serve_given[i]);
      if (k > 0) memcpy(x, buffer(&s[0].io, RG_INPUT, serve_given[i]), B * size);
      for (size_t n = 0; k == 0 && i == 0 && n < B * size / 2; n++) {
        const float value = large * (float)(below(&seed, 2001) - 1000) / 1000;
        rg_convert(RG_BF16, x + 2 * n, RG_F32, &value, 1);
      }
    }
    if (k == 0 && kind & HEADS_ALIKE) alike_heads(&s[k].io, &l, 1);
    if (k == 0 && kind >= FALLING) move_references(&s[k].io, &l, context, B, kind);
    bind_all(s[k].session, &s[k].io);
  }
  for (int k = 0; k < SIDES; k++) CR_OK(try_forward(s[k].session, &s[k].io, &e), &e);
  for (int i = 0; i < OUT * (SIDES - 1); i++) {
    const int k = 1 + i / OUT, n = i % OUT;
    const size_t size = row_bytes(&s[k].io, RG_OUTPUT, made[n]);
    if (size == 0) continue;
    if (kind == EXTREME && made[n][0] != 'c' && strncmp(made[n], "swa", 3)) continue;
    const char *x = buffer(&s[0].io, RG_OUTPUT, made[n]), *y = buffer(&s[k].io, RG_OUTPUT, made[n]);
    for (int t = 0; t < B; t++) /* the last one is of nobody, and zero */
      cr_assert_eq(memcmp(x + (size_t)t * size, y + (size_t)t * size, size), 0,
                   "%s of row %d, H %d D %d, contexts up to %d, logits %g, side %d", made[n], t, H,
                   D, most, (double)large, k);
  }
  int undecided = 0;
  for (int b = 0, t = 0; b < B && kind && kind<FALLING; t += context[b++]> 0)
    if (context[b] > 0)
      undecided +=
          oracle_chooses(&l, &s[0].io, t, context[b],
                         (int32_t *)buffer(&s[0].io, RG_INPUT, "pages") + b * M, "a single token");
  if (kind & HEADS_ALIKE) /* four contexts have more than top_n blocks */
    cr_assert(undecided >= (kind & KEYS_AGAIN ? 1 : 4 * l.KH), "%d undecided", undecided);
  for (int k = 0; k < SIDES; k++) close_side(&s[k]);
  rg_context_destroy(ctx);
}

/* Tokens of so many sequences, several for a block of threads, step after step, the last with
 * pieces of up to 35 tokens among them: the bits of nodes apart, and the same in all pages. */
static void many_single_tokens(int n, int H, int D, int kind) {
  enum { OUT = 4, STATES = 4, STEPS = 4, PIECE = 35 };
  static const char *const made[OUT] = {"cmp_o", "cmp_lse", "idx", "o"}, *const state[STATES] = {
                                                                             "kc", "vc", "ck",
                                                                             "cv"};
  layer l = wide;
  l.H = H, l.KH = H / 16, l.D = l.DV = D, l.few = true, l.softmax = kind == PLAIN;
  const int M = 24;
  int32_t *const context = calloc((size_t)n, sizeof *context);
  uint64_t seed = (uint64_t)n;
  int P = 1, page = 0;
  for (int b = 0; b < n; b++) {
    context[b] = below(&seed, 8) ? 1 + below(&seed, below(&seed, 4) ? 700 : M * l.page) : 0;
    if (context[b] > M * l.page - STEPS - PIECE) context[b] -= STEPS + PIECE;
    P += (context[b] + STEPS + PIECE + l.page - 1) / l.page;
  }
  rg_error e = {0};
  rg_context *ctx;
  side s[2];
  serve_native = true;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (int k = 0; k < 2; k++) {
    const rg_binding set[] = {{"T", n, NULL}, {"B", n, NULL}, {"M", M, NULL}, {"P", P, NULL}};
    rg_plan_options o = serve_options(set, 4);
    o.no_fuse = k == 0;
    s[k] = (side){.spec = steps_spec(ctx, &l)};
    CR_OK(rg_plan_create(s[k].spec, NULL, &o, &s[k].plan, &e), &e);
    CR_OK(rg_session_create(s[k].plan, NULL, &s[k].session, &e), &e);
    make_buffers(s[k].plan, 1, 0, NULL, &s[k].io);
    if (k == 0) {
      for (int i = 0; i < s[k].io.n; i++)
        if (s[k].io.info[i].role == RG_STATE)
          fill_floats(&s[k].io.info[i], s[k].io.data[i], (uint64_t)i);
      int32_t *lengths = buffer(&s[k].io, RG_INPUT, "lengths"),
              *all = buffer(&s[k].io, RG_INPUT, "context"),
              *pages = buffer(&s[k].io, RG_INPUT, "pages");
      memset(buffer(&s[k].io, RG_INPUT, "forks"), 0xff, 4 * sizeof(int32_t));
      for (int b = 0; b < n; b++) {
        all[b] = context[b];
        lengths[b] = context[b] > 0;
        for (int m = 0; m < M; m++)
          pages[b * M + m] = m * l.page < context[b] + STEPS + PIECE ? page++ : -1;
      }
      const size_t floats = (size_t)n * row_bytes(&s[k].io, RG_INPUT, "q") / 2;
      for (size_t i = 0; i < floats; i++) {
        const float value = (kind ? 400.0f : 8.0f) * (float)(below(&seed, 2001) - 1000) / 1000;
        rg_convert(RG_BF16, (char *)buffer(&s[k].io, RG_INPUT, "q") + 2 * i, RG_F32, &value, 1);
      }
      if (kind & HEADS_ALIKE) alike_heads(&s[k].io, &l, 1);
    } else {
      for (int i = 0; i < s[k].io.n; i++) {
        const rg_tensor_info *t = &s[k].io.info[i];
        if (t->role == RG_STATE || t->role == RG_INPUT)
          memcpy(s[k].io.data[i], buffer(&s[0].io, t->role, t->name), (size_t)t->bytes);
      }
    }
    bind_all(s[k].session, &s[k].io);
  }
  for (int at = 0; at < STEPS; at++) {
    int left = 0; /* rows that nobody has */
    for (int b = 0; b < n; b++) left += context[b] == 0;
    for (int k = 0; k < 2; k++)
      for (int i = 0, rest = left; i < s[k].io.n; i++) {
        const rg_tensor_info *t = &s[k].io.info[i];
        if (t->role != RG_INPUT) continue;
        if (strcmp(t->name, "k") == 0 || strcmp(t->name, "v") == 0) /* new ones */
          fill_floats(t, s[k].io.data[i], (uint64_t)(1000 * at + i));
        int32_t *const x = s[k].io.data[i];
        const bool lengths = strcmp(t->name, "lengths") == 0;
        if (at == 0 || (!lengths && strcmp(t->name, "context") != 0)) continue;
        for (int b = 0; b < n; b++) {
          const int more = at == STEPS - 1 && b % 7 == 3 && rest >= PIECE - 1 ? PIECE : 1;
          if (context[b] == 0) continue;
          x[b] = lengths ? more : x[b] + more;
          rest -= more - 1;
        }
      }
    for (int k = 0; k < 2; k++) CR_OK(try_forward(s[k].session, &s[k].io, &e), &e);
    for (int i = 0; i < OUT; i++) {
      const size_t size = row_bytes(&s[0].io, RG_OUTPUT, made[i]);
      const char *x = buffer(&s[0].io, RG_OUTPUT, made[i]),
                 *y = buffer(&s[1].io, RG_OUTPUT, made[i]);
      for (int t = 0; t < n; t++)
        cr_assert_eq(memcmp(x + (size_t)t * size, y + (size_t)t * size, size), 0,
                     "%s of row %d of %d, H %d D %d, step %d", made[i], t, n, H, D, at);
    }
    for (int i = 0; i < STATES; i++)
      cr_assert_eq(memcmp(buffer(&s[0].io, RG_STATE, state[i]),
                          buffer(&s[1].io, RG_STATE, state[i]),
                          (size_t)P * row_bytes(&s[0].io, RG_STATE, state[i])),
                   0, "%s of %d, H %d D %d, step %d", state[i], n, H, D, at);
  }
  for (int k = 0; k < 2; k++) close_side(&s[k]);
  rg_context_destroy(ctx);
  free(context);
}

Test(gpu_serve, many_single_tokens, .timeout = 300) {
  NEEDS_GPU();
  many_single_tokens(60, 64, 128, PLAIN);  /* two */
  many_single_tokens(300, 64, 128, PLAIN); /* up to ten */
  many_single_tokens(500, 32, 64, PLAIN);
  many_single_tokens(97, 64, 128, HEADS_ALIKE);
}

Test(gpu_serve, single_tokens_have_the_bits_of_many, .timeout = 300) {
  NEEDS_GPU();
  single_tokens(32, 128, 5000, 1, PLAIN);
  single_tokens(32, 128, 5000, 20, PLAIN);
  single_tokens(16, 128, 16384, 4, PLAIN); /* the last whose products shared memory holds */
  single_tokens(16, 128, 16400, 4, PLAIN);
  single_tokens(16, 64, 40000, 20, PLAIN);
  single_tokens(16, 128, 170000, 4, PLAIN);
}

Test(gpu_serve, short_single_tokens, .timeout = 300) { /* what tools have time for */
  NEEDS_GPU();
  single_tokens(16, 64, 300, 4, PLAIN);
  single_tokens(16, 128, 300, 1, PLAIN);
}
Test(gpu_serve, short_references_that_move, .timeout = 300) {
  NEEDS_GPU();
  single_tokens(16, 64, 2300, 1, FALLING);
  single_tokens(16, 64, 300, 1, RISING);
}

/* Weights are made before it is known whether a reference moves: where it does. */
Test(gpu_serve, references_that_move, .timeout = 300) {
  NEEDS_GPU();
  for (int kind = FALLING; kind <= EXTREME; kind *= 2) {
    single_tokens(32, 128, 5000, 1, kind);
    single_tokens(16, 64, 40000, 1, kind);
  }
  single_tokens(16, 128, 40000, 1, FALLING);
  single_tokens(16, 128, 40000, 1, ONE_WARP);
}

/* Rows that fp32 sums leave to fp64, and blocks that tie (all are scored then where they are chosen
 * nearly first), in contexts whose blocks a thread each ranks, in those that shared memory has room
 * for, and in longer ones. */
Test(gpu_serve, undecided_single_tokens, .timeout = 300) {
  NEEDS_GPU();
  single_tokens(32, 128, 5000, 400, HEADS_ALIKE);
  single_tokens(32, 128, 5000, 1, KEYS_AGAIN);
  single_tokens(32, 128, 5000, 400, HEADS_ALIKE | KEYS_AGAIN);
  single_tokens(16, 64, 40000, 400, HEADS_ALIKE);
  single_tokens(16, 64, 40000, 1, KEYS_AGAIN);
  single_tokens(16, 128, 170000, 400, HEADS_ALIKE);
  single_tokens(16, 128, 170000, 1, KEYS_AGAIN);
}

/* The same rows in prompts, over pages and not. */
Test(gpu_serve, undecided_in_any_schedule, .timeout = 300) {
  NEEDS_GPU();
  static const char *const idx[] = {"idx"};
  layer l = wide;
  l.alike = 600;
  any_schedule(&l, idx, 1, "heads alike");
}

/* One graph, captured once, over random batches: the bits of a session that runs step by step;
 * the device's memory stays as it is. */
Test(gpu_serve, one_graph_for_any_batch, .timeout = 900) {
  NEEDS_GPU();
  const char *asked = getenv("REGRAPH_SOAK");
  const int runs = asked ? atoi(asked) : 300, every = 20;
  enum { T = 200, B = 8, M = 12, P = 60 };
  layer l = wide;
  rg_error e = {0};
  rg_context *ctx;
  uint64_t seed = 9;
  size_t before = 0, after = 0, all;
  side s[2];
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  l.H = 8, l.D = l.DV = 64;
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"M", M, NULL}, {"P", P, NULL}};
  serve_native = true;
  for (int k = 0; k < 2; k++) {
    rg_plan_options o = serve_options(set, 4);
    s[k] = (side){.spec = steps_spec(ctx, &l)};
    CR_OK(rg_plan_create(s[k].spec, NULL, &o, &s[k].plan, &e), &e);
    CR_OK(rg_session_create(s[k].plan, &(rg_session_options){.eager = k}, &s[k].session, &e), &e);
    make_buffers(s[k].plan, 1, 0, NULL, &s[k].io);
    for (int i = 0; i < s[k].io.n; i++) /* contexts reach over what no step wrote */
      if (s[k].io.info[i].role == RG_STATE)
        fill_floats(&s[k].io.info[i], s[k].io.data[i], (uint64_t)i);
    bind_all(s[k].session, &s[k].io);
  }
  for (int r = 0; r < runs; r++) {
    int32_t *lengths = buffer(&s[0].io, RG_INPUT, "lengths"),
            *context = buffer(&s[0].io, RG_INPUT, "context"),
            *pages = buffer(&s[0].io, RG_INPUT, "pages"),
            *forks = buffer(&s[0].io, RG_INPUT, "forks");
    int left = T, page = 0;
    for (int b = 0; b < B; b++) {
      const int held = below(&seed, P / B + 1);
      context[b] = held ? below(&seed, held * l.page + 1) : 0;
      lengths[b] = below(&seed, (context[b] < left ? context[b] : left) + 1);
      if (below(&seed, 2) && lengths[b]) lengths[b] = 1;
      left -= lengths[b];
      for (int m = 0; m < M; m++) pages[b * M + m] = m < held ? page++ : -1;
    }
    memset(forks, 0xff, 4 * sizeof *forks);
    if (r % 3 == 0) forks[0] = below(&seed, P - 1), forks[1] = P - 1;
    for (int i = 0; i < s[0].io.n; i++)
      if (s[0].io.info[i].role == RG_INPUT)
        memcpy(s[1].io.data[i], s[0].io.data[i], (size_t)s[0].io.info[i].bytes);
    for (int k = 0; k < 2; k++) {
      upload_role(&s[k].io, RG_INPUT);
      CR_OK(rg_session_forward(s[k].session, &e), &e);
      CR_OK(rg_session_synchronize(s[k].session, &e), &e);
    }
    if (r == 10) CUDA_OK(cudaMemGetInfo(&before, &all));
    if (r % every && r != runs - 1) continue;
    for (int k = 0; k < 2; k++) read_all(&s[k].io);
    same_results(&s[0].io, &s[1].io, "a random batch");
    for (int i = 0; i < s[0].io.n; i++)
      if (s[0].io.info[i].role == RG_STATE)
        cr_assert_eq(memcmp(s[0].io.data[i], s[1].io.data[i], (size_t)s[0].io.info[i].bytes), 0,
                     "state %s after %d batches", s[0].io.info[i].name, r);
  }
  CUDA_OK(cudaMemGetInfo(&after, &all));
  fprintf(stderr, "%d batches; %.1f MiB free on the device after ten, %.1f now\n", runs,
          (double)before / 1048576, (double)after / 1048576);
  for (int k = 0; k < 2; k++) close_side(&s[k]);
  rg_context_destroy(ctx);
}

/* ---- a loop ---- */

/* A model's step of single tokens and its queue, whose arrays are the step's inputs. */
typedef struct loop {
  side s;
  rg_queue *q;
  rg_queue_arrays a;
} loop;

enum { LOOP_B = 16, LOOP_M = 8, LOOP_P = 30, WORDS = 90, FORKS = 2 };

static loop open_loop(rg_context *ctx) {
  const rg_binding set[] = {{"T", LOOP_B, NULL},   {"B", LOOP_B, NULL},   {"M", LOOP_M, NULL},
                            {"P", LOOP_P, NULL},   {"V", WORDS, NULL},    {"W", 64, NULL},
                            {"F", 64, NULL},       {"layers", 2, NULL},   {"H", 16, NULL},
                            {"D", 64, NULL},       {"DV", 64, NULL},      {"top_n", 4, NULL},
                            {"window", 128, NULL}, {"forks", FORKS, NULL}};
  rg_error e = {0};
  loop l = {0};
  const rg_plan_options plan = {.device = "cuda", .pack_seconds = 0.005};
  const rg_queue_options o = {.size = sizeof o,
                              .pages = LOOP_P,
                              .page = 128,
                              .rows = LOOP_B,
                              .slots = LOOP_B,
                              .most = LOOP_M,
                              .forks = FORKS};
  CR_OK(rg_spec_load_file(ctx, RG_SOURCE_DIR "/examples/serve_model.json", set,
                          sizeof set / sizeof *set, &l.s.spec, &e),
        &e);
  CR_OK(rg_plan_create(l.s.spec, NULL, &plan, &l.s.plan, &e), &e);
  CR_OK(rg_session_create(l.s.plan, NULL, &l.s.session, &e), &e);
  make_buffers(l.s.plan, 5, 0, NULL, &l.s.io);
  bind_all(l.s.session, &l.s.io);
  CR_OK(rg_queue_create(ctx, &o, &l.q, &e), &e);
  l.a = (rg_queue_arrays){.tokens = buffer(&l.s.io, RG_INPUT, "tokens"),
                          .lengths = buffer(&l.s.io, RG_INPUT, "lengths"),
                          .context = buffer(&l.s.io, RG_INPUT, "context"),
                          .pages = buffer(&l.s.io, RG_INPUT, "pages"),
                          .forks = buffer(&l.s.io, RG_INPUT, "forks"),
                          .request = calloc(LOOP_B, sizeof(rg_request)),
                          .wanted = calloc(LOOP_B, sizeof(bool)),
                          .last = calloc(LOOP_B, sizeof(bool))};
  return l;
}

/* One tensor, to the device or from it. */
static void move(loop *l, const char *name, bool back) {
  rg_error e = {0};
  buffers *io = &l->s.io;
  for (int i = 0; i < io->n; i++)
    if (strcmp(io->info[i].name, name) == 0)
      CR_OK(
          back ? rg_memory_read(io->plan, io->data[i], io->device[i], (size_t)io->info[i].bytes, &e)
               : rg_memory_write(io->plan, io->device[i], io->data[i], (size_t)io->info[i].bytes,
                                 &e),
          &e);
}
static void run_step(loop *l) {
  static const char *const given[] = {"tokens", "lengths", "context", "pages", "forks"};
  rg_error e = {0};
  for (int i = 0; i < 5; i++) move(l, given[i], false);
  CR_OK(rg_session_forward(l->s.session, &e), &e);
  move(l, "next", true);
}

/* Requests of a few kinds come at random, and are cancelled at random. Each of a kind is told what
 * the first of it was, whoever shares its steps; nothing grows. */
Test(gpu_serve, random_arrivals, .timeout = 900) {
  NEEDS_GPU();
  enum { KINDS = 12, LONGEST = 600, AT_ONCE = 64, MOST_NEW = 300 };
  const char *asked = getenv("REGRAPH_SOAK");
  const int steps = asked ? 20 * atoi(asked) : 600;
  static struct {
    int32_t prompt[LONGEST], said[MOST_NEW];
    int n, most, known;
  } kind[KINDS];
  static struct {
    rg_request number;
    int kind, n;
  } live[AT_ONCE];
  rg_error e = {0};
  rg_context *ctx;
  uint64_t seed = 4;
  size_t before = 0, after = 0, all;
  int64_t told = 0, compared = 0;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  loop l = open_loop(ctx);
  const int32_t *next = buffer(&l.s.io, RG_OUTPUT, "next");
  for (int k = 0; k < KINDS; k++) {
    kind[k].n = 1 + below(&seed, k % 4 ? 40 : LONGEST), kind[k].most = 1 + below(&seed, MOST_NEW);
    for (int i = 0; i < kind[k].n; i++) kind[k].prompt[i] = below(&seed, WORDS);
    if (k % 3 == 1) /* begins as another does */
      memcpy(kind[k].prompt, kind[k - 1].prompt,
             (size_t)(kind[k].n < kind[k - 1].n ? kind[k].n : kind[k - 1].n) * sizeof(int32_t));
  }
  for (int step = 0; step < steps; step++) {
    for (int i = 0; i < AT_ONCE; i++) {
      if (live[i].number && below(&seed, 4000) == 0) {
        CR_OK(rg_queue_cancel(l.q, live[i].number, &e), &e);
        live[i].number = 0;
      } else if (!live[i].number && below(&seed, 60) == 0) {
        const int k = live[i].kind = below(&seed, KINDS);
        live[i].n = 0;
        CR_OK(rg_queue_add(l.q, kind[k].prompt, kind[k].n, kind[k].most, &live[i].number, &e), &e);
      }
    }
    CR_OK(rg_queue_step(l.q, &l.a, &e), &e);
    if (!l.a.rows) continue;
    run_step(&l);
    CR_OK(rg_queue_done(l.q, next, &e), &e);
    for (int64_t b = 0; b < l.a.used; b++) {
      int i = 0;
      while (i < AT_ONCE && live[i].number != l.a.request[b]) i++;
      if (i == AT_ONCE || !l.a.wanted[b]) continue;
      const int k = live[i].kind, at = live[i].n++;
      told++;
      if (at < kind[k].known) {
        compared++;
        cr_assert_eq(next[b], kind[k].said[at], "step %d: token %d of kind %d", step, at, k);
      } else {
        kind[k].said[kind[k].known++] = next[b];
      }
      if (l.a.last[b]) live[i].number = 0;
    }
    if (step == 100) CUDA_OK(cudaMemGetInfo(&before, &all));
  }
  CUDA_OK(cudaMemGetInfo(&after, &all));
  rg_queue_info info;
  cr_assert_eq(rg_queue_count(l.q, &info), RG_OK);
  fprintf(
      stderr,
      "%d steps; %lld tokens told, %lld compared; %lld finished, %lld cancelled, %lld rows found; "
      "%.1f MiB free on the device after a hundred, %.1f now\n",
      steps, (long long)told, (long long)compared, (long long)info.finished,
      (long long)info.cancelled, (long long)info.found, (double)before / 1048576,
      (double)after / 1048576);
  cr_assert(compared > told / 2 && info.found > 0);
  rg_queue_destroy(l.q);
  free(l.a.request), free(l.a.wanted), free(l.a.last);
  close_side(&l.s);
  rg_context_destroy(ctx);
}
#endif
