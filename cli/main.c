/* cli/main.c: the `regraph` command: parses, runs one command, prints what is wrong, turns the
   first error into an exit code.

   Standard output is checked at the end: a full disk is an error like any other (exit code 1),
   never a silent loss. A reader that went away, as `head` does, ends the command as it ends others:
   by SIGPIPE, in silence.
 */
#include "cli.h"
#include <errno.h>
#include <signal.h>
#include <string.h>

static rg_status run(cli *c, int argc, char **argv) {
  rg_status s = cli_parse(argc, argv, &c->args, &c->error);
  if (s != RG_OK) return s;
  const cli_args *a = &c->args;
  if (a->version) {
    printf("regraph %s\n", rg_version());
    return RG_OK;
  }
  if (a->help) {
    cli_print_help(stdout, a->command);
    return RG_OK;
  }
  if (!a->command) {
    cli_print_help(stderr, NULL);
    return c->error.status = RG_E_USAGE;
  }
  return a->command->run(c);
}

static void print_error(const rg_error *e) {
  char line[1536];
  rg_error_format(e, line, sizeof line);
  const char *code = rg_status_name(e->status), *at = strstr(line, code);
  const int place = at ? (int)(at - line) : 0, n = at ? (int)strlen(code) : 0;
  fprintf(stderr, "%s%.*s%s%s%.*s%s%s\n", cli_ink(stderr, CLI_BOLD), place, line,
          cli_ink(stderr, CLI_PLAIN), cli_ink(stderr, CLI_RED), n, line + place,
          cli_ink(stderr, CLI_PLAIN), line + place + n);
}

static void print_errors(const cli *c) {
  if (!c->error.message[0]) return;
  print_error(&c->error);
  for (size_t i = 1; i < c->nerror; i++) print_error(&c->errors[i]);
  if (c->nerror == CLI_MOST_ERRORS)
    fprintf(stderr, "%zu errors are shown; there may be more\n", c->nerror);
  else if (c->nerror > 1)
    fprintf(stderr, "%zu errors\n", c->nerror);
}

/* Whoever started us may ignore or block SIGPIPE for reasons of his own; that is inherited. */
static void default_pipes(void) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGPIPE);
  sigprocmask(SIG_UNBLOCK, &set, NULL);
  signal(SIGPIPE, SIG_DFL);
}

int main(int argc, char **argv) {
  default_pipes();
  signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes shows as a failed write */
  cli c = {0};
  rg_status s = run(&c, argc, argv);
  errno = 0;
  if (fflush(stdout) != 0 || ferror(stdout)) {
    c.write_failed = true;
    s = cli_fail(&c.error, RG_E_IO, "standard output", "can't be written: %s",
                 errno ? strerror(errno) : "an earlier write failed");
  }
  cli_progress_end(&c);
  print_errors(&c);
  int code = c.write_failed ? 1 : rg_status_exit_code(s);
  cli_close(&c);
  return code;
}
