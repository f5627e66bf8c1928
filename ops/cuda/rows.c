/* ops/cuda/rows.c: see rows.h. */
#include "rows.h"
#include "columns.h"

enum { THREADS = 256, CHUNK = 8 }; /* as kernels/rows.cu has them */

/* ---- walks ---- */

rg_arg rgi_cuda_row(const rg_arg *a) {
  rg_arg r = *a;
  r.rank = a->rank > 1 ? a->rank - 1 : 0;
  for (int i = 0; i < r.rank; i++) r.dim[i] = a->dim[i + 1], r.stride[i] = a->stride[i + 1];
  return r;
}

void rgi_cuda_walk(rgk_walk *w, rgk_walked *x, const rg_arg *const *tensor, int n, bool keep_last) {
  *w = (rgk_walk){.n = n, .elements = 1};
  int last = tensor[0]->rank - 1;
  for (int t = 0; t < n; t++)
    x[t] = (rgk_walked){.data = tensor[t]->data, .dtype = (int32_t)tensor[t]->dtype};
  for (int a = 0; a <= last; a++) {
    int64_t dim = tensor[0]->dim[a];
    bool apart = keep_last && a == last;
    w->elements *= dim;
    if (dim == 1 && !apart) continue; /* its stride says nothing */
    bool fold = w->rank > 0 && !apart;
    for (int t = 0; t < n && fold; t++)
      fold = x[t].stride[w->rank - 1] == dim * tensor[t]->stride[a];
    if (!fold) w->dim[w->rank++] = 1;
    w->dim[w->rank - 1] *= dim;
    for (int t = 0; t < n; t++) x[t].stride[w->rank - 1] = tensor[t]->stride[a];
  }
  if (w->rank == 0) {
    w->dim[0] = w->rank = 1;
    for (int t = 0; t < n; t++) x[t].stride[0] = 1;
  }
}

/* Is a step of so many elements one of whole 16 bytes? */
static bool step16(int64_t elements, int32_t dtype) {
  return elements * (int64_t)rg_dtype_size((rg_dtype)dtype) % 16 == 0;
}

bool rgi_cuda_vectors(const rgk_walk *w, const rgk_walked *x, const rg_arg *const *tensor, int n) {
  if (w->rank > 1 && w->dim[w->rank - 1] % CHUNK) return false;
  for (int t = 0; t < n; t++) {
    if (tensor[t]->align < 16 || x[t].stride[w->rank - 1] != 1) return false;
    for (int a = 0; a + 1 < w->rank; a++)
      if (!step16(x[t].stride[a], x[t].dtype)) return false;
  }
  return true;
}

bool rgi_cuda_row_vectors(const rg_arg *a) {
  if (!a) return true;
  int32_t type = (int32_t)a->dtype;
  return a->align >= 16 && a->dim[2] % CHUNK == 0 &&
         (a->dim[0] == 1 || step16(a->stride[0], type)) &&
         (a->dim[1] == 1 || step16(a->stride[1], type));
}

/* Rows of axis 0 and elements of each. */
static rgk_seqs rows_of(const rg_arg *like, const rg_arg *cu, int64_t *row) {
  int64_t rows = like->rank ? like->dim[0] : 1;
  *row = 1;
  for (int a = 1; a < like->rank; a++) *row *= like->dim[a];
  return rgk_seqs_of(cu, rows);
}

static rg_status walk_launch(rg_cuda *x, const void *function, const rgk_walk *w, bool vectors,
                             const void *params, size_t size) {
  if (w->elements == 0) return RG_OK;
  return x->launch(
      x, &(rg_launch){.function = function,
                      .grid = {rgk_blocks(w->elements, THREADS * (vectors ? CHUNK : 1)), 1, 1},
                      .block = {THREADS, 1, 1},
                      .params = params,
                      .size = size});
}

/* ---- maps ---- */

static int tensors(rgk_map map) {
  static const int8_t n[RGK_MAPS] = {
      [RGK_FILL] = 1, [RGK_COPY] = 2,     [RGK_MUL] = 3,     [RGK_MUL_BWD] = 5,
      [RGK_SILU] = 2, [RGK_SILU_BWD] = 3, [RGK_SIGMOID] = 2, [RGK_SIGMOID_BWD] = 3,
      [RGK_RELU] = 2, [RGK_RELU_BWD] = 3};
  return n[map];
}

rg_status rgi_cuda_map(rg_cuda *x, const rgi_map *m) {
  int n = tensors(m->map);
  rgk_map_params p = {.add = {m->add[0], m->add[1]}, .value = m->value};
  rgi_cuda_walk(&p.w, p.t, m->tensor, n, false);
  for (int t = 0; t < n; t++)
    if (p.t[t].dtype == RG_I32) p.t[t].dtype = RG_F32; /* copies move bits */
  p.seqs = rows_of(m->tensor[0], m->cu, &p.row);
  bool vectors = rgi_cuda_vectors(&p.w, p.t, m->tensor, n);
  return walk_launch(x, rgk_map_kernel(m->map, vectors, (rg_dtype)p.t[0].dtype), &p.w, vectors, &p,
                     sizeof p);
}

static const char *path(bool vectors) {
  return vectors ? "16-byte vectors" : "plain: alignment";
}

const char *rgi_cuda_map_path(const rgi_map *m) {
  rgk_walk w;
  rgk_walked x[RGK_MAP_TENSORS];
  rgi_cuda_walk(&w, x, m->tensor, tensors(m->map), false);
  return path(rgi_cuda_vectors(&w, x, m->tensor, tensors(m->map)));
}

/* ---- zero, cast, accumulate ---- */

static rgi_map zero_map(const rg_call *c) {
  return (rgi_map){.map = RGK_FILL, .tensor = {rg_out(c, 0)}, .value = c->attr[1].i ? -0.0f : 0.0f};
}
rg_status rgi_cuda_zero(const rg_call *c, rg_cuda *x) {
  rgi_map m = zero_map(c);
  return rgi_cuda_map(x, &m);
}
const char *rgi_cuda_zero_path(const rg_call *c) {
  rgi_map m = zero_map(c);
  return rgi_cuda_map_path(&m);
}

static rgi_map cast_map(const rg_call *c) {
  return (rgi_map){.map = RGK_COPY, .cu = rg_in(c, 1), .tensor = {rg_in(c, 0), rg_out(c, 0)}};
}
rg_status rgi_cuda_cast(const rg_call *c, rg_cuda *x) {
  rgi_map m = cast_map(c);
  return rgi_cuda_map(x, &m);
}
const char *rgi_cuda_cast_path(const rg_call *c) {
  rgi_map m = cast_map(c);
  return rgi_cuda_map_path(&m);
}

static rgi_map accumulate_map(const rg_call *c, rg_arg *part) {
  const rg_arg *x = rg_in(c, 1), *y = rg_out(c, 0);
  int axis = (int)c->attr[0].i;
  *part = y->rank ? rgi_slice(y, axis, c->attr[1].i, x->dim[axis]) : *y;
  return (rgi_map){.map = RGK_COPY, .tensor = {x, part}, .add = {true}};
}
rg_status rgi_cuda_accumulate(const rg_call *c, rg_cuda *x) {
  rg_arg part;
  rgi_map m = accumulate_map(c, &part);
  return rgi_cuda_map(x, &m);
}
const char *rgi_cuda_accumulate_path(const rg_call *c) {
  rg_arg part;
  rgi_map m = accumulate_map(c, &part);
  return rgi_cuda_map_path(&m);
}

rg_status rgi_cuda_add_columns(const rg_arg *sum, const rg_arg *part, const rg_arg *to, bool add,
                               rg_cuda *x) {
  const rg_arg columns = rgi_slice(sum, part->rank - 1, 0, part->dim[part->rank - 1]);
  RGI_TRY(rgi_cuda_map(x, &(rgi_map){.map = RGK_COPY, .tensor = {part, &columns}, .add = {true}}));
  if (to->data == sum->data) return RG_OK;
  return rgi_cuda_map(x, &(rgi_map){.map = RGK_COPY, .tensor = {sum, to}, .add = {add}});
}

/* ---- concat: a copy per part ---- */

static rgi_map concat_map(const rg_call *c, const rg_arg *x, int64_t start, rg_arg *part) {
  int axis = (int)c->attr[0].i;
  *part = rgi_slice(rg_out(c, 0), axis, start, x->dim[axis]);
  return (rgi_map){.map = RGK_COPY, .cu = rg_in(c, 1), .tensor = {x, part}};
}
rg_status rgi_cuda_concat(const rg_call *c, rg_cuda *x) {
  int64_t start = 0;
  for (int k = c->in_begin[0]; k < c->in_begin[1]; k++) {
    rg_arg part;
    if (c->in[k].rank < 0) continue;
    rgi_map m = concat_map(c, &c->in[k], start, &part);
    RGI_TRY(rgi_cuda_map(x, &m));
    start += c->in[k].dim[c->attr[0].i];
  }
  return RG_OK;
}
const char *rgi_cuda_concat_path(const rg_call *c) {
  int64_t start = 0;
  int fast = 0, slow = 0;
  for (int k = c->in_begin[0]; k < c->in_begin[1]; k++) {
    rg_arg part;
    if (c->in[k].rank < 0) continue;
    rgi_map m = concat_map(c, &c->in[k], start, &part);
    rgk_walk w;
    rgk_walked x[2];
    rgi_cuda_walk(&w, x, m.tensor, 2, false);
    *(rgi_cuda_vectors(&w, x, m.tensor, 2) ? &fast : &slow) += 1;
    start += c->in[k].dim[c->attr[0].i];
  }
  return fast && slow ? "16-byte vectors, plain in part: alignment" : path(!slow);
}

/* ---- add: RGK_ADD_TENSORS - 1 summands per launch, sums between launches in fp32 ---- */

enum { ABREAST = RGK_ADD_TENSORS - 1 };

static int summands(const rg_call *c) {
  int n = 0;
  for (int k = c->in_begin[0]; k < c->in_begin[1]; k++) n += c->in[k].rank >= 0;
  return n;
}

size_t rgi_cuda_add_workspace(const rg_call *c) {
  const rg_arg *y = rg_out(c, 0);
  size_t n = 1;
  for (int a = 0; a < y->rank; a++) n *= (size_t)y->dim[a];
  return summands(c) > ABREAST ? n * sizeof(float) : 0;
}

/* Dense fp32 in the shape of y. */
static rg_arg partial_like(const rg_call *c, const rg_arg *y) {
  rg_arg a = *y;
  a.data = c->workspace;
  a.dtype = RG_F32;
  a.align = 16;
  int64_t n = 1;
  for (int i = a.rank - 1; i >= 0; i--) a.stride[i] = n, n *= a.dim[i];
  return a;
}

/* Summands [*k, …) as many as a launch takes; walks to the next. */
static bool next_part(const rg_call *c, int *k, rgk_add_params *p, rg_arg *partial, bool *vectors,
                      rg_dtype *type) {
  const rg_arg *tensor[RGK_ADD_TENSORS] = {rg_out(c, 0)};
  int n = 1, end = c->in_begin[1], left = 0;
  bool started = *k > c->in_begin[0];
  for (; *k < end && n < RGK_ADD_TENSORS; (*k)++)
    if (c->in[*k].rank >= 0) tensor[n++] = &c->in[*k];
  for (int i = *k; i < end; i++) left += c->in[i].rank >= 0;
  *partial = partial_like(c, tensor[0]);
  *type = n > 1 ? tensor[1]->dtype : RG_F32;
  *p = (rgk_add_params){0};
  p->seqs = rows_of(tensor[0], rg_in(c, 1), &p->row);
  p->start = started ? partial->data : NULL;
  if (left) tensor[0] = partial;
  rgi_cuda_walk(&p->w, p->t, tensor, n, false);
  *vectors = rgi_cuda_vectors(&p->w, p->t, tensor, n);
  return left > 0;
}

rg_status rgi_cuda_add(const rg_call *c, rg_cuda *x) {
  bool more = true;
  for (int k = c->in_begin[0]; more;) {
    rgk_add_params p;
    rg_arg partial;
    bool vectors;
    rg_dtype type;
    more = next_part(c, &k, &p, &partial, &vectors, &type);
    RGI_TRY(walk_launch(x, rgk_add_kernel(vectors, type), &p.w, vectors, &p, sizeof p));
  }
  return RG_OK;
}
const char *rgi_cuda_add_path(const rg_call *c) {
  bool all = true, more = true;
  for (int k = c->in_begin[0]; more;) {
    rgk_add_params p;
    rg_arg partial;
    bool vectors;
    rg_dtype type;
    more = next_part(c, &k, &p, &partial, &vectors, &type);
    all = all && vectors;
  }
  return path(all);
}

static rg_status scale_lengths(const rg_call *c, rg_cuda *x, int32_t times, int32_t divisor,
                               int32_t rows) {
  const rg_arg *from = rg_in(c, 0), *to = rg_out(c, 0);
  rgk_scale_lengths_params p = {.from = from->data,
                                .to = to->data,
                                .n = to->dim[0],
                                .times = times,
                                .divisor = divisor,
                                .rows = rows};
  return x->launch(x, &(rg_launch){.function = rgk_scale_lengths(),
                                   .grid = {rgk_blocks(p.n, THREADS), 1, 1},
                                   .block = {THREADS, 1, 1},
                                   .params = &p,
                                   .size = sizeof p});
}
rg_status rgi_cuda_scale_lengths(const rg_call *c, rg_cuda *x) {
  return scale_lengths(c, x, (int32_t)c->attr[0].i, 1, (int32_t)c->attr[1].i);
}
rg_status rgi_cuda_block_starts(const rg_call *c, rg_cuda *x) {
  return scale_lengths(c, x, 1, (int32_t)c->attr[0].i, INT32_MAX);
}
const char *rgi_cuda_scale_lengths_path(const rg_call *c) {
  (void)c;
  return "plain";
}
