/* tests/harness/graph_ref.c: see graph_ref.h. One function per op and direction, looked up by
 * name. */
#include "graph_ref.h"

#include "../ref/ref.h"
#include <math.h>
#include <string.h>

struct gref {
  ot *t;
  const rgi_graph *g;
  bool rounded;
  double **value, **grad; /* per tensor */
  int32_t **ints;
  int *depth;
  int64_t given, agreed; /* top-k indices */
};

static int64_t count(const gref *r, int tensor) {
  int64_t n = 1;
  for (int i = 0; i < r->g->tensor[tensor].rank; i++) n *= r->g->tensor[tensor].dim[i].c;
  return n;
}
static int64_t dim(const gref *r, int tensor, int axis) {
  return r->g->tensor[tensor].dim[axis].c;
}
static bool is_int(const gref *r, int tensor) {
  return r->g->tensor[tensor].dtype == RG_I32;
}

gref *gref_new(ot *t, const rgi_graph *forward, bool rounded) {
  gref *r = ot_alloc(t, sizeof *r);
  size_t n = (size_t)forward->ntensor + 1;
  *r = (gref){.t = t, .g = forward, .rounded = rounded};
  r->value = ot_alloc(t, n * sizeof *r->value);
  r->grad = ot_alloc(t, n * sizeof *r->grad);
  r->ints = ot_alloc(t, n * sizeof *r->ints);
  r->depth = ot_alloc(t, n * sizeof *r->depth);
  return r;
}

void gref_set(gref *r, int tensor, const double *x) {
  r->value[tensor] = ot_doubles(r->t, count(r, tensor) + 1);
  memcpy(r->value[tensor], x, (size_t)count(r, tensor) * sizeof *x);
}
void gref_set_ints(gref *r, int tensor, const int32_t *x) {
  r->ints[tensor] = ot_ints(r->t, count(r, tensor) + 1);
  memcpy(r->ints[tensor], x, (size_t)count(r, tensor) * sizeof *x);
}
const double *gref_value(const gref *r, int tensor) {
  return r->value[tensor];
}
const int32_t *gref_ints(const gref *r, int tensor) {
  return r->ints[tensor];
}
const double *gref_gradient(const gref *r, int tensor) {
  return r->grad[tensor];
}
int gref_depth(const gref *r, int tensor) {
  return r->depth[tensor];
}
double gref_topk_overlap(const gref *r) {
  return r->given ? (double)r->agreed / (double)r->given : 1;
}

int64_t gref_live(const gref *r, int tensor) {
  const rgi_tensor *x = &r->g->tensor[tensor];
  if (x->rank == 0) return 1;
  return x->seqlens < 0 ? x->dim[0].c : r->ints[x->seqlens][dim(r, x->seqlens, 0) - 1];
}

/* ---- a node's ports and attributes, by name ---- */

typedef struct view {
  gref *r;
  const rgi_node *n;
} view;

static int in(view v, const char *port) {
  int p = rgi_in_port(v.n->op, port);
  return p < 0 ? -1 : rgi_in(v.n, p);
}
static int out(view v, const char *port) {
  int p = rgi_out_port(v.n->op, port);
  return p < 0 ? -1 : rgi_out(v.n, p);
}
static const double *in_value(view v, const char *port) {
  int t = in(v, port);
  return t < 0 ? NULL : v.r->value[t];
}
static const int32_t *in_ints(view v, const char *port) {
  int t = in(v, port);
  return t < 0 ? NULL : v.r->ints[t];
}
static const rg_value *attr(view v, const char *name) {
  for (int i = 0; i < v.n->op->nattr; i++)
    if (strcmp(v.n->op->attrs[i].name, name) == 0) return &v.n->attr[i];
  static const rg_value absent;
  return &absent;
}
static int64_t attr_i(view v, const char *name) {
  return attr(v, name)->i;
}
static double attr_f(view v, const char *name) {
  return attr(v, name)->f;
}

/* Tensors of a list port; returns how many. */
static int list(view v, const char *port, const int32_t **ids) {
  int p = rgi_in_port(v.n->op, port);
  *ids = v.n->in + v.n->in_begin[p];
  return v.n->in_begin[p + 1] - v.n->in_begin[p];
}

/* Live rows that the node's own lengths port says; all if there is none. */
static int64_t live_rows(view v, int tensor) {
  int cu = in(v, "cu_seqlens");
  return cu < 0 ? dim(v.r, tensor, 0) : v.r->ints[cu][dim(v.r, cu, 0) - 1];
}
static int64_t live_elements(view v, int tensor) {
  if (v.r->g->tensor[tensor].rank == 0) return 1;
  int64_t rows = dim(v.r, tensor, 0);
  return rows ? count(v.r, tensor) / rows * live_rows(v, tensor) : 0;
}
static int64_t sequences(view v) {
  return dim(v.r, in(v, "cu_seqlens"), 0) - 1;
}

/* The output's array, fresh. */
static double *make(view v, int tensor) {
  if (tensor < 0) return NULL;
  return v.r->value[tensor] = ot_doubles(v.r->t, count(v.r, tensor) + 1);
}
/* Incoming gradient of an output; zeros if none arrived. */
static const double *gradient(view v, int tensor) {
  if (tensor < 0) return NULL;
  return v.r->grad[tensor] ? v.r->grad[tensor] : ot_doubles(v.r->t, count(v.r, tensor) + 1);
}
static double *room(view v, int tensor) {
  return tensor < 0 ? NULL : ot_doubles(v.r->t, count(v.r, tensor) + 1);
}
static void give(view v, int tensor, const double *d) {
  if (tensor < 0 || !d || is_int(v.r, tensor)) return;
  if (!v.r->grad[tensor]) v.r->grad[tensor] = ot_doubles(v.r->t, count(v.r, tensor) + 1);
  for (int64_t i = 0; i < count(v.r, tensor); i++) v.r->grad[tensor][i] += d[i];
}

/* ---- views: element i of the output is element from[i] of the input ---- */

static int64_t *sources(view v, int y, int64_t start) {
  int x = v.n->in[0];
  const rgi_tensor *from = &v.r->g->tensor[x], *to = &v.r->g->tensor[y];
  int64_t n = count(v.r, y), *map = ot_alloc(v.r->t, (size_t)(n + 1) * sizeof *map);
  bool transposed = strcmp(v.n->op->name, "transpose") == 0,
       reshaped =
           strcmp(v.n->op->name, "reshape") == 0 || strcmp(v.n->op->name, "stop_gradient") == 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t index[RG_MAX_RANK], rest = i, at = 0;
    for (int d = to->rank - 1; d >= 0; d--) {
      index[d] = rest % to->dim[d].c;
      rest /= to->dim[d].c;
    }
    for (int d = 0; d < from->rank && !reshaped; d++) {
      int64_t k = index[d];
      if (transposed)
        for (int e = 0; e < from->rank; e++)
          if (attr(v, "perm")->list[e] == d) k = index[e];
      if (!transposed && d == attr_i(v, "axis")) k += start;
      at = at * from->dim[d].c + k;
    }
    map[i] = reshaped ? i : at;
  }
  return map;
}

static void look(view v) {
  int x = v.n->in[0];
  int64_t start = attr_i(v, "start");
  for (int o = 0; o < rgi_nout(v.n); o++) {
    int y = v.n->out[o];
    const int64_t *map = sources(v, y, start);
    if (is_int(v.r, x)) {
      v.r->ints[y] = ot_ints(v.r->t, count(v.r, y) + 1);
      for (int64_t i = 0; i < count(v.r, y); i++) v.r->ints[y][i] = v.r->ints[x][map[i]];
    } else {
      double *to = make(v, y);
      for (int64_t i = 0; i < count(v.r, y); i++) to[i] = v.r->value[x][map[i]];
    }
    if (strcmp(v.n->op->name, "split") == 0) start += dim(v.r, y, (int)attr_i(v, "axis"));
  }
}
static void look_backward(view v) {
  int x = v.n->in[0];
  int64_t start = attr_i(v, "start");
  double *d = room(v, x);
  for (int o = 0; o < rgi_nout(v.n); o++) {
    int y = v.n->out[o];
    const int64_t *map = sources(v, y, start);
    for (int64_t i = 0; v.r->grad[y] && i < count(v.r, y); i++) d[map[i]] += v.r->grad[y][i];
    if (strcmp(v.n->op->name, "split") == 0) start += dim(v.r, y, (int)attr_i(v, "axis"));
  }
  give(v, x, d);
}

/* ---- rows and elements ---- */

static void add(view v) {
  const int32_t *a;
  int n = list(v, "a", &a), y = out(v, "y");
  double *sum = room(v, y);
  for (int k = 0; k < n; k++) {
    double *next = make(v, y);
    ref_add(count(v.r, y), live_elements(v, y), sum, v.r->value[a[k]], next);
    sum = next;
  }
}
static void add_backward(view v) {
  const int32_t *a;
  int n = list(v, "a", &a), y = out(v, "y");
  double *d = room(v, y);
  ref_cast(count(v.r, y), live_elements(v, y), gradient(v, y), d);
  for (int k = 0; k < n; k++) give(v, a[k], d);
}

static void mul(view v) {
  int y = out(v, "y");
  ref_mul(count(v.r, y), live_elements(v, y), in_value(v, "a"), in_value(v, "b"), make(v, y));
}
static void mul_backward(view v) {
  int y = out(v, "y"), a = in(v, "a"), b = in(v, "b");
  double *da = room(v, a), *db = room(v, b);
  ref_mul_backward(count(v.r, y), live_elements(v, y), in_value(v, "a"), in_value(v, "b"),
                   gradient(v, y), da, db);
  give(v, a, da);
  give(v, b, db);
}

static void silu(view v) {
  int y = out(v, "y");
  ref_silu(count(v.r, y), live_elements(v, y), in_value(v, "x"), make(v, y));
}
static void silu_backward(view v) {
  int y = out(v, "y"), x = in(v, "x");
  double *dx = room(v, x);
  ref_silu_backward(count(v.r, y), live_elements(v, y), in_value(v, "x"), gradient(v, y), dx);
  give(v, x, dx);
}

static double *turned(view v, const double *x, int64_t n) {
  double *y = ot_doubles(v.r->t, n + 1);
  for (int64_t i = 0; i < n; i++) y[i] = attr_i(v, "side") ? -x[i] : x[i];
  return y;
}
static void relu(view v) {
  const int y = out(v, "y");
  const int64_t n = count(v.r, y);
  double *to = make(v, y);
  ref_relu(n, live_elements(v, y), turned(v, in_value(v, "x"), n), to);
  for (int64_t i = 0; i < n && attr_i(v, "side"); i++) to[i] = -to[i];
}
static void relu_backward(view v) {
  const int x = in(v, "x"), y = out(v, "y");
  const int64_t n = count(v.r, x);
  double *dx = room(v, x);
  ref_relu_backward(n, live_elements(v, y), turned(v, in_value(v, "x"), n), gradient(v, y), dx);
  give(v, x, dx);
}
static void sigmoid(view v) {
  int y = out(v, "y");
  ref_sigmoid(count(v.r, y), live_elements(v, y), in_value(v, "x"), make(v, y));
}
static void sigmoid_backward(view v) {
  int y = out(v, "y"), x = in(v, "x");
  double *dx = room(v, x);
  ref_sigmoid_backward(count(v.r, y), live_elements(v, y), in_value(v, "x"), gradient(v, y), dx);
  give(v, x, dx);
}

static void cast(view v) {
  int y = out(v, "y"), x = in(v, "x");
  if (is_int(v.r, x)) {
    gref_set_ints(v.r, y, v.r->ints[x]);
    if (live_rows(v, y) < dim(v.r, y, 0))
      memset(v.r->ints[y] + live_elements(v, y), 0,
             (size_t)(count(v.r, y) - live_elements(v, y)) * sizeof(int32_t));
    return;
  }
  ref_cast(count(v.r, y), live_elements(v, y), in_value(v, "x"), make(v, y));
}
static void cast_backward(view v) {
  int y = out(v, "y"), x = in(v, "x");
  double *dx = room(v, x);
  ref_cast(count(v.r, y), live_elements(v, y), gradient(v, y), dx);
  give(v, x, dx);
}

static void scale_lengths(view v) {
  int y = out(v, "y"), x = in(v, "cu_seqlens");
  v.r->ints[y] = ot_ints(v.r->t, count(v.r, y) + 1);
  for (int64_t i = 0; i < count(v.r, y); i++)
    v.r->ints[y][i] = (int32_t)attr_i(v, "times") * v.r->ints[x][i];
}

static void concat(view v) {
  const int32_t *x;
  const double *from[64];
  int64_t width[64], outer = 1, inner = 1;
  int n = list(v, "x", &x), y = out(v, "y"), axis = (int)attr_i(v, "axis");
  for (int d = 1; d < axis; d++) outer *= dim(v.r, y, d);
  for (int d = axis + 1; d < v.r->g->tensor[y].rank; d++) inner *= dim(v.r, y, d);
  for (int k = 0; k < n; k++) {
    from[k] = v.r->value[x[k]];
    width[k] = inner * dim(v.r, x[k], axis);
  }
  ref_concat(dim(v.r, y, 0) * outer, live_rows(v, y) * outer, n, width, from, make(v, y));
}
static void concat_backward(view v) {
  const int32_t *x;
  int64_t outer = live_rows(v, out(v, "y")), inner = 1, total, at = 0;
  int n = list(v, "x", &x), y = out(v, "y"), axis = (int)attr_i(v, "axis");
  for (int d = 1; d < axis; d++) outer *= dim(v.r, y, d);
  for (int d = axis + 1; d < v.r->g->tensor[y].rank; d++) inner *= dim(v.r, y, d);
  total = inner * dim(v.r, y, axis);
  for (int k = 0; k < n; k++) {
    int64_t width = inner * dim(v.r, x[k], axis);
    double *d = room(v, x[k]);
    for (int64_t i = 0; i < outer; i++)
      for (int64_t c = 0; c < width; c++) d[i * width + c] = gradient(v, y)[i * total + at + c];
    give(v, x[k], d);
    at += width;
  }
}

static void linear(view v) {
  int x = in(v, "x"), w = in(v, "w"), y = out(v, "y");
  ref_linear_forward(dim(v.r, x, 0), live_rows(v, x), dim(v.r, w, 1), dim(v.r, w, 0),
                     in_value(v, "x"), in_value(v, "w"), in_value(v, "b"), make(v, y));
}
static void linear_backward(view v) {
  int x = in(v, "x"), w = in(v, "w"), b = in(v, "b");
  double *dx = room(v, x), *dw = room(v, w), *db = room(v, b);
  ref_linear_backward(dim(v.r, x, 0), live_rows(v, x), dim(v.r, w, 1), dim(v.r, w, 0),
                      in_value(v, "x"), in_value(v, "w"), gradient(v, out(v, "y")), dx, dw, db);
  give(v, x, dx);
  give(v, w, dw);
  give(v, b, db);
}

static void rmsnorm(view v) {
  int x = in(v, "x");
  int64_t D = dim(v.r, x, v.r->g->tensor[x].rank - 1);
  ref_rmsnorm_forward(count(v.r, x) / D, live_elements(v, x) / D, D, attr_f(v, "eps"),
                      in_value(v, "x"), in_value(v, "w"), make(v, out(v, "y")));
}
static void rmsnorm_backward(view v) {
  int x = in(v, "x"), w = in(v, "w");
  int64_t D = dim(v.r, x, v.r->g->tensor[x].rank - 1);
  double *dx = room(v, x), *dw = room(v, w);
  ref_rmsnorm_backward(count(v.r, x) / D, live_elements(v, x) / D, D, attr_f(v, "eps"),
                       in_value(v, "x"), in_value(v, "w"), gradient(v, out(v, "y")), dx, dw);
  give(v, x, dx);
  give(v, w, dw);
}

static void layernorm(view v) {
  int x = in(v, "x");
  int64_t D = dim(v.r, x, v.r->g->tensor[x].rank - 1);
  ref_layernorm_forward(count(v.r, x) / D, live_elements(v, x) / D, D, attr_f(v, "eps"),
                        in_value(v, "x"), in_value(v, "w"), in_value(v, "b"), make(v, out(v, "y")));
}
static void layernorm_backward(view v) {
  int x = in(v, "x"), w = in(v, "w"), b = in(v, "b");
  int64_t D = dim(v.r, x, v.r->g->tensor[x].rank - 1);
  double *dx = room(v, x), *dw = room(v, w), *db = room(v, b);
  ref_layernorm_backward(count(v.r, x) / D, live_elements(v, x) / D, D, attr_f(v, "eps"),
                         in_value(v, "x"), in_value(v, "w"), gradient(v, out(v, "y")), dx, dw, db);
  give(v, x, dx);
  give(v, w, dw);
  give(v, b, db);
}

/* The first `dim` features of every head turn, the others pass; backward turns the other way. */
static void turn(view v, const double *from, double *to, bool inverse) {
  int x = in(v, "x");
  int64_t T = dim(v.r, x, 0), H = dim(v.r, x, 1), D = dim(v.r, x, 2),
          part = attr_i(v, "dim") ? attr_i(v, "dim") : D;
  double *a = ot_doubles(v.r->t, T * H * part + 1), *b = ot_doubles(v.r->t, T * H * part + 1);
  for (int64_t i = 0; i < T * H; i++) memcpy(a + i * part, from + i * D, (size_t)part * sizeof *a);
  double *angle = ot_doubles(v.r->t, part + 1), theta = attr_f(v, "theta"), length = 1;
  for (int64_t c = 0; c < part / 2; c++) angle[c] = pow(theta, -2.0 * (double)c / (double)part);
  if (attr_i(v, "rope_type") == 1)
    length = ref_yarn(part, theta, attr_f(v, "factor"),
                      (double)attr_i(v, "original_max_position_embeddings"), attr_f(v, "beta_fast"),
                      attr_f(v, "beta_slow"), attr_f(v, "attention_factor"), attr_i(v, "truncate"),
                      angle);
  ref_rope_by(T, sequences(v), H, part, angle, length, attr_i(v, "interleaved"),
              in_ints(v, "cu_seqlens"), in_ints(v, "q_offset"), inverse, a, b);
  ref_cast(T * H * D, live_elements(v, x), from, to);
  for (int64_t i = 0; i < T * H; i++) memcpy(to + i * D, b + i * part, (size_t)part * sizeof *a);
}
static void rope(view v) {
  turn(v, in_value(v, "x"), make(v, out(v, "y")), false);
}
static void rope_backward(view v) {
  double *dx = room(v, in(v, "x"));
  turn(v, gradient(v, out(v, "y")), dx, true);
  give(v, in(v, "x"), dx);
}

/* ---- attention ---- */

static ref_attn attention(view v, ref_kind kind) {
  gref *r = v.r;
  int q = in(v, "q"), k = in(v, "k"), value = in(v, "v"), idx = in(v, "idx");
  return (ref_attn){.kind = kind,
                    .T = dim(r, q, 0),
                    .TK = dim(r, k, 0),
                    .B = sequences(v),
                    .H = dim(r, q, 1),
                    .KH = dim(r, k, 1),
                    .D = dim(r, q, 2),
                    .DV = dim(r, value, 2),
                    .q = r->value[q],
                    .k = r->value[k],
                    .v = r->value[value],
                    .cu = in_ints(v, "cu_seqlens"),
                    .cu_k = in_ints(v, "cu_seqlens_k"),
                    .q_offset = in_ints(v, "q_offset"),
                    .sinks = in_value(v, "sinks"),
                    .scale = attr_f(v, "scale"),
                    .softcap = attr_f(v, "softcap"),
                    .kernel = attr_i(v, "kernel"),
                    .stride = attr_i(v, "stride"),
                    .idx = idx < 0 ? NULL : r->ints[idx],
                    .one_idx = idx >= 0 && dim(r, idx, 1) == 1,
                    .block = attr_i(v, "block"),
                    .top_n = idx < 0 ? 0 : dim(r, idx, 2),
                    .window_left = attr_i(v, "window_left")};
}
static void attend(view v, ref_kind kind) {
  ref_attn a = attention(v, kind);
  double *lse = make(v, out(v, "lse"));
  ref_attn_forward(&a, make(v, out(v, "o")), lse ? lse : ot_doubles(v.r->t, a.T * a.H + 1));
}
static void attend_backward(view v, ref_kind kind) {
  ref_attn a = attention(v, kind);
  int lse = out(v, "lse");
  double *dq = room(v, in(v, "q")), *dk = room(v, in(v, "k")), *dv = room(v, in(v, "v")),
         *ds = room(v, in(v, "sinks"));
  ref_attn_backward(&a, gradient(v, out(v, "o")), lse < 0 ? NULL : v.r->grad[lse], dq, dk, dv, ds);
  give(v, in(v, "q"), dq);
  give(v, in(v, "k"), dk);
  give(v, in(v, "v"), dv);
  give(v, in(v, "sinks"), ds);
}
static void cmp_attn(view v) {
  attend(v, REF_CMP);
}
static void cmp_attn_backward(view v) {
  attend_backward(v, REF_CMP);
}
static void slc_attn(view v) {
  attend(v, REF_SLC);
}
static void slc_attn_backward(view v) {
  attend_backward(v, REF_SLC);
}
static void swa_attn(view v) {
  attend(v, REF_SWA);
}
static void swa_attn_backward(view v) {
  attend_backward(v, REF_SWA);
}

static const char *const sides[2][3] = {{"k", "k_weight", "k_method"},
                                        {"v", "v_weight", "v_method"}};

static ref_compress compression(view v, int side) {
  int x = in(v, sides[side][0]);
  return (ref_compress){.method = (ref_method)attr_i(v, sides[side][2]),
                        .T = dim(v.r, x, 0),
                        .B = sequences(v),
                        .KH = dim(v.r, x, 1),
                        .D = dim(v.r, x, 2),
                        .kernel = attr_i(v, "kernel"),
                        .stride = attr_i(v, "stride"),
                        .x = v.r->value[x],
                        .w = in_value(v, sides[side][1]),
                        .cu = in_ints(v, "cu_seqlens")};
}
static void compress_kv(view v) {
  for (int side = 0; side < 2; side++) {
    if (in(v, sides[side][0]) < 0) continue;
    ref_compress a = compression(v, side);
    if (out(v, sides[side][0]) >= 0) ref_compress_forward(&a, make(v, out(v, sides[side][0])));
  }
}
static void compress_kv_backward(view v) {
  for (int side = 0; side < 2; side++) {
    if (in(v, sides[side][0]) < 0) continue;
    ref_compress a = compression(v, side);
    int x = in(v, sides[side][0]), w = in(v, sides[side][1]), y = out(v, sides[side][0]);
    double *dx = room(v, x), *dw = room(v, w);
    if (y < 0 || !v.r->grad[y]) continue;
    ref_compress_backward(&a, v.r->grad[y], dx, dw);
    give(v, x, dx);
    give(v, w, dw);
  }
}

static void block_starts(view v) {
  const int x = in(v, "cu_seqlens"), y = out(v, "y");
  v.r->ints[y] = ot_ints(v.r->t, count(v.r, y) + 1);
  for (int64_t i = 0; i < count(v.r, y); i++)
    v.r->ints[y][i] = v.r->ints[x][i] / (int32_t)attr_i(v, "stride");
}

static ref_pool pool_of(view v) {
  const int x = in(v, "x");
  const int64_t kernel = attr_i(v, "kernel"), stride = attr_i(v, "stride");
  return (ref_pool){.method = (ref_pool_method)attr_i(v, "method"),
                    .T = dim(v.r, x, 0),
                    .B = sequences(v),
                    .KH = dim(v.r, x, 1),
                    .W = dim(v.r, x, 2) / (kernel / stride),
                    .kernel = kernel,
                    .stride = stride,
                    .x = v.r->value[x],
                    .z = in_value(v, "z"),
                    .bias = in_value(v, "bias"),
                    .cu = in_ints(v, "cu_seqlens")};
}
static void pool(view v) {
  ref_pool a = pool_of(v);
  ref_pool_forward(&a, make(v, out(v, "y")));
}
static void pool_backward(view v) {
  ref_pool a = pool_of(v);
  const int x = in(v, "x"), z = in(v, "z"), bias = in(v, "bias");
  double *dx = room(v, x), *dz = z >= 0 ? room(v, z) : ot_doubles(v.r->t, count(v.r, x) + 1),
         *db = bias >= 0 ? room(v, bias) : NULL;
  ref_pool_backward(&a, gradient(v, out(v, "y")), dx, dz, db);
  give(v, x, dx);
  if (z >= 0) give(v, z, dz);
  if (bias >= 0) give(v, bias, db);
}

static ref_index index_of(view v) {
  const int q = in(v, "q"), k = in(v, "k"), j = in(v, "index_q"), i = in(v, "index_k"),
            idx = in(v, "idx");
  return (ref_index){.T = dim(v.r, q, 0),
                     .TK = dim(v.r, k, 0),
                     .B = sequences(v),
                     .H = dim(v.r, q, 1),
                     .KH = dim(v.r, k, 1),
                     .D = dim(v.r, q, 2),
                     .J = dim(v.r, j, 1),
                     .I = dim(v.r, i, 1),
                     .C = dim(v.r, j, 2),
                     .q = v.r->value[q],
                     .k = v.r->value[k],
                     .lse = in_value(v, "lse"),
                     .index_q = v.r->value[j],
                     .index_k = v.r->value[i],
                     .weight = in_value(v, "weight"),
                     .idx = v.r->ints[idx],
                     .cu = in_ints(v, "cu_seqlens"),
                     .cu_k = in_ints(v, "cu_seqlens_k"),
                     .q_offset = in_ints(v, "q_offset"),
                     .block = attr_i(v, "block"),
                     .top_n = dim(v.r, idx, 2),
                     .scale = attr_f(v, "scale"),
                     .index_scale = attr_f(v, "index_scale"),
                     .relu = attr_i(v, "score") == 0};
}
static void index_loss(view v) {
  ref_index a = index_of(v);
  ref_index_forward(&a, make(v, out(v, "loss")));
}
static void index_loss_backward(view v) {
  ref_index a = index_of(v);
  const int w = in(v, "weight");
  double *dq = room(v, in(v, "index_q")), *dk = room(v, in(v, "index_k")),
         *dw = w >= 0 ? room(v, w) : ot_doubles(v.r->t, a.T * a.J + 1);
  ref_index_backward(&a, gradient(v, out(v, "loss")), dq, dk, dw);
  give(v, in(v, "index_q"), dq);
  give(v, in(v, "index_k"), dk);
  if (w >= 0) give(v, w, dw);
}

void gref_topk_attrs(const rgi_node *node, ref_topk *a) {
  const view v = {.n = node};
  a->kernel = attr_i(v, "kernel"), a->stride = attr_i(v, "stride"), a->block = attr_i(v, "block");
  a->top_n = attr_i(v, "top_n"), a->init = attr_i(v, "init"), a->local = attr_i(v, "local");
  a->scale = attr_f(v, "scale"), a->softcap = attr_f(v, "softcap");
  a->dot = attr_i(v, "score") == 1, a->relu = attr_i(v, "score") == 2;
  a->max = attr_i(v, "pool") == 1, a->tail = attr_i(v, "tail") == 1;
  a->share = attr_i(v, "query_block");
}

static void topk(view v) {
  int q = in(v, "q"), k = in(v, "k"), idx = out(v, "idx");
  ref_topk a = {.T = dim(v.r, q, 0),
                .TK = dim(v.r, k, 0),
                .B = sequences(v),
                .H = dim(v.r, q, 1),
                .KH = dim(v.r, k, 1),
                .D = dim(v.r, q, 2),
                .q = v.r->value[q],
                .k = v.r->value[k],
                .lse = in_value(v, "lse"),
                .weight = in_value(v, "weight"),
                .cu = in_ints(v, "cu_seqlens"),
                .cu_k = in_ints(v, "cu_seqlens_k"),
                .q_offset = in_ints(v, "q_offset")};
  gref_topk_attrs(v.n, &a);
  int64_t n = count(v.r, idx);
  int32_t *own = ot_ints(v.r->t, n + 1);
  ref_topk_forward(&a, own, NULL, 0, NULL);
  for (int64_t i = 0; v.r->ints[idx] && i < n; i++) {
    v.r->given++;
    v.r->agreed += own[i] == v.r->ints[idx][i];
  }
  if (!v.r->ints[idx]) v.r->ints[idx] = own;
}

/* ---- branches ---- */

static void values(view v, const char *port, const double **x) {
  const int32_t *ids;
  int n = list(v, port, &ids);
  for (int k = 0; k < n; k++) x[k] = v.r->value[ids[k]];
}
static void combine(view v) {
  const int32_t *o;
  const double *x[64];
  int n = list(v, "o", &o), y = out(v, "o");
  values(v, "o", x);
  ref_combine_forward((ref_act)attr_i(v, "act"), dim(v.r, y, 0), live_rows(v, y), dim(v.r, y, 1),
                      dim(v.r, y, 2), n, x, in_value(v, "gate"), make(v, y));
}
static void combine_backward(view v) {
  const int32_t *o;
  const double *x[64];
  double *d[64], *dgate = room(v, in(v, "gate"));
  int n = list(v, "o", &o), y = out(v, "o");
  values(v, "o", x);
  for (int k = 0; k < n; k++) d[k] = room(v, y);
  ref_combine_backward((ref_act)attr_i(v, "act"), dim(v.r, y, 0), live_rows(v, y), dim(v.r, y, 1),
                       dim(v.r, y, 2), n, x, in_value(v, "gate"), gradient(v, y), d, dgate);
  for (int k = 0; k < n; k++) give(v, o[k], d[k]);
  give(v, in(v, "gate"), dgate);
}

static void merge_lse(view v) {
  const int32_t *o;
  const double *x[64], *lse[64];
  int n = list(v, "o", &o), y = out(v, "o"), l = out(v, "lse");
  values(v, "o", x);
  values(v, "lse", lse);
  ref_merge_forward(dim(v.r, y, 0), live_rows(v, y), dim(v.r, y, 1), dim(v.r, y, 2), n, x, lse,
                    make(v, y), make(v, l));
}
static void merge_lse_backward(view v) {
  const int32_t *o, *l;
  const double *x[64], *lse[64];
  double *d_o[64], *d_l[64];
  int n = list(v, "o", &o), y = out(v, "o"), yl = out(v, "lse");
  list(v, "lse", &l);
  values(v, "o", x);
  values(v, "lse", lse);
  for (int k = 0; k < n; k++) {
    d_o[k] = room(v, y);
    d_l[k] = room(v, l[k]);
  }
  ref_merge_backward(dim(v.r, y, 0), live_rows(v, y), dim(v.r, y, 1), dim(v.r, y, 2), n, x, lse,
                     gradient(v, y), yl < 0 ? NULL : v.r->grad[yl], d_o, d_l);
  for (int k = 0; k < n; k++) {
    give(v, o[k], d_o[k]);
    give(v, l[k], d_l[k]);
  }
}

/* ---- both sweeps ---- */

static const struct {
  const char *op;
  void (*forward)(view), (*backward)(view);
} table[] = {{"add", add, add_backward},
             {"block_starts", block_starts, NULL},
             {"cast", cast, cast_backward},
             {"cmp_attn", cmp_attn, cmp_attn_backward},
             {"combine", combine, combine_backward},
             {"compress_kv", compress_kv, compress_kv_backward},
             {"concat", concat, concat_backward},
             {"index_loss", index_loss, index_loss_backward},
             {"layernorm", layernorm, layernorm_backward},
             {"linear", linear, linear_backward},
             {"live", cast, cast_backward},
             {"merge_lse", merge_lse, merge_lse_backward},
             {"mul", mul, mul_backward},
             {"pool", pool, pool_backward},
             {"relu", relu, relu_backward},
             {"reshape", look, look_backward},
             {"rmsnorm", rmsnorm, rmsnorm_backward},
             {"rope", rope, rope_backward},
             {"scale_lengths", scale_lengths, NULL},
             {"sigmoid", sigmoid, sigmoid_backward},
             {"silu", silu, silu_backward},
             {"slc_attn", slc_attn, slc_attn_backward},
             {"slice", look, look_backward},
             {"split", look, look_backward},
             {"stop_gradient", look, NULL},
             {"swa_attn", swa_attn, swa_attn_backward},
             {"topk", topk, NULL},
             {"transpose", look, look_backward}};

static int find_op(const rgi_node *n) {
  for (int i = 0; i < RGI_COUNT(table); i++)
    if (strcmp(table[i].op, n->op->name) == 0) return i;
  return -1;
}

const char *gref_forward(gref *r) {
  for (int n = 0; n < r->g->nnode; n++) {
    const rgi_node *node = &r->g->node[n];
    int op = find_op(node), depth = 0;
    if (op < 0) return node->name;
    table[op].forward((view){r, node});
    for (int i = 0; i < rgi_nin(node); i++)
      if (node->in[i] >= 0 && r->depth[node->in[i]] > depth) depth = r->depth[node->in[i]];
    for (int i = 0; i < rgi_nout(node); i++) {
      int t = node->out[i];
      if (t < 0) continue;
      r->depth[t] = depth + (table[op].forward != look);
      for (int64_t k = 0; r->rounded && r->value[t] && k < count(r, t); k++)
        r->value[t][k] = ot_round(r->g->tensor[t].dtype, r->value[t][k]);
    }
  }
  return NULL;
}

void gref_seed(gref *r, int tensor, const double *d) {
  int64_t n = count(r, tensor), live = n;
  if (r->g->tensor[tensor].rank > 0 && dim(r, tensor, 0) > 0)
    live = n / dim(r, tensor, 0) * gref_live(r, tensor);
  if (!r->grad[tensor]) r->grad[tensor] = ot_doubles(r->t, n + 1);
  for (int64_t i = 0; i < live; i++) r->grad[tensor][i] += d[i];
}

void gref_backward(gref *r) {
  for (int n = r->g->nnode - 1; n >= 0; n--) {
    const rgi_node *node = &r->g->node[n];
    int op = find_op(node);
    bool reached = false;
    for (int i = 0; i < rgi_nout(node); i++)
      reached = reached || (node->out[i] >= 0 && r->grad[node->out[i]]);
    if (reached && table[op].backward) table[op].backward((view){r, node});
  }
}
