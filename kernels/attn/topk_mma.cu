/* kernels/attn/topk_mma.cu: topk on the tensor cores of any GPU since Ampere, scores and choice in
   one pass.

   A warp owns a few queries of one sequence and KV head, with all their heads: 32 columns of

       D [16 keys, 32] = K [16, d] · Qᵀ [d, 32]

   Qᵀ stays in its registers, as the B of every product, and its rows are permuted so that a
   thread's eight columns m = 2i + e (of n = 8i + 2c + e, in quad lane c) are heads of as few
   queries as may be:

       HEADS 4, 8   head m % HEADS of query 4 (m / HEADS) + c
       HEADS 16     head 8 (c % 2) + m of query c / 2; two lanes add what they have

   The four warps of a block share tiles of 64 keys, which two buffers take turns to hold: one is
   filled while the other is multiplied. Every STEP keys a warp's sums go through shared memory of
   its own to its lanes, which choose (topk_choice.cuh). Keys past a sequence's end are zeros that
   nobody sees.
 */
#include "../device/mma.cuh"
#include "../device/softmax.cuh"
#include "topk_choice.cuh"

using namespace rgk;

namespace {

constexpr int TILE = RGK_TOPK80_TILE, WARPS = RGK_TOPK80_WARPS, THREADS = 32 * WARPS;

/* Of a warp. */
template <int HEADS> struct plan {
  static constexpr int N = RGK_TOPK80_COLUMNS, QUERIES = N / HEADS, MINE = QUERIES;
  static constexpr int BUFFERS = 1, STEP = RGK_TOPK80_STEP, PITCH = RGK_TOPK80_PITCH;
  static constexpr int ROOM = RGK_TOPK80_ROOM, PER_LANE = ROOM / 32;
  static constexpr int PER_THREAD = HEADS > 8 ? 1 : 8 / HEADS; /* queries */
};

/* The query and the head of column n of a warp. */
template <int HEADS> __device__ __forceinline__ int2 column(int n) {
  const int c = n / 2 % 4, m = n / 8 * 2 + n % 2;
  return HEADS > 8 ? make_int2(c / 2, c % 2 * 8 + m) : make_int2(m / HEADS * 4 + c, m % HEADS);
}

/* ---- what a block works on ---- */

struct job {
  tile t;
  int kh;
  int64_t row0; /* the first query's row of q */
  int32_t *idx; /* of row 0 */
  topk_keys keys;
  int64_t position; /* of the first query */
  int bs, reach;    /* keys of a block; those that it reaches over of the block before */
  int step0, step1; /* steps that hold all that any row ranks */
};

template <int HEADS> __device__ __forceinline__ void find_keys(const rgk_topk &p, job &j) {
  constexpr int STEP = plan<HEADS>::STEP;
  j.keys = keys_of(p, j.t.b);
  j.position = j.t.first + (p.offset ? p.offset[j.t.b] : 0);
  j.bs = p.block / p.stride, j.reach = p.kernel / p.stride - 1;
  /* The last row sees and ranks most. */
  const rgk_topk_choice last = choice_of(p, j.position + j.t.n - 1);
  j.step0 = max(p.init * j.bs - j.reach, 0) / STEP;
  j.step1 = rgk_topk_ranks(last) ? (int)((last.free1 * j.bs + STEP - 1) / STEP) : j.step0;
}

/* ---- a warp ---- */

/* What a warp has of its own. */
template <int HEADS> struct own {
  topk_memory at;
  int *visible; /* [QUERIES]: keys that the query sees */
};
template <int HEADS>
__device__ __forceinline__ own<HEADS> find_memory(char *memory, int reach, int warp) {
  using P = plan<HEADS>;
  constexpr int ALL = WARPS * P::QUERIES;
  own<HEADS> m;
  const int first = warp * P::QUERIES;
  int4 *const state = (int4 *)memory;
  int2 *const candidate = (int2 *)(state + ALL);
  float *const sums = (float *)(candidate + ALL * P::ROOM);
  int *const visible = (int *)(sums + ALL * P::PITCH);
  m.at.state = state + first;
  m.at.candidate = candidate + first * P::ROOM;
  m.at.p = sums + first * P::PITCH;
  m.visible = visible + first;
  m.at.carry = (float *)(visible + ALL) + first * reach;
  return m;
}

template <int D>
__device__ __forceinline__ void copy_tile(uint32_t to, const rgk_topk &p, const job &j,
                                          int64_t key) {
  const char *const base =
      (const char *)p.k.data + ((j.keys.first + key) * p.k.row + j.kh * p.k.head) * 2;
  const int64_t n = j.keys.n - key;
  copy_rows<D, TILE, THREADS>(to, (int)threadIdx.x, D, p.k.data, [&](int r) {
    return r < n ? base + r * p.k.row * 2 : (const char *)nullptr;
  });
}

/* Sums over heads of 16 keys' exponentials, of `d`, to the warp's rows of sums. `key`: the thread's
 * first, which is `in_step` of the step; lse: as the exponential wants it. */
template <int HEADS>
__device__ __forceinline__ void weigh(const float (&d)[16], const float (&lse)[8], float scale,
                                      bool dot, const own<HEADS> &m, int key, int in_step,
                                      int least_visible) {
  using P = plan<HEADS>;
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int q = 0; q < P::PER_THREAD; q++) {
      constexpr int EACH = 8 / P::PER_THREAD;
      float part[2] = {0, 0};
#pragma unroll
      for (int h = 0; h < EACH; h++) {
        const int n = q * EACH + h;
        const float s = d[4 * (n / 2) + 2 * r + n % 2];
        /* of score dot other heads' columns are zero */
        part[h % 2] += dot ? s : exp2_fast(fmaf(s, scale, lse[n]));
      }
      float sum = part[0] + part[1];
      if (HEADS > 8) sum += __shfl_xor_sync(~0u, sum, 1);
      const int query = HEADS > 8 ? c / 2 : 4 * q + c;
      if (key + 8 * r >= least_visible && key + 8 * r >= m.visible[query])
        sum = dot ? -INFINITY : 0.0f;
      if (HEADS <= 8 || c % 2 == r) m.at.p[query * P::PITCH + in_step + 8 * r] = sum;
    }
}

template <class T, int HEADS, int D>
__device__ __forceinline__ void rank(const rgk_topk &p, const job &j, const own<HEADS> &m,
                                     uint32_t k_room, int first, int n) {
  using P = plan<HEADS>;
  const int lane = (int)threadIdx.x % 32;
  const bool dot = p.score == RGK_TOPK_BY_DOT;
  const float scale = p.scale * LOG2E;
  /* the thread's columns */
  uint32_t q[D / 16][8];
  float lse[8], carry[P::MINE] = {};
  {
    /* all warps' rows of q, in the order of columns, where keys will be */
    const int per = P::N;
    copy_rows<D, WARPS * P::N, THREADS>(k_room, (int)threadIdx.x, D, p.q.data, [&](int r) {
      const int2 at = column<HEADS>(r % per);
      const int query = r / per * P::QUERIES + at.x;
      const bool there = query < j.t.n && at.y < p.G;
      return there
                 ? (const T *)p.q.data + (j.row0 + query) * p.q.row + (j.kh * p.G + at.y) * p.q.head
                 : (const T *)nullptr;
    });
    copies_commit();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int2 at = column<HEADS>(i / 2 * 8 + lane % 4 * 2 + i % 2);
      lse[i] = -INFINITY;
      if (!dot && at.x < n && at.y < p.G)
        lse[i] =
            -LOG2E *
            ((const float *)p.lse.data)[(j.row0 + first + at.x) * p.lse.row + j.kh * p.G + at.y];
    }
    copies_wait<0>();
    __syncthreads();
    const uint32_t at = mma_at_columns<D>(k_room + threadIdx.x / 32 * P::N * pitch(D));
#pragma unroll
    for (int d = 0; d < D / 16; d++) {
      load_matrices(on<D>(at, 2 * d), q[d]);
      load_matrices(on<D>(at, 2 * d) + 16 * pitch(D), q[d] + 4);
    }
    __syncthreads();
  }
  const int least_visible = (int)min(keys_before(j.position + first + 1, p), j.keys.n);
  constexpr uint32_t K = TILE * pitch(D);
  /* of the others nothing spills, on any GPU (tests/spills.py) */
  constexpr int UNROLL = HEADS == 4 && D == 96 ? 2 : TILE / 16;
  const int begin = j.step0 * P::STEP, end = j.step1 * P::STEP;
  copy_tile<D>(k_room, p, j, begin);
  copies_commit();
#pragma unroll 1
  for (int key = begin, buffer = 0; key < end; key += TILE, buffer ^= 1) {
    copies_wait<0>();
    __syncthreads();
    if (key + TILE < end) copy_tile<D>(k_room + (buffer ^ 1) * K, p, j, key + TILE);
    copies_commit();
    const uint32_t at = mma_at_rows<D>(k_room + buffer * K);
#pragma unroll UNROLL
    for (int x = 0; x < TILE / 16; x++) {
      float d[16] = {};
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        uint32_t a[4];
        load_matrices(on<D>(at + x * 16 * pitch(D), 2 * i), a);
#pragma unroll
        for (int y = 0; y < 4; y++) mma<T>(d + 4 * y, a, q[i] + 2 * y);
      }
      const int mine = x * 16 + lane / 4;
      weigh<HEADS>(d, lse, scale, dot, m, key + mine, key % P::STEP + mine, least_visible);
    }
    if (key % P::STEP != P::STEP - TILE) continue;
    __syncwarp();
    if (!dot && j.bs == 4 && j.reach == 1)
      choose_4_1<P, false>(m.at, 0, key / P::STEP, p.init, carry);
    else
      choose<P, false>(p, m.at, 0, key / P::STEP, p.init, dot);
    __syncwarp();
  }
}

/* ---- the kernel ---- */

template <class T, int HEADS, int D>
__global__ void __launch_bounds__(THREADS, D <= 96 ? 3 : 2)
    topk(const __grid_constant__ rgk_topk p) {
  using P = plan<HEADS>;
  extern __shared__ __align__(128) char memory[];
  const int warp = (int)threadIdx.x / 32;
  job j;
  j.kh = (int)(blockIdx.x % p.KH);
  j.t = find_tile(p.seqs, p.slots - 1 - blockIdx.x / p.KH, WARPS * P::QUERIES);
  j.row0 = j.t.begin + j.t.first;
  j.idx = (int32_t *)p.idx.data + j.kh * p.idx.head;
  if (j.t.n == 0) return;
  if (j.t.b == p.seqs.n) {
    for (int i = threadIdx.x; i < j.t.n * p.top_n; i += THREADS)
      j.idx[(j.row0 + i / p.top_n) * p.idx.row + i % p.top_n] = 0;
    return;
  }
  find_keys<HEADS>(p, j);
  const own<HEADS> m = find_memory<HEADS>(memory + 2 * TILE * pitch(D), j.reach, warp);
  const int first = warp * P::QUERIES, n = max(0, min(P::QUERIES, j.t.n - first));
  for (int q = threadIdx.x % 32; q < P::QUERIES; q += 32) {
    const rgk_topk_choice c = choice_of(p, j.position + first + q);
    m.visible[q] = q < n ? (int)min(keys_before(j.position + first + q + 1, p), j.keys.n) : INT_MAX;
    m.at.state[q] = make_int4(
        LEAST_KEY, 0, q < n && rgk_topk_ranks(c) ? (int)(c.free1 - p.init) : 0, (int)c.keep);
    for (int i = 0; i < j.reach; i++) m.at.carry[q * j.reach + i] = 0;
  }
  __syncwarp();
  if (j.step0 < j.step1) rank<T, HEADS, D>(p, j, m, smem_at(memory), first, n);
  for (int q = 0; q < n; q++)
    finish<P::PER_LANE>(p, m.at, q, choice_of(p, j.position + first + q), m.visible[q] > 0,
                        j.idx + (j.row0 + first + q) * p.idx.row, P::ROOM);
}

template <class T, int D> const void *instance(int heads) {
  return heads == 4    ? (const void *)topk<T, 4, D>
         : heads == 8  ? (const void *)topk<T, 8, D>
         : heads == 16 ? (const void *)topk<T, 16, D>
                       : nullptr;
}
template <class T> const void *instance(int heads, int width) {
#ifndef RGK_DEV
  if (width == 96) return instance<T, 96>(heads);
  if (width == 192) return instance<T, 192>(heads);
  if (width == 256) return instance<T, 256>(heads);
#endif
  return width == 64 ? instance<T, 64>(heads) : width == 128 ? instance<T, 128>(heads) : nullptr;
}

} // namespace

const void *rgk_topk80(rg_dtype type, int heads, int width) {
#ifndef RGK_DEV
  if (type == RG_F16) return instance<__half>(heads, width);
#endif
  return type == RG_BF16 ? instance<__nv_bfloat16>(heads, width) : nullptr;
}
