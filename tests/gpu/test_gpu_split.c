/* tests/gpu/test_gpu_split.c: single tokens whose keys are shared out among several blocks of
 * threads ("split_kv" in the policy): bits of their own, the same in any batch.
 */
#include "exec/plan.h"
#include "on_gpu.h"
#include "serve_gpu.h"

enum { PLAIN, HEADS_ALIKE = 1, KEYS_AGAIN = 2 };
enum { MADE = 4 };
static const char *const made[MADE] = {"cmp_o", "cmp_lse", "idx", "o"};

/* A step of sequences of these contexts, of which number of[b] sits in slot b (-1: nobody), beside
 * the same pages. */
typedef struct holds {
  const layer *l;
  const int *context;
  int n, P;    /* sequences, pages */
  float large; /* of q */
  int kind;
  const side *first; /* whose contents are taken over; NULL: made here */
} holds;

static int first_page(const holds *h, int seq) {
  int page = 0;
  for (int b = 0; b < seq; b++) page += (h->context[b] + h->l->page - 1) / h->l->page;
  return page;
}

static void fill_all(const holds *h, side *s) {
  uint64_t seed = (uint64_t)h->context[0];
  for (int i = 0; i < s->io.n; i++) {
    const rg_tensor_info *t = &s->io.info[i];
    if (t->role == RG_STATE && !h->first)
      fill_floats(t, s->io.data[i], (uint64_t)i);
    else if (t->role == RG_STATE)
      memcpy(s->io.data[i], buffer(&h->first->io, RG_STATE, t->name), (size_t)t->bytes);
    if (h->first || strcmp(t->name, "ck") != 0 || !(h->kind & KEYS_AGAIN)) continue;
    const size_t again =
        64 * row_bytes(&s->io, RG_STATE, "ck") / (size_t)(h->l->page / h->l->stride);
    char *x = s->io.data[i];
    for (size_t n = again; n < (size_t)t->bytes; n++) x[n] = x[n - again];
  }
  if (h->first) return;
  const size_t size = rg_dtype_size(h->l->q),
               floats = (size_t)h->n * row_bytes(&s->io, RG_INPUT, "q") / size;
  for (size_t i = 0; i < floats; i++) {
    const float value = h->large * (float)(below(&seed, 2001) - 1000) / 1000;
    rg_convert(h->l->q, (char *)buffer(&s->io, RG_INPUT, "q") + size * i, RG_F32, &value, 1);
  }
  if (h->kind & HEADS_ALIKE) alike_heads(&s->io, h->l, 1);
}

/* One step of T rows, B slots and tables of M pages. */
static side run_step(rg_context *ctx, const holds *h, const char *policy_text, int T, int B, int M,
                     const int *of) {
  const layer *l = h->l;
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"M", M, NULL}, {"P", h->P, NULL}};
  rg_plan_options o = serve_options(set, 4);
  rg_error e = {0};
  rg_policy *policy = NULL;
  side s = {.spec = steps_spec(ctx, l)};
  if (policy_text)
    CR_OK(rg_policy_load_text(ctx, policy_text, strlen(policy_text), "policy", &policy, &e), &e);
  CR_OK(rg_plan_create(s.spec, policy, &o, &s.plan, &e), &e);
  rg_policy_destroy(policy);
  cr_assert_eq(s.plan->fusions->split, policy_text != NULL);
  rg_session_options how = serve_session();
  CR_OK(rg_session_create(s.plan, &how, &s.session, &e), &e);
  make_buffers(s.plan, 1, 0, NULL, &s.io);
  fill_all(h, &s);
  int32_t *lengths = buffer(&s.io, RG_INPUT, "lengths"), *all = buffer(&s.io, RG_INPUT, "context"),
          *pages = buffer(&s.io, RG_INPUT, "pages");
  memset(buffer(&s.io, RG_INPUT, "forks"), 0xff, 4 * sizeof(int32_t));
  for (int b = 0, t = 0; b < B; b++) {
    all[b] = of[b] < 0 ? 0 : h->context[of[b]];
    lengths[b] = all[b] > 0;
    for (int m = 0; m < M; m++)
      pages[b * M + m] = m * l->page < all[b] ? first_page(h, of[b]) + m : -1;
    for (int i = 0; i < 4 && lengths[b] && h->first; i++) { /* the sequence's rows */
      const size_t size = row_bytes(&s.io, RG_INPUT, serve_given[i]);
      memcpy((char *)buffer(&s.io, RG_INPUT, serve_given[i]) + (size_t)t * size,
             (char *)buffer(&h->first->io, RG_INPUT, serve_given[i]) + (size_t)of[b] * size, size);
    }
    t += lengths[b];
  }
  bind_all(s.session, &s.io);
  for (int again = 0; again < 2; again++) CR_OK(try_forward(s.session, &s.io, &e), &e);
  return s;
}

static const char split[] = "{\"regraph_policy\": 1, \"split_kv\": true}";

/* Rows of a step against those of the first, sequence by sequence. */
static void expect_same(const holds *h, const side *first, const side *s, int B, const int *of,
                        const char *what) {
  for (int b = 0, t = 0; b < B; b++) {
    if (of[b] < 0) continue;
    for (int i = 0; i < MADE; i++) {
      const size_t size = row_bytes(&s->io, RG_OUTPUT, made[i]);
      cr_assert_eq(memcmp((char *)buffer(&first->io, RG_OUTPUT, made[i]) + (size_t)of[b] * size,
                          (char *)buffer(&s->io, RG_OUTPUT, made[i]) + (size_t)t * size, size),
                   0, "%s of context %d, H %d D %d, logits %g, kind %d: %s", made[i],
                   h->context[of[b]], h->l->H, h->l->D, (double)h->large, h->kind, what);
    }
    t++;
  }
}

/* Sums in another order: so far may they be apart. Where other blocks are chosen (near-ties of
 * another lse), o is another. */
static void expect_near(const holds *h, const side *a, const side *b) {
  const layer *l = h->l;
  int other = 0;
  for (int t = 0; t < h->n; t++) {
    const int32_t *x = (int32_t *)buffer(&a->io, RG_OUTPUT, "idx") + t * l->KH * l->top_n,
                  *y = (int32_t *)buffer(&b->io, RG_OUTPUT, "idx") + t * l->KH * l->top_n;
    const bool same = memcmp(x, y, (size_t)(l->KH * l->top_n) * sizeof *x) == 0;
    other += !same;
    for (int i = 0; i < l->H; i++) {
      const float u = ((float *)buffer(&a->io, RG_OUTPUT, "cmp_lse"))[t * l->H + i],
                  v = ((float *)buffer(&b->io, RG_OUTPUT, "cmp_lse"))[t * l->H + i];
      if (u != v) /* infinities */
        cr_assert_lt(fabsf(u - v), 2e-6f * (1 + fabsf(u)), "lse of row %d, head %d: %g, %g", t, i,
                     (double)u, (double)v);
    }
    for (int i = 0; i < 2; i++) {
      const char *const name = i ? "o" : "cmp_o";
      const int n = l->H * l->D;
      double *u = malloc(2 * (size_t)n * sizeof *u), *v = u + n;
      const size_t size = row_bytes(&a->io, RG_OUTPUT, name);
      to_doubles(u, l->q, (char *)buffer(&a->io, RG_OUTPUT, name) + (size_t)t * size, n);
      to_doubles(v, l->q, (char *)buffer(&b->io, RG_OUTPUT, name) + (size_t)t * size, n);
      for (int k = 0; k < n && (i == 0 || same); k++)
        cr_assert(fabs(u[k] - v[k]) <= 0.012 * (1 + fabs(u[k])),
                  "%s of row %d, context %d, head %d, element %d: %g, unsplit %g", name, t,
                  h->context[t], k / l->D, k % l->D, v[k], u[k]);
      free(u);
    }
  }
  cr_assert_leq(other, h->kind == PLAIN ? 1 : h->n, "%d rows choose other blocks", other);
}

static void shared_out(int H, int D, rg_dtype type, int most, float large, int kind) {
  enum { B = 6, MOST = 80 };
  const int context[B] = {most, 1, most / 2 + 17, 1024 * 16 + 40, most < 4133 ? most - 9 : 4133,
                          700};
  layer l = wide;
  l.H = H, l.KH = H / 16, l.D = l.DV = D, l.softmax = D == 64, l.few = true, l.q = l.kv = type;
  const int long_one = most > context[3] ? most : context[3], M = (long_one + l.page - 1) / l.page;
  holds h = {&l, context, B, 0, large, kind, NULL};
  h.P = first_page(&h, B);
  rg_context *ctx;
  rg_error e = {0};
  int of[MOST];
  serve_native = true;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  for (int b = 0; b < MOST; b++) of[b] = b < B ? b : -1;
  /* clusters of 8, 4, 2 and 1 blocks of threads */
  side first = run_step(ctx, &h, split, B, B, M, of);
  h.first = &first;
  for (int b = 0; b < B; b++) {
    side s = run_step(ctx, &h, split, 1, 1, M, &of[b]);
    expect_same(&h, &first, &s, 1, &of[b], "alone");
    close_side(&s);
  }
  static const int slots[] = {6, 24, 40, 80};
  for (int k = 0; k < 4; k++) {
    const int want = slots[k] * 2 / l.KH, n = want > MOST ? MOST : want < B ? B : want;
    for (int b = 0; b < n; b++) of[b] = -1;
    for (int b = 0; b < B; b++) of[(n - 1 - b * (n / B)) % n] = b; /* from the last to the first */
    side s = run_step(ctx, &h, split, n, n, M + 3 * k + h.P * (k == 2), of);
    char what[64];
    snprintf(what, sizeof what, "among %d slots", n);
    expect_same(&h, &first, &s, n, of, what);
    close_side(&s);
  }
  for (int b = 0; b < B; b++) of[b] = b;
  side apart = run_step(ctx, &h, NULL, B, B, M, of);
  expect_near(&h, &apart, &first);
  close_side(&apart);
  int undecided = 0;
  for (int b = 0; b < B; b++)
    undecided += oracle_chooses(&l, &first.io, b, context[b],
                                (int32_t *)buffer(&first.io, RG_INPUT, "pages") + b * M, "split");
  if (kind & HEADS_ALIKE) cr_assert_gt(undecided, 0);
  close_side(&first);
  rg_context_destroy(ctx);
}

Test(gpu_split, the_same_in_any_batch, .timeout = 300) {
  NEEDS_GPU();
  shared_out(32, 128, RG_BF16, 5000, 1, PLAIN);
  shared_out(32, 128, RG_BF16, 40000, 20, PLAIN);
  shared_out(16, 64, RG_BF16, 40000, 4, PLAIN);
  shared_out(32, 128, RG_F16, 20000, 4, PLAIN);
  shared_out(64, 128, RG_BF16, 140000, 4, PLAIN);
}

Test(gpu_split, undecided, .timeout = 300) {
  NEEDS_GPU();
  shared_out(32, 128, RG_BF16, 5000, 400, HEADS_ALIKE);
  shared_out(32, 128, RG_BF16, 5000, 1, KEYS_AGAIN);
  shared_out(16, 64, RG_F16, 40000, 1, KEYS_AGAIN);
  shared_out(16, 128, RG_BF16, 170000, 400, HEADS_ALIKE | KEYS_AGAIN);
}

Test(gpu_split, short_ones, .timeout = 300) { /* what tools have time for */
  NEEDS_GPU();
  shared_out(16, 64, RG_BF16, 300, 1, PLAIN);
}
