/* tests/unit/test_kv_compress.c: compressed rows made step by step, in pages, are compress_kv's of
 * the whole prompt to the bit, wherever steps end and pages lie; and no other row is written. */
#include "../harness/num.h"
#include "run_util.h"

#include <stdint.h>

enum { B = 3, KH = 2, D = 8, DV = 4, T = 120, LONGEST = 200 };

typedef struct shape {
  int page, kernel, stride;
  const char *k_method, *v_method;
  rg_dtype dtype;
} shape;

static const char *weight(const char *name, const char *method, int d, int kernel, const char *type,
                          char *text) {
  const bool gated = strcmp(method, "linear") != 0;
  if (strcmp(method, "mean") == 0) return "";
  sprintf(text, ", \"%s\": {\"shape\": [%d, %d], \"dtype\": \"%s\"}", name, gated ? 2 * d : d,
          kernel * d, type);
  return text;
}

static char *spec_text(const shape *s, char *text) {
  const char *type = rg_dtype_name(s->dtype);
  char kw[128], vw[128];
  const char *k_weight = weight("kw", s->k_method, D, s->kernel, type, kw),
             *v_weight = weight("vw", s->v_method, DV, s->kernel, type, vw);
  sprintf(text,
          "{\"regraph\": 1, \"params\": {\"page\": %d, \"kernel\": %d, \"stride\": %d, \"dtype\": "
          "\"%s\"},\n"
          " \"inputs\": {\"k\": {\"shape\": [\"T\", 2, 8], \"dtype\": \"$dtype\"}, \"v\": "
          "{\"shape\": [\"T\", 2, 4], \"dtype\": \"$dtype\"},\n"
          "  \"lengths\": {\"shape\": [\"B\"], \"dtype\": \"i32\"}, \"context\": {\"shape\": "
          "[\"B\"], \"dtype\": \"i32\"},\n"
          "  \"pages\": {\"shape\": [\"B\", \"M\"], \"dtype\": \"i32\"}%s%s},\n"
          " \"state\": {\n"
          "  \"kc\": {\"shape\": [\"P\", \"page\", 2, 8], \"dtype\": \"$dtype\", \"next\": "
          "\"kc1\"},\n"
          "  \"vc\": {\"shape\": [\"P\", \"page\", 2, 4], \"dtype\": \"$dtype\", \"next\": "
          "\"vc1\"},\n"
          "  \"ck\": {\"shape\": [\"P\", \"page/stride\", 2, 8], \"dtype\": \"$dtype\", \"next\": "
          "\"ck1\"},\n"
          "  \"cv\": {\"shape\": [\"P\", \"page/stride\", 2, 4], \"dtype\": \"$dtype\", \"next\": "
          "\"cv1\"}},\n"
          " \"nodes\": [{\"name\": \"batch\", \"op\": \"paged_batch\", \"in\": {\"rows\": \"k\", "
          "\"cache\": \"kc\",\n"
          "   \"lengths\": \"lengths\", \"context\": \"context\", \"pages\": \"pages\"}, \"out\": "
          "{\"cu_seqlens\": \"cu\", \"context\": \"all\", \"pages\": \"table\"}},\n"
          "  {\"name\": \"append\", \"op\": \"kv_append\", \"in\": {\"k\": \"k\", \"v\": \"v\", "
          "\"cu_seqlens\": \"cu\", \"context\": \"all\",\n"
          "   \"pages\": \"table\", \"k_cache\": \"kc\", \"v_cache\": \"vc\"}, \"out\": "
          "{\"k_cache\": \"kc1\", \"v_cache\": \"vc1\"}},\n"
          "  {\"name\": \"compress\", \"op\": \"kv_compress\", \"in\": {\"k_cache\": \"kc1\", "
          "\"v_cache\": \"vc1\"%s%s,\n"
          "   \"cu_seqlens\": \"cu\", \"context\": \"all\", \"pages\": \"table\", \"k_cmp\": "
          "\"ck\", \"v_cmp\": \"cv\"},\n"
          "   \"out\": {\"k_cmp\": \"ck1\", \"v_cmp\": \"cv1\"}, \"attrs\": {\"kernel\": "
          "\"$kernel\", \"stride\": \"$stride\",\n"
          "   \"k_method\": \"%s\", \"v_method\": \"%s\"}}],\n"
          " \"outputs\": {\"cu\": \"cu\"}}",
          s->page, s->kernel, s->stride, type, k_weight, v_weight,
          *k_weight ? ", \"k_weight\": \"kw\"" : "", *v_weight ? ", \"v_weight\": \"vw\"" : "",
          s->k_method, s->v_method);
  return text;
}

/* Sequence b's keys (or values) and what compress_kv makes of them. */
typedef struct whole {
  ot_tensor *x, *w, *y;
} whole;

static void compress_whole(ot *t, const shape *s, int64_t length, ot_tensor *const *w,
                           whole out[2]) {
  ot_call *c = ot_call_new(t, &rgi_op_compress_kv);
  const int64_t k_dim[] = {length, KH, D}, v_dim[] = {length, KH, DV},
                ck_dim[] = {length / s->stride, KH, D}, cv_dim[] = {length / s->stride, KH, DV};
  ot_int(c, "kernel", s->kernel);
  ot_int(c, "stride", s->stride);
  ot_choice(c, "k_method", s->k_method);
  ot_choice(c, "v_method", s->v_method);
  for (int i = 0; i < 2; i++) {
    out[i] = (whole){ot_new(t, s->dtype, 3, i ? v_dim : k_dim, NULL), w[i],
                     ot_new(t, s->dtype, 3, i ? cv_dim : ck_dim, NULL)};
    ot_fill_normal(t, out[i].x, 1);
    ot_in(c, i ? "v" : "k", out[i].x);
    if (w[i]) ot_in(c, i ? "v_weight" : "k_weight", w[i]);
    ot_out(c, i ? "v" : "k", out[i].y);
  }
  ot_in(c, "cu_seqlens", num_ints(t, 2, (const int32_t[]){0, (int32_t)length}));
  OT_OK(ot_run(c, 2));
}

static ot_tensor *new_weight(ot *t, const shape *s, const char *method, int d) {
  const int64_t dim[] = {strcmp(method, "linear") == 0 ? d : 2 * d, s->kernel * d};
  if (strcmp(method, "mean") == 0) return NULL;
  ot_tensor *w = ot_new(t, s->dtype, 2, dim, NULL);
  ot_fill_normal(t, w, 0.2);
  return w;
}

/* Rows of a compressed cache against the whole's; every other byte is still `blank`. */
static void check_cache(const shape *s, const int32_t *pages, int M, const int *length,
                        whole (*all)[2], int side, const char *cache, size_t bytes, int blank) {
  const int R = s->page / s->stride, s0 = s->kernel / s->stride - 1;
  const size_t row = (size_t)KH * (side ? DV : D) * rg_dtype_size(s->dtype);
  bool *due = calloc(bytes / row, sizeof *due);
  for (int b = 0; b < B; b++)
    for (int j = 0; s->kernel + j * s->stride <= length[b]; j++) {
      const int r = j + s0, at = pages[b * M + r / R] * R + r % R;
      due[at] = true;
      cr_assert_eq(memcmp(cache + (size_t)at * row,
                          (const char *)all[b][side].y->arg.data + (size_t)j * row, row),
                   0, "page %d, kernel %d, stride %d, %s: block %d of sequence %d", s->page,
                   s->kernel, s->stride, side ? s->v_method : s->k_method, j, b);
    }
  for (size_t i = 0; i < bytes; i++)
    cr_assert(due[i / row] || (unsigned char)cache[i] == blank, "row %zu is nobody's", i / row);
  free(due);
}

static void check(shape s, uint64_t seed) {
  ot *t = ot_begin(seed);
  rg_error e = {0};
  rg_context *ctx;
  rg_plan *plan;
  rg_session *session;
  char text[4096];
  buffers io;
  const int M = (LONGEST + s.page - 1) / s.page, P = B * M + 2;
  int length[B], done[B] = {0};
  whole all[B][2];
  ot_tensor *w[2] = {new_weight(t, &s, s.k_method, D), new_weight(t, &s, s.v_method, DV)};
  for (int b = 0; b < B; b++) {
    length[b] = s.kernel + (int)ot_below(t, LONGEST - s.kernel + 1);
    compress_whole(t, &s, length[b], w, all[b]);
  }
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_spec *spec = load_spec(ctx, spec_text(&s, text));
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"M", M, NULL}, {"P", P, NULL}};
  rg_plan_options o = {.set = set, .nset = 4, .device = test_device(), .threads = 2};
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  CR_OK(rg_session_create(plan, &(rg_session_options){.debug_poison = true}, &session, &e), &e);
  make_buffers(plan, 1, 0, NULL, &io);
  bind_all(session, &io);
  int32_t *lengths = buffer(&io, RG_INPUT, "lengths"), *context = buffer(&io, RG_INPUT, "context"),
          *pages = buffer(&io, RG_INPUT, "pages");
  for (int i = 0; i < 2; i++)
    if (w[i])
      memcpy(buffer(&io, RG_INPUT, i ? "vw" : "kw"), w[i]->arg.data,
             (size_t)w[i]->n * rg_dtype_size(s.dtype));
  for (int i = 0; i < B * M; i++) { /* shuffled, page 0 and the last left out */
    const int k = (int)ot_below(t, i + 1);
    pages[i] = pages[k];
    pages[k] = i + 1;
  }
  for (bool more = true; more;) {
    more = false;
    int row = 0;
    for (int b = 0; b < B; b++) {
      const int most = length[b] - done[b] < T - row ? length[b] - done[b] : T - row;
      lengths[b] = (int32_t)(ot_below(t, 2) ? ot_below(t, most + 1) : most > 0);
      for (int i = 0; i < 2; i++) {
        const size_t size = (size_t)KH * (i ? DV : D) * rg_dtype_size(s.dtype);
        memcpy((char *)buffer(&io, RG_INPUT, i ? "v" : "k") + (size_t)row * size,
               (const char *)all[b][i].x->arg.data + (size_t)done[b] * size,
               (size_t)lengths[b] * size);
      }
      row += lengths[b];
      context[b] = done[b] += lengths[b];
      more = more || done[b] < length[b];
    }
    CR_OK(try_forward(session, &io, &e), &e);
  }
  for (int i = 0; i < 2; i++)
    check_cache(
        &s, pages, M, length, all, i, buffer(&io, RG_STATE, i ? "cv" : "ck"),
        (size_t)P * (size_t)(s.page / s.stride) * KH * (i ? DV : D) * rg_dtype_size(s.dtype), 0x7e);
  free_buffers(&io);
  rg_session_destroy(session);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  ot_end(t);
}

Test(kv_compress, steps_make_what_the_whole_makes) {
  static const char *const method[] = {"mean", "linear", "swiglu", "sigmoid_mul"};
  static const rg_dtype types[] = {RG_F32, RG_BF16, RG_F16};
  static const int sizes[][3] = {{16, 32, 16}, {32, 32, 16}, {64, 32, 16}, {128, 32, 16},
                                 {16, 8, 4},   {16, 16, 16}, {64, 64, 8},  {16, 4, 1}};
  for (int k = 0; k < 32; k++) {
    const int *x = sizes[k % 8];
    check((shape){x[0], x[1], x[2], method[k % 4], method[(k + k / 8) % 4], types[k % 3]},
          (uint64_t)(900 + k));
  }
}

Test(kv_compress, what_does_not_fit_is_refused) {
  static const struct {
    shape s;
    rg_status code;
    const char *says;
  } bad[] = {
      {{24, 32, 16, "mean", "mean", RG_F32}, RG_E_VALUE, "does not divide pages of 24"},
      {{32, 24, 16, "mean", "mean", RG_F32}, RG_E_VALUE, "does not divide kernel 24"},
  };
  rg_error ignored = {0};
  rg_context *ctx;
  CR_OK(rg_context_create(NULL, &ctx, &ignored), &ignored);
  for (int i = 0; i < 2; i++) {
    char text[4096];
    rg_spec *spec;
    spec_text(&bad[i].s, text);
    FAILS(rg_spec_load_text(ctx, text, strlen(text), "s", NULL, 0, &spec, &e), bad[i].code,
          bad[i].says);
  }
  rg_context_destroy(ctx);
}
