/* kernels/attn/plain.h: attention of any shape and type, without tensor cores. */
#ifndef RGK_ATTN_PLAIN_H
#define RGK_ATTN_PLAIN_H

#include "../pages.h"
#include "attn.h"

/* Instances by the larger of the two head widths, rounded up; the small ones keep within 99 KB of
 * shared memory, all that many GPUs have. There the widest has no place. */
enum {
  RGK_PLAIN_64,
  RGK_PLAIN_128,
  RGK_PLAIN_256,
  RGK_PLAIN_576,
  RGK_PLAIN_128_SMALL,
  RGK_PLAIN_256_SMALL
};
enum { RGK_PLAIN_THREADS = 128, RGK_PLAIN_DKV_THREADS = 256, RGK_PLAIN_DELTA_ROWS = 128 };

/* Row tiles (forward, dQ): `queries` queries of a sequence times `heads` of a KV head's G query
 * heads, which are cut into `parts`; key tiles of SLC: a block is cut into `key_parts` of `keys`
 * keys. */
typedef struct rgk_attn_plain {
  rgk_attn a;
  rgk_pages pages; /* forward: where keys are, if there is a table; k and v are a page's then */
  bool vec;        /* four neighbours may be read and written at once */
  int32_t queries, heads, parts;
  int64_t slots; /* row tiles, rgk_slots(T, n, queries) */
  int32_t keys, key_parts;
  /* backward */
  float *delta; /* [T, H] */
  double *sink; /* [sink_chunks, H] */
  int64_t sink_chunks;
  int32_t sink_rows; /* rows of a chunk */
  /* Key tiles (dK, dV): tiles of `own` keys. SLC: lists of queries from the CSR (csr.h), a list cut
   * into parts of at least `unit`; CMP: the queries cut into parts. */
  int32_t own, own_parts;
  int64_t key_slots;
  const int64_t *start; /* [KH, csr_slots + 1] */
  const int32_t *rows;  /* [KH, T * N] */
  int64_t csr_slots, unit;
  float *part_k, *part_v; /* [KH, part_rows, D], […, E] */
  int64_t part_rows;
} rgk_attn_plain;

/* Most parts that the queries of a key tile are cut into. CMP: a sequence of L tokens (queries or
 * keys, the larger number) has as many parts as L / 256, but L times that stays below 2^17. */
enum { RGK_PLAIN_PARTS = 16, RGK_PLAIN_PART_ROWS = 256, RGK_PLAIN_PART_MOST = 1 << 17 };

RGK_BOTH int32_t rgk_plain_width(int w) {
  return w == RGK_PLAIN_64                                ? 64
         : w == RGK_PLAIN_128 || w == RGK_PLAIN_128_SMALL ? 128
         : w == RGK_PLAIN_576                             ? 576
                                                          : 256;
}
/* of a row tile, and keys of a key tile in dK and dV */
RGK_BOTH int32_t rgk_plain_rows(int w) {
  return w == RGK_PLAIN_256_SMALL || w == RGK_PLAIN_576   ? 16
         : w == RGK_PLAIN_256 || w == RGK_PLAIN_128_SMALL ? 32
                                                          : 64;
}
/* backward: of a key tile in dQ, rows of a batch in dK and dV */
RGK_BOTH int32_t rgk_plain_keys(int w) {
  return w == RGK_PLAIN_256_SMALL || w == RGK_PLAIN_576 ? 8 : w == RGK_PLAIN_128_SMALL ? 16 : 32;
}
enum { RGK_PLAIN_FWD_KEYS = 64 };

/* Bytes of shared memory; the kernels' structs are checked against these. */
RGK_BOTH uint32_t rgk_plain_fwd_shared(int w) {
  uint32_t m = (uint32_t)rgk_plain_rows(w), ld = (uint32_t)rgk_plain_width(w) + 4;
  return 4 * ((m + RGK_PLAIN_FWD_KEYS) * ld + m * (RGK_PLAIN_FWD_KEYS + 8) + RGK_PLAIN_FWD_KEYS +
              2 * m + 4);
}
RGK_BOTH uint32_t rgk_plain_dq_shared(int w) {
  uint32_t m = (uint32_t)rgk_plain_rows(w), n = (uint32_t)rgk_plain_keys(w);
  return 4 * (2 * (m + n) * ((uint32_t)rgk_plain_width(w) + 4) + m * (n + 8) + 2 * m + 4);
}
RGK_BOTH uint32_t rgk_plain_dkv_shared(int w) {
  uint32_t m = (uint32_t)rgk_plain_rows(w), n = (uint32_t)rgk_plain_keys(w);
  return 4 * (2 * (m + 2 * n) * ((uint32_t)rgk_plain_width(w) + 4) + 2 * m * (n + 8) + 3 * 6 * n);
}

RGK_GETTER(rgk_plain_fwd(int w))  /* grid slots * KH * parts, RGK_PLAIN_THREADS */
RGK_GETTER(rgk_plain_dq(int w))   /* the same */
RGK_GETTER(rgk_plain_dkv(int w))  /* grid key_slots * KH * own_parts, RGK_PLAIN_DKV_THREADS */
RGK_GETTER(rgk_plain_delta(void)) /* grid over T * H / RGK_PLAIN_DELTA_ROWS, RGK_PLAIN_THREADS */
/* CMP: grid KH * S; SLC: grid KH * csr_slots; RGK_PLAIN_THREADS */
RGK_GETTER(rgk_plain_reduce(void))
RGK_GETTER(rgk_plain_sink(void))     /* grid sink_chunks * H, RGK_PLAIN_THREADS */
RGK_GETTER(rgk_plain_sink_sum(void)) /* grid over H threads, RGK_PLAIN_THREADS */

#endif
