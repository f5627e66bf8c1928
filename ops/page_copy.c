/* ops/page_copy.c: pages of caches copied to others, where sequences that shared one part ways.

       pages  = [[7, 2], [-1, -1]]      page 2 := page 7; an entry of two -1 is none

   A list that is wrong anywhere copies nothing: a page outside of the caches, a page written twice,
   a page written that another entry reads.
 */
#include "../graph/ir.h"
#include "../kernels/paged.h"
#include "cuda/paged.h"

static rg_status check(const rg_call *c, rg_error *e) {
  const rg_arg *first = rgi_in_at(c, RGI_COPY_CACHE, 0);
  for (int i = 0; i < rg_in_count(c, RGI_COPY_CACHE); i++) {
    const rg_arg *x = rgi_in_at(c, RGI_COPY_CACHE, i);
    if (x->rank < 2)
      return rg_op_fail(e, RG_E_RANK, c, "cache %d has %d axes; expected pages and what is in them",
                        i, x->rank);
    if (x->dim[0] != RG_DIM_FREE && first->dim[0] != RG_DIM_FREE && x->dim[0] != first->dim[0])
      return rg_op_fail(e, RG_E_SHAPE, c, "cache %d has %lld pages, the first has %lld", i,
                        (long long)x->dim[0], (long long)first->dim[0]);
  }
  return RG_OK;
}

static double page_bytes(const rg_call *c) {
  double bytes = 0;
  for (int i = 0; i < rg_in_count(c, RGI_COPY_CACHE); i++) {
    const rg_arg *x = rgi_in_at(c, RGI_COPY_CACHE, i);
    double n = (double)rg_dtype_size(x->dtype);
    for (int a = 1; a < x->rank; a++) n *= (double)x->dim[a];
    bytes += n;
  }
  return bytes;
}

static void cost(const rg_call *c, rg_cost *out) {
  const double n = (double)rg_in(c, RGI_COPY_PAGES)->dim[0];
  *out = (rg_cost){.bytes = n * (2 * page_bytes(c) + 8)};
}

static const int32_t *entry(const rg_arg *pages, int64_t i) {
  return (const int32_t *)pages->data + i * pages->stride[0];
}

/* Says what is wrong with the list: which of kernels/paged.h's faults, the entry, the page and what
 * goes with it. */
static rg_status tell(const rg_call *c, const int32_t *n) {
  if (n[0] == RGK_COPY_PAGE)
    return rg_op_fail(c->error, RG_E_DATA, c,
                      "pages[%d][%d] is %d; expected a page, 0 to %lld, or two -1", n[1], n[3],
                      n[2], (long long)rgi_in_at(c, RGI_COPY_CACHE, 0)->dim[0] - 1);
  return rg_op_fail(c->error, RG_E_DATA, c, "pages[%d] writes page %d, which pages[%d] %s", n[1],
                    n[2], n[3], n[0] == RGK_COPY_WRITES ? "writes, too" : "reads");
}

static rg_status check_entry(const rg_call *c, int64_t i) {
  const rg_arg *pages = rg_in(c, RGI_COPY_PAGES);
  const int64_t most = rgi_in_at(c, RGI_COPY_CACHE, 0)->dim[0];
  const int32_t *x = entry(pages, i);
  if (x[0] == -1 && x[1] == -1) return RG_OK;
  for (int k = 0; k < 2; k++)
    if (x[k] < 0 || x[k] >= most)
      return tell(c, (const int32_t[]){RGK_COPY_PAGE, (int32_t)i, x[k], k});
  for (int64_t j = 0; j < pages->dim[0]; j++) {
    const int32_t *y = entry(pages, j);
    if (j != i && (y[1] == x[1] || y[0] == x[1]))
      return tell(c, (const int32_t[]){y[1] == x[1] ? RGK_COPY_WRITES : RGK_COPY_READS, (int32_t)i,
                                       x[1], (int32_t)j});
  }
  return RG_OK;
}

static void copy(const rg_arg *x, int axis, const char *from, char *to) {
  const size_t size = rg_dtype_size(x->dtype);
  if (axis == x->rank - 1) {
    memcpy(to, from, (size_t)x->dim[axis] * size);
    return;
  }
  const int64_t step = x->stride[axis] * (int64_t)size;
  for (int64_t i = 0; i < x->dim[axis]; i++) copy(x, axis + 1, from + i * step, to + i * step);
}

/* Task: one entry in one cache. */
static void copy_page(void *arg, int64_t task, int thread) {
  const rg_call *c = arg;
  const int caches = rg_in_count(c, RGI_COPY_CACHE);
  const int32_t *x = entry(rg_in(c, RGI_COPY_PAGES), task / caches);
  const rg_arg *cache = rgi_out_at(c, 0, (int)(task % caches));
  (void)thread;
  if (x[0] == x[1]) return; /* none, or itself */
  const int64_t step = cache->stride[0] * (int64_t)rg_dtype_size(cache->dtype);
  copy(cache, 1, (const char *)cache->data + x[0] * step, (char *)cache->data + x[1] * step);
}

static rg_status run(const rg_call *c) {
  const int64_t n = rg_in(c, RGI_COPY_PAGES)->dim[0];
  for (int64_t i = 0; i < n; i++) RGI_TRY(check_entry(c, i));
  c->parallel(c->pool, n * rg_in_count(c, RGI_COPY_CACHE), copy_page, (void *)c);
  return RG_OK;
}

static size_t workspace(const rg_call *c) {
  return c->gpu ? rgi_cuda_page_copy_workspace(c) : 0;
}

static const rg_port in[] = {
    {"cache", "*", RG_PORT_LIST | RG_PORT_STATE, RG_D_FLOAT | RG_D(RG_I32), 0, -1,
     "caches, axis 0 counts pages"},
    {"pages", "N,2", 0, RG_D(RG_I32), 0, -1, "source and target of each copy, or -1 and -1"},
};
static const rg_port out[] = {
    {"cache", "*", RG_PORT_LIST | RG_PORT_STATE, RG_D_FLOAT | RG_D(RG_I32), 0, -1,
     "the caches with those pages copied"},
};
const rg_op rgi_op_page_copy = {.abi = RG_OP_ABI,
                                .name = "page_copy",
                                .doc = "copies pages of caches to other pages (copy on write)",
                                .flags = RG_OP_STATE,
                                .in = in,
                                .nin = RGI_COUNT(in),
                                .out = out,
                                .nout = RGI_COUNT(out),
                                .check = check,
                                .cost = cost,
                                .workspace = workspace,
                                .run_cpu = run,
                                .cuda_steps = rgi_cuda_page_copy,
                                .cuda_path = rgi_cuda_paged_path,
                                .rules = &(const rgi_rules){.fault = tell}};
