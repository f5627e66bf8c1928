/* kernels/comm.cu: see comm.h. Every element is moved, or summed, by one thread, so vectors and
   single elements give the same bits. */
#include "comm.h"
#include "device/chunk.cuh"
#include "device/seq.cuh"

using namespace rgk;

namespace {

enum { THREADS = 256 };

__device__ __forceinline__ int64_t place(const rgk_order &o, int64_t chunk) {
  if (!o.place) return chunk;
  const int64_t at = o.place[chunk * o.stride];
  return at < 0 ? 0 : at < o.n ? at : o.n - 1;
}

/* Element i of row `row`. */
__device__ __forceinline__ int64_t element(const rgk_walk &w, const rgk_row &x, int64_t row,
                                           int64_t i) {
  int64_t at = row * x.row;
  for (int a = w.rank - 1; a > 0; a--) {
    const int64_t q = divide(i, w.dim[a]);
    at += (i - q * w.dim[a]) * x.stride[a];
    i = q;
  }
  return at + i * x.stride[0];
}

/* ---- chunks to their places and back ---- */

template <class T>
__global__ void __launch_bounds__(THREADS) permute(const __grid_constant__ rgk_permute_params p) {
  constexpr int N = std::is_void_v<T> ? 1 : CHUNK;
  const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * N;
  if (i >= p.rows * p.w.elements) return;
  const int64_t row = divide(i, p.w.elements), k = i - row * p.w.elements;
  const int64_t c = divide(row, p.chunk), other = place(p.order, c) * p.chunk + row - c * p.chunk;
  const int64_t from = p.scatter ? row : other, to = p.scatter ? other : row;
  const bool live = from < live_rows(p.live);
  const int64_t at = element(p.w, p.to, to, k);
  if constexpr (std::is_void_v<T>) {
    const float x = live ? load(p.from.data, p.from.dtype, element(p.w, p.from, from, k)) : 0.0f;
    store(p.to.data, p.to.dtype, at, x);
  } else {
    chunk<T> raw;
    float x[CHUNK];
    if (live)
      raw.load(p.from.data, 0, element(p.w, p.from, from, k), CHUNK);
    else
      raw.clear();
    raw.get(x);
    put<T>(p.to.data, p.to.dtype, at, x, CHUNK, false);
  }
}

/* ---- sums over ranks ---- */

template <class T>
__global__ void __launch_bounds__(THREADS) sum_ranks(const __grid_constant__ rgk_sum_params p) {
  constexpr int N = std::is_void_v<T> ? 1 : CHUNK;
  const int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * N;
  if (i >= p.w.elements) return;
  int64_t at = 0, rest = i;
  for (int a = p.w.rank - 1; a > 0; a--) {
    const int64_t q = divide(rest, p.w.dim[a]);
    at += (rest - q * p.w.dim[a]) * p.to.stride[a];
    rest = q;
  }
  at += rest * p.to.stride[0];
  if constexpr (std::is_void_v<T>) {
    float sum = load(p.from, p.dtype, i);
    for (int r = 1; r < p.ranks; r++) sum = __fadd_rn(sum, load(p.from, p.dtype, r * p.step + i));
    store(p.to.data, p.to.dtype, at, sum);
  } else {
    chunk<T> raw;
    float sum[CHUNK], x[CHUNK];
    raw.load(p.from, 0, i, CHUNK);
    raw.get(sum);
    for (int r = 1; r < p.ranks; r++) {
      raw.load(p.from, 0, r * p.step + i, CHUNK);
      raw.get(x);
#pragma unroll
      for (int k = 0; k < CHUNK; k++) sum[k] = __fadd_rn(sum[k], x[k]);
    }
    put<T>(p.to.data, p.to.dtype, at, sum, CHUNK, false);
  }
}

__global__ void __launch_bounds__(THREADS) sum_pairs(const __grid_constant__ rgk_pairs_params p) {
  const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
  if (i >= p.n) return;
  double sum = 0;
  for (int r = 0; r < p.ranks; r++) {
    const float *of = p.from + 2 * p.n * r;
    sum += (double)of[i] + (double)of[p.n + i];
  }
  p.to[i * p.stride] = (float)sum;
}

/* ---- halos ---- */

struct side { /* the chunk before or after a slot's */
  bool there;
  int64_t slot; /* on this rank, or -1 and the message to (and from) its rank */
  int which;    /* RGK_MESSAGES: to nobody */
};

struct around {
  side before, after;
};

/* All threads of the block; a chunk is found by who holds its place. */
__device__ around find(const rgk_halo_params &p) {
  __shared__ int chunk;
  const int64_t mine = p.rank * (int64_t)p.slots + p.slot;
  if (threadIdx.x == 0) chunk = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.order.n; i += THREADS)
    if (place(p.order, i) == mine) chunk = i;
  __syncthreads();
  around out;
  for (int after = 0; after < 2; after++) {
    const int64_t other = chunk + (after ? 1 : -1);
    side s = {other >= 0 && other < p.order.n, -1, RGK_MESSAGES};
    if (s.there) {
      const int64_t at = place(p.order, other), rank = at / p.slots;
      if (rank == p.rank) s.slot = at % p.slots;
      if (rank == p.rank - 1) s.which = RGK_TO_PREVIOUS;
      if (rank == p.rank + 1) s.which = RGK_TO_NEXT;
    }
    (after ? out.after : out.before) = s;
  }
  return out;
}

/* A message is | left rows | right rows |. */
__device__ __forceinline__ int64_t in_message(const rgk_halo_params &p, bool right, int64_t row,
                                              int64_t k) {
  return ((right ? p.left : 0) + row) * p.elements + k;
}

/* T void: an element of any type; else eight of type T, on 16 bytes. */
template <class T> inline constexpr int at_once = std::is_void_v<T> ? 1 : CHUNK;

template <class T>
__device__ __forceinline__ void fetch(const void *data, int dtype, int64_t at, float (&x)[CHUNK]) {
  chunk<T> raw;
  raw.load(data, dtype, at, at_once<T>);
  raw.get(x);
}

/* x[0]: from element k of row `row` of slot s, or 0 if the row is dead. */
template <class T>
__device__ __forceinline__ void own(const rgk_halo_params &p, int64_t live, int64_t s, int64_t row,
                                    int64_t k, float (&x)[CHUNK]) {
  const int64_t at = s * p.chunk + row;
  if (at < live)
    fetch<T>(p.x[0].data, p.x[0].dtype, element(p.w, p.x[0], at, k), x);
  else
    zero(x);
}

/* Messages: grid.y 0: what the chunk before gets, the first `right` rows; 1: the chunk after, the
 * last `left`. */
__global__ void __launch_bounds__(THREADS) halo_send(const __grid_constant__ rgk_halo_params p) {
  const around a = find(p);
  const bool after = blockIdx.y;
  const side &s = after ? a.after : a.before;
  if (!s.there || s.slot >= 0 || s.which == RGK_MESSAGES) return;
  const int64_t n = (after ? p.left : p.right) * p.elements, live = live_rows(p.live);
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n;
       i += gridDim.x * (int64_t)THREADS) {
    const int64_t row = divide(i, p.elements), k = i - row * p.elements;
    float x[CHUNK];
    own<void>(p, live, p.slot, after ? p.chunk - p.left + row : row, k, x);
    store(p.message[s.which], p.x[0].dtype, in_message(p, !after, row, k), x[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) halo_take(const __grid_constant__ rgk_halo_params p) {
  constexpr int N = at_once<T>;
  const around a = find(p);
  const int64_t rows = p.left + p.chunk + p.right, live = live_rows(p.live);
  for (int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * N; i < rows * p.elements;
       i += gridDim.x * (int64_t)THREADS * N) {
    const int64_t at = divide(i, p.elements), k = i - at * p.elements, row = at - p.left;
    float x[CHUNK];
    if (row >= 0 && row < p.chunk) {
      own<T>(p, live, p.slot, row, k, x);
    } else {
      const bool after = row >= p.chunk;
      const side &s = after ? a.after : a.before;
      const int64_t r = after ? row - p.chunk : at; /* of the halo */
      if (s.there && s.slot >= 0)
        own<T>(p, live, s.slot, after ? r : p.chunk - p.left + r, k, x);
      else if (s.there && s.which != RGK_MESSAGES)
        fetch<T>(p.message[s.which + RGK_FROM_PREVIOUS], p.x[0].dtype, in_message(p, after, r, k),
                 x);
      else
        zero(x);
    }
    put<T>(p.y.data, p.y.dtype, element(p.w, p.y, at, k), x, N, false);
  }
}

/* grid.y as above: the left halo is the chunk before's, the right one the chunk after's. */
__global__ void __launch_bounds__(THREADS)
    halo_add_send(const __grid_constant__ rgk_halo_params p) {
  const around a = find(p);
  const bool after = blockIdx.y;
  const side &s = after ? a.after : a.before;
  const rgk_row &x = p.x[p.slot];
  if (!s.there || s.slot >= 0 || s.which == RGK_MESSAGES) return;
  const int64_t n = (after ? p.right : p.left) * p.elements;
  for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n;
       i += gridDim.x * (int64_t)THREADS) {
    const int64_t row = divide(i, p.elements), k = i - row * p.elements;
    const int64_t from = after ? p.left + p.chunk + row : row;
    store(p.message[s.which], x.dtype, in_message(p, after, row, k),
          load(x.data, x.dtype, element(p.w, x, from, k)));
  }
}

template <class T> struct terms {
  float sum[CHUNK];
  bool begun;

  __device__ __forceinline__ void add(const void *data, int dtype, int64_t at) {
    float x[CHUNK];
    fetch<T>(data, dtype, at, x);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) sum[i] = begun ? __fadd_rn(sum[i], x[i]) : x[i];
    begun = true;
  }
  /* What the neighbour on one side had in its halo for a row, its n'th there. */
  __device__ __forceinline__ void add_side(const rgk_halo_params &p, const side &s, bool after,
                                           int64_t n, int64_t k) {
    if (!s.there || (s.slot < 0 && s.which == RGK_MESSAGES)) return;
    if (s.slot < 0) {
      add(p.message[s.which + RGK_FROM_PREVIOUS], p.y.dtype, in_message(p, !after, n, k));
    } else if (p.x[s.slot].data) {
      const rgk_row &y = p.x[s.slot];
      add(y.data, y.dtype, element(p.w, y, after ? n : p.left + p.chunk + n, k));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    halo_add_take(const __grid_constant__ rgk_halo_params p) {
  constexpr int N = at_once<T>;
  const around a = find(p);
  const rgk_row &x = p.x[p.slot];
  for (int64_t i = (blockIdx.x * (int64_t)THREADS + threadIdx.x) * N; i < p.chunk * p.elements;
       i += gridDim.x * (int64_t)THREADS * N) {
    const int64_t row = divide(i, p.elements), k = i - row * p.elements;
    const int64_t tail = row - (p.chunk - p.left);
    terms<T> t;
    zero(t.sum);
    t.begun = false;
    if (row < p.right) t.add_side(p, a.before, false, row, k);
    if (x.data) t.add(x.data, x.dtype, element(p.w, x, p.left + row, k));
    if (tail >= 0) t.add_side(p, a.after, true, tail, k);
    put<T>(p.y.data, p.y.dtype, element(p.w, p.y, p.slot * p.chunk + row, k), t.sum, N, false);
  }
}

} // namespace

#define OF_TYPE(kernel)                                    \
  if (!vectors) return (const void *)kernel<void>;         \
  if (type == RG_F32) return (const void *)kernel<float>;  \
  if (type == RG_F16) return (const void *)kernel<__half>; \
  return (const void *)kernel<__nv_bfloat16>;
const void *rgk_permute(bool vectors, rg_dtype type) {
  OF_TYPE(permute)
}
const void *rgk_sum_ranks(bool vectors, rg_dtype from) {
  if (!vectors) return (const void *)sum_ranks<void>;
  if (from == RG_F32) return (const void *)sum_ranks<float>;
  return (const void *)sum_ranks<__nv_bfloat16>;
}
const void *rgk_sum_pairs() {
  return (const void *)sum_pairs;
}
const void *rgk_halo_send(bool, rg_dtype) {
  return (const void *)halo_send;
}
const void *rgk_halo_take(bool vectors, rg_dtype type) {
  OF_TYPE(halo_take)
}
const void *rgk_halo_add_send(bool, rg_dtype) {
  return (const void *)halo_add_send;
}
const void *rgk_halo_add_take(bool vectors, rg_dtype type) {
  OF_TYPE(halo_add_take)
}
