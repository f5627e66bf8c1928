/* cli/cmd_tune.c: `tune`: measures the ops of some specs on this machine and makes a profile of it.

   A job is a spec at one number of tokens. What it measured is added to a list beside the profile
   (FILE.tsv beside FILE.json) as soon as it is done, a line per node; a tune that finds a list that
   is not complete goes on where that ends. The profile is made from the whole list, at the end or
   when time is up.

       # regraph tune 1 <tab> device <tab> threads <tab> library version <tab> what --source says
       job <tab> node <tab> direction <tab> op <tab> kernels <tab> dtype <tab> flops <tab> exps …
       # end <tab> job
       # complete
 */
#include "peak.h"
#include "timing.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* The stock examples (cmake/embed.cmake). Of nsa_model every layer is nsa_layer. */
#define STOCK(f) \
  f(dense_causal) f(sliding_window) f(two_branch) f(moba) f(nsa) f(nsa_linear) f(nsa_layer)
#define DECLARE(name) extern const char *const cli_stock_##name;
STOCK(DECLARE)

enum { MOST_SIZES = 6, REPEAT = 25 };
static const int64_t gpu_size[MOST_SIZES] = {4096, 8192, 16384, 32768, 65536, 131072};
static const int64_t cpu_size[] = {256, 1024, 4096};
#define SECONDS_EACH 1.0

typedef struct job {
  const char *spec; /* as shown, and in the list */
  const char *text; /* NULL: spec is a file */
  int64_t tokens;   /* 0: bound by --set, or by the spec */
  char name[512];
  bool done;
} job;

typedef struct tune {
  cli *c;
  job *job;
  int njob;
  char *list; /* the list's path */
  char header[512];
  FILE *f; /* the list, to be added to */
  rg_measured *m;
  char **text; /* what m points to: a line each */
  size_t nm, room;
} tune;

/* ---- jobs ---- */

static bool sets(const cli *c, const char *name) {
  for (size_t i = 0; i < c->nset; i++)
    if (strcmp(c->set[i].name, name) == 0) return true;
  return false;
}

/* nsa T=4096 H=8 */
static void name_job(const cli *c, job *j) {
  const size_t size = strlen(j->spec); /* of a long path, the end: it tells files apart */
  size_t n = (size_t)snprintf(j->name, sizeof j->name, "%s%s", size > 300 ? "..." : "",
                              j->spec + (size > 300 ? size - 300 : 0));
  if (j->tokens)
    n += (size_t)snprintf(j->name + n, sizeof j->name - n, " T=%lld", (long long)j->tokens);
  for (size_t i = 0; i < c->nset && n < sizeof j->name; i++)
    n += (size_t)snprintf(j->name + n, sizeof j->name - n, " %.30s=%.30s", c->set[i].name,
                          c->set[i].text);
  for (char *p = j->name; *p; p++)
    if (*p == '\t' || *p == '\n') *p = '?';
}

/* Small ones first: what a time limit cuts off costs most. */
static rg_status list_jobs(tune *t) {
#define ENTRY(name) {#name, cli_stock_##name, 0, "", false},
  const job stock[] = {STOCK(ENTRY)};
  const cli *c = t->c;
  const bool gpu = cli_on_gpu(c), fixed = sets(c, "T");
  const int given = c->args.npositional;
  const int nspec = given ? given : (int)(sizeof stock / sizeof *stock);
  const int64_t *size = gpu ? gpu_size : cpu_size;
  const int nsize = fixed ? 1 : gpu ? MOST_SIZES : (int)(sizeof cpu_size / sizeof *cpu_size);
  t->job = calloc((size_t)(nspec * nsize), sizeof *t->job);
  if (!t->job) return cli_nomem(&t->c->error);
  for (int k = 0; k < nsize; k++)
    for (int i = 0; i < nspec; i++) {
      job *j = &t->job[t->njob++];
      if (given)
        j->spec = c->args.positional[i];
      else
        *j = stock[i];
      if (!fixed) j->tokens = size[k];
      name_job(c, j);
    }
  return RG_OK;
}

static double weight(const job *j) {
  return j->tokens ? (double)j->tokens : 1;
}

/* ---- the list ---- */

/* A line's fields, between tabs; the line is cut up. */
static int fields(char *line, char **field, int most) {
  int n = 0;
  for (char *p = line; n < most; p++) {
    field[n++] = p;
    p = strpbrk(p, "\t\n");
    if (!p || *p == '\n') {
      if (p) *p = 0;
      return n;
    }
    *p = 0;
  }
  return n;
}

static bool take_dtype(const char *name, rg_dtype *out) {
  for (int d = 0; d < RG_DTYPE_COUNT; d++)
    if (strcmp(rg_dtype_name((rg_dtype)d), name) == 0) {
      *out = (rg_dtype)d;
      return true;
    }
  return false;
}

/* Keeps the line. */
static rg_status add_line(tune *t, const char *line) {
  char *f[10];
  if (t->nm == t->room) {
    const size_t room = t->room ? 2 * t->room : 256;
    void *m = realloc(t->m, room * sizeof *t->m);
    if (m) t->m = m;
    void *text = m ? realloc(t->text, room * sizeof *t->text) : NULL;
    if (!text) return cli_nomem(&t->c->error);
    t->text = text;
    t->room = room;
  }
  char *copy = strdup(line);
  if (!copy) return cli_nomem(&t->c->error);
  rg_measured m = {0};
  const bool good = fields(copy, f, 10) == 10 && take_dtype(f[5], &m.dtype);
  if (!good) {
    free(copy); /* not ours: left alone */
    return RG_OK;
  }
  m.op = f[3];
  m.kernels = f[4];
  m.flops = strtod(f[6], NULL);
  m.exps = strtod(f[7], NULL);
  m.bytes = strtod(f[8], NULL);
  m.ms = strtod(f[9], NULL);
  if (!(m.ms > 0) || !isfinite(m.ms + m.flops + m.exps + m.bytes)) { /* nor is that */
    free(copy);
    return RG_OK;
  }
  t->text[t->nm] = copy;
  t->m[t->nm++] = m;
  return RG_OK;
}

static void drop_lines(tune *t, size_t from) {
  while (t->nm > from) free(t->text[--t->nm]);
}

static void note_done(tune *t, char *line) {
  char *f[2];
  if (fields(line, f, 2) != 2) return;
  for (int i = 0; i < t->njob; i++)
    if (strcmp(t->job[i].name, f[1]) == 0) t->job[i].done = true;
}

/* What an earlier tune left, if it was for the same and broke off. What follows the last job that
 * ended, perhaps half a line, is not counted; `keep` is where it begins. */
static rg_status read_list(tune *t, long *keep) {
  char line[2048];
  rg_status s = RG_OK;
  size_t whole = 0;
  bool complete = false;
  *keep = 0;
  if (!fgets(line, sizeof line, t->f)) return RG_OK;
  if (strncmp(line, "# regraph tune ", 15) != 0)
    return cli_fail(&t->c->error, RG_E_USAGE, t->list,
                    "measurements are kept here, and this is something else; move it, or name "
                    "another --profile-out");
  if (strcmp(line, t->header) != 0) return RG_OK;
  long end = ftell(t->f);
  while (s == RG_OK && fgets(line, sizeof line, t->f)) {
    if (!strchr(line, '\n')) break;
    complete = strcmp(line, "# complete\n") == 0;
    if (strncmp(line, "# end\t", 6) == 0) {
      note_done(t, line);
      whole = t->nm;
      end = ftell(t->f);
    } else if (line[0] != '#') {
      s = add_line(t, line);
    }
  }
  if (!complete) *keep = end;
  drop_lines(t, *keep ? whole : 0);
  for (int i = 0; i < t->njob && !*keep; i++) t->job[i].done = false;
  return s;
}

static rg_status cant_write(tune *t) {
  t->c->write_failed = true;
  return cli_fail(&t->c->error, RG_E_IO, t->list, "can't be written: %s", strerror(errno));
}

/* One tune at a time has the list; where a file system knows no locks, that is up to the user. */
static rg_status open_list(tune *t) {
  long keep;
  char source[512];
  rg_printable(t->c->args.source ? t->c->args.source : "", source, sizeof source);
  snprintf(t->header, sizeof t->header, "# regraph tune 1\t%s\t%d\t%s\t%.200s\n", t->c->args.device,
           cli_on_gpu(t->c) ? 0 : cli_threads(t->c), rg_version(), source);
  const int fd = open(t->list, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (fd < 0) return cant_write(t);
  if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    close(fd);
    t->c->write_failed = true;
    return cli_fail(&t->c->error, RG_E_IO, t->list,
                    "another tune is writing it; wait for its end, or name another --profile-out");
  }
  if (!(t->f = fdopen(fd, "a+"))) {
    close(fd);
    return cant_write(t);
  }
  rewind(t->f);
  rg_status s = read_list(t, &keep);
  if (s != RG_OK) return s;
  if (ftruncate(fd, keep) != 0 || fseek(t->f, 0, SEEK_END) != 0) return cant_write(t);
  if ((!keep && fputs(t->header, t->f) < 0) || fflush(t->f) != 0) return cant_write(t);
  return RG_OK;
}

/* ---- measuring ---- */

static rg_status write_rows(tune *t, const job *j, cli *in, const timing *x) {
  rg_node_info n;
  char *text = NULL;
  size_t size = 0;
  FILE *f = open_memstream(&text, &size);
  if (!f) return cli_nomem(&t->c->error);
  rg_status s = RG_OK;
  for (size_t i = 0; rg_plan_node(in->plan, i, &n) == RG_OK && s == RG_OK; i++) {
    char line[1024];
    if (n.step < 0 || n.step >= x->nrow) continue;
    /* a GPU is nobody else's meanwhile; cores are, and that only slows */
    const timing_row *row = &x->row[n.step];
    const double ms = cli_on_gpu(in) ? row->median : row->ms[0];
    snprintf(line, sizeof line, "%s\t%s\t%s\t%s\t%s\t%s\t%.9g\t%.9g\t%.9g\t%.5g\n", j->name, n.name,
             n.backward ? "backward" : "forward", n.op, n.kernels ? n.kernels : "",
             rg_dtype_name(n.dtype), n.flops, n.exps, n.bytes, ms);
    fputs(line, f);
    s = add_line(t, line);
  }
  fprintf(f, "# end\t%s\n", j->name);
  if (fclose(f) != 0 && s == RG_OK) s = cli_nomem(&t->c->error);
  if (s == RG_OK && (fwrite(text, 1, size, t->f) != size || fflush(t->f) != 0)) s = cant_write(t);
  free(text);
  return s;
}

static rg_status load_spec(cli *in, const job *j) {
  rg_binding *set = calloc(in->nset + 1, sizeof *set);
  if (!set) return cli_nomem(&in->error);
  memcpy(set, in->set, in->nset * sizeof *set);
  size_t n = in->nset;
  if (j->tokens) set[n++] = (rg_binding){.name = "T", .value = j->tokens};
  rg_status s = j->text ? rg_spec_load_text(in->ctx, j->text, strlen(j->text), j->spec, set, n,
                                            &in->spec, &in->error)
                        : rg_spec_load_file(in->ctx, j->spec, set, n, &in->spec, &in->error);
  free(set);
  return s;
}

/* What is wrong with a spec shows before hours go by, not when its turn comes. */
static rg_status check_jobs(const tune *t) {
  rg_status s = RG_OK;
  for (int i = 0; i < t->njob && s == RG_OK; i++) {
    cli in = {.args = t->c->args, .ctx = t->c->ctx, .set = t->c->set, .nset = t->c->nset};
    s = load_spec(&in, &t->job[i]);
    if (s == RG_OK) s = rg_check(in.spec, NULL, &in.error);
    if (s != RG_OK) t->c->error = in.error;
    rg_spec_destroy(in.spec);
  }
  return s;
}

/* A job that finds no memory is left out, and the tune goes on. */
static rg_status run_job(tune *t, job *j) {
  const cli *c = t->c;
  timing x = {.data = {.small_weights = true}};
  cli in = {.args = c->args, .ctx = c->ctx, .set = c->set, .nset = c->nset, .quiet = true};
  in.args.positional[0] = j->spec;
  in.args.profile = "shipped"; /* so that a tune mends a profile which no plan can read */
  rg_status s = load_spec(&in, j);
  if (s == RG_OK) cli_default_sequences(&in);
  if (s == RG_OK) s = cli_make_plan(&in);
  bool fits = true;
  if (s == RG_OK) {
    s = cli_make_session(&in, cli_on_gpu(c));
    if (s == RG_OK) s = timing_prepare(&in, &x);
    fits = s != RG_E_NOMEM && s != RG_E_DEVICE;
  }
  if (s == RG_OK) s = timing_measure(&in, &x, false, SECONDS_EACH);
  if (s == RG_OK) s = write_rows(t, j, &in, &x);
  if (s != RG_OK) t->c->error = in.error;
  rg_session_destroy(in.session); /* before the memory it is bound to */
  timing_free(&in, &x);
  rg_plan_destroy(in.plan);
  rg_spec_destroy(in.spec);
  if (s == RG_OK || fits) return s;
  char line[1536];
  rg_error_format(&t->c->error, line, sizeof line);
  cli_progress_end(t->c);
  fprintf(stderr, "%s: left out: %s\n", j->name, line);
  t->c->error = (rg_error){0};
  return RG_OK;
}

static int left(const tune *t) {
  int n = 0;
  for (int i = 0; i < t->njob; i++) n += !t->job[i].done;
  return n;
}

static rg_status run_jobs(tune *t) {
  const double start = cli_seconds(), limit = t->c->args.time_limit;
  double done = 0, total = 0;
  rg_status s = RG_OK;
  for (int i = 0; i < t->njob; i++) total += t->job[i].done ? 0 : weight(&t->job[i]);
  for (int i = 0; i < t->njob && s == RG_OK; i++) {
    job *j = &t->job[i];
    if (j->done) continue;
    if (limit > 0 && done > 0 && cli_seconds() - start > limit) break; /* one job at least */
    cli_progress(t->c, "tuning", done, total);
    s = run_job(t, j);
    done += weight(j);
    j->done = s == RG_OK;
  }
  cli_progress_end(t->c);
  if (s == RG_OK && left(t) == 0 && (fputs("# complete\n", t->f) < 0 || fflush(t->f) != 0))
    return cant_write(t);
  return s;
}

/* ---- the profile ---- */

/* "AMD EPYC, 2 threads" */
static void name_cpu(const cli *c, char *name, size_t size) {
  char line[512], model[128] = "cpu";
  FILE *f = fopen("/proc/cpuinfo", "r");
  while (f && fgets(line, sizeof line, f))
    if (sscanf(line, "model name%*[^:]: %127[^\n]", model) == 1) break;
  if (f) fclose(f);
  snprintf(name, size, "%s, %d thread%s", model, cli_threads(c), cli_threads(c) == 1 ? "" : "s");
}

static rg_status save_profile(tune *t, const char *path) {
  cli *c = t->c;
  char source[128], date[16], cpu[192];
  const time_t now = time(NULL);
  struct tm day;
  rg_text text;
  peak_rates peak = {0};
  strftime(date, sizeof date, "%Y-%m-%d", gmtime_r(&now, &day));
  snprintf(source, sizeof source, "this machine, tuned %s with regraph %s", date, rg_version());
  name_cpu(c, cpu, sizeof cpu);
  if (!cli_on_gpu(c)) peak_measure(cli_threads(c), &peak);
  const rg_profile_options o = {.device = c->args.device,
                                .name = cli_on_gpu(c) ? NULL : cpu,
                                .source = c->args.source ? c->args.source : source,
                                .threads = (int)c->args.threads,
                                .matrix_gflops = peak.matrix_gflops,
                                .special_gops = peak.special_gops,
                                .bandwidth_gbs = peak.bandwidth_gbs};
  rg_status s = rg_profile_write(c->ctx, &o, t->m, t->nm, &text, &c->error);
  if (s != RG_OK) return s;
  s = cli_write_file(c, path, text.data, text.size);
  rg_text_destroy(&text);
  return s;
}

/* The folders above a file, where they are missing. */
static void make_folders(char *path) {
  for (char *p = strchr(path + 1, '/'); p; p = strchr(p + 1, '/')) {
    *p = 0;
    mkdir(path, 0777); /* what is wrong shows when the file is written */
    *p = '/';
  }
}

/* FILE.json → FILE.tsv */
static char *list_path(const char *profile) {
  size_t n = strlen(profile);
  char *path = malloc(n + 5);
  if (!path) return NULL;
  if (n > 5 && strcmp(profile + n - 5, ".json") == 0) n -= 5;
  snprintf(path, n + 5, "%.*s.tsv", (int)n, profile);
  return path;
}

static rg_status tune_into(tune *t, const char *path) {
  cli *c = t->c;
  rg_status s = cli_writable(c, path);
  if (s == RG_OK) s = cli_spare(c, "--profile-out", path);
  if (s == RG_OK) s = list_jobs(t);
  if (s == RG_OK) s = check_jobs(t);
  if (s == RG_OK && !(t->list = list_path(path))) s = cli_nomem(&c->error);
  if (s == RG_OK) s = open_list(t);
  if (s == RG_OK) s = run_jobs(t);
  if (s != RG_OK) return s;
  const int missing = left(t);
  if (t->nm) s = save_profile(t, path);
  if (s != RG_OK) return s;
  if (missing)
    printf("%d of %d jobs measured when time was up; the same command goes on\n", t->njob - missing,
           t->njob);
  if (t->nm)
    printf("%zu nodes of %d job%s measured, one by one in %s; profile in %s\n", t->nm,
           t->njob - missing, t->njob - missing == 1 ? "" : "s", t->list, path);
  return RG_OK;
}

rg_status cli_cmd_tune(cli *c) {
  tune t = {.c = c};
  if (!c->args.repeat) c->args.repeat = REPEAT;
  char path[1024];
  const char *to = c->args.profile_out;
  rg_status s = cli_open(c);
  if (s == RG_OK) s = cli_require_runner(c);
  if (s == RG_OK) s = cli_parse_set(c);
  if (s == RG_OK && !to) {
    s = rg_profile_path(c->args.device, path, sizeof path, &c->error);
    if (s == RG_OK) make_folders(path);
    to = path;
  }
  if (s == RG_OK) s = tune_into(&t, to);
  if (t.f) fclose(t.f);
  drop_lines(&t, 0);
  free(t.m);
  free(t.text);
  free(t.list);
  free(t.job);
  return s;
}
