/* cli/complete.c: prints completion rules for bash, zsh and fish from the table of commands and
   flags.

   What the table can't know, the rules ask the command: ops (`ops`), and the names that a spec has
   (`check SPEC --names …`). Each flag and each argument is of one of a few kinds; a shell has one
   line of rules for each.
 */
#include "cli.h"
#include <string.h>

typedef enum kind {
  NOTHING, /* a number, say */
  FILES,
  WORDS,  /* of the table */
  EITHER, /* words or files */
  SET,    /* names that --set binds, and '=' */
  INPUTS,
  OUTPUTS, /* a tensor's name, '=', a file */
  SPEC,
  CSV,
  OPS,
  COMMANDS
} kind;

static kind kind_of_flag(const cli_flag *g) {
  if (g->kind == CLI_CHOICE) return WORDS;
  if (g->kind != CLI_TEXT && g->kind != CLI_LIST) return NOTHING;
  if (strcmp(g->arg, "NAME=VALUE") == 0) return SET;
  if (strcmp(g->arg, "NAME=FILE.npy") == 0)
    return strcmp(g->name, "--in") == 0 || strcmp(g->name, "--grad-out") == 0 ? INPUTS : OUTPUTS;
  return strchr(g->arg, '|') ? EITHER : strstr(g->arg, "FILE") ? FILES : NOTHING;
}

static kind kind_of_argument(const cli_command *k) {
  return k->words                                  ? WORDS
         : strstr(k->positional, "SPEC")           ? SPEC
         : strcmp(k->positional, "FILE.csv") == 0  ? CSV
         : strcmp(k->positional, "[NAME]") == 0    ? OPS
         : strcmp(k->positional, "[COMMAND]") == 0 ? COMMANDS
                                                   : FILES;
}

/* What is in small letters: of FILE|none|all|least|BYTES, the presets. */
static void print_words(FILE *f, const char *words) {
  const char *gap = "";
  while (*words) {
    const int n = (int)strcspn(words, "|");
    if (*words >= 'a' && *words <= 'z') {
      fprintf(f, "%s%.*s", gap, n, words);
      gap = " ";
    }
    words += n + (words[n] == '|');
  }
}

static void print_commands(FILE *f) {
  for (int i = 0; i < cli_ncommand; i++) fprintf(f, "%s%s", i ? " " : "", cli_commands[i].name);
}

/* `text` inside of single quotes, each character of `escaped` behind a backslash. A quote is said
 * as `quote`. */
static void print_quoted(FILE *f, const char *text, const char *escaped, const char *quote) {
  for (; *text; text++) {
    if (*text == '\'') {
      fputs(quote, f);
    } else {
      if (strchr(escaped, *text)) fputc('\\', f);
      fputc(*text, f);
    }
  }
}

/* ---- bash ---- */

static void bash_kind(FILE *f, kind k, const char *words) {
  switch (k) {
  case NOTHING: fputs(":", f); return;
  case FILES: fputs("_regraph_files", f); return;
  case WORDS:
    fputs("_regraph_words \"", f);
    print_words(f, words);
    fputs("\"", f);
    return;
  case EITHER:
    fputs("_regraph_files; _regraph_words \"", f);
    print_words(f, words);
    fputs("\"", f);
    return;
  case SET: fputs("_regraph_names set", f); return;
  case INPUTS: fputs("_regraph_names inputs", f); return;
  case OUTPUTS: fputs("_regraph_names outputs", f); return;
  case SPEC: fputs("_regraph_files '!*.json'", f); return;
  case CSV: fputs("_regraph_files '!*.csv'", f); return;
  case OPS:
    fputs("_regraph_words \"$(regraph ops | sed -n 's/^\\([a-z_]*\\): .*/\\1/p')\"", f);
    return;
  case COMMANDS:
    fputs("_regraph_words \"", f);
    print_commands(f);
    fputs("\"", f);
    return;
  }
}

void cli_print_bash(FILE *f) {
  fputs("# bash completion for regraph, printed by 'regraph help --completion bash'\n"
        "_regraph_add() { # what compgen says, a line each: names may hold blanks and stars\n"
        "  local -a more\n"
        "  mapfile -t more < <(compgen \"$@\" -- \"$cur\")\n"
        "  COMPREPLY+=(\"${more[@]}\")\n"
        "}\n"
        "_regraph_words() { _regraph_add -W \"$1\"; }\n"
        "_regraph_files() { # perhaps but those that fit a pattern\n"
        "  compopt -o filenames 2>/dev/null\n"
        "  _regraph_add -f ${1:+-X \"$1\"}\n"
        "  [ -z \"$1\" ] || _regraph_add -d\n"
        "}\n"
        "_regraph_names() { # what the spec on the line has of them, with '='\n"
        "  local word spec=\n"
        "  for word in \"${COMP_WORDS[@]:2}\"; do [[ $word != *.json ]] || { spec=$word; break; }; "
        "done\n"
        "  compopt -o nospace 2>/dev/null\n"
        "  [ -z \"$spec\" ] || _regraph_add -S = -W \"$(regraph check \"$spec\" --names \"$1\" "
        "2>/dev/null)\"\n"
        "}\n"
        "_regraph() {\n"
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} "
        "cmd=${COMP_WORDS[1]} flags=\n"
        "  COMPREPLY=()\n"
        "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n    _regraph_words \"",
        f);
  print_commands(f);
  fputs(" --help --version\"\n    return\n  fi\n"
        "  # readline sees NAME, = and what follows as words of their own\n"
        "  if [ \"$cur\" = = ] || [ \"$prev\" = = ]; then\n"
        "    local at=$((COMP_CWORD - 2))\n"
        "    [ \"$cur\" = = ] || at=$((COMP_CWORD - 3))\n"
        "    [ \"${COMP_WORDS[at]}\" = --set ] || { cur=${cur#=}; _regraph_files; }\n"
        "    return\n  fi\n"
        "  case $cmd,$prev in\n",
        f);
  for (int j = 0; j < cli_nflag; j++) {
    const cli_flag *g = &cli_flags[j];
    if (g->kind == CLI_SWITCH) continue;
    const char *gap = "    ";
    for (int i = 0; i < cli_ncommand; i++) {
      if (!cli_takes(g, i)) continue;
      fprintf(f, "%s%s,%s", gap, cli_commands[i].name, g->name);
      gap = "|";
    }
    fputs(") ", f);
    bash_kind(f, kind_of_flag(g), g->arg);
    fputs("; return ;;\n", f);
  }
  fputs("  esac\n  case $cmd in\n", f);
  for (int i = 0; i < cli_ncommand; i++) {
    fprintf(f, "    %s) flags=\"", cli_commands[i].name);
    const char *gap = "";
    for (int j = 0; j < cli_nflag; j++) {
      if (!cli_takes(&cli_flags[j], i)) continue;
      fprintf(f, "%s%s", gap, cli_flags[j].name);
      gap = " ";
    }
    fputs("\"\n      [[ $cur == -* ]] || ", f);
    bash_kind(f, kind_of_argument(&cli_commands[i]), cli_commands[i].words);
    fputs(" ;;\n", f);
  }
  fputs("  esac\n  [[ $cur != -* ]] || _regraph_words \"$flags\"\n"
        "}\ncomplete -F _regraph regraph\n",
        f);
}

/* ---- zsh ---- */

/* What completes it, as an action of _arguments. */
static void zsh_kind(FILE *f, kind k, const char *words) {
  switch (k) {
  case NOTHING: fputs(" ", f); return;
  case FILES: fputs("_files", f); return;
  case WORDS:
    fputs("(", f);
    print_words(f, words);
    fputs(")", f);
    return;
  case EITHER:
    fputs("{_regraph_either ", f);
    print_words(f, words);
    fputs("}", f);
    return;
  case SET: fputs("{_regraph_names set}", f); return;
  case INPUTS: fputs("{_regraph_names inputs}", f); return;
  case OUTPUTS: fputs("{_regraph_names outputs}", f); return;
  case SPEC: fputs("_files -g \"*.json\"", f); return;
  case CSV: fputs("_files -g \"*.csv\"", f); return;
  case OPS: fputs("_regraph_ops", f); return;
  case COMMANDS:
    fputs("(", f);
    print_commands(f);
    fputs(")", f);
    return;
  }
}

void cli_print_zsh(FILE *f) {
  fputs("#compdef regraph\n"
        "# zsh completion for regraph, printed by 'regraph help --completion zsh'\n"
        "_regraph_names() { # what the spec on the line has of them; behind '=' a file\n"
        "  local spec=${words[(r)*.json]}\n"
        "  if compset -P '*='; then\n    [[ $1 == set ]] || _files\n    return\n  fi\n"
        "  local -a names\n"
        "  names=(${(f)\"$(regraph check $spec --names $1 2>/dev/null)\"})\n"
        "  compadd -S = -- $names\n"
        "}\n"
        "_regraph_either() { _alternative 'files:file:_files' \"words:word:($*)\" }\n"
        "_regraph_ops() {\n"
        "  local -a ops\n"
        "  ops=(${${(M)${(f)\"$(regraph ops)\"}:#[a-z]*}%%:*})\n"
        "  compadd -- $ops\n"
        "}\n"
        "_regraph() {\n"
        "  local -a commands\n"
        "  commands=(\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    fprintf(f, "    '%s:", cli_commands[i].name);
    print_quoted(f, cli_commands[i].doc, ":", "'\\''");
    fputs("'\n", f);
  }
  fputs("  )\n"
        "  if (( CURRENT == 2 )); then\n    _describe command commands\n    return\n  fi\n"
        "  local command=$words[2]\n"
        "  shift words\n"
        "  (( CURRENT-- ))\n"
        "  case $command in\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    const cli_command *k = &cli_commands[i];
    fprintf(f, "    %s) _arguments \\\n", k->name);
    for (int j = 0; j < cli_nflag; j++) {
      const cli_flag *g = &cli_flags[j];
      if (!cli_takes(g, i)) continue;
      fprintf(f, "      '%s%s[", g->kind == CLI_LIST ? "*" : "", g->name);
      print_quoted(f, g->doc, "[]", "'\\''");
      fputs("]", f);
      if (g->arg) {
        fputs(": :", f);
        zsh_kind(f, kind_of_flag(g), g->arg);
      }
      fputs("' \\\n", f);
    }
    fputs("      '1: :", f);
    zsh_kind(f, kind_of_argument(k), k->words);
    fputs("' ;;\n", f);
  }
  fputs("  esac\n}\n"
        "if [ \"$funcstack[1]\" = _regraph ]; then _regraph \"$@\"; else compdef _regraph regraph; "
        "fi\n",
        f);
}

/* ---- fish ---- */

static void fish_kind(FILE *f, kind k, const char *words) {
  switch (k) {
  case NOTHING: fputs(" -f", f); return;
  case FILES: return;
  case WORDS:
  case EITHER:
    fprintf(f, "%s -a '", k == WORDS ? " -f" : "");
    print_words(f, words);
    fputs("'", f);
    return;
  case SET: fputs(" -f -a '(__regraph_names set)'", f); return;
  case INPUTS: fputs(" -a '(__regraph_names inputs)'", f); return;
  case OUTPUTS: fputs(" -a '(__regraph_names outputs)'", f); return;
  case SPEC: fputs(" -k -a '(__fish_complete_suffix .json)'", f); return;
  case CSV: fputs(" -k -a '(__fish_complete_suffix .csv)'", f); return;
  case OPS: fputs(" -f -a '(regraph ops | string match -rg \"^([a-z_]+): \")'", f); return;
  case COMMANDS:
    fputs(" -f -a '", f);
    print_commands(f);
    fputs("'", f);
    return;
  }
}

void cli_print_fish(FILE *f) {
  fputs("# fish completion for regraph, printed by 'regraph help --completion fish'\n"
        "function __regraph_names # what the spec on the line has of them, with '='\n"
        "  set -l spec (string match -- '*.json' (commandline -opc))[1]\n"
        "  regraph check $spec --names $argv[1] 2>/dev/null | string replace -r '$' =\n"
        "end\n",
        f);
  for (int i = 0; i < cli_ncommand; i++) {
    const cli_command *k = &cli_commands[i];
    fprintf(f, "complete -c regraph -n __fish_use_subcommand -f -a %s -d '", k->name);
    print_quoted(f, k->doc, "\\", "\\'");
    fputs("'\n", f);
  }
  for (int i = 0; i < cli_ncommand; i++) {
    const cli_command *k = &cli_commands[i];
    const char *seen = "__fish_seen_subcommand_from";
    fprintf(f, "complete -c regraph -n '%s %s'", seen, k->name);
    fish_kind(f, kind_of_argument(k), k->words);
    fputc('\n', f);
    for (int j = 0; j < cli_nflag; j++) {
      const cli_flag *g = &cli_flags[j];
      if (!cli_takes(g, i)) continue;
      fprintf(f, "complete -c regraph -n '%s %s' -l %s -d '", seen, k->name, g->name + 2);
      print_quoted(f, g->doc, "\\", "\\'");
      fputs("'", f);
      if (g->arg) {
        fputs(" -r", f);
        fish_kind(f, kind_of_flag(g), g->arg);
      }
      fputc('\n', f);
    }
  }
}
