/* kernels/rope.cu: rotary embedding (rope.h).

   Angles stay exact at long positions: position · turns in double, its whole turns dropped, and
   only then sine and cosine in single precision. A block makes those of its tokens once, in shared
   memory, for all heads.

       tokens of the block | position | (cos, sin) [tokens, pairs]
       then: (token, head, 8 pairs) per thread

   Neighbouring pairs are two chunks in a row, each of four pairs.
 */
#include "device/chunk.cuh"
#include "device/seq.cuh"
#include "rope.h"

using namespace rgk;

namespace {

enum { THREADS = RGK_ROPE_THREADS };

/* What a thread works on: 8 pairs of one head of one token, in two chunks. */
template <class T, bool PAIRS> struct item {
  chunk<T> low, high;
  int64_t t, h; /* token in the block */
  int c, n;     /* pairs [c, c + n) of this launch */
  bool alive;

  __device__ __forceinline__ void load(const rgk_rope_params &p, int64_t i, int chunks,
                                       int64_t first, int64_t live) {
    const int64_t row = divide(i, chunks);
    t = divide(row, p.heads);
    h = row - t * p.heads;
    c = (int)(i - row * chunks) * CHUNK;
    n = p.pairs - c < CHUNK ? p.pairs - c : CHUNK;
    alive = first + t < live;
    if (!alive) return;
    const int64_t at = (first + t) * p.x.row + h * p.x.head + column(p);
    low.load(p.x.data, p.x.dtype, at, low_count());
    high.load(p.x.data, p.x.dtype, at + apart(p), high_count());
  }
  __device__ __forceinline__ int64_t column(const rgk_rope_params &p) const {
    return PAIRS ? 2 * (p.first + c) : p.first + c;
  }
  __device__ __forceinline__ static int64_t apart(const rgk_rope_params &p) {
    return PAIRS ? CHUNK : p.half;
  }
  __device__ __forceinline__ int low_count() const { return PAIRS ? min(2 * n, (int)CHUNK) : n; }
  __device__ __forceinline__ int high_count() const { return PAIRS ? max(2 * n - CHUNK, 0) : n; }
};

/* Pair e's elements of both chunks. */
template <bool PAIRS>
__device__ __forceinline__ float &first_of(float (&low)[CHUNK], float (&high)[CHUNK], int e) {
  return PAIRS ? e < CHUNK / 2 ? low[2 * e % CHUNK] : high[2 * e % CHUNK] : low[e];
}
template <bool PAIRS>
__device__ __forceinline__ float &second_of(float (&low)[CHUNK], float (&high)[CHUNK], int e) {
  return PAIRS ? e < CHUNK / 2 ? low[2 * e % CHUNK + 1] : high[2 * e % CHUNK + 1] : high[e];
}

template <class T, bool PAIRS>
__global__ void __launch_bounds__(THREADS) rope(const __grid_constant__ rgk_rope_params p) {
  __shared__ float cosine[RGK_ROPE_ANGLES], sine[RGK_ROPE_ANGLES];
  __shared__ int64_t position[RGK_ROPE_TOKENS];
  const int64_t first = (int64_t)blockIdx.x * p.tokens;
  const int tokens = p.rows - first < p.tokens ? (int)(p.rows - first) : p.tokens;
  const int64_t live = live_rows(p.seqs);
  const int chunks = (p.pairs + CHUNK - 1) / CHUNK;
  const int64_t items = (int64_t)tokens * p.heads * chunks;
  item<T, PAIRS> next;
  if (threadIdx.x < items) next.load(p, threadIdx.x, chunks, first, live);
  for (int t = threadIdx.x; t < tokens && first + t < live; t += THREADS) {
    const int b = find_seq(p.seqs, first + t);
    position[t] = first + t - seq_start(p.seqs, b) + (p.offset ? p.offset[b] : 0);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens * p.pairs; i += THREADS) {
    const int t = i / p.pairs;
    if (first + t >= live) break;
    const double turns = (double)position[t] * p.turns[i - t * p.pairs];
    float s, c;
    sincospif(2.0f * (float)(turns - rint(turns)), &s, &c);
    cosine[i] = __fmul_rn(c, p.magnitude);
    sine[i] = __fmul_rn(p.back ? -s : s, p.magnitude);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < items; i += THREADS) {
    const item<T, PAIRS> x = next;
    if (i + THREADS < items) next.load(p, i + THREADS, chunks, first, live);
    if (!x.alive && p.add) continue;
    const int64_t y = (first + x.t) * p.y.row + x.h * p.y.head + x.column(p);
    float a[CHUNK], b[CHUNK], u[CHUNK], v[CHUNK];
    zero(u);
    zero(v);
    if (x.alive) {
      x.low.get(a);
      x.high.get(b);
      const float *co = cosine + x.t * p.pairs + x.c, *si = sine + x.t * p.pairs + x.c;
#pragma unroll
      for (int e = 0; e < CHUNK; e++)
        if (e < x.n) {
          const float f = first_of<PAIRS>(a, b, e), g = second_of<PAIRS>(a, b, e);
          first_of<PAIRS>(u, v, e) = __fmaf_rn(f, co[e], -__fmul_rn(g, si[e]));
          second_of<PAIRS>(u, v, e) = __fmaf_rn(g, co[e], __fmul_rn(f, si[e]));
        }
    }
    put<T>(p.y.data, p.y.dtype, y, u, x.low_count(), p.add);
    put<T>(p.y.data, p.y.dtype, y + x.apart(p), v, x.high_count(), p.add);
  }
}

template <bool PAIRS> const void *rope_of(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)rope<void, PAIRS>;
  if (x == RG_F32) return (const void *)rope<float, PAIRS>;
  if (x == RG_F16) return (const void *)rope<__half, PAIRS>;
  return (const void *)rope<__nv_bfloat16, PAIRS>;
}

} // namespace

const void *rgk_rope(bool vectors, rg_dtype x, bool interleaved) {
  return interleaved ? rope_of<true>(vectors, x) : rope_of<false>(vectors, x);
}
