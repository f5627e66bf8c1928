/* kernels/attn/decode_sm90.cuh: attention of single tokens over pages on Hopper, see decode.h.

   A job is one token of one KV head, 16 heads. To the bit it is flash_fwd_sm90.cuh's, or, over
   selected blocks, gather_fwd_sm90.cu's, but the products are transposed, so that keys fill the 64
   rows of a tensor core tile which 16 heads leave empty:

       sᵀ = k qᵀ   [key, head]      oᵀ += vᵀ pᵀ   [feature, head]

   A thread holds four heads of four keys of a tile of 128, of two of a selected block. What runs
   over keys in those kernels runs over lanes, warps and shared memory here: the reference m is a
   maximum, which has no order; the sum of weights has one, which 64 threads follow, a tile behind
   (`sums`: what a thread there adds up before it adds to the row's sum comes added up).

   m seldom moves after the first tiles, so a tile's weights are made with m as it is, and the
   barrier that says that they are there tells besides whether m had to move (GUESS). Only then are
   the largest products found and weights made anew: one barrier a tile, not two, and no way through
   shuffles and shared memory between a tile's products and its weights.

     warpgroup   0 loads    1 attends    2, 3 rank, where blocks are chosen (decode_sm90.cu)
                                         2 sums up weights of blocks, 3 ranks, where they are chosen
                                         nearly first (decode_near_sm90.cu)

   Twins: where tokens are few, two blocks of threads of a cluster share one, for the copy engine of
   a multiprocessor takes its time with boxes of eight rows. The first has keys: it makes weights, a
   tile at a time, ranks, and finds what o must be multiplied by. The second has values, and o.
   Weights cross by a bulk copy, with what o must be multiplied by first: the same sums in the same
   order.
 */
#pragma once
#include "decode_load_sm90.cuh"

namespace rgk {
namespace decode {

/* ---- attend: a warpgroup ---- */

/* Has a phase ended? Asked early by a warp, for the answer takes its time, and looked at by
 * has_ended; bar_wait comes where the answer was no. */
__device__ __forceinline__ uint32_t ask_ended(uint64_t *bar, uint32_t parity) {
  uint32_t ok;
  asm volatile("{\n\t.reg .pred p;\n\t"
               "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
               "selp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(ok)
               : "r"(smem_at(bar)), "r"(parity)
               : "memory");
  return ok;
}
__device__ __forceinline__ bool has_ended(uint32_t asked) {
  return __all_sync(~0u, asked); /* ptxas is to know that it is the same for all of a warp */
}

/* Of 16 rows of o, head by head, where eight values are: number i of them all. */
template <class C> __device__ __forceinline__ int unit_at(int i) {
  const int head = i / (C::E / 8), unit = i % (C::E / 8);
  return head * 2 * C::E + (unit ^ (head & 7)) * 16;
}

/* x[u][4i + 2y + z]: key 64u + 16 warp + lane/4 + 8y of the tile, head 8i + 2(lane % 4) + z. */
template <class C>
__device__ __forceinline__ void start_scores(float (&x)[C::HALVES][8], uint32_t k, uint32_t q) {
  using T = typename C::tile;
  /* Made once: each anew is seven instructions, one waiting for the other. */
  const uint64_t a = desc_make(k, 16, T::K_EIGHT), b = desc_k(q);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::D / 16; i++)
#pragma unroll
    for (int u = 0; u < C::HALVES; u++)
      wgmma<typename C::type, 16>::template ss<>(
          x[u], desc_on(a, u * 8 * T::K_EIGHT + i / 4 * T::K_PANEL + i % 4 * 32),
          desc_on(b, i / 4 * ROWS16 + i % 4 * 32), i > 0);
  wgmma_commit();
}
/* o[m][4i + 2y + z]: feature 64m + 16 warp + lane/4 + 8y, the same head. */
template <class C>
__device__ __forceinline__ void start_values(float (&o)[C::EP][8], uint32_t v, uint32_t p) {
  using T = typename C::tile;
  const uint64_t a = desc_make(v, T::V_PANEL, T::V_EIGHT), b = desc_k(p);
  /* Else the compiler has o in integers until here, and moves it behind the fence. */
#pragma unroll
  for (int m = 0; m < C::EP; m++) wgmma_keep(o[m]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < C::KEYS / 16; i++)
#pragma unroll
    for (int m = 0; m < C::EP; m++)
      wgmma<typename C::type, 16>::template ss<true>(
          o[m], desc_on(a, m * T::V_PANEL + 2 * i * T::V_EIGHT),
          desc_on(b, i / 4 * ROWS16 + i % 4 * 32), 1);
  wgmma_commit();
}

/* Eight of a thread's values, of 16 rows of the warp's from unit `unit` of eight on, to where head
 * by head `row` bytes are, whose units of a panel are swizzled. */
template <class T>
__device__ __forceinline__ void store_heads(uint32_t at, int row, int unit, const float *x) {
  const int lane = threadIdx.x % 32, head = lane / 16 * 8 + lane % 8;
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  store_transposed(at + head * row + ((unit + lane / 8 % 2) ^ (head & 7)) * 16, w);
}

/* Where o goes, which is in `room` head by head (store_heads). */
template <class C> struct to_memory {
  static constexpr bool GIVES = false; /* its room to others, who do the rest */
  __device__ __forceinline__ void write(const rgk_flash_params &p, const job &j, const char *room,
                                        int tid) const {
#pragma unroll
    for (int i = tid; i < HEADS * C::E / 8; i += WARPGROUP) {
      const int head = i / (C::E / 8), unit = i % (C::E / 8);
      *(uint4 *)((typename C::type *)p.o.data + (int64_t)j.token * p.o.row +
                 (j.head + head) * p.o.head + unit * 8) = *(const uint4 *)(room + unit_at<C>(i));
    }
  }
};

template <class C, class P, class X> struct attention {
  using T = typename C::type;
  static constexpr kind KIND = C::KIND;
  const P &d;
  memory<C> &s;
  const int tid, warp, lane, g, t;
  const float c;
  X &to;
  static constexpr bool NEAR = C::NEAR, ASIDE = KIND == RANKED && !NEAR;
  typename C::stages k, v;
  int turn;              /* of p */
  uint32_t taken, ended; /* parities; ended: of end_full or end_empty */
  ring<2> w, r;          /* NEAR: next weights, next token to rank */

  /* ptxas takes it for what each thread has for itself, and moves every descriptor over. */
  __device__ __forceinline__ static int known(int x) {
    return C::NEAR || C::LAYER ? __shfl_sync(~0u, x, 0) : x;
  }

  __device__ __forceinline__ void wait_taken() {
    if (!ASIDE) return;
    bar_wait(&s.taken, taken);
    taken ^= 1;
  }

  __device__ __forceinline__ void products(const float (&x)[C::HALVES][8], const job &j,
                                           int tile) const {
    if constexpr (ASIDE) {
      const aside room = aside_of<C>(d, s, j);
      float *const to = room.at + 2 * t * room.pitch + tile * C::KEYS + 16 * warp + g;
#pragma unroll
      for (int i = 0; i < 8 * C::HALVES; i++) {
        const int head = i / 4 % 2 * 8 + i % 2;
        to[head * room.pitch + i / 8 * 64 + i / 2 % 2 * 8] = x[i / 8][i % 8];
      }
    }
  }

  /* A copy that ptxas does not take for the accumulators, which the next products want. */
  __device__ __forceinline__ void keep(float (&to)[C::HALVES][8],
                                       const float (&x)[C::HALVES][8]) const {
    if constexpr (ASIDE)
#pragma unroll
      for (int n = 0; n < 8 * C::HALVES; n++)
        asm volatile("mov.b32 %0, %1;" : "=f"(to[n / 8][n % 8]) : "f"(x[n / 8][n % 8]));
  }

  /* What a tile whose weights are in p[turn] adds to the sum of weights. */
  struct added {
    float sum[C::SUMS];
    float2 reference;
  };
  __device__ __forceinline__ int sums_at() const {
    return C::GUESS ? turn : 0;
  }
  /* By all: half of them for nothing, but without a branch, so that it goes on beside products. */
  __device__ __forceinline__ added take_sums() const {
    added a;
    const int i = tid % (4 * HEADS);
    a.reference = s.reference[sums_at()][i / 4];
#pragma unroll
    for (int n = 0; n < C::SUMS; n++) a.sum[n] = s.sums[sums_at()][n][i];
    return a;
  }
  /* Adds up a tile's weights in the other kernel's order: thread 4h + i does what the threads that
   * have head h's columns 2i and 2i + 1 of every eight do there, and rounds where the compiler has
   * them round. */
  __device__ __forceinline__ void add_up(float &l, float &m, const added &a) const {
    m = a.reference.x;
    if constexpr (KIND == SELECTED)
      l = __fadd_rn(__fmul_rn(l, a.reference.y), a.sum[0]);
    else
      l = fmaf(l, a.reference.y, a.sum[0]);
#pragma unroll
    for (int i = 1; i < C::SUMS; i++) l += a.sum[i];
  }

  /* What add_up adds, of weights x. */
  __device__ __forceinline__ void put_sums(const float (&x)[C::HALVES][8]) const {
    auto &sums = s.sums[sums_at()];
    /* Of two neighbours each adds up half: the rows y = g & 1. */
    const int odd = g & 1;
#pragma unroll
    for (int i = 0; i < 4 * C::HALVES; i++) {
      const int u = i / 4, at = i / 2 % 2 * 4 + i % 2, head = i / 2 % 2 * 8 + 2 * t + i % 2;
      const float mine = odd ? x[u][at + 2] : x[u][at], other = odd ? x[u][at] : x[u][at + 2];
      const float pair = mine + __shfl_xor_sync(~0u, other, 4);
      if constexpr (KIND == SELECTED) {
        const float both = pair + __shfl_xor_sync(~0u, pair, 4);
        if (!odd) sums[warp][4 * head + g / 2] = both;
      } else {
        sums[8 * u + 2 * warp + odd][4 * head + g / 2] = pair;
      }
    }
  }

  /* Of products x keys [lo, hi] of the tile are seen. */
  __device__ __forceinline__ void hide(float (&x)[C::HALVES][8], int lo, int hi) const {
    if (lo > 0 || hi < C::KEYS - 1) {
#pragma unroll
      for (int i = 0; i < 8 * C::HALVES; i++) {
        const int at = i / 8 * 64 + 16 * warp + g + i / 2 % 2 * 8;
        if (at < lo || at > hi) x[i / 8][i % 8] = -INFINITY;
      }
    }
  }
  /* A thread's largest products. */
  __device__ __forceinline__ void find_tops(const float (&x)[C::HALVES][8], float (&top)[4]) const {
#pragma unroll
    for (int h = 0; h < 4; h++) {
      const int i = h / 2 * 4 + h % 2;
      top[h] = fmaxf(x[0][i], x[0][i + 2]);
      if constexpr (C::HALVES == 2) top[h] = fmaxf(top[h], fmaxf(x[1][i], x[1][i + 2]));
    }
  }
  __device__ __forceinline__ bool moves(float top, float m) const {
    return (top - m) * c > LAZY; /* −inf − −inf: no */
  }
  /* Would one of this thread's products move a reference, if it were its head's largest? c is
   * positive, so (top − m) c does not fall as top grows, rounded as it is, and what is no number is
   * no largest either: a reference moves if and only if some thread's would. */
  __device__ __forceinline__ bool may_move(const float (&x)[C::HALVES][8],
                                           const float (&m)[4]) const {
    float top[4];
    find_tops(x, top);
    return moves(top[0], m[0]) | moves(top[1], m[1]) | moves(top[2], m[2]) | moves(top[3], m[3]);
  }
  /* Where references are for products x, and what sums so far must be multiplied by. */
  __device__ __forceinline__ void move(const float (&x)[C::HALVES][8], float (&m)[4],
                                       float (&scale)[4]) const {
    float top[4];
    find_tops(x, top);
#pragma unroll
    for (int n = 4; n < 32; n *= 2)
#pragma unroll
      for (int h = 0; h < 4; h++) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], n));
    if (g == 0)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float2 *)&s.top[warp][8 * i + 2 * t] = make_float2(top[2 * i], top[2 * i + 1]);
    named_sync(EACH + C::GROUP, WARPGROUP);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float2 a = *(const float2 *)&s.top[0][8 * i + 2 * t];
#pragma unroll
      for (int w = 1; w < 4; w++) {
        const float2 b = *(const float2 *)&s.top[w][8 * i + 2 * t];
        a.x = fmaxf(a.x, b.x), a.y = fmaxf(a.y, b.y);
      }
      top[2 * i] = a.x, top[2 * i + 1] = a.y;
    }
#pragma unroll
    for (int h = 0; h < 4; h++) {
      const bool up = moves(top[h], m[h]);
      scale[h] = up ? exp2_fast((m[h] - top[h]) * c) : 1;
      m[h] = up ? top[h] : m[h];
    }
  }

  /* p and its slot are empty. */
  __device__ __forceinline__ void wait_room(uint32_t there) const {
    if (C::TWINS && !has_ended(there)) bar_wait(&s.v_empty[v.stage], v.parity ^ 1);
    if constexpr (NEAR)
      if (!has_ended(there)) bar_wait(&s.p_empty[w.stage], w.parity ^ 1);
  }
  __device__ __forceinline__ uint32_t ask_room() const {
    if (C::TWINS) return ask_ended(&s.v_empty[v.stage], v.parity ^ 1);
    if constexpr (NEAR) return ask_ended(&s.p_empty[w.stage], w.parity ^ 1);
    return 1;
  }

  /* Weights of products x above references m, in p[turn]; what o must be multiplied by. `at`: as in
   * weighed. */
  __device__ __forceinline__ void weigh(const float (&x)[C::HALVES][8], const float (&m)[4],
                                        const float (&scale)[4], int at) const {
    float minus[4], e[C::HALVES][8];
    char *const slot = C::TWINS ? slot_of<C>(s, v.stage) : nullptr;
#pragma unroll
    for (int h = 0; h < 4; h++) minus[h] = m[h] == -INFINITY ? 0 : -m[h] * c;
    if (warp == 0 && g == 0)
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int head = h / 2 * 8 + 2 * t + h % 2;
        s.reference[sums_at()][head] = make_float2(m[h], scale[h]);
        if constexpr (NEAR)
          s.slot[w.stage].reference[head] =
              make_float2(m[h] == -INFINITY ? -INFINITY : -minus[h], scale[h]);
        if (C::TWINS) ((float *)(slot + 2 * ROWS16))[head] = scale[h];
      }
    if constexpr (NEAR)
      if (tid == 0) s.slot[w.stage].at = at;
#pragma unroll
    for (int i = 0; i < 8 * C::HALVES; i++)
      e[i / 8][i % 8] = exp2_fast(fmaf(x[i / 8][i % 8], c, minus[i / 4 % 2 * 2 + i % 2]));
    put_sums(e);
#pragma unroll
    for (int u = 0; u < C::HALVES; u++)
      store_heads<T>(smem_at(C::TWINS ? slot : s.p[turn]) + u * ROWS16, 128, 2 * warp, e[u]);
    proxy_fence();
  }

  /* Twins: the tile's weights are in their slot, all warps know. */
  __device__ __forceinline__ void send_weights() {
    char *const slot = slot_of<C>(s, v.stage);
    if (tid == 0) send(slot, &s.k_full[v.stage], slot, SENT);
    __syncwarp();
    v.next();
  }

  __device__ __forceinline__ void values_done(float (&o)[C::EP][8]) {
    const waited added = wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < C::EP; i++) wgmma_keep(o[i]);
    warp_release(&s.v_empty[v.stage], added);
    v.next();
  }

  /* All tiles of a job: sums in o, and of 64 threads a share of the sum of weights and m. */
  __device__ __forceinline__ void run_tiles(const job &j, uint32_t q, uint64_t *q_empty,
                                            float (&o)[C::EP][8], float &l, float &reference) {
    const rgk_flash_params &p = paged_of(d).f;
    const int lo = KIND == SELECTED ? 0 : first_key(p, j.position),
              hi = KIND == SELECTED ? min(j.position, j.keys - 1) : last_key(p, j.keys, j.position);
    waited scored = waited::for_nothing();
    float m[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    int key = 0;                       /* first of the tile whose weights are in p */
    uint32_t k_there = 0, v_there = 0; /* asked a step before */
    auto ask = [&]() {
      k_there = ask_ended(&s.k_full[k.stage], k.parity);
      if (!C::TWINS) v_there = ask_ended(&s.v_full[v.stage], v.parity);
    };
    auto start_added = [&]() {
      if (!has_ended(v_there)) bar_wait(&s.v_full[v.stage], v.parity);
      if (KIND != SELECTED && key < p.before)
        clear_keys<C, C::BOXES>(v_of<C>(s, v.stage), 0, min(p.before - key, (int)C::KEYS),
                                C::GROUP);
      if (key + C::KEYS > j.keys)
        clear_keys<C, C::BOXES>(v_of<C>(s, v.stage), j.keys - key, C::KEYS, C::GROUP);
      start_values<C>(o, smem_at(v_of<C>(s, known(v.stage))), smem_at(s.p[known(turn)]));
    };
    auto step = [&](auto first, int i) {
      constexpr bool FIRST = decltype(first)::value;
      float x[C::HALVES][8], scale[4] = {1, 1, 1, 1};
      added sums;
      if (!FIRST) sums = take_sums();
      if (!has_ended(k_there)) bar_wait(&s.k_full[k.stage], k.parity);
      int at = (j.end - 1 - i) * C::KEYS;
      if constexpr (KIND == SELECTED) {
        if (lane == 0) at = s.first[k.stage]; /* read by the lane that gives back */
        at = __shfl_sync(~0u, at, 0);
      }
      start_scores<C>(x, smem_at(s.k[known(k.stage)]), q);
      uint32_t room;
      if constexpr (FIRST) {
        wait_taken();
        room = ask_room();
        scored = wgmma_wait<0>();
      } else {
        if (!C::TWINS) start_added();
        room = ask_room();
        add_up(l, reference, sums);
        scored = wgmma_wait<!C::TWINS>();
      }
#pragma unroll
      for (int u = 0; u < C::HALVES; u++) wgmma_keep(x[u]);
      if constexpr (FIRST)
        warp_release(&s.k_empty[k.stage], scored, at);
      else
        warp_release(&s.k_empty[k.stage], scored, at, l, reference);
      k.next();
      key = at;
      /* A fence waits for stores in front of it, so they come later; not where weights are sent by
       * then (measured). */
      float kept[C::HALVES][8];
      if (C::TWINS)
        products(x, j, key / C::KEYS);
      else
        keep(kept, x);
      const int tile = j.end - 1 - i, number = 2 * tile + (tile == j.first);
      hide(x, lo - key, hi - key);
      wait_room(room);
      turn = NEAR ? w.stage : turn ^ 1;
      bool moved = true;
      if constexpr (C::GUESS && !FIRST) { /* that references stay: nearly always so */
        const bool mine = __any_sync(~0u, may_move(x, m));
        if (lane == 0) s.moved[turn][warp] = mine;
        weigh(x, m, scale, number);
        if (!C::TWINS) values_done(o);
        ask();
        named_sync(EACH + C::GROUP, WARPGROUP);
        const int4 all = *(const int4 *)s.moved[turn];
        moved = __any_sync(~0u, all.x | all.y | all.z | all.w); /* as in has_ended */
      }
      if (moved) {
        move(x, m, scale);
        weigh(x, m, scale, number);
        if constexpr (!C::TWINS && !FIRST) {
          if (!C::GUESS) values_done(o);
          if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1 || scale[2] != 1 || scale[3] != 1))
#pragma unroll
            for (int n = 0; n < 8 * C::EP; n++) o[n / 8][n % 8] *= scale[n / 4 % 2 * 2 + n % 2];
        }
        if (FIRST || !C::GUESS) ask();
        named_sync(EACH + C::GROUP, WARPGROUP);
      }
      if constexpr (NEAR) {
        warp_ready(&s.p_full[w.stage]);
        w.next();
      }
      if (C::TWINS)
        send_weights();
      else
        products(kept, j, key / C::KEYS);
    };
    step(std::true_type{}, 0);
    for (int i = 1; i < j.end - j.first; i++) step(std::false_type{}, i);
    bar_release(q_empty, scored, j.head, j.keys);
    const added sums = take_sums();
    if (!C::TWINS) start_added();
    add_up(l, reference, sums);
    if (!C::TWINS) values_done(o);
  }

  /* The second's: weights come, o grows. */
  __device__ __forceinline__ void add_values(const job &j, float (&o)[C::EP][8]) {
    const rgk_flash_params &p = paged_of(d).f;
    for (int i = j.end - 1; i >= j.first; i--) {
      const int key = i * C::KEYS;
      const char *const slot = slot_of<C>(s, v.stage);
      bar_wait(&s.k_full[v.stage], v.parity);
      float scale[4];
#pragma unroll
      for (int h = 0; h < 4; h++)
        scale[h] = ((const float *)(slot + 2 * ROWS16))[h / 2 * 8 + 2 * t + h % 2];
      if (__any_sync(~0u, scale[0] != 1 || scale[1] != 1 || scale[2] != 1 || scale[3] != 1))
#pragma unroll
        for (int n = 0; n < 8 * C::EP; n++) o[n / 8][n % 8] *= scale[n / 4 % 2 * 2 + n % 2];
      bar_wait(&s.v_full[v.stage], v.parity);
      if (key < p.before)
        clear_keys<C, C::BOXES>(v_of<C>(s, v.stage), 0, min(p.before - key, (int)C::KEYS),
                                C::GROUP);
      if (key + C::KEYS > j.keys)
        clear_keys<C, C::BOXES>(v_of<C>(s, v.stage), j.keys - key, C::KEYS, C::GROUP);
      start_values<C>(o, smem_at(v_of<C>(s, v.stage)), smem_at(slot));
      const waited added = wgmma_wait<0>();
#pragma unroll
      for (int n = 0; n < C::EP; n++) wgmma_keep(o[n]);
      give_first(&s.v_empty[v.stage], added, scale[0], scale[1], scale[2], scale[3]);
      warp_release(&s.v_empty[v.stage], added, scale[0], scale[1], scale[2], scale[3]);
      v.next();
    }
  }

  /* What o must be multiplied by goes to the second. By all, `end` written. */
  __device__ __forceinline__ void send_end() {
    proxy_fence();
    named_sync(EACH + C::GROUP, WARPGROUP);
    if (tid == 0) send((char *)s.end, &s.end_full, (const char *)s.end, sizeof s.end);
    __syncwarp();
  }

  __device__ __forceinline__ void run_second(const job &j, uint64_t *q_empty) {
    const rgk_flash_params &p = paged_of(d).f;
    float o[C::EP][8], end[4];
    if (tid == 0) bar_expect(&s.end_full, sizeof s.end);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8 * C::EP; i++) o[i / 8][i % 8] = 0;
    add_values(j, o);
    bar_release(q_empty, j.head, j.keys);
    bar_wait(&s.end_full, ended);
    ended ^= 1;
#pragma unroll
    for (int h = 0; h < 4; h++) end[h] = s.end[h / 2 * 8 + 2 * t + h % 2];
    give_first(&s.end_empty, waited::for_nothing(), end[0], end[1], end[2], end[3]);
    char *const room = s.p[0];
    store_o(o, end, room);
    named_sync(EACH + C::GROUP, WARPGROUP);
    to.write(p, j, room, tid);
    named_sync(EACH + C::GROUP, WARPGROUP); /* the next job's rows go there too */
  }

  __device__ __forceinline__ void store_o(float (&o)[C::EP][8], const float (&end)[4],
                                          char *room) const {
#pragma unroll
    for (int x = 0; x < C::EP; x++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float f = end[i / 4 * 2 + i % 2];
        o[x][i] = f == 0 ? 0 : o[x][i] * f;
      }
      store_heads<T>(smem_at(room), 2 * C::E, 8 * x + 2 * warp, o[x]);
    }
  }

  __device__ __forceinline__ void run_job(const job &j, uint32_t q, uint64_t *q_empty) {
    const rgk_flash_params &p = paged_of(d).f;
    float o[C::EP][8], l = 0, reference = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8 * C::EP; i++) o[i / 8][i % 8] = 0;
    if (j.first < j.end) {
      run_tiles(j, q, q_empty, o, l, reference);
    } else {
      bar_release(q_empty, j.head, j.keys);
      wait_taken();
      if (C::LAYER) named_sync(EACH, WARPGROUP); /* `end` of the job before has been read */
    }

    if (ASIDE && tid == 0) s.r.at = j;
    if constexpr (NEAR) {
      bar_wait(&s.near_taken[r.stage], r.parity ^ 1);
      if (tid == 0) s.token[r.stage].at = j;
    }
    if (C::TWINS) { /* the second has the last one's */
      bar_wait(&s.end_empty, ended ^ 1);
      ended ^= 1;
    }
    if (tid < 4 * HEADS) {
      const int head = j.head + tid / 4;
      const float sink =
          p.sinks.data ? rgk::load(p.sinks.data, p.sinks.dtype, head * p.sinks.row) : -INFINITY;
      const row_end end = finish_row(reference * c, quad_sum(l), sink);
      if (t == 0) {
        s.end[tid / 4] = end.scale;
        if (ASIDE) s.r.lse[tid / 4] = -LOG2E * end.lse;
        if constexpr (NEAR) s.token[r.stage].lse[tid / 4] = -LOG2E * end.lse;
        if constexpr (NEAR && C::LAYER) s.token[r.stage].exact[tid / 4] = end.lse;
        if (p.lse.data && !C::LAYER)
          ((float *)p.lse.data)[(int64_t)j.token * p.lse.row + head * p.lse.head] = end.lse;
      }
    }
    if (ASIDE) bar_ready(&s.scored);
    if constexpr (NEAR) {
      bar_ready(&s.near_scored[r.stage]);
      r.next();
    }
    if (C::TWINS) {
      send_end();
      return;
    }
    named_sync(EACH + C::GROUP, WARPGROUP);
    /* p[turn] was read by the last product, the other by none that other warps may still run */
    char *room = s.p[turn ^ 1];
    if constexpr (NEAR || C::LAYER) bar_wait(&s.p_empty[w.stage], w.parity ^ 1);
    if constexpr (C::LAYER) room = s.p[w.stage];
    if constexpr (X::GIVES && !C::LAYER) room = to.room();
    float end[4];
#pragma unroll
    for (int h = 0; h < 4; h++) end[h] = s.end[h / 2 * 8 + 2 * t + h % 2];
    store_o(o, end, room);
    if constexpr (C::LAYER) { /* others do the rest, and wait for memory */
      weighed &x = s.slot[w.stage];
      if (tid == 0) x.at = ROWS - KIND, x.token = j.token, x.head = j.head;
      warp_ready(&s.p_full[w.stage]);
      w.next();
      return;
    }
    if constexpr (X::GIVES) to.give();
    named_sync(EACH + C::GROUP, WARPGROUP);
    if constexpr (!X::GIVES) to.write(p, j, room, tid);
  }

  /* Job j, whose q is at `stage`. */
  __device__ __forceinline__ void take(const job &j, int stage) {
    uint64_t *const q_empty = &s.q_empty[stage];
    if constexpr (C::TWINS)
      if (!has_keys<C>()) {
        if (j.kind == DEAD_ROWS)
          bar_release(q_empty, j.head, j.keys);
        else
          run_second(j, q_empty);
        return;
      }
    if (j.kind == DEAD_ROWS) {
      bar_release(q_empty, j.head, j.keys);
      if constexpr (!X::GIVES) clear_rows<C, true>(paged_of(d).f, j);
      if constexpr (KIND == RANKED)
        if (tid < d.topk.top_n) idx_of(d, j)[tid] = 0;
      return;
    }
    run_job(j, smem_at(s.q[known(stage)]), q_empty);
  }
  /* There is no other. */
  __device__ __forceinline__ void end() {
    if (!has_keys<C>()) return;
    wait_taken();
    if (ASIDE) {
      if (tid == 0) s.r.at.kind = EXIT;
      bar_ready(&s.scored);
    }
    if constexpr (NEAR) {
      bar_wait(&s.near_taken[r.stage], r.parity ^ 1);
      bar_wait(&s.p_empty[w.stage], w.parity ^ 1);
      if (tid == 0) s.token[r.stage].at.kind = EXIT, s.slot[w.stage].at = -1;
      bar_ready(&s.near_scored[r.stage]);
      warp_ready(&s.p_full[w.stage]);
    }
  }
  __device__ __forceinline__ void run() {
    for (ring<2> q;; q.next()) {
      bar_wait(&s.q_full[q.stage], q.parity);
      const job j = s.jobs[q.stage];
      if (j.kind == EXIT) break;
      take(j, q.stage);
    }
    end();
  }
};

/* By one thread. */
template <class C> __device__ __forceinline__ void init(const rgk_flash_params &p, memory<C> &s) {
  for (int i = 0; i < 2; i++) bar_init(&s.q_full[i], 1), bar_init(&s.q_empty[i], WARPGROUP);
  bar_init(&s.scored, WARPGROUP), bar_init(&s.taken, RANKS);
  for (int i = 0; i < 2 && C::NEAR; i++) {
    bar_init(&s.near_scored[i], WARPGROUP), bar_init(&s.near_taken[i], WARPGROUP);
    bar_init(&s.summed[i], WARPGROUP), bar_init(&s.used[i], WARPGROUP);
    bar_init(&s.p_full[i], 4 * WARP_ARRIVALS), bar_init(&s.p_empty[i], 4 * WARP_ARRIVALS);
  }
  for (int i = 0; i < 2; i++) bar_init(&s.chosen[i], WARP_ARRIVALS);
  if constexpr (C::LAYER) bar_init(s.stepped, 4 * WARP_ARRIVALS);
  bar_init(&s.end_full, 1), bar_init(&s.end_empty, 4 * WARP_ARRIVALS);
  for (int i = 0; i < C::STAGES; i++) {
    bar_init(&s.k_full[i], 1), bar_init(&s.k_empty[i], 4 * WARP_ARRIVALS);
    bar_init(&s.v_full[i], 1), bar_init(&s.v_empty[i], 4 * WARP_ARRIVALS);
  }
  bar_init_done();
  map_prefetch(&p.q), map_prefetch(&p.k), map_prefetch(&p.v);
}
/* By all threads: the block's memory, its barriers ready. */
template <class C>
__device__ __forceinline__ memory<C> &begin(const rgk_flash_params &p, char *bytes) {
  static_assert(sizeof(memory<C>) + 1024 <= C::SHARED, "fits wherever it starts");
  static_assert(!C::LAYER || C::SUMS >= 4, "window and selected blocks fit, too");
  static_assert(C::SHARED <= 227 * 1024, "fits");
  memory<C> &s = *(memory<C> *)(bytes + (-smem_at(bytes) & 1023));
  if (threadIdx.x == 0) init<C>(p, s);
  __syncthreads();
  if (C::TWINS) cluster_sync();
  return s;
}
template <class C, class P, class X>
__device__ __forceinline__ void attend(const P &d, memory<C> &s, X &to) {
  const int tid = (int)threadIdx.x % 128, lane = tid % 32;
  attention<C, P, X> x{
      d,  s,  tid, tid / 32, lane, lane / 4,    lane % 4, paged_of(d).f.scale * LOG2E,
      to, {}, {},  C::NEAR,  1,    (uint32_t)0, {},       {}};
  x.run();
}
template <class C, class P> __device__ __forceinline__ void attend(const P &d, memory<C> &s) {
  to_memory<C> to;
  attend<C>(d, s, to);
}
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, (int)threadIdx.x / 128, 0);
}

} // namespace decode
} // namespace rgk
