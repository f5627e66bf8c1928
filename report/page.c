/* report/page.c: a plan as one HTML page that needs nothing else: style, scripts and data in it,
   and no address anywhere.

   The files of page/ are built in as they are. The plan stands in the page as `plan --json` prints
   it, and scripts draw from that, so numbers are the same by construction. In data '<' is written
   \u003c: it can end no element, and JSON has it in strings alone.
 */
#include "report.h"

#include <string.h>

extern const char *const rgi_page_body;
extern const char *const rgi_page_style;
extern const char *const rgi_page_data;
extern const char *const rgi_page_svg;
extern const char *const rgi_page_layout;
extern const char *const rgi_page_graph;
extern const char *const rgi_page_memory;
extern const char *const rgi_page_charts;
extern const char *const rgi_page_page;

static void open_data(rgi_buf *b, const char *id) {
  rgi_buf_printf(b, "<script type=\"application/json\" id=\"data-%s\">\n", id);
}
static void close_data(rgi_buf *b) {
  rgi_buf_printf(b, "</script>\n");
}

static void add_json(rgi_buf *b, const char *text, size_t size) {
  for (size_t at = 0; at < size;) {
    const char *end = memchr(text + at, '<', size - at);
    const size_t n = end ? (size_t)(end - text) - at : size - at;
    rgi_buf_add(b, text + at, n);
    if (end) rgi_buf_printf(b, "\\u003c");
    at += n + (end ? 1 : 0);
  }
}

static void add_plan(const rg_plan *plan, rgi_buf *b) {
  rgi_buf json;
  rgi_buf_init(&json, plan->ctx);
  rgi_report_json(plan, &json);
  open_data(b, "plan");
  if (!json.failed) add_json(b, json.data, json.size);
  close_data(b);
  b->failed |= json.failed;
  rgi_buf_free(&json);
}

static void add_measured(const rg_report_options *o, rgi_buf *b) {
  open_data(b, "measured");
  rgi_buf_printf(b, "{\"source\": ");
  rgi_buf source;
  rgi_buf_init(&source, b->ctx);
  rgi_buf_json(&source, o->source ? o->source : "measured");
  if (!source.failed) add_json(b, source.data, source.size);
  b->failed |= source.failed;
  rgi_buf_free(&source);
  rgi_buf_printf(b, ", \"forward_ms\": ");
  rgi_json_number(b, o->forward_ms);
  rgi_buf_printf(b, ", \"backward_ms\": ");
  rgi_json_number(b, o->backward_ms);
  rgi_buf_printf(b, ", \"peak_bytes\": %lld, \"step_ms\": [", (long long)o->measured_peak);
  for (size_t i = 0; i < o->nstep; i++) {
    rgi_buf_printf(b, "%s", i ? ", " : "");
    rgi_json_number(b, o->step_ms[i]);
  }
  rgi_buf_printf(b, "]}\n");
  close_data(b);
}

void rgi_report_page(const rg_plan *plan, const rg_report_options *o, rgi_buf *b) {
  const char *const script[] = {rgi_page_data,   rgi_page_svg,    rgi_page_layout, rgi_page_graph,
                                rgi_page_memory, rgi_page_charts, rgi_page_page};
  rgi_buf_printf(b,
                 "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
                 "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
                 "<meta name=\"generator\" content=\"regraph %s\">\n"
                 "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
                 "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n<title>",
                 rg_version());
  rgi_buf_xml(b, plan->graph->name ? plan->graph->name : "");
  rgi_buf_printf(b, "</title>\n<style>\n");
  rgi_buf_add(b, rgi_page_style, strlen(rgi_page_style));
  rgi_buf_printf(b, "</style>\n</head>\n<body>\n");
  rgi_buf_add(b, rgi_page_body, strlen(rgi_page_body));
  add_plan(plan, b);
  if (o->step_ms) add_measured(o, b);
  const struct { const char *id, *text; } given[] = {{"front", o->front}, {"against", o->against}};
  for (int i = 0; i < RGI_COUNT(given); i++) {
    if (!given[i].text) continue;
    open_data(b, given[i].id);
    add_json(b, given[i].text, strlen(given[i].text));
    close_data(b);
  }
  rgi_buf_printf(b, "<script>\n");
  for (int i = 0; i < RGI_COUNT(script); i++) rgi_buf_add(b, script[i], strlen(script[i]));
  rgi_buf_printf(b, "</script>\n</body>\n</html>\n");
}

typedef struct member {
  const char *key;
  rgi_json_type type;
} member;

/* Is the text what the command prints of a plan, or of a front? */
static rg_status check(const rg_plan *plan, const char *text, const char *name, const member *has,
                       int count, const char *made_by, rg_error *e) {
  const rg_status before = rgi_error_before(e);
  const rgi_json *root = NULL;
  if (!text) return RG_OK;
  rgi_arena *a = rgi_arena_create(plan->ctx);
  if (!a) return rgi_nomem(e);
  rg_status status = rgi_json_parse(a, text, strlen(text), &root, e);
  const rgi_json *version =
      status == RG_OK && root->type == RGI_JSON_OBJECT ? rgi_json_get(root, "version") : NULL;
  bool good = version && version->type == RGI_JSON_INT && version->i == 1;
  for (int i = 0; good && i < count; i++) {
    const rgi_json *value = rgi_json_get(root, has[i].key);
    good = value && value->type == has[i].type;
  }
  if (status == RG_OK && !good)
    status = rgi_fail(e, RG_E_KEY, NULL, NULL, "that is not what '%s' prints", made_by);
  rgi_error_file(e, before, name);
  rgi_arena_destroy(a);
  return status;
}

rg_status rgi_page_check(const rg_plan *plan, const rg_report_options *o, rg_error *e) {
  static const member front[] = {{"exact", RGI_JSON_BOOL}, {"points", RGI_JSON_ARRAY}};
  static const member other[] = {
      {"name", RGI_JSON_STRING},     {"device", RGI_JSON_STRING},
      {"capacity", RGI_JSON_OBJECT}, {"predicted_peak_bytes", RGI_JSON_INT},
      {"saved_bytes", RGI_JSON_INT}, {"scratch_bytes", RGI_JSON_INT},
      {"nodes", RGI_JSON_ARRAY},     {"edges", RGI_JSON_ARRAY},
      {"rates", RGI_JSON_OBJECT},    {"memory", RGI_JSON_OBJECT},
  };
  RGI_TRY(check(plan, o->front, "front", front, RGI_COUNT(front), "regraph pareto --json", e));
  return check(plan, o->against, "against", other, RGI_COUNT(other), "regraph plan --json", e);
}
