/* examples/train_step.c: the public API from end to end: three steps of gradient descent through an
 * NSA graph.
 *
 *   cc train_step.c $(pkg-config --cflags --libs regraph) -lm
 *   ./a.out examples/nsa.json examples/policies/all.json
 *
 * The toy problem: move q, k, v and gate so that the output o meets a fixed target.
 *
 *   loss = ½ Σ (o − target)² / tokens
 *
 * Its gradient by o, which backward starts from, is (o − target) / tokens.
 *
 * Works for any spec whose float inputs all have "grad": true and whose first output is o. Exits
 * with 1 on an error or if the loss does not go down.
 */
#include <math.h>
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 512, SEQUENCES = 2, STEPS = 3, MOST = 32 };

typedef struct tensor {
  rg_tensor_info info;
  float *data; /* an input of type i32 lies here too: both elements have 4 bytes */
  size_t n;    /* elements */
} tensor;

typedef struct training {
  rg_context *ctx;
  rg_spec *spec;
  rg_policy *policy;
  rg_plan *plan;
  rg_session *session;
  tensor tensor[MOST];
  void *pointer[MOST]; /* their data, in the plan's order: what a run by index takes */
  int ntensor;
  float *target; /* as the output */
} training;

/* Evenly spread in [-1, 1): all a toy needs. */
static float toss(uint64_t *state) {
  *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (float)(int32_t)(*state >> 32) * 0x1p-31f;
}

static rg_status prepare(training *t, const char *spec, const char *policy, rg_error *e) {
  /* A small model in fp32. What the spec leaves open (T and B) and what its
   * "params" default to is set alike. */
  const rg_binding set[] = {{"T", TOKENS, NULL}, {"B", SEQUENCES, NULL}, {"H", 4, NULL},
                            {"KH", 1, NULL},     {"D", 64, NULL},        {"DV", 64, NULL},
                            {"dtype", 0, "f32"}, {"window", 64, NULL}};
  rg_context_create(NULL, &t->ctx, e);
  rg_spec_load_file(t->ctx, spec, set, sizeof set / sizeof *set, &t->spec, e);
  rg_policy_load_file(t->ctx, policy, &t->policy, e);
  rg_plan_create(t->spec, t->policy, NULL, &t->plan, e);
  /* the first error of the chain is in *e */
  return rg_session_create(t->plan, NULL, &t->session, e);
}

/* Memory for everything that crosses the border of the graph. A gradient lies in memory of
 * its own. */
static rg_status make_tensors(training *t) {
  uint64_t state = 1;
  while (t->ntensor < MOST) {
    tensor *x = &t->tensor[t->ntensor];
    /* that was the last */
    if (rg_plan_tensor(t->plan, (size_t)t->ntensor, &x->info) != RG_OK) break;
    x->n = (size_t)x->info.bytes / rg_dtype_size(x->info.dtype);
    x->data = calloc(x->n + 1, 4);
    if (!x->data) return RG_E_NOMEM;
    t->pointer[t->ntensor++] = x->data;
    if (x->info.seqlens) {
      const int32_t starts[SEQUENCES + 1] = {0, TOKENS / 3, TOKENS};
      memcpy(x->data, starts, sizeof starts);
    } else if (x->info.role == RG_INPUT) {
      for (size_t i = 0; i < x->n; i++) x->data[i] = toss(&state);
    }
  }
  return RG_OK;
}

static tensor *find(training *t, rg_role role, const char *name) {
  for (int i = 0; i < t->ntensor; i++)
    if (t->tensor[i].info.role == role && (!name || strcmp(t->tensor[i].info.name, name) == 0))
      return &t->tensor[i];
  return NULL;
}

static rg_status run(training *t, rg_direction direction, rg_error *e) {
  return rg_session_run(t->session, direction, t->pointer, (size_t)t->ntensor, NULL, NULL, e);
}

/* One step; *loss is the one before it. */
static rg_status step(training *t, float rate, double *loss, rg_error *e) {
  tensor *o = find(t, RG_OUTPUT, NULL), *d_o = find(t, RG_GRAD_IN, o->info.name);
  if (run(t, RG_FORWARD, e) != RG_OK) return e->status;
  *loss = 0;
  for (size_t i = 0; i < o->n; i++) {
    float miss = o->data[i] - t->target[i];
    *loss += 0.5 * miss * miss / TOKENS;
    d_o->data[i] = miss / TOKENS;
  }
  if (run(t, RG_BACKWARD, e) != RG_OK) return e->status;
  for (int i = 0; i < t->ntensor; i++) {
    tensor *g = &t->tensor[i], *x = find(t, RG_INPUT, g->info.name);
    if (g->info.role != RG_GRAD_OUT) continue;
    for (size_t j = 0; j < g->n; j++) x->data[j] -= rate * g->data[j];
  }
  return RG_OK;
}

static rg_status train(training *t, bool *falls, rg_error *e) {
  const float rate = 50;
  uint64_t state = 2;
  double loss = 0, before = INFINITY;
  tensor *o = find(t, RG_OUTPUT, NULL);
  t->target = malloc(o->n * sizeof *t->target);
  if (!t->target) return RG_E_NOMEM;
  for (size_t i = 0; i < o->n; i++) t->target[i] = 0.5f * toss(&state);
  *falls = true;
  for (int i = 0; i <= STEPS; i++) { /* the last round only looks */
    if (step(t, i < STEPS ? rate : 0, &loss, e) != RG_OK) return e->status;
    printf("step %d: loss %.6f\n", i, loss);
    *falls &= loss < before;
    before = loss;
  }
  return RG_OK;
}

int main(int argc, char **argv) {
  const char *spec = argc > 1 ? argv[1] : "examples/nsa.json";
  const char *policy = argc > 2 ? argv[2] : "examples/policies/all.json";
  rg_error e = {0};
  training t = {0};
  bool falls = false;
  rg_sizes sizes;

  rg_status s = prepare(&t, spec, policy, &e);
  if (s == RG_OK) s = make_tensors(&t);
  if (s == RG_OK) {
    rg_plan_sizes(t.plan, &sizes);
    printf("%s: %d tokens, %lld bytes of arena\n", spec, TOKENS, (long long)sizes.predicted_peak);
    s = train(&t, &falls, &e);
  }
  if (s != RG_OK) {
    char line[1536] = "out of memory";
    if (e.status != RG_OK) rg_error_format(&e, line, sizeof line);
    fprintf(stderr, "%s\n", line);
  }
  rg_session_destroy(t.session);
  rg_plan_destroy(t.plan);
  rg_policy_destroy(t.policy);
  rg_spec_destroy(t.spec);
  rg_context_destroy(t.ctx);
  for (int i = 0; i < t.ntensor; i++) free(t.tensor[i].data);
  free(t.target);
  return s == RG_OK && falls ? 0 : 1;
}
