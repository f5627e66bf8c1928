/* kernels/attn/decode_layer_sm90.cuh: all of a layer's attention of single tokens in one launch:
   compressed keys and the choice of blocks (decode_near_sm90.cu), then window and
   selected blocks and the gated sum of all branches, to the bits of decode_pair_sm90.cu.

   A block of threads takes its tokens one after the other; one warpgroup attends to all branches:

     attends     cmp(0)  cmp(1)  swa(0)  slc(0)  cmp(2)  swa(1)  slc(1) …
     ranks       rows    blocks of 0             blocks of 1 …

   So what is chosen is there by the time it is wanted, the copy engine has always something to
   fetch, and no token waits for another's blocks of threads. An access of memory waits behind all
   that the copy engine has asked for, several microseconds, and a proxy fence for the stores before
   it. So those who attend have none: rows of o go through the slots of weights to those who sum up
   weights, who keep a window's, and read those of compressed keys again, each thread what it wrote.

   Rows: keys and values of this step go to their pages first, and the means of blocks that they
   complete, by those who have nothing to do yet. Nothing is fetched before an mbarrier says that
   they are there: what they take is four accesses of memory, one after the other, which behind a
   tile's boxes are several microseconds each (and the newest tile is the first).
 */
#pragma once
#include "decode_sum_sm90.cuh"

namespace rgk {
namespace decode {

template <class C>
using window_of = setup<typename C::type, C::D, ALONE, true, false, C::NEAR, true>;
template <class C>
using selected_of = setup<typename C::type, C::D, SELECTED, true, false, C::NEAR, true>;

/* ---- load: a warpgroup ---- */

/* What follows when a token's compressed keys have been asked for. Each warp starts one box of 64
 * rows and columns: of K, then of V; all wait for all room, so that parities tell. */
template <class C> struct layer_loads {
  using W = window_of<C>;
  using S = selected_of<C>;
  const rgk_decode_layer &d;
  memory<C> &s;
  slots k, v; /* what follows on what was asked for */
  ring<2> q, chosen;
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;

  template <class R> __device__ __forceinline__ R from(const slots &x) const {
    R r;
    r.take(x);
    return r;
  }

  __device__ __forceinline__ void compressed(const job &j, const in_pages &at) {
    auto rk = from<typename C::stages>(k), rv = from<typename C::stages>(v);
    load_job<C>(d.d.f, s, j, at, rk, rv, q, [&]() {
      if (d.steps) bar_wait(s.stepped, 0);
    });
    k = rk, v = rv;
  }

  /* few: of the last token, whose blocks are ranked meanwhile. Each access of memory that ranking
   * takes waits behind what has been asked for here; a tile at a time is enough. */
  __device__ __forceinline__ void window(const job &j, const in_pages &in, bool few) {
    const rgk_flash_paged &f = d.pair.window;
    auto rk = from<typename W::stages>(k), rv = from<typename W::stages>(v);
    const int kv_head = rgk_over(j.head, f.f.by_group), half = warp % 2, panel = warp / 2;
    auto find_box = [&](int t) {
      int2 b = make_int2(0, f.pages.count); /* row of a page, page */
      const int row = t * W::KEYS + half * 64;
      if (t < j.first) return b;
      const int m = rgk_over(row, f.by_rows);
      b.x = row - m * f.pages.rows;
      if (row + 64 > in.low && row < in.rows) b.y = in.table[m];
      return b;
    };
    auto fetch = [&](char *to, const rgk_map *map, uint64_t *full, const int2 &b) {
      if (threadIdx.x == 0) bar_expect(full, W::DP * W::KV);
      if (lane == 0 && panel < W::DP) /* blocks that are chosen, too, are fetched again */
        tma_load(to + panel * W::KV + half * W::KV / 2, map, full, panel * 64, kv_head, b.x, b.y);
      __syncwarp();
    };
    typename W::stages k_last, v_last; /* of the tile before, if `after` */
    auto load_k = [&](const int2 &b, bool after) {
      wait_empty(s.k_empty, rk);
      if (few && after) bar_wait(&s.k_full[k_last.stage], k_last.parity);
      fetch(s.k[rk.stage], &f.f.k, &s.k_full[rk.stage], b);
      k_last = rk;
      rk.next();
    };
    auto load_v = [&](const int2 &b, bool after) {
      wait_empty(s.v_empty, rv);
      if (few && after) bar_wait(&s.v_full[v_last.stage], v_last.parity);
      fetch(s.v[rv.stage], &f.f.v, &s.v_full[rv.stage], b);
      v_last = rv;
      rv.next();
    };
    int2 now = find_box(j.end - 1), next = find_box(j.end - 2); /* pages are asked for early */
    if (j.first < j.end) load_k(now, false);
    hand_out<W>(f.f, s, q, j, threadIdx.x == 0);
    for (int t = j.end - 1; t >= j.first; t--) {
      const int2 later = find_box(t - 2);
      if (t > j.first) load_k(next, true);
      load_v(now, t < j.end - 1);
      now = next, next = later;
    }
    k = rk, v = rv;
  }

  __device__ __forceinline__ void selected(job j, const int32_t *table) {
    const rgk_flash_params &p = d.pair.selected.f.f;
    auto rk = from<typename S::stages>(k), rv = from<typename S::stages>(v);
    const int kv_head = rgk_over(j.head, p.by_group), panel = warp % 2;
    bar_wait(&s.chosen[chosen.stage], chosen.parity);
    chosen.next();
    const chosen_blocks c = find_chosen<S>(d.pair.selected, table, j);
    hand_out<S>(p, s, q, j, threadIdx.x == 0);
    for (uint32_t left = c.left; left; left &= left - 1) {
      const int at = __ffs(left) - 1, first = __shfl_sync(~0u, c.e, at) * S::KEYS,
                page = __shfl_sync(~0u, c.page, at), row = __shfl_sync(~0u, c.row, at);
      wait_empty(s.k_empty, rk);
      if (threadIdx.x == 0) {
        s.first[rk.stage] = first;
        bar_expect(&s.k_full[rk.stage], S::DP * S::KV);
      }
      if (lane == 0 && warp / 2 == 0 && panel < S::DP)
        tma_load(s.k[rk.stage] + panel * S::KV, &p.k, &s.k_full[rk.stage], panel * 64, kv_head, row,
                 page, l2::evict_first);
      __syncwarp();
      rk.next();
      wait_empty(s.v_empty, rv);
      if (threadIdx.x == 0) bar_expect(&s.v_full[rv.stage], S::EP * S::KV);
      if (lane == 0 && warp / 2 == 1 && panel < S::EP)
        tma_load(s.v[rv.stage] + panel * S::KV, &p.v, &s.v_full[rv.stage], panel * 64, kv_head, row,
                 page, l2::evict_first);
      __syncwarp();
      rv.next();
    }
    k = rk, v = rv;
  }

  __device__ __forceinline__ void rest(const tile &t, int head, bool last) {
    job j = {};
    in_pages at = {};
    j.head = head;
    place_job<W>(d.pair.window, t, j, at);
    window(j, at, last);
    if (j.kind == DEAD_ROWS) return;
    place_job<S>(d.pair.selected.f, t, j, at);
    selected(j, at.table);
  }

  __device__ __forceinline__ void run() {
    tile last = {};
    int last_head = -1;
    auto ahead = [&](int row, int) { guess_context(d.d.f, row); };
    each_token<C>(d.d.f.f, ahead, [&](const tile &t, int head) {
      job j = {};
      in_pages at = {};
      j.head = head;
      place_job<C>(d.d.f, t, j, at);
      compressed(j, at);
      if (last_head >= 0) rest(last, last_head, false);
      last = t, last_head = head;
    });
    if (last_head >= 0) rest(last, last_head, true);
    hand_out_end<C>(d.d.f.f, s, q, threadIdx.x == 0);
  }
};

/* ---- this step's rows and what they complete: those who sum up weights, before there are any ----
 *
 * A sequence has mostly one row. Where it has more, each of its tokens sees to all of them: others'
 * would have to be waited for. They write the same. */

template <class C>
__device__ __forceinline__ void step_all(const rgk_decode_layer &d, memory<C> &s) {
  const rgk_flash_params &p = d.d.f.f;
  const int heads = p.H >> p.pack, jobs = p.slots * heads, blocks = sharers<C>(),
            warp = (int)threadIdx.x / 32 % 4; /* has keys or values of every other job */
  if (!d.steps) return;
  constexpr rg_dtype TYPE = std::is_same_v<typename C::type, __half> ? RG_F16 : RG_BF16;
  static_assert(2 * RGK_PAGED_MEAN_GROUP * 2 * C::D <= C::STAGES * sizeof s.v[0] / 4, "has room");
  for (int r = warp / 2; r * blocks < jobs; r += 2) {
    const int i = own_job<C>(r), slot = rgk_over(i, p.by_heads), row = p.slots - 1 - slot;
    if (i >= jobs) continue;
    guess_context(d.d.f, row);
    const int b = find_own_seq(p.seqs, row);
    if (b < p.seqs.n)
      step_head<TYPE, C::D>(d.step, b, warp % 2, i - slot * heads, s.v[0] + warp * sizeof s.v / 4);
  }
  step_fence();
  warp_ready(s.stepped);
}
template <class C> __device__ __forceinline__ void step_all(const rgk_decode &, memory<C> &) {}

/* ---- attend: a warpgroup ---- */

template <class C>
__device__ __forceinline__ void attend_layer(const rgk_decode_layer &d, memory<C> &s) {
  using W = window_of<C>;
  using S = selected_of<C>;
  const int tid = (int)threadIdx.x % 128, lane = tid % 32;
  const rgk_decode_pair &pair = d.pair;
  to_memory<C> to;
  attention<C, rgk_decode, to_memory<C>> x{
      d.d, s,  tid, tid / 32, lane, lane / 4,    lane % 4, d.d.f.f.scale * LOG2E,
      to,  {}, {},  C::NEAR,  1,    (uint32_t)0, {},       {}};
  auto also = [&](auto &y, const job &j, int stage) {
    y.k.take(x.k), y.v.take(x.v), y.w = x.w;
    y.take(j, stage);
    x.k.take(y.k), x.v.take(y.v), x.w = y.w;
  };
  for (ring<2> q;; q.next()) {
    bar_wait(&s.q_full[q.stage], q.parity);
    const job j = s.jobs[q.stage];
    const int branch = __shfl_sync(~0u, s.branch[q.stage], 0); /* ptxas is to know */
    if (j.kind == EXIT) break;
    if (branch != RANKED) { /* weights and rows have been read */
      ring<2> w = x.w;
      bar_wait(&s.p_empty[w.stage], w.parity ^ 1);
      w.next();
      bar_wait(&s.p_empty[w.stage], w.parity ^ 1);
    }
    if (branch == RANKED) {
      x.take(j, q.stage);
    } else if (branch == ALONE) {
      to_memory<W> to;
      attention<W, rgk_flash_paged, to_memory<W>> y{
          pair.window, s,  tid, tid / 32, lane, lane / 4,    lane % 4, pair.window.f.scale * LOG2E,
          to,          {}, {},  0,        1,    (uint32_t)0, {},       {}};
      also(y, j, q.stage);
    } else {
      to_memory<S> to;
      attention<S, rgk_decode_selected, to_memory<S>> y{pair.selected,
                                                        s,
                                                        tid,
                                                        tid / 32,
                                                        lane,
                                                        lane / 4,
                                                        lane % 4,
                                                        pair.selected.f.f.scale * LOG2E,
                                                        to,
                                                        {},
                                                        {},
                                                        0,
                                                        1,
                                                        (uint32_t)0,
                                                        {},
                                                        {}};
      also(y, j, q.stage);
    }
  }
  x.end();
}

/* ---- rows of o: those who sum up weights, beside that ---- */

/* w: where rows of compressed keys or of a window are; of the latter those of selected blocks
 * follow, and a token is at its end. Gates and rows that are in memory are asked for meanwhile. */
template <class C>
__device__ __forceinline__ void take_rows(const rgk_decode_layer &d, memory<C> &s, ring<2> &w) {
  const int tid = (int)threadIdx.x % WARPGROUP;
  uint4 rows[PIECES<C>];
  auto read = [&]() {
    const char *const from = s.p[w.stage];
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < PIECES<C>; i++) {
      rows[i] = *(const uint4 *)(from + unit_at<C>(tid + i * WARPGROUP));
      all ^= rows[i].x ^ rows[i].y ^ rows[i].z ^ rows[i].w;
    }
    return all;
  };
  const weighed &x = s.slot[w.stage];
  job j = {};
  j.token = x.token, j.head = x.head;
  const int branch = ROWS - x.at;
  warp_release(&s.p_empty[w.stage], read(), j.token, j.head, branch);
  if (branch == RANKED) {
    const rgk_flash_params &p = d.d.f.f;
#pragma unroll
    for (int i = 0; i < PIECES<C>; i++) {
      const int n = tid + i * WARPGROUP;
      *(uint4 *)((typename C::type *)p.o.data + (int64_t)j.token * p.o.row +
                 (j.head + n / (C::E / 8)) * p.o.head + n % (C::E / 8) * 8) = rows[i];
    }
    return;
  }
  branch_sum<C, PIECES<C>> sum(d.pair, j, tid);
#pragma unroll
  for (int i = 0; i < PIECES<C>; i++) sum.part[i][sum.WINDOW] = rows[i];
  w.next();
  bar_wait(&s.p_full[w.stage], w.parity);
  warp_release(&s.p_empty[w.stage], read());
#pragma unroll
  for (int i = 0; i < PIECES<C>; i++) sum.put(i, rows[i]);
}
template <class C>
__device__ __forceinline__ void take_rows(const rgk_decode &, memory<C> &, ring<2> &) {}

/* ---- with and without a layer ---- */

__device__ __forceinline__ const rgk_decode &step_of(const rgk_decode &d) {
  return d;
}
__device__ __forceinline__ const rgk_decode &step_of(const rgk_decode_layer &d) {
  return d.d;
}
template <class C> __device__ __forceinline__ void load_all(const rgk_decode &d, memory<C> &s) {
  load_tiles<C>(d.f, s);
}
template <class C>
__device__ __forceinline__ void load_all(const rgk_decode_layer &d, memory<C> &s) {
  layer_loads<C>{d, s}.run();
}
template <class C> __device__ __forceinline__ void attend_all(const rgk_decode &d, memory<C> &s) {
  attend<C>(d, s);
}
template <class C>
__device__ __forceinline__ void attend_all(const rgk_decode_layer &d, memory<C> &s) {
  attend_layer<C>(d, s);
}

} // namespace decode
} // namespace rgk
