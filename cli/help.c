/* cli/help.c: prints the table of commands and flags as help text, as a man page and as bash
 * completion. */
#include "cli.h"
#include <string.h>
#include <unistd.h>

/* Columns that help is broken into. */
static int page(FILE *f) {
  const int columns = cli_columns(fileno(f));
  return columns == 0 || columns > 80 ? 80 : columns < 48 ? 48 : columns;
}

/* `text` broken at blanks so that lines end before `width`, each after `indent` blanks;
 * the first is already indented. */
static void print_wrapped(FILE *f, const char *text, int indent, int width) {
  int column = indent;
  while (*text) {
    int n = (int)strcspn(text, " ");
    if (column > indent && column + 1 + n > width) {
      fprintf(f, "\n%*s", indent, "");
      column = indent;
    }
    if (column > indent) {
      fputc(' ', f);
      column++;
    }
    fprintf(f, "%.*s", n, text);
    column += n;
    text += n;
    while (*text == ' ') text++;
  }
  fputc('\n', f);
}

static void print_flags(FILE *f, int command) {
  for (int i = 0; i < cli_nflag; i++) {
    const cli_flag *g = &cli_flags[i];
    if (!cli_takes(g, command)) continue;
    char left[64];
    snprintf(left, sizeof left, "%s%s%s", g->name, g->arg ? " " : "", g->arg ? g->arg : "");
    fprintf(f, "  %-26s", left);
    if (strlen(left) > 25) fprintf(f, "\n%28s", "");
    print_wrapped(f, g->doc, 28, page(f));
  }
}

void cli_print_help(FILE *f, const cli_command *command) {
  if (command) {
    fprintf(f, "usage: regraph %s %s [flags]\n\n", command->name, command->positional);
    print_wrapped(f, command->detail, 0, page(f));
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
    fprintf(f, "  %-20s ", left);
    print_wrapped(f, cli_commands[i].doc, 23, page(f));
  }
  fputc('\n', f);
  print_wrapped(f,
                "'regraph help COMMAND' explains one. Data goes to standard output, messages to "
                "standard error. Exit codes: 0 fine, 2 usage, 3 bad spec, policy or data, "
                "4 budget infeasible, 5 device, 6 communication, 1 anything else.",
                0, page(f));
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

/* ---- completion ---- */

#define OP_NAMES "regraph ops | string match -rg \"^([a-z_]+): \""

static void print_words(FILE *f, const char *choices) {
  for (; *choices; choices++) fputc(*choices == '|' ? ' ' : *choices, f);
}

void cli_print_bash(FILE *f) {
  fputs("# bash completion for regraph, printed by 'regraph help --completion bash'\n"
        "_regraph() {\n"
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} "
        "cmd=${COMP_WORDS[1]} flags=\n"
        "  COMPREPLY=()\n"
        "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n    COMPREPLY=($(compgen -W \"",
        f);
  for (int i = 0; i < cli_ncommand; i++) fprintf(f, "%s ", cli_commands[i].name);
  fputs("--help --version\" -- \"$cur\"))\n    return\n  fi\n  case $cmd in\n", f);
  for (int i = 0; i < cli_ncommand; i++) {
    fprintf(f, "    %s) flags=\"", cli_commands[i].name);
    const char *gap = "";
    for (int j = 0; j < cli_nflag; j++) {
      if (!cli_takes(&cli_flags[j], i)) continue;
      fprintf(f, "%s%s", gap, cli_flags[j].name);
      gap = " ";
    }
    fputs("\" ;;\n", f);
  }
  fputs("  esac\n  case $prev in\n", f);
  for (int j = 0; j < cli_nflag; j++) {
    const cli_flag *g = &cli_flags[j];
    if (g->kind == CLI_CHOICE) {
      fprintf(f, "    %s) COMPREPLY=($(compgen -W \"", g->name);
      print_words(f, g->arg);
      fputs("\" -- \"$cur\")); return ;;\n", f);
    } else if (strcmp(g->name, "--policy") == 0) {
      fputs("    --policy) COMPREPLY=($(compgen -W \"none all\" -- \"$cur\") $(compgen -f -- "
            "\"$cur\")); return ;;\n",
            f);
    } else if (g->kind == CLI_INT || g->kind == CLI_BYTES || g->kind == CLI_SEED ||
               g->kind == CLI_SECONDS || strcmp(g->name, "--set") == 0) {
      fprintf(f, "    %s) return ;;\n", g->name);
    }
  }
  fputs("  esac\n  case $cur in\n    -*) COMPREPLY=($(compgen -W \"$flags\" -- \"$cur\")); return "
        ";;\n  esac\n"
        "  case $cmd in\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    const cli_command *k = &cli_commands[i];
    if (strcmp(k->positional, "[COMMAND]") == 0) {
      fprintf(f, "    %s) COMPREPLY=($(compgen -W \"", k->name);
      for (int j = 0; j < cli_ncommand; j++) fprintf(f, "%s%s", j ? " " : "", cli_commands[j].name);
      fputs("\" -- \"$cur\")); return ;;\n", f);
    } else if (strcmp(k->name, "ops") == 0) {
      fputs("    ops) COMPREPLY=($(compgen -W \"$(regraph ops | sed -n 's/^\\([a-z_]*\\): "
            ".*/\\1/p')\" "
            "-- \"$cur\")); return ;;\n",
            f);
    } else if (k->words) {
      fprintf(f, "    %s) COMPREPLY=($(compgen -W \"", k->name);
      print_words(f, k->words);
      fputs("\" -- \"$cur\")); return ;;\n", f);
    }
  }
  fputs("  esac\n"
        "  # NAME=FILE: complete the file, which readline sees as a word of its own after '='\n"
        "  cur=${cur#*=}\n"
        "  compopt -o filenames 2>/dev/null\n"
        "  COMPREPLY=($(compgen -f -- \"$cur\"))\n"
        "}\ncomplete -F _regraph regraph\n",
        f);
}

/* zsh runs bash's rules. */
void cli_print_zsh(FILE *f) {
  fputs("#compdef regraph\nautoload -U +X bashcompinit && bashcompinit\n", f);
  cli_print_bash(f);
}

void cli_print_fish(FILE *f) {
  fputs("# fish completion for regraph, printed by 'regraph help --completion fish'\n"
        "set -l start 'test (count (commandline -opc)) -eq 1'\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    const cli_command *k = &cli_commands[i];
    fprintf(f, "complete -c regraph -n $start -f -a %s -d \"%s\"\n", k->name, k->doc);
    const char *at = "__fish_seen_subcommand_from";
    if (strcmp(k->name, "ops") == 0)
      fprintf(f, "complete -c regraph -n '%s ops' -f -a '(" OP_NAMES ")'\n", at);
    else if (k->words) {
      fprintf(f, "complete -c regraph -n '%s %s' -f -a '", at, k->name);
      print_words(f, k->words);
      fputs("'\n", f);
    }
    for (int j = 0; j < cli_nflag; j++) {
      const cli_flag *g = &cli_flags[j];
      if (!cli_takes(g, i)) continue;
      fprintf(f, "complete -c regraph -n '%s %s' -l %s%s -d \"%s\"", at, k->name, g->name + 2,
              g->arg ? " -r" : "", g->doc);
      if (g->kind == CLI_CHOICE || strcmp(g->name, "--policy") == 0) {
        fputs(" -a '", f);
        print_words(f, g->kind == CLI_CHOICE ? g->arg : "none|all");
        fputs("'", f);
      }
      fputc('\n', f);
    }
  }
}
