/* ops/cuda/paged.c: see paged.h. */
#include "paged.h"
#include "../../kernels/paged.h"
#include "../compress.h"
#include "gemm.h"

rgk_pages rgi_cuda_pages(const rg_arg *context, const rg_arg *table, const rg_arg *k,
                         const rg_arg *v, int64_t stride, int64_t before) {
  return (rgk_pages){.context = context->data,
                     .table = table->data,
                     .context_step = context->stride[0],
                     .table_row = table->stride[0],
                     .tokens = (int32_t)(k->dim[1] * stride),
                     .rows = (int32_t)k->dim[1],
                     .most = (int32_t)table->dim[1],
                     .count = (int32_t)k->dim[0],
                     .before = (int32_t)before,
                     .k_page = k->stride[0],
                     .v_page = v ? v->stride[0] : 0};
}

static rg_status launch(rg_cuda *x, const void *function, int64_t blocks, uint32_t y, uint32_t z,
                        uint32_t threads, const void *params, size_t size) {
  if (blocks > INT32_MAX)
    return rgi_fail(x->error, RG_E_LIMIT, NULL, NULL, "a serving step needs too large a grid");
  return x->launch(x, &(rg_launch){.function = function,
                                   .grid = {(uint32_t)blocks, y, z},
                                   .block = {threads, 1, 1},
                                   .params = params,
                                   .size = size});
}

const char *rgi_cuda_paged_path(const rg_call *c) {
  (void)c;
  return "plain";
}

/* ---- paged_batch ---- */

static rgk_batch batch_of(const rg_call *c) {
  const rg_arg *cache = rg_in(c, RGI_BATCH_CACHE), *lengths = rg_in(c, RGI_BATCH_LENGTHS),
               *table = rg_out(c, RGI_BATCH_TABLE);
  return (rgk_batch){.pages = rgi_cuda_pages(rg_in(c, RGI_BATCH_CONTEXT), rg_in(c, RGI_BATCH_PAGES),
                                             cache, NULL, 1, 0),
                     .lengths = lengths->data,
                     .lengths_step = lengths->stride[0],
                     .rows = rg_in(c, RGI_BATCH_ROWS)->dim[0],
                     .n = lengths->dim[0],
                     .starts = rg_out(c, RGI_BATCH_STARTS)->data,
                     .offset = rg_out(c, RGI_BATCH_OFFSET)->data,
                     .context = rg_out(c, RGI_BATCH_CHECKED)->data,
                     .last = rg_out(c, RGI_BATCH_LAST)->data,
                     .table = table->data,
                     .table_row = table->stride[0],
                     .fault = rgk_fault_of(c)};
}

rg_status rgi_cuda_paged_batch(const rg_call *c, rg_cuda *x) {
  const rgk_batch p = batch_of(c);
  return launch(x, rgk_paged_batch(), p.n > 0 ? p.n : 1, 1, 1, RGK_BATCH_THREADS, &p, sizeof p);
}

/* ---- kv_append ---- */

/* May rows of a cache [P, rows, heads, width] be moved 16 bytes at a time, and those of `from`? */
static bool moved16(const rg_arg *from, const rg_arg *cache) {
  return from->dtype == cache->dtype && rgi_gemm_vec(from, from->dim[2]) &&
         rgi_gemm_vec(cache, cache->dim[3]);
}

static void append_of(const rg_call *c, rgk_append *p) {
  const rg_arg *k = rg_in(c, RGI_APPEND_K), *v = rg_in(c, RGI_APPEND_V), *kc = rg_out(c, 0),
               *vc = rg_out(c, 1);
  p->seqs = rgk_seqs_of(rg_in(c, RGI_APPEND_STARTS), k->dim[0]);
  p->pages = rgi_cuda_pages(rg_in(c, RGI_APPEND_CONTEXT), rg_in(c, RGI_APPEND_PAGES), kc, vc, 1, 0);
  p->k = rgk_of(k), p->v = rgk_of(v);
  p->k_cache = rgk_page_of(kc), p->v_cache = rgk_page_of(vc);
  p->heads = (int32_t)k->dim[1], p->D = (int32_t)k->dim[2], p->E = (int32_t)v->dim[2];
  p->by_tokens = rgk_divide_by(p->pages.tokens);
  p->k_vec = moved16(k, kc), p->v_vec = moved16(v, vc);
}

rg_status rgi_cuda_kv_append(const rg_call *c, rg_cuda *x) {
  const rg_arg *k = rg_in(c, RGI_APPEND_K);
  rgk_append p;
  memset(&p, 0, sizeof p); /* holes too: launches are compared byte by byte */
  append_of(c, &p);
  if (k->dim[0] == 0) return RG_OK;
  return launch(x, rgk_kv_append(), rgk_blocks(k->dim[0], RGK_APPEND_THREADS / 32), 1, 1,
                RGK_APPEND_THREADS, &p, sizeof p);
}

const char *rgi_cuda_kv_append_path(const rg_call *c) {
  return moved16(rg_in(c, RGI_APPEND_K), rg_in(c, RGI_APPEND_K_CACHE)) &&
                 moved16(rg_in(c, RGI_APPEND_V), rg_in(c, RGI_APPEND_V_CACHE))
             ? "16-byte vectors"
             : "plain: types or alignment";
}

/* ---- kv_compress ----

   workspace | blocks' tokens side by side | products | table |      of one side after the other
 */

/* Slots that any lengths can take. */
static int64_t slots_of(const rg_call *c) {
  const rg_arg *k = rg_in(c, RGI_KVC_K_CACHE), *pages = rg_in(c, RGI_KVC_PAGES),
               *rows = rg_in(c, RGI_KVC_ROWS);
  int64_t tokens = pages->dim[0] * pages->dim[1] * k->dim[1];
  if (k->dim[0] * k->dim[1] < tokens) tokens = k->dim[0] * k->dim[1];
  if (rows && rows->rank > 0 && rows->dim[0] < tokens) tokens = rows->dim[0];
  return rgk_slots(tokens, pages->dim[0], c->attr[RGI_CMP_STRIDE].i);
}

static rgk_new_blocks blocks_of(const rg_call *c) {
  const int64_t kernel = c->attr[RGI_CMP_KERNEL].i, stride = c->attr[RGI_CMP_STRIDE].i;
  rgk_new_blocks b = {.seqs = rgk_seqs_of(rg_in(c, RGI_KVC_CU), 0),
                      .pages =
                          rgi_cuda_pages(rg_in(c, RGI_KVC_CONTEXT), rg_in(c, RGI_KVC_PAGES),
                                         rg_in(c, RGI_KVC_K_CACHE), NULL, 1, kernel / stride - 1),
                      .kernel = (int32_t)kernel,
                      .stride = (int32_t)stride};
  b.pages.rows = (int32_t)rg_in(c, RGI_KVC_K_CMP)->dim[1];
  b.by_stride = rgk_divide_by(b.stride);
  b.by_tokens = rgk_divide_by(b.pages.tokens);
  b.by_rows = rgk_divide_by(b.pages.rows);
  return b;
}

static rgk_paged_side side_of(const rg_call *c, int i) {
  const rg_arg *x = rg_in(c, RGI_KVC_K_CACHE + i), *y = rg_in(c, RGI_KVC_K_CMP + i);
  return (rgk_paged_side){.x = rgk_page_of(x),
                          .y = rgk_page_of(y),
                          .x_page = x->stride[0],
                          .y_page = y->stride[0],
                          .heads = (int32_t)x->dim[2],
                          .width = (int32_t)x->dim[3]};
}

static bool side_vec(const rg_call *c, int i) {
  const rg_arg *x = rg_in(c, RGI_KVC_K_CACHE + i), *y = rg_in(c, RGI_KVC_K_CMP + i);
  return rgi_gemm_vec(x, x->dim[3]) && rgi_gemm_vec(y, y->dim[3]);
}

/* Sides that are averaged. */
static uint32_t means_of(const rg_call *c, rgk_paged_mean *p) {
  uint32_t n = 0;
  p->blocks = blocks_of(c);
  p->vec = true;
  p->scale = 1.0f / (float)p->blocks.kernel;
  for (int i = 0; i < 2; i++) {
    if (rgi_compress_learned(c, i)) continue;
    p->side[n++] = side_of(c, i);
    p->vec = p->vec && side_vec(c, i);
  }
  return n;
}
static int64_t means_blocks(const rg_call *c) {
  const int64_t slots = slots_of(c), most = 8 * (int64_t)c->gpu->sms;
  return slots < most ? slots : most;
}

static rg_status means(const rg_call *c, rg_cuda *x) {
  rgk_paged_mean p;
  memset(&p, 0, sizeof p); /* holes too */
  const uint32_t n = means_of(c, &p);
  if (n == 0) return RG_OK;
  return launch(x, rgk_paged_means(), means_blocks(c), n, 1, RGK_PAGED_MEAN_THREADS, &p, sizeof p);
}

bool rgi_cuda_kv_step_takes(const rg_call *append, const rg_call *compress, bool split) {
  (void)split;
  const int64_t kernel = compress->attr[RGI_CMP_KERNEL].i,
                stride = compress->attr[RGI_CMP_STRIDE].i;
  for (int i = 0; i < 2; i++) {
    const rg_arg *x = rg_in(append, RGI_APPEND_K + i),
                 *cache = rg_in(compress, RGI_KVC_K_CACHE + i);
    if (rgi_compress_learned(compress, i) || !side_vec(compress, i) || x->dtype == RG_F32)
      return false;
    if (!moved16(x, cache) || x->dim[2] % 8) return false;
  }
  return kernel == 2 * stride && stride <= RGK_PAGED_MEAN_GROUP;
}

void rgi_cuda_kv_step_view(const rg_call *append, const rg_call *compress, rgk_append_means *p) {
  memset(p, 0, sizeof *p); /* holes too */
  append_of(append, &p->append);
  means_of(compress, &p->mean);
}

rg_status rgi_cuda_kv_step(const rg_call *append, const rg_call *compress, rg_cuda *x) {
  rgk_append_means p;
  rgi_cuda_kv_step_view(append, compress, &p);
  if (rg_in(append, RGI_APPEND_K)->dim[0] == 0) return RG_OK;
  return launch(x, rgk_kv_append_means(), means_blocks(compress), 3, 1, RGK_PAGED_MEAN_THREADS, &p,
                sizeof p);
}

/* Room of a learned side: the blocks' tokens, what becomes of them, and the table. */
typedef struct room {
  void *tokens, *products;
  rgk_gemm_row *table;
} room;

static room room_of(const rg_call *c, int i, rgi_cut *at) {
  const rg_arg *x = rg_in(c, RGI_KVC_K_CACHE + i);
  const int64_t slots = slots_of(c), kernel = c->attr[RGI_CMP_KERNEL].i,
                row = x->dim[2] * x->dim[3] * (int64_t)rg_dtype_size(x->dtype);
  room r;
  r.tokens = rgi_take(at, (size_t)(slots * kernel * row));
  r.products = rgi_take(at, (size_t)(slots * row));
  r.table = rgi_take(at, (size_t)slots * sizeof(rgk_gemm_row));
  return r;
}

/* The same product as compress_kv's (cuda/compress.c), whose rows are those of `tokens`. */
static rgk_gemm product_of(const rg_call *c, int i, const room *r) {
  static const int gate[] = {RGK_STORE, RGK_STORE, RGK_SWIGLU, RGK_SIGMOID_MUL};
  const rg_arg *x = rg_in(c, RGI_KVC_K_CACHE + i), *w = rg_in(c, RGI_KVC_K_WEIGHT + i);
  const int64_t d = x->dim[3], heads = x->dim[2], block = c->attr[RGI_CMP_KERNEL].i * d;
  return (rgk_gemm){.mode = RGK_FORWARD,
                    .dtype = (int32_t)x->dtype,
                    .c_dtype = (int32_t)x->dtype,
                    .gate = gate[rgi_compress_method_of(c, i)],
                    .m = slots_of(c),
                    .n = w->dim[0],
                    .k = block,
                    .heads = (int32_t)heads,
                    .part = (int32_t)d,
                    .a = r->tokens,
                    .b = w->data,
                    .lda = heads * block,
                    .a_head = block,
                    .a_part = d,
                    .ldb = w->stride[0],
                    .c = r->products,
                    .ldc = heads * d,
                    .c_head = d,
                    .va = d % 8 == 0,
                    .vb = rgi_gemm_vec(w, w->dim[1]),
                    .vc = d % 8 == 0,
                    .table = r->table,
                    .half = d};
}

static rg_status learned_side(const rg_call *c, rg_cuda *x, int i) {
  rgi_cut at = {.base = c->workspace};
  const room r = room_of(c, i, &at);
  const rg_arg *cache = rg_in(c, RGI_KVC_K_CACHE + i);
  rgk_gemm product = product_of(c, i, &r);
  rgk_paged_move p;
  memset(&p, 0, sizeof p);
  p.blocks = blocks_of(c);
  p.side = side_of(c, i);
  p.slots = slots_of(c);
  p.room = r.tokens;
  p.table = r.table;
  p.vec = side_vec(c, i);
  const int64_t most = 4 * (int64_t)c->gpu->sms, blocks = p.slots < most ? p.slots : most;
  const uint32_t heads = (uint32_t)cache->dim[2];
  RGI_TRY(launch(x, rgk_paged_move_blocks(), blocks, heads, 1, RGK_MOVE_THREADS, &p, sizeof p));
  RGI_TRY(rgi_cuda_gemm(x, c->gpu, &product));
  p.room = r.products;
  p.back = true;
  return launch(x, rgk_paged_move_blocks(), blocks, heads, 1, RGK_MOVE_THREADS, &p, sizeof p);
}

size_t rgi_cuda_kv_compress_workspace(const rg_call *c) {
  size_t most = 0;
  for (int i = 0; i < 2; i++) {
    rgi_cut at = {0};
    if (rgi_compress_learned(c, i)) room_of(c, i, &at);
    if (at.used > most) most = at.used;
  }
  return most;
}

rg_status rgi_cuda_kv_compress(const rg_call *c, rg_cuda *x) {
  RGI_TRY(means(c, x));
  for (int i = 0; i < 2; i++)
    if (rgi_compress_learned(c, i)) RGI_TRY(learned_side(c, x, i));
  return RG_OK;
}

const char *rgi_cuda_kv_compress_path(const rg_call *c) {
  return rgi_compress_learned(c, 0) || rgi_compress_learned(c, 1)
             ? rgi_gemm_path(rg_in(c, RGI_KVC_K_CACHE)->dtype, c->gpu)
             : "mean";
}

/* ---- page_copy ---- */

enum { COPY_ENTRIES = 16, COPY_PARTS = 32 }; /* at once, of a launch */

size_t rgi_cuda_page_copy_workspace(const rg_call *c) {
  return RGI_ROUND256((2 + 2 * rg_in(c, RGI_COPY_PAGES)->dim[0]) * (int64_t)sizeof(int32_t));
}

/* Axes in the order in which they lie, folded where one follows on the other: a page that is dense
 * is one axis, however its heads are turned. */
static rgk_copied copied(const rg_arg *a) {
  const int64_t size = (int64_t)rg_dtype_size(a->dtype);
  rgk_copied c = {.data = a->data, .page = a->stride[0], .elements = 1, .unit = (int32_t)size};
  int axis[RG_MAX_RANK], n = 0;
  for (int i = 1; i < a->rank; i++) {
    int k = n++;
    for (; k > 0 && a->stride[axis[k - 1]] < a->stride[i]; k--) axis[k] = axis[k - 1];
    axis[k] = i;
  }
  for (int i = 0; i < n; i++) {
    const int64_t dim = a->dim[axis[i]], stride = a->stride[axis[i]];
    c.elements *= dim;
    if (dim == 1) continue;
    if (c.rank > 0 && c.stride[c.rank - 1] == dim * stride) {
      c.dim[c.rank - 1] *= dim;
      c.stride[c.rank - 1] = stride;
      continue;
    }
    c.dim[c.rank] = dim;
    c.stride[c.rank++] = stride;
  }
  if (c.rank == 0) c.dim[0] = c.stride[0] = c.rank = 1;
  const int64_t each = 16 / size;
  const int last = c.rank - 1;
  bool wide =
      a->align >= 16 && c.page % each == 0 && c.stride[last] == 1 && c.dim[last] % each == 0;
  for (int i = 0; i < last; i++) wide = wide && c.stride[i] % each == 0;
  if (!wide) return c;
  c.unit = 16;
  c.page /= each, c.elements /= each, c.dim[last] /= each;
  for (int i = 0; i < last; i++) c.stride[i] /= each;
  return c;
}

static bool is_brief(const rg_call *c) {
  return rg_in(c, RGI_COPY_PAGES)->dim[0] <= RGK_COPY_SHORT;
}
static rgk_copy_list list_of(const rg_call *c) {
  const rg_arg *pages = rg_in(c, RGI_COPY_PAGES);
  return (rgk_copy_list){.pages = pages->data,
                         .row = pages->stride[0],
                         .n = pages->dim[0],
                         .count = rgi_in_at(c, RGI_COPY_CACHE, 0)->dim[0],
                         .list = is_brief(c) ? NULL : c->workspace,
                         .fault = rgk_fault_of(c)};
}
static uint32_t turns_of(const rg_call *c) {
  const int64_t entries = rg_in(c, RGI_COPY_PAGES)->dim[0];
  return entries < COPY_ENTRIES ? (uint32_t)entries : COPY_ENTRIES;
}

rg_status rgi_cuda_page_copy(const rg_call *c, rg_cuda *x) {
  const rgk_copy_list list = list_of(c);
  if (!is_brief(c))
    RGI_TRY(launch(x, rgk_check_copies(), 1, 1, 1, RGK_COPY_THREADS, &list, sizeof list));
  const int caches = rg_out_count(c, 0);
  for (int first = 0; first < caches; first += RGK_COPY_CACHES) {
    rgk_copies p;
    uint32_t n = 0;
    memset(&p, 0, sizeof p);
    p.list = list;
    for (; n < RGK_COPY_CACHES && first + (int)n < caches; n++)
      p.cache[n] = copied(rgi_out_at(c, 0, first + (int)n));
    RGI_TRY(
        launch(x, rgk_copy_pages(), COPY_PARTS, turns_of(c), n, RGK_COPY_THREADS, &p, sizeof p));
  }
  return RG_OK;
}

bool rgi_cuda_copy_batch_takes(const rg_call *copy, const rg_call *batch, bool split) {
  (void)split;
  return is_brief(copy) && rg_out_count(copy, 0) <= RGK_COPY_CACHES &&
         rg_in(batch, RGI_BATCH_LENGTHS)->dim[0] > 0;
}

rg_status rgi_cuda_copy_batch(const rg_call *copy, const rg_call *batch, rg_cuda *x) {
  const int caches = rg_out_count(copy, 0);
  rgk_copy_batch p;
  memset(&p, 0, sizeof p); /* holes too */
  p.batch = batch_of(batch);
  p.copies.list = list_of(copy);
  for (int i = 0; i < caches; i++) p.copies.cache[i] = copied(rgi_out_at(copy, 0, i));
  p.parts = COPY_PARTS, p.turns = (int32_t)turns_of(copy);
  return launch(x, rgk_copy_and_batch(), p.batch.n + (int64_t)p.parts * p.turns * caches, 1, 1,
                RGK_BATCH_THREADS, &p, sizeof p);
}
