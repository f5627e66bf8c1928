/* kernels/attn/plain_fwd.cu: attention's forward for any shape and type, in fp32 without tensor
   cores.

     s = scale Q Kt, capped         m' = max(m, s)     p = exp(s - m')
     l = l exp(m - m') + sum p      o = o exp(m - m') + p V        at the end o / l, lse = m + log l

   A block of 128 threads has a row tile (64 rows: queries times heads of one KV head; fewer for
   wide heads) in shared memory and walks the key tiles it sees, 64 keys each. Each of four warps
   owns a quarter of the rows, keeps their o in registers, hands p from the score layout to the sum
   layout through shared memory of its own, and passes over key tiles that none of its rows sees. K
   and V take turns in one buffer; two blocks share a multiprocessor, so one computes while the
   other loads. A tile's p V is summed apart and then added: chains stay short. A sink counts as a
   key that every row has already seen.

   A logit summed in fp32 errs by some roundings of |q| |k| scale, however small it is. Where that
   could show in lse (large q and k, lse near 0) the row walks its keys once more and sums lse in
   double, as on the CPU. What decides is the row's q, its lse and the longest key that it sees: no
   other row's keys.
 */
#include "plain.cuh"

using namespace rgk;
using namespace rgk::plain;

namespace {

enum { KEYS = RGK_PLAIN_FWD_KEYS, LDP = KEYS + 8 };

/* lse is to be right to LSE_ERROR * max(1, |lse|). A logit whose terms cancel has been seen to err
 * by 3 * 2^-24 of |q| |k| scale; one that a few large terms carry by more, but then it and lse are
 * as large. */
constexpr float LSE_ERROR = 1e-5f, ROUNDING = 0x1p-22f;

template <int TILE> struct shared {
  static constexpr int W = rgk_plain_width(TILE), M = rgk_plain_rows(TILE), RL = M / 16, LD = W + 4;
  float q[M * LD];
  float kv[KEYS * LD]; /* at the end, o */
  float p[M * LDP];
  float length[KEYS]; /* of the tile's keys, squared */
  walk_shared<M> walk;
};

/* The state of a lane's rows. */
template <int RL> struct softmax {
  int query[RL];      /* of the tile; -1: no such row */
  float m[RL], l[RL]; /* l: of this lane's columns */
  float longest[RL];  /* square of the length of the longest key seen in this lane's columns */
};

/* Scores, probabilities to shared memory, and the factor by which sums so far shrink. */
template <int NJ, int LD, int RL, int M>
__device__ __forceinline__ void
probabilities(const rgk_attn &a, const float *q, const float *k, float *p, const float *length,
              const walk_shared<M> &seen, softmax<RL> &x, float (&shrink)[RL]) {
  const int cx = threadIdx.x % 8;
  float s[RL][NJ];
  scores<RL, NJ, LD, 16>(q, k, a.D, s);
  to_logits(a, s);
#pragma unroll
  for (int i = 0; i < RL; i++) {
    const int lo = x.query[i] < 0 ? 0 : seen.lo[x.query[i]],
              hi = x.query[i] < 0 ? 0 : seen.hi[x.query[i]];
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      const int c = cx + 8 * j;
      const bool sees = c >= lo && c < hi;
      s[i][j] = sees ? s[i][j] : -INFINITY;
      top = fmaxf(top, s[i][j]);
      x.longest[i] = fmaxf(x.longest[i], sees ? length[c] : 0);
    }
#pragma unroll
    for (int d = 1; d < 8; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    const float m = fmaxf(x.m[i], top);
    /* nothing seen yet: any finite base keeps the zeros zero */
    const float base = m > -INFINITY ? m : 0;
    /* 1: l and o are zero and need no factor */
    shrink[i] = x.m[i] > -INFINITY ? expf(x.m[i] - base) : 1;
    x.m[i] = m;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < NJ; j++) {
      const float e = expf(s[i][j] - base);
      sum += e;
      p[4 * i * LDP + cx + 8 * j] = e;
    }
    x.l[i] = x.l[i] * shrink[i] + sum;
  }
}

/* The squares of the lengths of a warp's 16 rows of k; a NaN is ignored later, it is in lse
 * already. */
template <int LD>
__device__ __forceinline__ void find_lengths(float *length, const float *k, int rows, int width) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  float sum = 0;
  for (int d = lane / 16 * 4; d < width && row < rows; d += 8) {
    const float4 x = *(const float4 *)(k + row * LD + d);
    sum += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  sum += __shfl_xor_sync(~0u, sum, 16);
  if (lane < 16) length[row] = sum;
}

/* Writes lse of the lane's rows i with bit i of `doubt`, summed in double; all threads of the block
 * come here. */
template <int TILE>
__device__ __noinline__ void lse_again(const rgk_attn_plain &p, shared<TILE> &sh, unsigned doubt) {
  constexpr int LD = shared<TILE>::LD, M = shared<TILE>::M, RL = shared<TILE>::RL;
  const rgk_attn &a = p.a;
  const row_tile t = find_rows(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cx = lane % 8,
            r0 = warp * 4 * RL + lane / 8;
  double m[RL], l[RL];
#pragma unroll
  for (int i = 0; i < RL; i++) {
    const int r = r0 + 4 * i;
    m[i] = -INFINITY;
    if (a.sinks.data && r < t.n && cx == 0)
      m[i] = load(a.sinks.data, a.sinks.dtype, (t.head + r % t.heads) * a.sinks.row);
    l[i] = m[i] > -INFINITY ? 1 : 0;
  }
  const tile_keys keys = keys_of(p, t);
  walk<M, KEYS> w(a, t, keys);
  while (w.step(p, t, sh.walk)) {
    load_rows<LD, RGK_PLAIN_THREADS>(sh.kv, KEYS, a.D, a.k, p.vec, [&](int r) {
      return r < w.keys ? key_at(p, keys, t, a.k, p.pages.k_page, w.first + r) : -1;
    });
    copies_wait_all();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RL; i++) {
      if (!(doubt >> i & 1)) continue;
      const int query = (r0 + 4 * i) / t.heads;
      const float *q = sh.q + (r0 + 4 * i) * LD;
      for (int c = cx; c < sh.walk.hi[query]; c += 8) {
        if (c < sh.walk.lo[query]) continue;
        double s = 0;
        for (int d = 0; d < a.D; d++) s += (double)q[d] * (double)sh.kv[c * LD + d];
        s *= a.scale;
        if (a.softcap > 0) s = a.softcap * tanh(s / a.softcap);
        if (s > m[i]) {
          l[i] = l[i] * exp(m[i] - s) + 1;
          m[i] = s;
        } else if (s > -INFINITY) {
          l[i] += exp(s - m[i]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < RL; i++) {
    for (int d = 1; d < 8; d *= 2) {
      const double m1 = __shfl_xor_sync(~0u, m[i], d), l1 = __shfl_xor_sync(~0u, l[i], d),
                   top = fmax(m[i], m1);
      if (top == -INFINITY) continue;
      l[i] = l[i] * exp(m[i] - top) + l1 * exp(m1 - top);
      m[i] = top;
    }
    if ((doubt >> i & 1) && cx == 0)
      ((float *)a.lse.data)[row_at(t, a.lse, r0 + 4 * i)] = (float)(m[i] + log(l[i]));
  }
}

template <int TILE>
__global__ void __launch_bounds__(RGK_PLAIN_THREADS, TILE == RGK_PLAIN_64    ? 3
                                                     : TILE == RGK_PLAIN_576 ? 1
                                                                             : 2)
    forward(const __grid_constant__ rgk_attn_plain p) {
  using sh_t = shared<TILE>;
  static_assert(sizeof(sh_t) == rgk_plain_fwd_shared(TILE), "as the host counts");
  constexpr int LD = sh_t::LD, M = sh_t::M, RL = sh_t::RL, NE = sh_t::W / 32,
                THREADS = RGK_PLAIN_THREADS;
  static_assert(M <= (int)KEYS, "o takes the place of keys");
  extern __shared__ __align__(16) char memory[];
  sh_t &sh = *(sh_t *)memory;
  const rgk_attn &a = p.a;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, y = lane / 8, cx = lane % 8;

  const row_tile t = find_rows(p);
  if (t.t.n == 0) return;
  if (t.t.b >= a.seqs.n) { /* dead rows */
    for (int r = warp; r < t.n; r += THREADS / 32) {
      zero_row<32>(a.o, row_at(t, a.o, r), a.E, lane);
      if (a.lse.data && lane == 0) ((float *)a.lse.data)[row_at(t, a.lse, r)] = 0;
    }
    return;
  }
  load_rows<LD, THREADS>(sh.q, M, a.D, a.q, p.vec, [&](int r) { return row_at(t, a.q, r); });

  const int r0 = warp * 4 * RL + y; /* this lane's first row */
  softmax<RL> x;
  float4 o[RL][NE];
#pragma unroll
  for (int i = 0; i < RL; i++) {
    const int r = r0 + 4 * i;
    x.query[i] = r < t.n ? r / t.heads : -1;
    x.m[i] = -INFINITY;
    if (a.sinks.data && r < t.n)
      x.m[i] = load(a.sinks.data, a.sinks.dtype, (t.head + r % t.heads) * a.sinks.row);
    x.l[i] = cx == 0 && x.m[i] > -INFINITY ? 1 : 0;
    x.longest[i] = 0;
#pragma unroll
    for (int j = 0; j < NE; j++) o[i][j] = make_float4(0, 0, 0, 0);
  }

  const float *q = sh.q + r0 * LD, *k = sh.kv + cx * LD, *v = sh.kv + 4 * cx;
  float *prob = sh.p + r0 * LDP;
  const tile_keys keys = keys_of(p, t);
  walk<M, KEYS> w(a, t, keys);
  while (w.step(p, t, sh.walk)) {
    const int part = w.keys > 32 ? 64 : w.keys > 16 ? 32 : 16; /* columns worked on */
    load_rows<LD, THREADS>(sh.kv, part, a.D, a.k, p.vec, [&](int r) {
      return r < w.keys ? key_at(p, keys, t, a.k, p.pages.k_page, w.first + r) : -1;
    });
    copies_wait_all();
    __syncthreads();
    if (a.lse.data) {
      find_lengths<LD>(sh.length, sh.kv, part, a.D);
      __syncthreads();
    }
    bool any = false;
#pragma unroll
    for (int i = 0; i < RL; i++)
      any |= x.query[i] >= 0 && sh.walk.lo[x.query[i]] < sh.walk.hi[x.query[i]];
    any = __any_sync(~0u, any);
    float shrink[RL];
    if (any) {
      if (part == 64)
        probabilities<8, LD>(a, q, k, prob, sh.length, sh.walk, x, shrink);
      else if (part == 32)
        probabilities<4, LD>(a, q, k, prob, sh.length, sh.walk, x, shrink);
      else
        probabilities<2, LD>(a, q, k, prob, sh.length, sh.walk, x, shrink);
    }
    __syncthreads();
    load_rows<LD, THREADS>(sh.kv, part, a.E, a.v, p.vec, [&](int r) {
      return r < w.keys ? key_at(p, keys, t, a.v, p.pages.v_page, w.first + r) : -1;
    });
    copies_wait_all();
    __syncthreads();
    if (!any) continue;
    float4 c[RL][NE];
    sums<RL, NE, LDP, LD>(prob, v, (w.keys + 3) & ~3, a.E, c);
#pragma unroll
    for (int i = 0; i < RL; i++)
#pragma unroll
      for (int j = 0; j < NE; j++) o[i][j] = added(scaled(o[i][j], shrink[i]), c[i][j]);
  }
  copies_wait_all();
  __syncthreads(); /* a tile that sees no key has not met its q yet */

  unsigned doubt = 0; /* bit i: row i's lse */
  float factor[RL];
#pragma unroll
  for (int i = 0; i < RL; i++) {
    float l = x.l[i], square = 0;
#pragma unroll
    for (int d = 1; d < 8; d *= 2) l += __shfl_xor_sync(~0u, l, d);
    factor[i] = l != 0 ? 1 / l : 1; /* without a key o is 0 already */
    if (!a.lse.data) continue;
    for (int d = 4 * cx; d < a.D; d += 32) {
      const float4 v = *(const float4 *)(q + 4 * i * LD + d);
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
#pragma unroll
    for (int d = 1; d < 8; d *= 2) {
      square += __shfl_xor_sync(~0u, square, d);
      x.longest[i] = fmaxf(x.longest[i], __shfl_xor_sync(~0u, x.longest[i], d));
    }
    const int r = r0 + 4 * i;
    if (r >= t.n) continue;
    const float lse = l != 0 ? x.m[i] + logf(l) : -INFINITY, size = fabsf(lse);
    if (cx == 0) ((float *)a.lse.data)[row_at(t, a.lse, r)] = lse;
    if (size < INFINITY && ROUNDING * fabsf(a.scale) * sqrtf(square) * sqrtf(x.longest[i]) >
                               LSE_ERROR * fmaxf(1, size))
      doubt |= 1u << i;
  }
  put_sums<RL, NE, LD>(sh.kv + r0 * LD + 4 * cx, o, factor);
#pragma unroll 1
  for (int r = warp * 4 * RL; r < min(t.n, (warp + 1) * 4 * RL); r++)
    store_row(a.o, row_at(t, a.o, r), sh.kv + r * LD, a.E, p.vec, false);
  if (__syncthreads_or(doubt != 0)) lse_again(p, sh, doubt);
}

} // namespace

const void *rgk_plain_fwd(int w) {
  switch (w) {
  case RGK_PLAIN_64: return (const void *)forward<RGK_PLAIN_64>;
  case RGK_PLAIN_128: return (const void *)forward<RGK_PLAIN_128>;
  case RGK_PLAIN_256: return (const void *)forward<RGK_PLAIN_256>;
  case RGK_PLAIN_576: return (const void *)forward<RGK_PLAIN_576>;
  case RGK_PLAIN_128_SMALL: return (const void *)forward<RGK_PLAIN_128_SMALL>;
  default: return (const void *)forward<RGK_PLAIN_256_SMALL>;
  }
}
