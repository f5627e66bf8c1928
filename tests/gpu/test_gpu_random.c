/* tests/gpu/test_gpu_random.c: random specs with heads, groups, blocks and windows as models have
   them, on packs of random lengths, against the fp64 oracle.

   Each seed draws a graph (tests/harness/graph_gen.h), lengths, and two or three other ways to run
   it: as a CUDA graph or step by step, recomputing and cutting heads at random, every tensor with
   bytes of its own, one lane. The plain way is compared with the oracle, the others with it, bit
   for bit. In one more way a sequence is full of NaN, which must change no bit of any other, and in
   one a sequence is on its own. Lengths shrink until the oracle is done in a fraction of a second.

     REGRAPH_SHARD=i/n     every n-th seed       GRAPH_MORE=k   k times as many
     REGRAPH_SEED=n        that seed alone       GRAPH_PRINT=1  its spec
     REGRAPH_FIRST=n       seeds from n on
 */
#include "tests/unit/graph_case.h"
#include "exec/plan.h"
#include "tests/harness/graph_gen.h"

#include <setjmp.h>
#include <time.h>

enum { FIRST = 60000, SPECS = 256, MOST_SEQUENCES = 24, LONGEST = 4000 };
static const double ORACLE_NS = 3e8;

static double seconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- lengths ---- */

typedef struct lengths {
  int64_t B;
  int q[MOST_SEQUENCES], k[MOST_SEQUENCES], offset[MOST_SEQUENCES];
} lengths;

static int one_length(ot *t, double mean) {
  static const int special[] = {0, 0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 507};
  const double u = ot_uniform(t);
  if (u < 0.35) {
    int n = special[ot_below(t, (int64_t)(sizeof special / sizeof *special))];
    if (n < 3 * mean + 3) return n;
  }
  return (int)(mean * 2 * ot_uniform(t));
}

/* About `total` tokens. Keys of their own are as many as the queries' and what came before them, or
 * more, or (not if `whole`: a choice among blocks is of those up to the query's own) any number. */
static lengths draw_lengths(ot *t, double total, bool whole) {
  static const int64_t sequences[] = {1, 1, 2, 2, 3, 5, 8, 13, MOST_SEQUENCES};
  lengths x = {.B = sequences[ot_below(t, 9)]};
  for (int64_t b = 0; b < x.B; b++) {
    x.q[b] = one_length(t, total / (double)x.B);
    const bool chunk = whole || ot_uniform(t) < 0.6;
    x.offset[b] = (int)ot_below(t, chunk ? 200 : 20);
    x.k[b] = chunk ? x.q[b] + x.offset[b] + (ot_below(t, 5) ? 0 : (int)ot_below(t, 70))
                   : one_length(t, total / (double)x.B);
  }
  return x;
}

static pack pack_of(ot *t, const lengths *x, bool whole) {
  pack p = {.B = x->B, .length = x->q, .length_k = x->k};
  for (int64_t b = 0; b < x->B; b++) p.T += x->q[b], p.S += x->k[b];
  if (p.T == 0) p.T = 1 + ot_below(t, 7);
  p.T += whole ? 0 : ot_below(t, 9);
  p.S += 1 + ot_below(t, 9);
  return p;
}

/* ---- what the oracle will cost, in nanoseconds ---- */

static double attribute(const rgi_node *n, const char *name) {
  for (int i = 0; i < n->op->nattr; i++)
    if (strcmp(n->op->attrs[i].name, name) == 0) return (double)n->attr[i].i;
  return 0;
}

static double extent(const rgi_graph *g, int tensor, int axis) {
  return (double)g->tensor[tensor].dim[axis].c;
}

static double attention_ns(const rgi_graph *g, const rgi_node *n, const lengths *x) {
  const bool cmp = strstr(n->op->name, "cmp") || strstr(n->op->name, "topk"),
             topk = strstr(n->op->name, "topk"), slc = strstr(n->op->name, "slc"),
             apart = in_tensor(n, "cu_seqlens_k") >= 0;
  const int q = in_tensor(n, "q"), k = in_tensor(n, "k"), idx = in_tensor(n, "idx");
  const double H = extent(g, q, 1), KH = extent(g, k, 1), D = extent(g, q, 2),
               N = idx < 0 ? 0 : extent(g, idx, 2), window = attribute(n, "window_left"),
               reach = slc ? N * attribute(n, "block") : window + 1;
  double sum = 0;
  for (int64_t b = 0; b < x->B; b++) {
    const double Q = x->q[b], all = apart ? x->k[b] : Q,
                 K = cmp ? all / attribute(n, "stride") : all;
    double seen = (apart ? K : K / 2) * Q;
    if ((slc || (!cmp && window >= 0)) && reach * Q < seen) seen = reach * Q;
    if (topk)
      sum += seen * (H * D + KH * Q / attribute(n, "block") * 2);
    else
      sum += H * (Q * K * (15 + N / 2) + seen * (D + extent(g, in_tensor(n, "v"), 2)) * 2.5);
  }
  return sum;
}

static double oracle_ns(const rgi_graph *g, const lengths *x) {
  double sum = 0;
  for (int i = 0; i < g->nnode; i++) {
    const rgi_node *n = &g->node[i];
    if (strstr(n->op->name, "attn") || strstr(n->op->name, "topk")) sum += attention_ns(g, n, x);
    if (strcmp(n->op->name, "linear") == 0)
      sum += extent(g, in_tensor(n, "x"), 0) * extent(g, in_tensor(n, "w"), 0) *
             extent(g, in_tensor(n, "w"), 1) * 2;
    for (int side = 0; side < 2 && strcmp(n->op->name, "compress_kv") == 0; side++) {
      const int from = in_tensor(n, side ? "v" : "k"),
                w = in_tensor(n, side ? "v_weight" : "k_weight");
      if (w < 0) continue;
      sum += extent(g, from, 0) / attribute(n, "stride") * extent(g, from, 1) * extent(g, w, 0) *
             extent(g, w, 1) * 2;
    }
  }
  for (int t = 0; t < g->ntensor; t++) {
    double size = 25;
    for (int d = 0; d < g->tensor[t].rank; d++) size *= extent(g, t, d);
    sum += size;
  }
  return sum;
}

/* ---- NaN in one sequence ---- */

static struct {
  int64_t sequence;
  uint64_t state;
  int runs, tensors;
} spoilt;

/* The lengths that rows of a bound tensor go by; NULL: it has no rows of sequences. */
static const int *row_lengths(const graph_case *c, const rg_tensor_info *t) {
  const rgi_tensor *x = &c->forward->tensor[declared(c, t)->tensor];
  if (t->rank == 0 || x->seqlens < 0 || t->seqlens || t->offsets) return NULL;
  return strcmp(c->forward->tensor[x->seqlens].name, "cu_keys") == 0 ? c->p.length_k : c->p.length;
}

static int64_t row_bytes(const rg_tensor_info *t) {
  return t->dim[0] ? t->bytes / t->dim[0] : 0;
}

/* Most inputs and incoming gradients get NaN, or infinities, in all rows of the sequence or
 * in one. */
static void spoil(const graph_case *c, buffers *b) {
  static const float bad[] = {NAN, INFINITY};
  uint64_t state = spoilt.state;
  const bool all = next_random(&state) % 3 > 0;
  const float with = bad[next_random(&state) % 4 == 0];
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    if ((t->role != RG_INPUT && t->role != RG_GRAD_IN) || t->dtype == RG_I32) continue;
    const int *length = row_lengths(c, t);
    if (!length || length[spoilt.sequence] == 0 || next_random(&state) % 6 == 0) continue;
    int64_t from = 0, n = length[spoilt.sequence];
    for (int64_t k = 0; k < spoilt.sequence; k++) from += length[k];
    if (!all) from += next_random(&state) % (uint32_t)n, n = 1;
    const int64_t each = row_bytes(t), size = (int64_t)rg_dtype_size(t->dtype);
    for (int64_t k = from * each / size; k < (from + n) * each / size; k++)
      rg_convert(t->dtype, (char *)b->data[i] + k * size, RG_F32, &with, 1);
  }
}

/* Nothing of it reaches another sequence's outputs and gradients: the same bits as without. */
static void spoil_one(graph_case *c, const buffers *kept, run_how how, report *rep) {
  int64_t sequence = ot_below(c->t, c->p.B);
  for (int64_t k = 0; k < c->p.B && c->p.length[sequence] == 0; k++)
    sequence = (sequence + 1) % c->p.B;
  spoilt.sequence = sequence, spoilt.state = ot_random(c->t);
  buffers b;
  c->spoil = spoil;
  const bool runs = run_plan(c, how, &b, NULL, NULL);
  c->spoil = NULL;
  rep->plans++, rep->refused += !runs, spoilt.runs += runs;
  for (int i = 0; runs && i < b.n; i++) {
    const rg_tensor_info *t = &b.info[i];
    const int *length = t->role == RG_OUTPUT || t->role == RG_GRAD_OUT ? row_lengths(c, t) : NULL;
    if (!length) continue;
    const char *x = buffer(kept, t->role, t->name), *y = b.data[i];
    spoilt.tensors++;
    int64_t from = 0, each = row_bytes(t);
    for (int64_t k = 0; k < c->p.B; from += length[k++])
      cr_assert(k == sequence ||
                    memcmp(x + from * each, y + from * each, (size_t)(length[k] * each)) == 0,
                "%s: NaN of sequence %d has changed sequence %d of %s %s (%s)", c->what,
                (int)sequence, (int)k, t->role == RG_OUTPUT ? "output" : "gradient of", t->name,
                how.policy ? how.policy : "kept");
  }
  if (runs) drop(&b);
}

/* ---- a sequence on its own ---- */

static struct {
  const buffers *pack;
  const graph_case *of;
  int64_t sequence;
  int runs, tensors;
} single;

static int64_t rows_before(const int *length, int64_t sequence) {
  int64_t n = 0;
  for (int64_t k = 0; k < sequence; k++) n += length[k];
  return n;
}

/* Its rows of the pack's inputs and incoming gradients. */
static void take_rows(const graph_case *c, buffers *b) {
  for (int i = 0; i < b->n; i++) {
    const rg_tensor_info *t = &b->info[i];
    const bool sums = t->role == RG_GRAD_OUT && t->accumulates;
    if (t->role != RG_INPUT && t->role != RG_GRAD_IN && !sums) continue;
    const int *length = row_lengths(c, t);
    if (!length) continue;
    const rg_tensor_info *whole = NULL;
    const char *from = NULL;
    for (int k = 0; k < single.pack->n; k++)
      if (single.pack->info[k].role == t->role && strcmp(single.pack->info[k].name, t->name) == 0)
        whole = &single.pack->info[k], from = single.pack->data[k];
    if (sums) { /* the pack's are results by now */
      for (int64_t k = 0; k < t->bytes / 4; k++) ((float *)b->data[i])[k] = 0;
      continue;
    }
    const int64_t first = rows_before(row_lengths(single.of, whole), single.sequence);
    memcpy(b->data[i], from + first * row_bytes(whole), (size_t)(length[0] * row_bytes(t)));
  }
}

static bool depends_on_rows(const rgi_node *n) {
  return strcmp(n->op->name, "linear") == 0 || in_tensor(n, "k_weight") >= 0 ||
         in_tensor(n, "v_weight") >= 0;
}

/* A sequence alone, in a plan of its own capacity, has the bits that it has in the pack. Not where
 * products over all rows take part: their order may depend on how many there are. */
static void single_one(graph_case *c, const buffers *kept, report *rep) {
  int64_t b = ot_below(c->t, c->p.B);
  for (int64_t k = 0; k < c->p.B && c->p.length[b] == 0; k++) b = (b + 1) % c->p.B;
  for (int i = 0; i < kept->n; i++) /* rows of blocks are nobody's to take */
    if (kept->info[i].role == RG_GRAD_IN && kept->info[i].rank && !row_lengths(c, &kept->info[i]) &&
        kept->info[i].name[0] == 'y' &&
        c->forward->tensor[declared(c, &kept->info[i])->tensor].producer >= 0)
      return;
  for (int n = 0; n < c->forward->nnode; n++)
    if (depends_on_rows(&c->forward->node[n])) return;
  const pack p = {.T = c->p.length[b] + ot_below(c->t, 40) + (c->p.length[b] == 0),
                  .S = c->p.length_k[b] + 1 + ot_below(c->t, 40),
                  .B = 1,
                  .length = &c->p.length[b],
                  .length_k = &c->p.length_k[b]};
  graph_case one = open_case(c->ctx, c->t, c->spec, p, c->seed, c->what);
  one.offset = &c->offset[b];
  one.spoil = take_rows;
  single.pack = kept, single.of = c, single.sequence = b;
  buffers x;
  cr_assert(run_plan(&one, (run_how){.threads = 1}, &x, NULL, NULL));
  rep->plans++, single.runs++;
  for (int i = 0; i < x.n; i++) {
    const rg_tensor_info *t = &x.info[i];
    const int *length =
        t->role == RG_OUTPUT || t->role == RG_GRAD_OUT ? row_lengths(&one, t) : NULL;
    if (!length || t->accumulates) continue;
    const char *all = buffer(kept, t->role, t->name);
    const int64_t each = row_bytes(t);
    for (int k = 0; k < kept->n; k++)
      if (kept->info[k].role == t->role && strcmp(kept->info[k].name, t->name) == 0)
        all += rows_before(row_lengths(c, &kept->info[k]), b) * each;
    cr_assert(memcmp(all, x.data[i], (size_t)(length[0] * each)) == 0,
              "%s: alone, sequence %d has another %s %s", c->what, (int)b,
              t->role == RG_OUTPUT ? "output" : "gradient of", t->name);
    single.tensors++;
  }
  drop(&x);
  close_case(&one);
}

/* ---- which kernels ran ---- */

static struct way {
  char text[96];
  int count;
} way[128];
static int ways;

static void count_ways(const rg_plan *plan) {
  for (int32_t i = 0; i < plan->nstep; i++) {
    const char *path = rgi_plan_path(plan, i);
    char text[96];
    int k = 0;
    if (!path) continue;
    snprintf(text, sizeof text, "%-16s %s", plan->graph->node[plan->step[i].node].op->name, path);
    while (k < ways && strcmp(way[k].text, text) != 0) k++;
    if (k == 128) continue;
    if (k == ways) snprintf(way[ways++].text, sizeof text, "%s", text);
    way[k].count++;
  }
}

/* ---- a seed ---- */

static const char *one_line(ot *t, const char *text) {
  char *s = ot_alloc(t, strlen(text) + 1);
  for (size_t i = 0; text[i]; i++) s[i] = text[i] == '\n' ? ' ' : text[i];
  return s;
}

/* What a seed has drawn so far. */
typedef struct drawn_case {
  const char *text;
  pack p;
  lengths x;
} drawn_case;

static void print_case(ot *t, const char *how, uint64_t seed, const drawn_case *d) {
  fprintf(stderr, "%s seed %llu: T %lld, S %lld, lengths", how, (unsigned long long)seed,
          (long long)d->p.T, (long long)d->p.S);
  for (int64_t b = 0; b < d->x.B; b++)
    fprintf(stderr, " %d/%d+%d", d->x.q[b], d->x.k[b], d->x.offset[b]);
  fprintf(stderr, ", spec %s\n", one_line(t, d->text));
}

static run_how other_way(graph_case *c, int which, int heads) {
  ot *t = c->t;
  run_how how = {.threads = 2, .no_reuse = ot_uniform(t) < 0.4, .no_lanes = ot_uniform(t) < 0.2};
  how.eager = ot_uniform(t) < 0.25, how.poison = ot_uniform(t) < 0.2;
  if (which == 0) return how;
  const double share[] = {0, 0.3, 0.7, 1};
  int split = 0;
  for (int tries = 0; tries < 6 && heads > 1 && !split; tries++) {
    split = 1 + (int)ot_below(t, heads - 1);
    if (heads % split || (which == 1 && tries > 2)) split = 0;
  }
  how.policy = random_policy(c, share[ot_below(t, 4)], split);
  return how;
}

static void run_seed(rg_context *ctx, ot *t, uint64_t seed, report *rep, drawn_case *d) {
  rg_error e = {0};
  rg_spec *spec = NULL;
  char what[64];
  gen_options o = {.large = true, .whole = ot_uniform(t) < 0.15, .mixed = ot_uniform(t) < 0.25};
  o.nodes = 4 + (int)ot_below(t, 12);
  d->text = graph_gen(t, o);
  snprintf(what, sizeof what, "random spec %llu", (unsigned long long)seed);
  CR_OK(rg_spec_load_text(ctx, d->text, strlen(d->text), what, NULL, 0, &spec, &e), &e);
  graph_case c;
  double total = 30 * pow(LONGEST / 30.0, ot_uniform(t));
  for (;; total *= 0.7) {
    d->x = draw_lengths(t, total, strstr(d->text, "topk"));
    d->p = pack_of(t, &d->x, o.whole);
    c = open_case(ctx, t, spec, d->p, seed, what);
    c.offset = d->x.offset;
    c.few_vary = true;
    if (oracle_ns(c.forward, &d->x) <= ORACLE_NS || total < 2) break;
    close_case(&c);
  }
  if (getenv("GRAPH_PRINT")) print_case(t, "running", seed, d);
  buffers kept;
  rg_session *s;
  rg_plan *plan;
  const double t0 = seconds();
  cr_assert(run_plan(&c, (run_how){.threads = 2, .poison = true}, &kept, &s, &plan));
  const double t1 = seconds();
  run_oracle(&c, &kept, s);
  const double t2 = seconds();
  count_ways(plan);
  rg_session_destroy(s);
  release_device(&kept);
  rg_plan_destroy(plan);
  compare_with_oracle(&c, &kept, rep);
  const int heads = fewest_heads(&c), more = 2 + (int)ot_below(t, 2);
  for (int i = 0; i < more; i++) same_as(&c, &kept, other_way(&c, i, heads), rep);
  if (!o.whole && d->p.B > 1) {
    spoil_one(&c, &kept, other_way(&c, (int)ot_below(t, 3), heads), rep);
    single_one(&c, &kept, rep);
  }
  drop(&kept);
  if (getenv("GRAPH_VERBOSE"))
    fprintf(stderr,
            "seed %llu: %lld tokens, %d nodes, plain %.2f s, oracle %.2f s (%.2f thought), others "
            "%.2f s\n",
            (unsigned long long)seed, (long long)d->p.T, c.forward->nnode, t1 - t0, t2 - t1,
            oracle_ns(c.forward, &d->x) * 1e-9, seconds() - t2);
  close_case(&c);
  rg_spec_destroy(spec);
}

/* True: the seed passed. In a build without Criterion a failure is caught,
 * printed, and the next seed runs. */
static bool try_seed(uint64_t seed, report *rep) {
  static drawn_case x; /* outlives a jump */
  static rg_context *ctx;
  static ot *t;
  rg_error e = {0};
  x = (drawn_case){.text = ""};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  t = ot_begin(seed);
#ifdef PLAIN_CATCHES
  jmp_buf back;
  if (setjmp(back)) {
    plain_catch = NULL;
    print_case(t, "FAILED", seed, &x);
    return false;
  }
  plain_catch = &back;
#endif
  run_seed(ctx, t, seed, rep, &x);
#ifdef PLAIN_CATCHES
  plain_catch = NULL;
#endif
  ot_end(t);
  rg_context_destroy(ctx);
  return true;
}

Test(gpu_random, specs, .timeout = 3600) {
  const char *only = getenv("REGRAPH_SEED"), *times = getenv("GRAPH_MORE"),
             *from = getenv("REGRAPH_FIRST");
  const uint64_t first = from ? strtoull(from, NULL, 10) : FIRST;
  const int n = only ? 1 : SPECS * (times ? atoi(times) : 1);
  report rep = {0};
  int ran = 0, failed = 0;
  for (int i = 0; i < n && failed < 20; i++) {
    if (!only && !in_shard(i)) continue;
    ran++;
    failed += !try_seed(only ? strtoull(only, NULL, 10) : first + (uint64_t)i, &rep);
  }
  for (int k = 0; k < ways; k++) fprintf(stderr, "%6d x %s\n", way[k].count, way[k].text);
  fprintf(stderr,
          "%d specs, %d failed; %d other ways, %d refused; output %.2f, gradient %.2f of the gate; "
          "NaN in %d "
          "runs, %d tensors beside it; alone in %d runs, %d tensors\n",
          ran, failed, rep.plans, rep.refused, rep.worst_output, rep.worst_gradient, spoilt.runs,
          spoilt.tensors, single.runs, single.tensors);
  cr_assert_eq(failed, 0);
}
