/* bench/pack_bench.c: how often, how close and how fast the packer is, per family of seeded
   instances.

       pack_bench [SECONDS [SEEDS [FAMILY]]]       defaults: 5 s an instance, 2 seeds a size, all
                                                   families
       pack_bench SECONDS FILE.csv…                the same table for files, a row with its peak
                                                   each: the field's hard instances, say
                                                   (docs/benchmarks.md)

   `proved` counts instances whose packing is proved optimal (the bound reached, or all below it
   exhausted). `gap` is against the most bytes alive at once. Each packing passes the independent
   checker, or the run fails.
 */
#include "memplan/pack.h"
#include "tests/harness/pack_instances.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 1 << 16 };

typedef struct tally {
  int n, proved;
  double gap, worst_gap, greedy, seconds, slowest;
  long long peak, bound; /* of the only one */
} tally;

static void print_header(void) {
  printf("%-24s %9s %9s %9s %9s %9s %9s %9s\n", "instances", "buffers", "proved", "gap %",
         "worst %", "greedy", "mean s", "most s");
}

static void print_row(const char *name, const char *buffers, const tally *t) {
  printf("%-24s %9s %4d/%-4d %9.3f %9.3f %9.3f %9.3f %9.3f", name, buffers, t->proved, t->n,
         100 * t->gap / t->n, 100 * t->worst_gap, t->greedy / t->n, t->seconds / t->n, t->slowest);
  if (t->n == 1) printf("  peak %lld, bound %lld", t->peak, t->bound);
  printf("\n");
  fflush(stdout);
}

static void add(tally *sum, const tally *t) {
  sum->n += t->n;
  sum->proved += t->proved;
  sum->gap += t->gap;
  sum->greedy += t->greedy;
  sum->seconds += t->seconds;
  if (t->worst_gap > sum->worst_gap) sum->worst_gap = t->worst_gap;
  if (t->slowest > sum->slowest) sum->slowest = t->slowest;
}

/* false: a packing that is wrong or worse than greedy. */
static bool measure(rg_context *ctx, rg_buffer *b, size_t n, double seconds, tally *t) {
  rg_pack_options o = {.seconds = seconds};
  rg_pack_result r;
  rg_error e = {0};
  int64_t greedy, peak;
  if (rgi_pack_greedy(ctx, b, n, 1, &greedy, &e) != RG_OK ||
      rg_pack(ctx, b, n, &o, &r, &e) != RG_OK) {
    fprintf(stderr, "%s\n", e.message);
    return false;
  }
  if (!pack_valid(b, n, 1, &peak) || peak != r.peak || r.peak > greedy ||
      r.lower_bound != pack_most_alive(b, n)) {
    fprintf(stderr, "the checker objects\n");
    return false;
  }
  double bound = r.lower_bound > 0 ? (double)r.lower_bound : 1,
         gap = (double)(r.peak - r.lower_bound) / bound;
  tally one = {1, r.optimal, gap, gap, (double)greedy / bound, r.seconds, r.seconds, 0, 0};
  add(t, &one);
  t->peak = r.peak;
  t->bound = r.lower_bound;
  return true;
}

/* Lines "id,lower,upper,size" in that order; good enough for a benchmark. */
static size_t read_csv(const char *path, rg_buffer *b) {
  char line[512];
  size_t n = 0;
  FILE *f = fopen(path, "r");
  if (!f) return 0;
  while (fgets(line, sizeof line, f) && n < MOST) {
    long long lower, upper, size;
    const char *rest = strchr(line, ',');
    if (rest && sscanf(rest, ",%lld,%lld,%lld", &lower, &upper, &size) == 3)
      b[n++] = (rg_buffer){lower, upper, size, 0};
  }
  fclose(f);
  return n;
}

int main(int argc, char **argv) {
  static const int sizes[] = {50, 100, 150, 200, 300, 400, 500};
  double seconds = argc > 1 ? atof(argv[1]) : 5;
  rg_buffer *b = malloc(MOST * sizeof *b);
  rg_context *ctx;
  char count[32];
  tally all = {0};
  int failed = 0;
  if (!b || rg_context_create(NULL, &ctx, NULL) != RG_OK) return 1;
  print_header();
  if (argc > 2 && strchr(argv[2], '.')) {
    for (int i = 2; i < argc && !failed; i++) {
      const char *slash = strrchr(argv[i], '/');
      tally t = {0};
      size_t n = read_csv(argv[i], b);
      snprintf(count, sizeof count, "%zu", n);
      if (n == 0 || !measure(ctx, b, n, seconds, &t)) failed = 1;
      print_row(slash ? slash + 1 : argv[i], count, &t);
      add(&all, &t);
    }
  } else {
    int seeds = argc > 2 ? atoi(argv[2]) : 2, only = argc > 3 ? atoi(argv[3]) : -1;
    for (int f = 0; f < PACK_FAMILIES && !failed; f++) {
      tally family = {0};
      if (only >= 0 && f != only) continue;
      for (size_t k = 0; k < sizeof sizes / sizeof *sizes && !failed; k++) {
        tally t = {0};
        for (int s = 0; s < seeds && !failed; s++) {
          pack_instance((pack_family)f, (uint64_t)s, (size_t)sizes[k], b);
          if (!measure(ctx, b, (size_t)sizes[k], seconds, &t)) failed = 1;
        }
        snprintf(count, sizeof count, "%d", sizes[k]);
        print_row(pack_family_name((pack_family)f), count, &t);
        add(&family, &t);
      }
      print_row(pack_family_name((pack_family)f), "all", &family);
      add(&all, &family);
    }
  }
  print_row("together", "all", &all);
  rg_context_destroy(ctx);
  free(b);
  return failed;
}
