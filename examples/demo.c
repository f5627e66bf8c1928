/* examples/demo.c: the program behind examples/run.sh: NSA forward and backward through the public
   API, with a report.

     regraph-demo SPEC POLICY

   Plans a small bf16 model, runs it, and shows what became of the six nodes, who owned which bytes
   when, and how far o, dq and dgate lie from the fp64 oracle (tests/ref) on sampled rows. An oracle
   needs no whole sequence of queries for that: a sample is a few neighbouring queries against all
   keys of their sequence. Exits with 1 if an error of the library, or a distance past the gate,
   shows.
 */
#include "../tests/ref/ref.h"
#include <math.h>
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { T = 4096, B = 2, H = 16, KH = 1, D = 128, KERNEL = 32, STRIDE = 16, BLOCK = 64, TOP_N = 16 };
enum { INIT = 1, LOCAL = 2, WINDOW = 512, BRANCHES = 3 };
enum { SAMPLE = 16, SAMPLES_PER_SEQUENCE = 2, MOST = 16 };
static const int32_t starts[B + 1] = {0, 1500, T};

typedef struct tensor {
  rg_tensor_info info;
  void *data;
  int64_t n; /* elements */
} tensor;

typedef struct demo {
  rg_context *ctx;
  rg_spec *spec;
  rg_policy *policy;
  rg_plan *plan;
  rg_session *session;
  rg_error error;
  tensor tensor[MOST];
  void *pointer[MOST]; /* their data */
  int ntensor;
  double forward_ms, backward_ms;
  bool bold;
} demo;

static void title(const demo *m, const char *text) {
  printf(m->bold ? "\n\033[1m%s\033[0m\n" : "\n%s\n", text);
}

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

/* ---- set up and run ---- */

static rg_status prepare(demo *m, const char *spec, const char *policy) {
  const rg_binding set[] = {
      {"T", T, NULL},           {"B", B, NULL},           {"H", H, NULL},
      {"KH", KH, NULL},         {"D", D, NULL},           {"DV", D, NULL},
      {"kernel", KERNEL, NULL}, {"stride", STRIDE, NULL}, {"block", BLOCK, NULL},
      {"top_n", TOP_N, NULL},   {"init", INIT, NULL},     {"local", LOCAL, NULL},
      {"window", WINDOW, NULL}, {"dtype", 0, "bf16"}};
  rg_error *e = &m->error;
  rg_context_create(NULL, &m->ctx, e);
  rg_spec_load_file(m->ctx, spec, set, sizeof set / sizeof *set, &m->spec, e);
  rg_policy_load_file(m->ctx, policy, &m->policy, e);
  rg_plan_create(m->spec, m->policy, NULL, &m->plan, e);
  return rg_session_create(m->plan, NULL, &m->session, e);
}

/* Twelve even numbers make one that is normal enough. */
static float normal(uint64_t *state) {
  double sum = -6;
  for (int i = 0; i < 12; i++) {
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    sum += (double)(*state >> 32) * 0x1p-32;
  }
  return (float)sum;
}

/* Memory for everything that crosses the border of the graph, in the plan's order. */
static rg_status make_tensors(demo *m) {
  uint64_t state = 42;
  for (; m->ntensor < MOST; m->ntensor++) {
    tensor *x = &m->tensor[m->ntensor];
    /* that was the last */
    if (rg_plan_tensor(m->plan, (size_t)m->ntensor, &x->info) != RG_OK) break;
    x->n = x->info.bytes / (int64_t)rg_dtype_size(x->info.dtype);
    x->data = calloc(1, (size_t)x->info.bytes + 1);
    if (!x->data) return RG_E_NOMEM;
    if (x->info.seqlens) {
      memcpy(x->data, starts, sizeof starts);
    } else if (x->info.role == RG_INPUT || x->info.role == RG_GRAD_IN) {
      for (int64_t i = 0; i < x->n; i++) {
        float v = normal(&state);
        rg_convert(x->info.dtype, (char *)x->data + i * (int64_t)rg_dtype_size(x->info.dtype),
                   RG_F32, &v, 1);
      }
    }
    m->pointer[m->ntensor] = x->data;
  }
  return RG_OK;
}

static rg_status run_one(demo *m, rg_direction direction) {
  return rg_session_run(m->session, direction, m->pointer, (size_t)m->ntensor, NULL, NULL,
                        &m->error);
}

static rg_status run(demo *m) {
  double start = now_ms();
  rg_status s = run_one(m, RG_FORWARD);
  m->forward_ms = now_ms() - start;
  if (s != RG_OK) return s;
  start = now_ms();
  s = run_one(m, RG_BACKWARD);
  m->backward_ms = now_ms() - start;
  return s;
}

/* ---- report ---- */

/* One line a spec node, with all that a rewrite made of it: copies for head groups, clones that
 * compute it again, gradients. What sums and rounds gradients stems from none and stands in a line
 * of its own. */
static void report_nodes(const demo *m) {
  typedef struct line {
    const char *name;
    double forward, again, backward;
    bool node, recomputed;
  } line;
  line lines[MOST];
  int n = 0;
  rg_node_info node;
  for (size_t i = 0; rg_plan_node(m->plan, i, &node) == RG_OK; i++) {
    rg_node_time t;
    const char *name = node.spec_node ? node.spec_node : "(sums, casts)";
    int at = 0;
    if (node.step < 0) continue; /* a view, which runs nothing */
    if (rg_session_node_time(m->session, (size_t)node.step, &t) != RG_OK) continue;
    while (at < n && strcmp(lines[at].name, name) != 0) at++;
    if (at == n) {
      if (n == MOST) continue;
      lines[n++] = (line){.name = name, .node = node.spec_node != NULL};
    }
    lines[at].recomputed |= node.recomputed;
    if (!node.backward)
      lines[at].forward += t.ms;
    else if (node.kind == RG_NODE_CLONE)
      lines[at].again += t.ms;
    else
      lines[at].backward += t.ms;
  }
  printf("  %-14s %12s %12s %12s   %s\n", "node", "forward", "again", "backward",
         "its outputs are");
  for (int i = 0; i < n; i++) {
    char again[32] = "";
    if (lines[i].recomputed) snprintf(again, sizeof again, "%.2f ms", lines[i].again);
    printf("  %-14s %9.2f ms %12s %9.2f ms%s\n", lines[i].name, lines[i].forward, again,
           lines[i].backward,
           lines[i].recomputed ? "   recomputed"
           : lines[i].node     ? "   kept"
                               : "");
  }
  printf("  %-14s %9.2f ms %12s %9.2f ms\n", "whole", m->forward_ms, "", m->backward_ms);
}

static void report_memory(demo *m) {
  rg_sizes z;
  rg_text text;
  rg_plan_sizes(m->plan, &z);
  printf("  peak %.2f MiB, saved and scratch together; %.2f are alive at once, so no packing takes "
         "less than "
         "that\n\n",
         (double)z.predicted_peak * 0x1p-20, (double)z.lower_bound * 0x1p-20);
  if (rg_plan_write(m->plan, "timeline", &text, &m->error) != RG_OK) return;
  fputs(text.data, stdout);
  rg_text_destroy(&text);
}

/* ---- the oracle ---- */

static const tensor *find(const demo *m, rg_role role, const char *name) {
  for (int i = 0; i < m->ntensor; i++)
    if (m->tensor[i].info.role == role && strcmp(m->tensor[i].info.name, name) == 0)
      return &m->tensor[i];
  fprintf(stderr, "the spec has no '%s'\n", name);
  exit(1);
}

static double *doubles(int64_t n) {
  double *p = calloc((size_t)n, sizeof *p);
  if (!p) {
    fputs("out of memory\n", stderr);
    exit(1);
  }
  return p;
}

/* Rows [row, row + n) of a bf16 tensor whose rows have `width` elements, as doubles. */
static double *rows_of(const tensor *x, int64_t row, int64_t n, int64_t width) {
  double *p = doubles(n * width);
  for (int64_t i = 0; i < n * width; i++) {
    float v;
    rg_convert(RG_F32, &v, x->info.dtype,
               (const char *)x->data + (row * width + i) * (int64_t)rg_dtype_size(x->info.dtype),
               1);
    p[i] = v;
  }
  return p;
}

typedef struct distance {
  double off, ref; /* sums of squares */
} distance;

static void add_distance(distance *d, const double *have, const double *want, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    d->off += (have[i] - want[i]) * (have[i] - want[i]);
    d->ref += want[i] * want[i];
  }
}

typedef struct verdict {
  distance o, dq, dgate;
  int64_t same, chosen; /* blocks that oracle and kernel both chose, of how many */
} verdict;

/* A sample: queries at positions [first, first + SAMPLE) of sequence b, and what they need. */
typedef struct sample {
  int64_t row, first, length; /* row in the pack; tokens of the sequence */
  double *q, *gate, *d_o;     /* [SAMPLE, H, D], [SAMPLE, H, 3], [SAMPLE, H, D] */
  double *k, *v;              /* [length, KH, D] */
  double *cmp_k, *cmp_v;      /* [length / STRIDE, KH, D] */
  int32_t idx[(size_t)SAMPLE * KH * TOP_N];
} sample;

/* Mean-pooled keys or values, rounded to bf16 as the node stores them. */
static double *compressed(const double *x, int64_t length) {
  const int32_t cu[2] = {0, (int32_t)length};
  int64_t n = length / STRIDE * KH * D;
  double *y = doubles(n);
  ref_compress c = {.method = REF_MEAN,
                    .T = length,
                    .B = 1,
                    .KH = KH,
                    .D = D,
                    .kernel = KERNEL,
                    .stride = STRIDE};
  c.x = x;
  c.cu = cu;
  ref_compress_forward(&c, y);
  for (int64_t i = 0; i < n; i++) {
    float f = (float)y[i];
    uint16_t half;
    rg_convert(RG_BF16, &half, RG_F32, &f, 1);
    rg_convert(RG_F32, &f, RG_BF16, &half, 1);
    y[i] = f;
  }
  return y;
}

/* Blocks: the kernel's own where they are still in saved memory (a later stage is judged on what it
 * was given), else the oracle's. */
static void choose_blocks(sample *s, const double *lse, const int32_t *all_idx, verdict *v) {
  const int32_t cu[2] = {0, SAMPLE}, cu_k[2] = {0, (int32_t)s->length},
                offset[1] = {(int32_t)s->first};
  ref_topk t = {.T = SAMPLE, .TK = s->length / STRIDE, .B = 1, .H = H, .KH = KH, .D = D};
  t.q = s->q, t.k = s->cmp_k, t.lse = lse, t.cu = cu, t.cu_k = cu_k, t.q_offset = offset;
  t.kernel = KERNEL, t.stride = STRIDE, t.block = BLOCK, t.top_n = TOP_N, t.init = INIT,
  t.local = LOCAL;
  ref_topk_forward(&t, s->idx, NULL, 0, NULL);
  if (!all_idx) return;
  const int32_t *kernel = all_idx + s->row * KH * TOP_N;
  for (int64_t r = 0; r < SAMPLE * KH; r++)
    for (int i = 0; i < TOP_N && s->idx[r * TOP_N + i] >= 0; i++) {
      v->chosen++;
      for (int j = 0; j < TOP_N; j++) v->same += kernel[r * TOP_N + j] == s->idx[r * TOP_N + i];
    }
  memcpy(s->idx, kernel, sizeof s->idx);
}

static void judge(demo *m, int b, int64_t first, const int32_t *all_idx, verdict *verdict) {
  const int64_t wide = (int64_t)H * D;
  sample s = {.row = starts[b] + first, .first = first, .length = starts[b + 1] - starts[b]};
  s.q = rows_of(find(m, RG_INPUT, "q"), s.row, SAMPLE, wide);
  s.gate = rows_of(find(m, RG_INPUT, "gate"), s.row, SAMPLE, H * BRANCHES);
  s.d_o = rows_of(find(m, RG_GRAD_IN, "o"), s.row, SAMPLE, wide);
  s.k = rows_of(find(m, RG_INPUT, "k"), starts[b], s.length, KH * D);
  s.v = rows_of(find(m, RG_INPUT, "v"), starts[b], s.length, KH * D);
  s.cmp_k = compressed(s.k, s.length);
  s.cmp_v = compressed(s.v, s.length);

  const int32_t cu[2] = {0, SAMPLE}, cu_k[2] = {0, (int32_t)s.length}, offset[1] = {(int32_t)first};
  ref_attn a[BRANCHES];
  double *o[BRANCHES], *d_o[BRANCHES], *lse = doubles(SAMPLE * H);
  for (int n = 0; n < BRANCHES; n++) {
    o[n] = doubles(SAMPLE * wide);
    d_o[n] = doubles(SAMPLE * wide);
    a[n] = (ref_attn){
        .kind = (ref_kind)n, .T = SAMPLE, .TK = n ? s.length : s.length / STRIDE, .B = 1, .H = H};
    a[n].KH = KH, a[n].D = D, a[n].DV = D, a[n].q = s.q, a[n].cu = cu, a[n].cu_k = cu_k,
    a[n].q_offset = offset;
    a[n].k = n ? s.k : s.cmp_k, a[n].v = n ? s.v : s.cmp_v;
    a[n].kernel = KERNEL, a[n].stride = STRIDE, a[n].idx = s.idx, a[n].block = BLOCK,
    a[n].top_n = TOP_N;
    a[n].window_left = WINDOW;
  }
  ref_attn_forward(&a[REF_CMP], o[REF_CMP], lse);
  choose_blocks(&s, lse, all_idx, verdict);
  ref_attn_forward(&a[REF_SLC], o[REF_SLC], lse);
  ref_attn_forward(&a[REF_SWA], o[REF_SWA], lse);

  double *out = doubles(SAMPLE * wide), *dgate = doubles(SAMPLE * H * BRANCHES),
         *dq = doubles(SAMPLE * wide);
  const double *const branches[BRANCHES] = {o[0], o[1], o[2]};
  ref_combine_forward(REF_SIGMOID, SAMPLE, SAMPLE, H, D, BRANCHES, branches, s.gate, out);
  ref_combine_backward(REF_SIGMOID, SAMPLE, SAMPLE, H, D, BRANCHES, branches, s.gate, s.d_o, d_o,
                       dgate);
  for (int n = 0; n < BRANCHES; n++) {
    double *part = doubles(SAMPLE * wide), *dk = doubles(s.length * KH * D),
           *dv = doubles(s.length * KH * D);
    ref_attn_backward(&a[n], d_o[n], NULL, part, dk, dv, NULL);
    for (int64_t i = 0; i < SAMPLE * wide; i++) dq[i] += part[i];
    free(part), free(dk), free(dv);
  }

  double *have_o = rows_of(find(m, RG_OUTPUT, "o"), s.row, SAMPLE, wide);
  double *have_dq = rows_of(find(m, RG_GRAD_OUT, "q"), s.row, SAMPLE, wide);
  double *have_dgate = rows_of(find(m, RG_GRAD_OUT, "gate"), s.row, SAMPLE, H * BRANCHES);
  add_distance(&verdict->o, have_o, out, SAMPLE * wide);
  add_distance(&verdict->dq, have_dq, dq, SAMPLE * wide);
  add_distance(&verdict->dgate, have_dgate, dgate, SAMPLE * H * BRANCHES);
  free(have_o), free(have_dq), free(have_dgate), free(out), free(dgate), free(dq), free(lse);
  for (int n = 0; n < BRANCHES; n++) free(o[n]), free(d_o[n]);
  free(s.q), free(s.gate), free(s.d_o), free(s.k), free(s.v), free(s.cmp_k), free(s.cmp_v);
}

/* true if the distance passes; gates are those of the tests for bf16. */
static bool report_distance(const char *name, distance d, double gate) {
  double x = sqrt(d.off / (d.ref > 0 ? d.ref : 1));
  printf("  %-6s %.2e  (gate %.0e)  %s\n", name, x, gate, x <= gate ? "ok" : "TOO FAR");
  return x <= gate;
}

static bool report_oracle(demo *m) {
  verdict v = {0};
  const size_t bytes = (size_t)T * KH * TOP_N * sizeof(int32_t);
  int32_t *idx = malloc(bytes);
  rg_error gone = {0}; /* recomputed indices are gone by now, which is no error */
  bool live = idx && rg_session_read(m->session, "idx", idx, bytes, &gone) == RG_OK;
  for (int b = 0; b < B; b++)
    for (int i = 1; i <= SAMPLES_PER_SEQUENCE; i++) /* the last sample ends the sequence */
      judge(m, b, (starts[b + 1] - starts[b]) * i / SAMPLES_PER_SEQUENCE - SAMPLE,
            live ? idx : NULL, &v);
  free(idx);
  printf("  %d rows of %d tokens, relative root mean square\n", B * SAMPLES_PER_SEQUENCE * SAMPLE,
         T);
  bool ok = report_distance("o", v.o, 4e-3);
  ok &= report_distance("dq", v.dq, 6e-3);
  ok &= report_distance("dgate", v.dgate, 6e-3);
  if (live)
    printf("  topk   %.2f %% of the oracle's blocks\n", 100.0 * (double)v.same / (double)v.chosen);
  return ok;
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fputs("usage: regraph-demo SPEC POLICY\n", stderr);
    return 2;
  }
  demo m = {.bold = isatty(STDOUT_FILENO)};
  bool ok = false;
  rg_status s = prepare(&m, argv[1], argv[2]);
  if (s == RG_OK) s = make_tensors(&m);
  if (s == RG_OK) s = run(&m);
  if (s == RG_OK) {
    title(&m, "Native sparse attention on the CPU, forward and backward");
    printf("  %d tokens in %d sequences, %d query heads, %d KV head, d %d, bf16\n", T, B, H, KH, D);
    title(&m, "Nodes");
    report_nodes(&m);
    title(&m, "Memory of the arena");
    report_memory(&m);
    title(&m, "Against the fp64 oracle");
    ok = report_oracle(&m);
    s = m.error.status;
  }
  if (s != RG_OK) {
    char line[1536] = "out of memory";
    if (m.error.status != RG_OK) rg_error_format(&m.error, line, sizeof line);
    fprintf(stderr, "%s\n", line);
  }
  rg_session_destroy(m.session);
  rg_plan_destroy(m.plan);
  rg_policy_destroy(m.policy);
  rg_spec_destroy(m.spec);
  rg_context_destroy(m.ctx);
  for (int i = 0; i < m.ntensor; i++) free(m.tensor[i].data);
  return s == RG_OK && ok ? 0 : 1;
}
