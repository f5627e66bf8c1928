/* kernels/attn/topk_sm90.cuh: Hopper's topk: shared memory, and the sums p of a tile over
   heads. Which keys go by, and when, is topk_sm90.cu's; what is chosen, topk_choice.cuh's.
 */
#pragma once
#include "../device/element.cuh"
#include "../device/ptx.cuh"
#include "../device/softmax.cuh"
#include "topk_choice.cuh"

namespace rgk {
namespace topk90 {

constexpr int TILE = RGK_TOPK90_TILE;
enum named : int { EACH = 1 }; /* first id, of one for each consumer */

/* Of one warpgroup: */
template <int HEADS> struct plan {
  /* of a quad lane, a warp */
  static constexpr int N = RGK_TOPK90_COLUMNS, QUERIES = N / HEADS, MINE = QUERIES / 4;
  static constexpr int BUFFERS = 2, HALVES = RGK_TOPK90_HALVES(QUERIES), STEP = TILE * HALVES,
                       PITCH = RGK_TOPK90_PITCH(QUERIES);
  /* candidates of a query */
  static constexpr int ROOM = RGK_TOPK90_ROOM(QUERIES), PER_LANE = ROOM / 32;
};

/* ---- shared memory ----
 *
 *   q [GROUPS, panels, N]   k [stages, panels, TILE]   tables   carry [GROUPS, QUERIES, reach]
 *
 * q and k as panels of 64 columns, of N and TILE rows. */

template <int HEADS, int GROUPS> struct tables {
  using P = plan<HEADS>;
  float p[GROUPS][2][P::QUERIES][P::PITCH];
  int2 candidate[GROUPS][P::QUERIES][P::ROOM]; /* key, block */
  int4 state[GROUPS][P::QUERIES];  /* threshold, candidates, blocks that may be chosen, keep */
  int visible[GROUPS][P::QUERIES]; /* keys that the query sees */
  uint64_t full[RGK_TOPK90_STAGES], empty[RGK_TOPK90_STAGES];
  uint64_t summed[2], taken[2]; /* of a step's sums, where others than the consumer choose */
};

/* Where a warpgroup finds its part. */
struct memory : topk_memory {
  char *q, *k;            /* of all */
  int *visible;           /* [QUERIES] */
  uint64_t *full, *empty; /* [stages] */
  uint64_t *summed, *taken;
};

/* Byte of row r's 16-byte unit u in panels of `rows` rows. */
__device__ __forceinline__ uint32_t panel_at(int r, int u, int rows) {
  return (uint32_t)((u >> 3) * rows * 128 + r * 128 + ((u ^ r) & 7) * 16);
}

/* ---- p of one tile: exponentials and the sum over heads ---- */

/* Over pages keys below `before` are none. */
template <int HEADS, bool DOT, bool PAGED>
__device__ __forceinline__ void
weigh(const float (&acc)[plan<HEADS>::N / 2], const float (&lse)[plan<HEADS>::N / 4], float scale,
      float *out, int key, int before, int least_visible, const int *visible) {
  using P = plan<HEADS>;
  const int c = threadIdx.x % 4;
  constexpr int PARTS = HEADS >= 4 ? 2 : 1;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int q = 0; q < P::MINE; q++) {
      float part[PARTS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const int m = q * HEADS + h;
        const float s = acc[4 * (m / 2) + 2 * r + m % 2];
        const float x = DOT ? s : exp2_fast(fmaf(s, scale, lse[m]));
        part[h % PARTS] = h < PARTS ? x : part[h % PARTS] + x;
      }
      float sum = PARTS == 2 ? part[0] + part[PARTS - 1] : part[0];
      if (key + 8 * r >= least_visible && key + 8 * r >= visible[4 * q + c])
        sum = DOT ? -INFINITY : 0.0f;
      if (PAGED && key + 8 * r < before) sum = 0;
      out[(4 * q + c) * P::PITCH + 8 * r] = sum;
    }
}

} // namespace topk90
} // namespace rgk
