/* graph/profile.c: device profiles and the one cost model; see profile.h. The shipped profiles are
 * embedded at build time from recompute/profiles (cmake/embed.cmake). */
#include "profile.h"
#include "json.h"
#include <string.h>

extern const char *const rgi_profile_text_cpu, *const rgi_profile_text_cuda;

/* A number in (0, most]. */
static rg_status read_rate(const rgi_json *object, const char *parent, const char *key, double most,
                           double *out, rg_error *e) {
  rgi_pointer at;
  rgi_shown shown;
  const rgi_json *v = rgi_json_get(object, key);
  if (!v) return RG_OK;
  rgi_pointer_key(&at, parent, key);
  if (v->type != RGI_JSON_INT && v->type != RGI_JSON_REAL)
    return rgi_fail(e, RG_E_TYPE, at.text, NULL, "expected a number, not %s",
                    rgi_json_kind(&shown, v));
  *out = v->type == RGI_JSON_INT ? (double)v->i : v->f;
  if (*out > 0 && *out <= most) return RG_OK;
  return rgi_fail(e, RG_E_VALUE, at.text, NULL,
                  "%s is %.17g; expected more than 0 and at most %.17g", key, *out, most);
}

static rg_status read_matrix(rgi_profile *p, const rgi_json *v, rg_error *e) {
  static const char *const keys[] = {"f32", "f16", "bf16"};
  RGI_TRY(rgi_json_keys(v, "matrix_gflops", keys, RGI_COUNT(keys), RGI_COUNT(keys),
                        "/matrix_gflops", NULL, e));
  RGI_TRY(read_rate(v, "/matrix_gflops", "f32", 1e12, &p->matrix_gflops[RG_F32], e));
  RGI_TRY(read_rate(v, "/matrix_gflops", "f16", 1e12, &p->matrix_gflops[RG_F16], e));
  RGI_TRY(read_rate(v, "/matrix_gflops", "bf16", 1e12, &p->matrix_gflops[RG_BF16], e));
  p->matrix_gflops[RG_I32] = p->matrix_gflops[RG_F32];
  return RG_OK;
}

static rg_status read_ops(rgi_profile *p, const rgi_json *v, rg_error *e) {
  if (!v) return RG_OK;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_OBJECT, "/ops", NULL, e));
  p->op = rgi_alloc_n(p->arena, (size_t)v->n, sizeof *p->op);
  if (!p->op) return rgi_nomem(e);
  for (int i = 0; i < v->n; i++) { /* an op of a plugin that is not loaded does no harm */
    p->op[i].op = v->key[i];
    RGI_TRY(read_rate(v, "/ops", v->key[i], 1, &p->op[i].fraction, e));
  }
  p->nop = v->n;
  return RG_OK;
}

/* A whole number in [least, most]; what is there stays if the key is missing. */
static rg_status read_count(const rgi_json *object, const char *key, int least, int most, int *out,
                            rg_error *e) {
  rgi_pointer at;
  const rgi_json *v = rgi_json_get(object, key);
  if (!v) return RG_OK;
  rgi_pointer_key(&at, "", key);
  RGI_TRY(rgi_json_expect(v, RGI_JSON_INT, at.text, NULL, e));
  if (v->i < least || v->i > most)
    return rgi_fail(e, RG_E_VALUE, at.text, NULL, "%s is %lld; expected %d to %d", key,
                    (long long)v->i, least, most);
  *out = (int)v->i;
  return RG_OK;
}

static rg_status read_profile(rgi_profile *p, const rgi_json *root, rg_error *e) {
  static const char *const keys[] = {"regraph_profile",
                                     "device",
                                     "matrix_gflops",
                                     "special_gops",
                                     "bandwidth_gbs",
                                     "memory",
                                     "name",
                                     "step_us",
                                     "efficiency",
                                     "ops",
                                     "threads",
                                     "doc",
                                     "compute_capability",
                                     "multiprocessors",
                                     "link_gbs",
                                     "$schema"};
  rgi_shown shown;
  RGI_TRY(rgi_json_is(root, "regraph_profile", e));
  RGI_TRY(rgi_json_keys(root, "a profile", keys, RGI_COUNT(keys), 6, "", NULL, e));
  const rgi_json *v = rgi_json_get(root, "regraph_profile");
  RGI_TRY(rgi_json_expect(v, RGI_JSON_INT, "/regraph_profile", NULL, e));
  if (v->i != 1)
    return rgi_fail(e, RG_E_VALUE, "/regraph_profile", NULL,
                    "format version %lld; this library reads version 1", (long long)v->i);
  v = rgi_json_get(root, "device");
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/device", NULL, e));
  p->cuda = strcmp(v->text, "cuda") == 0;
  if (!p->cuda && strcmp(v->text, "cpu") != 0)
    return rgi_fail(e, RG_E_VALUE, "/device", NULL, "'%s' is neither cpu nor cuda",
                    rgi_show(&shown, v->text));
  p->name = p->cuda ? "cuda" : "cpu";
  if ((v = rgi_json_get(root, "name"))) {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/name", NULL, e));
    const size_t size = 4 * strlen(v->text) + 1; /* reports print it */
    char *name = rgi_alloc(p->arena, size);
    if (!name) return rgi_nomem(e);
    p->name = rg_printable(v->text, name, size);
  }
  if ((v = rgi_json_get(root, "doc")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/doc", NULL, e));
  if ((v = rgi_json_get(root, "$schema")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/$schema", NULL, e));
  RGI_TRY(read_count(root, "threads", 0, 4096, &p->threads, e));
  p->gpu = (rg_gpu){.cc = 90, .sms = 132};
  RGI_TRY(read_count(root, "compute_capability", 80, 999, &p->gpu.cc, e));
  RGI_TRY(read_count(root, "multiprocessors", 1, 65536, &p->gpu.sms, e));
  p->step_us = 1;
  p->efficiency = 0.5;
  RGI_TRY(read_matrix(p, rgi_json_get(root, "matrix_gflops"), e));
  RGI_TRY(read_rate(root, "", "special_gops", 1e12, &p->special_gops, e));
  RGI_TRY(read_rate(root, "", "bandwidth_gbs", 1e12, &p->bandwidth_gbs, e));
  p->link_gbs = p->bandwidth_gbs;
  RGI_TRY(read_rate(root, "", "link_gbs", 1e12, &p->link_gbs, e));
  RGI_TRY(read_rate(root, "", "step_us", 1e9, &p->step_us, e));
  RGI_TRY(read_rate(root, "", "efficiency", 1, &p->efficiency, e));
  RGI_TRY(rgi_json_bytes(rgi_json_get(root, "memory"), "/memory", &p->memory, e));
  return read_ops(p, rgi_json_get(root, "ops"), e);
}

static rg_status load(const rg_context *ctx, const rgi_source *source, rgi_profile **out,
                      rg_error *e) {
  rg_status before = rgi_error_before(e), status;
  const rgi_json *root;
  rgi_arena *a = rgi_arena_create(ctx);
  rgi_profile *p = a ? rgi_alloc(a, sizeof *p) : NULL;
  if (!p) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *p = (rgi_profile){.arena = a};
  RGI_GOTO(status, rgi_json_parse(a, source->text, source->size, &root, e), fail);
  RGI_GOTO(status, read_profile(p, root, e), fail);
  *out = p;
  return RG_OK;
fail:
  rgi_error_place(e, before, source);
  rgi_arena_destroy(a);
  return status;
}

rg_status rgi_profile_load(const rg_context *ctx, const char *path, const char *device,
                           rgi_profile **out, rg_error *e) {
  rg_status before = rgi_error_before(e);
  char *text;
  size_t size;
  *out = NULL;
  if (!device) device = "cpu";
  bool cuda = strcmp(device, "cuda") == 0;
  rgi_shown shown;
  if (!cuda && strcmp(device, "cpu") != 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "there is no device '%s'; expected cpu or cuda",
                    rgi_show(&shown, device));
  if (!path) {
    const char *shipped = cuda ? rgi_profile_text_cuda : rgi_profile_text_cpu;
    const rgi_source source = {cuda ? "recompute/profiles/h200.json"
                                    : "recompute/profiles/cpu.json",
                               shipped, strlen(shipped)};
    return load(ctx, &source, out, e);
  }
  rg_status status = rgi_read_file(ctx, path, &text, &size, e);
  const rgi_source source = {path, text, size};
  if (status == RG_OK) status = load(ctx, &source, out, e);
  if (status == RG_OK && (*out)->cuda != cuda) {
    status = rgi_fail(e, RG_E_VALUE, "/device", NULL, "a profile for %s, but the plan is for %s",
                      (*out)->cuda ? "cuda" : "cpu", device);
    rgi_profile_destroy(*out);
    *out = NULL;
  }
  rgi_error_place(e, before, &source);
  rgi_free(ctx, text);
  return status;
}

void rgi_profile_destroy(rgi_profile *p) {
  if (p) rgi_arena_destroy(p->arena);
}

double rgi_profile_roofline_ms(const rgi_profile *p, rg_dtype dtype, const rg_cost *cost) {
  double ms = cost->flops / (p->matrix_gflops[dtype] * 1e6),
         special = cost->exps / (p->special_gops * 1e6),
         moved = cost->bytes / (p->bandwidth_gbs * 1e6), sent = cost->wire / (p->link_gbs * 1e6);
  if (special > ms) ms = special;
  if (sent > ms) ms = sent;
  return moved > ms ? moved : ms;
}

double rgi_profile_ms(const rgi_profile *p, const rg_op *op, rg_dtype dtype, const rg_cost *cost) {
  double efficiency = p->efficiency;
  for (int i = 0; i < p->nop; i++)
    if (strcmp(p->op[i].op, op->name) == 0) efficiency = p->op[i].fraction;
  return rgi_profile_roofline_ms(p, dtype, cost) / efficiency + p->step_us / 1e3;
}
