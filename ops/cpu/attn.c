/* ops/cpu/attn.c: attention on the CPU: tiles, packing, and the walk over visible key tiles.
 *
 * Leaves the two directions to attn_fwd.c and attn_bwd.c, arithmetic to attn_simd.h.
 */
#include "attn.h"

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static int64_t round16(int64_t n) {
  return (n + 15) / 16 * 16;
}

void rgi_attn_cut(rgi_attn *a, int isa) {
  a->dp = round16(a->D);
  a->ep = round16(a->E);
  a->chunks = a->G > 0 ? (a->G + RGI_ATTN_ROWS - 1) / RGI_ATTN_ROWS : 1;
  a->heads = a->G > 0 ? (a->G + a->chunks - 1) / a->chunks : 1;
  a->queries = RGI_ATTN_ROWS / a->heads;
  if (a->mode != RGI_ATTN_SLC) a->block = RGI_ATTN_KEYS;
  a->parts = (a->block + RGI_ATTN_KEYS - 1) / RGI_ATTN_KEYS;
  a->keys = (a->block + a->parts - 1) / a->parts;
  a->isa = rgi_attn_level(isa);
}

const rgi_attn_isa *rgi_attn_level(int isa) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa >= 2) return &rgi_attn_avx512;
  if (isa >= 1) return &rgi_attn_avx2;
#endif
  (void)isa;
  return &rgi_attn_base;
}

/* ---- tiles ---- */

void rgi_attn_key_rows(const rgi_attn *a, int64_t b, int64_t *row, int64_t *n) {
  if (a->paged) {
    *row = 0;
    *n = rgi_paged_tokens(&a->pages, b);
    if (a->mode == RGI_ATTN_CMP) *n = rgk_blocks_in(*n, a->kernel, a->stride);
    return;
  }
  const rg_arg *cu = a->cu_k ? a->cu_k : a->cu;
  *row = rgi_attn_start(cu, b);
  *n = rgi_attn_start(cu, b + 1) - *row;
  if (a->mode == RGI_ATTN_CMP) {
    *row /= a->stride;
    *n = rgk_blocks_in(*n, a->kernel, a->stride);
  }
  /* Compressed rows are not a token axis that the runner could have checked. */
  *row = least(*row, a->S);
  *n = least(*n, a->S - *row);
}

int64_t rgi_attn_row_tiles(const rgi_attn *a) {
  return rgi_tile_capacity(a->T, a->B, a->queries);
}
int64_t rgi_attn_key_blocks(const rgi_attn *a) {
  return rgi_tile_capacity(a->S, a->B, a->block);
}
int64_t rgi_attn_key_tiles(const rgi_attn *a) {
  return least(a->S, rgi_attn_key_blocks(a) * a->parts);
}

int64_t rgi_attn_fill_rows(const rgi_attn *a, rgi_tile *tiles) {
  int64_t count = 0;
  for (int64_t b = 0; b < a->B; b++) {
    int64_t row = rgi_attn_start(a->cu, b), n = rgi_attn_start(a->cu, b + 1) - row;
    for (int64_t i = 0; i < n; i += a->queries)
      tiles[count++] = (rgi_tile){
          .b = (int32_t)b, .n = (int32_t)least(a->queries, n - i), .row = row + i, .first = i};
  }
  return count;
}

int64_t rgi_attn_fill_keys(const rgi_attn *a, rgi_attn_keys *tiles, int64_t *first_block) {
  int64_t count = 0, block = 0;
  for (int64_t b = 0; b < a->B; b++) {
    int64_t row, n;
    rgi_attn_key_rows(a, b, &row, &n);
    if (first_block) first_block[b] = block;
    for (int64_t i = 0; i < n; i += a->block, block++)
      for (int64_t j = i, end = least(n, i + a->block); j < end; j += a->keys)
        tiles[count++] = (rgi_attn_keys){.b = (int32_t)b,
                                         .n = (int32_t)least(a->keys, end - j),
                                         .row = row + j,
                                         .first = j,
                                         .block = block};
  }
  return count;
}

rgi_attn_rows rgi_attn_task_rows(const rgi_attn *a, const rgi_tile *tiles, int64_t ntile,
                                 int64_t task, const rgi_tile **tile) {
  int64_t chunk = task % a->chunks, h = task / a->chunks / ntile, skip = chunk * a->heads;
  *tile = &tiles[task / a->chunks % ntile];
  rgi_attn_rows r = {.row = (*tile)->row, .h = h, .head = h * a->G + skip, .nq = (*tile)->n};
  r.heads = (int)least(a->heads, a->G - skip);
  r.n = r.nq * r.heads;
  return r;
}

void rgi_attn_load_rows(const rgi_attn *a, const rgi_attn_rows *r, const rg_arg *x, float *dst,
                        int64_t ld) {
  for (int q = 0; q < r->nq; q++)
    for (int g = 0; g < r->heads; g++, dst += ld)
      a->isa->load(dst, x->dtype, rgi_at(x, r->row + q, r->head + g), x->dim[2]);
}

/* ---- packing ---- */

/* Key j of a tile. In pages the first compressed key stands in the row of its last token. */
static const void *key_of(const rgi_attn *a, const rgi_attn_keys *t, int64_t j, int64_t h,
                          const rg_arg *x) {
  if (!a->paged) return rgi_at(x, t->row + j, h);
  const int64_t before = a->mode == RGI_ATTN_CMP ? a->kernel / a->stride - 1 : 0;
  return rgi_paged_row(x, rgi_paged_table(&a->pages, t->b), before + t->first + j, h);
}

void rgi_attn_pack_tile(const rgi_attn *a, const rgi_attn_keys *t, int64_t h, const rg_arg *x,
                        float *transposed, float *natural) {
  const int64_t width = x->dim[x->rank - 1], padded = round16(width), n = t->n;
  float row[RGI_ATTN_MAX_D];
  for (int64_t j = 0; j < n; j++) {
    float *to = natural ? natural + j * padded : row;
    a->isa->load(to, x->dtype, key_of(a, t, j, h, x), width);
    if (natural) memset(to + width, 0, (size_t)(padded - width) * sizeof(float));
    if (!transposed) continue;
    for (int64_t i = 0; i < width; i++) transposed[i * n + j] = to[i];
  }
}

void rgi_attn_pack(const rgi_attn *a, const rgi_attn_keys *t, int64_t h, const rg_arg *x,
                   float *transposed, float *natural) {
  const int64_t width = x->dim[2];
  rgi_attn_pack_tile(a, t, h, x, transposed ? rgi_attn_at(a, transposed, h, t->row, width) : NULL,
                     natural ? rgi_attn_at(a, natural, h, t->row, round16(width)) : NULL);
}

static void zero_rows(const rg_arg *x, int64_t from, int64_t to) {
  const size_t size = rg_dtype_size(x->dtype);
  for (int64_t t = from; t < to; t++)
    if (x->rank == 2) {
      memset(rgi_at(x, t, 0), 0, (size_t)x->dim[1] * size);
    } else {
      for (int64_t h = 0; h < x->dim[1]; h++) memset(rgi_at(x, t, h), 0, (size_t)x->dim[2] * size);
    }
}

void rgi_attn_zero_query_rows(const rgi_attn *a, const rg_arg *x) {
  zero_rows(x, rgi_attn_start(a->cu, a->B), a->T);
}

void rgi_attn_zero_key_rows(const rgi_attn *a, const rg_arg *x) {
  int64_t end = 0;
  for (int64_t b = 0; b < a->B; b++) {
    int64_t row, n;
    rgi_attn_key_rows(a, b, &row, &n);
    if (n == 0) continue;
    zero_rows(x, end, row);
    end = row + n;
  }
  zero_rows(x, end, a->S);
}

/* ---- the walk ---- */

int64_t rgi_attn_next_block(const rgi_attn *a, const int32_t *list, int32_t *at, int64_t seen,
                            int64_t n) {
  while (*at < a->N) {
    int64_t block = list[(*at)++];
    if (block <= seen) continue;
    if (block * a->block < n) return block;
    *at = (int32_t)a->N; /* whatever follows is out of range too, or not larger */
  }
  return INT64_MAX;
}

static const int32_t *selection(const rgi_attn_walk *w, int q) {
  return rgi_attn_idx(w->a, w->query + q, w->h);
}

void rgi_attn_walk_begin(rgi_attn_walk *w, const rgi_attn *a, const rgi_tile *t, int64_t h) {
  w->a = a;
  w->h = h;
  w->query = t->row;
  w->nq = t->n;
  w->part = 0;
  w->block = 0;
  w->end = 0;
  rgi_attn_key_rows(a, t->b, &w->key_row, &w->n);
  int64_t pos = t->first + rgi_attn_offset(a, t->b), low = INT64_MAX;
  for (int q = 0; q < w->nq; q++, pos++) {
    rgi_attn_visible(a, pos, w->n, &w->lo[q], &w->hi[q]);
    if (w->lo[q] < w->hi[q]) {
      low = least(low, w->lo[q] / a->block);
      if (w->end < w->hi[q]) w->end = w->hi[q];
    }
    if (a->idx) {
      w->at[q] = 0;
      w->next[q] = rgi_attn_next_block(a, selection(w, q), &w->at[q], -1, w->hi[q]);
    }
  }
  if (!a->idx && w->end > 0) w->block = low;
}

/* Moves to the first part of the next block that some list holds. */
static bool next_selected(rgi_attn_walk *w) {
  int64_t block = INT64_MAX;
  for (int q = 0; q < w->nq; q++) block = least(block, w->next[q]);
  w->block = block;
  return block < INT64_MAX;
}

static void leave_block(rgi_attn_walk *w) {
  for (int q = 0; w->a->idx && q < w->nq; q++)
    if (w->next[q] == w->block)
      w->next[q] = rgi_attn_next_block(w->a, selection(w, q), &w->at[q], w->block, w->hi[q]);
  w->block++;
  w->part = 0;
}

bool rgi_attn_walk_next(rgi_attn_walk *w) {
  const rgi_attn *a = w->a;
  do {
    if (w->part == 0 && a->idx && !next_selected(w)) return false;
    w->first = w->block * a->block + w->part * a->keys;
    if (w->first >= w->end && !a->idx) return false;
    int64_t end = least(w->n, least(w->first + a->keys, (w->block + 1) * a->block));
    w->keys = (int)(end - w->first);

    int from = RGI_ATTN_KEYS, to = 0;
    w->runs = 0;
    bool open = false;
    for (int q = 0; q < w->nq; q++) {
      int32_t lo, hi;
      if (w->keys > 0) rgi_attn_columns(w->first, w->keys, w->lo[q], w->hi[q], &lo, &hi);
      if (w->keys <= 0 || lo >= hi || (a->idx && w->next[q] != w->block)) {
        open = false;
        continue;
      }
      if (lo < from) from = lo;
      if (hi > to) to = hi;
      if (!open) w->run[w->runs++][0] = q;
      w->run[w->runs - 1][1] = q + 1;
      open = true;
    }
    w->c0 = from / 16 * 16;
    w->c1 = (to + 15) / 16 * 16;
    w->seen = to;
    if (++w->part == a->parts || end == w->n) leave_block(w);
  } while (w->runs == 0);
  return true;
}
