/* recompute/report.c: what was chosen, and why, in a few lines of text or one JSON object. */
#include "recompute.h"
#include <string.h>

static const char *preset_name(rgi_preset p) {
  static const char *const name[] = {"none", "all", "list", "budget"};
  return name[p];
}

typedef bool member(const rgi_choice_node *n);

static bool unread(const rgi_choice_node *n) {
  return !n->candidate && !n->offloaded && n->recomputable;
}
static bool unable(const rgi_choice_node *n) {
  return !n->candidate && !n->offloaded && !n->recomputable;
}
static bool offloaded(const rgi_choice_node *n) {
  return !n->candidate && n->offloaded;
}

/* Members that were no candidates in one line, many that are alike as a pattern: "layer*_o (12)".
 */
static void others(const rgi_choice *c, member *is, const char *title, rgi_buf *out) {
  bool any = false;
  for (int i = 0; i < c->nnode; i++) {
    int alike = 0, before = 0;
    for (int k = 0; k < c->nnode && is(&c->node[i]); k++)
      if (is(&c->node[k]) && rgi_alike(c->node[i].name, c->node[k].name)) alike++, before += k < i;
    if (!alike || (before && alike > RG_MOST_APART)) continue;
    rgi_buf_printf(out, "%s", any ? ", " : title);
    any = true;
    if (alike > RG_MOST_APART) {
      rgi_buf_pattern(out, c->node[i].name);
      rgi_buf_printf(out, " (%d)", alike);
    } else {
      rgi_buf_printf(out, "%s", c->node[i].name);
    }
  }
  if (any) rgi_buf_printf(out, "\n");
}

void rgi_choice_text(const rgi_choice *c, rgi_buf *out) {
  char a[32];
  int width = 11, candidates = 0; /* "recomputing" */
  for (int i = 0; i < c->nnode; i++) {
    candidates += c->node[i].candidate;
    if (c->node[i].candidate && (int)strlen(c->node[i].name) > width)
      width = (int)strlen(c->node[i].name);
  }
  static const char *const title[] = {"nothing", "all that can be", "what the policy lists",
                                      "what a budget"};
  rgi_buf_printf(out, "recompute: %s", title[c->preset]);
  if (c->preset == RGI_PRESET_BUDGET) {
    rgi_buf_printf(out, " of %s of %s memory%s asks for; %s, %lld choice%s tried",
                   rg_human_bytes(c->budget, a), c->budget_of_saved ? "saved" : "peak",
                   c->least ? ", the least," : "",
                   c->optimal ? "proved optimal" : "not proved optimal", (long long)c->explored,
                   c->explored == 1 ? "" : "s");
    if (c->gap > 0)
      rgi_buf_printf(out, ", at most %.2f %% of the whole time too many", 100 * c->gap);
  }
  if (c->named)
    rgi_buf_printf(out, "; %d node%s as the policy names %s", c->named, c->named == 1 ? "" : "s",
                   c->named == 1 ? "it" : "them");
  rgi_buf_printf(out, "\n");
  if (candidates)
    rgi_buf_printf(out, "  %-*s  %-10s  %12s  %15s\n", width, "recomputing", "", "saves", "costs");
  for (int i = 0; i < c->nnode; i++) {
    const rgi_choice_node *n = &c->node[i];
    if (!n->candidate) continue;
    rgi_buf_printf(out, "  %-*s  %-10s  %12s  %12.4f ms\n", width, n->name,
                   n->recomputed  ? "recomputed"
                   : n->offloaded ? "offloaded"
                                  : "kept",
                   rg_human_bytes(n->saved_bytes, a), n->extra_ms);
  }
  others(c, offloaded, "  offloaded: ", out);
  others(c, unread, "  not read by backward: ", out);
  others(c, unable, "  can't be recomputed: ", out);
}

void rgi_choice_json(const rgi_choice *c, rgi_buf *out) {
  rgi_buf_printf(out, "{\"preset\": \"%s\"", preset_name(c->preset));
  if (c->preset == RGI_PRESET_BUDGET)
    rgi_buf_printf(out, ", \"budget_bytes\": %lld, \"budget_of\": \"%s\"", (long long)c->budget,
                   c->budget_of_saved ? "saved" : "peak");
  rgi_buf_printf(
      out,
      ", \"all_ms\": %.9g, \"extra_ms\": %.9g, \"bound_ms\": %.9g, \"gap\": %.9g, \"optimal\": "
      "%s, \"explored\": %lld, "
      "\"saved_before_bytes\": %lld, \"saved_after_bytes\": %lld, \"nodes\": [",
      c->all_ms, c->extra_ms, c->bound_ms, c->gap, c->optimal ? "true" : "false",
      (long long)c->explored, (long long)c->saved_before, (long long)c->saved_after);
  for (int i = 0; i < c->nnode; i++) {
    const rgi_choice_node *n = &c->node[i];
    rgi_buf_printf(out, "%s{\"name\": ", i ? ", " : "");
    rgi_buf_json(out, n->name);
    rgi_buf_printf(out,
                   ", \"op\": \"%s\", \"candidate\": %s, \"recomputed\": %s, \"offloaded\": %s, "
                   "\"saved_bytes\": %lld, "
                   "\"extra_ms\": %.9g, \"why\": ",
                   n->op, n->candidate ? "true" : "false", n->recomputed ? "true" : "false",
                   n->offloaded ? "true" : "false", (long long)n->saved_bytes, n->extra_ms);
    rgi_buf_json(out, n->why);
    rgi_buf_printf(out, "}");
  }
  rgi_buf_printf(out, "]}");
}
