/* kernels/attn/csr.cu: inverts a selection by a counting sort (see csr.h), in four steps:

     count    each chunk of rows counts its entries per block: count [KH, chunks, slots]
     columns  per block, the counts become sums over earlier chunks, and start the block's total
     starts   totals become starts
     scatter  each chunk puts its rows behind those of earlier ones

   Where rows have few entries, one warp scatters a chunk row by row. A row's entries that count are
   distinct blocks, so its lanes never meet, and walking rows in order keeps every list ascending
   whatever the timing. Where lists go on stands in shared memory if that has room for all blocks:
   each row waits for the one before, and memory is far. The chunk is chosen on the host so that
   count takes about half the memory of the lists.

   Where they have many, lists are cut into parts of slots, `bounds` finds where each row enters
   each part, and a thread block has a chunk of a part: a thread a row. It goes through the part by
   ranges of slots. Who chose a slot of the range is a word of bits for 32 rows in shared memory;
   what they say is put to memory slot by slot, in the order of rows: memory gets runs of
   neighbours, and the order in which bits are set does not matter.
 */
#include "csr.h"
#include "../device/scan.cuh"
#include "../device/seq.cuh"
#include <cuda_runtime.h>

using namespace rgk;

namespace {

/* Where a row's blocks are numbered from, and how many keys lie at or before its position (0:
 * none). */
struct row_keys {
  int64_t slot, keys;
};

__device__ __forceinline__ row_keys keys_of(const rgk_csr &p, int64_t row) {
  row_keys r = {0, 0};
  if (row >= p.T) return r;
  int b = find_seq(p.seqs, row);
  if (b >= p.seqs.n) return r;
  int64_t first = seq_start(p.kseqs, b), n = seq_start(p.kseqs, b + 1) - first;
  int64_t seen = row - seq_start(p.seqs, b) + (p.offset ? p.offset[b] : 0) + 1;
  r.slot = first / p.block + b;
  r.keys = seen < n ? seen : n;
  return r;
}

__global__ void __launch_bounds__(RGK_CSR_THREADS) count(const __grid_constant__ rgk_csr p) {
  const int64_t h = blockIdx.x / p.chunks, c = blockIdx.x % p.chunks;
  int32_t *sum = p.count + (h * p.chunks + c) * p.slots;
  for (int64_t s = threadIdx.x; s < p.slots; s += RGK_CSR_THREADS) sum[s] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.chunk; i += RGK_CSR_THREADS) {
    const int64_t row = c * p.chunk + i;
    const row_keys r = keys_of(p, row);
    if (r.keys <= 0) continue;
    const int32_t *idx = (const int32_t *)p.idx.data + row * p.idx.row + h * p.idx.head;
    int64_t before = -1;
    for (int n = 0; n < p.N; n++) {
      int64_t e = idx[n];
      if (e <= before) continue;
      if (e * p.block >= r.keys) break; /* what follows is further out, or not larger */
      atomicAdd(&sum[r.slot + e], 1);
      before = e;
    }
  }
}

/* A warp has a piece of the chunks, a lane a block's column. */
__global__ void __launch_bounds__(RGK_CSR_SCAN_THREADS) columns(const __grid_constant__ rgk_csr p) {
  enum { PIECES = RGK_CSR_SCAN_THREADS / 32, AT_ONCE = 8 };
  __shared__ int32_t of_piece[PIECES][32];
  const int lane = threadIdx.x % 32, piece = threadIdx.x / 32;
  const int64_t i = blockIdx.x * 32ll + lane, each = (p.chunks + PIECES - 1) / PIECES,
                from = min(piece * each, p.chunks), to = min(from + each, p.chunks);
  const bool real = i < p.KH * p.slots;
  const int64_t h = real ? i / p.slots : 0, s = real ? i - h * p.slots : 0;
  int32_t *const column = p.count + h * p.chunks * p.slots + s;
  int32_t sum = 0;
  auto walk = [&](bool put) {
    for (int64_t c = from; real && c < to; c += AT_ONCE) {
      int32_t n[AT_ONCE];
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) n[k] = c + k < to ? column[(c + k) * p.slots] : 0;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        if (put && c + k < to) column[(c + k) * p.slots] = sum;
        sum += n[k];
      }
    }
  };
  walk(false);
  of_piece[piece][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int k = 0; k < piece; k++) sum += of_piece[k][lane];
  walk(true);
  if (real && piece == PIECES - 1) p.start[h * (p.slots + 1) + s] = sum;
}

__global__ void __launch_bounds__(RGK_CSR_SCAN_THREADS) starts(const __grid_constant__ rgk_csr p) {
  enum { WARPS = RGK_CSR_SCAN_THREADS / 32 };
  __shared__ int64_t of_warp[WARPS];
  int64_t *start = p.start + blockIdx.x * (p.slots + 1), carry = 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t s0 = 0; s0 <= p.slots; s0 += RGK_CSR_SCAN_THREADS) {
    const int64_t s = s0 + threadIdx.x;
    const int64_t n = s < p.slots ? start[s] : 0;
    int64_t sum = n;
    for (int d = 1; d < 32; d *= 2) {
      int64_t x = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += x;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int64_t before = carry, all = carry;
    for (int w = 0; w < WARPS; w++) {
      if (w < warp) before += of_warp[w];
      all += of_warp[w];
    }
    if (s <= p.slots) start[s] = before + sum - n;
    carry = all;
    __syncthreads();
  }
  /* Places are read in pairs: what lies beside a list's ends is to be something. */
  uint16_t *places = p.places + blockIdx.x * p.T * p.N;
  if (p.places && threadIdx.x == 0 && carry < p.T * p.N) places[carry] = places[p.T * p.N - 1] = 0;
}

/* Of rows that fit a warp, ROWS at a time, which hides the scans' latency. at(slot): where the
 * block's list goes on, and one further from now on. */
template <class F>
__device__ __forceinline__ void scatter_rows(const rgk_csr &p, int64_t h, int64_t c, F at) {
  enum { ROWS = 16 };
  const int lane = threadIdx.x;
  int32_t *rows = p.rows + h * p.T * p.N;
  uint16_t *places = p.places ? p.places + h * p.T * p.N : nullptr;
  for (int64_t row0 = c * p.chunk; row0 < (c + 1) * p.chunk; row0 += 32) {
    const row_keys mine = keys_of(p, row0 + lane);
    if (!__any_sync(~0u, mine.keys > 0)) continue;
    for (int i = 0; i < 32; i += ROWS) {
      int e[ROWS], upto[ROWS];
      row_keys r[ROWS];
#pragma unroll
      for (int k = 0; k < ROWS; k++) {
        r[k].slot = __shfl_sync(~0u, mine.slot, i + k);
        r[k].keys = __shfl_sync(~0u, mine.keys, i + k);
        e[k] = -1;
        if (r[k].keys > 0 && lane < p.N)
          e[k] = ((const int32_t *)p.idx.data)[(row0 + i + k) * p.idx.row + h * p.idx.head + lane];
      }
#pragma unroll
      for (int k = 0; k < ROWS; k++) upto[k] = prefix_max(e[k]);
#pragma unroll
      for (int k = 0; k < ROWS; k++) {
        const int other = __shfl_up_sync(~0u, upto[k], 1), before = lane == 0 ? -1 : other;
        if (e[k] > max(before, -1) && (int64_t)e[k] * p.block < r[k].keys) {
          const int64_t to = at(r[k].slot + e[k]);
          rows[to] = (int32_t)(row0 + i + k);
          if (places) places[to] = (uint16_t)lane;
        }
        __syncwarp();
      }
    }
  }
}

__global__ void __launch_bounds__(32) scatter(const __grid_constant__ rgk_csr p) {
  enum { ROOM = 2048 };
  __shared__ uint32_t here[ROOM];
  const int lane = threadIdx.x;
  const int64_t h = blockIdx.x / p.chunks, c = blockIdx.x % p.chunks;
  const int64_t *start = p.start + h * (p.slots + 1);
  int32_t *const count = p.count + (h * p.chunks + c) * p.slots;
  volatile int32_t *const done = count;
  const bool fits = p.slots <= ROOM && p.T * p.N <= UINT32_MAX;
  if (fits) {
#pragma unroll 4
    for (int s = lane; s < p.slots; s += 32) here[s] = (uint32_t)start[s] + (uint32_t)count[s];
    __syncwarp();
  }
  auto at = [&](int64_t s) -> int64_t {
    if (fits) return here[s]++;
    const int32_t n = done[s];
    done[s] = n + 1;
    return start[s] + n;
  };
  scatter_rows(p, h, c, at);
  if (!fits) return;
#pragma unroll 4
  for (int s = lane; s < p.slots; s += 32) count[s] = (int32_t)(here[s] - (uint32_t)start[s]);
}

/* ---- rows of many entries ---- */

/* bound [KH, T, parts + 1]: a row's entry that is the first to count in a part or after it; the
 * last of them: behind the last entry that counts. Between two bounds lie a part's, and what does
 * not count. A warp has a row. */
__global__ void __launch_bounds__(RGK_CSR_THREADS) bounds(const __grid_constant__ rgk_csr p) {
  enum { AT_ONCE = 4 };
  const int64_t which = (blockIdx.x * (int64_t)RGK_CSR_THREADS + threadIdx.x) / 32;
  if (which >= p.KH * p.T) return;
  const int lane = threadIdx.x % 32;
  const int64_t h = which / p.T, row = which % p.T;
  const row_keys r = keys_of(p, row);
  const int32_t *idx = (const int32_t *)p.idx.data + row * p.idx.row + h * p.idx.head;
  int32_t *bound = p.bound + which * (p.parts + 1);
  int carry = -1, last = -1, end = 0; /* the last part entered, and behind its last entry */
  auto part_of = [&](int e) { return (int)((r.slot + e) >> p.part); };
  for (int n0 = 0; n0 < p.N && max(carry, 0) * (int64_t)p.block < r.keys; n0 += 32 * AT_ONCE) {
    int e[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int n = n0 + 32 * k + lane;
      e[k] = n < p.N ? idx[n] : -1;
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      const int upto = prefix_max(e[k]), other = __shfl_up_sync(~0u, upto, 1),
                before = lane == 0 ? carry : max(other, carry), n = n0 + 32 * k + lane;
      if (e[k] > before && (int64_t)e[k] * p.block < r.keys) {
        last = part_of(e[k]), end = n + 1;
        for (int q = before < 0 ? 0 : part_of(before) + 1; q <= last; q++) bound[q] = n;
      }
      carry = max(carry, __shfl_sync(~0u, upto, 31));
    }
  }
  last = __reduce_max_sync(~0u, last), end = __reduce_max_sync(~0u, end);
  for (int q = last + 1 + lane; q <= p.parts; q += 32) bound[q] = end;
}

enum { ROWS = RGK_CSR_MANY_ROWS, RANGE = 1 << RGK_CSR_RANGE, WORDS = ROWS / 32 };

/* Rows of a word of bits by slot, and places by row; the pads keep lanes in banks of their own. */
struct range {
  uint32_t who[WORDS][RANGE + 4];
  uint16_t place[ROWS][RANGE + 2];
};

/* PUT: lists are written; else the chunk's count of each slot is. */
template <bool PUT>
__global__ void __launch_bounds__(ROWS) many(const __grid_constant__ rgk_csr p) {
  enum { AT_ONCE = 4, EACH = RANGE * WORDS / ROWS };
  static_assert(sizeof(range) <= RGK_CSR_MANY_BYTES);
  static_assert(RANGE * WORDS % ROWS == 0 && 32 % WORDS == 0, "a slot's words are in one warp");
  extern __shared__ uint32_t memory[];
  range &s = *(range *)memory;
  const int t = threadIdx.x, word = t % WORDS;
  const int64_t c = blockIdx.x % p.chunks, part = blockIdx.x / p.chunks % p.parts,
                h = blockIdx.x / p.chunks / p.parts, row = c * ROWS + t, first = part << p.part,
                slots = min(p.slots - first, INT64_C(1) << p.part);
  const int64_t *start = p.start + h * (p.slots + 1) + first;
  int32_t *count = p.count + (h * p.chunks + c) * p.slots + first;
  int32_t *rows = p.rows + h * p.T * p.N;
  uint16_t *places = p.places ? p.places + h * p.T * p.N : nullptr;
  const int32_t *idx = (const int32_t *)p.idx.data + row * p.idx.row + h * p.idx.head;
  int n = 0, end = 0, before = -1, base = 0; /* base + e: the slot in the part */
  if (row < p.T) {
    const int32_t *bound = p.bound + (h * p.T + row) * (p.parts + 1) + part;
    n = bound[0], end = bound[1];
    if (n < end) base = (int)(keys_of(p, row).slot - first);
  }
  for (int i = t; i < (int)sizeof s.who / 4; i += ROWS) ((uint32_t *)s.who)[i] = 0;
  if (!__syncthreads_or(n < end)) {
    for (int64_t i = t; !PUT && i < slots; i += ROWS) count[i] = 0;
    return;
  }
  for (int from = 0; from < slots; from += RANGE) {
    for (bool more = true; more && n < end;) {
      int e[AT_ONCE], taken = AT_ONCE;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) e[k] = n + k < end ? idx[n + k] : -1;
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++) {
        if (!more || e[k] <= before) continue;
        const int at = base + e[k] - from;
        if (at >= RANGE) {
          more = false, taken = k;
        } else {
          before = e[k];
          atomicOr(&s.who[t / 32][at], 1u << t % 32);
          if (PUT) s.place[t][at] = (uint16_t)(n + k);
        }
      }
      n += taken;
    }
    int64_t to[EACH];
    int32_t had[EACH]; /* by earlier chunks */
#pragma unroll
    for (int i = 0; i < EACH && PUT; i++) {
      const int slot = from + (i * ROWS + t) / WORDS;
      had[i] = slot < slots ? count[slot] : 0;
      to[i] = slot < slots ? start[slot] + had[i] : 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int key = (i * ROWS + t) / WORDS;
      uint32_t who = s.who[word][key];
      s.who[word][key] = 0;
      const int own = __popc(who);
      int sum = own;
#pragma unroll
      for (int d = 1; d < WORDS; d *= 2) {
        const int x = __shfl_up_sync(~0u, sum, d, WORDS);
        if (word >= d) sum += x;
      }
      if (word == WORDS - 1 && from + key < slots) count[from + key] = PUT ? had[i] + sum : sum;
      if (!PUT) continue;
      int64_t at = to[i] + sum - own;
      for (; who; who &= who - 1, at++) {
        const int r = 32 * word + __ffs(who) - 1;
        rows[at] = (int32_t)(c * ROWS + r);
        if (places) places[at] = s.place[r][key];
      }
    }
    __syncthreads();
  }
}

} // namespace

const void *rgk_csr_count(void) {
  return (const void *)count;
}
const void *rgk_csr_columns(void) {
  return (const void *)columns;
}
const void *rgk_csr_starts(void) {
  return (const void *)starts;
}
const void *rgk_csr_scatter(void) {
  return (const void *)scatter;
}
const void *rgk_csr_bounds(void) {
  return (const void *)bounds;
}
const void *rgk_csr_many(bool put) {
  return put ? (const void *)many<true> : (const void *)many<false>;
}
