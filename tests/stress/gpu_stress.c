/* tests/stress/gpu_stress.c: do bits ever change? One process of the stress run;
 * tests/gpu_stress.sh starts many at once on one GPU, because work of other processes moves warps
 * and blocks against each other as nothing inside one process does.
 *
 *   gpu_stress [--device cuda|cpu] [--seconds S] [--case PART] [--seed N] [--order N] [--fresh]
 *              [--small] [--examples FOLDER] [--dump FOLDER] [--flip RUN] [--list]
 *
 * The process walks through the cases (cases.c) round and round, from a place that --order picks,
 * so that at any time different kernels share the GPU. A visit makes a plan in one of several ways
 * (kept, recomputed, heads cut, forward alone, step by step) and runs it a few times, in every
 * other round of ways with a new session at new addresses for each run (--fresh: always). Whatever
 * the way, the first result of a tensor in the process is what all later ones are compared with,
 * bit for bit. At the end a line for each case has the first results' hashes, for comparison with
 * other processes, each of which began in another way:
 *
 *   case NAME runs N differ N TENSOR=HASH:DIFFER …
 *
 * What differs is printed as it is found: tensor, rows, first values; then the same for what the
 * session still holds from inside the graph, which says where it began. --dump also writes these
 * tensors and the inputs to files. Every case is visited at least once; --seconds 0: once, one run.
 * --flip turns one bit over in what run RUN has brought back, however long that takes, to show that
 * it would be seen. A case that the GPU's limits don't take is left out, and said. Exit code 1:
 * something differed, 2: something failed.
 */
#include "exec/plan.h"
#include "stress.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
  MOST_TENSORS = 64,
  MOST_RUNS = 8,
  SHOWN = 4 /* differing runs of a case that are printed */
};
static const double VISIT_SECONDS = 0.15;

/* ---- ways to run a case ---- */

#define POLICY(rest) "{ \"regraph_policy\": 1, " rest " }"
static const struct way {
  const char *name, *policy; /* NULL: everything kept */
  bool eager, no_grad;
} ways[] = {
    {"kept", NULL, false, false},
    {"kept, eager", NULL, true, false},
    {"recomputed", POLICY("\"preset\": \"all\""), false, false},
    {"forward alone", NULL, false, true},
    {"heads cut", POLICY("\"preset\": \"all\", \"split_heads\": 1"), false, false},
    {"recomputed, eager", POLICY("\"preset\": \"all\""), true, false},
};
enum { WAYS = sizeof ways / sizeof *ways };

/* ---- state ---- */

typedef struct input {
  rg_tensor_info info; /* without name */
  char name[64];
  void *data;
} input;

/* A tensor as it was first. */
typedef struct result {
  rg_tensor_info info; /* info.name is `name` */
  char name[64];
  bool inside; /* not bound: a saved tensor of the graph */
  void *was;
  uint64_t hash;
  long differ;
} result;

typedef struct visited {
  const stress_case *c;
  stress_shape shape;
  rg_spec *spec;
  rg_plan *plan[WAYS];
  bool refused[WAYS], left_out; /* the GPU's limits don't take it */
  input input[MOST_TENSORS];
  result result[4 * MOST_TENSORS];
  int ninput, nresult;
  long visits, runs, differ;
} visited;

static struct options {
  const char *device, *part, *examples, *dump;
  double seconds;
  long seed, order, flip;
  bool fresh, small, list;
} options = {
    .device = "cuda", .examples = RG_SOURCE_DIR "/examples", .seconds = 10, .seed = 1, .flip = -1};

static rg_context *ctx;
static long runs;          /* of the process */
static uint64_t addresses; /* random state: new addresses */
static void *got;          /* what a run brought back */
static size_t got_size;

static void fail(const char *format, ...) {
  va_list args;
  va_start(args, format);
  vprintf(format, args);
  va_end(args);
  printf("\n");
  exit(2);
}
static void check(rg_status status, const rg_error *e, const char *what) {
  char line[1024];
  if (status == RG_OK) return;
  rg_error_format(e, line, sizeof line);
  fail("FAILED %s: %s", what, line);
}
static void *allocate(size_t bytes) {
  void *p = malloc(bytes + 8);
  if (!p) fail("FAILED: no memory for %zu bytes", bytes);
  return p;
}
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}
static uint32_t draw(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*state >> 33);
}

/* ---- plans ---- */

static void open_spec(visited *v) {
  char path[1024];
  rg_error e = {0};
  stress_shape_of(v->c, options.small, &v->shape);
  snprintf(path, sizeof path, "%s/%s.json", options.examples, v->c->spec);
  check(rg_spec_load_file(ctx, path, v->shape.set, (size_t)v->shape.nset, &v->spec, &e), &e,
        v->c->name);
}

/* NULL: the spec has nothing that the policy could do, or the case is left out. */
static rg_plan *make_plan(visited *v, const struct way *w, const char *device) {
  rg_error e = {0};
  rg_policy *policy = NULL;
  rg_plan *plan = NULL;
  const rg_binding set[] = {{"T", v->shape.T, NULL}, {"B", v->shape.B, NULL}};
  const rg_plan_options o = {.set = set,
                             .nset = 2,
                             .device = device,
                             .threads = 1,
                             .no_grad = w->no_grad,
                             .pack_seconds = 0.05};
  if (w->policy)
    check(rg_policy_load_text(ctx, w->policy, strlen(w->policy), "policy", &policy, &e), &e,
          w->name);
  const rg_status status = rg_plan_create(v->spec, policy, &o, &plan, &e);
  rg_policy_destroy(policy);
  if (status == RG_E_LIMIT) {
    printf("left out %s: %s\n", v->c->name, e.message);
    v->left_out = true;
  } else if (status != RG_E_POLICY) {
    check(status, &e, v->c->name);
  }
  return plan;
}

static rg_plan *plan_of(visited *v, int way) {
  if (!v->spec) open_spec(v);
  if (!v->plan[way] && !v->refused[way]) {
    v->plan[way] = make_plan(v, &ways[way], options.device);
    v->refused[way] = !v->plan[way];
  }
  return v->plan[way];
}

/* ---- one session and its buffers ---- */

typedef struct live {
  rg_session *session;
  rg_tensor_info info[MOST_TENSORS];
  const void *from[MOST_TENSORS]; /* what it holds before a run */
  void *block[MOST_TENSORS], *at[MOST_TENSORS];
  int n;
} live;

static const void *input_data(visited *v, const rg_tensor_info *t) {
  for (int i = 0; i < v->ninput; i++)
    if (v->input[i].info.role == t->role && strcmp(v->input[i].name, t->name) == 0)
      return v->input[i].data;
  if (v->ninput == MOST_TENSORS) fail("FAILED %s: too many tensors", v->c->name);
  input *x = &v->input[v->ninput++];
  *x = (input){.info = *t, .data = allocate((size_t)t->bytes)};
  snprintf(x->name, sizeof x->name, "%s", t->name);
  x->info.name = x->name;
  stress_fill(t, &v->shape, v->c->pattern, (uint64_t)options.seed, x->data);
  return x->data;
}

/* New memory in random order, each tensor some way into its block. */
static void open_live(visited *v, int way, live *x) {
  const rg_plan *plan = v->plan[way];
  rg_error e = {0};
  *x = (live){0};
  while (rg_plan_tensor(plan, (size_t)x->n, &x->info[x->n]) == RG_OK)
    if (++x->n == MOST_TENSORS) fail("FAILED %s: too many tensors", v->c->name);
  int order[MOST_TENSORS];
  for (int i = 0; i < x->n; i++) {
    const int k = (int)(draw(&addresses) % (uint32_t)(i + 1));
    order[i] = order[k], order[k] = i;
  }
  for (int k = 0; k < x->n; k++) {
    const int i = order[k];
    const rg_tensor_info *t = &x->info[i];
    const size_t into = 256 * (size_t)(draw(&addresses) % 64);
    check(rg_memory_alloc(plan, (size_t)t->bytes + into + 16, &x->block[i], &e), &e, v->c->name);
    x->at[i] = (char *)x->block[i] + into;
    if (t->role == RG_INPUT || t->role == RG_GRAD_IN || t->accumulates) {
      x->from[i] = input_data(v, t);
      check(rg_memory_write(plan, x->at[i], x->from[i], (size_t)t->bytes, &e), &e, v->c->name);
    }
  }
  const rg_session_options so = {.eager = ways[way].eager};
  check(rg_session_create(plan, &so, &x->session, &e), &e, v->c->name);
  for (int i = 0; i < x->n; i++)
    check(rg_session_bind(x->session, x->info[i].role, x->info[i].name, x->at[i],
                          (size_t)x->info[i].bytes, &e),
          &e, v->c->name);
}

static void close_live(const rg_plan *plan, live *x) {
  rg_session_destroy(x->session);
  for (int i = 0; i < x->n; i++) rg_memory_free(plan, x->block[i]);
}

static void run(const rg_plan *plan, int way, live *x, const char *what) {
  rg_error e = {0};
  for (int i = 0; i < x->n; i++) /* sums start anew */
    if (x->info[i].accumulates)
      check(rg_memory_write(plan, x->at[i], x->from[i], (size_t)x->info[i].bytes, &e), &e, what);
  check(rg_session_forward(x->session, &e), &e, what);
  if (!ways[way].no_grad) check(rg_session_backward(x->session, &e), &e, what);
  check(rg_session_synchronize(x->session, &e), &e, what);
}

/* ---- comparing ---- */

static result *find_result(visited *v, const char *name, bool inside) {
  for (int i = 0; i < v->nresult; i++)
    if (v->result[i].inside == inside && strcmp(v->result[i].name, name) == 0) return &v->result[i];
  return NULL;
}

static void first_result(visited *v, const rg_tensor_info *t, const char *name, bool inside) {
  if (v->nresult == 4 * MOST_TENSORS) fail("FAILED %s: too many tensors", v->c->name);
  result *r = &v->result[v->nresult++];
  *r = (result){.info = *t, .inside = inside, .was = allocate((size_t)t->bytes)};
  snprintf(r->name, sizeof r->name, "%s", name);
  r->info.name = r->name;
  memcpy(r->was, got, (size_t)t->bytes);
  r->hash = stress_hash(got, (size_t)t->bytes);
}

static void write_file(const visited *v, const char *name, const char *which, const void *data,
                       int64_t bytes) {
  char path[1200];
  snprintf(path, sizeof path, "%s/%s.%ld.%s.%s", options.dump, v->c->name, options.order, name,
           which);
  for (char *p = path + strlen(options.dump) + 1; *p; p++)
    if (*p == '/') *p = '-';
  FILE *f = fopen(path, "wb");
  if (!f || fwrite(data, 1, (size_t)bytes, f) != (size_t)bytes) fail("FAILED to write %s", path);
  fclose(f);
}

/* `got` against what r was. True: it differs, and that has been said. */
static bool differs(const visited *v, result *r, bool say) {
  if (memcmp(r->was, got, (size_t)r->info.bytes) == 0) return false;
  r->differ++;
  if (!say) return true;
  stress_differ(&r->info, &v->shape, r->name, r->was, got);
  if (options.dump) {
    write_file(v, r->name, "was", r->was, r->info.bytes);
    write_file(v, r->name, "is", got, r->info.bytes);
  }
  return true;
}

static void make_room(int64_t bytes) {
  if ((size_t)bytes <= got_size) return;
  free(got);
  got = allocate(got_size = (size_t)bytes);
}

/* Tensors of the graph that live in the saved block: kept in a way's first run, compared in one
 * that differs.
 */
static void look_inside(visited *v, int way, const live *x, bool compare) {
  const rgi_graph *g = v->plan[way]->graph;
  for (int i = 0; i < g->ntensor; i++) {
    const rgi_tensor *t = &g->tensor[i];
    rg_tensor_info info = {.dtype = t->dtype, .rank = t->rank, .bytes = rgi_bytes(t)};
    rg_error e = {0};
    result *r = find_result(v, t->name, true);
    if (g->tensor[rgi_owner(g, i)].region != RGI_R_SAVED || rgi_owner(g, i) != i || !r != !compare)
      continue;
    for (int a = 0; a < t->rank; a++) info.dim[a] = t->dim[a].c;
    make_room(info.bytes);
    check(rg_session_read(x->session, t->name, got, (size_t)info.bytes, &e), &e, v->c->name);
    if (!compare)
      first_result(v, &info, t->name, true);
    else if (r->info.bytes == info.bytes)
      differs(v, r, true);
  }
}

static void say_what(const visited *v, int way, bool fresh) {
  printf("DIFFER %s, process %ld, run %ld, %s, %s\n", v->c->name, options.order, v->runs,
         ways[way].name, fresh ? "new addresses" : "same addresses");
}

static void compare(visited *v, int way, const live *x, bool fresh, bool look) {
  bool any = false, flipped = options.flip != runs;
  for (int i = 0; i < x->n; i++) {
    const rg_tensor_info *t = &x->info[i];
    char tag[64];
    rg_error e = {0};
    if (t->role != RG_OUTPUT && t->role != RG_GRAD_OUT) continue;
    snprintf(tag, sizeof tag, "%s%s", t->role == RG_OUTPUT ? "" : "d.", t->name);
    make_room(t->bytes);
    check(rg_memory_read(v->plan[way], got, x->at[i], (size_t)t->bytes, &e), &e, v->c->name);
    if (!flipped && t->bytes > 0) ((char *)got)[t->bytes / 2] ^= 1, flipped = true;
    result *r = find_result(v, tag, false);
    if (!r) {
      first_result(v, t, tag, false);
      continue;
    }
    const bool say = v->differ < SHOWN;
    if (!any && say && memcmp(r->was, got, (size_t)t->bytes) != 0) say_what(v, way, fresh);
    any |= differs(v, r, say);
  }
  if (look || (any && v->differ < SHOWN)) look_inside(v, way, x, any);
  if (any && options.dump)
    for (int i = 0; i < v->ninput; i++)
      write_file(v, v->input[i].name, v->input[i].info.role == RG_INPUT ? "in" : "grad",
                 v->input[i].data, v->input[i].info.bytes);
  v->differ += any;
}

static void visit(visited *v) {
  if (v->left_out) return;
  const long i = options.order + v->visits++;
  int way = (int)(i % WAYS);
  while (!v->plan[way] && v->refused[way]) way = (way + 1) % WAYS;
  const bool fresh = options.fresh || i / WAYS % 2 == 0, first = !v->plan[way];
  rg_plan *plan = plan_of(v, way);
  if (!plan) { /* the next way, this time and from now on */
    visit(v);
    return;
  }
  live x;
  const double end = now() + (options.seconds > 0 ? VISIT_SECONDS : 0);
  for (int k = 0; k < MOST_RUNS && (k == 0 || now() < end); k++, v->runs++, runs++) {
    if (k > 0 && fresh) close_live(plan, &x);
    if (k == 0 || fresh) open_live(v, way, &x);
    run(plan, way, &x, v->c->name);
    compare(v, way, &x, fresh, first && k == 0);
  }
  close_live(plan, &x);
}

/* ---- the whole ---- */

static void list_case(visited *v) {
  open_spec(v);
  rg_plan *plan = make_plan(v, &ways[0], "cuda");
  if (v->left_out) return;
  if (!plan) fail("FAILED %s: no plan", v->c->name);
  printf("%s: %s, %lld tokens in %lld sequences, %s\n", v->c->name, v->c->spec,
         (long long)v->shape.T, (long long)v->shape.B, v->c->dtype);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const char *path = rgi_plan_path(plan, i);
    if (path) printf("  %s: %s\n", plan->graph->node[plan->step[i].node].op->name, path);
  }
  rg_plan_destroy(plan);
}

static void close_visited(visited *v) {
  for (int w = 0; w < WAYS; w++) rg_plan_destroy(v->plan[w]);
  for (int i = 0; i < v->ninput; i++) free(v->input[i].data);
  for (int i = 0; i < v->nresult; i++) free(v->result[i].was);
  rg_spec_destroy(v->spec);
}

static void print_case(const visited *v) {
  printf("case %s runs %ld differ %ld", v->c->name, v->runs, v->differ);
  for (int i = 0; i < v->nresult; i++)
    if (!v->result[i].inside)
      printf(" %s=%016llx:%ld", v->result[i].name, (unsigned long long)v->result[i].hash,
             v->result[i].differ);
  printf("\n");
}

static const char *value(int argc, char **argv, int *i) {
  if (*i + 1 >= argc) fail("%s needs a value", argv[*i]);
  return argv[++*i];
}

static void parse(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (strcmp(a, "--device") == 0)
      options.device = value(argc, argv, &i);
    else if (strcmp(a, "--seconds") == 0)
      options.seconds = atof(value(argc, argv, &i));
    else if (strcmp(a, "--case") == 0)
      options.part = value(argc, argv, &i);
    else if (strcmp(a, "--seed") == 0)
      options.seed = atol(value(argc, argv, &i));
    else if (strcmp(a, "--order") == 0)
      options.order = atol(value(argc, argv, &i));
    else if (strcmp(a, "--flip") == 0)
      options.flip = atol(value(argc, argv, &i));
    else if (strcmp(a, "--examples") == 0)
      options.examples = value(argc, argv, &i);
    else if (strcmp(a, "--dump") == 0)
      options.dump = value(argc, argv, &i);
    else if (strcmp(a, "--fresh") == 0)
      options.fresh = true;
    else if (strcmp(a, "--small") == 0)
      options.small = true;
    else if (strcmp(a, "--list") == 0)
      options.list = true;
    else
      fail("gpu_stress: no option '%s'; see the head of tests/stress/gpu_stress.c", a);
  }
}

int main(int argc, char **argv) {
  rg_error e = {0};
  long differ = 0;
  int n = 0;
  parse(argc, argv);
  setvbuf(stdout, NULL, _IOLBF, 0);
  visited *all = calloc((size_t)stress_ncases, sizeof *all);
  if (!all) fail("FAILED: no memory");
  for (int i = 0; i < stress_ncases; i++)
    if (!options.part || strstr(stress_cases[i].name, options.part)) all[n++].c = &stress_cases[i];
  if (n == 0) fail("no case has '%s' in its name", options.part);
  check(rg_context_create(NULL, &ctx, &e), &e, "context");
  if (!options.list) check(rg_device_check(options.device, &e), &e, options.device);
  addresses = (uint64_t)options.order * 2654435761u + 1;
  const double end = now() + options.seconds;
  for (long i = 0; !options.list && (i < n || now() < end || runs <= options.flip); i++)
    visit(&all[(i + options.order * 7) % n]);
  for (int i = 0; i < n; i++) {
    if (options.list)
      list_case(&all[i]);
    else if (!all[i].left_out)
      print_case(&all[i]);
    differ += all[i].differ;
    close_visited(&all[i]);
  }
  rg_context_destroy(ctx);
  free(all);
  free(got);
  return differ > 0;
}
