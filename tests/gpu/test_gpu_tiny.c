/* tests/gpu/test_gpu_tiny.c: every op, family of kernels and mode once, at sizes that
   compute-sanitizer gets through in seconds (tests/gpu_sanitize.sh).

   Attention runs alone and is compared with the oracle; the rest runs as whole graphs, forward and
   backward, both with the arena and with bytes of its own for every tensor: there, a read of what
   nobody wrote cannot be hidden by what stood in the same bytes before. Nothing is written into
   outputs, gradients or the arena first. The two layouts must agree bit for bit.
   REGRAPH_TEST_PROFILE: a profile that plans are made for.
 */
#include "../harness/num.h"
#include "../unit/run_util.h"
#include "on_gpu.h"

/* ---- attention, one op at a time ---- */

static const int32_t some[] = {37, 0, 1, 81, 16}, keys[] = {60, 3, 1, 81, 30},
                     offset[] = {20, 0, 0, 0, 9};

/* The mode with nothing else; with sinks, softcap and a gradient of lse; a chunk of queries far
 * into its keys; gradients in fp32 and rows with holes. */
static void attention(num_attn a, rg_dtype dtype, int64_t H, int64_t KH, int64_t D, int64_t E) {
  NEEDS_GPU();
  a.name = "tiny";
  a.dtype = dtype;
  a.B = 5;
  a.length = some;
  a.H = H, a.KH = KH, a.D = D, a.DV = E;
  for (int i = 0; i < 4; i++) {
    num_attn b = a;
    if (i == 1) b.sinks = b.d_lse = true;
    if (i == 1 && dtype == RG_F32) b.softcap = 5;
    if (i == 2) b.length_k = keys, b.offset = offset;
    if (i == 3) b.wide_grads = true, b.strided = 8;
    ot *t = ot_begin((uint64_t)(1 + i));
    OT_OK(num_attn_check(t, b));
    ot_end(t);
  }
}

#define CMP ((num_attn){.kind = REF_CMP, .kernel = 8, .stride = 4})
#define SLC ((num_attn){.kind = REF_SLC, .block = 16, .top_n = 3})
#define SWA ((num_attn){.kind = REF_SWA, .window_left = 19})

Test(gpu_tiny, attn_cmp_plain) {
  attention(CMP, RG_F32, 4, 2, 40, 24);
}
Test(gpu_tiny, attn_slc_plain) {
  attention(SLC, RG_F32, 4, 2, 40, 24);
}
Test(gpu_tiny, attn_swa_plain) {
  attention(SWA, RG_F32, 4, 2, 40, 24);
}
Test(gpu_tiny, attn_wide_plain) {
  attention(SLC, RG_F32, 3, 1, 192, 128);
  attention(SWA, RG_F32, 1, 1, 256, 256);
}
Test(gpu_tiny, attn_cmp_tuned) {
  attention(CMP, RG_BF16, 4, 2, 128, 128);
}
Test(gpu_tiny, attn_slc_tuned) {
  attention(SLC, RG_BF16, 4, 2, 128, 128);
}
Test(gpu_tiny, attn_slc_groups) {
  attention(SLC, RG_BF16, 16, 1, 128, 128);
}
Test(gpu_tiny, attn_swa_tuned) {
  attention(SWA, RG_BF16, 4, 2, 128, 128);
}
Test(gpu_tiny, attn_dense_groups) {
  attention((num_attn){.kind = REF_SWA, .window_left = -1}, RG_BF16, 16, 1, 128, 128);
}

/* ---- whole graphs ---- */

enum { T = 150, B = 5 };
static const int lengths[B] = {37, 0, 1, 81, 16};

/* A layer with every op in it, but those that only communicate. */
static const char layer[] =
    "{ \"regraph\": 1, \"name\": \"layer\",\n"
    "  \"params\": { \"M\": 64, \"H\": 4, \"KH\": 2, \"D\": 128, \"kernel\": 16, \"stride\": 8, "
    "\"block\": "
    "16,\n"
    "    \"top_n\": 3, \"window\": 20, \"wide\": 1, \"method\": \"mean\", \"dtype\": \"bf16\" },\n"
    "  \"inputs\": {\n"
    "    \"x\": { \"shape\": [\"T\", \"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"wn\": { \"shape\": [\"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"wq\": { \"shape\": [\"H*D\", \"M\"], \"dtype\": \"$dtype\", \"grad\": \"accumulate\" "
    "},\n"
    "    \"wk\": { \"shape\": [\"KH*D\", \"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"wv\": { \"shape\": [\"KH*D\", \"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"wg\": { \"shape\": [\"H*3\", \"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"wo\": { \"shape\": [\"M\", \"H*D\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"bo\": { \"shape\": [\"M\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "    \"sinks\": { \"shape\": [\"H\"], \"dtype\": \"$dtype\", \"grad\": true },\n"
    "%s"
    "    \"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n"
    "  \"nodes\": [\n"
    "    { \"name\": \"norm\", \"op\": \"rmsnorm\", \"in\": { \"x\": \"x\", \"w\": \"wn\", "
    "\"cu_seqlens\": "
    "\"cu_seqlens\" }, \"out\": { \"y\": \"xn\" } },\n"
    "    { \"name\": \"q_proj\", \"op\": \"linear\", \"in\": { \"x\": \"xn\", \"w\": \"wq\" }, "
    "\"out\": { "
    "\"y\": \"q_flat\" } },\n"
    "    { \"name\": \"k_proj\", \"op\": \"linear\", \"in\": { \"x\": \"xn\", \"w\": \"wk\" }, "
    "\"out\": { "
    "\"y\": \"k_flat\" } },\n"
    "    { \"name\": \"v_proj\", \"op\": \"linear\", \"in\": { \"x\": \"xn\", \"w\": \"wv\" }, "
    "\"out\": { "
    "\"y\": \"v_flat\" } },\n"
    "    { \"name\": \"g_proj\", \"op\": \"linear\", \"in\": { \"x\": \"xn\", \"w\": \"wg\" }, "
    "\"out\": { "
    "\"y\": \"g_flat\" } },\n"
    "    { \"name\": \"q_heads\", \"op\": \"reshape\", \"in\": { \"x\": \"q_flat\" }, \"out\": { "
    "\"y\": "
    "\"q_plain\" }, \"attrs\": { \"shape\": [0, \"H\", \"D\"] } },\n"
    "    { \"name\": \"k_heads\", \"op\": \"reshape\", \"in\": { \"x\": \"k_flat\" }, \"out\": { "
    "\"y\": "
    "\"k_plain\" }, \"attrs\": { \"shape\": [0, \"KH\", \"D\"] } },\n"
    "    { \"name\": \"v_heads\", \"op\": \"reshape\", \"in\": { \"x\": \"v_flat\" }, \"out\": { "
    "\"y\": "
    "\"v\" "
    "}, \"attrs\": { \"shape\": [0, \"KH\", \"D\"] } },\n"
    "    { \"name\": \"g_heads\", \"op\": \"reshape\", \"in\": { \"x\": \"g_flat\" }, \"out\": { "
    "\"y\": "
    "\"gate\" }, \"attrs\": { \"shape\": [0, \"H\", 3] } },\n"
    "    { \"name\": \"q_rope\", \"op\": \"rope\", \"in\": { \"x\": \"q_plain\", \"cu_seqlens\": "
    "\"cu_seqlens\" }, \"out\": { \"y\": \"q\" } },\n"
    "    { \"name\": \"k_rope\", \"op\": \"rope\", \"in\": { \"x\": \"k_plain\", \"cu_seqlens\": "
    "\"cu_seqlens\" }, \"out\": { \"y\": \"k\" } },\n"
    "    { \"name\": \"compress_kv\", \"op\": \"compress_kv\", \"in\": { \"k\": \"k\", \"v\": "
    "\"v\", %s"
    "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"k\": \"cmp_k\", \"v\": \"cmp_v\" },\n"
    "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\", \"k_method\": "
    "\"$method\", "
    "\"v_method\": \"$method\" } },\n"
    "    { \"name\": \"cmp_o\", \"op\": \"cmp_attn\", \"in\": { \"q\": \"q\", \"k\": \"cmp_k\", "
    "\"v\": "
    "\"cmp_v\", \"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"o\": \"cmp_o\", \"lse\": "
    "\"cmp_lse\" },\n"
    "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\" } },\n"
    "    { \"name\": \"topk\", \"op\": \"topk\", \"in\": { \"q\": \"q\", \"k\": \"cmp_k\", "
    "\"lse\": "
    "\"cmp_lse\", "
    "\"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"idx\": \"idx\" },\n"
    "      \"attrs\": { \"kernel\": \"$kernel\", \"stride\": \"$stride\", \"block\": \"$block\", "
    "\"top_n\": "
    "\"$top_n\", \"init\": 1, \"local\": 1 } },\n"
    "    { \"name\": \"slc_o\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
    "\"v\", "
    "\"idx\": \"idx\", \"cu_seqlens\": \"cu_seqlens\" }, \"out\": { \"o\": \"slc_o\", \"lse\": "
    "\"slc_lse\" "
    "}, "
    "\"attrs\": { \"block\": \"$block\" } },\n"
    "    { \"name\": \"swa_o\", \"op\": \"swa_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
    "\"v\", "
    "\"cu_seqlens\": \"cu_seqlens\", \"sinks\": \"sinks\" }, \"out\": { \"o\": \"swa_o\", \"lse\": "
    "\"swa_lse\" }, \"attrs\": { \"window_left\": \"$window\" } },\n"
    "    { \"name\": \"combine\", \"op\": \"combine\", \"in\": { \"o\": [\"cmp_o\", \"slc_o\", "
    "\"swa_o\"], "
    "\"gate\": \"gate\" }, \"out\": { \"o\": \"o_gated\" } },\n"
    "    { \"name\": \"merge\", \"op\": \"merge_lse\", \"in\": { \"o\": [\"slc_o\", \"swa_o\"], "
    "\"lse\": "
    "[\"slc_lse\", \"swa_lse\"] }, \"out\": { \"o\": \"o_merged\" } },\n"
    "    { \"name\": \"sum\", \"op\": \"add\", \"in\": { \"a\": [\"o_gated\", \"o_merged\"] }, "
    "\"out\": { "
    "\"y\": \"o\" } },\n"
    "    { \"name\": \"o_flat\", \"op\": \"reshape\", \"in\": { \"x\": \"o\" }, \"out\": { \"y\": "
    "\"o_flat\" "
    "}, "
    "\"attrs\": { \"shape\": [0, \"H*D\"] } },\n"
    "    { \"name\": \"o_proj\", \"op\": \"linear\", \"in\": { \"x\": \"o_flat\", \"w\": \"wo\", "
    "\"b\": "
    "\"bo\" "
    "}, \"out\": { \"y\": \"delta\" } },\n"
    "    { \"name\": \"silu\", \"op\": \"silu\", \"in\": { \"x\": \"delta\" }, \"out\": { \"y\": "
    "\"s\" } },\n"
    "    { \"name\": \"mul\", \"op\": \"mul\", \"in\": { \"a\": \"s\", \"b\": \"xn\" }, \"out\": { "
    "\"y\": "
    "\"m\" "
    "} },\n"
    "    { \"name\": \"both\", \"op\": \"concat\", \"in\": { \"x\": [\"m\", \"x\"] }, \"out\": { "
    "\"y\": "
    "\"mx\" }, \"attrs\": { \"axis\": 1 } },\n"
    "    { \"name\": \"part\", \"op\": \"slice\", \"in\": { \"x\": \"mx\" }, \"out\": { \"y\": "
    "\"mid\" }, "
    "\"attrs\": { \"axis\": 1, \"start\": 8, \"stop\": 100 } },\n"
    "    { \"name\": \"wide\", \"op\": \"cast\", \"in\": { \"x\": \"mid\" }, \"out\": { \"y\": "
    "\"y\" }, "
    "\"attrs\": { \"to\": \"f32\" } } ],\n"
    "  \"outputs\": { \"y\": \"y\", \"m\": \"m\" } }\n";

static void bind_raw(rg_session *s, buffers *b) {
  rg_error e = {0};
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    CR_OK(rg_memory_alloc(b->plan, (size_t)t->bytes, &b->device[i], &e), &e);
    if (t->role == RG_INPUT || t->role == RG_GRAD_IN || t->accumulates)
      CR_OK(rg_memory_write(b->plan, b->device[i], b->data[i], (size_t)t->bytes, &e), &e);
    CR_OK(rg_session_bind(s, t->role, t->name, b->device[i], (size_t)t->bytes, &e), &e);
  }
}

/* One layout of the plan, forward and backward: a graph, or the steps one by one. */
static void run_layout(rg_context *ctx, const rg_spec *spec, const char *policy, bool no_reuse,
                       bool eager, buffers *b) {
  rg_error e = {0};
  rg_plan *plan = NULL;
  rg_session *s = NULL;
  rg_policy *p = policy ? load_policy(ctx, policy) : NULL;
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {.set = set,
                       .nset = 2,
                       .device = test_device(),
                       .no_reuse = no_reuse,
                       .pack_seconds = 0.1,
                       .profile_path = getenv("REGRAPH_TEST_PROFILE")};
  CR_OK(rg_plan_create(spec, p, &o, &plan, &e), &e);
  rg_policy_destroy(p);
  rg_session_options so = {.eager = eager};
  CR_OK(rg_session_create(plan, &so, &s, &e), &e);
  make_buffers(plan, 7, T, lengths, b);
  bind_raw(s, b);
  run_both(s);
  fetch_all(s, b);
  for (int i = 0; i < b->n; i++) {
    rg_memory_free(plan, b->device[i]);
    b->info[i].name = strdup(b->info[i].name);
  }
  rg_session_destroy(s);
  rg_plan_destroy(plan);
}

static void run_layouts(const char *dtype, const char *method, int64_t H, int64_t KH, int64_t D,
                        const char *policy) {
  const bool learned = strcmp(method, "mean") != 0, linear = strcmp(method, "linear") == 0;
  char text[sizeof layer + 1024];
  rg_error e = {0};
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  rg_binding set[] = {{"dtype", 0, dtype}, {"method", 0, method}, {"H", H, NULL},
                      {"KH", KH, NULL},    {"D", D, NULL},        {"wide", linear ? 1 : 2, NULL}};
  snprintf(
      text, sizeof text, layer,
      learned
          ? "    \"kw\": { \"shape\": [\"wide*D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": "
            "true },\n"
            "    \"vw\": { \"shape\": [\"wide*D\", \"kernel*D\"], \"dtype\": \"$dtype\", \"grad\": "
            "\"accumulate\" },\n"
          : "",
      learned ? "\"k_weight\": \"kw\", \"v_weight\": \"vw\", " : "");
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), "layer", set, 6, &spec, &e), &e);
  buffers arena, apart;
  run_layout(ctx, spec, policy, false, false, &arena);
  run_layout(ctx, spec, policy, true, true, &apart);
  same_results(&arena, &apart, "arena and bytes of one's own");
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(gpu_tiny, layer_f32) {
  run_layouts("f32", "mean", 4, 2, 40, NULL);
}
Test(gpu_tiny, layer_f32_learned) {
  run_layouts("f32", "swiglu", 2, 2, 24, NULL);
}
Test(gpu_tiny, layer_bf16) {
  run_layouts("bf16", "mean", 4, 2, 128, NULL);
}
Test(gpu_tiny, layer_bf16_linear) {
  run_layouts("bf16", "linear", 4, 1, 128, NULL);
}
Test(gpu_tiny, layer_bf16_learned) {
  run_layouts("bf16", "sigmoid_mul", 2, 1, 64, NULL);
}
Test(gpu_tiny, layer_bf16_groups) {
  run_layouts("bf16", "mean", 16, 1, 128, NULL);
}
Test(gpu_tiny, layer_bf16_recompute) {
  run_layouts("bf16", "mean", 4, 2, 128, "{ \"regraph_policy\": 1, \"preset\": \"all\" }");
}
Test(gpu_tiny, layer_bf16_split) {
  run_layouts(
      "bf16", "mean", 8, 4, 128,
      "{ \"regraph_policy\": 1, \"recompute\": [\"cmp_o\", \"compress_kv\"], \"split_heads\": 2 }");
}
