/* cli/help.c: prints the table of commands and flags as help text and as a man page. */
#include "cli.h"
#include <string.h>

/* Columns that UTF-8 takes. */
static int columns(const char *text) {
  int n = 0;
  for (; *text; text++) n += ((unsigned char)*text & 0xc0) != 0x80;
  return n;
}

static void print_flags(FILE *f, int command) {
  for (int i = 0; i < cli_nflag; i++) {
    const cli_flag *g = &cli_flags[i];
    if (!cli_takes(g, command)) continue;
    char left[64];
    snprintf(left, sizeof left, "%s%s%s", g->name, g->arg ? " " : "", g->arg ? g->arg : "");
    fprintf(f, "  %-26s", left);
    if (strlen(left) > 25) fprintf(f, "\n%28s", "");
    cli_wrap(f, g->doc, 28, cli_page(f));
  }
}

void cli_print_help(FILE *f, const cli_command *command) {
  if (command) {
    fprintf(f, "usage: regraph %s %s [flags]\n\n", command->name, command->positional);
    cli_wrap(f, command->detail, 0, cli_page(f));
    fputs("\nflags:\n", f);
    print_flags(f, (int)(command - cli_commands));
    return;
  }
  fputs("regraph: runs attention graphs with selective recomputation\n\n"
        "usage: regraph COMMAND [arguments] [flags]\n\ncommands:\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    char left[32];
    snprintf(left, sizeof left, "%s %s", cli_commands[i].name, cli_commands[i].positional);
    fprintf(f, "  %s%*s ", left, 20 - columns(left), "");
    cli_wrap(f, cli_commands[i].doc, 23, cli_page(f));
  }
  fputc('\n', f);
  cli_wrap(f,
           "'regraph help COMMAND' explains one. Data goes to standard output, messages to "
           "standard error. Exit codes: 0 fine, 2 usage, 3 bad spec, policy or data, "
           "4 budget infeasible, 5 device, 6 communication, 1 anything else.",
           0, cli_page(f));
}

/* ---- man page ---- */

/* roff takes a hyphen for typography and a leading dot for a request. */
static void roff(FILE *f, const char *text) {
  if (*text == '.' || *text == '\'') fputs("\\&", f);
  for (; *text; text++) {
    if (*text == '-')
      fputs("\\-", f);
    else if (*text == '\\')
      fputs("\\e", f);
    else
      fputc(*text, f);
  }
}

/* A flag, and who takes it. */
static void man_flag(FILE *f, const cli_flag *g) {
  int takers = 0;
  for (int i = 0; i < cli_ncommand; i++) takers += cli_takes(g, i);
  fputs(".TP\n\\fB", f);
  roff(f, g->name);
  fputs("\\fR", f);
  if (g->arg) {
    fputs(" \\fI", f);
    roff(f, g->arg);
    fputs("\\fR", f);
  }
  fputc('\n', f);
  roff(f, g->doc);
  const char *gap = " (";
  for (int i = 0; i < cli_ncommand && takers < cli_ncommand; i++) {
    if (!cli_takes(g, i)) continue;
    fprintf(f, "%s%s", gap, cli_commands[i].name);
    gap = ", ";
  }
  fputs(takers < cli_ncommand ? ")\n" : "\n", f);
}

void cli_print_man(FILE *f) {
  fprintf(f,
          ".TH REGRAPH 1 \"\" \"regraph %s\" \"User Commands\"\n.SH NAME\nregraph \\- runs "
          "attention graphs "
          "with selective recomputation\n.SH SYNOPSIS\n",
          rg_version());
  for (int i = 0; i < cli_ncommand; i++) {
    fprintf(f, "%s.B regraph %s\n", i ? ".br\n" : "", cli_commands[i].name);
    roff(f, cli_commands[i].positional);
    fputs(" [flags]\n", f);
  }
  fputs(".SH DESCRIPTION\nAn attention variant is a JSON graph spec; a JSON policy says what to "
        "keep and "
        "what to recompute. The planner turns both into one arena and a list of steps for each "
        "direction.\nData goes to standard output, messages and progress to standard error.\n.SH "
        "COMMANDS\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    fprintf(f, ".SS \"%s ", cli_commands[i].name);
    roff(f, cli_commands[i].positional);
    fputs("\"\n", f);
    roff(f, cli_commands[i].detail);
    fputc('\n', f);
  }
  fputs(".SH OPTIONS\n", f);
  for (int j = 0; j < cli_nflag; j++) man_flag(f, &cli_flags[j]);
  fputs(".SH EXIT STATUS\n", f);
  static const char *const codes[][2] = {
      {"0", "fine"},
      {"1", "anything not below"},
      {"2", "usage: unknown flag, malformed value, unbound dimension"},
      {"3", "spec, policy or data that can't be read or is wrong"},
      {"4", "a memory budget that no choice meets"},
      {"5", "device"},
      {"6", "communication"}};
  for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
    fprintf(f, ".TP\n.B %s\n", codes[i][0]);
    roff(f, codes[i][1]);
    fputc('\n', f);
  }
  fputs(".PP\nIf the reader of standard output goes away, as\n.BR head (1)\ndoes, the command ends "
        "in "
        "silence by "
        "SIGPIPE, like others; a shell shows 141.\n.SH FILES\nA regular or new file is written "
        "beside its "
        "target, as \\fI.regraph\\-PID\\-N.tmp\\fR, and renamed when it is complete: an interrupt, "
        "a full "
        "disk or a limit on file sizes leaves the earlier file whole. Devices and pipes are "
        "written as they "
        "are.\n.SH SIZES AND COUNTS\nA size is digits, perhaps decimals, and perhaps a unit: B; KB "
        "(or kB), "
        "MB, "
        "GB, TB are powers of 1000; KiB, MiB, GiB, TiB, and K, M, G, T alone, powers of 1024. A "
        "count in "
        "\\fB\\-\\-set\\fR may end in K, M, G or T, powers of 1024: T=64K is 65536 tokens.\n",
        f);
  fputs(
      ".SH ENVIRONMENT\n.TP\n.B REGRAPH_EAGER\n1: as \\fB\\-\\-eager\\fR.\n"
      ".TP\n.B NO_COLOR\nset: no colour on a terminal; CLICOLOR_FORCE asks for colour elsewhere.\n"
      ".SH EXAMPLES\n.nf\nregraph plan examples/nsa.json \\-\\-set T=65536 \\-\\-policy "
      "examples/policies/all.json\n"
      "regraph run examples/nsa.json \\-\\-in q=q.npy \\-\\-in k=k.npy \\-\\-in v=v.npy \\-\\-out "
      "o=o.npy\n.fi\n",
      f);
}
