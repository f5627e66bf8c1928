/* tests/unit/test_cp_tables.c: which rank owns what, and the sequence starts that follow, against
 * the dumbest code that can be right: one token after the other. */
#include "../../cp/tables.h"

#include "../harness/round.h"
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SEQUENCES = 40, MOST_ROWS = 4096 };
static const int ranks_of[] = {1, 2, 3, 4, 8};

static uint64_t state;
static int64_t below(int64_t n) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (int64_t)((state >> 33) % (uint64_t)n);
}

typedef struct pack {
  int ranks;
  int64_t kernel, stride, chunk, capacity, nseq;
  int32_t cu[MOST_SEQUENCES + 1];
  int64_t sequence[MOST_ROWS], position[MOST_ROWS]; /* of each live row */
} pack;

static void note_rows(pack *p) {
  for (int64_t b = 0; b < p->nseq; b++)
    for (int64_t t = p->cu[b]; t < p->cu[b + 1]; t++)
      p->sequence[t] = b, p->position[t] = t - p->cu[b];
}

/* A random pack: lengths around 0, 1, kernel, the chunk, several chunks; perhaps dead rows at the
 * end. */
static void draw(pack *p, int64_t i) {
  state = 0x9e3779b97f4a7c15u * (uint64_t)(i + 1);
  p->ranks = ranks_of[below(RGI_COUNT(ranks_of))];
  p->stride = 1 + below(6);
  p->kernel = p->stride * (1 + below(3));
  p->chunk = p->stride * ((p->kernel - 1 + p->stride - 1) / p->stride + below(6));
  if (p->chunk == 0) p->chunk = p->stride;
  p->capacity = p->chunk * 2 * p->ranks;
  cr_assert_leq(p->capacity, (int64_t)MOST_ROWS);
  p->nseq = 1 + below(MOST_SEQUENCES);
  p->cu[0] = 0;
  for (int64_t b = 0; b < p->nseq; b++) {
    const int64_t like[] = {0,
                            1,
                            p->kernel - 1,
                            p->kernel,
                            p->kernel + 1,
                            p->chunk,
                            below(p->chunk + 1),
                            below(p->capacity + 1),
                            3 * p->chunk + 1};
    const int64_t n = like[below(RGI_COUNT(like))], left = p->capacity - p->cu[b];
    p->cu[b + 1] = (int32_t)(p->cu[b] + (n < left ? n : left));
  }
  note_rows(p);
}

static int64_t live(const pack *p) {
  return p->cu[p->nseq];
}

static void check_rows(const pack *p, rg_cp_mode mode) {
  static int32_t starts[MOST_SEQUENCES + 1], pos[MOST_SEQUENCES];
  bool owned[MOST_ROWS] = {false};
  for (int r = 0; r < p->ranks; r++) {
    rg_range range[2];
    rg_error e = {0};
    cr_assert_eq(rg_cp_rows(p->cu, (size_t)p->nseq + 1, p->capacity, p->ranks, mode, r, range, &e),
                 RG_OK, "%s", e.message);
    cr_assert_lt(range[0].begin, range[1].begin);
    /* slot 1 has live rows only where slot 0 is full */
    if (range[1].begin < live(p)) cr_assert_leq(range[0].end, live(p));
    for (int slot = 0; slot < 2; slot++) {
      const int64_t lo = range[slot].begin, hi = range[slot].end;
      cr_assert_eq(hi - lo, p->chunk);
      for (int64_t t = lo; t < hi; t++) {
        cr_assert(!owned[t], "row %lld has two owners", (long long)t);
        owned[t] = true;
      }
      rgi_cp_pieces(p->cu, p->nseq, lo, hi, starts, pos);
      cr_assert_eq(starts[0], 0);
      int64_t row = 0;
      for (int64_t b = 0; b < p->nseq; b++)
        for (int64_t k = starts[b]; k < starts[b + 1]; k++, row++) {
          cr_assert_eq(p->sequence[lo + row], b);
          cr_assert_eq(p->position[lo + row], pos[b] + (k - starts[b]));
        }
      const int64_t left = live(p) - lo;
      cr_assert_eq(row, left < 0 ? 0 : left < p->chunk ? left : p->chunk);
    }
  }
  for (int64_t t = 0; t < p->capacity; t++)
    cr_assert(owned[t], "row %lld has no owner", (long long)t);
}

/* Every block of every sequence is made by the chunk it starts in, of the right tokens, in the row
 * where all tokens at once would have put it; and nothing else is. `ends`: the chunk in which its
 * last `stride` tokens start, and of the first blocks those tokens that there are. */
static void check_blocks(const pack *p, bool ends) {
  static int32_t starts[MOST_SEQUENCES + 2];
  int64_t token[MOST_ROWS], made[MOST_ROWS]; /* per compressed row: its first token … */
  int64_t n[MOST_ROWS], of[MOST_ROWS];       /* … and how many it has */
  const int64_t rows = p->capacity / p->stride, own = p->chunk / p->stride,
                left = ends ? p->kernel - p->stride : 0,
                right = ends ? p->stride - 1 : p->kernel - 1, whole = p->kernel - left;
  for (int64_t i = 0; i < rows; i++) token[i] = made[i] = n[i] = of[i] = -1;
  for (int64_t b = 0; b < p->nseq; b++)
    for (int64_t j = 0; j * p->stride + whole <= p->cu[b + 1] - p->cu[b]; j++) {
      const int64_t row = p->cu[b] / p->stride + j,
                    back = left < j * p->stride ? left : j * p->stride;
      token[row] = p->cu[b] + j * p->stride - back;
      n[row] = whole + back;
    }
  for (int64_t c = 0; c < 2 * p->ranks; c++) {
    const int64_t first = c * p->chunk - left, last = (c + 1) * p->chunk + right;
    rgi_cp_blocks(p->cu, p->nseq, first, last, p->stride, starts);
    cr_assert_eq(starts[0], 0);
    for (int64_t b = 0; b <= p->nseq; b++) {
      cr_assert_leq(starts[b], starts[b + 1]);
      cr_assert_leq((int64_t)starts[b + 1], last - first);
      for (int64_t j = 0; j * p->stride + whole <= starts[b + 1] - starts[b]; j++) {
        const int64_t row = starts[b] / p->stride + j - left / p->stride,
                      back = left < j * p->stride ? left : j * p->stride;
        if (row < 0 || row >= own) continue;
        made[c * own + row] = first + starts[b] + j * p->stride - back;
        of[c * own + row] = whole + back;
      }
    }
  }
  for (int64_t i = 0; i < rows; i++)
    cr_assert(
        made[i] == token[i] && of[i] == n[i],
        "row %lld of %lld, kernel %lld, stride %lld, chunk %lld: %lld tokens from %lld on, not "
        "%lld from %lld",
        (long long)i, (long long)rows, (long long)p->kernel, (long long)p->stride,
        (long long)p->chunk, (long long)of[i], (long long)made[i], (long long)n[i],
        (long long)token[i]);
}

/* Every query finds its window among the keys, at the distance that it has in the sequence, and in
 * the same places of tiles. */
static void check_window(const pack *p) {
  static int32_t starts[MOST_SEQUENCES + 1], pos[MOST_SEQUENCES], keys[MOST_SEQUENCES + 1],
      at[MOST_SEQUENCES];
  const int64_t tile = 1 + below(4), window = below(p->chunk), left = window + tile - 1;
  if (left > p->chunk) return;
  for (int64_t c = 0; c < 2 * p->ranks; c++) {
    const int64_t lo = c * p->chunk, hi = lo + p->chunk;
    rgi_cp_pieces(p->cu, p->nseq, lo, hi, starts, pos);
    rgi_cp_window(p->cu, p->nseq, lo, hi, left, tile, keys, at);
    for (int64_t b = 0; b < p->nseq; b++) {
      cr_assert_geq(keys[b], 0);
      cr_assert_leq(keys[b], keys[b + 1]);
      cr_assert_leq((int64_t)keys[b + 1], left + p->chunk);
      cr_assert_geq(at[b], 0);
      if (starts[b] == starts[b + 1]) continue;
      const int64_t skipped =
          lo - left + keys[b] - p->cu[b]; /* keys of the sequence before these */
      cr_assert_geq(skipped, 0);
      cr_assert_eq(skipped % tile, 0);
      cr_assert_eq(at[b] + skipped, pos[b]);
      cr_assert_leq(skipped, pos[b] > window ? pos[b] - window : 0);
      const int64_t last = pos[b] + starts[b + 1] - starts[b]; /* one past the last query's key */
      cr_assert_eq(last - skipped, keys[b + 1] - keys[b]);
    }
  }
}

static int64_t slow_load(const pack *p, rg_cp_mode mode) {
  int64_t most = 0;
  for (int r = 0; r < p->ranks; r++) {
    int64_t sum = 0;
    for (int64_t t = 0; t < live(p); t++) {
      const int64_t c = t / p->chunk;
      const int64_t owner = mode == RG_CP_BLOCKS ? c / 2 : c < p->ranks ? c : 2 * p->ranks - 1 - c;
      if (owner == r) sum += p->position[t] + 1 + RGK_CP_TOKEN_LOAD;
    }
    if (sum > most) most = sum;
  }
  return most;
}

static void check_auto(const pack *p) {
  const int64_t blocks = slow_load(p, RG_CP_BLOCKS), zigzag = slow_load(p, RG_CP_ZIGZAG);
  cr_assert_eq(rgi_cp_load(RG_CP_BLOCKS, p->cu, p->nseq, p->capacity, p->ranks), blocks);
  cr_assert_eq(rgi_cp_load(RG_CP_ZIGZAG, p->cu, p->nseq, p->capacity, p->ranks), zigzag);
  cr_assert_eq(rgi_cp_choose(RG_CP_AUTO, p->cu, p->nseq, p->capacity, p->ranks),
               zigzag < blocks ? RG_CP_ZIGZAG : RG_CP_BLOCKS);
  cr_assert_eq(rgi_cp_choose(RG_CP_ZIGZAG, p->cu, p->nseq, p->capacity, p->ranks), RG_CP_ZIGZAG);
}

Test(cp_tables, random_packs) {
  static pack p;
  const int64_t n = 10000, from = (int64_t)round_seed(0, (int)n);
  for (int64_t i = from; i < from + n; i++) {
    draw(&p, i);
    check_rows(&p, RG_CP_BLOCKS);
    check_rows(&p, RG_CP_ZIGZAG);
    check_rows(&p, RG_CP_AUTO);
    check_blocks(&p, false);
    check_blocks(&p, true);
    check_window(&p);
    check_auto(&p);
  }
}

/* A border at every residue of stride, kernel and chunk: two sequences, cut at every row. */
Test(cp_tables, borders_at_every_row) {
  static pack p;
  for (int w = 0; w < RGI_COUNT(ranks_of); w++)
    for (int64_t stride = 1; stride <= 4; stride++)
      for (int64_t times = 1; times <= 3; times++) {
        p = (pack){.ranks = ranks_of[w], .stride = stride, .kernel = stride * times, .nseq = 2};
        p.chunk = stride * (times + 1);
        p.capacity = p.chunk * 2 * p.ranks;
        for (int64_t cut = 0; cut <= p.capacity; cut++)
          for (int64_t dead = 0; dead <= 1; dead++) {
            const int64_t end = dead ? cut + (p.capacity - cut) / 2 : p.capacity;
            p.cu[1] = (int32_t)cut, p.cu[2] = (int32_t)end;
            note_rows(&p);
            check_rows(&p, RG_CP_BLOCKS);
            check_rows(&p, RG_CP_ZIGZAG);
            check_blocks(&p, false);
            check_blocks(&p, true);
            check_window(&p);
            check_auto(&p);
          }
      }
}

/* The smallest chunk there may be holds kernel - 1 rows; a block then covers two chunks. */
Test(cp_tables, lengths_around_the_kernel) {
  static pack p;
  for (int w = 0; w < RGI_COUNT(ranks_of); w++)
    for (int64_t kernel = 1; kernel <= 9; kernel++) {
      p = (pack){.ranks = ranks_of[w],
                 .stride = 1,
                 .kernel = kernel,
                 .chunk = kernel > 1 ? kernel - 1 : 1};
      p.capacity = p.chunk * 2 * p.ranks;
      for (int64_t length = 0; length <= kernel + 1; length++) {
        for (p.nseq = 0; p.nseq < MOST_SEQUENCES; p.nseq++) {
          const int64_t next = p.cu[p.nseq] + length;
          if (next > p.capacity) break;
          p.cu[p.nseq + 1] = (int32_t)next;
        }
        note_rows(&p);
        check_rows(&p, RG_CP_ZIGZAG);
        check_blocks(&p, false);
        check_blocks(&p, true);
        check_auto(&p);
      }
    }
}

Test(cp_tables, one_long_sequence_is_balanced_by_mode_2) {
  const int32_t one[] = {0, 1 << 20}, many[] = {0, 64, 128, 192, 256, 320, 384, 448, 512};
  cr_assert_eq(rgi_cp_choose(RG_CP_AUTO, one, 1, 1 << 20, 8), RG_CP_ZIGZAG);
  cr_assert_eq(rgi_cp_choose(RG_CP_AUTO, many, 8, 512, 4), RG_CP_BLOCKS);
  /* every rank then has the same load: that of half the rows of both ends */
  const int64_t load = rgi_cp_load(RG_CP_ZIGZAG, one, 1, 1 << 20, 8), n = 1 << 20;
  cr_assert_eq(load * 8, n * (n + 1) / 2 + n * RGK_CP_TOKEN_LOAD);
}

Test(cp_tables, what_makes_no_sense_is_refused) {
  const int32_t cu[] = {0, 10, 16}, falls[] = {0, 10, 9}, late[] = {1, 10, 16},
                long_[] = {0, 10, 17};
  rg_range out[2];
  rg_error e = {0};
  cr_assert_eq(rg_cp_rows(cu, 3, 16, 2, RG_CP_AUTO, 1, out, &e), RG_OK);
#define REFUSED(code, call)       \
  do {                            \
    e = (rg_error){0};            \
    cr_assert_eq(call, code);     \
    cr_assert_eq(e.status, code); \
  } while (0)
  REFUSED(RG_E_USAGE, rg_cp_rows(NULL, 3, 16, 2, RG_CP_AUTO, 1, out, &e));
  REFUSED(RG_E_USAGE, rg_cp_rows(cu, 3, 16, 2, RG_CP_AUTO, 2, out, &e));
  REFUSED(RG_E_USAGE, rg_cp_rows(cu, 3, 16, 0, RG_CP_AUTO, 0, out, &e));
  REFUSED(RG_E_USAGE, rg_cp_rows(cu, 3, 16, 2, (rg_cp_mode)7, 0, out, &e));
  REFUSED(RG_E_SHAPE, rg_cp_rows(cu, 3, 18, 2, RG_CP_AUTO, 0, out, &e));
  REFUSED(RG_E_DATA, rg_cp_rows(falls, 3, 16, 2, RG_CP_AUTO, 0, out, &e));
  REFUSED(RG_E_DATA, rg_cp_rows(late, 3, 16, 2, RG_CP_AUTO, 0, out, &e));
  REFUSED(RG_E_DATA, rg_cp_rows(long_, 3, 16, 2, RG_CP_AUTO, 0, out, &e));
}

/* Each document's chunks by hand, and all rows once. */
Test(cp_tables, documents) {
  rg_error e = {0};
  static const int32_t cu[] = {0, 8, 8, 24};
  static const int64_t first[] = {0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23};
  int64_t rows[12];
  bool owned[24] = {false};
  for (int r = 0; r < 2; r++) {
    cr_assert_eq(rg_cp_document_rows(cu, 4, 2, r, rows, 12, &e), RG_OK, "%s", e.message);
    if (r == 0) cr_assert_arr_eq(rows, first, sizeof rows);
    for (int i = 0; i < 12; i++) {
      cr_assert(!owned[rows[i]]);
      owned[rows[i]] = true;
    }
  }
  static const int32_t odd[] = {0, 8, 10}, falls[] = {0, 8, 4};
  REFUSED(RG_E_USAGE, rg_cp_document_rows(NULL, 4, 2, 0, rows, 12, &e));
  REFUSED(RG_E_USAGE, rg_cp_document_rows(cu, 4, 2, 2, rows, 12, &e));
  REFUSED(RG_E_USAGE, rg_cp_document_rows(cu, 4, 2, 0, rows, 11, &e));
  REFUSED(RG_E_SHAPE, rg_cp_document_rows(odd, 3, 2, 0, rows, 5, &e));
  REFUSED(RG_E_DATA, rg_cp_document_rows(falls, 3, 2, 0, rows, 2, &e));
}
