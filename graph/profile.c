/* graph/profile.c: finds and reads device profiles; see profile.h. The shipped ones are embedded at
   build time from recompute/profiles (cmake/embed.cmake).
 */
#include "profile.h"
#include "json.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SHIPPED(X) X(cpu) X(h200) X(a100) X(l40s) X(rtx4090) X(b200)
#define TEXT(name) extern const char *const rgi_profile_text_##name;
SHIPPED(TEXT)
#define NAMED(name) {#name, "recompute/profiles/" #name ".json", &rgi_profile_text_##name},
static const struct {
  const char *name, *file;
  const char *const *text;
} shipped[] = {SHIPPED(NAMED)};
enum { SHIPPED_CPU, SHIPPED_CUDA }; /* those of "shipped" */
#define LISTED(name) " " #name
#define ALL_SHIPPED  SHIPPED(LISTED)

/* What divides costs leaves them numbers. */
#define LEAST_RATE 1e-9

/* A number in [LEAST_RATE, most]: what `parent` has as `key`. */
static rg_status take_rate(const rgi_json *v, const char *parent, const char *key, double most,
                           double *out, rg_error *e) {
  rgi_pointer at;
  rgi_shown shown;
  rgi_pointer_key(&at, parent, key);
  if (v->type != RGI_JSON_INT && v->type != RGI_JSON_REAL)
    return rgi_fail(e, RG_E_TYPE, at.text, NULL, "expected a number, not %s",
                    rgi_json_kind(&shown, v));
  *out = v->type == RGI_JSON_INT ? (double)v->i : v->f;
  if (*out >= LEAST_RATE && *out <= most) return RG_OK;
  return rgi_fail(e, RG_E_VALUE, at.text, NULL,
                  "%s is %.17g; expected more than 0 (%g at least) and at most %.17g", key, *out,
                  LEAST_RATE, most);
}

static rg_status read_rate(const rgi_json *object, const char *parent, const char *key, double most,
                           double *out, rg_error *e) {
  const rgi_json *v = rgi_json_get(object, key);
  return v ? take_rate(v, parent, key, most, out, e) : RG_OK;
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
    RGI_TRY(take_rate(&v->item[i], "/ops", v->key[i], 1, &p->op[i].fraction, e));
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

/* ---- what was measured ---- */

static rg_status expect_numbers(const rgi_json *v, const char *at, rg_error *e) {
  RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, at, NULL, e));
  bool good = v->n == RGI_POINT_AXES + 1;
  for (int i = 0; i < v->n && good; i++)
    good = v->item[i].type == RGI_JSON_INT || v->item[i].type == RGI_JSON_REAL;
  if (good) return RG_OK;
  return rgi_fail(e, RG_E_VALUE, at, NULL,
                  "expected a point: [flops, exponentials, bytes, milliseconds]");
}

static double real(const rgi_json *v) {
  return v->type == RGI_JSON_INT ? (double)v->i : v->f;
}

static rg_status read_points(rgi_profile *p, const rgi_json *v, const char *parent, rgi_measured *m,
                             rg_error *e) {
  rgi_pointer list, at;
  rgi_pointer_key(&list, parent, "points");
  RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, list.text, NULL, e));
  if (v->n == 0) return rgi_fail(e, RG_E_VALUE, list.text, NULL, "expected one point at least");
  m->point = rgi_alloc_n(p->arena, (size_t)v->n, sizeof *m->point);
  if (!m->point) return rgi_nomem(e);
  for (m->npoint = 0; m->npoint < v->n; m->npoint++) {
    const rgi_json *x = &v->item[m->npoint];
    rgi_pointer_index(&at, list.text, m->npoint);
    RGI_TRY(expect_numbers(x, at.text, e));
    const rg_cost cost = {
        .flops = real(&x->item[0]), .exps = real(&x->item[1]), .bytes = real(&x->item[2])};
    const double ms = real(&x->item[3]);
    const bool good = cost.flops >= 0 && cost.flops < 1e30 && cost.exps >= 0 && cost.exps < 1e30 &&
                      cost.bytes >= 0 && cost.bytes < 1e30 && ms > 0 && ms < 1e12;
    if (!good)
      return rgi_fail(e, RG_E_VALUE, at.text, NULL,
                      "what a point cost is not negative, and its time is more than nothing");
    rgi_profile_point(p, m->dtype < 0 ? RG_F32 : (rg_dtype)m->dtype, &cost, ms,
                      &m->point[m->npoint]);
  }
  return RG_OK;
}

static rg_status read_group(rgi_profile *p, const rgi_json *v, const char *at, rgi_measured *m,
                            rg_error *e) {
  static const char *const keys[] = {"op", "points", "kernels", "dtype"};
  rgi_pointer inside;
  rgi_shown shown;
  RGI_TRY(rgi_json_keys(v, "a measured op", keys, RGI_COUNT(keys), 2, at, NULL, e));
  *m = (rgi_measured){.kernels = "", .dtype = -1};
  const rgi_json *x = rgi_json_get(v, "op");
  RGI_TRY(rgi_json_expect(x, RGI_JSON_STRING, rgi_pointer_key(&inside, at, "op"), NULL, e));
  m->op = x->text;
  if ((x = rgi_json_get(v, "kernels"))) {
    RGI_TRY(rgi_json_expect(x, RGI_JSON_STRING, rgi_pointer_key(&inside, at, "kernels"), NULL, e));
    m->kernels = x->text;
  }
  if ((x = rgi_json_get(v, "dtype"))) {
    RGI_TRY(rgi_json_expect(x, RGI_JSON_STRING, rgi_pointer_key(&inside, at, "dtype"), NULL, e));
    for (int d = 0; d < RG_DTYPE_COUNT; d++)
      if (strcmp(rg_dtype_name((rg_dtype)d), x->text) == 0) m->dtype = d;
    if (m->dtype < 0)
      return rgi_fail(e, RG_E_VALUE, inside.text, NULL, "there is no type '%s'",
                      rgi_show(&shown, x->text));
  }
  return read_points(p, rgi_json_get(v, "points"), at, m, e);
}

/* After the rates, by which points are measured. */
static rg_status read_measured(rgi_profile *p, const rgi_json *v, rg_error *e) {
  rgi_pointer at;
  if (!v) return RG_OK;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, "/measured", NULL, e));
  p->measured = rgi_alloc_n(p->arena, (size_t)v->n + 1, sizeof *p->measured);
  if (!p->measured) return rgi_nomem(e);
  for (; p->nmeasured < v->n; p->nmeasured++)
    RGI_TRY(read_group(p, &v->item[p->nmeasured], rgi_pointer_index(&at, "/measured", p->nmeasured),
                       &p->measured[p->nmeasured], e));
  return RG_OK;
}

/* A text of the file's that reports print. */
static rg_status read_words(rgi_profile *p, const rgi_json *root, const char *key, const char **out,
                            rg_error *e) {
  rgi_pointer at;
  const rgi_json *v = rgi_json_get(root, key);
  if (!v) return RG_OK;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, rgi_pointer_key(&at, "", key), NULL, e));
  const size_t size = 4 * strlen(v->text) + 1;
  char *words = rgi_alloc(p->arena, size);
  if (!words) return rgi_nomem(e);
  *out = rg_printable(v->text, words, size);
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
                                     "host_gbs",
                                     "source",
                                     "measured",
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
  RGI_TRY(read_words(p, root, "name", &p->name, e));
  RGI_TRY(read_words(p, root, "source", &p->source, e));
  if ((v = rgi_json_get(root, "doc")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/doc", NULL, e));
  if ((v = rgi_json_get(root, "$schema")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/$schema", NULL, e));
  RGI_TRY(read_count(root, "threads", 0, 4096, &p->threads, e));
  p->gpu = (rg_gpu){.cc = 90, .sms = 132};
  /* Nothing runs below 8.0; a plan for less takes kernels that need no tensor cores. */
  RGI_TRY(read_count(root, "compute_capability", 70, 999, &p->gpu.cc, e));
  RGI_TRY(read_count(root, "multiprocessors", 1, 65536, &p->gpu.sms, e));
  p->step_us = 1;
  p->efficiency = 0.5;
  RGI_TRY(read_matrix(p, rgi_json_get(root, "matrix_gflops"), e));
  RGI_TRY(read_rate(root, "", "special_gops", 1e12, &p->special_gops, e));
  RGI_TRY(read_rate(root, "", "bandwidth_gbs", 1e12, &p->bandwidth_gbs, e));
  p->link_gbs = p->bandwidth_gbs;
  RGI_TRY(read_rate(root, "", "link_gbs", 1e12, &p->link_gbs, e));
  p->host_gbs = 25; /* sixteen lanes of PCIe 4, where nobody measured */
  RGI_TRY(read_rate(root, "", "host_gbs", 1e12, &p->host_gbs, e));
  RGI_TRY(read_rate(root, "", "step_us", 1e9, &p->step_us, e));
  RGI_TRY(read_rate(root, "", "efficiency", 1, &p->efficiency, e));
  RGI_TRY(rgi_json_bytes(rgi_json_get(root, "memory"), "/memory", &p->memory, e));
  RGI_TRY(read_ops(p, rgi_json_get(root, "ops"), e));
  return read_measured(p, rgi_json_get(root, "measured"), e);
}

rg_status rgi_profile_parse(const rg_context *ctx, const char *text, size_t size, const char *file,
                            const char *found, rgi_profile **out, rg_error *e) {
  const rgi_source source = {file, text, size};
  rg_status before = rgi_error_before(e), status;
  const rgi_json *root;
  *out = NULL;
  rgi_arena *a = rgi_arena_create(ctx);
  rgi_profile *p = a ? rgi_alloc(a, sizeof *p) : NULL;
  if (!p) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *p = (rgi_profile){.arena = a, .id = rgi_hash(RGI_HASH, text, size)};
  const size_t room = 4 * strlen(found) + 1;
  char *words = rgi_alloc(a, room);
  RGI_GOTO(status, words ? RG_OK : rgi_nomem(e), fail);
  p->found = rg_printable(found, words, room);
  RGI_GOTO(status, rgi_json_parse(a, text, size, &root, e), fail);
  RGI_GOTO(status, read_profile(p, root, e), fail);
  *out = p;
  return RG_OK;
fail:
  rgi_error_place(e, before, &source);
  rgi_arena_destroy(a);
  return status;
}

/* ---- which one ---- */

bool rgi_profile_path(const char *name, char *buffer, size_t size) {
  const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
  int n = -1;
  if (cache && cache[0] == '/') /* a relative one is to be ignored, says its specification */
    n = snprintf(buffer, size, "%s/regraph/%s.json", cache, name);
  else if (home && home[0] == '/')
    n = snprintf(buffer, size, "%s/.cache/regraph/%s.json", home, name);
  return n > 0 && (size_t)n < size;
}

static bool is_file(const char *which) {
  const size_t n = strlen(which);
  return strchr(which, '/') || (n > 5 && strcmp(which + n - 5, ".json") == 0);
}

/* What was said of a profile, here or in the environment; NULL: nothing. */
static const char *said(const char *which) {
  if (!which) which = getenv("REGRAPH_PROFILE");
  return which && which[0] ? which : NULL;
}

bool rgi_profile_asked(const char *which) {
  which = said(which);
  return which && strcmp(which, "shipped") != 0;
}

static rg_status load_text(const rg_context *ctx, const rgi_source *source, const char *found,
                           bool cuda, rgi_profile **out, rg_error *e) {
  const rg_status before = rgi_error_before(e);
  rg_status status =
      rgi_profile_parse(ctx, source->text, source->size, source->name, found, out, e);
  if (status == RG_OK && (*out)->cuda != cuda) {
    status = rgi_fail(e, RG_E_VALUE, "/device", NULL, "a profile for %s, but the plan is for %s",
                      (*out)->cuda ? "cuda" : "cpu", cuda ? "cuda" : "cpu");
    rgi_profile_destroy(*out);
    *out = NULL;
  }
  rgi_error_place(e, before, source);
  return status;
}

static rg_status load_file(const rg_context *ctx, const char *path, bool cuda, rgi_profile **out,
                           rg_error *e) {
  char *text;
  size_t size;
  const rg_status before = rgi_error_before(e);
  rg_status status = rgi_read_file(ctx, path, &text, &size, e);
  const rgi_source source = {path, text, size};
  if (status == RG_OK)
    status = load_text(ctx, &source, path, cuda, out, e);
  else
    rgi_error_place(e, before, &source);
  rgi_free(ctx, text);
  return status;
}

static rg_status load_shipped(const rg_context *ctx, int i, bool cuda, rgi_profile **out,
                              rg_error *e) {
  const char *text = *shipped[i].text;
  const rgi_source source = {shipped[i].file, text, strlen(text)};
  return load_text(ctx, &source, "shipped", cuda, out, e);
}

rg_status rgi_profile_load(const rg_context *ctx, const char *which, const char *device,
                           rgi_profile **out, rg_error *e) {
  char path[1024];
  rgi_shown shown;
  *out = NULL;
  if (!device) device = "cpu";
  const bool cuda = strcmp(device, "cuda") == 0;
  if (!cuda && strcmp(device, "cpu") != 0)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "there is no device '%s'; expected cpu or cuda",
                    rgi_show(&shown, device));
  which = said(which);
  if (!which && rgi_profile_path(device, path, sizeof path) && access(path, R_OK) == 0) {
    const rg_status before = rgi_error_before(e), status = load_file(ctx, path, cuda, out, e);
    if (status != RG_OK && status != RG_E_NOMEM && e && before == RG_OK) {
      const size_t n = strlen(e->message);
      snprintf(e->message + n, sizeof e->message - n,
               "; every plan reads this profile: tune again, or say shipped (--profile)");
    }
    return status;
  }
  if (!which || strcmp(which, "shipped") == 0)
    return load_shipped(ctx, cuda ? SHIPPED_CUDA : SHIPPED_CPU, cuda, out, e);
  if (is_file(which)) return load_file(ctx, which, cuda, out, e);
  if (rgi_profile_path(which, path, sizeof path) && access(path, R_OK) == 0)
    return load_file(ctx, path, cuda, out, e);
  for (int i = 0; i < RGI_COUNT(shipped); i++)
    if (strcmp(which, shipped[i].name) == 0) return load_shipped(ctx, i, cuda, out, e);
  if (!rgi_profile_path(which, path, sizeof path))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "profile '%s': a name stands for a file in the cache folder, and neither "
                    "XDG_CACHE_HOME nor HOME names one, or the path is too long",
                    rgi_show(&shown, which));
  rgi_shown where;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "there is no profile '%s': no file %s (expected \"shipped\", one of those that "
                  "ship:" ALL_SHIPPED
                  ", the name of a profile there, or a path, such as ./NAME.json)",
                  rgi_show(&shown, which), rgi_show(&where, path));
}

void rgi_profile_destroy(rgi_profile *p) {
  if (p) rgi_arena_destroy(p->arena);
}
