/* kernels/attn/decode_pair_sm90.cu: selected blocks and a window of single tokens, and the gated
   sum of both with what other branches made (decode.h), in one launch: the bits of
   decode_attn_sm90.cu and blend.cu.

     warp        0 loads selected blocks    1, 2 K and V of the window
     warpgroup   1 attends to the window, and sums    2 to the selected blocks

   The two go their own ways from job to job. Rows of o of selected blocks are handed over in shared
   memory, as they would be stored. The window's loads follow behind: blocks that are in both are
   then still in L2, and the memory has to give them once. So it is for steps with several jobs for
   a block of threads; with fewer, separate launches are ahead, for the window's goes beside those
   that choose blocks.
 */
#include "decode_sum_sm90.cuh"

using namespace rgk;
using namespace rgk::decode;

namespace {

/* Rows of o on their way from one to the other. */
template <int E> struct rows_of {
  alignas(16) char o[HEADS * 2 * E];
  uint64_t full, empty;
  int asked; /* jobs whose selected blocks have been asked for */
};
template <class S, class W> struct both {
  memory<S> selected;
  memory<W> window;
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

/* By a warp: K (or V) of a window's tiles, each two boxes of 64 rows to a panel, a lane each.
 * ask(): before a job's first. */
template <class C, bool V, class F>
__device__ __forceinline__ void load_window(const rgk_flash_paged &d, memory<C> &s, F ask) {
  const rgk_flash_params &p = d.f;
  const int lane = threadIdx.x % 32;
  ring<C::STAGES> r;
  ring<2> q;
  each_job<C>(d, [&](const job &j, const in_pages &in) {
    const int kv_head = rgk_over(j.head, p.by_group);
    auto find_box = [&](int t) {
      int2 b = make_int2(0, d.pages.count); /* row of a page, page */
      const int row = t * C::KEYS + lane * 64;
      if (lane >= 2 || t < j.first) return b;
      const int m = rgk_over(row, d.by_rows);
      b.x = row - m * d.pages.rows;
      if (row + 64 > in.low && row < in.rows) b.y = in.table[m];
      return b;
    };
    auto fetch = [&](const int2 &b) {
      uint64_t *const full = V ? &s.v_full[r.stage] : &s.k_full[r.stage],
                      *const empty = V ? &s.v_empty[r.stage] : &s.k_empty[r.stage];
      char *const to = V ? s.v[r.stage] : s.k[r.stage];
      bar_wait(empty, r.parity ^ 1);
      if (lane == 0) bar_expect(full, C::DP * C::KV);
      __syncwarp();
      if (lane < 2)
        for (int x = 0; x < C::DP; x++)
          tma_load(to + x * C::KV + lane * C::KV / 2, V ? &p.v : &p.k, full, x * 64, kv_head, b.x,
                   b.y, l2::evict_first);
      __syncwarp();
      r.next();
    };
    int2 now = find_box(j.end - 1), next = find_box(j.end - 2); /* pages are asked for early */
    ask();
    if (!V) hand_out<C>(p, s, q, j, lane == 0);
    for (int t = j.end - 1; t >= j.first; t--) {
      const int2 later = find_box(t - 2);
      fetch(now);
      now = next, next = later;
    }
  });
  if (!V) hand_out_end<C>(p, s, q, lane == 0);
}

/* By a warp: selected blocks; those of the window are read once more. Most of that still is in L2,
 * as long as nothing is kept there by preference, which pays where many are in both. */
template <class S, class W>
__device__ __forceinline__ void load_chosen(const rgk_decode_pair &d, both<S, W> &s) {
  load_selected<S>(
      d.selected, s.selected,
      [&](const job &j, int key) {
        const int first = first_key(d.window.f, j.position);
        const bool keeps = j.position < RGK_PAIR_KEEPS * (j.position - first + 1);
        return keeps && key + 64 > first ? l2::normal : l2::evict_first;
      },
      [&] {
        if (threadIdx.x == 0) atomicAdd(&s.rows.asked, 1);
      });
}

template <class S, class W>
__global__ void __launch_bounds__(RGK_PAIR_THREADS, 1)
    pair(const __grid_constant__ rgk_decode_pair d) {
  extern __shared__ char bytes[];
  static_assert(sizeof(both<S, W>) + 1024 <= RGK_PAIR_SHARED, "fits wherever it starts");
  both<S, W> &s = *(both<S, W> *)(bytes + (-smem_at(bytes) & 1023));
  const rgk_flash_params &w = d.window.f;
  if (threadIdx.x == 0) {
    bar_init(&s.rows.full, WARPGROUP), bar_init(&s.rows.empty, WARPGROUP);
    s.rows.asked = 0;
    init<S>(d.selected.f.f, s.selected);
    init<W>(w, s.window);
  }
  __syncthreads();
  const int part = warpgroup(), warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (part == 1) {
    summing<W> to{d, s.rows, 0};
    attend<W>(d.window, s.window, to);
  } else if (part == 2) {
    giving<S> to{s.rows, 1};
    attend<S>(d.selected, s.selected, to);
  } else if (warp == 0) {
    load_chosen(d, s);
  } else if (warp < 3) {
    int jobs = 0;
    auto ask = [&] {
      jobs++;
      if (threadIdx.x % 32 == 0)
        while (atomicAdd(&s.rows.asked, 0) < jobs) __nanosleep(100);
      __syncwarp();
    };
    if (warp == 1)
      load_window<W, false>(d.window, s.window, ask);
    else
      load_window<W, true>(d.window, s.window, ask);
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
