/* cli/save.c: see save.h. */
#include "save.h"
#include "cli.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- where a path leads ---- */

typedef struct target {
  char path[PATH_MAX]; /* its last component is no symbolic link */
  struct stat st;      /* of what is there */
  bool there;
  bool direct; /* written as it is */
} target;

/* The folder of a path, with its slash; "" for the working directory. */
static int folder_length(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash ? (int)(slash + 1 - path) : 0;
}

/* Does it name an open descriptor of a process? Its link tells a name, but it is the descriptor
 * that is meant. */
static bool is_descriptor(const char *path) {
  char folder[PATH_MAX], real[PATH_MAX];
  snprintf(folder, sizeof folder, "%.*s.", folder_length(path), path);
  return realpath(folder, real) && strncmp(real, "/proc/", 6) == 0;
}

/* Follows symbolic links, also to what does not exist yet. 0, or an errno. */
static int resolve(const char *path, target *t) {
  *t = (target){0};
  if (!*path) return ENOENT;
  if ((size_t)snprintf(t->path, sizeof t->path, "%s", path) >= sizeof t->path) return ENAMETOOLONG;
  for (int hops = 0; hops < 40; hops++) {
    char link[PATH_MAX], next[PATH_MAX];
    if (is_descriptor(t->path)) {
      t->there = t->direct = true;
      return stat(t->path, &t->st) == 0 ? 0 : errno;
    }
    if (lstat(t->path, &t->st) != 0) return errno == ENOENT ? 0 : errno;
    if (!S_ISLNK(t->st.st_mode)) {
      t->there = true;
      t->direct = !S_ISREG(t->st.st_mode);
      return S_ISDIR(t->st.st_mode) ? EISDIR : 0;
    }
    ssize_t n = readlink(t->path, link, sizeof link - 1);
    if (n < 0) return errno;
    link[n] = 0;
    int size = snprintf(next, sizeof next, "%.*s%s", link[0] == '/' ? 0 : folder_length(t->path),
                        t->path, link);
    if ((size_t)size >= sizeof next) return ENAMETOOLONG;
    memcpy(t->path, next, sizeof next);
  }
  return ELOOP;
}

static bool accessible(const target *t) {
  char folder[PATH_MAX];
  snprintf(folder, sizeof folder, "%.*s.", folder_length(t->path), t->path);
  return (!t->there || access(t->path, W_OK) == 0) &&
         (t->direct || access(folder, W_OK | X_OK) == 0);
}

const char *cli_save_obstacle(const char *path) {
  target t;
  int why = resolve(path, &t);
  if (why) return strerror(why);
  return accessible(&t) ? NULL : strerror(errno);
}

bool cli_save_same(const char *a, const char *b) {
  target s, t;
  if (resolve(a, &s) || resolve(b, &t) || s.there != t.there) return false;
  if (s.there)
    return S_ISREG(s.st.st_mode) && s.st.st_dev == t.st.st_dev && s.st.st_ino == t.st.st_ino;
  struct stat in, other; /* two new files: the same name in the same folder */
  int n = folder_length(s.path), m = folder_length(t.path);
  if (strcmp(s.path + n, t.path + m) != 0) return false;
  memcpy(s.path + n, ".", 2);
  memcpy(t.path + m, ".", 2);
  return stat(s.path, &in) == 0 && stat(t.path, &other) == 0 && in.st_dev == other.st_dev &&
         in.st_ino == other.st_ino;
}

/* ---- a temporary file that a signal takes along ---- */

static struct {
  char temp[PATH_MAX + 64];
  target to;
  volatile sig_atomic_t pending; /* temp is there, and ours */
} save;

/* What ends a program that does nothing about it. */
static const int fatal[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM};
enum { FATAL = sizeof fatal / sizeof *fatal };
static struct sigaction before[FATAL];

static void take_along(int number) {
  if (save.pending) unlink(save.temp);
  cli_progress_wipe();
  raise(number); /* blocked until this returns, then met by the default action */
}

static void catch_signals(void) {
  struct sigaction action = {.sa_handler = take_along, .sa_flags = (int)SA_RESETHAND};
  for (int i = 0; i < FATAL; i++)
    if (sigaction(fatal[i], NULL, &before[i]) == 0 && before[i].sa_handler != SIG_IGN)
      sigaction(fatal[i], &action, NULL);
}

static void release_signals(void) {
  for (int i = 0; i < FATAL; i++) sigaction(fatal[i], &before[i], NULL);
}

/* Signals wait meanwhile: a file that is there but not yet known to the handler would stay. */
static int open_temp(void) {
  sigset_t all, old;
  int fd = -1;
  sigfillset(&all);
  sigprocmask(SIG_SETMASK, &all, &old);
  for (int i = 0; i < 1000 && fd < 0; i++) {
    snprintf(save.temp, sizeof save.temp, "%.*s.regraph-%ld-%d.tmp", folder_length(save.to.path),
             save.to.path, (long)getpid(), i);
    fd = open(save.temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, save.to.there ? 0600 : 0666);
    if (fd < 0 && errno != EEXIST) break;
  }
  save.pending = fd >= 0;
  int why = errno;
  sigprocmask(SIG_SETMASK, &old, NULL);
  errno = why;
  return fd;
}

static FILE *give_up(int fd, const char *path, int why, rg_error *e) {
  if (fd >= 0) close(fd);
  if (save.pending) unlink(save.temp);
  save.pending = false;
  if (!save.to.direct) release_signals();
  cli_fail(e, RG_E_IO, path, "can't be written: %s", strerror(why));
  return NULL;
}

FILE *cli_save_begin(const char *path, rg_error *e) {
  int why = resolve(path, &save.to);
  save.pending = false;
  if (!why && !accessible(&save.to)) why = errno;
  if (why) {
    cli_fail(e, RG_E_IO, path, "can't be written: %s",
             *path ? strerror(why) : "the name of the file is empty");
    return NULL;
  }
  if (save.to.direct) {
    FILE *f = fopen(path, "wbe");
    if (!f) return give_up(-1, path, errno, e);
    return f;
  }
  catch_signals();
  int fd = open_temp();
  if (fd < 0) return give_up(fd, path, errno, e);
  if (save.to.there) {
    /* who may not give files away keeps it: a file with the right contents is worth more than its
     * owner */
    if (fchown(fd, save.to.st.st_uid, save.to.st.st_gid) != 0 &&
        fchown(fd, (uid_t)-1, save.to.st.st_gid) != 0)
      errno = 0;
    if (fchmod(fd, save.to.st.st_mode & 07777) != 0) return give_up(fd, path, errno, e);
  }
  FILE *f = fdopen(fd, "wb");
  return f ? f : give_up(fd, path, errno, e);
}

rg_status cli_save_end(FILE *f, bool written, const char *path, rg_error *e) {
  int why = errno;
  if (fclose(f) != 0 && written) {
    written = false;
    why = errno;
  }
  if (save.pending && written && rename(save.temp, save.to.path) != 0) {
    written = false;
    why = errno;
  }
  if (!written) {
    give_up(-1, path, why, e);
    return RG_E_IO;
  }
  save.pending = false;
  if (!save.to.direct) release_signals();
  return RG_OK;
}

/* ---- for the commands ---- */

rg_status cli_write_file(cli *c, const char *path, const char *data, size_t size) {
  c->write_failed = true;
  FILE *f = cli_save_begin(path, &c->error);
  if (!f) return RG_E_IO;
  rg_status s = cli_save_end(f, fwrite(data, 1, size, f) == size, path, &c->error);
  c->write_failed = s != RG_OK;
  return s;
}

rg_status cli_writable(cli *c, const char *path) {
  if (path && strcmp(path, "-") == 0)
    return cli_fail(
        &c->error, RG_E_USAGE, NULL,
        "'-' names no file to write: /dev/stdout is standard output, ./- a file that is "
        "called so");
  const char *why = path ? cli_save_obstacle(path) : NULL;
  if (!why) return RG_OK;
  c->write_failed = true;
  return cli_fail(&c->error, RG_E_IO, path, "can't be written: %s",
                  *path ? why : "the name of the file is empty");
}
