/* cli/cli.h: what the files of the `regraph` command share.

   The command is a user of the public header and of nothing else of ours. One invocation is one
   `cli`: its arguments, the objects it made, and the first error. Commands return an rg_status and
   leave the printing of errors to main. Data goes to standard output, messages and progress to
   standard error.
 */
#ifndef CLI_H
#define CLI_H

#include <pthread.h>
#include <regraph/names.h>
#include <stdio.h>

/* ---- the table of commands and flags (table.c); help.c prints it in three forms ---- */

typedef struct cli_list {
  const char **item; /* borrowed from argv */
  int n;
} cli_list;

enum { CLI_MOST_POSITIONAL = 16 };

/* Every flag's value; which are meaningful follows from the command. */
typedef struct cli_args {
  const struct cli_command *command; /* NULL: none named */
  const char *positional[CLI_MOST_POSITIONAL];
  int npositional;
  bool help, version;
  bool json, dot, timeline, graph;                                     /* what to print */
  bool eager, backward, no_grad, no_reuse, no_inplace, no_fuse, serve; /* how to plan and run */
  bool man;
  const char *policy, *device, *profile, *svg, *trace, *html, *front, *against, *profile_out,
      *source, *completion, *names;
  cli_list set, in, grad_in, out, grad_out, plugin;
  int64_t threads, repeat, cp, capacity;
  uint64_t seed;
  double limit, time_limit;
} cli_args;

typedef enum cli_kind {
  CLI_SWITCH,
  CLI_TEXT,
  CLI_CHOICE, /* one of the words of `arg`, which stand apart by '|' */
  CLI_LIST,   /* may be given again */
  CLI_INT,    /* int64_t >= min */
  CLI_BYTES,  /* the same, with an optional unit: 64MiB, 1.5GiB */
  CLI_SEED,   /* uint64_t, decimal or 0x… */
  CLI_SECONDS /* double > 0 */
} cli_kind;

typedef struct cli_flag {
  const char *name; /* "--policy" */
  cli_kind kind;
  const char *arg;   /* "FILE", "cpu|cuda"; NULL for a switch */
  uint32_t commands; /* bit i: command i of the table takes it */
  size_t field;      /* offset in cli_args */
  int64_t min;
  const char *doc;
} cli_flag;

struct cli;
typedef struct cli_command {
  const char *name;
  const char *positional; /* "SPEC", "[COMMAND]" */
  const char *words;      /* what it may be, apart by '|'; NULL: anything */
  int min, max;           /* how many of them */
  const char *doc;        /* one line */
  const char *detail;     /* a paragraph for help and the man page */
  rg_status (*run)(struct cli *c);
} cli_command;

extern const cli_command cli_commands[];
extern const int cli_ncommand;
extern const cli_flag cli_flags[];
extern const int cli_nflag;

/* Fills *a from argv (borrowed for as long as *a is used); free with cli_args_free, also after a
 * failure. */
rg_status cli_parse(int argc, char **argv, cli_args *a, rg_error *e);
void cli_args_free(cli_args *a);
static inline bool cli_takes(const cli_flag *f, int command) {
  return f->commands >> command & 1u;
}
const cli_command *cli_find_command(const char *name);
/* Is `word` one of those that stand apart by '|'? */
bool cli_is_word(const char *words, const char *word);

/* help.c. command NULL: the overview. */
void cli_print_help(FILE *f, const cli_command *command);
void cli_print_man(FILE *f);
/* complete.c */
void cli_print_bash(FILE *f);
void cli_print_zsh(FILE *f);
void cli_print_fish(FILE *f);

/* ---- one invocation ---- */

enum { CLI_MOST_ERRORS = 20 }; /* that are shown */

typedef struct cli {
  cli_args args;
  rg_error error;
  rg_error errors[CLI_MOST_ERRORS]; /* where a call gives several: the first is `error` … */
  size_t nerror;                    /* … and 0 if none does */
  bool write_failed; /* the error is one of writing: exit code 1 whatever its status */
  bool quiet;        /* progress is somebody else's */
  char shown[1024];  /* the first argument, fit to be printed */
  rg_context *ctx;
  rg_spec *spec;
  rg_policy *policy;
  rg_plan *plan;
  rg_session *session;     /* with several ranks, rank 0's */
  struct cli_ranks *ranks; /* NULL: one rank */
  rg_binding *set;         /* --set, parsed; names owned */
  size_t nset;
  rg_binding solved[256]; /* what the arrays' shapes say; names belong to the spec */
  size_t nsolved;
  int64_t arena_now, arena_peak; /* bytes asked of the arena hook */
  struct {
    void *ptr;
    int64_t size;
  } arena[8]; /* its blocks */
} cli;

/* Context, plugins; spec and policy too where the command names a spec. */
rg_status cli_open(cli *c);
/* Is the plan for a GPU? Then nodes are timed in a session that launches them one by one. */
bool cli_on_gpu(const cli *c);
/* One sequence for every input of sequence starts whose extent is still free. */
void cli_default_sequences(cli *c);
/* --set NAME=VALUE … → c->set. */
rg_status cli_parse_set(cli *c);
/* A plan with the arguments' options. */
rg_status cli_make_plan(cli *c);
/* A session whose arena is counted in arena_peak. */
rg_status cli_make_session(cli *c, bool eager);
/* RG_E_DEVICE if --device names one that this build can plan for but not run on. */
rg_status cli_require_runner(cli *c);
/* rg_check, with all its errors. */
rg_status cli_check(cli *c);
void cli_close(cli *c);
/* What a run took: ms of each step, and of whole directions. */
typedef struct cli_measured {
  const double *step_ms;
  size_t nstep;
  double forward_ms, backward_ms;
  const char *how; /* "median of 5" */
} cli_measured;
/* Files that the flags ask for beside what is printed (report.c): whether they can be written, and
 * writes them. NULL: nothing was measured. */
rg_status cli_reports_open(cli *c);
/* Refuses to let `flag` write over a file that the command reads, or over a report (report.c). */
rg_status cli_spare(cli *c, const char *flag, const char *path);
rg_status cli_write_reports(cli *c, const cli_measured *m);
/* What the plan's cost model says of a direction. */
double cli_model_seconds(const cli *c, bool backward);
void cli_plan_options(cli *c, rg_plan_options *o);

rg_status cli_cmd_help(cli *c);
rg_status cli_cmd_ops(cli *c);
rg_status cli_cmd_schema(cli *c);
rg_status cli_cmd_check(cli *c);
rg_status cli_cmd_plan(cli *c);
rg_status cli_cmd_pareto(cli *c);
rg_status cli_cmd_run(cli *c);
rg_status cli_cmd_bench(cli *c);
rg_status cli_cmd_tune(cli *c);
rg_status cli_cmd_pack(cli *c);

/* ---- errors, text, time (io.c) ---- */

/* Records an error unless *e already holds one; returns `status`. `file` may be NULL. */
rg_status cli_fail(rg_error *e, rg_status status, const char *file, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
rg_status cli_nomem(rg_error *e);
/* Prints the text and frees it. */
void cli_print_text(rg_text *text);
/* Writes a whole file, or leaves what was there (save.c). */
rg_status cli_write_file(cli *c, const char *path, const char *data, size_t size);
/* A path that no file can be written to is better met before a long run than after it. NULL is
 * fine (save.c). */
rg_status cli_writable(cli *c, const char *path);
void cli_json_string(FILE *f, const char *text);
void cli_json_number(FILE *f, double x); /* null for what JSON can't say */
/* pthread_create for a thread that takes no signals: they are for the one that works, which holds
 * them up where a file is begun (save.c). */
int cli_thread_start(pthread_t *thread, void *(*run)(void *), void *arg);
double cli_seconds(void); /* a clock that never goes back */
/* Where opening a file failed because there is none of that name: names the nearest there is. */
void cli_suggest_file(rg_error *e, const char *path);
/* "NAME=REST" → name (copied into buffer) and rest; false if malformed. */
bool cli_split(const char *text, char *name, size_t size, const char **rest);
/* Threads asked for by --threads, or the cores this process may use. */
int cli_threads(const cli *c);
/* Median of n numbers, which are sorted on the way. */
double cli_median(double *x, int n);

/* ---- the terminal (term.c, progress.c) ---- */

/* Of a terminal; 0 if it is none. */
int cli_columns(int fd);
/* Columns that sentences are broken into. */
int cli_page(FILE *f);
/* `text` broken at blanks so that lines end before `width`, each after `indent` blanks; the first
 * is already indented. */
void cli_wrap(FILE *f, const char *text, int indent, int width);
typedef enum cli_colour { CLI_PLAIN, CLI_BOLD, CLI_DIM, CLI_RED } cli_colour;
/* What switches to it, or "" where `f` takes no colour. */
const char *cli_ink(FILE *f, cli_colour colour);

/* That of a node which takes this share, in percent, of a direction: what matters stands out. */
const char *cli_share_ink(double percent);
/* Widths of the columns "node" and "op" of a table that has `others` more characters a line, for
 * names up to these lengths: as they need, but on a terminal no more than fits. Then op goes first
 * (0: no such column). */
typedef struct cli_widths {
  int node, op;
} cli_widths;
cli_widths cli_fit(int node, int op, int others);
/* The two columns of one line; what does not fit ends in "…". */
void cli_print_names(const char *node, const char *op, cli_widths w);

/* Drawn on standard error if that is a terminal, until cli_progress_end: what is waited for, and
 * how much of `total` is done. `user` is the cli; nothing if that is quiet. */
void cli_progress(void *user, const char *stage, double done, double total);
/* The same for what says nothing while it works, but is expected to take some seconds (0: not
 * known), or that at most. */
void cli_progress_expect(const cli *c, const char *stage, double seconds, bool most);
void cli_progress_end(const cli *c);
/* For a handler of a signal that ends the program: takes the line away, if one is drawn. */
void cli_progress_wipe(void);
/* The line's text: `passed` seconds after the stage began, `said` of them when `done` was. */
typedef struct cli_wait {
  const char *stage;
  double passed, said, done, total, expected;
  bool most;
} cli_wait;
void cli_progress_text(const cli_wait *w, char *text, size_t size);

#endif
