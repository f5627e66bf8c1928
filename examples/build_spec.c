/* examples/build_spec.c: a variant of attention made by calls, without JSON text, and run by index:
   a near window and full causal attention, mixed by a learned gate (two_branch.json says the same).

     cc build_spec.c $(pkg-config --cflags --libs regraph)
     ./a.out                       what the plan runs, once forward and back
     ./a.out --json >mine.json     the document, for the command and for others

   Exits with 1 on an error.
 */
#include <regraph/regraph.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 512, SEQUENCES = 2, MOST = 16 };

/* No call needs checking: the builder keeps the first error, and rg_build_spec reports it. */
static rg_status build(rg_context *ctx, rg_spec **spec, rg_error *e) {
  const rg_item near[] = {rg_word("window_left", "$window")};
  const rg_item full[] = {rg_int("window_left", -1)};
  const rg_item mix[] = {rg_word("act", "softmax")};
  rg_builder *b;
  rg_builder_create(ctx, "two_branch", &b, e);

  rg_build_param(b, rg_int("H", 16));
  rg_build_param(b, rg_int("KH", 4));
  rg_build_param(b, rg_int("D", 128));
  rg_build_param(b, rg_int("DV", 128));
  rg_build_param(b, rg_int("window", 255));
  rg_build_param(b, rg_word("dtype", "bf16"));

  rg_build_input(b, "q", "T,H,D", "$dtype", RG_GRAD_PLAIN);
  rg_build_input(b, "k", "T,KH,D", "$dtype", RG_GRAD_PLAIN);
  rg_build_input(b, "v", "T,KH,DV", "$dtype", RG_GRAD_PLAIN);
  rg_build_input(b, "gate", "T,H,2", "$dtype", RG_GRAD_PLAIN);
  rg_build_input(b, "cu_seqlens", "B+1", "i32", RG_GRAD_NONE);

  rg_build_node(b, "near", "swa_attn", "q k v cu_seqlens", "o=near_o lse=near_lse", near, 1);
  rg_build_node(b, "full", "swa_attn", "q k v cu_seqlens", "o=full_o lse=full_lse", full, 1);
  rg_build_node(b, "combine", "combine", "o=near_o+full_o gate cu_seqlens", "o", mix, 1);
  rg_build_output(b, "o", NULL);

  rg_status s = rg_build_spec(b, NULL, 0, spec, e);
  rg_builder_destroy(b);
  return s;
}

static rg_status print_json(const rg_spec *spec, rg_error *e) {
  rg_text text;
  rg_status s = rg_spec_write(spec, "json", &text, e);
  if (s != RG_OK) return s;
  fputs(text.data, stdout);
  rg_text_destroy(&text);
  return RG_OK;
}

static void print_nodes(const rg_plan *plan) {
  static const char *const kind[] = {"", "gradient", "again", "sum or cast"};
  rg_node_info n;
  printf("%-24s %-20s %-11s %12s %10s\n", "node", "op", "", "bytes", "model ms");
  for (size_t i = 0; rg_plan_node(plan, i, &n) == RG_OK; i++)
    if (n.step >= 0) /* a view runs nothing */
      printf("%-24s %-20s %-11s %12lld %10.3f\n", n.name, n.op, kind[n.kind], (long long)n.written,
             n.model_ms);
}

/* Memory for what crosses the border of the graph, in the plan's order: at[i] is tensor i's. */
static rg_status make_tensors(const rg_plan *plan, void **at, size_t *n, rg_error *e) {
  static const int32_t starts[SEQUENCES + 1] = {0, 200, TOKENS};
  rg_tensor_info t;
  for (; *n < MOST && rg_plan_tensor(plan, *n, &t) == RG_OK; (*n)++) {
    /* of the plan's device, aligned */
    rg_status s = rg_memory_alloc(plan, (size_t)t.bytes, &at[*n], e);
    if (s != RG_OK) return s;
    if (t.seqlens)
      memcpy(at[*n], starts, sizeof starts);
    else if (t.dtype == RG_BF16)
      for (int64_t i = 0; i < t.bytes / 2; i++) { /* anything will do */
        const float x = (float)(i * 7919 % 2003) / 1001 - 1;
        rg_convert(RG_BF16, (uint16_t *)at[*n] + i, RG_F32, &x, 1);
      }
  }
  return RG_OK;
}

static rg_status run(const rg_plan *plan, rg_error *e) {
  void *at[MOST] = {NULL};
  size_t n = 0;
  rg_session *session = NULL;
  rg_status s = make_tensors(plan, at, &n, e);
  if (s == RG_OK) s = rg_session_create(plan, NULL, &session, e);
  /* One array serves both directions: each takes its own of it. */
  if (s == RG_OK) s = rg_session_run(session, RG_FORWARD, at, n, NULL, NULL, e);
  if (s == RG_OK) s = rg_session_run(session, RG_BACKWARD, at, n, NULL, NULL, e);
  rg_session_destroy(session);
  for (size_t i = 0; i < n; i++) rg_memory_free(plan, at[i]);
  return s;
}

int main(int argc, char **argv) {
  const rg_binding set[] = {{"T", TOKENS, NULL}, {"B", SEQUENCES, NULL}};
  const rg_plan_options options = {.size = sizeof options, .set = set, .nset = 2};
  rg_error e = {0};
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  rg_context_create(NULL, &ctx, &e);
  rg_status s = build(ctx, &spec, &e);
  if (s == RG_OK && argc > 1 && strcmp(argv[1], "--json") == 0) {
    s = print_json(spec, &e);
  } else if (s == RG_OK) {
    s = rg_plan_create(spec, NULL, &options, &plan, &e);
    if (s == RG_OK) print_nodes(plan);
    if (s == RG_OK) s = run(plan, &e);
  }
  if (s != RG_OK) {
    char line[1536];
    rg_error_format(&e, line, sizeof line);
    fprintf(stderr, "%s\n", line);
  }
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
  return s == RG_OK ? 0 : 1;
}
