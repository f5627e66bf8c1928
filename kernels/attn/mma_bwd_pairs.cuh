/* kernels/attn/mma_bwd_pairs.cuh: dQ on the tensor cores of any GPU since Ampere, where widths are
   up to 128 and keys are not selected block by block.

     S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K

   A block has a tile of 64 rows (query, head), a pair of warps 32 of them, and walks the keys that
   some row sees, 32 a step. One of a pair holds its rows of Q in registers and makes P, the other
   those of dO and makes dS; each has half of dQ's columns. So what a warp reads of K and V serves
   two products, half of what it does where a warp has 16 rows for itself (mma_bwd_queries.cuh). P
   and dS cross over in shared memory, as lanes hold them, and are taken a step later each, so that
   all warps meet once a step, whatever they wait for:

       step i     with Q    S of i, dQ of i - 2 beside P of i
                  with dO   dQ of i - 2 beside dS of i - 1, dP of i

   Both have a loop of their own: branches cost more than their instructions.
 */
#pragma once
#include "mma_bwd_queries.cuh"

namespace rgk {
namespace mma_bwd {

/* Columns of dQ are a warp's in turn, 16 at a time. */
constexpr int PAIR_STEP = RGK_MMA_BWD_PAIR_STEP, PAIR_GAP = 32;

template <int W, int E> struct pair_memory {
  char k[4][PAIR_STEP * W * 2]; /* steps i - 2 to i + 1 */
  char v[2][PAIR_STEP * E * 2];
  /* of each pair, 16 rows at a time, as lanes hold it: accumulators, and A */
  float4 p[2][2][2][PAIR_STEP / 8][32];
  uint4 ds[2][2][2][PAIR_STEP / 16][32];
  row_tile rows; /* for the end */
};

/* copy_keys of all ROWS rows, which fill their places. */
template <int W, int ROWS>
__device__ __forceinline__ void copy_whole(uint32_t to, const uint16_t *from, int64_t step) {
  constexpr int CHUNKS = W % 64 ? 4 : 8, STRIDE = THREADS / CHUNKS;
  static_assert(ROWS % STRIDE == 0 && STRIDE % 8 == 0, "a thread's rows turn alike");
  const uint32_t c = threadIdx.x % CHUNKS, r0 = threadIdx.x / CHUNKS;
  const uint32_t here = to + place<W>((int)r0, (int)c);
  const uint16_t *x = from + 8 * c + r0 * step;
#pragma unroll
  for (int i = 0; i < ROWS / STRIDE; i++, x += STRIDE * step)
#pragma unroll
    for (int g = 0; g < W / 8 / CHUNKS; g++)
      copy16(here + i * STRIDE * pitch(W) + g * CHUNKS * 16, x + g * CHUNKS * 8);
}

template <class T, int W, int E>
__global__ void __launch_bounds__(THREADS, 2) pairs(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = pair_memory<W, E>;
  constexpr int STEP = PAIR_STEP, M = 2, KS = STEP / 16, HALF = W / 2, NJ = HALF / 16;
  static_assert(sizeof(sh_t) == rgk_mma_bwd_pairs_shared(W, E), "as the host counts");
  static_assert(ROWS * pitch(W) <= 2 * STEP * pitch(W) && ROWS * pitch(E) <= sizeof sh_t::p,
                "Q and dO come where K, P are not yet");
  extern __shared__ __align__(1024) char mma_bwd_memory[];
  sh_t &sh = *(sh_t *)mma_bwd_memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = warp % 2;
  const bool for_p = warp < 2;
  const uint32_t at_k = smem_at(sh.k), at_v = smem_at(sh.v), at_q = at_k + 2 * STEP * pitch(W),
                 at_o = smem_at(sh.p);

  row_tile t;
  if (!take_rows<W, E>(p, t, at_q, at_o)) return;
  const key_span span = rgk::keys_of(a, t.t.b);
  const uint16_t *const k = (const uint16_t *)a.k.data + span.row * a.k.row + t.kh * a.k.head,
                        *const v =
                            (const uint16_t *)a.v.data + span.row * a.v.row + t.kh * a.v.head;
  const int n = (int)span.n;
  const int64_t pos = t.t.first + first_position(a, t.t.b);
  const int begin = (int)(visible(a, pos, n).lo / STEP * STEP),
            end = (int)visible(a, pos + t.t.n - 1, n).hi,
            count = end > begin ? (end - begin + STEP - 1) / STEP : 0;
  const bool whole = a.D == W && a.E == E;
  auto load = [&](int i) {
    const int first = begin + i * STEP, keys = min(STEP, n - first);
    if (whole && keys == STEP) {
      copy_whole<W, STEP>(at_k + (i & 3) * STEP * pitch(W), k + first * a.k.row, a.k.row);
      copy_whole<E, STEP>(at_v + (i & 1) * STEP * pitch(E), v + first * a.v.row, a.v.row);
      return;
    }
    copy_keys<W, STEP>(at_k + (i & 3) * STEP * pitch(W), a.D, k + first * a.k.row, a.k.row, keys);
    copy_keys<E, STEP>(at_v + (i & 1) * STEP * pitch(E), a.E, v + first * a.v.row, a.v.row, keys);
  };
  if (count > 0) load(0);
  copies_commit();

  /* this lane's row of the pair's 32, then its four of the accumulators */
  int lo = 0x7fffffff, hi = 0;
  float number = 0;
  {
    const int r = 32 * pair + lane;
    if (r < t.n) {
      const int query = r / t.heads;
      const float lse = ((const float *)a.lse.data)[row_at(t, a.lse, r)];
      if (lse != -INFINITY) {
        const key_range x = visible(a, pos + query, n);
        lo = (int)x.lo, hi = (int)x.hi;
      }
      number = for_p ? lse * LOG2E : p.delta[(t.row + query) * a.H + t.head + r % t.heads];
    }
  }
  const int lo_min = __reduce_min_sync(~0u, lo), lo_max = __reduce_max_sync(~0u, lo),
            hi_min = __reduce_min_sync(~0u, hi), hi_max = __reduce_max_sync(~0u, hi);
  float stat[4];
#pragma unroll
  for (int i = 0; i < 4; i++) stat[i] = __shfl_sync(~0u, number, lane / 4 + 8 * i);
  const float scale2 = a.scale * LOG2E;

  if (threadIdx.x == 0) sh.rows = t;
  copies_wait<0>();
  __syncthreads();
  auto work = [&](auto half) {
    constexpr bool P = decltype(half)::value;
    constexpr int IN = P ? W : E;
    uint32_t held[IN / 16][M][4];
#pragma unroll
    for (int i = 0; i < IN / 16; i++)
#pragma unroll
      for (int m = 0; m < M; m++)
        load_matrices(
            on<IN>(mma_at_rows<IN>(P ? at_q : at_o) + (32 * pair + 16 * m) * pitch(IN), 2 * i),
            held[i][m]);
    float sum[M][HALF / 2], s[M][STEP / 2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < HALF / 2; i++) sum[m][i] = 0;
    const uint32_t k_rows = P ? mma_at_rows<W>(at_k) : on<W>(mma_at_rows<W>(at_k), 2);
    const uint32_t own = P ? mma_at_columns<W>(at_k) : mma_at_columns<E>(at_v);
    auto products = [&](uint32_t b) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < STEP / 2; i++) s[m][i] = 0;
#pragma unroll
      for (int i = 0; i < IN / 16; i++)
#pragma unroll
        for (int j = 0; j < STEP / 16; j++) {
          uint32_t y[4];
          load_matrices(on<IN>(b, 2 * i) + j * 16 * pitch(IN), y);
#pragma unroll
          for (int m = 0; m < M; m++) {
            mma<T>(s[m] + 8 * j, held[i][m], y);
            mma<T>(s[m] + 8 * j + 4, held[i][m], y + 2);
          }
        }
    };
    constexpr int PARTS = KS * NJ, EIGHTS = M * STEP / 8; /* of dQ's product; of 8 columns of s */
    bool any1 = false, any2 = false, cut1 = false;
#pragma unroll 1
    for (int i = 0; i < count + 2; i++) {
      const int first = begin + i * STEP;
      copies_wait<0>();
      meet<THREADS>();
      if (i + 1 < count) load(i + 1);
      copies_commit();
      const bool any = i < count && first < hi_max && first + STEP > lo_min;
      const uint32_t k2 = k_rows + ((i + 2) & 3) * STEP * pitch(W);
      auto add_dq = [&](auto beside) {
        uint32_t x[KS][M][4];
#pragma unroll
        for (int q = 0; q < KS; q++)
#pragma unroll
          for (int m = 0; m < M; m++) {
            const uint4 w = sh.ds[i & 1][pair][m][q][lane];
            x[q][m][0] = w.x, x[q][m][1] = w.y, x[q][m][2] = w.z, x[q][m][3] = w.w;
          }
#pragma unroll
        for (int q = 0; q < KS; q++)
#pragma unroll
          for (int j = 0; j < NJ; j++) {
            uint32_t y[4];
            load_transposed(on<W>(k2, 4 * j) + q * 16 * pitch(W), y);
#pragma unroll
            for (int m = 0; m < M; m++) {
              mma<T>(sum[m] + 8 * j, x[q][m], y);
              mma<T>(sum[m] + 8 * j + 4, x[q][m], y + 2);
            }
            beside(q * NJ + j);
          }
      };
      auto none = [](int) {};
      const bool cut = first < lo_max || first + STEP > hi_min;
      if constexpr (P) {
        auto put = [&](int m, int j) {
          const float *const x = s[m] + 4 * j;
          sh.p[i & 1][pair][m][j][lane] = make_float4(x[0], x[1], x[2], x[3]);
        };
        auto weigh = [&](int part) {
#pragma unroll
          for (int e = part * EIGHTS / PARTS; e < (part + 1) * EIGHTS / PARTS; e++) {
            const int m = e / (STEP / 8), j = e % (STEP / 8);
            float *const x = s[m] + 4 * j;
#pragma unroll
            for (int q = 0; q < 4; q++) x[q] = exp2_fast(fmaf(x[q], scale2, -stat[2 * m + q / 2]));
            put(m, j);
          }
        };
        if (any && any2 && !cut) {
          products(own + (i & 3) * STEP * pitch(W));
          add_dq(weigh);
        } else {
          if (any2) add_dq(none);
          if (any) {
            products(own + (i & 3) * STEP * pitch(W));
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int h = 0; h < 2; h++) {
                const int row_lo = __shfl_sync(~0u, lo, lane / 4 + 16 * m + 8 * h) - first,
                          row_hi = __shfl_sync(~0u, hi, lane / 4 + 16 * m + 8 * h) - first;
#pragma unroll
                for (int j = 0; j < STEP / 8; j++)
#pragma unroll
                  for (int q = 0; q < 2; q++) {
                    const int column = 8 * j + lane % 4 * 2 + q;
                    float &x = s[m][4 * j + 2 * h + q];
                    x = exp2_fast(fmaf(x, scale2, -stat[2 * m + h]));
                    if (column < row_lo || column >= row_hi) x = 0;
                  }
              }
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int j = 0; j < STEP / 8; j++) put(m, j);
          }
        }
      } else {
        /* dS of the step before; masked: nothing comes of what a row does not see, NaN either */
        auto scale_by = [&](int part, auto masked) {
#pragma unroll
          for (int e = part * EIGHTS / PARTS; e < (part + 1) * EIGHTS / PARTS; e++) {
            const int m = e / (STEP / 8), j = e % (STEP / 8);
            const float4 w = sh.p[(i & 1) ^ 1][pair][m][j][lane];
            float *const x = s[m] + 4 * j;
            x[0] = w.x * (x[0] - stat[2 * m]), x[1] = w.y * (x[1] - stat[2 * m]);
            x[2] = w.z * (x[2] - stat[2 * m + 1]), x[3] = w.w * (x[3] - stat[2 * m + 1]);
            if constexpr (decltype(masked)::value) {
              x[0] = w.x == 0 ? 0 : x[0], x[1] = w.y == 0 ? 0 : x[1];
              x[2] = w.z == 0 ? 0 : x[2], x[3] = w.w == 0 ? 0 : x[3];
            }
            if (j % 2) {
              uint32_t y[4];
              pack_a<T>(y, s[m] + 4 * (j - 1));
              sh.ds[(i & 1) ^ 1][pair][m][j / 2][lane] = make_uint4(y[0], y[1], y[2], y[3]);
            }
          }
        };
        if (any && any1 && any2 && !cut1) {
          add_dq([&](int part) { scale_by(part, std::false_type()); });
          products(own + (i & 1) * STEP * pitch(E));
        } else {
          if (any2) add_dq(none);
          if (any1)
#pragma unroll
            for (int part = 0; part < PARTS; part++) scale_by(part, std::true_type());
          if (any) products(own + (i & 1) * STEP * pitch(E));
        }
      }
      any2 = any1, any1 = any, cut1 = cut;
    }
    copies_wait<0>();
    meet<THREADS>(); /* before dQ takes the place of keys */
    const row_tile mine = sh.rows;
#pragma unroll
    for (int m = 0; m < M; m++) {
      const int row = 32 * pair + 16 * m;
      put_dq<T, W, HALF, PAIR_GAP>(
          a, sum[m], P ? 0 : 16, at_k + row * pitch(W), mma_bwd_memory + row * pitch(W),
          [&](const rgk_tensor &x, int r) { return row_at(mine, x, row + r); });
    }
  };
  if (for_p)
    work(std::true_type());
  else
    work(std::false_type());
}

} // namespace mma_bwd
} // namespace rgk
