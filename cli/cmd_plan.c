/* cli/cmd_plan.c: the commands that print what the library has to say: ops, schema,
 * check, plan, pareto, pack, help. */
#include "cli.h"
#include <string.h>
#include <unistd.h>

rg_status cli_cmd_help(cli *c) {
  const cli_args *a = &c->args;
  const cli_command *topic = NULL;
  if ((a->npositional > 0) + a->man + (a->completion != NULL) > 1)
    return cli_fail(&c->error, RG_E_USAGE, "regraph help",
                    "a COMMAND, --man and --completion exclude each other");
  if (a->npositional) {
    topic = cli_find_command(a->positional[0]);
    if (!topic) {
      const char *names[32];
      for (int i = 0; i < cli_ncommand; i++) names[i] = cli_commands[i].name;
      const char *near = rg_nearest(a->positional[0], names, cli_ncommand);
      return cli_fail(&c->error, RG_E_USAGE, "regraph help",
                      near ? "unknown command '%s'; did you mean '%s'?"
                           : "unknown command '%s'; 'regraph help' lists them",
                      a->positional[0], near);
    }
  }
  if (a->man)
    cli_print_man(stdout);
  else if (a->completion)
    (*a->completion == 'b'   ? cli_print_bash
     : *a->completion == 'z' ? cli_print_zsh
                             : cli_print_fish)(stdout);
  else
    cli_print_help(stdout, topic);
  return RG_OK;
}

static rg_status describe(cli *c, const char *what) {
  rg_text text;
  rg_status s = cli_open(c);
  if (s == RG_OK) s = rg_describe(c->ctx, what, &text, &c->error);
  if (s == RG_OK) cli_print_text(&text);
  return s;
}

rg_status cli_cmd_schema(cli *c) {
  const char *format = c->args.positional[0];
  char topic[32];
  if (cli_is_word(c->args.command->words, format)) {
    snprintf(topic, sizeof topic, "schema-%s", format);
    return describe(c, topic);
  }
  const char *names[16];
  char copy[128];
  int n = 0;
  snprintf(copy, sizeof copy, "%s", c->args.command->words);
  for (char *rest = copy, *word; n < 16 && (word = strsep(&rest, "|"));) names[n++] = word;
  const char *near = rg_nearest(format, names, n);
  if (near)
    return cli_fail(&c->error, RG_E_USAGE, "regraph schema",
                    "unknown format '%s'; did you mean '%s'?", format, near);
  return cli_fail(&c->error, RG_E_USAGE, "regraph schema", "unknown format '%s'; expected %s",
                  format, c->args.command->words);
}

/* The library describes an op in a line "NAME: …" and indented lines below. Prints that of
 * one op. */
static rg_status print_op(cli *c, const char *text, const char *name) {
  const char *names[256];
  char copies[256][40];
  int n = 0;
  size_t length = strlen(name);
  bool found = false;
  for (const char *line = text; *line;) {
    size_t size = strcspn(line, "\n") + 1;
    bool head = line[0] != ' ' && line[0] != '\n';
    if (head) found = strncmp(line, name, length) == 0 && line[length] == ':';
    if (found) {
      fwrite(line, 1, size, stdout);
      n = -1; /* found: no list of candidates is needed */
    } else if (head && n >= 0 && n < 256) {
      snprintf(copies[n], sizeof copies[n], "%.*s", (int)strcspn(line, ":\n"), line);
      names[n] = copies[n];
      n++;
    } else if (n < 0) {
      break;
    }
    line += line[size - 1] ? size : size - 1;
  }
  if (n < 0) return RG_OK;
  const char *near = rg_nearest(name, names, n);
  if (near)
    return cli_fail(&c->error, RG_E_USAGE, "regraph ops", "unknown op '%s'; did you mean '%s'?",
                    name, near);
  return cli_fail(&c->error, RG_E_USAGE, "regraph ops", "unknown op '%s'; 'regraph ops' lists them",
                  name);
}

rg_status cli_cmd_ops(cli *c) {
  rg_text text;
  if (!c->args.npositional) return describe(c, c->args.json ? "ops-json" : "ops");
  if (c->args.json)
    return cli_fail(&c->error, RG_E_USAGE, "regraph ops", "--json lists all ops; leave NAME out");
  rg_status s = cli_open(c);
  if (s == RG_OK) s = rg_describe(c->ctx, "ops", &text, &c->error);
  if (s != RG_OK) return s;
  s = print_op(c, text.data, c->args.positional[0]);
  rg_text_destroy(&text);
  return s;
}

static void print_finding(const rg_error *e) {
  const char *const key[] = {"status", "file", "pointer", "node", "message"};
  const char *const value[] = {rg_status_name(e->status), e->file, e->pointer, e->node, e->message};
  putchar('{');
  for (size_t i = 0; i < sizeof key / sizeof *key; i++) {
    printf("\"%s\": ", key[i]);
    cli_json_string(stdout, value[i]);
    fputs(", ", stdout);
  }
  printf("\"line\": %d, \"column\": %d}", e->line, e->column);
}

/* What check found, for editors and scripts. */
static void print_findings(const cli *c, const char *summary) {
  printf("{\"version\": 1, \"ok\": %s, ", summary ? "true" : "false");
  if (summary) {
    fputs("\"summary\": ", stdout);
    cli_json_string(stdout, summary);
    puts("}");
    return;
  }
  fputs("\"errors\": [", stdout);
  print_finding(&c->error);
  for (size_t i = 1; i < c->nerror; i++) {
    fputs(",\n ", stdout);
    print_finding(&c->errors[i]);
  }
  puts("]}");
}

/* Names in the library's summary: lines "input NAME …", and "dimensions T B=2". */
static void print_names(const char *summary, const char *what) {
  const bool set = strcmp(what, "set") == 0;
  const int kind = (int)strlen(what) - 1; /* without the s */
  for (const char *line = summary; *line; line += strcspn(line, "\n"), line += *line == '\n') {
    const int word = (int)strcspn(line, " \n");
    const char *at = line + word;
    if (set && strncmp(line, "dimensions ", 11) == 0) {
      while (*at == ' ') {
        const int n = (int)strcspn(++at, " =\n");
        printf("%.*s\n", n, at);
        at += strcspn(at, " \n");
      }
    } else if (set ? strncmp(line, "param ", 6) == 0
                   : word == kind && strncmp(line, what, (size_t)kind) == 0) {
      at += strspn(at, " ");
      printf("%.*s\n", (int)strcspn(at, " \n"), at);
    }
  }
}

rg_status cli_cmd_check(cli *c) {
  rg_text text;
  if (c->args.names && c->args.json)
    return cli_fail(&c->error, RG_E_USAGE, "regraph check",
                    "--names and --json exclude each other");
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_check(c);
  if (s == RG_OK) s = rg_spec_write(c->spec, "summary", &text, &c->error);
  if (s != RG_OK) {
    if (c->args.json) print_findings(c, NULL);
    return s;
  }
  if (c->args.names) {
    print_names(text.data, c->args.names);
    rg_text_destroy(&text);
    return RG_OK;
  }
  const char *line = text.data; /* "NAME: 6 nodes, …" and more lines */
  size_t name = strcspn(line, ":\n");
  if (line[name] == ':' && line[name + 1] == ' ') line += name + 2;
  char *end = text.data + (line - text.data) + strcspn(line, "\n");
  *end = '\0';
  if (c->args.json)
    print_findings(c, line);
  else
    printf("%s: ok — %s\n", c->shown, line);
  rg_text_destroy(&text);
  return RG_OK;
}

rg_status cli_cmd_plan(cli *c) {
  const cli_args *a = &c->args;
  if (a->json + a->dot + a->timeline + a->graph > 1)
    return cli_fail(&c->error, RG_E_USAGE, "regraph plan",
                    "--json, --dot, --timeline and --graph exclude each other");
  rg_status s = cli_open(c);
  if (s != RG_OK) return s;
  s = cli_reports_open(c);
  if (s != RG_OK) return s;
  cli_default_sequences(c);
  s = cli_make_plan(c);
  if (s != RG_OK) return s;
  rg_text text;
  if (a->svg) {
    s = rg_plan_write(c->plan, "svg", &text, &c->error);
    if (s != RG_OK) return s;
    s = cli_write_file(c, a->svg, text.data, text.size);
    rg_text_destroy(&text);
    if (s != RG_OK) return s;
  }
  s = cli_write_reports(c, NULL);
  if (s != RG_OK) return s;
  char timeline[16] = "timeline";
  const int columns = cli_columns(STDOUT_FILENO);
  if (columns)
    snprintf(timeline, sizeof timeline, "timeline:%d",
             columns < 40    ? 40
             : columns > 400 ? 400
                             : columns);
  const char *format = a->json       ? "json"
                       : a->dot      ? "dot"
                       : a->timeline ? timeline
                       : a->graph    ? "graph"
                                     : "text";
  s = rg_plan_write(c->plan, format, &text, &c->error);
  if (s == RG_OK) cli_print_text(&text);
  return s;
}

rg_status cli_cmd_pareto(cli *c) {
  const cli_args *a = &c->args;
  rg_text text;
  rg_plan_options o;
  if (a->svg && a->json)
    return cli_fail(&c->error, RG_E_USAGE, "regraph pareto", "--json and --svg exclude each other");
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_reports_open(c);
  if (s != RG_OK) return s;
  cli_default_sequences(c);
  cli_plan_options(c, &o);
  s = rg_pareto(c->spec, c->policy, &o,
                a->svg    ? "svg"
                : a->json ? "json"
                          : "text",
                &text, &c->error);
  cli_progress_end(c);
  if (s == RG_OK && a->svg) {
    s = cli_write_file(c, a->svg, text.data, text.size);
    rg_text_destroy(&text);
  } else if (s == RG_OK) {
    cli_print_text(&text);
  }
  return s;
}

enum { PACK_SECONDS = 5 }; /* without --limit */

rg_status cli_cmd_pack(cli *c) {
  const cli_args *a = &c->args;
  if (a->out.n > 1) return cli_fail(&c->error, RG_E_USAGE, "regraph pack", "--out is given twice");
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_writable(c, a->out.n ? a->out.item[0] : NULL);
  if (s == RG_OK && a->out.n) s = cli_spare(c, "--out", a->out.item[0]);
  if (s != RG_OK) return s;
  rg_pack_options o = {.seconds = a->limit > 0 ? a->limit : PACK_SECONDS, .capacity = a->capacity};
  rg_pack_result r;
  rg_text text;
  cli_progress_expect(c, "packing", o.seconds, true);
  const char *path = strcmp(a->positional[0], "-") == 0 ? "/dev/stdin" : a->positional[0];
  s = rg_pack_csv(c->ctx, path, &o, &text, &r, &c->error);
  cli_progress_end(c);
  cli_suggest_file(&c->error, path);
  if (s != RG_OK) return s;
  double gap = r.peak ? 100.0 * (double)(r.peak - r.lower_bound) / (double)r.peak : 0;
  fprintf(stderr, "peak %lld, lower bound %lld, gap %.2f %%, %s, %lld nodes, %.3f s\n",
          (long long)r.peak, (long long)r.lower_bound, gap,
          r.optimal ? "proved optimal" : "not proved optimal", (long long)r.nodes_explored,
          r.seconds);
  if (a->capacity && r.peak > a->capacity) {
    rg_text_destroy(&text);
    return cli_fail(
        &c->error, RG_E_INFEASIBLE, a->positional[0],
        "no packing into %lld bytes found; the best takes %lld, and %lld are alive at once",
        (long long)a->capacity, (long long)r.peak, (long long)r.lower_bound);
  }
  if (a->out.n) {
    s = cli_write_file(c, a->out.item[0], text.data, text.size);
    rg_text_destroy(&text);
    return s;
  }
  cli_print_text(&text);
  return RG_OK;
}
