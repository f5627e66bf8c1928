/* kernels/attn/decode_wide_sm90.cuh: tokens whose choice fp32 sums do not decide, ranked by those
   who rank, by fp64 sums: seldom, and slowly. */
#pragma once
#include "decode_load_sm90.cuh"

namespace rgk {
namespace decode {

/* By THREADS, who meet at named barrier `barrier`: the `keep` best blocks by fp64 sums, in the
 * order of topk_plain.cu's, to `best`. entry: room for one of each block; part: of two sums in
 * turn. */
template <class T, int THREADS>
__device__ __noinline__ void
choose_wide(const rgk_decode &d, const job *of, const rgk_topk_choice *choice, int visible,
            unsigned long long *entry, unsigned long long *part, int2 *best, int barrier) {
  const rgk_topk &p = d.topk;
  const rgk_pages &g = d.f.pages;
  const job j = *of;
  const rgk_topk_choice c = *choice;
  const int tid = (int)threadIdx.x % THREADS, b0 = (int)c.free0, n = (int)(c.free1 - c.free0),
            kv_head = rgk_over(j.head, d.f.f.by_group);
  const int32_t *const table = g.table + find_seq(d.f.f.seqs, j.token) * g.table_row;
  const T *const q = (const T *)p.q.data + (int64_t)j.token * p.q.row;
  const float *const lse = (const float *)d.f.f.lse.data + (int64_t)j.token * d.f.f.lse.row;
  for (int i = tid; i < n; i += THREADS) {
    double score = 0;
    for (int r = 0; r <= RGK_DECODE_BLOCK; r++) {
      const int row = RGK_DECODE_BLOCK * (b0 + i) + r;
      if (row < d.f.f.before || row >= visible) continue;
      const int m = rgk_over(row, d.f.by_rows);
      const uint32_t page = (uint32_t)table[m];
      const T *const k = (const T *)p.k.data + (int64_t)page * g.k_page +
                         (row - m * g.rows) * p.k.row + kv_head * p.k.head;
      double sum = 0;
      for (int h = j.head; h < j.head + HEADS; h++) {
        float x = 0;
        for (int e = 0; e < p.D && page < (uint32_t)g.count; e++)
          x = fmaf((float)q[h * p.q.head + e], (float)k[e], x);
        const float at = __fmul_rn(x, p.scale);
        sum += exp((double)at - (double)__ldcg(lse + h * d.f.f.lse.head) + 300.0);
      }
      score += sum * (r % RGK_DECODE_BLOCK ? 2 : 1);
    }
    entry[i] = wide_entry(score, b0 + i);
  }
  unsigned long long last = ~0ull;
  for (int x = 0; x < c.keep; x++) {
    unsigned long long most = 0;
    for (int i = tid; i < n; i += THREADS) /* this thread's own */
      if (entry[i] < last && entry[i] > most) most = entry[i];
    for (int i = 16; i > 0; i /= 2) {
      const unsigned long long y = __shfl_xor_sync(~0u, most, i);
      most = y > most ? y : most;
    }
    unsigned long long *const mine = part + x % 2 * (THREADS / 32);
    if (tid % 32 == 0) mine[tid / 32] = most;
    named_sync(barrier, THREADS);
    for (int w = 0; w < THREADS / 32; w++) most = mine[w] > most ? mine[w] : most;
    last = most;
    if (tid == 0) best[x] = make_int2(0, wide_block(most));
  }
  named_sync(barrier, THREADS);
}

} // namespace decode
} // namespace rgk
