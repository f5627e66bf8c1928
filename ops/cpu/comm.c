/* ops/cpu/comm.c: rows on their way to and from a comm block; see ../comm.h. */
#include "../comm/comm.h"

rg_status rgi_check_order(const rg_call *c, const rg_arg *order) {
  if (!order) return RG_OK;
  const int64_t n = order->dim[0];
  for (int64_t i = 0; i < n; i++) {
    bool good = rgi_place(order, i) >= 0 && rgi_place(order, i) < n;
    for (int64_t j = 0; j < i && good; j++) good = rgi_place(order, i) != rgi_place(order, j);
    if (!good)
      return rg_op_fail(c->error, RG_E_DATA, c,
                        "order[%lld] is %lld; expected each place 0 to %lld once", (long long)i,
                        (long long)rgi_place(order, i), (long long)(n - 1));
  }
  return RG_OK;
}

rg_arg rgi_rows(const rg_arg *a, int64_t first, int64_t n) {
  return rgi_slice(a, 0, first, n);
}

int64_t rgi_row_elements(const rg_arg *a) {
  int64_t n = 1;
  for (int i = 1; i < a->rank; i++) n *= a->dim[i];
  return n;
}

rg_arg rgi_dense_rows(const rg_arg *x, int64_t n, void *data, rg_dtype dtype) {
  rg_arg r = *x;
  int64_t stride = 1;
  r.data = data;
  r.dtype = dtype;
  r.dim[0] = n;
  for (int i = r.rank - 1; i >= 0; i--) {
    r.stride[i] = stride;
    stride *= r.dim[i];
  }
  return r;
}

typedef struct copy {
  const rg_arg *to, *from;
  int isa;
} copy;

static void copy_run(void *user, const rgi_run *run) {
  const copy *w = user;
  char *to = rgi_run_at(run, w->to);
  const char *from = rgi_run_at(run, w->from);
  const size_t size = rg_dtype_size(w->to->dtype);
  if (!run->live)
    memset(to, 0, (size_t)run->n * size);
  else if (w->to->dtype == w->from->dtype)
    memcpy(to, from, (size_t)run->n * size);
  else if (w->to->dtype == RG_F32)
    rgi_load_by(w->isa, (float *)(void *)to, w->from->dtype, from, run->n);
  else
    rgi_store_by(w->isa, to, w->to->dtype, (const float *)(const void *)from, run->n);
}

void rgi_copy_rows(const rg_call *c, const rg_arg *to, const rg_arg *from, int64_t live) {
  copy user = {to, from, c->isa};
  rgi_walk w;
  rgi_walk_begin(&w, to, live < 0 ? 0 : live);
  rgi_walk_with(&w, from);
  rgi_walk_run(c, &w, copy_run, &user);
}

rg_status rgi_all_gather(const rg_call *c, const void *send, void *recv, size_t bytes) {
  if (c->comm) return c->comm->all_gather(c->comm, c->node, send, recv, bytes, NULL, c->error);
  memcpy(recv, send, bytes);
  return RG_OK;
}

rg_status rgi_all_to_all(const rg_call *c, const void *send, void *recv, size_t bytes) {
  if (c->comm) return c->comm->all_to_all(c->comm, c->node, send, recv, bytes, NULL, c->error);
  memcpy(recv, send, bytes);
  return RG_OK;
}
