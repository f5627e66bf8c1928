/* kernels/cp.cu: see cp.h. The tables are a few words a sequence: one block fills them, a thread an
   entry. Sums are of integers, so their order is no matter. */
#include "cp.h"
#include <cuda_runtime.h>

namespace {

__device__ __forceinline__ int64_t entry(const int32_t *cu, int64_t b, int64_t rows) {
  const int64_t x = cu[b];
  return x < rows ? x : rows;
}

/* The mode of this batch; all threads of the block. */
__device__ int choose(const rgk_cp_rows_params &p, int64_t chunk) {
  __shared__ unsigned long long load[2][RGK_CP_MOST_RANKS];
  __shared__ int mode;
  if (p.mode != RG_CP_AUTO) return p.mode;
  for (int r = threadIdx.x; r < p.ranks; r += RGK_CP_THREADS) load[0][r] = load[1][r] = 0;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < p.nseq; b += RGK_CP_THREADS) {
    const int64_t begin = entry(p.cu, b, p.rows), end = entry(p.cu, b + 1, p.rows);
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t c = at / chunk;
      next = rgk_clamp((c + 1) * chunk, 0, end);
      const unsigned long long work = rgk_cp_work(at - begin, next - at);
      atomicAdd(&load[0][rgk_cp_place(RG_CP_BLOCKS, p.ranks, c) / 2], work);
      atomicAdd(&load[1][rgk_cp_place(RG_CP_ZIGZAG, p.ranks, c) / 2], work);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long most[2] = {0, 0};
    for (int r = 0; r < p.ranks; r++)
      for (int m = 0; m < 2; m++) most[m] = max(most[m], load[m][r]);
    mode = most[1] < most[0] ? RG_CP_ZIGZAG : RG_CP_BLOCKS;
  }
  __syncthreads();
  return mode;
}

__global__ void __launch_bounds__(RGK_CP_THREADS)
    rows_kernel(const __grid_constant__ rgk_cp_rows_params p) {
  const int64_t chunk = p.rows / (RGK_CP_SLOTS * (int64_t)p.ranks);
  const int mode = choose(p, chunk);
  int32_t before = 0; /* rows of the slots before */
  for (int i = threadIdx.x; i < RGK_CP_SLOTS * p.ranks; i += RGK_CP_THREADS)
    p.order[i] = (int32_t)rgk_cp_place(mode, p.ranks, i);
  for (int slot = 0; slot < RGK_CP_SLOTS; slot++) {
    const int64_t lo = rgk_cp_chunk(mode, p.ranks, p.rank, slot) * chunk, hi = lo + chunk;
    int32_t *both = p.starts[RGK_CP_SLOTS] + slot * p.nseq;
    for (int64_t b = threadIdx.x; b <= p.nseq; b += RGK_CP_THREADS) {
      const int64_t begin = entry(p.cu, b, p.rows);
      const int32_t start = rgk_cp_piece(begin, lo, hi);
      p.starts[slot][b] = start;
      if (b > 0 || slot == 0) both[b] = before + start;
      if (b == p.nseq) continue;
      p.pos[slot][b] = p.pos[RGK_CP_SLOTS][slot * p.nseq + b] = rgk_cp_position(begin, lo);
    }
    before += rgk_cp_piece(entry(p.cu, p.nseq, p.rows), lo, hi);
  }
}

/* The chunk in a slot of this rank; all threads of the block. */
__device__ int64_t chunk_of(const rgk_cp_chunks_params &p, int slot) {
  __shared__ int found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < RGK_CP_SLOTS * p.ranks; i += RGK_CP_THREADS)
    if (p.order[i] == RGK_CP_SLOTS * p.rank + slot) found = i;
  __syncthreads();
  const int64_t chunk = found;
  __syncthreads();
  return chunk;
}

template <bool WINDOW>
__global__ void __launch_bounds__(RGK_CP_THREADS)
    chunks_kernel(const __grid_constant__ rgk_cp_chunks_params p) {
  __shared__ int64_t at; /* the gap; where keys are read from */
  const int64_t chunk = p.rows / (RGK_CP_SLOTS * (int64_t)p.ranks);
  for (int slot = 0; slot < RGK_CP_SLOTS; slot++) {
    const int64_t lo = chunk_of(p, slot) * chunk, hi = lo + chunk;
    const int64_t first = lo - p.left;
    if (threadIdx.x == 0) at = WINDOW && first > 0 ? first : 0;
    __syncthreads();
    for (int64_t b = threadIdx.x; b < p.nseq; b += RGK_CP_THREADS) { /* the one that runs there */
      const int64_t begin = entry(p.cu, b, p.rows), end = entry(p.cu, b + 1, p.rows);
      if (begin < first && end > first)
        at =
            WINDOW ? rgk_cp_keys(begin, end, first, p.unit) : rgk_cp_gap(begin, end, first, p.unit);
    }
    __syncthreads();
    if (!WINDOW && threadIdx.x == 0) p.starts[slot][0] = 0;
    for (int64_t b = threadIdx.x; b <= p.nseq; b += RGK_CP_THREADS) {
      const int64_t begin = entry(p.cu, b, p.rows);
      if (!WINDOW) {
        p.starts[slot][b + 1] = rgk_cp_block(begin, at, first, hi + p.right);
        continue;
      }
      const int32_t start = rgk_cp_key(begin, at, hi, first);
      p.starts[slot][b] = start;
      if (b < p.nseq) p.pos[slot][b] = rgk_cp_query(entry(p.cu, b + 1, p.rows), start + first, lo);
    }
    __syncthreads();
  }
}

__global__ void stamp_kernel(const __grid_constant__ rgk_cp_stamp_params p) {
  volatile int32_t *to = p.stamp;
  if (!p.ends) to[2] = p.name;
  __threadfence_system();
  to[p.ends ? 1 : 0] = to[p.ends ? 1 : 0] + 1;
  __threadfence_system();
}

} // namespace

const void *rgk_cp_rows(void) {
  return (const void *)rows_kernel;
}
const void *rgk_cp_blocks(void) {
  return (const void *)chunks_kernel<false>;
}
const void *rgk_cp_stamp(void) {
  return (const void *)stamp_kernel;
}
const void *rgk_cp_window(void) {
  return (const void *)chunks_kernel<true>;
}
