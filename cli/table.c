/* cli/table.c: the one table of commands and flags, and the parser that follows it.

   --help, the man page and completions are printed from this table (help.c, complete.c), so a row
   here is all it takes to add a flag. Values are checked as far as a flag alone can say; what they
   mean together is the command's business.
 */
#include "cli.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { OPS, SCHEMA, CHECK, PLAN, PARETO, RUN, BENCH, TUNE, PACK, HELP };
#define BIT(x) (1u << (x))
#define PLANS  (BIT(PLAN) | BIT(PARETO) | BIT(RUN) | BIT(BENCH))
#define SPECS  (PLANS | BIT(CHECK))
#define ALL    ((1u << (HELP + 1)) - 1)

const cli_command cli_commands[] = {
    [OPS] =
        {"ops", "[NAME]", NULL, 0, 1, "list the ops with their ports and attributes",
         "Everything a spec may say about an op: ports, shapes, types, attributes with range and "
         "default. With a NAME, that op alone.",
         cli_cmd_ops},
    [SCHEMA] =
        {"schema", "FORMAT", "spec|policy|profile|plan|pareto|run|bench|check|ops|trace", 1, 1,
         "print the JSON Schema of a format",
         "JSON Schema (draft 2020-12) of what is read: spec, policy, profile; and of what is "
         "printed with --json: plan, pareto, run, bench, check, ops; and of what --trace writes. "
         "That of specs is made from the table of ops, plugins included. A file may name its "
         "schema in "
         "\"$schema\", for editors.",
         cli_cmd_schema},
    [CHECK] =
        {"check", "SPEC", NULL, 1, 1, "check a spec, and a policy against it",
         "Says what is wrong and where (file, line, JSON pointer), or one line if nothing is. "
         "Dimensions may "
         "stay unbound: then everything that does not need them is checked. SPEC - is standard "
         "input, "
         "here and for every command that takes one; so are --policy - and pack -.",
         cli_cmd_check},
    [PLAN] = {"plan", "SPEC", NULL, 1, 1, "plan memory and steps, and report",
              "Needs no GPU: with --device cuda it plans for the shipped H200 profile or for "
              "--profile. The "
              "number of sequences is 1 unless set.",
              cli_cmd_plan},
    [PARETO] = {"pareto", "SPEC", NULL, 1, 1, "print the front of peak memory against extra time",
                "One line for every recompute choice that no other choice beats in both peak bytes "
                "and extra "
                "milliseconds.",
                cli_cmd_pareto},
    [RUN] = {"run", "SPEC", NULL, 1, 1, "run once on given or drawn arrays",
             "Arrays are .npy files of float32 or int32. Free dimensions follow from their shapes. "
             "Float inputs "
             "and output gradients that are not given are drawn from N(0,1) by seed and name; "
             "sequence starts "
             "that are not given cut the tokens into near-equal sequences (one, unless set); query "
             "offsets are "
             "zero. The backward direction runs if a gradient goes in or out, or with --backward.",
             cli_cmd_run},
    [BENCH] = {"bench", "SPEC", NULL, 1, 1, "time every node on drawn arrays",
               "One warm-up, then the medians of --repeat runs: milliseconds, GFLOP/s, GB/s and "
               "the share of "
               "the roofline that this machine's measured peak rates allow (more than 100 % where "
               "data comes from "
               "a cache). With --serve, tables of a serving step's time.",
               cli_cmd_bench},
    [TUNE] = {"tune", "[SPEC…]", NULL, 0, CLI_MOST_POSITIONAL,
              "measure ops for the planner's times",
              "Times every op of the specs (the stock examples, if none is named) at several "
              "numbers of tokens T, "
              "and writes a profile into the user's cache folder, where plans on this machine find "
              "it. What was measured is kept beside it: a tune that was interrupted, or whose time "
              "was up, goes on.",
              cli_cmd_tune},
    [PACK] = {"pack", "FILE.csv", NULL, 1, 1, "pack intervals into an arena",
              "Reads lines id,lower,upper,size (half-open lifetimes) and writes them with a column "
              "offset. "
              "The peak, its lower bound and whether it is proved optimal go to standard error.",
              cli_cmd_pack},
    [HELP] = {"help", "[COMMAND]", NULL, 0, 1, "explain a command",
              "Without a COMMAND, lists them all.", cli_cmd_help},
};
const int cli_ncommand = HELP + 1;

#define AT(f) offsetof(cli_args, f)
const cli_flag cli_flags[] = {
    {"--policy", CLI_TEXT, "FILE|none|all|least|BYTES", SPECS, AT(policy), 0,
     "what to keep, what to recompute, or a budget such as 6GiB (default: keep all)"},
    {"--set", CLI_LIST, "NAME=VALUE", SPECS | BIT(TUNE), AT(set), 0,
     "bind a free dimension or parameter (64K: 65536); repeatable"},
    {"--device", CLI_CHOICE, "cpu|cuda", PLANS | BIT(TUNE), AT(device), 0,
     "device to plan for and run on (default: cpu)"},
    {"--profile", CLI_TEXT, "shipped|FILE|NAME", PLANS, AT(profile), 0,
     "device profile (default: what tune measured here, else the one that ships)"},
    {"--cp", CLI_INT, "N", PLANS, AT(cp), 1,
     "share the tokens out among N ranks (threads, where it runs)"},
    {"--threads", CLI_INT, "N", PLANS | BIT(TUNE), AT(threads), 1,
     "threads on the CPU (default: one per core)"},
    {"--no-grad", CLI_SWITCH, NULL, PLANS, AT(no_grad), 0, "plan the forward direction only"},
    {"--no-reuse", CLI_SWITCH, NULL, PLANS, AT(no_reuse), 0, "give every tensor bytes of its own"},
    {"--no-inplace", CLI_SWITCH, NULL, PLANS, AT(no_inplace), 0,
     "let no output take a dying input's bytes"},
    {"--no-fuse", CLI_SWITCH, NULL, PLANS, AT(no_fuse), 0,
     "compute all branches' gradients at once"},
    {"--limit", CLI_SECONDS, "SECONDS", PLANS | BIT(PACK), AT(limit), 0,
     "time limit of the exact packer"},
    {"--json", CLI_SWITCH, NULL, SPECS | BIT(OPS), AT(json), 0, "print JSON"},
    {"--names", CLI_CHOICE, "set|inputs|nodes|outputs", BIT(CHECK), AT(names), 0,
     "print names instead, one a line (set: what --set binds)"},
    {"--dot", CLI_SWITCH, NULL, BIT(PLAN), AT(dot), 0,
     "print the planned graph for Graphviz: steps, shapes, bytes"},
    {"--timeline", CLI_SWITCH, NULL, BIT(PLAN), AT(timeline), 0, "print who owns which bytes when"},
    {"--graph", CLI_SWITCH, NULL, BIT(PLAN), AT(graph), 0,
     "print every node and tensor of the planned graph"},
    {"--svg", CLI_TEXT, "FILE", BIT(PLAN) | BIT(PARETO), AT(svg), 0,
     "write a picture: the memory timeline, too; the front instead of text"},
    {"--trace", CLI_TEXT, "FILE.json", BIT(PLAN) | BIT(RUN) | BIT(BENCH), AT(trace), 0,
     "write the steps on a time axis, for Perfetto or chrome://tracing"},
    {"--html", CLI_TEXT, "FILE.html", BIT(PLAN) | BIT(RUN) | BIT(BENCH), AT(html), 0,
     "write a page with graph, memory, roofline and front"},
    {"--against", CLI_TEXT, "PLAN.json", BIT(PLAN) | BIT(RUN) | BIT(BENCH), AT(against), 0,
     "on that page: compare with another plan, which --json printed"},
    {"--front", CLI_TEXT, "FRONT.json", BIT(PLAN) | BIT(RUN) | BIT(BENCH), AT(front), 0,
     "on that page: the front that pareto --json printed (small specs have theirs anyway)"},
    {"--in", CLI_LIST, "NAME=FILE.npy", BIT(RUN), AT(in), 0, "read an input; repeatable"},
    {"--grad-in", CLI_LIST, "NAME=FILE.npy", BIT(RUN), AT(grad_in), 0,
     "read an output's gradient; repeatable"},
    {"--out", CLI_LIST, "NAME=FILE.npy", BIT(RUN), AT(out), 0, "write an output; repeatable"},
    {"--grad-out", CLI_LIST, "NAME=FILE.npy", BIT(RUN), AT(grad_out), 0,
     "write an input's gradient; repeatable"},
    {"--backward", CLI_SWITCH, NULL, BIT(RUN), AT(backward), 0, "run the backward direction, too"},
    {"--seed", CLI_SEED, "S", BIT(RUN) | BIT(BENCH) | BIT(TUNE), AT(seed), 0,
     "seed of the drawn arrays (default: 0)"},
    {"--eager", CLI_SWITCH, NULL, BIT(RUN) | BIT(BENCH), AT(eager), 0,
     "cuda: step by step, not as one graph"},
    {"--serve", CLI_SWITCH, NULL, BIT(BENCH), AT(serve), 0,
     "of a serving step: tokens one by one and pieces of prompts, by context and capacity"},
    {"--repeat", CLI_INT, "N", BIT(BENCH) | BIT(TUNE), AT(repeat), 1,
     "timed runs after the warm-up (default: 5; tune, which stops after a second: 25)"},
    {"--profile-out", CLI_TEXT, "FILE.json", BIT(TUNE), AT(profile_out), 0,
     "write the profile there instead, and the list of measurements beside it"},
    {"--source", CLI_TEXT, "TEXT", BIT(TUNE), AT(source), 0,
     "what plans are to say of where their times come from"},
    {"--time-limit", CLI_SECONDS, "SECONDS", BIT(TUNE), AT(time_limit), 0,
     "begin no measurement after that"},
    {"--out", CLI_LIST, "FILE.csv", BIT(PACK), AT(out), 0,
     "write there instead of to standard output"},
    {"--capacity", CLI_BYTES, "BYTES", BIT(PACK), AT(capacity), 1,
     "stop at the first packing that fits"},
    {"--plugin", CLI_LIST, "FILE.so", SPECS | BIT(OPS) | BIT(SCHEMA) | BIT(TUNE), AT(plugin), 0,
     "load more ops; repeatable"},
    {"--man", CLI_SWITCH, NULL, BIT(HELP), AT(man), 0, "print the man page"},
    {"--completion", CLI_CHOICE, "bash|zsh|fish", BIT(HELP), AT(completion), 0,
     "print completion rules for a shell"},
    {"--help", CLI_SWITCH, NULL, ALL, AT(help), 0, "print this help"},
    {"--version", CLI_SWITCH, NULL, ALL, AT(version), 0, "print the version"},
};
const int cli_nflag = (int)(sizeof cli_flags / sizeof *cli_flags);

const cli_command *cli_find_command(const char *name) {
  for (int i = 0; i < cli_ncommand; i++)
    if (strcmp(cli_commands[i].name, name) == 0) return &cli_commands[i];
  return NULL;
}

/* ---- parsing ---- */

static const cli_flag *find_flag(int command, const char *name, size_t length) {
  for (int i = 0; i < cli_nflag; i++)
    if (cli_takes(&cli_flags[i], command) && strlen(cli_flags[i].name) == length &&
        memcmp(cli_flags[i].name, name, length) == 0)
      return &cli_flags[i];
  return NULL;
}

static rg_status unknown_flag(int command, const char *name, const char *where, rg_error *e) {
  const char *names[64];
  int n = 0;
  char word[64];
  snprintf(word, sizeof word, "%.*s", (int)strcspn(name, "="), name);
  for (int i = 0; i < cli_nflag; i++)
    if (cli_takes(&cli_flags[i], command)) names[n++] = cli_flags[i].name + 2;
  const char *near = rg_nearest(word + strspn(word, "-"), names, n); /* dashes are no letters */
  if (near)
    return cli_fail(e, RG_E_USAGE, where, "unknown flag '%s'; did you mean '--%s'?", word, near);
  return cli_fail(e, RG_E_USAGE, where, "unknown flag '%s'; see '%s --help'", word, where);
}

static bool parse_integer(const char *text, int64_t *out) {
  char *end;
  if (*text < '0' || *text > '9') return false;
  errno = 0;
  *out = strtoll(text, &end, 10);
  return !errno && !*end;
}

static rg_status bad_value(const cli_flag *f, const char *value, const char *where, rg_error *e) {
  switch (f->kind) {
  case CLI_CHOICE:
    return cli_fail(e, RG_E_USAGE, where, "%s '%s': expected %s", f->name, value, f->arg);
  case CLI_SECONDS:
    return cli_fail(e, RG_E_USAGE, where, "%s '%s': expected a positive number of seconds", f->name,
                    value);
  case CLI_SEED:
    return cli_fail(e, RG_E_USAGE, where, "%s '%s': expected an unsigned 64-bit integer", f->name,
                    value);
  case CLI_BYTES:
    return cli_fail(e, RG_E_USAGE, where,
                    "%s '%s': expected bytes such as 1048576, 64MiB or 1.5GiB", f->name, value);
  default:
    return cli_fail(e, RG_E_USAGE, where, "%s '%s': expected an integer of at least %lld", f->name,
                    value, (long long)f->min);
  }
}

bool cli_is_word(const char *choices, const char *value) {
  size_t n = strlen(value);
  for (const char *p = choices; n;) {
    size_t k = strcspn(p, "|");
    if (k == n && memcmp(p, value, n) == 0) return true;
    if (!p[k]) break;
    p += k + 1;
  }
  return false;
}

static bool store_value(const cli_flag *f, const char *value, void *field) {
  char *end;
  switch (f->kind) {
  case CLI_SWITCH: *(bool *)field = true; return true;
  case CLI_CHOICE:
    if (!cli_is_word(f->arg, value)) return false;
    *(const char **)field = value;
    return true;
  case CLI_TEXT: *(const char **)field = value; return true;
  case CLI_LIST: {
    cli_list *list = field;
    list->item[list->n++] = value;
    return true;
  }
  case CLI_INT:
  case CLI_BYTES: {
    int64_t x;
    bool good =
        f->kind == CLI_BYTES ? rg_parse_size(value, &x, NULL) == RG_OK : parse_integer(value, &x);
    if (!good || x < f->min) return false;
    *(int64_t *)field = x;
    return true;
  }
  case CLI_SEED:
    if (*value < '0' || *value > '9') return false;
    errno = 0;
    *(uint64_t *)field = strtoull(value, &end, value[1] == 'x' || value[1] == 'X' ? 16 : 10);
    return !errno && !*end;
  case CLI_SECONDS: {
    double x = strtod(value, &end);
    if (end == value || *end || !isfinite(x) || x <= 0) return false;
    *(double *)field = x;
    return true;
  }
  }
  return false;
}

static bool takes_set(const cli_command *k) {
  return find_flag((int)(k - cli_commands), "--set", 5);
}

/* One argument too many: "B=2" and "T 4096" want to be set, most likely. */
static rg_status unexpected(const cli_args *a, const char *word, const char *where, rg_error *e) {
  const cli_command *k = a->command;
  const char *last = a->set.n ? a->set.item[a->set.n - 1] : "=";
  if (takes_set(k) && strchr(word, '='))
    return cli_fail(e, RG_E_USAGE, where, "unexpected argument '%s'; did you mean --set %s?", word,
                    word);
  if (takes_set(k) && !strchr(last, '='))
    return cli_fail(e, RG_E_USAGE, where, "unexpected argument '%s'; did you mean --set %s=%s?",
                    word, last, word);
  return cli_fail(e, RG_E_USAGE, where, "unexpected argument '%s'; usage: %s %s [flags]", word,
                  where, k->positional);
}

static rg_status parse_command(const char *name, cli_args *a, rg_error *e) {
  a->command = cli_find_command(name);
  if (a->command) return RG_OK;
  static const char *const flags[] = {"--help", "--version"};
  const char *names[32];
  for (int i = 0; i < cli_ncommand; i++) names[i] = cli_commands[i].name;
  const bool flag = name[0] == '-';
  const char *near = flag ? rg_nearest(name, flags, 2) : rg_nearest(name, names, cli_ncommand);
  const char *kind = flag ? "flag" : "command";
  if (near)
    return cli_fail(e, RG_E_USAGE, "regraph", "unknown %s '%s'; did you mean '%s'?", kind, name,
                    near);
  const size_t n = strlen(name);
  if (n > 5 && strcmp(name + n - 5, ".json") == 0)
    return cli_fail(e, RG_E_USAGE, "regraph",
                    "unknown command '%s'; did you mean 'regraph check %s'?", name, name);
  return cli_fail(e, RG_E_USAGE, "regraph", "unknown %s '%s'; see 'regraph help'", kind, name);
}

rg_status cli_parse(int argc, char **argv, cli_args *a, rg_error *e) {
  *a = (cli_args){.device = "cpu"};
  cli_list *lists[] = {&a->set, &a->in, &a->grad_in, &a->out, &a->grad_out, &a->plugin};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
    if (!(lists[i]->item = calloc((size_t)argc + 1, sizeof *lists[i]->item))) return cli_nomem(e);
  if (argc < 2) return RG_OK;
  if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
    a->help = true;
    return RG_OK;
  }
  if (strcmp(argv[1], "--version") == 0) {
    a->version = true;
    return RG_OK;
  }
  rg_status s = parse_command(argv[1], a, e);
  if (s != RG_OK) return s;

  int command = (int)(a->command - cli_commands);
  char where[32];
  snprintf(where, sizeof where, "regraph %s", a->command->name);
  bool flags = true; /* until "--" */
  for (int i = 2; i < argc; i++) {
    const char *word = argv[i];
    if (flags && strcmp(word, "--") == 0) {
      flags = false;
    } else if (flags && word[0] == '-' && word[1]) {
      const char *value = strchr(word, '=');
      const cli_flag *f = find_flag(command, word, value ? (size_t)(value - word) : strlen(word));
      if (strcmp(word, "-h") == 0) f = find_flag(command, "--help", 6);
      if (!f) return unknown_flag(command, word, where, e);
      if (value) value++;
      if (f->kind == CLI_SWITCH && value)
        return cli_fail(e, RG_E_USAGE, where, "%s takes no value", f->name);
      if (f->kind != CLI_SWITCH && !value) {
        if (i + 1 == argc)
          return cli_fail(e, RG_E_USAGE, where, "%s needs a value: %s", f->name, f->arg);
        value = argv[++i];
      }
      if (!store_value(f, value, (char *)a + f->field)) return bad_value(f, value, where, e);
    } else if (a->npositional == a->command->max) {
      return unexpected(a, word, where, e);
    } else {
      a->positional[a->npositional++] = word;
    }
  }
  if (!a->help && !a->version && a->npositional < a->command->min)
    return cli_fail(e, RG_E_USAGE, where, "missing argument; usage: %s %s [flags]%s%s", where,
                    a->command->positional, a->command->words ? ", where it is one of " : "",
                    a->command->words ? a->command->words : "");
  return RG_OK;
}

void cli_args_free(cli_args *a) {
  cli_list *lists[] = {&a->set, &a->in, &a->grad_in, &a->out, &a->grad_out, &a->plugin};
  for (size_t i = 0; i < sizeof lists / sizeof *lists; i++) {
    free(lists[i]->item);
    *lists[i] = (cli_list){0};
  }
}
