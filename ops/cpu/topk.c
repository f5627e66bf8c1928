/* ops/cpu/topk.c: the score kernels of topk, once per CPU level; see topk.h. */
#include "topk.h"
#include "rows.h"

/* Sums live in registers only if the loops over them are written out. */
#if defined(__clang__)
#define TK_UNROLL _Pragma("unroll")
#else
#define TK_UNROLL _Pragma("GCC unroll 16")
#endif

#define TK_NAME(x) x##_base
#define TK_TARGET
#define TK_BYTES 16
#define TK_KEYS  6 /* × 2 vectors: 12 of 16 registers hold sums */
#define TK_ISA   0
#define TK_CLEAR (void)0
#include "topk_simd.h"

#if defined(__x86_64__)
#define TK_NAME(x) x##_avx2
#define TK_TARGET  __attribute__((target("avx2,fma,f16c")))
#define TK_BYTES   32
#define TK_KEYS    6
#define TK_ISA     1
#define TK_CLEAR   __builtin_ia32_vzeroupper()
#include "topk_simd.h"

#define TK_NAME(x) x##_avx512
#define TK_TARGET  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define TK_BYTES   64
#define TK_KEYS    12 /* × 2 vectors: 24 of 32 registers */
#define TK_ISA     2
#define TK_CLEAR   __builtin_ia32_vzeroupper()
#include "topk_simd.h"
#endif

rgi_topk_scores rgi_topk_scores_for(int isa) {
#if defined(__x86_64__)
  if (isa >= 2) return (rgi_topk_scores){fast_avx512, wide_avx512, dot_avx512, relu_avx512};
  if (isa == 1) return (rgi_topk_scores){fast_avx2, wide_avx2, dot_avx2, relu_avx2};
#endif
  (void)isa;
  return (rgi_topk_scores){fast_base, wide_base, dot_base, relu_base};
}
