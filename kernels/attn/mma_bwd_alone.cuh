/* kernels/attn/mma_bwd_alone.cuh: dQ of selected blocks on the tensor cores of GPUs since Ampere,
   where a KV head's group has up to 16 heads.

     S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = P (dP - delta)    dQ = scale dS K

   As the forward does (mma_fwd.cuh, whose rows, walk and copies these are), a warp has 16 rows of
   its own, and room for a tile of the blocks that its own queries chose: what neighbours chose is
   nothing to it, and it waits for no other. Q and dO stay in registers. Per tile, C the copies
   under way:

       V is there │ dP            │ K is there │ S, dS   dQ += dS K │ next tile
       C: K       └ done with V ─▶│ C: V of the next                └ done with K ─▶ C: V, K

   Sums have the order of mma_bwd_queries.cuh.
 */
#pragma once
#include "mma_bwd.cuh"
#include "mma_fwd.cuh"

namespace rgk {
namespace mma_bwd_alone {

using namespace mma_fwd;
using namespace mma_bwd;

/* Three warps a scheduler where 168 registers do. */
template <class C>
__global__ void __launch_bounds__(C::THREADS, (C::D <= 64 ? 384 : 256) / C::THREADS)
    alone(const __grid_constant__ rgk_mma_bwd_alone_params p) {
  using type = typename C::type;
  constexpr int D = C::D, E = C::E, N = C::N;
  static_assert(C::ALONE && C::Q == 0 && C::X == 1, "a warp has its rows in registers");
  extern __shared__ __align__(128) char memory[];
  const rgk_attn &a = p.m.a;
  const int lane = threadIdx.x % 32, team = threadIdx.x / 32;
  const uint32_t k_room = smem_at(memory) + team * (C::K + C::V), v_room = k_room + C::K;
  const team_rows t = find_rows<C>(p.m);
  if (t.n == 0) return;
  auto at = [&](const rgk_tensor &x, int r) -> int64_t {
    const row_of of = row_at(p.m, t, r);
    return of.there ? (t.row + of.query) * x.row + (t.head + of.head) * x.head : -1;
  };
  if (t.t.b >= a.seqs.n) { /* dead rows */
    for (int i = lane; i < t.n * D / 2 && !a.acc_q; i += 32) {
      const int64_t to = at(a.dq, i / (D / 2));
      const int c = i % (D / 2) * 2;
      if (to >= 0 && c < a.D) put_two(a.dq, false, to + c, 0, 0);
    }
    return;
  }
  const key_span span = keys_of(a, t.t.b);
  const int key_row = (int)span.row;
  auto rows_of = [&](const rgk_tensor &x) {
    return [&, x](int r) {
      const int64_t from = at(x, r);
      return from < 0 ? (const uint16_t *)nullptr : (const uint16_t *)x.data + from;
    };
  };
  copy_rows<D, 16, 32>(k_room, lane, a.D, a.q.data, rows_of(a.q));
  copy_rows<E, 16, 32>(v_room, lane, a.E, a.d_o.data, rows_of(a.d_o));
  copies_commit();
  selected_walk<C> walk(p.m, t, span, nullptr, 0);
  float lse[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const row_of of = row_at(p.m, t, lane / 4 + 8 * i);
    float x = -INFINITY;
    delta[i] = 0;
    if (of.there) {
      x = *element_at<const float>(a.lse, t, of);
      delta[i] = p.delta[(t.row + of.query) * a.H + t.head + of.head];
    }
    lse[i] = x == -INFINITY ? INFINITY : x * LOG2E; /* of what saw nothing P is 0 */
  }
  copies_wait<0>();
  __syncwarp();
  uint32_t q[D / 16][4], d_o[E / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; k++) load_matrices(on<D>(mma_at_rows<D>(k_room), 2 * k), q[k]);
#pragma unroll
  for (int k = 0; k < E / 16; k++) load_matrices(on<E>(mma_at_rows<E>(v_room), 2 * k), d_o[k]);
  __syncwarp();

  key_tile now, next;
  bool more = walk.step(p.m, now);
  if (more) mma_fwd::copy_keys<C, E>(v_room, a.v, key_row, t.kh, a.E, now, lane);
  copies_commit();
  if (more) mma_fwd::copy_keys<C, D>(k_room, a.k, key_row, t.kh, a.D, now, lane);
  copies_commit();
  const float scale2 = a.scale * LOG2E;
  float sum[1][D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; i++) sum[0][i] = 0;

#pragma unroll 1
  while (more) {
    float s[N / 2], dp[N / 2];
    const seen_keys seen = walk.enter(p.m, nullptr, t.n, lane / 4);
    copies_wait<1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 2; i++) dp[i] = s[i] = 0;
#pragma unroll
    for (int k = 0; k < E / 16; k++)
      mma_by_rows<type, E>(dp, d_o[k], on<E>(mma_at_columns<E>(v_room), 2 * k));
    const int from = now.key + lane % 4 * 2;
    const int end[2] = {walk.to[0] - from, walk.to[1] - from};
    const bool cut = now.key + N > seen.hi_all;
    more = walk.step(p.m, next);
    __syncwarp(); /* all done with V */
    if (more) mma_fwd::copy_keys<C, E>(v_room, a.v, key_row, t.kh, a.E, next, lane);
    copies_commit();
    copies_wait<1>();
    __syncwarp();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      mma_by_rows<type, D>(s, q[k], on<D>(mma_at_columns<D>(k_room), 2 * k));
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
      const int i = j / 2 % 2;
      s[j] = exp2_fast(fmaf(s[j], scale2, -lse[i])) * (dp[j] - delta[i]);
    }
    if (cut) {
#pragma unroll
      for (int j = 0; j < N / 2; j++)
        if (j / 4 * 8 + j % 2 >= end[j / 2 % 2]) s[j] = 0;
    }
    uint32_t ds[1][N / 4];
#pragma unroll
    for (int i = 0; i < N / 16; i++) pack_a<type>(ds[0] + 4 * i, s + 8 * i);
    add_product<type, D, N / 16>(sum, ds, mma_at_rows<D>(k_room));
    __syncwarp(); /* all done with K */
    if (more) mma_fwd::copy_keys<C, D>(k_room, a.k, key_row, t.kh, a.D, next, lane);
    copies_commit();
    now = next;
  }
  put_dq<type, D, D>(a, sum[0], 0, k_room, memory + team * (C::K + C::V), at);
}

template <class T, int D, int E> const void *of() {
  return (const void *)alone<config<T, D, E, RGK_MMA_ONE, true>>;
}

} // namespace mma_bwd_alone
} // namespace rgk
