/* ops/cuda/csr.c: see csr.h. */
#include "csr.h"

static bool many(const rgk_csr *p) {
  return p->N > RGK_CSR_FEW;
}

rgk_csr rgi_csr_plan(const rgk_attn *a, rgi_cut *w) {
  enum { LEAST = 32 }; /* rows of a chunk: short ones keep the walk of a short pack short */
  rgk_csr p = {.idx = a->idx,
               .seqs = a->seqs,
               .kseqs = a->kseqs,
               .offset = a->offset,
               .T = a->T,
               .KH = a->KH,
               .N = a->N,
               .block = a->block};
  p.slots = rgk_slots(a->kseqs.rows, a->kseqs.n, a->block);
  if (many(&p)) {
    p.chunk = RGK_CSR_MANY_ROWS;
    /* dense parts are long, and end last: many, but a row is to have some entries in each */
    const int64_t most = p.N / 16 > RGK_CSR_PARTS ? p.N / 16 : RGK_CSR_PARTS;
    for (p.part = RGK_CSR_RANGE; (p.slots - 1) >> p.part > most;) p.part++;
    p.parts = (int32_t)(((p.slots - 1) >> p.part) + 1);
    p.bound = rgi_take(w, (size_t)(p.KH * p.T * (p.parts + 1)) * sizeof *p.bound);
  } else {
    int64_t chunk = 2 * p.slots / (a->N > 0 ? a->N : 1), most = (a->T + 31) / 32 * 32;
    if (chunk > most) chunk = most;
    if (chunk < LEAST) chunk = LEAST;
    p.chunk = (int32_t)((chunk + 31) / 32 * 32);
  }
  p.chunks = (a->T + p.chunk - 1) / p.chunk;
  p.start = rgi_take(w, (size_t)(p.KH * (p.slots + 1)) * sizeof *p.start);
  p.rows = rgi_take(w, (size_t)p.KH * (size_t)p.T * (size_t)p.N * sizeof *p.rows);
  p.count = rgi_take(w, (size_t)p.KH * (size_t)p.chunks * (size_t)p.slots * sizeof *p.count);
  return p;
}

static rg_status step(const rgk_csr *p, rg_cuda *x, const void *function, int64_t blocks,
                      uint32_t threads) {
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, 1, 1},
                                   .block = {threads, 1, 1},
                                   .params = p,
                                   .size = sizeof *p});
}

rg_status rgi_csr_steps(const rgk_csr *p, rg_cuda *x) {
  const int64_t few = p->KH * p->chunks, pieces = few * p->parts;
  if (many(p)) {
    RGI_TRY(step(p, x, rgk_csr_bounds(), rgk_blocks(p->KH * p->T, RGK_CSR_THREADS / 32),
                 RGK_CSR_THREADS));
    RGI_TRY(step(p, x, rgk_csr_tally(), pieces, RGK_CSR_MANY_ROWS));
  } else {
    RGI_TRY(step(p, x, rgk_csr_count(), few, RGK_CSR_THREADS));
  }
  RGI_TRY(step(p, x, rgk_csr_columns(), rgk_blocks(p->KH * p->slots, 32), RGK_CSR_SCAN_THREADS));
  RGI_TRY(step(p, x, rgk_csr_starts(), p->KH, RGK_CSR_SCAN_THREADS));
  if (many(p)) return step(p, x, rgk_csr_put(), pieces, RGK_CSR_MANY_ROWS);
  return step(p, x, rgk_csr_scatter(), few, 32);
}
