/* tests/unit/test_pack.c: the packer against brute force, its promises on seeded
 * instances, and the CSV command. */
#include "memplan/pack_internal.h"
#include "tests/harness/pack_instances.h"
#include "tests/harness/pack_tight.h"
#include "tests/harness/round.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static rg_context *ctx;
static void open_context(void) {
  cr_assert_eq(rg_context_create(NULL, &ctx, NULL), RG_OK);
}
static void close_context(void) {
  rg_context_destroy(ctx);
}
TestSuite(pack, .init = open_context, .fini = close_context);

static rg_pack_result pack(rg_buffer *b, size_t n, const rg_pack_options *o) {
  rg_pack_result r;
  rg_error e = {0};
  int64_t peak;
  cr_assert_eq(rg_pack(ctx, b, n, o, &r, &e), RG_OK, "%s", e.message);
  cr_assert(pack_valid(b, n, o && o->align ? o->align : 1, &peak));
  cr_assert_eq(peak, r.peak);
  cr_assert_geq(r.peak, r.lower_bound);
  if (r.peak == r.lower_bound) cr_assert(r.optimal);
  return r;
}

/* ---- brute force: dropping the pieces in every order; an optimal packing is among the results */

static int64_t brute_force(const rg_buffer *b, int n, int64_t align, int64_t *top, unsigned placed,
                           int64_t so_far, int64_t best) {
  if (so_far >= best) return best;
  if (placed == (1u << n) - 1) return so_far;
  for (int i = 0; i < n; i++) {
    if (placed >> i & 1) continue;
    int64_t at = 0;
    for (int j = 0; j < n; j++)
      if (placed >> j & 1 && b[i].lower < b[j].upper && b[j].lower < b[i].upper && top[j] > at)
        at = top[j];
    at = (at + align - 1) / align * align;
    top[i] = at + b[i].size;
    best = brute_force(b, n, align, top, placed | 1u << i, top[i] > so_far ? top[i] : so_far, best);
  }
  return best;
}

Test(pack, brute_force) {
  srand((unsigned)round_seed(7, 1));
  for (int turn = 0; turn < 1500; turn++) {
    rg_buffer b[8];
    int n = 3 + rand() % 5;
    int64_t align = turn % 3 == 0 ? 4 : 1, top[8];
    for (int i = 0; i < n; i++) {
      b[i].lower = rand() % 6;
      b[i].upper = b[i].lower + 1 + rand() % 4;
      b[i].size = 1 + rand() % 9;
    }
    rg_pack_options o = {.seconds = 30, .align = align};
    rg_pack_result r = pack(b, (size_t)n, &o);
    cr_assert(r.optimal);
    cr_assert_eq(r.peak, brute_force(b, n, align, top, 0, 0, INT64_MAX), "turn %d", turn);
    if (align == 1) cr_assert_eq(r.lower_bound, pack_most_alive(b, (size_t)n));
  }
}

/* Instances whose optimum lies above the bytes alive at once are rare: here the proof takes
 * exhaustion. */
Test(pack, gap_is_proved) {
  rg_buffer nine[] = {{5, 7, 2, 0}, {4, 6, 2, 0},  {7, 9, 1, 0}, {4, 5, 2, 0}, {9, 11, 2, 0},
                      {0, 3, 2, 0}, {8, 10, 2, 0}, {6, 8, 1, 0}, {6, 9, 1, 0}};
  rg_buffer eleven[] = {{8, 16, 1, 0}, {7, 8, 2, 0},  {0, 5, 2, 0}, {1, 9, 1, 0},
                        {0, 1, 2, 0},  {8, 15, 1, 0}, {0, 3, 1, 0}, {9, 15, 2, 0},
                        {2, 7, 1, 0},  {4, 12, 1, 0}, {5, 9, 1, 0}};
  int64_t top[11];
  for (int k = 0; k < 2; k++) {
    rg_buffer *b = k ? eleven : nine;
    int n = k ? 11 : 9;
    int64_t bound = pack_most_alive(b, (size_t)n);
    rg_pack_result r = pack(b, (size_t)n, NULL);
    cr_assert_eq(r.lower_bound, bound);
    cr_assert_eq(r.peak, bound + 1);
    cr_assert(r.optimal);
    cr_assert_gt(r.nodes_explored, 0);
    cr_assert_eq(brute_force(b, n, 1, top, 0, 0, bound + 1), bound + 1);
  }
}

/* ---- seeded instances ---- */

Test(pack, families) {
  static const size_t sizes[] = {50, 100, 200};
  rg_buffer b[200], c[200];
  for (int f = 0; f < PACK_FAMILIES; f++)
    for (int s = 0; s < 3; s++) {
      size_t n = sizes[s];
      int64_t greedy;
      pack_instance((pack_family)f, 1, n, b);
      memcpy(c, b, sizeof c);
      int64_t bound = pack_most_alive(b, n), peak;
      cr_assert_eq(rgi_pack_greedy(ctx, c, n, 1, &greedy, NULL), RG_OK);
      cr_assert(pack_valid(c, n, 1, &peak));
      cr_assert_eq(peak, greedy);
      rg_pack_options o = {.seconds = 20};
      rg_pack_result r = pack(b, n, &o);
      cr_assert_leq(r.peak, greedy);
      cr_assert_eq(r.lower_bound, bound);
      cr_assert(r.optimal, "%s, %zu buffers: peak %lld, bound %lld",
                pack_family_name((pack_family)f), n, (long long)r.peak, (long long)bound);
      if (pack_family_perfect((pack_family)f)) {
        cr_assert_eq(bound, 1 << 20);
        cr_assert_eq(r.peak, bound);
      }
    }
}

Test(pack, same_result_every_time) {
  rg_buffer a[150], b[150];
  pack_instance(PACK_PINWHEELS, 3, 150, a);
  memcpy(b, a, sizeof b);
  rg_pack_options o = {.seconds = 60};
  rg_pack_result x = pack(a, 150, &o), y = pack(b, 150, &o);
  cr_assert(x.optimal);
  cr_assert_eq(x.nodes_explored, y.nodes_explored);
  cr_assert_eq(memcmp(a, b, sizeof a), 0);
}

Test(pack, alignment) {
  rg_buffer b[60];
  for (int seed = 0; seed < 10; seed++) {
    pack_instance(PACK_MIXED, (uint64_t)seed, 60, b);
    rg_pack_options o = {.seconds = 2, .align = 256};
    rg_pack_result r = pack(b, 60, &o);
    cr_assert_geq(r.lower_bound, pack_most_alive(b, 60));
  }
  /* The last block's end is not rounded up. */
  rg_buffer two[] = {{0, 2, 100, 0}, {0, 2, 300, 0}};
  rg_pack_options o = {.align = 256};
  rg_pack_result r = pack(two, 2, &o);
  cr_assert_eq(r.peak, 556);
  cr_assert_eq(r.lower_bound, 556);
  cr_assert(r.optimal);
}

Test(pack, capacity_stops_early) {
  rg_buffer b[200];
  int64_t greedy;
  pack_instance(PACK_CUTS, 5, 200, b);
  cr_assert_eq(rgi_pack_greedy(ctx, b, 200, 1, &greedy, NULL), RG_OK);
  rg_pack_options o = {.seconds = 20, .capacity = greedy};
  rg_pack_result r = pack(b, 200, &o);
  cr_assert_eq(r.nodes_explored, 0);
  cr_assert_leq(r.peak, greedy);
  o.capacity = 1 << 20;
  r = pack(b, 200, &o);
  cr_assert_eq(r.peak, 1 << 20);
  o.capacity = 1000; /* below the bound: nothing to search for */
  r = pack(b, 200, &o);
  cr_assert_eq(r.nodes_explored, 0);
  cr_assert_gt(r.peak, o.capacity);
}

Test(pack, the_limit_is_kept) {
  static rg_buffer b[500];
  pack_instance(PACK_COARSE_CUTS, 1, 500, b);
  rg_pack_options o = {.seconds = 0.3};
  rg_pack_result r = pack(b, 500, &o);
  cr_assert_lt(r.seconds, 3.0);
}

/* A planner asks whether a choice fits, a block above what is alive at once: of so much work repair
 * says yes, where depth first and beams need twenty times as much. */
Test(pack, what_fits_is_soon_found) {
  enum { N = sizeof pack_tight / sizeof *pack_tight };
  rg_buffer b[N];
  rg_pack_result r;
  int64_t work = 100000000, peak;
  for (int i = 0; i < N; i++)
    b[i] = (rg_buffer){pack_tight[i][0], pack_tight[i][1], (int64_t)pack_tight[i][2] << 14, 0};
  const rg_pack_options o = {.align = 256, .capacity = 115 << 14};
  cr_assert_eq(rgi_pack(ctx, b, N, &o, &work, &r, NULL), RG_OK);
  cr_assert(pack_valid(b, N, 256, &peak));
  cr_assert_leq(peak, o.capacity);
  cr_assert_gt(work, 0);
}

/* Repair notes what changes where by place if there are few, else it sorts: the same blocks,
 * larger, go to the same places. */
Test(pack, repair_by_place_or_sorted) {
  enum { N = sizeof pack_tight / sizeof *pack_tight };
  static const int64_t unit[] = {1, 4096};
  static rgi_piece piece[N];
  static int32_t near[N * N];
  static int64_t begin[N + 1], from[N], offset[2][N];
  int64_t steps[2] = {0};
  rgi_verdict verdict[2];
  for (int k = 0; k < 2; k++) {
    rgi_repair *h;
    rgi_packing p = {ctx, .n = N, .piece = piece, .near = near, .near_begin = begin, .unit = 1};
    for (int i = 0, n = 0; i < N; i++, begin[i] = n) {
      piece[i] = (rgi_piece){(int32_t)pack_tight[i][0], (int32_t)pack_tight[i][1] - 1, i,
                             pack_tight[i][2] * unit[k], 0};
      for (int j = 0; j < N; j++)
        if (j != i && pack_tight[j][0] < pack_tight[i][1] && pack_tight[i][0] < pack_tight[j][1])
          near[n++] = j;
      from[i] = 1000 * unit[k];
    }
    cr_assert_eq(rgi_repair_create(&p, &h, NULL), RG_OK);
    int64_t work = INT64_MAX;
    const rgi_stop stop = {0, &work};
    verdict[k] = rgi_repair_run(h, 116 * unit[k], 2000000, &stop, from, offset[k], &steps[k]);
    rgi_repair_destroy(h);
  }
  cr_assert_eq(verdict[0], RGI_FOUND);
  cr_assert_eq(verdict[1], RGI_FOUND);
  cr_assert_eq(steps[0], steps[1]);
  for (int i = 0; i < N; i++) cr_assert_eq(offset[1][i], offset[0][i] * unit[1]);
}

/* Where work is the limit, what is found when it ends depends on no clock: plans of one spec are
 * the same on every machine, and on every rank. */
Test(pack, so_much_work_gives_the_same_result_every_time) {
  static rg_buffer a[300], b[300];
  pack_instance(PACK_COARSE_CUTS, 1, 300, a);
  memcpy(b, a, sizeof b);
  int64_t left[2] = {30000000, 30000000};
  rg_pack_result x, y;
  cr_assert_eq(rgi_pack(ctx, a, 300, NULL, &left[0], &x, NULL), RG_OK);
  rg_pack_options o = {.seconds = 1e-9}; /* is not asked for */
  cr_assert_eq(rgi_pack(ctx, b, 300, &o, &left[1], &y, NULL), RG_OK);
  cr_assert(!x.optimal && x.nodes_explored > 1000 && left[0] <= 0);
  cr_assert_eq(x.nodes_explored, y.nodes_explored);
  cr_assert_eq(left[0], left[1]);
  cr_assert_eq(memcmp(a, b, sizeof a), 0);
}

/* More than are searched, few of them alive together: repair gets near the bound, and the same
 * packing every time. First fit in many orders stays 4 % above it. */
Test(pack, thousands_of_short_lives) {
  enum { N = 5000, TIME = 100000, LIFE = 3000 };
  static rg_buffer a[N], b[N];
  uint64_t state = 1;
  for (size_t i = 0; i < N; i++) {
    uint64_t draw[3];
    for (int k = 0; k < 3; k++) {
      state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
      draw[k] = state >> 33;
    }
    a[i].lower = (int64_t)(draw[0] % TIME);
    a[i].upper = a[i].lower + 1 + (int64_t)(draw[1] % LIFE);
    a[i].size = 1 + (int64_t)(draw[2] % 1000000);
  }
  memcpy(b, a, sizeof b);
  int64_t left[2] = {2000000000, 2000000000}, peak;
  rg_pack_result x, y;
  cr_assert_eq(rgi_pack(ctx, a, N, NULL, &left[0], &x, NULL), RG_OK);
  cr_assert(pack_valid(a, N, 1, &peak));
  cr_assert_eq(peak, x.peak);
  cr_assert_lt(x.peak - x.lower_bound, x.lower_bound / 50, "%lld, bound %lld", (long long)x.peak,
               (long long)x.lower_bound);
  cr_assert_eq(rgi_pack(ctx, b, N, NULL, &left[1], &y, NULL), RG_OK);
  cr_assert_eq(x.nodes_explored, y.nodes_explored);
  cr_assert_eq(left[0], left[1]);
  cr_assert_eq(memcmp(a, b, sizeof a), 0);
}

/* ---- odd input ---- */

Test(pack, nothing_to_pack) {
  rg_pack_result r = pack(NULL, 0, NULL);
  cr_assert_eq(r.peak, 0);
  cr_assert(r.optimal);
  rg_buffer b[] = {{3, 3, 10, 77}, {0, 9, 0, 77}};
  r = pack(b, 2, NULL);
  cr_assert_eq(r.peak, 10); /* never alive, but its bytes lie below the peak all the same */
  cr_assert(r.optimal);
  cr_assert_eq(b[0].offset, 0);
  cr_assert_eq(b[1].offset, 0);
}

/* Whoever takes offset + size for the arena's end must be right, also about buffers that are never
 * alive. */
Test(pack, never_alive_lies_below_the_peak) {
  rg_buffer b[] = {{0, 4, 8, 0}, {2, 2, 100, 0}, {1, 3, 8, 0}, {9, 9, 3, 0}};
  rg_pack_result r = pack(b, 4, NULL);
  cr_assert_eq(r.peak, 100);
  cr_assert_eq(r.lower_bound, 100);
  cr_assert(r.optimal);
  rg_pack_options o = {.capacity = 50};
  cr_assert_eq(pack(b, 4, &o).lower_bound, 100);
}

/* What is never alive together need not add up to a number. */
Test(pack, sums_past_64_bits) {
  const int64_t half = INT64_C(1) << 62;
  rg_buffer apart[] = {
      {0, 1, INT64_MAX, 0}, {1, 2, INT64_MAX, 0}, {2, 3, half, 0}, {5, 9, INT64_MAX, 0}};
  rg_pack_result r = pack(apart, 4, NULL);
  cr_assert_eq(r.peak, INT64_MAX);
  cr_assert(r.optimal);
  /* neighbours overlap, and two of them fill the numbers there are */
  rg_buffer chain[] = {
      {0, 2, half, 0}, {1, 3, half - 1, 0}, {2, 4, half, 0}, {3, 5, half - 1, 0}, {4, 6, half, 0}};
  r = pack(chain, 5, NULL);
  cr_assert_eq(r.peak, INT64_MAX);
  cr_assert(r.optimal);
}

Test(pack, touching_lifetimes_share) {
  rg_buffer b[] = {{-5, 3, 10, 0}, {3, 9, 10, 0}, {9, 12, 10, 0}};
  cr_assert_eq(pack(b, 3, NULL).peak, 10);
}

static rg_status status_of(rg_buffer *b, size_t n, const rg_pack_options *o) {
  rg_pack_result r;
  rg_error e = {0};
  rg_status status = rg_pack(ctx, b, n, o, &r, &e);
  cr_assert_eq(status, e.status);
  cr_assert(status == RG_OK || e.message[0]);
  return status;
}

Test(pack, invalid) {
  rg_pack_result r;
  rg_buffer upside_down = {5, 4, 1, 0}, negative = {0, 1, -1, 0}, fine = {0, 1, 1, 0};
  rg_buffer huge[] = {{0, 1, INT64_MAX, 0}, {0, 1, 1, 0}};
  rg_pack_options odd = {.align = -1}, wide = {.align = 4096};
  cr_assert_eq(status_of(&upside_down, 1, NULL), RG_E_DATA);
  cr_assert_eq(status_of(&negative, 1, NULL), RG_E_DATA);
  cr_assert_eq(status_of(huge, 2, NULL), RG_E_OVERFLOW);
  cr_assert_eq(status_of(huge, 1, NULL), RG_OK);
  cr_assert_eq(status_of(huge, 1, &wide), RG_E_OVERFLOW);
  cr_assert_eq(status_of(&fine, 1, &odd), RG_E_USAGE);
  cr_assert_eq(rg_pack(NULL, &fine, 1, NULL, &r, NULL), RG_E_USAGE);
  cr_assert_eq(rg_pack(ctx, NULL, 1, NULL, &r, NULL), RG_E_USAGE);
  cr_assert_eq(rg_pack(ctx, &fine, 1, NULL, NULL, NULL), RG_E_USAGE);
}

/* An allocator that fails after a while: every path must end in RG_E_NOMEM, and nothing may
 * leak. */
typedef struct meter {
  long left, live;
} meter;
static void *metered_alloc(void *user, size_t size) {
  meter *m = user;
  if (m->left-- <= 0) return NULL;
  m->live++;
  return malloc(size);
}
static void metered_free(void *user, void *p) {
  meter *m = user;
  if (p) m->live--;
  free(p);
}

Test(pack, out_of_memory) {
  meter m = {1000000, 0};
  rg_allocator host = {metered_alloc, metered_free, &m};
  rg_context *limited;
  cr_assert_eq(rg_context_create(&host, &limited, NULL), RG_OK);
  long before = m.live;
  bool done = false;
  for (long n = 0; !done; n++) {
    rg_buffer b[80];
    rg_pack_result r;
    rg_error e = {0};
    pack_instance(PACK_PINWHEELS, 2, 80, b);
    m.left = n;
    rg_status status = rg_pack(limited, b, 80, NULL, &r, &e);
    cr_assert_eq(m.live, before, "leaked after %ld allocations", n);
    done = status == RG_OK;
    if (!done) cr_assert_eq(status, RG_E_NOMEM);
  }
  m.left = 1000000;
  rg_context_destroy(limited);
  cr_assert_eq(m.live, 0);
}

/* ---- CSV ---- */

static char path[64];
static rg_error csv_error;

/* Packs the text; returns the result, or NULL with csv_error set. The caller frees. */
static char *pack_text(const char *text, size_t size) {
  rg_text out;
  rg_pack_result r;
  strcpy(path, "/tmp/test_pack_XXXXXX");
  int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  FILE *f = fdopen(fd, "wb");
  fwrite(text, 1, size, f);
  fclose(f);
  memset(&csv_error, 0, sizeof csv_error);
  rg_status status = rg_pack_csv(ctx, path, NULL, &out, &r, &csv_error);
  remove(path);
  cr_assert_eq(status, csv_error.status);
  if (status != RG_OK) {
    cr_assert_null(out.data);
    cr_assert_str_eq(csv_error.file, path);
    return NULL;
  }
  char *copy = strdup(out.data);
  rg_text_destroy(&out);
  return copy;
}

static void gives(const char *text, const char *expected) {
  char *got = pack_text(text, strlen(text));
  cr_assert_not_null(got, "%s", csv_error.message);
  cr_assert_str_eq(got, expected);
  free(got);
}

static void fails(const char *text, rg_status status, int line, int column) {
  char *got = pack_text(text, strlen(text));
  cr_assert_null(got, "%s gave %s", text, got);
  cr_assert_eq(csv_error.status, status, "%s: %s", text, rg_status_name(csv_error.status));
  cr_assert_eq(csv_error.line, line, "%s: line %d", text, csv_error.line);
  cr_assert_eq(csv_error.column, column, "%s: column %d", text, csv_error.column);
}

Test(pack, csv) {
  gives("id,lower,upper,size\na,0,2,5\nb,2,4,5\n",
        "id,lower,upper,size,offset\na,0,2,5,0\nb,2,4,5,0\n");
  gives("id,lower,upper,size\r\na,0,2,5\r\n", "id,lower,upper,size,offset\r\na,0,2,5,0\r\n");
  gives("size,note,id,upper,lower\n5, x y ,a,2,0",
        "size,note,id,upper,lower,offset\n5, x y ,a,2,0,0\n");
  gives("id,offset,lower,upper,size\na,,0,2,5\nb,99,0, 2 ,0\n",
        "id,offset,lower,upper,size\na,0,0,2,5\nb,0,0, 2 ,0\n");
  gives("id,lower,upper,size\n\na,-3,+2,5\n\n\n", "id,lower,upper,size,offset\na,-3,+2,5,0\n");
  gives("id,lower,upper,size", "id,lower,upper,size,offset\n");
}

Test(pack, csv_errors) {
  fails("", RG_E_KEY, 1, 1);
  fails("id,lower,upper\n", RG_E_KEY, 1, 1);
  fails("id,lower,upper,size,lower\n", RG_E_KEY, 1, 21);
  fails("id,lower,upper,size\na,0,2,5\nb,0,x,5\n", RG_E_SYNTAX, 3, 5);
  fails("id,lower,upper,size\na,0,,5\n", RG_E_SYNTAX, 2, 5);
  fails("id,lower,upper,size\na,0,2\n", RG_E_SYNTAX, 2, 6);
  fails("id,lower,upper,size\na,0,2,5,7\n", RG_E_SYNTAX, 2, 9);
  fails("id,lower,upper,size\na,0,2,99999999999999999999\n", RG_E_OVERFLOW, 2, 7);
  fails("id,lower,upper,size\na,3,2,1\n", RG_E_DATA, 2, 5);
  fails("id,lower,upper,size\na,0,2,-1\n", RG_E_DATA, 2, 7);
  fails("id,lower,upper,size\na,0,2,9223372036854775807\nb,0,2,1\n", RG_E_OVERFLOW, 0, 0);
  cr_assert_null(pack_text("id,lower,upper,size\na,0,2,5\0,\n", 31));
  cr_assert_eq(csv_error.status, RG_E_SYNTAX);

  rg_text out;
  rg_pack_result r;
  rg_error e = {0};
  cr_assert_eq(rg_pack_csv(ctx, "/nonexistent/file.csv", NULL, &out, &r, &e), RG_E_IO);
  cr_assert_str_eq(e.file, "/nonexistent/file.csv");
  cr_assert_eq(rg_pack_csv(ctx, NULL, NULL, &out, &r, NULL), RG_E_USAGE);
  cr_assert_eq(rg_pack_csv(ctx, "/tmp", NULL, &out, &r, NULL), RG_E_IO);
}
