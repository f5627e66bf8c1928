/* kernels/attn/decode_pair_sm90.cu: selected blocks and a window of single tokens, and the gated
   sum of both with what other branches made (decode.h), in one launch: the bits of
   decode_attn_sm90.cu and blend.cu.

     warpgroup   0 loads, a warp    1 attends to the window, and sums    2 to the selected blocks

   A token's selected blocks and then its window go through one ring of slots of 64 keys and values,
   in the order in which they are asked for. So whoever is behind has all the room, what is asked
   for is the same amount at all times, and blocks that are in both are still in L2 when the window
   comes to them: the memory has to give them once. Rows of o of selected blocks are handed over in
   shared memory, as they would be stored. It is for steps with several jobs for a block of threads.
 */
#include "decode_sum_sm90.cuh"

using namespace rgk;
using namespace rgk::decode;

namespace {

/* Rows of o on their way from one to the other. */
template <int E> struct rows_of {
  alignas(16) char o[HEADS * 2 * E];
  uint64_t full, empty;
};
template <class S, class W> struct both {
  pair_memory<S, W> tiles;
  rows_of<S::E> rows;
};

template <class C> struct giving {
  static constexpr bool GIVES = true;
  rows_of<C::E> &rows;
  uint32_t parity;
  __device__ __forceinline__ char *room() {
    bar_wait(&rows.empty, parity);
    parity ^= 1;
    return rows.o;
  }
  __device__ __forceinline__ void give() const { bar_ready(&rows.full); }
};

template <class C> struct summing {
  static constexpr bool GIVES = false;
  const rgk_decode_pair &d;
  rows_of<C::E> &rows;
  uint32_t parity;

  __device__ __forceinline__ void write(const rgk_flash_params &, const job &j, const char *room,
                                        int tid) {
    branch_sum<C, PIECES<C>> sum(d, j, tid);
    uint32_t read = 0;
    bar_wait(&rows.full, parity);
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < PIECES<C>; i++) {
      const int at = unit_at<C>(tid + i * WARPGROUP);
      const uint4 selected = *(const uint4 *)(rows.o + at), window = *(const uint4 *)(room + at);
      read ^= selected.x ^ selected.y ^ selected.z ^ selected.w;
      read ^= window.x ^ window.y ^ window.z ^ window.w; /* our own: for tests/releases.py alone */
      sum.part[i][sum.WINDOW] = window;
      sum.put(i, selected);
    }
    bar_release(&rows.empty, read);
  }
};

/* By a warp: keys and values of a token's selected blocks, then of its window. */
template <class S, class W>
__device__ __forceinline__ void load(const rgk_decode_pair &d, both<S, W> &s) {
  const rgk_flash_params &p = d.selected.f.f, &w = d.window.f;
  const rgk_pages &g = d.window.pages;
  auto &t = s.tiles.slots;
  const int lane = threadIdx.x % 32;
  constexpr uint32_t PANEL = 64 * 128;
  slots at;
  uint32_t uses[2] = {0, 0}; /* as `used`, of a window's and of selected blocks' */
  ring<2> q_selected, q_window;
  /* Keys, then values of a piece, when there is room: load(to, map, full) starts its copies. */
  auto fetch = [&](int kind, auto &r, int bytes, auto load) {
    wait_empty(t.k_empty, r);
    if (lane == 0) bar_expect(&t.k_full[kind][r.stage], bytes);
    __syncwarp();
    load(t.k, &p.k, &t.k_full[kind][r.stage]);
    __syncwarp();
    wait_empty(t.v_empty, r);
    if (lane == 0) bar_expect(&t.v_full[kind][r.stage], bytes);
    __syncwarp();
    load(t.v, &p.v, &t.v_full[kind][r.stage]);
    __syncwarp();
    uses[kind] ^= 1u << r.stage;
    r.next();
  };
  auto begin = [&](int kind, int stage) {
    slots x;
    x.stage = stage;
    x.used = uses[kind];
    return x;
  };
  auto ahead = [&](int row, int head) {
    look_ahead<S>(d.selected.f, s.tiles.of_selected(), row);
    if (lane < d.selected.top_n)
      copy4(smem_at(&s.tiles.of_selected().ahead[2][lane]),
            (const int32_t *)d.selected.idx.data + row * d.selected.idx.row +
                rgk_over(head, p.by_group) * d.selected.idx.head + lane);
  };
  each_token<S>(p, ahead, [&](const tile &of, int head) {
    job j = {}, also = {};
    in_pages in = {}, seen = {};
    const int kv_head = rgk_over(head, p.by_group);
    j.head = also.head = head;
    place_job<S>(d.selected.f, of, j, in);
    const chosen_blocks c = find_chosen<S>(d.selected, in.table, j);
    typename S::stages r;
    r.take(at);
    hand_out<S>(p, s.tiles.of_selected(), q_selected, j, lane == 0, begin(1, r.stage));
    /* Most of what is in both is asked for again before L2 has lost it, as long as that does not
     * make room by other blocks: to keep them pays where many are in both. */
    const int window = first_key(w, j.position);
    const bool keeps = j.position < RGK_PAIR_KEEPS * (j.position - window + 1);
    for (uint32_t left = c.left; left; left &= left - 1) {
      const int from = __ffs(left) - 1, first = __shfl_sync(~0u, c.e, from) * S::KEYS,
                page = __shfl_sync(~0u, c.page, from), row = __shfl_sync(~0u, c.row, from);
      const l2 hint = keeps && first + 64 > window ? l2::normal : l2::evict_first;
      if (lane == 0) wait_empty(t.k_empty, r), t.first[r.stage] = first;
      fetch(1, r, S::DP * PANEL, [&](char(*to)[S::DP * PANEL], const rgk_map *map, uint64_t *full) {
        if (lane < S::DP)
          tma_load(to[r.stage] + lane * PANEL, map, full, lane * 64, kv_head, row, page, hint);
      });
    }
    place_job<W>(d.window, of, also, seen);
    typename W::stages x;
    x.take(r);
    hand_out<W>(w, s.tiles.of_window(), q_window, also, lane == 0, begin(0, x.stage));
    const int half = lane % 2, panel = lane / 2;
    auto find_box = [&](int n) {
      int2 b = make_int2(0, g.count); /* row of a page, page */
      const int row = n * W::KEYS + half * 64;
      if (n < also.first) return b;
      const int m = rgk_over(row, d.window.by_rows);
      b.x = row - m * g.rows;
      if (row + 64 > seen.low && row < seen.rows) b.y = seen.table[m];
      return b;
    };
    int2 now = find_box(also.end - 1); /* pages are asked for early */
    for (int n = also.end - 1; n >= also.first; n--) {
      const int2 next = find_box(n - 1);
      fetch(0, x, 2 * W::DP * PANEL,
            [&](char(*to)[W::DP * PANEL], const rgk_map *map, uint64_t *full) {
              if (panel < W::DP)
                tma_load(to[half ? x.second() : x.stage] + panel * PANEL, map, full, panel * 64,
                         kv_head, now.x, now.y, l2::evict_first);
            });
      now = next;
    }
    at = x;
  });
  hand_out<S>(p, s.tiles.of_selected(), q_selected, job{EXIT}, lane == 0);
  hand_out<W>(w, s.tiles.of_window(), q_window, job{EXIT}, lane == 0);
}

template <class S, class W>
__global__ void __launch_bounds__(RGK_PAIR_THREADS, 1)
    pair(const __grid_constant__ rgk_decode_pair d) {
  extern __shared__ char bytes[];
  static_assert(sizeof(both<S, W>) + 1024 <= RGK_PAIR_SHARED, "fits wherever it starts");
  both<S, W> &s = *(both<S, W> *)(bytes + (-smem_at(bytes) & 1023));
  if (threadIdx.x == 0) {
    auto &t = s.tiles.slots;
    for (int i = 0; i < t.N; i++) {
      bar_init(&t.k_empty[i], 4 * WARP_ARRIVALS), bar_init(&t.v_empty[i], 4 * WARP_ARRIVALS);
      for (int kind = 0; kind < 2; kind++)
        bar_init(&t.k_full[kind][i], 1), bar_init(&t.v_full[kind][i], 1);
    }
    bar_init(&s.rows.full, WARPGROUP), bar_init(&s.rows.empty, WARPGROUP);
    init<S>(d.selected.f.f, s.tiles.of_selected());
    init<W>(d.window.f, s.tiles.of_window());
  }
  __syncthreads();
  const int part = warpgroup();
  if (part == 1) {
    summing<W> to{d, s.rows, 0};
    attend<W>(d.window, s.tiles.of_window(), to);
  } else if (part == 2) {
    giving<S> to{s.rows, 1};
    attend<S>(d.selected, s.tiles.of_selected(), to);
  } else if (threadIdx.x < 32) {
    load(d, s);
  }
}

template <class T, int D> const void *instance() {
  return (const void *)pair<setup<T, D, SELECTED, true>, setup<T, D, ALONE, true>>;
}
template <class T> const void *of_width(int32_t width) {
  return width == 128 ? instance<T, 128>() : width == 64 ? instance<T, 64>() : nullptr;
}

} // namespace

const void *rgk_decode_pair_sm90(rg_dtype type, int32_t width) {
  if (type == RG_BF16) return of_width<__nv_bfloat16>(width);
#ifndef RGK_DEV
  if (type == RG_F16) return of_width<__half>(width);
#endif
  return nullptr;
}
