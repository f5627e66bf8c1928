/* kernels/attn/key_tiles.cuh: what a block of dK and dV works on, where blocks are laid out over
   tiles of keys: the keys, and the queries that see them or are listed (plain.h says how tiles and
   lists are cut). */
#pragma once
#include "plain.cuh"

namespace rgk {
namespace plain {

/* Parts of a sequence's queries, CMP; alone or packed the same. */
__device__ __forceinline__ int64_t query_parts(const rgk_attn &a, int b) {
  const int64_t queries = seq_start(a.seqs, b + 1) - seq_start(a.seqs, b);
  const int64_t keys = seq_start(a.kseqs, b + 1) - seq_start(a.kseqs, b);
  const int64_t n = max(max(queries, keys), (int64_t)1);
  return max((int64_t)1,
             min((int64_t)RGK_PLAIN_PARTS, min(n / RGK_PLAIN_PART_ROWS, RGK_PLAIN_PART_MOST / n)));
}
/* Parts of a list of n queries, SLC. */
__device__ __forceinline__ int64_t list_parts(const rgk_attn_plain &p, int64_t n) {
  return n <= 2 * p.unit ? 1 : min((int64_t)RGK_PLAIN_PARTS, n / p.unit);
}

/* What a block works on: keys of sequence b from position `first` on, and the queries that see
 * them, rows from `row` of the pack, or those listed. */
struct key_tile {
  int kh, b, n;
  bool dead;          /* the keys are dead rows */
  int64_t key, first; /* row and position of the first key */
  int64_t keys;       /* of the sequence */
  const int32_t *list;
  int64_t row, queries;
  int64_t origin; /* row of position 0 */
  int64_t part;   /* row in the partial sums; -1: none, the result is whole */
};

/* Cuts `queries` into parts and keeps one. */
__device__ __forceinline__ void take_part(key_tile &t, int64_t parts, int64_t part) {
  const int64_t each = (t.queries + parts - 1) / parts, from = min(t.queries, part * each);
  t.queries = min(each, t.queries - from);
  if (t.list)
    t.list += from;
  else
    t.row += from;
}

/* False: nothing to do. */
__device__ __forceinline__ bool find_keys(const rgk_attn_plain &p, key_tile &t) {
  const rgk_attn &a = p.a;
  const int64_t per = (int64_t)a.KH * p.own_parts, within = blockIdx.x % per;
  int64_t slot = blockIdx.x / per, part = 0, parts = 1, list = 0, listed = 0, before = 0;
  const int own_part = (int)(within % p.own_parts);
  t.kh = (int)(within / p.own_parts);
  int64_t size = p.own;
  if (a.mode == RGK_CMP) size *= a.stride;
  if (a.mode == RGK_SLC) { /* the last block s with start[s] / unit + s <= slot */
    const int64_t *start = p.start + t.kh * (p.csr_slots + 1);
    int64_t lo = 0, hi = p.csr_slots;
    while (lo < hi) {
      const int64_t mid = (lo + hi + 1) >> 1;
      if (start[mid] / p.unit + mid <= slot)
        lo = mid;
      else
        hi = mid - 1;
    }
    if (lo == p.csr_slots) return false;
    list = start[lo];
    listed = start[lo + 1] - list;
    part = slot - list / p.unit - lo;
    parts = list_parts(p, listed);
    if (part >= parts) return false;
    slot = lo;
    size = a.block;
  }
  tile k = find_tile(a.kseqs, slot, (int)size);
  t.b = k.b;
  t.dead = k.b >= a.kseqs.n;
  t.first = k.first;
  t.key = k.begin + k.first;
  t.list = nullptr;
  t.part = -1;
  if (!t.dead) t.origin = seq_start(a.seqs, t.b) - first_position(a, t.b);
  if (a.mode == RGK_SLC) {
    before = (int64_t)own_part * p.own;
    t.first += before;
    t.key += before;
    t.n = (int)min((int64_t)p.own, min((int64_t)a.block - before, k.length - t.first));
    if (t.n <= 0) return false;
    if (t.dead) return part == 0;
    t.keys = k.length;
    t.list = p.rows + t.kh * a.T * a.N + list;
    t.queries = listed;
    take_part(t, parts, part);
    if (parts > 1) t.part = (list / p.unit + part) * a.block + before;
    return true;
  }
  if (a.mode == RGK_CMP) {
    if (t.dead) return false; /* `reduce` sees to those */
    const key_span span = rgk::keys_of(a, t.b);
    t.first = k.first / a.stride;
    t.keys = span.n;
    t.key = span.row + t.first;
    t.n = (int)min((int64_t)p.own, span.n - t.first);
    part = own_part;
    parts = query_parts(a, t.b);
    if (t.n <= 0 || part >= parts) return false;
    t.part = RGK_PLAIN_PARTS * span.row + part * span.n + t.first;
  } else {
    t.n = k.n;
    t.keys = k.length;
    if (t.n <= 0 || t.first < 0) return false; /* `gap` sees to what is before the first sequence */
    if (t.dead) return true;
  }
  /* Positions [from, to) see the tile. */
  const int64_t begin = seq_start(a.seqs, t.b), queries = seq_start(a.seqs, t.b + 1) - begin;
  const int64_t offset = first_position(a, t.b);
  int64_t from = t.first, to = queries + offset;
  if (a.mode == RGK_CMP) {
    from = t.first * a.stride + a.kernel - 1;
    const int64_t each = (queries + parts - 1) / parts;
    from = max(from, part * each + offset);
    to = min(to, (part + 1) * each + offset);
  } else if (a.window_left >= 0) {
    to = min(to, t.first + t.n + a.window_left);
  }
  from = max(from - offset, (int64_t)0);
  t.row = begin + from;
  t.queries = max(to - offset - from, (int64_t)0);
  return true;
}

/* Keys that lie before the first sequence (in a halo: context parallelism) belong to none: the
 * block of that sequence's first slot clears their rows. */
template <int THREADS> __device__ __forceinline__ void gap(const rgk_attn_plain &p) {
  const rgk_attn &a = p.a;
  const int64_t per = (int64_t)a.KH * p.own_parts, within = blockIdx.x % per;
  const int64_t n = a.mode == RGK_SWA ? seq_start(a.kseqs, 0) : 0, kh = within / p.own_parts;
  if (n == 0 || within % p.own_parts || blockIdx.x / per != n / p.own) return;
  for (int64_t r = threadIdx.x / 32; r < n; r += THREADS / 32) {
    const int lane = threadIdx.x % 32;
    if (a.dk.data && !a.acc_k) zero_row<32>(a.dk, r * a.dk.row + kh * a.dk.head, a.D, lane);
    if (a.dv.data && !a.acc_v) zero_row<32>(a.dv, r * a.dv.row + kh * a.dv.head, a.E, lane);
  }
}

/* A tile of keys of no sequence. */
template <int THREADS>
__device__ __forceinline__ void clear_keys(const rgk_attn &a, const key_tile &t) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < t.n; r += THREADS / 32) {
    if (a.dk.data && !a.acc_k)
      zero_row<32>(a.dk, (t.key + r) * a.dk.row + t.kh * a.dk.head, a.D, lane);
    if (a.dv.data && !a.acc_v)
      zero_row<32>(a.dv, (t.key + r) * a.dv.row + t.kh * a.dv.head, a.E, lane);
  }
}

} // namespace plain
} // namespace rgk
