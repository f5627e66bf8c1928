/* kernels/rope.cu: rotary embedding (rope.h).

   Angles stay exact at long positions: position · turns in double, its whole turns dropped, and
   only then sine and cosine in single precision. A block makes those of its tokens once, in shared
   memory, for all heads.

       tokens of the block | position | (cos, sin) [tokens, pairs]
       then: (token, head, 8 pairs) per thread
 */
#include "device/chunk.cuh"
#include "device/seq.cuh"
#include "rope.h"

using namespace rgk;

namespace {

enum { THREADS = RGK_ROPE_THREADS };

/* What a thread works on: 8 pairs of one head of one token. */
template <class T> struct item {
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
    const int64_t at = (first + t) * p.x.row + h * p.x.head + p.first + c;
    low.load(p.x.data, p.x.dtype, at, n);
    high.load(p.x.data, p.x.dtype, at + p.half, n);
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS) rope(const __grid_constant__ rgk_rope_params p) {
  __shared__ float cosine[RGK_ROPE_ANGLES], sine[RGK_ROPE_ANGLES];
  __shared__ int64_t position[RGK_ROPE_TOKENS];
  const int64_t first = (int64_t)blockIdx.x * p.tokens;
  const int tokens = p.rows - first < p.tokens ? (int)(p.rows - first) : p.tokens;
  const int64_t live = live_rows(p.seqs);
  const int chunks = (p.pairs + CHUNK - 1) / CHUNK;
  const int64_t items = (int64_t)tokens * p.heads * chunks;
  item<T> next;
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
    cosine[i] = c;
    sine[i] = p.back ? -s : s;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < items; i += THREADS) {
    const item<T> x = next;
    if (i + THREADS < items) next.load(p, i + THREADS, chunks, first, live);
    if (!x.alive && p.add) continue;
    const int64_t y = (first + x.t) * p.y.row + x.h * p.y.head + p.first + x.c;
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
          u[e] = __fmaf_rn(a[e], co[e], -__fmul_rn(b[e], si[e]));
          v[e] = __fmaf_rn(b[e], co[e], __fmul_rn(a[e], si[e]));
        }
    }
    put<T>(p.y.data, p.y.dtype, y, u, x.n, p.add);
    put<T>(p.y.data, p.y.dtype, y + p.half, v, x.n, p.add);
  }
}

} // namespace

const void *rgk_rope(bool vectors, rg_dtype x) {
  if (!vectors) return (const void *)rope<void>;
  if (x == RG_F32) return (const void *)rope<float>;
  if (x == RG_F16) return (const void *)rope<__half>;
  return (const void *)rope<__nv_bfloat16>;
}
