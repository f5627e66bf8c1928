/* kernels/attn/decode_split_sm90.cu: all of a layer's attention of single tokens, and the choice of
   blocks, where a cluster of blocks of threads shares out one token's keys
   (decode_split_sm90.cuh):

     compressed keys, window        ─ all meet ─  lse; nearly the scores of blocks, each of its own
                                    ─ all meet ─  which blocks: each for itself, to the bit
     selected blocks; meanwhile what the others made is added up
                                    ─ all meet ─  selected blocks, and the gated sum

   Blocks are chosen as in decode_near_sm90.cu: nearly first, by weights put aside in bf16 (RECORD),
   then the few that can be meant by products made anew.
 */
#include "decode_choice_sm90.cuh"
#include "decode_split_sm90.cuh"
#include "decode_wide_sm90.cuh"

namespace rgk {
namespace split {
namespace {

constexpr int BLOCK = RGK_DECODE_BLOCK;
enum { ALL = EACH }; /* named barrier of all threads, as choose_wide wants one */

/* What a block's score may be off by: weights are rounded to eight bits, exponents' roundings are
 * below 2^−13; what underflows is less than TINY. */
constexpr float NEAR = 0.0022f, TINY = 1e-30f;

template <class S> struct kernel {
  using T = typename S::type;
  const rgk_decode_split &d;
  memory<S> &s;
  const room<S> r;
  const int tid, warp, lane, rank, n; /* rank of n blocks */
  sums<S> x;
  uint32_t asked, taken; /* tiles of this warp, since the beginning */

  /* ---- tiles ---- */

  /* A warp's i-th run of compressed keys, then of the window; of selected blocks, where they are
   * chosen. */
  __device__ __forceinline__ run run_at(const token &t, bool chosen, int i, keys_at &of) const {
    run r = {0, KEYS, -1};
    if (i < t.of_chunks && !chosen) {
      of = t.compressed;
      r.first = (rank + i * n) * CHUNK_ROWS + warp * KEYS, r.step = WARPS * KEYS;
      r.tiles = of.hi < r.first ? 0 : min((of.hi - r.first) / r.step + 1, TILES);
      return r;
    }
    const int group = rank + n * (warp + WARPS * (chosen ? i : i - t.of_chunks));
    if (group >= (chosen ? t.blocks : t.groups)) return r;
    of = chosen ? t.selected : t.window;
    r.first = (chosen ? s.idx[group] : t.first_group + group) * GROUP;
    r.tiles = min((of.hi - r.first) / KEYS + 1, GROUP / KEYS);
    return r;
  }

  /* All of them, asked for already by `from`. */
  template <class F> __device__ __forceinline__ void attend(const token &t, bool chosen, F &from) {
#pragma unroll 1
    for (int i = 0;; i++) {
      keys_at keys = {};
      const run of = run_at(t, chosen, i, keys);
      if (of.tiles < 0) break;
      const bool ranked = !chosen && i < t.of_chunks;
      const float c = keys.p->f.scale * LOG2E;
      x.clear();
#pragma unroll 1
      for (int k = 0; k < of.tiles; k++) {
        const int slot = taken % RING, first = of.first + k * of.step;
        bar_wait(&s.full[warp][slot], taken / RING % 2);
        taken++;
        const uint32_t read = x.add(
            smem_at(s.ring[warp][slot]), first, keys.lo, keys.hi, c, lane, [&](const float(&w)[8]) {
              if (ranked) put_record<S>(r.record + (int64_t)(first / KEYS) * HEADS, w, x.m, lane);
            });
        from.ask(asked, read);
      }
      if (ranked) {
        __syncthreads(); /* the chunk before is merged */
        x.put(s.o[warp], s.m[warp], s.l[warp], lane);
        __syncthreads();
        merge(s, r.chunk[rank + i * n]);
      } else {
        const int group = rank + n * (warp + WARPS * (chosen ? i : i - t.of_chunks));
        part<S> &to = r.near[chosen ? RGK_SPLIT_WINDOW + group : group];
        x.put(to.o, to.m, to.l, lane);
      }
    }
  }

  /* ---- the choice of blocks ---- */

  /* Nearly the scores of this block's chunks; four lanes a tile. */
  __device__ __forceinline__ void weigh(const token &t) {
    constexpr int OF = CHUNK_ROWS / KEYS, WEIGHED = 2;
    const int tiles = t.compressed.hi / KEYS + 1, h0 = tid % 4 * (HEADS / 4);
    auto tile_at = [&](int i) { return (rank + i / OF * n) * OF + i % OF; };
    for (int i = tid / 4; tile_at(i) < t.chunks * OF; i += WEIGHED * (THREADS / 4)) {
      uint4 w[WEIGHED][HEADS / 4];
#pragma unroll
      for (int u = 0; u < WEIGHED; u++)
#pragma unroll
        for (int h = 0; h < HEADS / 4; h++) {
          const int tile = tile_at(i + u * (THREADS / 4));
          w[u][h] = make_uint4(0, 0, 0, 0);
          if (tile < tiles) w[u][h] = __ldcg(r.record + (int64_t)tile * HEADS + h0 + h);
        }
#pragma unroll
      for (int u = 0; u < WEIGHED; u++) {
        const int tile = tile_at(i + u * (THREADS / 4));
        float sum[5] = {};
#pragma unroll
        for (int h = 0; h < HEADS / 4; h++) {
          const uint4 &x = w[u][h];
          const float f = exp2_fast(__uint_as_float(x.y) + s.minus[h0 + h]);
          const float2 a = unpack2<__nv_bfloat16>(x.x), b = unpack2<__nv_bfloat16>(x.z),
                       c = unpack2<__nv_bfloat16>(x.w);
          sum[0] = fmaf(a.x, f, sum[0]), sum[1] = fmaf(b.x, f, sum[1]);
          sum[2] = fmaf(a.y, f, sum[2]), sum[3] = fmaf(b.y, f, sum[3]);
          sum[4] = fmaf(c.x, f, sum[4]);
        }
        const uint32_t quad = 0xfu << (lane & 28);
#pragma unroll
        for (int k = 0; k < 5; k++) {
          sum[k] += __shfl_xor_sync(quad, sum[k], 1);
          sum[k] += __shfl_xor_sync(quad, sum[k], 2);
        }
        if (tid % 4 == 0 && tile < tiles) {
          r.score[tile] = make_float4(sum[0], sum[1], sum[2], sum[3]);
          r.first[tile] = sum[4];
        }
      }
    }
  }

  /* f(block, nearly its score) of those of [free0, free1); a thread has four that follow on each
   * other. `held`: those of its first tiles, which `ask` reads. */
  static constexpr int HELD = 2;
  __device__ __forceinline__ float4 scores_at(const token &t, int tile) const {
    const int tiles = t.chunks ? t.compressed.hi / KEYS + 1 : 0;
    float4 x = make_float4(0, 0, 0, 0);
    if (tile < tiles) x = __ldcg(r.score + tile);
    if (tile + 1 < tiles) x.w += __ldcg(r.first + tile + 1);
    return x;
  }
  template <class F>
  __device__ __forceinline__ void each_block(const token &t, const rgk_topk_choice &c,
                                             const float4 (&held)[HELD], F f) const {
    const int begin = (int)c.free0 / 4 + tid, end = (int)(c.free1 - 1) / 4 + 1;
    auto four = [&](int tile, const float4 &x) {
      const float score[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int b = 4 * tile + i;
        if (b >= c.free0 && b < c.free1) f(b, score[i]);
      }
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) four(begin + i * THREADS, held[i]);
    for (int tile = begin + HELD * THREADS; tile < end; tile += THREADS)
      four(tile, scores_at(t, tile));
  }

  /* As decode_near_sm90.cu's. */
  __device__ __forceinline__ float find_least(int top, int keep) {
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    if (tid % 2 == 0) s.top[tid / 2] = top;
    __syncthreads();
    int more = 0;
#pragma unroll
    for (int i = 0; i < PAIRS / 8; i++) {
      const int4 x = *(const int4 *)(s.top + (2 * i + tid % 2) * 4);
      more += (x.x > top) + (x.y > top) + (x.z > top) + (x.w > top);
    }
    more += __shfl_xor_sync(~0u, more, 1);
    const int least = __reduce_min_sync(~0u, more < keep ? top : INT_MAX);
    if (lane == 0) atomicMin(&s.least, least);
    __syncthreads();
    const int key = s.least;
    return __int_as_float(key < 0 ? key ^ 0x7fffffff : key);
  }

  /* By a warp: scores of two blocks, as keys, to all its lanes. */
  __device__ __forceinline__ int2 score(const token &t, int b0, int b1) const {
    const rgk_tensor &k = d.d.topk.k;
    const rgk_pages &g = d.d.f.pages;
    const int at = lane / 4, q = lane % 4;
    const T *const head =
        (const T *)k.data + (int64_t)rgk_over(t.j.head, d.d.f.f.by_group) * k.head + 2 * q;
    const T *from[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int row = BLOCK * (u ? b1 : b0) + at;
      const bool seen = at <= BLOCK && row >= t.compressed.lo && row <= t.compressed.hi;
      const int m = seen ? rgk_over(row, d.d.f.by_rows) : 0;
      const uint32_t page = seen ? (uint32_t)t.compressed.table[m] : ~0u;
      from[u] = page < (uint32_t)g.count
                    ? head + (int64_t)page * g.k_page + (row - m * g.rows) * k.row
                    : nullptr;
    }
    uint32_t b[2][S::D / 16][2];
#pragma unroll
    for (int i = 0; i < S::D / 8; i++)
#pragma unroll
      for (int u = 0; u < 2; u++)
        b[u][i / 2][i % 2] = from[u] ? *(const uint32_t *)(from[u] + 8 * i) : 0;
    float y[2][4] = {};
#pragma unroll
    for (int i = 0; i < S::D / 16; i++)
#pragma unroll
      for (int u = 0; u < 2; u++) mma<T>(y[u], x.q[i], b[u][i]);
    const float scale = d.d.topk.scale * LOG2E;
    float sum[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int key = 2 * q + i, row = BLOCK * (u ? b1 : b0) + key;
        p[i] = exp2_fast(fmaf(y[u][i], scale, s.minus[at])) +
               exp2_fast(fmaf(y[u][2 + i], scale, s.minus[at + 8]));
#pragma unroll
        for (int n = 4; n < 32; n *= 2) p[i] += __shfl_xor_sync(~0u, p[i], n);
        if (key > BLOCK || row < t.compressed.lo || row > t.compressed.hi) p[i] = 0;
      }
      sum[u] = quad_sum(q == 0 ? fmaf(2, p[1], p[0]) : q == 1 ? 2 * (p[0] + p[1]) : p[0]);
    }
    return make_int2(key_of(sum[0]), key_of(sum[1]));
  }

  /* The `keep` best of few candidates; one thread counts for each how many come before it. */
  __device__ __forceinline__ void select_few(int count, int keep) {
    if (tid < count) {
      const int mine = s.key[tid], block = s.block[tid];
      const int before = come_before(s.key, s.block, count, mine, block);
      if (before < keep) s.chosen[before] = make_int2(mine, block);
    }
    __syncthreads();
  }

  /* Sum over all threads. */
  __device__ __forceinline__ int sum_all(int x, int &turn) {
    turn ^= 1;
    x = __reduce_add_sync(~0u, x);
    if (lane == 0) s.sums[turn][warp] = x;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += s.sums[turn][w];
    return all;
  }
  /* The same of any number, by bisection. */
  __device__ __forceinline__ void select(const int *keys, int count, int keep, int first) {
    int turn = 0;
    auto from = [&](int least) {
      int m = 0;
      for (int i = tid; i < count; i += THREADS) m += __ldcg(keys + i) >= least;
      return sum_all(m, turn);
    };
    int lo = NAN_KEY, reach = count, last = count;
    int64_t hi = (int64_t)INT_MAX + 1;
    while (reach != keep && hi - lo > 1) {
      const int middle = (int)(lo + (hi - lo) / 2), m = from(middle);
      if (m >= keep)
        lo = middle, reach = m;
      else
        hi = middle;
    }
    if (reach > keep) { /* of those equal to lo, the first ones */
      const int ties = keep - (hi > INT_MAX ? 0 : from((int)hi));
      int below = -1;
      last = count - 1;
      while (last - below > 1) {
        const int middle = below + (last - below) / 2;
        int m = 0;
        for (int i = tid; i <= middle; i += THREADS) m += __ldcg(keys + i) == lo;
        if (sum_all(m, turn) >= ties)
          last = middle;
        else
          below = middle;
      }
    }
    if (tid == 0) s.count = 0;
    __syncthreads();
    for (int i = tid; i < count; i += THREADS) {
      const int key = __ldcg(keys + i);
      if (key > lo || (key == lo && i <= last))
        s.chosen[atomicAdd(&s.count, 1)] = make_int2(key, first + i);
    }
    __syncthreads();
  }

  /* By a warp: s.idx. True: fp32 does not decide. */
  __device__ __forceinline__ bool list(const rgk_topk_choice &c, bool ranks, bool seen) {
    int e = -1;
    if (!ranks) {
      const int64_t b = lane < c.free0 || c.keep > 0 ? lane : lane - c.free0 + c.free1;
      if (b < c.count) e = (int)b;
    } else {
      const int keep = (int)c.keep;
      const int2 mine = lane < keep ? s.chosen[lane] : make_int2(INT_MAX, INT_MAX);
      int place = (int)c.free0;
      for (int i = 0; i < keep; i++) place += __shfl_sync(~0u, mine.y, i) < mine.y;
      const int least = __reduce_min_sync(~0u, mine.x);
      if (seen && least != NAN_KEY && undecided(__int_as_float(least))) return true;
      const int after = (int)c.free0 + keep;
      const int64_t b = lane < c.free0 ? lane : c.free1 + lane - after;
      if ((lane < c.free0 || lane >= after) && b < c.count) e = (int)b;
      __syncwarp();
      if (lane < c.free0 || lane >= after) s.idx[lane] = e;
      if (lane < keep) s.idx[place] = mine.y;
      __syncwarp();
      return false;
    }
    s.idx[lane] = e;
    __syncwarp();
    return false;
  }

  __device__ __forceinline__ void choose(const token &t, const rgk_topk_choice &c, bool ranks) {
    const int keep = (int)c.keep, first = (int)c.free0, all = (int)c.free1 - first;
    const bool seen = t.chunks > 0;
    if (ranks) {
      int top = LEAST_KEY;
      float4 held[HELD];
#pragma unroll
      for (int i = 0; i < HELD; i++) held[i] = scores_at(t, first / 4 + tid + i * THREADS);
      each_block(t, c, held,
                 [&](int, float score) { top = max(top, key_of(fmaf(score, 1 - NEAR, -TINY))); });
      const float least = find_least(top, keep);
      each_block(t, c, held, [&](int b, float score) {
        if (fmaf(score, 1 + NEAR, TINY) < least && least < INFINITY) return;
        const int i = atomicAdd(&s.count, 1);
        if (i < CANDIDATES) s.block[i] = b;
      });
      __syncthreads();
      const int count = s.count;
      if (count <= CANDIDATES) {
        if (tid < 4) s.key[count + tid] = LEAST_KEY;
        for (int i = 2 * warp; i < count; i += 2 * WARPS) {
          const int2 key = score(t, s.block[i], s.block[min(i + 1, count - 1)]);
          if (lane == 0) s.key[i] = key.x;
          if (lane == 1 && i + 1 < count) s.key[i + 1] = key.y;
        }
        __syncthreads();
        select_few(count, keep);
      } else { /* all, shared out */
        int *const keys = (int *)r.entry;
        for (int i = 2 * (rank + n * warp); i < all; i += 2 * n * WARPS) {
          const int2 key = score(t, first + i, first + min(i + 1, all - 1));
          if (lane == 0) keys[i] = key.x;
          if (lane == 1 && i + 1 < all) keys[i + 1] = key.y;
        }
        cluster_sync();
        select(keys, all, keep, first);
      }
    }
    if (warp == 0) {
      const bool late = list(c, ranks, seen);
      if (lane == 0) s.late = late;
    }
    __syncthreads();
    if (s.late) {     /* all blocks of the cluster find so */
      cluster_sync(); /* keys have been read */
      if (rank == 0) {
        choose_wide<T, THREADS>(d.d, &t.j, &c, t.compressed.hi + 1, r.entry, s.wide, s.chosen, ALL);
        if (tid < keep) r.entry[tid] = (unsigned)s.chosen[tid].y;
      }
      cluster_sync();
      if (tid < keep) s.chosen[tid] = make_int2(0, (int)__ldcg(r.entry + tid));
      __syncthreads();
      if (warp == 0) list(c, ranks, false);
      __syncthreads();
    }
    if (rank == 0 && tid < d.d.topk.top_n) idx_of(d.d, t.j)[tid] = s.idx[tid];
  }

  /* ---- a token ---- */

  __device__ __forceinline__ void dead(const job &j) {
    if (rank) return;
    const rgk_flash_params &p = d.d.f.f;
    auto clear = [&](const rgk_tensor &o) {
      for (int i = tid; i < S::PIECES && o.data; i += THREADS)
        *(uint2 *)((T *)o.data + (int64_t)j.token * o.row + (j.head + i / (S::D / 4)) * o.head +
                   i % (S::D / 4) * 4) = make_uint2(0, 0);
    };
    clear(p.o), clear(d.pair.window.f.o);
    if (tid < HEADS && p.lse.data)
      ((float *)p.lse.data)[(int64_t)j.token * p.lse.row + (j.head + tid) * p.lse.head] = 0;
    if (tid < d.d.topk.top_n) idx_of(d.d, j)[tid] = 0;
  }

  __device__ __forceinline__ void all_of(const tile &of, int head) {
    using C = typename S::place;
    const rgk_flash_params &p = d.d.f.f;
    token t = {};
    job w = {};
    in_pages at = {};
    t.j.head = w.head = head;
    place_job<C>(d.d.f, of, t.j, at);
    if (t.j.kind == DEAD_ROWS) return dead(t.j);
    const bool any = t.j.first < t.j.end;
    t.compressed = {&d.d.f, at.table, p.before, any ? last_key(p, t.j.keys, t.j.position) : -1};
    t.chunks = any ? t.compressed.hi / CHUNK_ROWS + 1 : 0;
    t.of_chunks = t.chunks > rank ? (t.chunks - rank + n - 1) / n : 0;
    place_job<C>(d.pair.window, of, w, at);
    t.window = t.selected = {&d.pair.window, at.table, 0, min(w.position, w.keys - 1)};
    t.window.lo = first_key(d.pair.window.f, w.position);
    t.first_group = t.window.lo / GROUP;
    t.groups = w.first < w.end ? t.window.hi / GROUP + 1 - t.first_group : 0;

    if (tid < HEADS) { /* while keys come */
      float w[RGK_PAIR_BRANCHES] = {};
      gate_weights(d.pair, t.j.token, head + tid, w);
      s.weight[tid] = make_float4(w[0], w[1], w[2], w[3]);
    }
    x.load_q(d.d.topk.q, t.j, lane);
    const int first = rank * S::PIECES / n + tid, end = (rank + 1) * S::PIECES / n;
    uint2 of_compressed[S::ROUNDS] = {}, of_window[S::ROUNDS] = {};
#pragma unroll 1 /* the loop over tiles has one code */
    for (int chosen = 0; chosen < 2; chosen++) {
      auto runs = [&](int i, keys_at &of) { return run_at(t, chosen, i, of); };
      feed<S, decltype(runs)> from(s, warp, lane, rgk_over(head, p.by_group), runs);
      for (int i = 0; i < RING; i++) from.ask(asked, 0);
      if (chosen) /* meanwhile */
#pragma unroll
        for (int i = 0; i < S::ROUNDS; i++) {
          const int piece = first + i * THREADS;
          if (piece >= end) continue;
          of_compressed[i] = add_up(r.chunk, t.chunks, p, head, piece);
          of_window[i] = add_up(r.near, t.groups, d.pair.window.f, head, piece);
          *(uint2 *)((T *)p.o.data + (int64_t)t.j.token * p.o.row +
                     (head + piece / (S::D / 4)) * p.o.head + piece % (S::D / 4) * 4) =
              of_compressed[i];
        }
      attend(t, chosen, from);
      if (chosen) break;
      cluster_sync();
      const float lse = find_lse(r.chunk, t.chunks, sink_of(p, head + tid / 16));
      if (tid % 16 == 0) {
        s.minus[tid / 16] = -LOG2E * lse;
        if (rank == 0 && p.lse.data)
          ((float *)p.lse.data)[(int64_t)t.j.token * p.lse.row + (head + tid / 16) * p.lse.head] =
              lse;
      }
      if (tid == 0) s.count = 0, s.least = INT_MAX;
      __syncthreads();
      const rgk_topk_choice c = choice_of(d.d.topk, t.j.position);
      const bool ranks = rgk_topk_ranks(c);
      if (ranks) {
        weigh(t);
        cluster_sync();
      }
      choose(t, c, ranks);
      t.blocks = __popc(__ballot_sync(~0u, lane < d.d.topk.top_n && s.idx[lane] >= 0 &&
                                               s.idx[lane] * GROUP <= t.selected.hi));
    }
    cluster_sync();
#pragma unroll
    for (int i = 0; i < S::ROUNDS; i++) {
      const int piece = first + i * THREADS;
      if (piece < end)
        put_sum<S>(d.pair, s.weight[piece / (S::D / 4)], t.j, piece, p.o.data, of_compressed[i],
                   of_window[i],
                   add_up(r.near + RGK_SPLIT_WINDOW, t.blocks, d.pair.selected.f.f, head, piece));
    }
  }
};

template <class S>
__global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ rgk_decode_split d) {
  extern __shared__ char bytes[];
  static_assert(sizeof(part<S>) == RGK_SPLIT_PART(S::D), "as the host counts");
  static_assert(sizeof(memory<S>) + 1024 <= RGK_SPLIT_SHARED(S::D), "fits wherever it starts");
  static_assert(RGK_SPLIT_SHARED(S::D) <= 227 * 1024, "fits");
  memory<S> &s = *(memory<S> *)(bytes + (-smem_at(bytes) & 1023));
  const rgk_flash_params &p = d.d.f.f;
  if (threadIdx.x == 0) {
    for (int i = 0; i < WARPS * RING; i++) bar_init(&s.full[i / RING][i % RING], 1);
    bar_init_done();
    map_prefetch(&p.k), map_prefetch(&p.v);
    map_prefetch(&d.pair.window.f.k), map_prefetch(&d.pair.window.f.v);
  }
  __syncthreads();
  const int tid = threadIdx.x, cluster = blockIdx.x / d.blocks, clusters = gridDim.x / d.blocks,
            heads = p.H >> p.pack, jobs = p.slots * heads;
  kernel<S> k{d,
              s,
              room<S>(d, cluster),
              tid,
              __shfl_sync(~0u, tid / 32, 0),
              tid % 32,
              (int)(blockIdx.x % d.blocks),
              d.blocks,
              {},
              0,
              0};
  for (int i = cluster; i < jobs; i += clusters) {
    const int slot = rgk_over(i, p.by_heads), row = p.slots - 1 - slot,
              b = find_seq_warp(p.seqs, row);
    k.all_of(tile_at(p.seqs, b, (int64_t)row + b, 1), (i - slot * heads) << p.pack);
    cluster_sync(); /* what was put aside has been read */
  }
}

} // namespace
} // namespace split
} // namespace rgk

const void *rgk_decode_split_sm90(rg_dtype type, int32_t width) {
  using namespace rgk::split;
#define GET(t, D) \
  if (type == t && width == D) return (const void *)attend<sizes<rgk::element<t>::type, D>>;
  GET(RG_BF16, 128)
  GET(RG_BF16, 64)
#ifndef RGK_DEV
  GET(RG_F16, 128)
  GET(RG_F16, 64)
#endif
  return nullptr;
}
