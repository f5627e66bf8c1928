/* cli/progress.c: the line that says what is waited for, how far it is and how long it will take.

   One line on standard error, if that is a terminal that can draw a line anew (TERM is not dumb):
   there is one of it, hence the static state. A thread of its own draws it again and again, so that
   a call that says nothing for a while still shows that time passes. How long is left follows from
   what was said of done and total, or from what the stage was expected to take.
 */
#include "cli.h"
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const double patience = 2, redraw = 0.1; /* seconds */

static struct {
  pthread_mutex_t lock;
  pthread_cond_t wake;
  pthread_t thread;
  volatile sig_atomic_t shown; /* handlers ask */
  bool ticking, quit;
  struct sigaction before; /* of SIGINT */
  char stage[64];
  double from;            /* when the stage began */
  double done, total, at; /* what was last said, and when */
  double expected;        /* seconds for the stage; 0: not known … */
  bool most;              /* … and no more than that */
  double drawn;
} line = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

void cli_progress_wipe(void) {
  static const char clear[] = "\r\033[K";
  if (line.shown && write(STDERR_FILENO, clear, sizeof clear - 1) < 0) { /* nothing left to do */
  }
}

/* Ctrl-C dies as ever, and takes the line with it. */
static void clear_line(int number) {
  cli_progress_wipe();
  raise(number); /* blocked until this returns, then met by the default action */
}

/* "95 s", "3 min 20 s", "2 h 05 min" */
static const char *duration(double seconds, char buffer[32]) {
  const long s = (long)(seconds + 0.5);
  if (s < 120)
    snprintf(buffer, 32, "%ld s", s);
  else if (s < 7200)
    snprintf(buffer, 32, "%ld min %02ld s", s / 60, s % 60);
  else
    snprintf(buffer, 32, "%ld h %02ld min", s / 3600, s % 3600 / 60);
  return buffer;
}

void cli_progress_text(const cli_wait *w, char *text, size_t size) {
  char a[32], b[32];
  size_t n = 0;
  const bool told = w->total > 0 && w->done > 0;
  double left = -1;
  if (told)
    n = (size_t)snprintf(text, size, "%s %3.0f %%", w->stage, 100 * w->done / w->total);
  else
    n = (size_t)snprintf(text, size, "%s%s", w->stage, w->passed <= patience ? " ..." : "");
  if (n >= size || w->passed <= patience) return;
  if (told)
    left = w->said * (w->total - w->done) / w->done - (w->passed - w->said);
  else if (w->expected > 0 && !w->most)
    left = w->expected - w->passed;
  duration(w->passed, a);
  if (left >= 0.5)
    snprintf(text + n, size - n, ", %s%s left", told ? "" : "about ", duration(left, a));
  else if (!told && w->expected > 0)
    snprintf(text + n, size - n, " %s%s %s%s", a, w->most ? " of at most" : ", longer than the",
             duration(w->expected, b), w->most ? "" : " expected");
  else
    snprintf(text + n, size - n, " %s", a);
}

static void draw(double now) {
  char text[256];
  const int width = cli_columns(STDERR_FILENO);
  cli_progress_text(&(cli_wait){.stage = line.stage,
                                .passed = now - line.from,
                                .done = line.done,
                                .total = line.total,
                                .said = line.at - line.from,
                                .expected = line.expected,
                                .most = line.most},
                    text, sizeof text);
  if (width > 0 && (size_t)width <= strlen(text)) text[width - 1] = 0; /* one row, or \r fails */
  fprintf(stderr, "\r\033[K%s", text);
  fflush(stderr);
  line.drawn = now;
}

static void *tick(void *arg) {
  pthread_mutex_lock(&line.lock);
  while (!line.quit) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_nsec += 500000000;
    if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&line.wake, &line.lock, &t);
    const double now = cli_seconds();
    if (!line.quit && now - line.drawn >= redraw) draw(now);
  }
  pthread_mutex_unlock(&line.lock);
  return arg;
}

static void begin(void) {
  sigaction(SIGINT, NULL, &line.before);
  if (line.before.sa_handler != SIG_IGN)
    sigaction(SIGINT, &(struct sigaction){.sa_handler = clear_line, .sa_flags = SA_RESETHAND},
              NULL);
  line.shown = 1;
  line.quit = false;
  line.ticking = cli_thread_start(&line.thread, tick, NULL) == 0;
}

static void say(const char *stage, double done, double total, double expected, bool most) {
  const double now = cli_seconds();
  pthread_mutex_lock(&line.lock);
  const bool fresh = !line.shown || strcmp(line.stage, stage) != 0;
  if (fresh) {
    snprintf(line.stage, sizeof line.stage, "%s", stage);
    line.from = now;
    line.expected = 0;
  }
  line.done = done;
  line.total = total;
  line.at = now;
  if (expected > 0) {
    line.expected = expected;
    line.most = most;
  }
  if (!line.shown) begin();
  if (fresh || now - line.drawn >= redraw) draw(now); /* ten a second are enough for an eye */
  pthread_mutex_unlock(&line.lock);
}

static bool wanted(const cli *c) {
  const char *term = getenv("TERM");
  return !c->quiet && isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
}

void cli_progress(void *user, const char *stage, double done, double total) {
  const cli *c = user;
  if (wanted(c)) say(stage, done, total, 0, false);
}

void cli_progress_expect(const cli *c, const char *stage, double seconds, bool most) {
  if (wanted(c)) say(stage, 0, 0, seconds, most);
}

void cli_progress_end(const cli *c) {
  if (c->quiet || !line.shown) return;
  pthread_mutex_lock(&line.lock);
  line.quit = true;
  pthread_cond_signal(&line.wake);
  pthread_mutex_unlock(&line.lock);
  if (line.ticking) pthread_join(line.thread, NULL);
  line.shown = 0;
  line.ticking = false;
  fputs("\r\033[K", stderr);
  fflush(stderr);
  sigaction(SIGINT, &line.before, NULL);
}
