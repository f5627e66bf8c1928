/* kernels/index_loss.cu: index_loss and its gradient (ops/index_loss.c has the formulas), for any
   GPU, in fp32 without tensor cores.

   rows   a block of threads takes rows of idx in turn. Its four warps share the row's keys; what
          each key gives goes to the block's own memory, is summed in double over fixed places and
          becomes the loss, or the gradients of the scores. Those are kept for `keys`, and each warp
          makes the gradients of every fourth head of the index from them.
   keys   a block takes a key and walks the queries that chose its block, in order (attn/csr.h). A
          warp sums what every fourth head gives; the four sums are added in order.
 */
#include "index_loss.cuh"

using namespace rgk;
using namespace rgk::index_loss;

namespace {

constexpr int THREADS = RGK_INDEX_LOSS_THREADS, WARPS = THREADS / 32,
              PIECES = RGK_INDEX_LOSS_WIDTH / 32; /* features of a lane, at most */

/* A row of a head, feature 32 i + lane in x[i]; zeros past the width. */
__device__ __forceinline__ void load_row(float (&x)[PIECES], const rgk_tensor &t, int64_t row,
                                         int head, int width) {
  const int64_t at = row * t.row + head * t.head;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    x[i] = 32 * i + lane < width ? load(t.data, t.dtype, at + 32 * i + lane) : 0.0f;
}

/* All lanes get the product with a row. */
__device__ __forceinline__ float product(const float (&x)[PIECES], const rgk_tensor &t, int64_t row,
                                         int head, int width) {
  const int64_t at = row * t.row + head * t.head;
  const int lane = threadIdx.x % 32;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < PIECES; i++)
    if (32 * i + lane < width) sum = fmaf(x[i], load(t.data, t.dtype, at + 32 * i + lane), sum);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

template <bool BACKWARD>
__global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ rgk_index_loss p) {
  __shared__ double room[THREADS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = p.H / p.I, per_kv = p.H / p.KH, heads = p.IH / p.I;
  const int64_t keys = (int64_t)p.N * p.block;
  float *m = p.own + (int64_t)blockIdx.x * 2 * keys, *s = m + keys;

  for (int64_t work = blockIdx.x; work < p.T * p.I; work += gridDim.x) {
    const int64_t t = work / p.I;
    const int head = (int)(work % p.I);
    const row_keys r = find_keys(p, t);
    if (r.b >= p.seqs.n) {
      clear_row<BACKWARD, THREADS>(p, t, head);
      continue;
    }
    const int32_t *idx = (const int32_t *)p.idx.data + t * p.idx.row + head * p.idx.head;
    __syncthreads(); /* the row before is done with */
    for (int64_t i = threadIdx.x; i < keys; i += THREADS) m[i] = 0, s[i] = -INFINITY;
    __syncthreads();

    int64_t before = -1;
    int turn = 0; /* of the warps, key by key */
    for (int n = 0; n < p.N; n++) {
      const int64_t e = idx[n];
      if (e <= before) continue;
      if (e * p.block >= r.seen) break; /* what follows is not larger, or further out */
      before = e;
      for (int o = 0; o < p.block && e * p.block + o < r.seen; o++) {
        if (turn++ % WARPS != warp) continue;
        const int64_t key = r.first + e * p.block + o, i = (int64_t)n * p.block + o;
        float x[PIECES], sum = 0, score = 0;
        int at = -1;
        for (int h = head * group; h < (head + 1) * group; h++) {
          if (h / per_kv != at) load_row(x, p.k, key, at = h / per_kv, p.D);
          const float lse = ((const float *)p.lse.data)[t * p.lse.row + h * p.lse.head];
          sum += expf(p.scale * product(x, p.q, t, h, p.D) - lse);
        }
        load_row(x, p.index_k, key, head, p.ID);
        for (int j = head * heads; j < (head + 1) * heads; j++) {
          const float y = product(x, p.index_q, t, j, p.ID);
          score += p.relu && y < 0 ? 0.0f : weight_of(p, t, j) * y;
        }
        if (lane == 0) m[i] = sum, s[i] = p.index_scale * score;
      }
    }
    __syncthreads();

    const bool any = turn > 0; /* a key that is NaN counts, and shows */
    float *slope = BACKWARD ? p.slope + work * keys : nullptr;
    finish_row<BACKWARD, THREADS>(p, t, head, keys, m, s, any, slope, room);
    for (int j = head * heads + warp; BACKWARD && j < (head + 1) * heads; j += WARPS) {
      float x[PIECES], sum[PIECES], weight = 0;
      const float w = weight_of(p, t, j);
      load_row(x, p.index_q, t, j, p.ID);
#pragma unroll
      for (int i = 0; i < PIECES; i++) sum[i] = 0;
      for (int64_t i = 0; i < keys; i++) {
        const float f = p.index_scale * slope[i];
        if (f == 0) continue;
        const int64_t key = r.first + (int64_t)idx[i / p.block] * p.block + i % p.block;
        const float y = product(x, p.index_k, key, head, p.ID);
        if (p.relu && y <= 0) continue;
        weight = fmaf(f, y, weight);
        float k[PIECES];
        load_row(k, p.index_k, key, head, p.ID);
#pragma unroll
        for (int c = 0; c < PIECES; c++) sum[c] = fmaf(f * w, k[c], sum[c]);
      }
      if (p.dw.data && lane == 0) put(p.dw, t * p.dw.row + j * p.dw.head, weight, p.add_w);
#pragma unroll
      for (int c = 0; c < PIECES; c++)
        if (p.dq.data && 32 * c + lane < p.ID)
          put(p.dq, t * p.dq.row + j * p.dq.head + 32 * c + lane, sum[c], p.add_q);
    }
  }
}

__global__ void __launch_bounds__(THREADS) keys_of(const __grid_constant__ rgk_index_loss p) {
  __shared__ float part[WARPS][RGK_INDEX_LOSS_WIDTH];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, heads = p.IH / p.I;
  const int head = (int)(blockIdx.x % p.I);
  const int64_t within = blockIdx.x / p.I % p.block, slot = blockIdx.x / p.I / p.block;
  const tile k = find_tile(p.kseqs, slot, p.block);
  if (within >= k.n) return;
  const int64_t key = k.begin + k.first + within;
  float x[PIECES], sum[PIECES];
#pragma unroll
  for (int c = 0; c < PIECES; c++) sum[c] = 0;
  if (k.b < p.kseqs.n) {
    const int64_t *start = p.start + head * (p.slots + 1), lists = head * p.T * p.N;
    load_row(x, p.index_k, key, head, p.ID);
    for (int64_t i = start[slot]; i < start[slot + 1]; i++) {
      const int64_t t = p.list[lists + i], place = p.places[lists + i];
      const float f = p.index_scale * p.slope[((t * p.I + head) * p.N + place) * p.block + within];
      if (f == 0) continue;
      for (int j = head * heads + warp; j < (head + 1) * heads; j += WARPS) {
        const float y = product(x, p.index_q, t, j, p.ID);
        if (p.relu && y <= 0) continue;
        float q[PIECES];
        const float w = f * weight_of(p, t, j);
        load_row(q, p.index_q, t, j, p.ID);
#pragma unroll
        for (int c = 0; c < PIECES; c++) sum[c] = fmaf(w, q[c], sum[c]);
      }
    }
  } else if (p.add_k) {
    return;
  }
#pragma unroll
  for (int c = 0; c < PIECES; c++) part[warp][32 * c + lane] = sum[c];
  __syncthreads();
  for (int c = threadIdx.x; c < p.ID; c += THREADS) {
    float all = part[0][c];
#pragma unroll
    for (int w = 1; w < WARPS; w++) all += part[w][c];
    put(p.dk, key * p.dk.row + head * p.dk.head + c, all, p.add_k);
  }
}

} // namespace

const void *rgk_index_loss_rows(bool backward) {
  return backward ? (const void *)rows<true> : (const void *)rows<false>;
}
const void *rgk_index_loss_keys(void) {
  return (const void *)keys_of;
}
