/* cli/io.c: small things every command needs: errors, JSON scalars, files, clocks. */
#include "cli.h"
#include <dirent.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

rg_status cli_fail(rg_error *e, rg_status status, const char *file, const char *format, ...) {
  if (!e || e->status != RG_OK) return status;
  *e = (rg_error){.status = status};
  if (file) snprintf(e->file, sizeof e->file, "%s", file);
  va_list args;
  va_start(args, format);
  vsnprintf(e->message, sizeof e->message, format, args);
  va_end(args);
  return status;
}

rg_status cli_nomem(rg_error *e) {
  return cli_fail(e, RG_E_NOMEM, NULL,
                  "out of host memory; free some, or --set smaller dimensions");
}

void cli_print_text(rg_text *text) {
  fwrite(text->data, 1, text->size, stdout);
  if (text->size && text->data[text->size - 1] != '\n') putchar('\n');
  rg_text_destroy(text);
}

/* Regular names of a folder, at most `most`; free each. */
static int names_in(const char *folder, char **name, int most) {
  DIR *d = opendir(folder);
  int n = 0;
  for (struct dirent *entry; d && n < most && (entry = readdir(d));)
    if (entry->d_name[0] != '.' && (name[n] = strdup(entry->d_name))) n++;
  if (d) closedir(d);
  return n;
}

/* Are two names alike without the ending that both have? With it 'a.json' would be like
 * 'b.json'. */
static bool near_stem(const char *a, const char *b) {
  const char *end = strrchr(a, '.'), *other = strrchr(b, '.');
  char stem[2][PATH_MAX];
  if (!end || !other || strcmp(end, other) != 0) return true;
  snprintf(stem[0], sizeof stem[0], "%.*s", (int)(end - a), a);
  snprintf(stem[1], sizeof stem[1], "%.*s", (int)(other - b), b);
  const char *const one = stem[1];
  return rg_nearest(stem[0], &one, 1) != NULL;
}

void cli_suggest_file(rg_error *e, const char *path) {
  enum { MOST = 1000 };
  char folder[PATH_MAX], *name[MOST], longer[PATH_MAX];
  const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
  if (e->status != RG_E_IO || !*base || access(path, F_OK) == 0) return;
  snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash + 1 - path) : 1, slash ? path : ".");
  const int n = names_in(folder, name, MOST);
  const char *near = NULL;
  snprintf(longer, sizeof longer, "%s.json", base);
  for (int i = 0; i < n && !near; i++)
    if (strcmp(name[i], longer) == 0) near = name[i];
  if (!near) near = rg_nearest(base, (const char *const *)name, n);
  if (near && !near_stem(base, near)) near = NULL;
  const size_t size = strlen(e->message);
  char shown[256];
  if (near)
    snprintf(e->message + size, sizeof e->message - size, "; did you mean '%.*s%s'?",
             slash ? (int)(slash + 1 - path) : 0, path, rg_printable(near, shown, sizeof shown));
  for (int i = 0; i < n; i++) free(name[i]);
}

/* Bytes of the UTF-8 character at `p`, 0 where there is none. */
static size_t utf8(const unsigned char *p) {
  char one[5] = "", shown[24];
  for (size_t n = 0; n < 4 && p[n] && (n == 0 || (p[n] & 0xc0) == 0x80); n++) {
    one[n] = (char)p[n];
    if (strcmp(rg_printable(one, shown, sizeof shown), one) == 0) return n + 1;
  }
  return 0;
}

/* A path may be any bytes, JSON is UTF-8: what is none stands as in messages, \xff. */
void cli_json_string(FILE *f, const char *text) {
  fputc('"', f);
  size_t n;
  for (const unsigned char *p = (const unsigned char *)text; *p; p += n) {
    n = *p < 128 ? 1 : utf8(p);
    if (*p == '"' || *p == '\\')
      fprintf(f, "\\%c", *p);
    else if (*p < 32)
      fprintf(f, "\\u%04x", *p);
    else if (n > 0)
      fwrite(p, 1, n, f);
    else
      fprintf(f, "\\\\x%02x", *p);
    n += n == 0;
  }
  fputc('"', f);
}

void cli_json_number(FILE *f, double x) {
  if (isfinite(x))
    fprintf(f, "%.9g", x);
  else
    fputs("null", f);
}

int cli_thread_start(pthread_t *thread, void *(*run)(void *), void *arg) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int code = pthread_create(thread, NULL, run, arg);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return code;
}

double cli_seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

bool cli_split(const char *text, char *name, size_t size, const char **rest) {
  const char *eq = strchr(text, '=');
  if (!eq || eq == text || !eq[1] || (size_t)(eq - text) >= size) return false;
  for (const char *p = text; p < eq; p++)
    if (*p == ' ' || *p == '\t') return false;
  memcpy(name, text, (size_t)(eq - text));
  name[eq - text] = 0;
  *rest = eq + 1;
  return true;
}

int cli_threads(const cli *c) {
  if (c->args.threads > 0) return c->args.threads > 1024 ? 1024 : (int)c->args.threads;
  long n = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#endif
  return n < 1 ? 1 : (int)n;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

double cli_median(double *x, int n) {
  if (n == 0) return 0;
  qsort(x, (size_t)n, sizeof *x, by_value);
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}
