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
   each part, and a thread block has a chunk of a part: a thread a row. `tally` counts. `put` goes
   through the part by ranges of slots: who chose a slot is a word of bits for 32 rows in shared
   memory, which say where in the slot's list each row stands, whatever the order in which they
   were set. Rows and places are put in the lists' order there, of as many slots at a time as there
   is room for, and from there to memory: it gets runs of neighbours.
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

/* A thread block's chunk of a part, and a thread's row of it from where the part begins. */
struct piece {
  int64_t head, chunk, part, first, slots; /* first, slots: of the part */
  int32_t *count;
  const int32_t *idx;
  int n, end, before, base; /* entries to come; the largest so far; base + e: slot in the part */
  bool wide;                /* entries can be read 16 bytes at a time */

  __device__ __forceinline__ piece(const rgk_csr &p)
      : head(blockIdx.x / p.chunks / p.parts), chunk(blockIdx.x % p.chunks),
        part(blockIdx.x / p.chunks % p.parts), first(part << p.part),
        slots(min(p.slots - first, INT64_C(1) << p.part)),
        count(p.count + (head * p.chunks + chunk) * p.slots + first), n(0), end(0), before(-1),
        base(0) {
    const int64_t row = chunk * ROWS + threadIdx.x;
    idx = (const int32_t *)p.idx.data + row * p.idx.row + head * p.idx.head;
    wide = ((uintptr_t)p.idx.data / 4 | p.idx.row | p.idx.head | p.N) % 4 == 0;
    if (row >= p.T) return;
    const int32_t *bound = p.bound + (head * p.T + row) * (p.parts + 1) + part;
    n = bound[0], end = bound[1];
    if (n < end) base = (int)(keys_of(p, row).slot - first);
  }
  /* use(slot in the part, entry) for those of the row's entries that count and lie below. */
  template <class F> __device__ __forceinline__ void walk(int64_t below, F use) {
    enum { AT_ONCE = 4 };
    for (bool more = true; more && n < end;) {
      int e[AT_ONCE], next;
      if (wide) {
        next = n & ~(AT_ONCE - 1);
        const int4 w = *(const int4 *)(idx + next);
        e[0] = next < n ? -1 : w.x, e[1] = next + 1 < n ? -1 : w.y;
        e[2] = next + 2 < n ? -1 : w.z, e[3] = w.w;
      } else {
        next = n;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) e[k] = n + k < end ? idx[n + k] : -1;
      }
#pragma unroll
      for (int k = 0; k < AT_ONCE; k++, next += more) {
        if (!more || e[k] <= before || next >= end) continue;
        if (base + e[k] >= below) {
          more = false;
        } else {
          before = e[k];
          use(base + e[k], next);
        }
      }
      n = next;
    }
  }
};

__global__ void __launch_bounds__(ROWS) tally(const __grid_constant__ rgk_csr p) {
  enum { ROOM = 2048 };
  __shared__ int32_t sum[ROOM];
  piece x(p);
  for (int64_t from = 0; from < x.slots; from += ROOM) {
    for (int i = threadIdx.x; i < ROOM; i += ROWS) sum[i] = 0;
    __syncthreads();
    x.walk(from + ROOM, [&](int slot, int) { atomicAdd(&sum[slot - from], 1); });
    __syncthreads();
    for (int i = threadIdx.x; i < ROOM && from + i < x.slots; i += ROWS) x.count[from + i] = sum[i];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(ROWS) put(const __grid_constant__ rgk_csr p) {
  enum { ROOM = 6144 };
  static_assert((int)RANGE == (int)ROWS && RANGE <= 256 && ROWS <= 256, "a thread a slot; entries");
  static_assert((int)ROOM >= (int)ROWS, "a slot's");
  __shared__ uint32_t who[WORDS][RANGE];    /* of 32 rows */
  __shared__ uint16_t before[WORDS][RANGE]; /* of the slot's, by rows of earlier words */
  __shared__ int32_t at[RANGE];             /* where the slot's begin among the range's */
  __shared__ int64_t to[RANGE];             /* where that is in memory, less at */
  __shared__ uint32_t entry[ROOM];          /* slot, row, place, in order */
  __shared__ int32_t of_warp[WORDS];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  piece x(p);
  const int64_t *start = p.start + x.head * (p.slots + 1) + x.first;
  int32_t *rows = p.rows + x.head * p.T * p.N;
  uint16_t *places = p.places ? p.places + x.head * p.T * p.N : nullptr;
  if (!__syncthreads_or(x.n < x.end)) return;
  for (int64_t from = 0; from < x.slots; from += RANGE) {
#pragma unroll
    for (int w = 0; w < WORDS; w++) who[w][t] = 0;
    const bool real = from + t < x.slots;
    const int32_t had = real ? x.count[from + t] : 0; /* by earlier chunks */
    const int64_t begin = real ? start[from + t] : 0;
    piece again = x;
    __syncthreads();
    x.walk(from + RANGE, [&](int slot, int) { atomicOr(&who[warp][slot - from], 1u << lane); });
    __syncthreads();
    int own = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) before[w][t] = (uint16_t)own, own += __popc(who[w][t]);
    int sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int y = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += y;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      if (w < warp) sum += of_warp[w];
      all += of_warp[w];
    }
    at[t] = sum - own;
    to[t] = begin + had - (sum - own);
    if (real) x.count[from + t] = had + own;
    __syncthreads();
    for (int first = 0, i0 = 0; i0 < all;) { /* as many slots as there is room for */
      int last = first + 1, beyond = RANGE + 1;
      while (beyond - last > 1) {
        const int middle = (last + beyond) / 2;
        ((middle < RANGE ? at[middle] : all) - i0 <= ROOM ? last : beyond) = middle;
      }
      const int i1 = last < RANGE ? at[last] : all;
      again.walk(from + last, [&](int slot, int n) {
        const int s = slot - (int)from;
        const int i = at[s] + before[warp][s] + __popc(who[warp][s] & ((1u << lane) - 1));
        entry[i - i0] = (uint32_t)s << 24 | (uint32_t)t << 16 | (uint32_t)n;
      });
      __syncthreads();
      for (int i = i0 + t; i < i1; i += ROWS) {
        const uint32_t e = entry[i - i0];
        const int64_t y = to[e >> 24] + i;
        rows[y] = (int32_t)(x.chunk * ROWS + (e >> 16 & 0xff));
        if (places) places[y] = (uint16_t)e;
      }
      __syncthreads();
      first = last, i0 = i1;
    }
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
const void *rgk_csr_tally(void) {
  return (const void *)tally;
}
const void *rgk_csr_put(void) {
  return (const void *)put;
}
