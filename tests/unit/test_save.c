/* The command's files: written whole or not at all, whatever ends the writing. Linked with the
 * files of cli/ but main.c. */
#include "../../cli/cli.h"
#include "../../cli/npy.h"
#include "../../cli/save.h"
#include "scratch.h"
#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char *contents(const char *path) {
  static char text[64];
  FILE *f = fopen(path, "rb");
  if (!f) return NULL;
  text[fread(text, 1, sizeof text - 1, f)] = 0;
  fclose(f);
  return text;
}

static int entries(const char *dir) {
  int n = 0;
  DIR *d = opendir(dir);
  cr_assert(d);
  for (struct dirent *x; (x = readdir(d));)
    n += strcmp(x->d_name, ".") != 0 && strcmp(x->d_name, "..") != 0;
  closedir(d);
  return n;
}

static rg_status save_text(const char *path, const char *text) {
  cli c = {0};
  rg_status s = cli_write_file(&c, path, text, strlen(text));
  cr_assert_eq(c.write_failed, s != RG_OK);
  cr_assert_eq(c.error.status, s);
  return s;
}

Test(save, the_earlier_file_stays_until_the_new_one_is_there) {
  scratch s = begin();
  rg_error e = {0};
  put(&s, "old", 3);
  FILE *f = cli_save_begin(s.path, &e);
  cr_assert(f, "%s", e.message);
  fputs("new", f);
  fflush(f);
  cr_assert_str_eq(contents(s.path), "old");
  cr_assert_eq(entries(s.dir), 2);
  cr_assert_eq(cli_save_end(f, true, s.path, &e), RG_OK, "%s", e.message);
  cr_assert_str_eq(contents(s.path), "new");
  cr_assert_eq(entries(s.dir), 1);

  f = cli_save_begin(s.path, &e);
  fputs("half", f);
  errno = ENOSPC;
  cr_assert_eq(cli_save_end(f, false, s.path, &e), RG_E_IO);
  cr_assert(strstr(e.message, strerror(ENOSPC)), "%s", e.message);
  cr_assert_str_eq(e.file, s.path);
  cr_assert_str_eq(contents(s.path), "new");
  cr_assert_eq(entries(s.dir), 1);
  end(&s);
}

Test(save, a_size_limit_leaves_the_earlier_file) {
  scratch s = begin();
  rg_error e = {0};
  float x[4096] = {0};
  const int64_t dim[1] = {4096};
  struct rlimit limit;
  put(&s, "old", 3);
  signal(SIGXFSZ, SIG_IGN); /* as main does */
  getrlimit(RLIMIT_FSIZE, &limit);
  setrlimit(RLIMIT_FSIZE, &(struct rlimit){8192, limit.rlim_max});
  rg_status status = npy_write(s.path, RG_F32, 1, dim, x, &e);
  setrlimit(RLIMIT_FSIZE, &limit);
  cr_assert_eq(status, RG_E_IO);
  cr_assert(strstr(e.message, strerror(EFBIG)), "%s", e.message);
  cr_assert_str_eq(contents(s.path), "old");
  cr_assert_eq(entries(s.dir), 1);
  end(&s);
}

static void dies_while_writing(int number, bool ignored) {
  scratch s = begin();
  put(&s, "old", 3);
  pid_t child = fork();
  if (child == 0) {
    rg_error e = {0};
    signal(number, ignored ? SIG_IGN : SIG_DFL);
    FILE *f = cli_save_begin(s.path, &e);
    if (!f || fputs("new", f) < 0 || fflush(f) != 0) _exit(3);
    raise(number);
    _exit(cli_save_end(f, true, s.path, &e) == RG_OK ? 0 : 4);
  }
  int status;
  cr_assert_eq(waitpid(child, &status, 0), child);
  if (ignored) {
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "signal %d: %d", number, status);
    cr_assert_str_eq(contents(s.path), "new");
  } else {
    cr_assert(WIFSIGNALED(status) && WTERMSIG(status) == number, "signal %d: %d", number, status);
    cr_assert_str_eq(contents(s.path), "old");
  }
  cr_assert_eq(entries(s.dir), 1, "signal %d leaves a temporary file", number);
  end(&s);
}

Test(save, signals_leave_no_temporary_file) {
  static const int number[] = {SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM};
  for (size_t i = 0; i < sizeof number / sizeof *number; i++)
    for (int ignored = 0; ignored < 2; ignored++) dies_while_writing(number[i], ignored);
}

static void (*handler_of(int number))(int) {
  struct sigaction now;
  sigaction(number, NULL, &now);
  return now.sa_handler;
}

Test(save, signals_are_as_before_afterwards) {
  scratch s = begin();
  signal(SIGINT, SIG_IGN);
  cr_assert_eq(save_text(s.path, "x"), RG_OK);
  cr_assert_eq(handler_of(SIGINT), SIG_IGN);
  cr_assert_eq(handler_of(SIGTERM), SIG_DFL);
  cr_assert_eq(save_text("/nowhere/x", "x"), RG_E_IO);
  cr_assert_eq(handler_of(SIGTERM), SIG_DFL);
  end(&s);
}

static int mode_of(const char *path) {
  struct stat st;
  cr_assert_eq(stat(path, &st), 0);
  return st.st_mode & 07777;
}

Test(save, permissions) {
  scratch s = begin();
  umask(027);
  cr_assert_eq(save_text(s.path, "x"), RG_OK);
  cr_assert_eq(mode_of(s.path), 0640);
  cr_assert_eq(chmod(s.path, 0604), 0);
  cr_assert_eq(save_text(s.path, "y"), RG_OK);
  cr_assert_eq(mode_of(s.path), 0604);
  cr_assert_str_eq(contents(s.path), "y");
  if (geteuid() != 0) { /* root may write what nobody may */
    cr_assert_eq(chmod(s.path, 0444), 0);
    cr_assert_eq(save_text(s.path, "z"), RG_E_IO);
    cr_assert_str_eq(contents(s.path), "y");
  }
  end(&s);
}

Test(save, links_and_folders) {
  scratch s = begin();
  char link[96], chain[96], loop[96], away[96];
  snprintf(link, sizeof link, "%s/link", s.dir);
  snprintf(chain, sizeof chain, "%s/chain", s.dir);
  snprintf(loop, sizeof loop, "%s/loop", s.dir);
  snprintf(away, sizeof away, "%s/no/such", s.dir);
  cr_assert_eq(symlink("a.npy", link), 0);
  cr_assert_eq(symlink(link, chain), 0);
  cr_assert_eq(symlink("loop", loop), 0);
  cr_assert_eq(save_text(chain, "first"), RG_OK); /* a.npy is not there yet */
  cr_assert_str_eq(contents(s.path), "first");
  cr_assert_eq(save_text(link, "second"), RG_OK);
  cr_assert_str_eq(contents(s.path), "second");
  struct stat st;
  cr_assert(lstat(link, &st) == 0 && S_ISLNK(st.st_mode), "the link stays one");
  cr_assert(lstat(chain, &st) == 0 && S_ISLNK(st.st_mode));
  static const char *const none[] = {"", "/nowhere/x"};
  const char *bad[] = {none[0], none[1], loop, s.dir, away};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    cr_assert(cli_save_obstacle(bad[i]), "%s", bad[i]);
    cr_assert_eq(save_text(bad[i], "x"), RG_E_IO, "%s", bad[i]);
  }
  cr_assert_eq(entries(s.dir), 4);
  cr_assert_null(cli_save_obstacle(s.path));
  unlink(link);
  unlink(chain);
  unlink(loop);
  end(&s);
}

Test(save, devices_pipes_and_descriptors_as_they_are) {
  scratch s = begin();
  cr_assert_eq(save_text("/dev/null", "x"), RG_OK);
  struct stat st;
  cr_assert(stat("/dev/null", &st) == 0 && S_ISCHR(st.st_mode));
  int ends[2];
  char path[64], got[8] = "";
  cr_assert_eq(pipe(ends), 0);
  snprintf(path, sizeof path, "/dev/fd/%d", ends[1]);
  cr_assert_null(cli_save_obstacle(path));
  cr_assert_eq(save_text(path, "piped"), RG_OK);
  cr_assert_eq(read(ends[0], got, sizeof got - 1), 5);
  cr_assert_str_eq(got, "piped");
  put(&s, "old", 3);
  FILE *f = fopen(s.path, "r+b"); /* whoever holds the descriptor sees what is written to it */
  snprintf(path, sizeof path, "/dev/fd/%d", fileno(f));
  cr_assert_eq(save_text(path, "held"), RG_OK);
  cr_assert_eq(fread(got, 1, sizeof got - 1, f), 4);
  cr_assert_eq(memcmp(got, "held", 4), 0);
  fclose(f);
  cr_assert_eq(entries(s.dir), 1);
  end(&s);
}

Test(save, the_same_file) {
  scratch s = begin();
  char other[96], dotted[96], link[96];
  snprintf(other, sizeof other, "%s/b.npy", s.dir);
  snprintf(dotted, sizeof dotted, "%s/./a.npy", s.dir);
  snprintf(link, sizeof link, "%s/link", s.dir);
  cr_assert_eq(symlink("a.npy", link), 0);
  for (int there = 0; there < 2; there++) {
    if (there) put(&s, "x", 1);
    cr_assert(cli_save_same(s.path, s.path));
    cr_assert(cli_save_same(s.path, dotted));
    cr_assert(cli_save_same(link, s.path));
    cr_assert(!cli_save_same(s.path, other));
  }
  cr_assert(!cli_save_same("/dev/null", "/dev/null"), "a device takes any number of files");
  cr_assert(!cli_save_same("/nowhere/x", "/nowhere/x"), "an error of its own");
  unlink(link);
  end(&s);
}
