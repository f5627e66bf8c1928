/* tests/gpu/test_gpu_large.c: NSA at lengths that no oracle gets to the end of. The same
 * spec is planned for this GPU and, by a profile, for one without Hopper's instructions:
 * different kernels and schedules, which must agree as two results that both pass their
 * gates do. Needs a Hopper GPU to mean anything.
 */
#include "tests/unit/run_util.h"

#include <math.h>
#include <unistd.h>

static const char older[] =
    "{ \"regraph_profile\": 1, \"name\": \"older\", \"device\": \"cuda\", \"compute_capability\": "
    "80,\n"
    "  \"multiprocessors\": 100, \"matrix_gflops\": { \"f32\": 19000, \"f16\": 200000, \"bf16\": "
    "200000 },\n"
    "  \"special_gops\": 2000, \"bandwidth_gbs\": 1500, \"step_us\": 3, \"memory\": \"40GB\", "
    "\"efficiency\": 0.6 }";

typedef struct way {
  rg_plan *plan;
  rg_session *session;
  buffers b;
  int32_t *idx;
  size_t idx_bytes;
} way;

static way run_way(const rg_spec *spec, const char *profile, int64_t T, int64_t B,
                   const int *lengths, int64_t indices) {
  rg_error e = {0};
  way w = {.idx_bytes = (size_t)indices * 4};
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {
      .set = set, .nset = 2, .device = "cuda", .profile_path = profile, .pack_seconds = 0.2};
  CR_OK(rg_plan_create(spec, NULL, &o, &w.plan, &e), &e);
  CR_OK(rg_session_create(w.plan, NULL, &w.session, &e), &e);
  make_buffers(w.plan, 3, T, lengths, &w.b);
  bind_all(w.session, &w.b);
  run_both(w.session);
  fetch_all(w.session, &w.b);
  w.idx = malloc(w.idx_bytes + 4);
  CR_OK(rg_session_read(w.session, "idx", w.idx, w.idx_bytes, &e), &e);
  return w;
}

static void end_way(way *w) {
  for (int i = 0; i < w->b.n; i++) rg_memory_free(w->plan, w->b.device[i]);
  free_buffers(&w->b);
  rg_session_destroy(w->session);
  rg_plan_destroy(w->plan);
  free(w->idx);
}

static double difference(const rg_tensor_info *t, const void *x, const void *y) {
  enum { PIECE = 1 << 16 };
  static float a[PIECE], b[PIECE];
  const size_t size = rg_dtype_size(t->dtype), all = (size_t)t->bytes / size;
  double error = 0, norm = 0;
  for (size_t i = 0; i < all; i += PIECE) {
    const size_t n = all - i < PIECE ? all - i : PIECE;
    rg_convert(RG_F32, a, t->dtype, (const char *)x + i * size, n);
    rg_convert(RG_F32, b, t->dtype, (const char *)y + i * size, n);
    for (size_t k = 0; k < n; k++) {
      error += ((double)a[k] - b[k]) * ((double)a[k] - b[k]);
      norm += (double)b[k] * b[k];
    }
  }
  return sqrt(error / norm); /* a NaN fails every gate */
}

static void compare(const char *what, int64_t H, int64_t KH, int64_t D, int64_t T, int64_t B,
                    const int *lengths) {
  if (!test_on_gpu()) cr_skip_test("no GPU asked for (REGRAPH_TEST_DEVICE=cuda)");
  char text[8192], path[] = "/tmp/regraph-profile-XXXXXX";
  rg_error e = {0};
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  const int file = mkstemp(path);
  cr_assert(file >= 0 && write(file, older, sizeof older - 1) == (ssize_t)sizeof older - 1);
  close(file);
  rg_binding set[] = {{"H", H, NULL},       {"KH", KH, NULL},     {"D", D, NULL},
                      {"kernel", 32, NULL}, {"stride", 16, NULL}, {"block", 64, NULL},
                      {"top_n", 16, NULL},  {"window", 512, NULL}};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  nsa_spec("bf16", false, text, sizeof text);
  CR_OK(rg_spec_load_text(ctx, text, strlen(text), "nsa", set, 8, &spec, &e), &e);
  const int64_t indices = T * KH * 16;
  way here = run_way(spec, NULL, T, B, lengths, indices),
      there = run_way(spec, path, T, B, lengths, indices);
  unlink(path);
  int64_t differ = 0;
  for (int64_t i = 0; i < indices; i++) differ += here.idx[i] != there.idx[i];
  fprintf(stderr, "%s: %.4f %% of the indices differ", what,
          100.0 * (double)differ / (double)indices);
  int compared = 0;
  for (int i = 0; i < here.b.n; i++) {
    const rg_tensor_info *t = &here.b.info[i];
    if (t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) continue;
    const double off = difference(t, here.b.data[i], buffer(&there.b, t->role, t->name)),
                 gate = 1.5 * (t->role == RG_OUTPUT ? 4e-3 : 6e-3);
    fprintf(stderr, ", %s%s %.2g", t->role == RG_OUTPUT ? "" : "d.", t->name, off);
    cr_assert_leq(off, gate, "%s: %s differs by %g", what, t->name, off);
    compared++;
  }
  fprintf(stderr, "\n");
  cr_assert_eq(compared, 5);
  cr_assert_leq(differ * 1000, indices, "%s: choices differ", what);
  end_way(&here);
  end_way(&there);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

Test(gpu_large, one_group, .timeout = 300) {
  static const int lengths[] = {29999, 1, 0, 4160, 63};
  compare("H 16/1", 16, 1, 128, 34300, 5, lengths);
}
Test(gpu_large, groups_of_four, .timeout = 300) {
  static const int lengths[] = {700, 12345, 33, 8000};
  compare("H 8/2", 8, 2, 128, 21100, 4, lengths);
}
Test(gpu_large, one_head, .timeout = 300) {
  static const int lengths[] = {40000};
  compare("H 1/1", 1, 1, 128, 40000, 1, lengths);
}
