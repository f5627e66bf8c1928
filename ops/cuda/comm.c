/* ops/cuda/comm.c: see comm.h. */
#include "comm.h"
#include "rows.h"

enum { THREADS = 256, CHUNK = 8, MOST_BLOCKS = 2048 }; /* as kernels/comm.cu has them */

/* ---- rows ---- */

static int align_of(int64_t bytes) {
  int align = 16;
  while (align > 1 && bytes % align) align /= 2;
  return align;
}

rg_arg rgi_cuda_dense(const rg_call *c, const rg_arg *x, int64_t n, int64_t offset,
                      rg_dtype dtype) {
  rg_arg a = rgi_dense_rows(x, n, (char *)c->comm_block + offset, dtype);
  a.align = align_of(offset);
  return a;
}

rg_status rgi_cuda_copy(rg_cuda *x, const rg_arg *from, const rg_arg *to, const rg_arg *cu) {
  const rgi_map m = {.map = RGK_COPY, .cu = cu, .tensor = {from, to}};
  return rgi_cuda_map(x, &m);
}

rg_status rgi_cuda_clear(rg_cuda *x, void *data, int64_t bytes, rg_dtype dtype) {
  const rg_arg a = {.data = data,
                    .dtype = dtype,
                    .rank = 1,
                    .dim = {bytes / (int64_t)rg_dtype_size(dtype)},
                    .stride = {1},
                    .align = (int32_t)rg_dtype_size(dtype)};
  const rgi_map m = {.map = RGK_FILL, .tensor = {&a}};
  return bytes ? rgi_cuda_map(x, &m) : RG_OK;
}

/* The walk of a row in n tensors of one shape but for axis 0. */
static void walk_rows(rgk_walk *w, rgk_row *out, const rg_arg *const *tensor, int n,
                      bool *vectors) {
  rg_arg row[RGK_HALO_SLOTS + 1];
  const rg_arg *p[RGK_HALO_SLOTS + 1] = {0};
  rgk_walked x[RGK_HALO_SLOTS + 1] = {{0}};
  for (int i = 0; i < n; i++) row[i] = rgi_cuda_row(tensor[i]), p[i] = &row[i];
  rgi_cuda_walk(w, x, p, n, false);
  bool whole = w->elements % CHUNK == 0 && rgi_cuda_vectors(w, x, p, n);
  for (int i = 0; i < n; i++) {
    out[i] = (rgk_row){.data = tensor[i]->data,
                       .row = tensor[i]->stride[0],
                       .dtype = tensor[i]->dtype == RG_I32 ? RG_F32 : (int32_t)tensor[i]->dtype};
    memcpy(out[i].stride, x[i].stride, sizeof out[i].stride);
    whole = whole && out[i].row * (int64_t)rg_dtype_size(tensor[i]->dtype) % 16 == 0;
  }
  if (vectors) *vectors = whole;
}

static rgk_order order_of(const rg_arg *order, int64_t chunks) {
  if (!order) return (rgk_order){.n = chunks};
  return (rgk_order){.place = order->data, .stride = order->stride[0], .n = order->dim[0]};
}

rg_status rgi_cuda_permute(rg_cuda *x, const rg_arg *from, const rg_arg *to, const rg_arg *order,
                           bool scatter) {
  if (!order) return rgi_cuda_copy(x, from, to, NULL);
  const rg_arg *both[] = {from, to};
  rgk_permute_params p = {.order = order_of(order, 0),
                          .live = rgk_seqs_of(NULL, from->dim[0]),
                          .rows = to->dim[0],
                          .chunk = to->dim[0] / order->dim[0],
                          .scatter = scatter};
  rgk_row row[2];
  bool vectors;
  walk_rows(&p.w, row, both, 2, &vectors);
  p.from = row[0], p.to = row[1];
  const int64_t n = p.rows * p.w.elements;
  if (n == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = rgk_permute(vectors, (rg_dtype)p.from.dtype),
                                   .grid = {rgk_blocks(n, THREADS * (vectors ? CHUNK : 1)), 1, 1},
                                   .block = {THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

rg_status rgi_cuda_sum(rg_cuda *x, const rg_arg *to, const void *from, int64_t step, int ranks,
                       rg_dtype wire) {
  rgk_sum_params p = {.from = from,
                      .step = step / (int64_t)rg_dtype_size(wire),
                      .ranks = ranks,
                      .dtype = (int32_t)wire};
  rgi_cuda_walk(&p.w, &p.to, &to, 1, false);
  const bool vectors =
      p.w.elements % CHUNK == 0 && step % 16 == 0 && rgi_cuda_vectors(&p.w, &p.to, &to, 1);
  if (p.w.elements == 0) return RG_OK;
  const uint32_t blocks = rgk_blocks(p.w.elements, THREADS * (vectors ? CHUNK : 1));
  return x->launch(x, &(rg_launch){.function = rgk_sum_ranks(vectors, wire),
                                   .grid = {blocks, 1, 1},
                                   .block = {THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

rg_status rgi_cuda_sum_pairs(rg_cuda *x, const rg_arg *to, const void *from, int ranks) {
  const rgk_pairs_params p = {
      .from = from, .to = to->data, .n = to->dim[0], .stride = to->stride[0], .ranks = ranks};
  if (p.n == 0) return RG_OK;
  return x->launch(x, &(rg_launch){.function = rgk_sum_pairs(),
                                   .grid = {rgk_blocks(p.n, THREADS), 1, 1},
                                   .block = {THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}

/* ---- collectives ---- */

/* cudaStreamLegacy: a communicator takes NULL for memory of the host. */
#define DEFAULT_STREAM ((void *)(uintptr_t)1)

typedef struct exchange {
  const rg_call *c;
  bool all_to_all;
  const void *send;
  void *recv;
  rg_halo halo;
  size_t bytes;
} exchange;

static rg_status no_comm(const rg_call *c) {
  return rg_op_fail(c->error, RG_E_USAGE, c, "a collective without a communicator");
}

static rg_status exchange_now(void *arg, void *stream) {
  const exchange *w = arg;
  rg_comm *comm = w->c->comm;
  if (!comm) return no_comm(w->c);
  if (!stream) stream = DEFAULT_STREAM;
  return (w->all_to_all ? comm->all_to_all : comm->all_gather)(comm, w->c->node, w->send, w->recv,
                                                               w->bytes, stream, w->c->error);
}

static rg_status swap_now(void *arg, void *stream) {
  const exchange *w = arg;
  rg_comm *comm = w->c->comm;
  if (!comm) return no_comm(w->c);
  return comm->halo(comm, w->c->node, &w->halo, w->bytes, stream ? stream : DEFAULT_STREAM,
                    w->c->error);
}

static rg_status start(const rg_call *c, rg_cuda *x, int ranks, bool all_to_all, int64_t send,
                       int64_t *recv, int64_t bytes) {
  char *block = c->comm_block;
  exchange w = {.c = c,
                .all_to_all = all_to_all,
                .send = block + send,
                .recv = block + *recv,
                .bytes = (size_t)bytes};
  if (c->comm || ranks > 1) return x->collective(x, exchange_now, &w);
  *recv = send;
  return RG_OK;
}

rg_status rgi_cuda_all_gather(const rg_call *c, rg_cuda *x, int ranks, int64_t send, int64_t *recv,
                              int64_t bytes) {
  return start(c, x, ranks, false, send, recv, bytes);
}
rg_status rgi_cuda_all_to_all(const rg_call *c, rg_cuda *x, int ranks, int64_t send, int64_t *recv,
                              int64_t bytes) {
  return start(c, x, ranks, true, send, recv, bytes);
}
rg_status rgi_cuda_swap(const rg_call *c, rg_cuda *x, int ranks, const rg_halo *h, int64_t bytes) {
  exchange w = {.c = c, .halo = *h, .bytes = (size_t)bytes};
  return bytes && (c->comm || ranks > 1) ? x->collective(x, swap_now, &w) : RG_OK;
}

/* ---- halos ---- */

rg_status rgi_cuda_halo_launch(rg_cuda *x, const rgi_cuda_halo *h, rgk_halo_kernel *kernel,
                               int slot, bool send) {
  const rg_arg *all[RGK_HALO_SLOTS + 1];
  rgk_row row[RGK_HALO_SLOTS + 1];
  int at[RGK_HALO_SLOTS + 1] = {0}, n = 0;
  rgk_halo_params p = {.order = order_of(h->order, (int64_t)h->slots * h->ranks),
                       .chunk = h->chunk,
                       .left = h->left,
                       .right = h->right,
                       .slots = h->slots,
                       .rank = h->rank,
                       .slot = slot};
  for (int i = 0; i < h->n; i++)
    if (h->x[i]) at[n] = i, all[n++] = h->x[i];
  const bool result = h->y && !send;
  if (result) all[n++] = h->y;
  if (n == 0) return RG_OK;
  bool vectors;
  walk_rows(&p.w, row, all, n, &vectors);
  vectors = vectors && !send;
  for (int i = 1; i < n; i++) vectors = vectors && row[i].dtype == row[0].dtype;
  const rg_dtype type = (rg_dtype)row[0].dtype;
  if (result) p.y = row[--n];
  for (int i = 0; i < n; i++) p.x[at[i]] = row[i];
  for (int i = 0; i < RGK_MESSAGES; i++) p.message[i] = h->message[i];
  p.live = rgk_seqs_of(h->cu, h->x[0] ? h->x[0]->dim[0] : 0);
  p.elements = (int32_t)p.w.elements;
  const int64_t most = h->left > h->right ? h->left : h->right;
  const int64_t work = (send ? most : h->left + h->chunk + h->right) * p.w.elements;
  const uint32_t blocks = rgk_blocks(work, THREADS * (vectors ? CHUNK : 1));
  if (work == 0) return RG_OK;
  return x->launch(
      x, &(rg_launch){.function = kernel(vectors, type),
                      .grid = {blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, send ? 2 : 1, 1},
                      .block = {THREADS, 1, 1},
                      .params = &p,
                      .size = sizeof p});
}
