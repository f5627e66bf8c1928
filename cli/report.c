/* cli/report.c: what plan, run and bench write into files beside what they print. */
#include "cli.h"
#include <stdlib.h>

rg_status cli_reports_writable(cli *c) {
  return cli_writable(c, c->args.trace);
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
  char source[96];
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
  return write_one(c, "trace", c->args.trace, &o);
}
