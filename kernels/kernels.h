/* kernels/kernels.h: what ops/ (plain C) needs to launch kernels: argument structs and kernel
   addresses.

   Every kernel takes one struct by value (a `…_params` of this folder's headers, at most 4 KiB) and
   is handed out by a getter that picks the template instance. Built without nvcc, getters give
   NULL: plans are still made for a GPU, nothing is launched. The folder's other headers, one per
   family, follow the same pattern:

       kernels/rows.h  rows.cu            elementwise and row-wise ops
       kernels/X.h     X_fwd.cu X_bwd.cu  any GPU from compute_80 on (also as PTX); X_mma.cu and
                                          mma_*.cu by mma.sync (device/mma.cuh)
                       X_sm90.cu          Hopper only (wgmma, TMA): compiled for sm_90a alone
 */
#ifndef RGK_KERNELS_H
#define RGK_KERNELS_H

#include <regraph/op.h>

#ifdef __cplusplus
#define RGK_EXTERN extern "C"
#else
#define RGK_EXTERN extern
#endif

/* A function that host and device share; in device code a constant, where its arguments are: what a
 * launch asks for is held against the struct it is for. */
#ifdef __CUDACC__
#define RGK_BOTH static constexpr __host__ __device__ __forceinline__
#else
#define RGK_BOTH static inline
#endif

/* RGK_GETTER(rgk_rows_silu(rg_dtype x, rg_dtype y)) declares a getter. */
#ifdef REGRAPH_CUDA
#define RGK_GETTER(...) RGK_EXTERN const void *__VA_ARGS__;
#else
#pragma GCC diagnostic ignored "-Wunused-parameter"
#define RGK_GETTER(...)                   \
  static inline const void *__VA_ARGS__ { \
    return 0;                             \
  }
#endif

/* A tensor [rows, heads, width] as kernels see it; strides in elements, the last axis is dense. */
typedef struct rgk_tensor {
  void *data; /* NULL: absent */
  int64_t row, head;
  int32_t dtype; /* rg_dtype */
  int32_t zero;  /* in place of a hole: parameters are compared as bytes */
} rgk_tensor;

/* Of a tensor of rank 1 to 3, or of NULL. */
static inline rgk_tensor rgk_of(const rg_arg *a) {
  rgk_tensor t = {0, 0, 0, 0, 0};
  if (!a) return t;
  t.data = a->data;
  t.row = a->rank > 1 ? a->stride[0] : 1;
  t.head = a->rank > 2 ? a->stride[1] : a->rank == 2 ? 1 : 0;
  t.dtype = (int32_t)a->dtype;
  return t;
}

/* Packed sequences: starts [n + 1], ascending from 0, the last at most `rows` (checked or clamped
 * before any kernel runs). starts NULL: one sequence of all rows. */
typedef struct rgk_seqs {
  const int32_t *starts;
  int32_t n, zero;
  int64_t rows; /* capacity */
} rgk_seqs;

static inline rgk_seqs rgk_seqs_of(const rg_arg *cu, int64_t rows) {
  rgk_seqs s = {0, 1, 0, 0};
  if (cu) {
    s.starts = (const int32_t *)cu->data;
    s.n = (int32_t)cu->dim[0] - 1;
  }
  s.rows = rows;
  return s;
}

/* Where a kernel says what is wrong with contents: words {0 or `what`, four numbers} of memory that
 * the host empties; from TAKEN on, two words, what device/fault.cuh takes. NULL: nobody listens. */
enum { RGK_FAULT_NUMBERS = 4, RGK_FAULT_TAKEN = 15 };
typedef struct rgk_fault {
  int32_t *word;
  int32_t what, zero;
} rgk_fault;
static inline rgk_fault rgk_fault_of(const rg_call *c) {
  const rgk_fault f = {c->fault, c->fault_id, 0};
  return f;
}

/* ---- tiles of packed sequences, without a table ----
 *
 * Slot s of tile size t belongs to sequence b = the last with floor(starts[b] / t) + b <= s, and is
 * its tile s - floor(starts[b] / t) - b; it may lie past the sequence's end (then it is empty). The
 * rows after the last sequence count as sequence n, so that some slot covers every dead row too. A
 * grid of rgk_slots(…) blocks thus serves any lengths that fit; device/seq.cuh finds b by
 * bisection. */
static inline int64_t rgk_slots(int64_t rows, int64_t sequences, int64_t tile) {
  return rows / tile + sequences + 1;
}

/* Blocks of `kernel` tokens, `stride` apart, that end within the first `length` tokens: the
 * compressed keys of so many tokens, and what the query after them sees of them. */
RGK_BOTH int64_t rgk_blocks_in(int64_t length, int64_t kernel, int64_t stride) {
  return length < kernel ? 0 : (length - kernel) / stride + 1;
}

static inline uint32_t rgk_blocks(int64_t n, int64_t per) {
  return (uint32_t)((n + per - 1) / per);
}

#endif
