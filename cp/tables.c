/* cp/tables.c: see tables.h; and what data loaders are told: rg_cp_rows, rg_cp_document_rows. */
#include "tables.h"

/* ---- balance ---- */

int64_t rgi_cp_load(rg_cp_mode mode, const int32_t *cu, int64_t nseq, int64_t capacity, int ranks) {
  int64_t rank[RGI_CP_MOST_RANKS] = {0}, most = 0;
  const int64_t chunk = capacity / (2 * (int64_t)ranks);
  for (int64_t b = 0; b < nseq; b++)
    for (int64_t at = cu[b], end; at < cu[b + 1]; at = end) {
      const int64_t c = at / chunk;
      end = rgk_clamp((c + 1) * chunk, 0, cu[b + 1]);
      rank[rgk_cp_place(mode, ranks, c) / 2] += rgk_cp_work(at - cu[b], end - at);
    }
  for (int r = 0; r < ranks; r++)
    if (rank[r] > most) most = rank[r];
  return most;
}

rg_cp_mode rgi_cp_choose(rg_cp_mode mode, const int32_t *cu, int64_t nseq, int64_t capacity,
                         int ranks) {
  if (mode != RG_CP_AUTO) return mode;
  const int64_t blocks = rgi_cp_load(RG_CP_BLOCKS, cu, nseq, capacity, ranks);
  const int64_t zigzag = rgi_cp_load(RG_CP_ZIGZAG, cu, nseq, capacity, ranks);
  return zigzag < blocks ? RG_CP_ZIGZAG : RG_CP_BLOCKS;
}

/* ---- pieces ---- */

void rgi_cp_pieces(const int32_t *cu, int64_t nseq, int64_t lo, int64_t hi, int32_t *starts,
                   int32_t *pos) {
  for (int64_t b = 0; b <= nseq; b++) starts[b] = rgk_cp_piece(cu[b], lo, hi);
  for (int64_t b = 0; b < nseq; b++) pos[b] = rgk_cp_position(cu[b], lo);
}

void rgi_cp_blocks(const int32_t *cu, int64_t nseq, int64_t first, int64_t last, int64_t stride,
                   int32_t *starts) {
  int64_t gap = 0; /* tokens before the running sequence's next block */
  for (int64_t b = 0; b < nseq; b++)
    if (cu[b] < first && cu[b + 1] > first) gap = rgk_cp_gap(cu[b], cu[b + 1], first, stride);
  starts[0] = 0;
  for (int64_t b = 0; b <= nseq; b++) starts[b + 1] = rgk_cp_block(cu[b], gap, first, last);
}

void rgi_cp_window(const int32_t *cu, int64_t nseq, int64_t lo, int64_t hi, int64_t left,
                   int64_t tile, int32_t *starts, int32_t *pos) {
  const int64_t first = lo - left;
  int64_t from = first < 0 ? 0 : first; /* where keys are read from */
  for (int64_t b = 0; b < nseq; b++)
    if (cu[b] < first && cu[b + 1] > first) from = rgk_cp_keys(cu[b], cu[b + 1], first, tile);
  for (int64_t b = 0; b <= nseq; b++) starts[b] = rgk_cp_key(cu[b], from, hi, first);
  for (int64_t b = 0; b < nseq; b++) pos[b] = rgk_cp_query(cu[b + 1], starts[b] + first, lo);
}

/* ---- for data loaders ---- */

static rg_status check_rank(int ranks, int rank, rg_error *e) {
  if (ranks >= 1 && ranks <= RGI_CP_MOST_RANKS && rank >= 0 && rank < ranks) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "rank %d of %d; expected 1 to %d ranks, counted from 0", rank, ranks,
                  RGI_CP_MOST_RANKS);
}

static rg_status check_starts(const int32_t *cu, size_t entries, int64_t most, rg_error *e) {
  for (size_t i = 0; i < entries; i++)
    if (cu[i] < (i ? cu[i - 1] : 0) || (i == 0 && cu[0]) || cu[i] > most)
      return rgi_fail(
          e, RG_E_DATA, NULL, NULL,
          "sequence start %zu is %d; expected 0 first, none below the one before, none past %lld",
          i, cu[i], (long long)most);
  return RG_OK;
}

rg_status rg_cp_rows(const int32_t *cu_seqlens, size_t entries, int64_t capacity, int ranks,
                     rg_cp_mode mode, int rank, rg_range out[2], rg_error *e) {
  if (!out || !cu_seqlens || entries < 1)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_cp_rows needs sequence starts and a place for two ranges");
  RGI_TRY(check_rank(ranks, rank, e));
  if (mode != RG_CP_AUTO && mode != RG_CP_BLOCKS && mode != RG_CP_ZIGZAG)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "there is no shard mode %d", (int)mode);
  if (capacity < 1 || capacity > INT32_MAX || capacity % (2 * (int64_t)ranks))
    return rgi_fail(e, RG_E_SHAPE, NULL, NULL, "%lld rows do not divide into %d chunks",
                    (long long)capacity, 2 * ranks);
  RGI_TRY(check_starts(cu_seqlens, entries, capacity, e));
  mode = rgi_cp_choose(mode, cu_seqlens, (int64_t)entries - 1, capacity, ranks);
  const int64_t chunk = capacity / (2 * (int64_t)ranks);
  for (int slot = 0; slot < 2; slot++) {
    const int64_t lo = rgk_cp_chunk(mode, ranks, rank, slot) * chunk;
    out[slot] = (rg_range){lo, lo + chunk};
  }
  return RG_OK;
}

rg_status rg_cp_document_rows(const int32_t *cu_seqlens, size_t entries, int ranks, int rank,
                              int64_t *rows, size_t n, rg_error *e) {
  if (!cu_seqlens || entries < 1 || (n && !rows))
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "rg_cp_document_rows needs sequence starts and a place for rows");
  RGI_TRY(check_rank(ranks, rank, e));
  RGI_TRY(check_starts(cu_seqlens, entries, INT32_MAX, e));
  const int64_t total = cu_seqlens[entries - 1];
  for (size_t b = 0; b + 1 < entries; b++)
    if ((cu_seqlens[b + 1] - cu_seqlens[b]) % (2 * ranks))
      return rgi_fail(e, RG_E_SHAPE, NULL, NULL,
                      "document %zu has %d rows; expected a multiple of %d, a chunk for each half "
                      "of %d ranks",
                      b, cu_seqlens[b + 1] - cu_seqlens[b], 2 * ranks, ranks);
  if ((int64_t)n != total / ranks)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "a place for %zu rows; a rank has %lld", n,
                    (long long)(total / ranks));
  for (size_t b = 0, at = 0; b + 1 < entries; b++) {
    const int64_t chunk = (cu_seqlens[b + 1] - cu_seqlens[b]) / (2 * ranks);
    for (int slot = 0; slot < 2; slot++) {
      const int64_t from = cu_seqlens[b] + rgk_cp_chunk(RG_CP_ZIGZAG, ranks, rank, slot) * chunk;
      for (int64_t k = 0; k < chunk; k++) rows[at++] = from + k;
    }
  }
  return RG_OK;
}
