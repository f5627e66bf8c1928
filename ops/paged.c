/* ops/paged.c: what a serving step does to its caches before anything attends.

       sequence b, length 3 of context 6, page 4:

       position   0 1 2 3 │ 4 5          queries stand at positions 3, 4, 5: context − length + t
       page       pages[b][0] │ [1]      position p is row p % 4 of page pages[b][p / 4]

   paged_batch looks at every number that came from outside, once a step; the others read what it
   made. A sequence with a fault keeps its rows in the pack, so that its neighbours stay where they
   are, and has context 0: nobody reads or writes a page for it.
 */
#include "../graph/ir.h"
#include "../kernels/paged.h"
#include "cpu/rows.h"
#include "cuda/paged.h"

/* ---- paged_batch ---- */

static int32_t at(const rg_arg *a, int64_t i) {
  return ((const int32_t *)a->data)[i * a->stride[0]];
}

/* Says what is wrong with a sequence: which of kernels/paged.h's faults, the sequence, the number
 * and another. */
static rg_status tell_batch(const rg_call *c, const int32_t *n) {
  const rg_arg *pages = rg_in(c, RGI_BATCH_PAGES), *cache = rg_in(c, RGI_BATCH_CACHE);
  switch (n[0]) {
  case RGK_BATCH_CONTEXT:
    return rg_op_fail(c->error, RG_E_DATA, c,
                      "context[%d] is %d; expected 0 to %lld, %lld pages of %lld", n[1], n[2],
                      (long long)(pages->dim[1] * cache->dim[1]), (long long)pages->dim[1],
                      (long long)cache->dim[1]);
  case RGK_BATCH_LENGTH:
    return rg_op_fail(c->error, RG_E_DATA, c, "lengths[%d] is %d; expected 0 to %d, its context",
                      n[1], n[2], n[3]);
  case RGK_BATCH_ROWS:
    return rg_op_fail(c->error, RG_E_DATA, c,
                      "lengths[%d] is %d, and only %d of %lld rows are left for it", n[1], n[2],
                      n[3], (long long)rg_in(c, RGI_BATCH_ROWS)->dim[0]);
  default:
    return rg_op_fail(c->error, RG_E_DATA, c, "pages[%d][%d] is %d; expected a page, 0 to %lld",
                      n[1], n[3], n[2], (long long)cache->dim[0] - 1);
  }
}

/* Is all well with sequence b, whose rows would start at `start`? Otherwise says what is not. */
static bool sound(const rg_call *c, int64_t b, int64_t start) {
  const rg_arg *pages = rg_in(c, RGI_BATCH_PAGES), *cache = rg_in(c, RGI_BATCH_CACHE);
  const int32_t length = at(rg_in(c, RGI_BATCH_LENGTHS), b),
                context = at(rg_in(c, RGI_BATCH_CONTEXT), b);
  const int64_t left = rg_in(c, RGI_BATCH_ROWS)->dim[0] - start, page = cache->dim[1];
  int32_t fault[] = {0, (int32_t)b, length, 0};
  if (context < 0 || context > pages->dim[1] * page) {
    fault[0] = RGK_BATCH_CONTEXT, fault[2] = context;
  } else if (length < 0 || length > context) {
    fault[0] = RGK_BATCH_LENGTH, fault[3] = context;
  } else if (length > left) {
    fault[0] = RGK_BATCH_ROWS, fault[3] = (int32_t)left;
  }
  const int32_t *table = (const int32_t *)pages->data + b * pages->stride[0];
  for (int64_t m = 0; !fault[0] && m * page < context; m++)
    if (table[m] < 0 || table[m] >= cache->dim[0])
      fault[0] = RGK_BATCH_PAGE, fault[2] = table[m], fault[3] = (int32_t)m;
  if (fault[0]) tell_batch(c, fault);
  return !fault[0];
}

static rg_status run_batch(const rg_call *c) {
  const rg_arg *pages = rg_in(c, RGI_BATCH_PAGES);
  const int64_t B = pages->dim[0], M = pages->dim[1], rows = rg_in(c, RGI_BATCH_ROWS)->dim[0],
                page = rg_in(c, RGI_BATCH_CACHE)->dim[1];
  int32_t *starts = rg_out(c, RGI_BATCH_STARTS)->data, *offset = rg_out(c, RGI_BATCH_OFFSET)->data,
          *context = rg_out(c, RGI_BATCH_CHECKED)->data, *last = rg_out(c, RGI_BATCH_LAST)->data;
  starts[0] = 0;
  for (int64_t b = 0; b < B; b++) {
    const bool good = sound(c, b, starts[b]);
    const int64_t left = rows - starts[b];
    int64_t length = at(rg_in(c, RGI_BATCH_LENGTHS), b);
    length = length < 0 ? 0 : length > left ? left : length;
    starts[b + 1] = (int32_t)(starts[b] + length);
    context[b] = good ? at(rg_in(c, RGI_BATCH_CONTEXT), b) : 0;
    offset[b] = good ? (int32_t)(context[b] - length) : 0;
    last[b] = good && length ? (int32_t)(starts[b + 1] - 1) : -1;
    const int32_t *from = (const int32_t *)pages->data + b * pages->stride[0];
    int32_t *to =
        (int32_t *)rg_out(c, RGI_BATCH_TABLE)->data + b * rg_out(c, RGI_BATCH_TABLE)->stride[0];
    for (int64_t m = 0; m < M; m++) to[m] = m * page < context[b] ? from[m] : -1;
  }
  return RG_OK;
}

static void cost_batch(const rg_call *c, rg_cost *out) {
  const rg_arg *pages = rg_in(c, RGI_BATCH_PAGES);
  *out = (rg_cost){.bytes = 8 * (double)pages->dim[0] * ((double)pages->dim[1] + 3)};
}

static rg_status check_batch(const rg_call *c, rg_error *e) {
  const rg_arg *rows = rg_in(c, RGI_BATCH_ROWS);
  if (rows->rank < 1) return rg_op_fail(e, RG_E_RANK, c, "'rows' is a scalar; expected rows");
  if (rows->dim[0] > INT32_MAX)
    return rg_op_fail(e, RG_E_LIMIT, c, "%lld rows; at most 2^31 - 1 are possible",
                      (long long)rows->dim[0]);
  return RG_OK;
}

#define ANY RG_D_FLOAT | RG_D(RG_I32)
#define I32 RG_D(RG_I32)
static const rg_port batch_in[] = {
    {"rows", "*", 0, ANY, 0, -1, "any tensor with a row for each token of the step"},
    {"cache", "P,page,KH,D", 0, RG_D_FLOAT, 0, -1, "a cache that the tables are for"},
    {"lengths", "B", 0, I32, 0, -1, "tokens of each sequence in this step, packed in this order"},
    {"context", "B", 0, I32, 0, -1, "tokens of each sequence so far, these included"},
    {"pages", "B,M", 0, I32, 0, -1, "each sequence's pages, in order"},
};
static const rg_port batch_out[] = {
    {"cu_seqlens", "B+1", 0, I32, 0, -1, "starts of the sequences"},
    {"offset", "B", 0, I32, 0, -1, "position of each sequence's first row of this step"},
    {"context", "B", 0, I32, 0, -1, "context, 0 for a sequence with a fault"},
    {"pages", "B,M", 0, I32, 0, -1, "pages in use, the others -1"},
    {"last", "B", 0, I32, 0, -1, "row of each sequence's last token, or -1"},
};
const rg_op rgi_op_paged_batch = {
    .abi = RG_OP_ABI,
    .name = "paged_batch",
    .doc = "checks a serving step's lengths and page tables",
    .in = batch_in,
    .nin = RGI_COUNT(batch_in),
    .out = batch_out,
    .nout = RGI_COUNT(batch_out),
    .check = check_batch,
    .cost = cost_batch,
    .run_cpu = run_batch,
    .cuda_steps = rgi_cuda_paged_batch,
    .cuda_path = rgi_cuda_paged_path,
    .rules = &(const rgi_rules){.fault = tell_batch,
                                .fusing = &(const rgi_fusing){.with = "page_copy",
                                                              .link = "cache",
                                                              .joined = "copy_batch",
                                                              .joins = rgi_cuda_copy_batch_takes}}};

/* ---- kv_append ---- */

/* One row of one head, rounded to the cache's dtype. */
static void put(const rg_arg *from, int64_t row, const rg_arg *cache, int64_t page, int64_t slot) {
  float piece[RGI_PIECE];
  const int64_t size = (int64_t)rg_dtype_size(cache->dtype), D = from->dim[2];
  for (int64_t h = 0; h < from->dim[1]; h++) {
    const char *x = rgi_at(from, row, h);
    char *y = (char *)cache->data +
              (page * cache->stride[0] + slot * cache->stride[1] + h * cache->stride[2]) * size;
    if (from->dtype == cache->dtype) {
      memcpy(y, x, (size_t)(D * size));
      continue;
    }
    for (int64_t d = 0; d < D; d += RGI_PIECE) {
      const int64_t n = D - d < RGI_PIECE ? D - d : RGI_PIECE;
      rgi_load(piece, from->dtype, x + d * (int64_t)rg_dtype_size(from->dtype), n);
      rgi_store(y + d * size, cache->dtype, piece, n);
    }
  }
}

static void append_row(void *arg, int64_t row, int thread) {
  const rg_call *c = arg;
  const rg_arg *starts = rg_in(c, RGI_APPEND_STARTS), *pages = rg_in(c, RGI_APPEND_PAGES),
               *k = rg_out(c, 0), *v = rg_out(c, 1);
  const int32_t *cu = starts->data;
  const int64_t b = rgi_sequence_of(cu, starts->dim[0] - 1, row),
                context = at(rg_in(c, RGI_APPEND_CONTEXT), b), position = context - cu[b + 1] + row;
  (void)thread;
  /* what paged_batch would have refused is not written either */
  if (context <= 0 || position < 0 || position / k->dim[1] >= pages->dim[1]) return;
  const int64_t page = ((const int32_t *)pages->data)[b * pages->stride[0] + position / k->dim[1]];
  if (page < 0 || page >= k->dim[0]) return;
  put(rg_in(c, RGI_APPEND_K), row, k, page, position % k->dim[1]);
  put(rg_in(c, RGI_APPEND_V), row, v, page, position % k->dim[1]);
}

static rg_status run_append(const rg_call *c) {
  const int64_t rows = rgi_live_rows(rg_in(c, RGI_APPEND_STARTS), 0);
  c->parallel(c->pool, rows, append_row, (void *)c);
  return RG_OK;
}

static void cost_append(const rg_call *c, rg_cost *out) {
  double bytes = 0;
  for (int p = RGI_APPEND_K; p <= RGI_APPEND_V; p++) {
    const rg_arg *x = rg_in(c, p),
                 *y = rg_in(c, p == RGI_APPEND_K ? RGI_APPEND_K_CACHE : RGI_APPEND_V_CACHE);
    bytes += (double)x->dim[0] * (double)x->dim[1] * (double)x->dim[2] *
             (double)(rg_dtype_size(x->dtype) + rg_dtype_size(y->dtype));
  }
  *out = (rg_cost){.bytes = bytes};
}

static const rg_port append_in[] = {
    {"k", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "keys of this step"},
    {"v", "T,KH,DV", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "values of this step"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, I32, 0, -1, "starts of the sequences"},
    RGI_PAGED_IN,
    {"k_cache", "P,page,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "keys in pages"},
    {"v_cache", "P,page,KH,DV", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "values in pages"},
};
static const rg_port append_out[] = {
    {"k_cache", "P,page,KH,D", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with this step's"},
    {"v_cache", "P,page,KH,DV", RG_PORT_STATE, RG_D_FLOAT, 'C', -1, "the same with this step's"},
};
const rg_op rgi_op_kv_append = {.abi = RG_OP_ABI,
                                .name = "kv_append",
                                .doc = "a step's keys and values into the pages of their positions",
                                .flags = RG_OP_STATE,
                                .in = append_in,
                                .nin = RGI_COUNT(append_in),
                                .out = append_out,
                                .nout = RGI_COUNT(append_out),
                                .cost = cost_append,
                                .run_cpu = run_append,
                                .cuda_steps = rgi_cuda_kv_append,
                                .cuda_path = rgi_cuda_kv_append_path};
