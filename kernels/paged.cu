/* kernels/paged.cu: what a serving step does to its caches (paged.h).

   All of it finds its work on the device: grids have room for whatever lengths fit, and blocks of
   threads that have nothing to do end at once. What is wrong is found without regard to order, so
   whoever finds something looks whether an earlier one would have: the first is named, as on the
   CPU.
 */
#include "device/chunk.cuh"
#include "device/fault.cuh"
#include "device/pages.cuh"
#include "device/seq.cuh"
#include "kv_step.cuh"

using namespace rgk;

namespace {

/* ---- paged_batch ---- */

/* Sum over the threads of the block. */
__device__ int64_t sum_of(int64_t x) {
  __shared__ int64_t part[RGK_BATCH_THREADS / 32];
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < RGK_BATCH_THREADS / 32; w++) x += part[w];
  __syncthreads();
  return x;
}
__device__ int least_of(int x) {
  __shared__ int least;
  if (threadIdx.x == 0) least = INT32_MAX;
  __syncthreads();
  x = __reduce_min_sync(~0u, x);
  if (threadIdx.x % 32 == 0) atomicMin(&least, x);
  __syncthreads();
  x = least;
  __syncthreads();
  return x;
}

__device__ int64_t length_of(const rgk_batch &p, int64_t b) {
  return p.lengths[b * p.lengths_step];
}

struct batch_fault {
  int32_t which, value, more;
};

/* What is wrong with sequence b, whose rows would start at `start`; which 0: nothing. */
__device__ batch_fault fault_of(const rgk_batch &p, int64_t b, int64_t start) {
  const int64_t length = length_of(p, b), context = p.pages.context[b * p.pages.context_step],
                page = p.pages.tokens, left = p.rows - start;
  if (context < 0 || context > p.pages.most * page) return {RGK_BATCH_CONTEXT, (int32_t)context, 0};
  if (length < 0 || length > context) return {RGK_BATCH_LENGTH, (int32_t)length, (int32_t)context};
  if (length > left) return {RGK_BATCH_ROWS, (int32_t)length, (int32_t)left};
  const int32_t *table = p.pages.table + b * p.pages.table_row;
  int first = INT32_MAX;
  for (int m = threadIdx.x; first == INT32_MAX && m * page < context; m += RGK_BATCH_THREADS)
    if ((uint32_t)table[m] >= (uint32_t)p.pages.count) first = m;
  first = least_of(first);
  if (first == INT32_MAX) return {0, 0, 0};
  return {RGK_BATCH_PAGE, table[first], first};
}

/* By a block of threads: sequence b. heard(): is what is wrong to be said? All threads ask. */
template <class F>
__device__ __forceinline__ void batch_one(const rgk_batch &p, int64_t b, F heard) {
  if (b == 0 && threadIdx.x == 0) p.starts[0] = 0;
  if (b >= p.n) return;
  int64_t rows = 0;
  for (int64_t i = threadIdx.x; i < b; i += RGK_BATCH_THREADS)
    rows += max(length_of(p, i), (int64_t)0);
  const int64_t start = min(sum_of(rows), p.rows),
                length = min(max(length_of(p, b), (int64_t)0), p.rows - start);
  const batch_fault fault = fault_of(p, b, start);
  const int64_t context = fault.which ? 0 : p.pages.context[b * p.pages.context_step];
  if (threadIdx.x == 0) {
    p.starts[b + 1] = (int32_t)(start + length);
    p.context[b] = (int32_t)context;
    p.offset[b] = fault.which ? 0 : (int32_t)(context - length);
    p.last[b] = !fault.which && length ? (int32_t)(start + length - 1) : -1;
  }
  const int32_t *from = p.pages.table + b * p.pages.table_row;
  int32_t *to = p.table + b * p.table_row;
  for (int64_t m = threadIdx.x; m < p.pages.most; m += RGK_BATCH_THREADS)
    to[m] = m * p.pages.tokens < context ? from[m] : -1;
  if (!fault.which || !heard()) return;
  int64_t at = 0; /* has one before it a fault? */
  for (int64_t i = 0; i < b; i++) {
    if (fault_of(p, i, min(at, p.rows)).which) return;
    at += max(length_of(p, i), (int64_t)0);
  }
  if (threadIdx.x == 0) report(p.fault, fault.which, (int32_t)b, fault.value, fault.more);
}

__global__ void __launch_bounds__(RGK_BATCH_THREADS) batch(const __grid_constant__ rgk_batch p) {
  batch_one(p, blockIdx.x, []() { return true; });
}

/* ---- kv_append ---- */

__device__ void append_row(const rgk_tensor &from, const rgk_tensor &to, int64_t row, int64_t at,
                           int heads, int width, bool vec) {
  const int lane = threadIdx.x % 32;
  if (vec) {
    const int size = from.dtype == RG_F32 ? 4 : 2, each = 16 / size, n = width / each;
    for (int i = lane; i < heads * n; i += 32) {
      const int h = i / n, d = i % n * each;
      *(uint4 *)((char *)to.data + (at + h * to.head + d) * size) =
          *(const uint4 *)((const char *)from.data + (row * from.row + h * from.head + d) * size);
    }
    return;
  }
  for (int i = lane; i < heads * width; i += 32) {
    const int h = i / width, d = i % width;
    const int64_t x = row * from.row + h * from.head + d, y = at + h * to.head + d;
    if (from.dtype != to.dtype)
      store(to.data, to.dtype, y, load(from.data, from.dtype, x));
    else if (from.dtype == RG_F32) /* bits, whatever they say */
      ((uint32_t *)to.data)[y] = ((const uint32_t *)from.data)[x];
    else
      ((uint16_t *)to.data)[y] = ((const uint16_t *)from.data)[x];
  }
}

/* By a warp. */
__device__ void append_token(const rgk_append &p, int64_t row) {
  if (row >= live_rows(p.seqs)) return;
  const int b = find_seq_warp(p.seqs, row);
  const token_place at = place_token(p.pages, p.by_tokens, b, row + 1 - seq_start(p.seqs, b + 1));
  if (at.page < 0) return;
  append_row(p.k, p.k_cache, row, at.page * p.pages.k_page + at.slot * p.k_cache.row, p.heads, p.D,
             p.k_vec);
  append_row(p.v, p.v_cache, row, at.page * p.pages.v_page + at.slot * p.v_cache.row, p.heads, p.E,
             p.v_vec);
}

__global__ void __launch_bounds__(RGK_APPEND_THREADS) append(const __grid_constant__ rgk_append p) {
  append_token(p, blockIdx.x * (int64_t)(RGK_APPEND_THREADS / 32) + threadIdx.x / 32);
}

/* ---- kv_compress ---- */

__device__ __forceinline__ new_block find_block(const rgk_new_blocks &p, int64_t slot) {
  const tile t = find_tile_warp(p.seqs, slot, p.stride);
  if (t.b >= p.seqs.n) return {nullptr, -1, 0, 0, 0, 0};
  return new_block_of(p, t.b, t.begin, t.length, t.first / p.stride);
}

/* Sums in the order of compress_fwd.cu: tokens within a group, then groups. */
struct mean_sum {
  float sum[8], part[8];
  __device__ __forceinline__ void add(const rgk_new_blocks &p, int i, const float (&x)[8]) {
#pragma unroll
    for (int e = 0; e < 8; e++) part[e] = (i % p.stride == 0 ? 0.0f : part[e]) + x[e];
    if ((i + 1) % p.stride == 0)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[e] = i < p.stride ? part[e] : sum[e] + part[e];
  }
};

/* Eight features from `feature` on of 16-bit rows that are loaded whole, several tokens at once:
 * nothing branches between their loads. */
__device__ void sum_wide(const rgk_paged_mean &p, const new_block &n, const rgk_paged_side &s,
                         int64_t feature, mean_sum &m) {
  constexpr int AHEAD = 16;
  const int kernel = p.blocks.kernel, tokens = p.blocks.pages.tokens;
#pragma unroll 1
  for (int first = 0; first < kernel; first += AHEAD) {
    uint4 raw[AHEAD];
    int32_t page[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
      page[u] = n.table[(uint32_t)(n.token + min(first + u, kernel - 1)) / (uint32_t)tokens];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const uint32_t token = (uint32_t)(n.token + min(first + u, kernel - 1));
      raw[u] = *(const uint4 *)((const uint16_t *)s.x.data + page[u] * s.x_page +
                                token % (uint32_t)tokens * s.x.row + feature);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      float x[8];
      widen(raw[u], s.x.dtype, x);
      if (first + u < kernel) m.add(p.blocks, first + u, x);
    }
  }
}

/* The same of two groups, a thread each, neighbours: nobody waits for more loads than a group's. */
__device__ __forceinline__ void mean_of_two(const rgk_paged_mean &p, const rgk_paged_side &s,
                                            const new_block &n, const rgk_tensor *rows) {
  const int eights = s.width / 8;
  for (int i = threadIdx.x; i < 2 * s.heads * eights; i += RGK_PAGED_MEAN_THREADS)
    mean_of_eight(p, s, n, rows, i / 2 / eights, i / 2 % eights * 8);
}

__device__ void mean_of(const rgk_paged_mean &p, const new_block &n) {
  const rgk_paged_side &s = p.side[blockIdx.y];
  if (p.vec && s.x.dtype != RG_F32 && s.width % 8 == 0 && p.blocks.kernel == 2 * p.blocks.stride &&
      p.blocks.stride <= RGK_PAGED_MEAN_GROUP)
    return mean_of_two(p, s, n, nullptr);
  const rgk_pages &g = p.blocks.pages;
  const int eights = (s.width + 7) / 8;
  for (int at = threadIdx.x; at < s.heads * eights; at += RGK_PAGED_MEAN_THREADS) {
    const int head = at / eights, feature = at % eights * 8, count = min(s.width - feature, 8);
    mean_sum y;
    if (p.vec && s.x.dtype != RG_F32 && count == 8) {
      sum_wide(p, n, s, head * s.x.head + feature, y);
    } else {
      float x[8];
      int64_t m = n.token / g.tokens;
      int slot = (int)(n.token - m * g.tokens);
      for (int i = 0; i < p.blocks.kernel; i++) {
        load8(s.x.data, s.x.dtype,
              n.table[m] * s.x_page + slot * s.x.row + head * s.x.head + feature, p.vec, count, x);
        if (++slot == g.tokens) slot = 0, m++;
        y.add(p.blocks, i, x);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) y.sum[e] *= p.scale;
    store8(s.y.data, s.y.dtype, n.page * s.y_page + n.row * s.y.row + head * s.y.head + feature,
           p.vec, count, y.sum);
  }
}

/* Slots that a sequence may own, of this step's lengths. */
__device__ __forceinline__ int64_t live_slots(const rgk_new_blocks &p) {
  return live_rows(p.seqs) / p.stride + p.seqs.n + 1;
}

__global__ void __launch_bounds__(RGK_PAGED_MEAN_THREADS)
    means(const __grid_constant__ rgk_paged_mean p) {
  const int64_t slots = live_slots(p.blocks);
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const new_block n = find_block(p.blocks, slot);
    if (n.token >= 0) mean_of(p, n);
  }
}

__global__ void __launch_bounds__(RGK_PAGED_MEAN_THREADS, 4)
    append_means(const __grid_constant__ rgk_append_means p) {
  constexpr int WARPS = RGK_PAGED_MEAN_THREADS / 32;
  if (blockIdx.y == 2) {
    const int64_t rows = live_rows(p.append.seqs);
    for (int64_t row = blockIdx.x * (int64_t)WARPS + threadIdx.x / 32; row < rows;
         row += gridDim.x * (int64_t)WARPS)
      append_token(p.append, row);
    return;
  }
  const rgk_paged_mean &m = p.mean;
  const int64_t slots = live_slots(m.blocks);
  for (int64_t slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const new_block n = find_block(m.blocks, slot);
    if (n.token >= 0) mean_of_two(m, m.side[blockIdx.y], n, blockIdx.y ? &p.append.v : &p.append.k);
  }
}

template <class T>
__device__ void move_block(const rgk_paged_move &p, const new_block &n, int64_t slot, int h) {
  const rgk_paged_side &s = p.side;
  const rgk_pages &g = p.blocks.pages;
  const int each = sizeof(T) / (s.x.dtype == RG_F32 ? 4 : 2), width = s.width / each;
  const int tokens = p.back ? 1 : p.blocks.kernel;
  T *room = (T *)p.room + (slot * s.heads + h) * tokens * width;
  T *row = (T *)s.y.data + (n.page * s.y_page + n.row * s.y.row + h * s.y.head) / each;
  for (int i = threadIdx.x; i < tokens * width; i += RGK_MOVE_THREADS) {
    if (p.back) {
      row[i] = room[i];
      continue;
    }
    const int64_t token = n.token + i / width, m = token / g.tokens;
    room[i] =
        ((const T *)
             s.x.data)[(n.table[m] * s.x_page + (token - m * g.tokens) * s.x.row + h * s.x.head) /
                           each +
                       i % width];
  }
}

__global__ void __launch_bounds__(RGK_MOVE_THREADS)
    move_blocks(const __grid_constant__ rgk_paged_move p) {
  const int64_t live = live_slots(p.blocks);
  const int h = blockIdx.y;
  for (int64_t slot = blockIdx.x; slot < p.slots; slot += gridDim.x) {
    new_block n = {nullptr, -1, 0, 0, 0, 0};
    if (slot < live) n = find_block(p.blocks, slot);
    if (!p.back && h == 0 && threadIdx.x == 0) {
      const bool dead = n.token < 0;
      p.table[slot] = {dead ? -1 : (int32_t)slot, 0, dead ? 0 : INT32_MAX, (int32_t)slot, 1};
    }
    if (n.token < 0) continue;
    if (p.vec)
      move_block<uint4>(p, n, slot, h);
    else if (p.side.x.dtype == RG_F32)
      move_block<uint32_t>(p, n, slot, h);
    else
      move_block<uint16_t>(p, n, slot, h);
  }
}

/* ---- page_copy ---- */

__device__ const int32_t *entry(const rgk_copy_list &p, int64_t i) {
  return p.pages + i * p.row;
}
__device__ bool is_none(const int32_t *x) {
  return x[0] == -1 && x[1] == -1;
}

/* Is anything wrong with entry i? If `tell`, it is said. */
__device__ bool wrong_entry(const rgk_copy_list &p, int64_t i, bool tell) {
  const int32_t *x = entry(p, i);
  if (is_none(x)) return false;
  for (int k = 0; k < 2; k++)
    if (x[k] < 0 || x[k] >= p.count) {
      if (tell) report(p.fault, RGK_COPY_PAGE, (int32_t)i, x[k], k);
      return true;
    }
  for (int64_t j = 0; j < p.n; j++) {
    const int32_t *y = entry(p, j);
    if (j == i || (y[1] != x[1] && y[0] != x[1])) continue;
    if (tell)
      report(p.fault, y[1] == x[1] ? RGK_COPY_WRITES : RGK_COPY_READS, (int32_t)i, x[1],
             (int32_t)j);
    return true;
  }
  return false;
}

/* The first wrong entry, or their number. All threads of the block meet here. */
__device__ int64_t first_wrong(const rgk_copy_list &p) {
  __shared__ long long wrong;
  if (threadIdx.x == 0) wrong = p.n;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.n; i += RGK_COPY_THREADS)
    if (wrong_entry(p, i, false)) atomicMin(&wrong, (long long)i);
  __syncthreads();
  return wrong;
}

__global__ void __launch_bounds__(RGK_COPY_THREADS)
    check_copies(const __grid_constant__ rgk_copy_list p) {
  __shared__ int n;
  if (threadIdx.x == 0) n = 0;
  const int64_t wrong = first_wrong(p);
  for (int64_t i = threadIdx.x; i < p.n && wrong == p.n; i += RGK_COPY_THREADS) {
    const int32_t *x = entry(p, i);
    if (is_none(x) || x[0] == x[1]) continue;
    int32_t *to = p.list + 2 + 2 * atomicAdd(&n, 1);
    to[0] = x[0], to[1] = x[1];
  }
  __syncthreads();
  if (threadIdx.x) return;
  p.list[0] = n;
  if (wrong < p.n) wrong_entry(p, wrong, true);
}

/* What a block of threads has of the copies: a part of pages, every how manieth, in a cache. */
struct copy_share {
  int part, parts, turn, turns, cache;
};

template <class T>
__device__ void copy_page(const rgk_copied &c, const copy_share &s, int64_t from, int64_t to) {
  T *data = (T *)c.data;
  for (int64_t i = s.part * (int64_t)RGK_COPY_THREADS + threadIdx.x; i < c.elements;
       i += (int64_t)s.parts * RGK_COPY_THREADS) {
    int64_t at = 0, rest = i;
    for (int a = c.rank - 1; a > 0; a--) {
      const int64_t q = divide(rest, c.dim[a]);
      at += (rest - q * c.dim[a]) * c.stride[a];
      rest = q;
    }
    at += rest * c.stride[0];
    data[to * c.page + at] = data[from * c.page + at];
  }
}

__device__ __forceinline__ void copy_share_of(const rgk_copies &p, const copy_share &s) {
  const rgk_copied &c = p.cache[s.cache];
  const rgk_copy_list &l = p.list;
  const int n = l.list ? l.list[0] : (int)l.n;
  if (!l.list) {
    const int64_t wrong = first_wrong(l);
    if (wrong < l.n) {
      if (threadIdx.x + s.part + s.turn + s.cache == 0) wrong_entry(l, wrong, true);
      return;
    }
  }
  for (int i = s.turn; i < n; i += s.turns) {
    const int32_t *x = l.list ? l.list + 2 + 2 * i : entry(l, i);
    const int64_t from = x[0], to = x[1];
    if (from == to) continue; /* -1, -1 too */
    if (c.unit == 16)
      copy_page<uint4>(c, s, from, to);
    else if (c.unit == 4)
      copy_page<uint32_t>(c, s, from, to);
    else
      copy_page<uint16_t>(c, s, from, to);
  }
}

__global__ void __launch_bounds__(RGK_COPY_THREADS)
    copy_pages(const __grid_constant__ rgk_copies p) {
  copy_share_of(
      p, {(int)blockIdx.x, (int)gridDim.x, (int)blockIdx.y, (int)gridDim.y, (int)blockIdx.z});
}

__global__ void __launch_bounds__(RGK_BATCH_THREADS)
    copy_and_batch(const __grid_constant__ rgk_copy_batch p) {
  static_assert(RGK_BATCH_THREADS == (int)RGK_COPY_THREADS, "of one size");
  const int64_t i = blockIdx.x - p.batch.n;
  if (i < 0) { /* of two faults the list's is said, as if it had come before */
    batch_one(p.batch, blockIdx.x, [&]() { return first_wrong(p.copies.list) == p.copies.list.n; });
    return;
  }
  const int part = (int)(i % p.parts), turn = (int)(i / p.parts);
  copy_share_of(p.copies, {part, p.parts, turn % p.turns, p.turns, turn / p.turns});
}

} // namespace

const void *rgk_paged_batch(void) {
  return (const void *)batch;
}
const void *rgk_kv_append(void) {
  return (const void *)append;
}
const void *rgk_paged_means(void) {
  return (const void *)means;
}
const void *rgk_kv_append_means(void) {
  return (const void *)append_means;
}
const void *rgk_paged_move_blocks(void) {
  return (const void *)move_blocks;
}
const void *rgk_check_copies(void) {
  return (const void *)check_copies;
}
const void *rgk_copy_pages(void) {
  return (const void *)copy_pages;
}
const void *rgk_copy_and_batch(void) {
  return (const void *)copy_and_batch;
}
