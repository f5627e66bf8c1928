/* tests/unit/serve_case.h: one layer of NSA twice, for the tests of serving: over a pack of whole
 * sequences ("whole"), and over caches in pages, step by step ("steps").
 *
 * The rows that a step makes must be those of the whole, to the bit, whatever steps and pages are
 * like. Where caches have another dtype than queries, the whole works on casts to f32: both load
 * to f32, and what is stored is rounded once.
 */
#ifndef SERVE_CASE_H
#define SERVE_CASE_H

#include "run_util.h"

#include <math.h>
#include <stdint.h>

/* On a GPU (REGRAPH_TEST_DEVICE=cuda) plans are made as for one without tensor cores, where plain
 * kernels take both graphs: then they agree to the bit whatever the shape. serve_native: as for the
 * GPU there is. */
static bool serve_native;
static inline rg_plan_options serve_options(const rg_binding *set, size_t n) {
  const bool older = test_on_gpu() && !serve_native;
  return (rg_plan_options){.set = set,
                           .nset = n,
                           .device = test_device(),
                           .profile_path =
                               older ? RG_SOURCE_DIR "/tests/harness/older_gpu.json" : NULL,
                           .threads = 2,
                           .pack_seconds = 0.005};
}
/* Poisoned sessions run step by step; on a GPU every other one is a graph that is replayed. */
static inline rg_session_options serve_session(void) {
  static int opened;
  return (rg_session_options){.debug_poison = !test_on_gpu() || opened++ % 2};
}

/* An assertion a byte: Criterion counts those that hold, and that takes longer than to look. */
#define EXPECT(holds, ...)                       \
  do {                                           \
    if (!(holds)) cr_assert(false, __VA_ARGS__); \
  } while (0)

typedef struct layer {
  int H, KH, D, DV, page, kernel, stride, block, top_n, init, local, window;
  int k_method, v_method; /* of serve_methods */
  rg_dtype q, kv;
  bool hnd, sinks;
  bool dot, relu; /* topk's score, else softmax */
  bool raw;       /* what is in pages is told by tensors that nobody looked at */
  bool few;       /* of steps: what slc and swa make is combine's alone */
  bool softmax;
  double softcap;
  float alike; /* of the whole: heads of a token are its first, so many times; 0: as filled */
} layer;

static const char *const serve_methods[] = {"mean", "linear", "swiglu", "sigmoid_mul"};
enum { SERVE_METHODS = 4 };

static inline const char *layer_text(const layer *l, char *text) {
  sprintf(text,
          "H %d KH %d D %d DV %d page %d kernel %d stride %d block %d top_n %d init %d local %d "
          "window %d %s %s q %s kv %s%s%s%s softcap %g",
          l->H, l->KH, l->D, l->DV, l->page, l->kernel, l->stride, l->block, l->top_n, l->init,
          l->local, l->window, serve_methods[l->k_method], serve_methods[l->v_method],
          rg_dtype_name(l->q), rg_dtype_name(l->kv), l->hnd ? " hnd" : "", l->sinks ? " sinks" : "",
          l->dot    ? " dot"
          : l->relu ? " relu"
                    : "",
          l->softcap);
  return text;
}

/* ---- the two specs ---- */

static inline void serve_params(rg_builder *b, const layer *l) {
  const rg_item params[] = {rg_int("H", l->H),
                            rg_int("KH", l->KH),
                            rg_int("D", l->D),
                            rg_int("DV", l->DV),
                            rg_int("page", l->page),
                            rg_int("kernel", l->kernel),
                            rg_int("stride", l->stride),
                            rg_int("block", l->block),
                            rg_int("top_n", l->top_n),
                            rg_int("init", l->init),
                            rg_int("local", l->local),
                            rg_int("window", l->window),
                            rg_real("softcap", l->softcap)};
  for (size_t i = 0; i < sizeof params / sizeof *params; i++) rg_build_param(b, params[i]);
}

static inline void serve_inputs(rg_builder *b, const layer *l) {
  const char *q = rg_dtype_name(l->q), *kv = rg_dtype_name(l->kv);
  serve_params(b, l);
  rg_build_input(b, "q", "T,H,D", q, RG_GRAD_NONE);
  rg_build_input(b, "k", "T,KH,D", kv, RG_GRAD_NONE);
  rg_build_input(b, "v", "T,KH,DV", kv, RG_GRAD_NONE);
  rg_build_input(b, "gate", "T,H,3", q, RG_GRAD_NONE);
  if (l->sinks) rg_build_input(b, "sinks", "H", "f32", RG_GRAD_NONE);
  if (l->k_method)
    rg_build_input(b, "kw", l->k_method == 1 ? "D,kernel*D" : "2*D,kernel*D", kv, RG_GRAD_NONE);
  if (l->v_method)
    rg_build_input(b, "vw", l->v_method == 1 ? "DV,kernel*DV" : "2*DV,kernel*DV", kv, RG_GRAD_NONE);
}

/* A node of attention or topk with what both specs say alike. */
static inline void serve_node(rg_builder *b, const layer *l, const char *name, const char *op,
                              const char *in, const char *out) {
  rg_item attrs[12];
  size_t n = 0;
  const bool blocks = strstr(op, "topk") || strstr(op, "cmp");
  if (blocks) attrs[n++] = rg_word("kernel", "$kernel"), attrs[n++] = rg_word("stride", "$stride");
  if (strstr(op, "topk")) {
    attrs[n++] = rg_word("block", "$block"), attrs[n++] = rg_word("top_n", "$top_n");
    attrs[n++] = rg_word("init", "$init"), attrs[n++] = rg_word("local", "$local");
    if (l->dot || l->relu) attrs[n++] = rg_word("score", l->dot ? "dot" : "relu");
  }
  if (strstr(op, "slc")) attrs[n++] = rg_word("block", "$block");
  if (strstr(op, "swa")) attrs[n++] = rg_word("window_left", "$window");
  if (l->softcap != 0 && !((l->dot || l->relu) && strstr(op, "topk")))
    attrs[n++] = rg_word("softcap", "$softcap");
  rg_build_node(b, name, op, in, out, attrs, n);
}

static inline void serve_compress(rg_builder *b, const layer *l, const char *op, const char *in,
                                  const char *out) {
  char ports[512];
  const rg_item attrs[] = {rg_word("kernel", "$kernel"), rg_word("stride", "$stride"),
                           rg_word("k_method", serve_methods[l->k_method]),
                           rg_word("v_method", serve_methods[l->v_method])};
  sprintf(ports, "%s%s%s", in, l->k_method ? " k_weight=kw" : "",
          l->v_method ? " v_weight=vw" : "");
  rg_build_node(b, "compress", op, ports, out, attrs, 4);
}

static inline rg_spec *serve_spec(rg_builder *b, bool few) {
  static const char *const out[] = {"cmp_o",   "cmp_lse", "idx",   "o",
                                    "slc_lse", "swa_o",   "slc_o", "swa_lse"};
  rg_error e = {0};
  rg_spec *spec = NULL;
  for (int i = 0; i < (few ? 4 : 8); i++) rg_build_output(b, out[i], NULL);
  CR_OK(rg_build_spec(b, NULL, 0, &spec, &e), &e);
  rg_builder_destroy(b);
  return spec;
}

static inline void serve_combine(rg_builder *b, const layer *l) {
  const rg_item act[] = {rg_word("act", l->softmax ? "softmax" : "sigmoid")};
  rg_build_node(b, "combine", "combine", "o=cmp_o+slc_o+swa_o gate cu_seqlens=cu", "o=o", act, 1);
}

static inline rg_spec *whole_spec(rg_context *ctx, const layer *l) {
  rg_error e = {0};
  rg_builder *b;
  const bool cast = l->q != l->kv;
  const char *sinks = l->sinks ? " sinks" : "";
  const rg_item wide[] = {rg_word("to", "f32")}, back[] = {rg_word("to", rg_dtype_name(l->q))};
  char in[256];
  CR_OK(rg_builder_create(ctx, "whole", &b, &e), &e);
  serve_inputs(b, l);
  rg_build_input(b, "cu", "B+1", "i32", RG_GRAD_NONE);
  serve_compress(b, l, "compress_kv", "k v cu_seqlens=cu", "k=cmp_k v=cmp_v");
  if (cast) {
    rg_build_node(b, "q_wide", "cast", "x=q", "y=wq", wide, 1);
    rg_build_node(b, "k_wide", "cast", "x=k", "y=wk", wide, 1);
    rg_build_node(b, "v_wide", "cast", "x=v", "y=wv", wide, 1);
    rg_build_node(b, "cmp_k_wide", "cast", "x=cmp_k", "y=wck", wide, 1);
    rg_build_node(b, "cmp_v_wide", "cast", "x=cmp_v", "y=wcv", wide, 1);
  }
  const char *q = cast ? "q=wq k=wk v=wv" : "q k v";
  sprintf(in, "%s cu_seqlens=cu%s", cast ? "q=wq k=wck v=wcv" : "q k=cmp_k v=cmp_v", sinks);
  serve_node(b, l, "cmp", "cmp_attn", in, cast ? "o=cmp_w lse=cmp_lse" : "o=cmp_o lse=cmp_lse");
  sprintf(in, "%s cu_seqlens=cu%s", cast ? "q=wq k=wck" : "q k=cmp_k",
          l->dot || l->relu ? "" : " lse=cmp_lse");
  serve_node(b, l, "topk", "topk", in, "idx=idx");
  sprintf(in, "%s idx cu_seqlens=cu%s", q, sinks);
  serve_node(b, l, "slc", "slc_attn", in, cast ? "o=slc_w lse=slc_lse" : "o=slc_o lse=slc_lse");
  sprintf(in, "%s cu_seqlens=cu%s", q, sinks);
  serve_node(b, l, "swa", "swa_attn", in, cast ? "o=swa_w lse=swa_lse" : "o=swa_o lse=swa_lse");
  if (cast) {
    rg_build_node(b, "cmp_back", "cast", "x=cmp_w", "y=cmp_o", back, 1);
    rg_build_node(b, "slc_back", "cast", "x=slc_w", "y=slc_o", back, 1);
    rg_build_node(b, "swa_back", "cast", "x=swa_w", "y=swa_o", back, 1);
  }
  serve_combine(b, l);
  rg_build_output(b, "cmp_k", NULL);
  rg_build_output(b, "cmp_v", NULL);
  return serve_spec(b, false);
}

/* HND keeps heads outside of rows; a transpose shows it as the ops want it. */
static inline void serve_cache(rg_builder *b, const layer *l, const char *name, const char *rows,
                               const char *width) {
  char shape[64], next[64], turned[64], in[64], out[64];
  const rg_item perm[] = {rg_list("perm", "0,2,1,3")};
  sprintf(shape, l->hnd ? "P,KH,%s,%s" : "P,%s,KH,%s", rows, width);
  sprintf(next, "%s_now", name);
  rg_build_state(b, name, shape, rg_dtype_name(l->kv), next);
  sprintf(turned, "%s_turned", name);
  sprintf(in, "x=%s", name);
  sprintf(out, "y=%s_was", name);
  if (l->hnd) rg_build_node(b, turned, "transpose", in, out, perm, 1);
}

static inline rg_spec *steps_spec(rg_context *ctx, const layer *l) {
  rg_error e = {0};
  rg_builder *b;
  const char *sinks = l->sinks ? " sinks" : "", *was = l->hnd ? "_was" : "";
  const char *table =
      l->raw ? "cu_seqlens=cu context pages" : "cu_seqlens=cu context=all pages=table";
  char in[256];
  CR_OK(rg_builder_create(ctx, "steps", &b, &e), &e);
  serve_inputs(b, l);
  rg_build_input(b, "lengths", "B", "i32", RG_GRAD_NONE);
  rg_build_input(b, "context", "B", "i32", RG_GRAD_NONE);
  rg_build_input(b, "pages", "B,M", "i32", RG_GRAD_NONE);
  rg_build_input(b, "forks", "2,2", "i32", RG_GRAD_NONE);
  serve_cache(b, l, "kc", "page", "D");
  serve_cache(b, l, "vc", "page", "DV");
  serve_cache(b, l, "ck", "page/stride", "D");
  serve_cache(b, l, "cv", "page/stride", "DV");
  sprintf(in, "cache=kc%s+vc%s+ck%s+cv%s pages=forks", was, was, was, was);
  rg_build_node(b, "fork", "page_copy", in, "cache=kc1+vc1+ck1+cv1", NULL, 0);
  rg_build_node(b, "batch", "paged_batch", "rows=q cache=kc1 lengths context pages",
                "cu_seqlens=cu context=all pages=table", NULL, 0);
  sprintf(in, "k v %s k_cache=kc1 v_cache=vc1", table);
  rg_build_node(b, "append", "kv_append", in, "k_cache=kc_now v_cache=vc_now", NULL, 0);
  sprintf(in, "k_cache=kc_now v_cache=vc_now %s k_cmp=ck1 v_cmp=cv1", table);
  serve_compress(b, l, "kv_compress", in, "k_cmp=ck_now v_cmp=cv_now");
  sprintf(in, "q k_cache=ck_now v_cache=cv_now %s%s", table, sinks);
  serve_node(b, l, "cmp", "paged_cmp_attn", in, "o=cmp_o lse=cmp_lse");
  sprintf(in, "q k_cache=ck_now %s%s", table, l->dot || l->relu ? "" : " lse=cmp_lse");
  serve_node(b, l, "topk", "paged_topk", in, "idx=idx");
  sprintf(in, "q k_cache=kc_now v_cache=vc_now idx %s%s", table, sinks);
  serve_node(b, l, "slc", "paged_slc_attn", in, l->few ? "o=slc_o" : "o=slc_o lse=slc_lse");
  sprintf(in, "q k_cache=kc_now v_cache=vc_now %s%s", table, sinks);
  serve_node(b, l, "swa", "paged_swa_attn", in, l->few ? "o=swa_o" : "o=swa_o lse=swa_lse");
  serve_combine(b, l);
  return serve_spec(b, l->few);
}

/* ---- whole sequences ---- */

typedef struct side {
  rg_spec *spec;
  rg_plan *plan;
  rg_session *session;
  buffers io;
} side;

static inline void close_side(side *s) {
  free_buffers(&s->io);
  rg_session_destroy(s->session);
  rg_plan_destroy(s->plan);
  rg_spec_destroy(s->spec);
}

static inline size_t row_bytes(const buffers *io, rg_role role, const char *name) {
  for (int i = 0; i < io->n; i++)
    if (io->info[i].role == role && strcmp(io->info[i].name, name) == 0)
      return (size_t)(io->info[i].bytes / io->info[i].dim[0]);
  return 0;
}

static const char *const serve_given[] = {"q", "k", "v", "gate"};

/* A weight of N(0,1) as one of N(0, 1/inputs): what comes out is as large as what goes in. */
static inline void tame(const buffers *io, const char *name, int inputs) {
  for (int i = 0; i < io->n; i++) {
    if (io->info[i].role != RG_INPUT || strcmp(io->info[i].name, name) != 0) continue;
    const size_t n = (size_t)io->info[i].bytes / rg_dtype_size(io->info[i].dtype);
    float *x = malloc(n * sizeof *x);
    rg_convert(RG_F32, x, io->info[i].dtype, io->data[i], n);
    for (size_t k = 0; k < n; k++) x[k] /= sqrtf((float)inputs);
    rg_convert(io->info[i].dtype, io->data[i], RG_F32, x, n);
    free(x);
  }
}

/* Every head of a token as its first, `times` that: they agree on what counts. */
static inline void alike_heads(const buffers *io, const layer *l, float times) {
  const size_t size = rg_dtype_size(l->q), D = (size_t)l->D;
  char *q = buffer(io, RG_INPUT, "q");
  for (int i = 0; i < io->n; i++)
    for (size_t n = 0; q == io->data[i] && n < (size_t)io->info[i].bytes / size; n++) {
      float x;
      rg_convert(RG_F32, &x, l->q, q + n * size, 1);
      x *= times;
      rg_convert(l->q, q + n * size, RG_F32, &x, 1);
      if (n / D % (size_t)l->H) memcpy(q + n * size, q + (n - D) * size, size);
    }
}

/* All sequences, run as one pack: what steps are held against. Sequence 1 begins as 0 does, with
 * `shared` tokens. */
static inline side run_whole(rg_context *ctx, const layer *l, uint64_t seed, int nseq,
                             const int *length, int shared) {
  rg_error e = {0};
  side s = {.spec = whole_spec(ctx, l)};
  int total = 0;
  for (int b = 0; b < nseq; b++) total += length[b];
  const rg_binding set[] = {{"T", total > l->kernel ? total : l->kernel, NULL}, {"B", nseq, NULL}};
  rg_plan_options o = serve_options(set, 2);
  CR_OK(rg_plan_create(s.spec, NULL, &o, &s.plan, &e), &e);
  CR_OK(rg_session_create(s.plan, NULL, &s.session, &e), &e);
  make_buffers(s.plan, seed, 0, length, &s.io);
  tame(&s.io, "kw", l->kernel * l->D);
  tame(&s.io, "vw", l->kernel * l->DV);
  if (l->alike != 0) alike_heads(&s.io, l, l->alike);
  for (int i = 0; i < 4 && shared; i++) {
    const size_t size = row_bytes(&s.io, RG_INPUT, serve_given[i]);
    char *x = buffer(&s.io, RG_INPUT, serve_given[i]);
    memcpy(x + (size_t)length[0] * size, x, (size_t)shared * size);
  }
  bind_all(s.session, &s.io);
  CR_OK(try_forward(s.session, &s.io, &e), &e);
  return s;
}

/* ---- steps ---- */

typedef struct steps {
  side s;
  const layer *l;
  const side *whole;
  int T, B, M, P, nseq;
  int32_t *lengths, *context, *pages, *forks;
  int32_t *start; /* [nseq] first row of the whole */
  const char *what;
} steps;

/* Caches are full of NaN, of which no row that is not written may be seen again or changed. */
static inline steps open_steps(rg_context *ctx, const layer *l, const side *whole, int nseq,
                               const int *length, int T, int B, int M, int P, const char *what) {
  rg_error e = {0};
  steps s = {.l = l, .whole = whole, .T = T, .B = B, .M = M, .P = P, .nseq = nseq, .what = what};
  s.s.spec = steps_spec(ctx, l);
  const rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}, {"M", M, NULL}, {"P", P, NULL}};
  rg_plan_options o = serve_options(set, 4);
  rg_session_options how = serve_session();
  CR_OK(rg_plan_create(s.s.spec, NULL, &o, &s.s.plan, &e), &e);
  CR_OK(rg_session_create(s.s.plan, &how, &s.s.session, &e), &e);
  make_buffers(s.s.plan, 1, 0, NULL, &s.s.io);
  for (int i = 0; i < s.s.io.n; i++) {
    const rg_tensor_info *t = &s.s.io.info[i];
    memset((char *)s.s.io.data[i] + t->bytes, 0x5c, 64); /* nobody's: make_buffers has the room */
    if (t->role == RG_STATE) memset(s.s.io.data[i], 0xff, (size_t)t->bytes);
    if (t->role == RG_INPUT &&
        (!strcmp(t->name, "sinks") || !strcmp(t->name, "kw") || !strcmp(t->name, "vw")))
      memcpy(s.s.io.data[i], buffer(&whole->io, RG_INPUT, t->name), (size_t)t->bytes);
  }
  bind_all(s.s.session, &s.s.io);
  s.lengths = buffer(&s.s.io, RG_INPUT, "lengths");
  s.context = buffer(&s.s.io, RG_INPUT, "context");
  s.pages = buffer(&s.s.io, RG_INPUT, "pages");
  s.forks = buffer(&s.s.io, RG_INPUT, "forks");
  memset(s.forks, 0xff, 4 * sizeof *s.forks);
  s.start = calloc((size_t)nseq + 1, sizeof *s.start);
  for (int b = 0; b < nseq; b++) s.start[b + 1] = s.start[b] + length[b];
  return s;
}

static inline void close_steps(steps *s) {
  for (int i = 0; i < s->s.io.n; i++)
    for (int k = 0; k < 64; k++)
      cr_assert_eq(((char *)s->s.io.data[i])[s->s.io.info[i].bytes + k], 0x5c, "%s: past %s",
                   s->what, s->s.io.info[i].name);
  free(s->start);
  close_side(&s->s);
}

/* One step: slot b serves sequence of[b] (-1: nobody, with rows of NaN), `lengths` and `context`
 * are set. Its rows come from the whole, and what they give must be the whole's. `fault`: NULL, or
 * what the error says of slot `faulty`, whose rows must be zero. */
static inline void step(steps *s, const int *of, const char *fault, int faulty) {
  static const char *const made[] = {"cmp_o",   "cmp_lse", "idx",     "slc_o",
                                     "slc_lse", "swa_o",   "swa_lse", "o"};
  rg_error e = {0};
  int row = 0;
  for (int i = 0; i < 4; i++)
    memset(buffer(&s->s.io, RG_INPUT, serve_given[i]), 0xff,
           (size_t)s->T * row_bytes(&s->s.io, RG_INPUT, serve_given[i]));
  for (int b = 0; b < s->B; b++) {
    const int n = s->lengths[b] < 0 ? 0 : s->lengths[b] > s->T - row ? s->T - row : s->lengths[b];
    for (int i = 0; i < 4 && n && of[b] >= 0 && b != faulty; i++) {
      const size_t size = row_bytes(&s->s.io, RG_INPUT, serve_given[i]);
      memcpy((char *)buffer(&s->s.io, RG_INPUT, serve_given[i]) + (size_t)row * size,
             (char *)buffer(&s->whole->io, RG_INPUT, serve_given[i]) +
                 (size_t)(s->start[of[b]] + s->context[b] - n) * size,
             (size_t)n * size);
    }
    row += n;
  }
  if (fault)
    FAILS(try_forward(s->s.session, &s->s.io, &e), RG_E_DATA, fault);
  else
    CR_OK(try_forward(s->s.session, &s->s.io, &e), &e);
  for (int i = 0; i < 8; i++) {
    const size_t size = row_bytes(&s->s.io, RG_OUTPUT, made[i]);
    if (size == 0) continue; /* none of the outputs */
    const char *got = buffer(&s->s.io, RG_OUTPUT, made[i]),
               *want = buffer(&s->whole->io, RG_OUTPUT, made[i]);
    row = 0;
    for (int b = 0; b < s->B; b++) {
      const int n = s->lengths[b] < 0 ? 0 : s->lengths[b] > s->T - row ? s->T - row : s->lengths[b];
      for (size_t k = 0; k < (size_t)n * size && b == faulty && strstr(made[i], "_o"); k++)
        EXPECT(got[(size_t)row * size + k] == 0, "%s: %s of a fault", s->what, made[i]);
      for (int t = 0; t < n && of[b] >= 0 && b != faulty; t++)
        EXPECT(memcmp(got + (size_t)(row + t) * size,
                      want + (size_t)(s->start[of[b]] + s->context[b] - n + t) * size, size) == 0,
               "%s: %s of sequence %d at position %d, in a step of %d", s->what, made[i], of[b],
               s->context[b] - n + t, n);
      row += n;
    }
    for (size_t k = (size_t)row * size; k < (size_t)s->T * size; k++)
      EXPECT(got[k] == 0, "%s: %s past the last row", s->what, made[i]);
  }
}

/* Row r of page `page`, head h, of a cache of `rows` rows a page. */
static inline size_t cache_row(const layer *l, int page, int rows, int r, int h) {
  return l->hnd ? ((size_t)page * (size_t)l->KH + (size_t)h) * (size_t)rows + (size_t)r
                : ((size_t)page * (size_t)rows + (size_t)r) * (size_t)l->KH + (size_t)h;
}

/* Caches hold the first done[i] tokens of each sequence in the pages of table [nseq, M], and
 * besides only NaN where nothing was written; `stale` [P], where given, says which pages may hold
 * more. */
static inline void check_caches(const steps *s, const int32_t *table, const int *done,
                                const bool *stale) {
  static const char *const cache[] = {"kc", "vc", "ck", "cv"};
  static const char *const source[] = {"k", "v", "cmp_k", "cmp_v"};
  const layer *l = s->l;
  for (int i = 0; i < 4; i++) {
    const bool cmp = i >= 2;
    const int rows = cmp ? l->page / l->stride : l->page, before = l->kernel / l->stride - 1;
    const size_t size = (size_t)(i % 2 ? l->DV : l->D) * rg_dtype_size(l->kv),
                 all = (size_t)s->P * (size_t)rows * (size_t)l->KH;
    const unsigned char *x = buffer(&s->s.io, RG_STATE, cache[i]);
    const char *from = buffer(&s->whole->io, cmp ? RG_OUTPUT : RG_INPUT, source[i]);
    bool *due = calloc(all, sizeof *due);
    for (int b = 0; b < s->nseq; b++) {
      const int n = cmp ? done[b] < l->kernel ? 0 : (done[b] - l->kernel) / l->stride + 1 : done[b];
      const int start = cmp ? s->start[b] / l->stride : s->start[b];
      for (int j = 0; j < n; j++)
        for (int h = 0; h < l->KH; h++) {
          const int r = cmp ? j + before : j;
          const size_t at = cache_row(l, table[b * s->M + r / rows], rows, r % rows, h);
          due[at] = true;
          cr_assert_eq(memcmp(x + at * size,
                              from + ((size_t)(start + j) * (size_t)l->KH + (size_t)h) * size,
                              size),
                       0, "%s: %s, row %d of sequence %d", s->what, cache[i], j, b);
        }
    }
    const size_t page = (size_t)rows * (size_t)l->KH * size;
    for (size_t k = 0; k < all * size; k++)
      EXPECT(due[k / size] || x[k] == 0xff || (stale && stale[k / page]),
             "%s: %s, byte %zu is nobody's", s->what, cache[i], k);
    free(due);
  }
}

#endif
