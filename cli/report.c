/* cli/report.c: what plan, run and bench write into files besides: a page, a trace. */
#include "cli.h"
#include "save.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* All choices of so many nodes are gone through while a page is written; of more it would take too
 * long. */
enum { FEW_NODES = 20, MOST_BYTES = 64 << 20 };

enum { REPORTS = 3 };
static const char *const report_flag[REPORTS] = {"--svg", "--trace", "--html"};

static const char *report_path(const cli_args *a, int i) {
  return i == 0 ? a->svg : i == 1 ? a->trace : a->html;
}

/* `from`, which may be NULL, is a file that is read as `what`. */
static rg_status spare(cli *c, const char *flag, const char *path, const char *what,
                       const char *from) {
  if (!from || access(from, F_OK) != 0 || !cli_save_same(path, from)) return RG_OK;
  return cli_fail(&c->error, RG_E_USAGE, NULL, "%s would write over '%s', which is %s", flag, path,
                  what);
}

rg_status cli_spare(cli *c, const char *flag, const char *path) {
  const cli_args *a = &c->args;
  const struct {
    const char *what, *path;
  } read[] = {{"--policy", a->policy},
              {"--profile", a->profile},
              {"--against", a->against},
              {"--front", a->front}};
  const struct {
    const char *what;
    const cli_list *list;
  } lists[] = {{"--plugin", &a->plugin}, {"--in", &a->in}, {"--grad-in", &a->grad_in}};
  rg_status s = RG_OK;
  for (int i = 0; i < a->npositional && s == RG_OK; i++)
    s = spare(c, flag, path, "read", a->positional[i]);
  for (int i = 0; i < (int)(sizeof read / sizeof *read) && s == RG_OK; i++)
    s = spare(c, flag, path, read[i].what, read[i].path);
  for (int i = 0; i < (int)(sizeof lists / sizeof *lists); i++)
    for (int k = 0; k < lists[i].list->n && s == RG_OK; k++) {
      const char *item = lists[i].list->item[k], *eq = i > 0 ? strchr(item, '=') : NULL;
      s = spare(c, flag, path, lists[i].what, eq ? eq + 1 : item);
    }
  if (s != RG_OK) return s;
  for (int i = 0; i < REPORTS && strcmp(flag, report_flag[i]) != 0; i++)
    if (report_path(a, i) && cli_save_same(path, report_path(a, i)))
      return cli_fail(&c->error, RG_E_USAGE, NULL,
                      "%s and %s both write '%s'; give each a file of its own", report_flag[i],
                      flag, path);
  return RG_OK;
}

rg_status cli_reports_open(cli *c) {
  const cli_args *a = &c->args;
  if ((a->against || a->front) && !a->html)
    return cli_fail(&c->error, RG_E_USAGE, NULL, "%s is for the page of --html FILE",
                    a->against ? "--against" : "--front");
  for (int i = 0; i < REPORTS; i++) {
    rg_status s = cli_writable(c, report_path(a, i));
    if (s == RG_OK && report_path(a, i)) s = cli_spare(c, report_flag[i], report_path(a, i));
    if (s != RG_OK) return s;
  }
  return RG_OK;
}

/* A whole file as text, NUL-terminated; free it. */
static rg_status read_text(cli *c, const char *path, char **out) {
  FILE *f = fopen(path, "rb");
  size_t size = 0, room = 1 << 16;
  char *text = f ? malloc(room) : NULL;
  *out = NULL;
  if (!f) {
    cli_fail(&c->error, RG_E_IO, path, "%s", strerror(errno));
    cli_suggest_file(&c->error, path);
    return c->error.status;
  }
  while (text) {
    size += fread(text + size, 1, room - size - 1, f);
    if (size < room - 1 || room >= MOST_BYTES) break;
    char *more = realloc(text, room *= 2);
    if (!more) free(text);
    text = more;
  }
  const bool failed = ferror(f), whole = feof(f);
  const int why = errno;
  fclose(f);
  if (!text) return cli_nomem(&c->error);
  text[size] = '\0';
  const size_t length = strlen(text);
  if (!failed && whole && length == size) {
    *out = text;
    return RG_OK;
  }
  free(text);
  const char *const from = path == c->args.front ? "pareto" : "plan";
  if (failed) return cli_fail(&c->error, RG_E_IO, path, "can't be read: %s", strerror(why));
  return whole ? cli_fail(&c->error, RG_E_SYNTAX, path,
                          "byte %zu is NUL; expected the text that 'regraph %s --json' prints",
                          length, from)
               : cli_fail(&c->error, RG_E_LIMIT, path,
                          "has more than %d bytes; expected what 'regraph %s --json' prints, "
                          "which has fewer",
                          MOST_BYTES, from);
}

/* Is there a backward, and are there few nodes of the spec that run? */
static bool has_front(const cli *c) {
  rg_node_info n;
  const char *known[FEW_NODES];
  int count = 0;
  bool backward = false;
  for (size_t i = 0; rg_plan_node(c->plan, i, &n) == RG_OK; i++) {
    backward |= n.backward;
    bool counted = n.backward || n.step < 0 || !n.spec_node;
    for (int k = 0; k < count && !counted; k++) counted = strcmp(known[k], n.spec_node) == 0;
    if (counted) continue;
    if (count == FEW_NODES) return false;
    known[count++] = n.spec_node;
  }
  return backward;
}

/* The page's other texts: *front, *against are the caller's to free, as text. */
static rg_status page_texts(cli *c, char **front, char **against) {
  const cli_args *a = &c->args;
  rg_status s = a->against ? read_text(c, a->against, against) : RG_OK;
  if (s == RG_OK && a->front) return read_text(c, a->front, front);
  if (s != RG_OK || !has_front(c)) return s;
  rg_plan_options o;
  rg_text text;
  cli_plan_options(c, &o);
  s = rg_pareto(c->spec, c->policy, &o, "json", &text, &c->error);
  cli_progress_end(c);
  if (s != RG_OK) return s;
  *front = strdup(text.data);
  rg_text_destroy(&text);
  return *front ? RG_OK : cli_nomem(&c->error);
}

static rg_status write_one(cli *c, const char *format, const char *path,
                           const rg_report_options *o) {
  rg_text text;
  if (!path) return RG_OK;
  rg_status s = rg_plan_report(c->plan, format, o, &text, &c->error);
  if (s != RG_OK) return s;
  s = cli_write_file(c, path, text.data, text.size);
  rg_text_destroy(&text);
  return s;
}

rg_status cli_write_reports(cli *c, const cli_measured *m) {
  rg_report_options o = {.size = sizeof o};
  char source[96], *front = NULL, *against = NULL;
  rg_status s = c->args.html ? page_texts(c, &front, &against) : RG_OK;
  if (m) {
    snprintf(source, sizeof source, "%s on %s, %d thread%s", m->how, c->args.device, cli_threads(c),
             cli_threads(c) == 1 ? "" : "s");
    o.step_ms = m->step_ms;
    o.nstep = m->nstep;
    o.forward_ms = m->forward_ms;
    o.backward_ms = m->backward_ms;
    o.measured_peak = c->arena_peak;
    o.source = source;
  }
  o.front = front;
  o.against = against;
  if (s == RG_OK) s = write_one(c, "trace", c->args.trace, &o);
  if (s == RG_OK) s = write_one(c, "html", c->args.html, &o);
  /* the library knows the texts by what they are for */
  const char *const path = strcmp(c->error.file, "front") == 0     ? c->args.front
                           : strcmp(c->error.file, "against") == 0 ? c->args.against
                                                                   : NULL;
  if (s != RG_OK && path) snprintf(c->error.file, sizeof c->error.file, "%s", path);
  free(front);
  free(against);
  return s;
}
