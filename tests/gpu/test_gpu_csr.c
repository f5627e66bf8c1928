/* tests/gpu/test_gpu_csr.c: the inversion of a selection, list by list, against the obvious
 * loop. */
#include "../harness/num.h"
#include "../harness/optest_internal.h"
#include <criterion/criterion.h>

#ifdef REGRAPH_CUDA
#include "exec/cuda.h"
#include "ops/cuda/csr.h"
#include <stdlib.h>

typedef struct shape {
  int B;
  const int32_t *length, *length_k, *offset;
  int KH, N, block;
  bool garbage;
} shape;

static void *on_device(const void *host, size_t bytes) {
  void *p;
  cr_assert(cudaMalloc(&p, bytes + 1) == cudaSuccess);
  if (host) cr_assert(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice) == cudaSuccess);
  return p;
}

/* Ascending random blocks, or anything at all. */
static void fill_row(ot *t, const shape *x, int64_t pos, int64_t n, int32_t *row) {
  int64_t last = (pos < n - 1 ? pos : n - 1) / x->block, at = 0;
  for (int i = 0; i < x->N; i++) row[i] = x->garbage ? (int32_t)ot_below(t, last + 4) - 2 : -1;
  for (int64_t b = 0; n > 0 && b <= last && at < x->N && !x->garbage; b++)
    if (ot_below(t, last - b + 1) < x->N - at) row[at++] = (int32_t)b;
  if (x->garbage && x->N > 2 && ot_below(t, 7) == 0) row[1] = INT32_MAX, row[2] = INT32_MIN;
}

static void check(uint64_t seed, shape x) {
  if (!ot_on_gpu()) cr_skip_test("needs REGRAPH_TEST_DEVICE=cuda");
  ot *t = ot_begin(seed);
  num_pack p = num_pack_new(t, x.B, x.length, 9);
  num_pack pk = x.length_k ? num_pack_new(t, x.B, x.length_k, 5) : p;
  /* rows that can be read 16 bytes at a time, if N is a multiple of four, and others */
  const int64_t pad = seed % 3 ? 3 : 4, head = x.N + pad, row_stride = x.KH * head + pad;
  int32_t *idx = ot_ints(t, p.T * row_stride + 1);
  for (int64_t i = p.live; i < p.T; i++)
    for (int64_t j = 0; j < row_stride; j++) idx[i * row_stride + j] = INT32_MAX;
  for (int b = 0; b < x.B; b++)
    for (int64_t i = p.cu[b]; i < p.cu[b + 1]; i++)
      for (int h = 0; h < x.KH; h++)
        fill_row(t, &x, i - p.cu[b] + (x.offset ? x.offset[b] : 0), pk.cu[b + 1] - pk.cu[b],
                 idx + i * row_stride + h * head);

  void *d_idx = on_device(idx, (size_t)(p.T * row_stride) * 4);
  void *d_cu = on_device(p.cu, (size_t)(x.B + 1) * 4),
       *d_cuk = on_device(pk.cu, (size_t)(x.B + 1) * 4);
  void *d_offset = x.offset ? on_device(x.offset, (size_t)x.B * 4) : NULL;
  rgk_attn a = {.mode = RGK_SLC, .KH = x.KH, .N = x.N, .block = x.block, .T = p.T, .S = pk.T};
  a.seqs = (rgk_seqs){.starts = d_cu, .n = x.B, .rows = p.T};
  a.kseqs = (rgk_seqs){.starts = d_cuk, .n = x.B, .rows = pk.T};
  a.offset = d_offset;
  a.idx = (rgk_tensor){.data = d_idx, .row = row_stride, .head = head, .dtype = RG_I32};
  rgi_cut size = {0};
  rgk_csr csr = rgi_csr_plan(&a, &size);
  rgi_cut w = {.base = on_device(NULL, size.used)};
  csr = rgi_csr_plan(&a, &w);
  uint16_t *places =
      seed % 2 ? NULL : /* not wanted */ on_device(NULL, (size_t)(x.KH * p.T * x.N) * 2);
  csr.places = places;
  cr_assert(cudaMemset(w.base, 0x7b, w.used) == cudaSuccess);

  rg_error e = {0};
  rgi_cuda_eager run;
  rgi_cuda_eager_init(&run, 0, &e);
  cr_assert(rgi_csr_steps(&csr, &run.base) == RG_OK, "%s", e.message);
  cr_assert(cudaDeviceSynchronize() == cudaSuccess);
  rgi_cuda_eager_done(&run);
  int64_t *start = ot_alloc(t, (size_t)(x.KH * (csr.slots + 1)) * 8);
  int32_t *rows = ot_ints(t, x.KH * p.T * x.N + 1);
  cr_assert(cudaMemcpy(start, csr.start, (size_t)(x.KH * (csr.slots + 1)) * 8,
                       cudaMemcpyDeviceToHost) == cudaSuccess);
  cr_assert(cudaMemcpy(rows, csr.rows, (size_t)(x.KH * p.T * x.N) * 4, cudaMemcpyDeviceToHost) ==
            cudaSuccess);

  uint16_t *places_were = ot_alloc(t, (size_t)(x.KH * p.T * x.N) * 2 + 2);
  cr_assert(!places || cudaMemcpy(places_were, places, (size_t)(x.KH * p.T * x.N) * 2,
                                  cudaMemcpyDeviceToHost) == cudaSuccess);

  int32_t *want = ot_ints(t, p.T + 1), *place = ot_ints(t, p.T + 1);
  for (int h = 0; h < x.KH; h++) {
    int64_t at = 0;
    for (int64_t s = 0; s < csr.slots; s++) {
      int64_t n = 0;
      for (int b = 0; b < x.B; b++) {
        const int64_t j = s - pk.cu[b] / x.block - b, keys = pk.cu[b + 1] - pk.cu[b];
        if (j < 0 || j * x.block >= keys) continue;
        for (int64_t i = p.cu[b]; i < p.cu[b + 1]; i++) {
          const int32_t *row = idx + i * row_stride + h * head;
          int64_t before = -1, pos = i - p.cu[b] + (x.offset ? x.offset[b] : 0);
          for (int k = 0; k < x.N; k++) {
            if (row[k] <= before) continue;
            before = row[k];
            if (row[k] == j && j * x.block <= pos) place[n] = k, want[n++] = (int32_t)i;
          }
        }
      }
      cr_assert(start[h * (csr.slots + 1) + s] == at, "head %d, block %d starts at %lld, not %lld",
                h, (int)s, (long long)start[h * (csr.slots + 1) + s], (long long)at);
      for (int64_t i = 0; i < n; i++) {
        const int64_t e = h * p.T * x.N + at + i;
        cr_assert(rows[e] == want[i], "head %d, block %d, place %d", h, (int)s, (int)i);
        cr_assert(!places || places_were[e] == place[i], "head %d, block %d, entry %d: %d, not %d",
                  h, (int)s, (int)i, places_were[e], place[i]);
      }
      at += n;
    }
    cr_assert(start[h * (csr.slots + 1) + csr.slots] == at);
  }
  void *own[] = {d_idx, d_cu, d_cuk, d_offset, w.base, places};
  for (int i = 0; i < 6; i++) cudaFree(own[i]);
  ot_end(t);
}

static const int32_t odd[] = {70, 0, 1, 130, 33, 0, 507, 64},
                     longer[] = {90, 5, 0, 130, 64, 3, 600, 64},
                     offset[] = {20, 0, 4, 0, 31, 7, 93, 0}, one[] = {3000}, late[] = {600},
                     before_late[] = {9000}, at_late[] = {8400};

Test(gpu_csr, packs) {
  for (int n = 0; n < 2; n++) {
    check(1, (shape){8, odd, NULL, NULL, 1, 4, 16, n});
    check(2, (shape){8, odd, NULL, NULL, 3, 5, 7, n});
    check(3, (shape){8, odd, longer, offset, 2, 16, 32, n});
    check(4, (shape){8, odd, longer, NULL, 1, 40, 4, n});
    check(5, (shape){8, odd, NULL, NULL, 1, 1, 1000000, n});
    check(6, (shape){0, odd, NULL, NULL, 2, 4, 16, n});
    check(10, (shape){8, odd, longer, offset, 2, 33, 1, n});
    check(11, (shape){8, odd, longer, offset, 3, 100, 3, n});
  }
}
Test(gpu_csr, one_sequence) {
  for (int n = 0; n < 2; n++) {
    check(7, (shape){1, one, NULL, NULL, 2, 16, 64, n});
    check(8, (shape){1, one, NULL, NULL, 1, 70, 8, n});
    check(9, (shape){1, one, NULL, NULL, 1, 3, 1, n});
    check(12, (shape){1, one, NULL, NULL, 2, 200, 1, n});
    check(13, (shape){1, late, before_late, at_late, 2, 100, 1, n});
    check(18, (shape){1, late, before_late, at_late, 2, 100, 1, n});
  }
}
#endif
