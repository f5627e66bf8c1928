/* cli/term.c: what is known of the terminal, its width and whether it takes colour, and tables that
   fit.

   Colour follows the customs: none where output is no terminal, where NO_COLOR is set or TERM is
   dumb; CLICOLOR_FORCE asks for it all the same.
 */
#include "cli.h"
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

int cli_columns(int fd) {
  struct winsize w;
  if (!isatty(fd)) return 0;
  if (ioctl(fd, TIOCGWINSZ, &w) == 0 && w.ws_col > 0) return w.ws_col;
  const char *columns = getenv("COLUMNS");
  const int n = columns ? atoi(columns) : 0;
  return n > 0 ? n : 80;
}

int cli_page(FILE *f) {
  const int columns = cli_columns(fileno(f));
  return columns == 0 || columns > 80 ? 80 : columns < 48 ? 48 : columns;
}

void cli_wrap(FILE *f, const char *text, int indent, int width) {
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

static bool is_set(const char *name) {
  const char *value = getenv(name);
  return value && *value;
}

static bool takes_colour(FILE *f) {
  const char *term = getenv("TERM"), *force = getenv("CLICOLOR_FORCE");
  if (is_set("NO_COLOR")) return false;
  if (force && *force && strcmp(force, "0") != 0) return true;
  return isatty(fileno(f)) && term && *term && strcmp(term, "dumb") != 0;
}

const char *cli_ink(FILE *f, cli_colour colour) {
  static const char *const code[] = {[CLI_PLAIN] = "\033[0m",
                                     [CLI_BOLD] = "\033[1m",
                                     [CLI_DIM] = "\033[2m",
                                     [CLI_RED] = "\033[31;1m"};
  return takes_colour(f) ? code[colour] : "";
}

const char *cli_share_ink(double percent) {
  return percent >= 25 ? cli_ink(stdout, CLI_BOLD) : percent < 1 ? cli_ink(stdout, CLI_DIM) : "";
}

cli_widths cli_fit(int node, int op, int others) {
  const int columns = cli_columns(STDOUT_FILENO);
  cli_widths w = {node < 4 ? 4 : node, op < 2 ? 2 : op};
  if (columns && w.node + 1 + w.op + 1 + others > columns) w.op = 0;
  if (columns && w.node + 1 + others > columns) w.node = columns - others - 1;
  if (w.node < 8) w.node = 8;
  return w;
}

/* Names are ASCII: bytes are columns. */
static void print_name(const char *name, int width) {
  if ((int)strlen(name) <= width)
    printf("%-*s ", width, name);
  else
    printf("%.*s… ", width - 1, name);
}

void cli_print_names(const char *node, const char *op, cli_widths w) {
  print_name(node, w.node);
  if (w.op) print_name(op, w.op);
}
