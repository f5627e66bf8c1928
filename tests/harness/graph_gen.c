/* tests/harness/graph_gen.c: see graph_gen.h. Tensors carry a rough size of their
 * elements, so that softmax logits and products stay in a range where fp32 is
 * accurate and gates mean something.
 */
#include "graph_gen.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum kind { TOKENS, KEYS, BLOCKS, LSE, INDEX, WEIGHT, LOOSE } kind;

typedef struct gtensor {
  char name[16];
  kind kind;
  int tag; /* BLOCKS: which kernel and stride; tensors of different tags do not mix */
  int rank;
  int64_t dim[5]; /* dim[0] of TOKENS and the like is nominal: T */
  rg_dtype dtype;
  double size;
  bool input, read;
} gtensor;

enum {
  MOST = 160,
  TEXT = 16384,
  T = 1,
  S = 2
}; /* extents 1 and 2 on axis 0 stand for T and S: weights have at least 3 */

typedef struct gen {
  ot *t;
  gen_options o;
  gtensor x[MOST];
  int n, nodes, ninputs;
  char *inputs, *node[MOST], *outputs;
  int64_t KH, G, D, E; /* E: width of values */
  rg_dtype dtype;      /* large: of most tensors */
} gen;

static bool chance(gen *g, double p) {
  return ot_uniform(g->t) < p;
}
/* A choice that came later than the seeds. */
static bool aside(gen *g, int which, double p) {
  return ot_aside(g->t, (uint64_t)which) < p;
}
static int64_t among(gen *g, int n, const int64_t *of) {
  return of[ot_below(g->t, n)];
}
#define AMONG(g, ...) \
  among((g), (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__})

static void print(char *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void print(char *text, const char *format, ...) {
  size_t n = strlen(text);
  va_list args;
  va_start(args, format);
  int more = vsnprintf(text + n, TEXT - n, format, args);
  va_end(args);
  if (more < 0 || n + (size_t)more >= TEXT) abort();
}

static gtensor *fresh(gen *g, const char *prefix, gtensor like) {
  if (g->n == MOST) abort();
  gtensor *x = &g->x[g->n];
  *x = like;
  x->input = x->read = false;
  snprintf(x->name, sizeof x->name, "%s%d", prefix, g->n++);
  return x;
}

static rg_dtype any_float(gen *g) {
  if (g->o.large && !(g->o.mixed && chance(g, 0.1))) return g->dtype;
  return g->o.mixed && chance(g, 0.5) ? (rg_dtype)AMONG(g, RG_F16, RG_BF16) : RG_F32;
}

static int new_input(gen *g, kind k, int rank, const int64_t *dim, rg_dtype dtype) {
  gtensor like = {.kind = k, .rank = rank, .dtype = dtype, .size = 1};
  memcpy(like.dim, dim, (size_t)rank * sizeof *dim);
  if (k == WEIGHT) like.size = 1 / sqrt((double)dim[rank - 1]);
  gtensor *x = fresh(g, k == WEIGHT ? "w" : "x", like);
  x->input = true;
  const char *grad = chance(g, 0.6) ? "true" : chance(g, 0.4) ? "\"accumulate\"" : "false";
  print(g->inputs, "%s\"%s\": { \"shape\": [", g->ninputs++ ? ",\n" : "", x->name);
  for (int i = 0; i < rank; i++) {
    if (i == 0 && k != WEIGHT && dim[0] <= S)
      print(g->inputs, "\"%s\"", dim[0] == T ? "T" : "S");
    else
      print(g->inputs, "%s%lld", i ? ", " : "", (long long)dim[i]);
  }
  print(g->inputs, "], \"dtype\": \"%s\", \"grad\": %s }", rg_dtype_name(dtype), grad);
  return (int)(x - g->x);
}

static bool alike(const gtensor *a, const gtensor *b) {
  return a->kind == b->kind && a->tag == b->tag && a->rank == b->rank && a->dtype == b->dtype &&
         memcmp(a->dim, b->dim, (size_t)a->rank * sizeof *a->dim) == 0;
}

/* A random tensor of which `fits` holds, late ones preferred; -1 if there is none. */
static int pick(gen *g, bool (*fits)(const gtensor *x, const void *arg), const void *arg) {
  int found = -1, seen = 0;
  for (int i = 0; i < g->n; i++)
    if (fits(&g->x[i], arg)) {
      seen += 1 + (i > g->n - 6);
      if (ot_below(g->t, seen) < 1 + (i > g->n - 6)) found = i;
    }
  return found;
}
static bool fits_alike(const gtensor *x, const void *arg) {
  return alike(x, arg);
}
static bool fits_plain(const gtensor *x, const void *arg) {
  (void)arg;
  return x->kind == TOKENS || x->kind == BLOCKS || x->kind == LOOSE || x->kind == KEYS;
}
static bool fits_flat(const gtensor *x, const void *arg) {
  (void)arg;
  return x->kind == TOKENS && x->rank == 2;
}
static bool fits_heads(const gtensor *x, const void *arg) {
  (void)arg;
  return x->kind == TOKENS && x->rank == 3;
}
static bool fits_loose(const gtensor *x, const void *arg) {
  (void)arg;
  return x->kind == LOOSE && x->rank == 3;
}

/* One like `want`: an old one if chance has it, else an input. */
static int one(gen *g, kind k, int rank, const int64_t *dim, rg_dtype dtype) {
  gtensor want = {.kind = k, .rank = rank, .dtype = dtype};
  memcpy(want.dim, dim, (size_t)rank * sizeof *dim);
  int i = chance(g, 0.8) ? pick(g, fits_alike, &want) : -1;
  return i >= 0 ? i : new_input(g, k, rank, dim, dtype);
}
#define ONE(g, kind, dtype, ...)                                              \
  one((g), (kind), (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), \
      (int64_t[]){__VA_ARGS__}, (dtype))

/* Tensor i as an operand: mentioned, hence read. */
static const char *use(gen *g, int i) {
  g->x[i].read = true;
  return g->x[i].name;
}

/* A new node's text up to its inputs; the caller prints ports and closes it. */
static char *begin(gen *g, const char *op) {
  char *text = ot_alloc(g->t, TEXT);
  g->node[g->nodes] = text;
  print(text, "{ \"name\": \"n%d\", \"op\": \"%s\", \"in\": { ", g->nodes, op);
  g->nodes++;
  return text;
}
static void lengths(gen *g, char *text, kind k, bool needed) {
  if (needed || (k == TOKENS && chance(g, 0.5)) || (k == KEYS && chance(g, 0.5)))
    print(text, ", \"cu_seqlens\": \"%s\"", k == KEYS ? "cu_keys" : "cu_seqlens");
}

/* An elementwise operand that will stay in range; -1: none. */
static int plain(gen *g, double most) {
  for (int tries = 0; tries < 8; tries++) {
    int i = pick(g, fits_plain, NULL);
    if (i >= 0 && g->x[i].size <= most) return i;
  }
  return -1;
}

/* ---- one node of each kind; they do nothing where no operand fits ---- */

static void add_linear(gen *g) {
  int x = pick(g, fits_flat, NULL);
  if (x < 0) return;
  rg_dtype dtype = g->x[x].dtype;
  int64_t K = g->x[x].dim[1], N = g->KH * g->G * g->D;
  if (g->o.large) {
    if (N > 1024) N = g->KH * g->D;
    if (N > 1024 || chance(g, 0.4)) N = AMONG(g, 8, 40, 64, 200);
  } else if (!chance(g, 0.5)) {
    N = AMONG(g, 8, 12, 16);
  }
  int w = ONE(g, WEIGHT, dtype, N, K), b = chance(g, 0.3) ? ONE(g, WEIGHT, dtype, N) : -1;
  char *s = begin(g, "linear");
  print(s, "\"x\": \"%s\", \"w\": \"%s\"", use(g, x), use(g, w));
  if (b >= 0) print(s, ", \"b\": \"%s\"", use(g, b));
  lengths(g, s, TOKENS, false);
  gtensor y = g->x[x];
  y.dim[1] = N;
  print(s, " }, \"out\": { \"y\": \"%s\" } }", fresh(g, "t", y)->name);
}

/* silu, sigmoid or relu. relu of what the caller gave only: its slope jumps at 0, and a number
 * within rounding of 0 would have one slope here and another there. */
static void add_act(gen *g) {
  int x = chance(g, 0.1) ? pick(g, fits_plain, NULL) : plain(g, 4);
  if (x < 0) return;
  const bool relu = aside(g, 16, 0.2) && g->x[x].input;
  char *s = begin(g, relu ? "relu" : aside(g, 0, 0.3) ? "sigmoid" : "silu");
  print(s, "\"x\": \"%s\"", use(g, x));
  lengths(g, s, g->x[x].kind, false);
  gtensor y = g->x[x];
  y.size *= 0.6;
  print(s, " }, \"out\": { \"y\": \"%s\" }%s }", fresh(g, "t", y)->name,
        relu && aside(g, 17, 0.5) ? ", \"attrs\": { \"side\": \"negative\" }" : "");
}

static void add_mul(gen *g) {
  int a = plain(g, 2);
  if (a < 0) return;
  int b = chance(g, 0.3) ? a : pick(g, fits_alike, &g->x[a]);
  if (g->x[b].size > 2) return;
  char *s = begin(g, "mul");
  print(s, "\"a\": \"%s\", \"b\": \"%s\"", use(g, a), use(g, b));
  lengths(g, s, g->x[a].kind, false);
  gtensor y = g->x[a];
  y.size *= g->x[b].size * (a == b ? 1.7 : 1);
  print(s, " }, \"out\": { \"y\": \"%s\" } }", fresh(g, "t", y)->name);
}

static void add_add(gen *g) {
  int a = plain(g, 4), n = 1 + (int)ot_below(g->t, 4);
  if (a < 0) return;
  char *s = begin(g, "add");
  gtensor y = g->x[a];
  print(s, "\"a\": [\"%s\"", use(g, a));
  for (int k = 1; k < n; k++) {
    int b = chance(g, 0.25) ? a : pick(g, fits_alike, &g->x[a]);
    print(s, ", \"%s\"", use(g, b));
    y.size += g->x[b].size;
  }
  print(s, "]");
  lengths(g, s, y.kind, false);
  print(s, " }, \"out\": { \"y\": \"%s\" } }", fresh(g, "t", y)->name);
}

/* rmsnorm or layernorm; of two features mean and variance leave signs alone */
static void add_norm(gen *g) {
  int x = pick(g, fits_plain, NULL);
  if (x < 0) return;
  const int64_t D = g->x[x].dim[g->x[x].rank - 1];
  const bool layer = D > 2 && aside(g, 5, 0.4);
  int w = chance(g, 0.5) ? ONE(g, WEIGHT, g->x[x].dtype, D) : -1;
  int b = layer && aside(g, 6, 0.5) ? ONE(g, WEIGHT, g->x[x].dtype, D) : -1;
  char *s = begin(g, layer ? "layernorm" : "rmsnorm");
  print(s, "\"x\": \"%s\"", use(g, x));
  if (w >= 0) print(s, ", \"w\": \"%s\"", use(g, w));
  if (b >= 0) print(s, ", \"b\": \"%s\"", use(g, b));
  lengths(g, s, g->x[x].kind, false);
  gtensor y = g->x[x];
  y.size = 1;
  print(s, " }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"eps\": 0.01 } }",
        fresh(g, "t", y)->name);
}

/* A row for every few tokens of x. */
static void add_pool(gen *g, int x) {
  const int64_t stride = AMONG(g, 1, 2, 4), parts = g->x[x].dim[2] % 2 ? 1 : AMONG(g, 1, 2);
  static const char *const methods[] = {"softmax", "max", "min"};
  const int64_t method = AMONG(g, 0, 0, 1, 2);
  const bool softmax = method == 0;
  int z = softmax ? pick(g, fits_alike, &g->x[x]) : -1;
  if (z >= 0 && g->x[z].size > 2) return;
  char *s = begin(g, "pool");
  print(s, "\"x\": \"%s\"", use(g, x));
  if (z >= 0) print(s, ", \"z\": \"%s\"", use(g, z));
  if (softmax && stride > 2)
    print(s, ", \"bias\": \"%s\"", use(g, ONE(g, WEIGHT, g->x[x].dtype, stride, g->x[x].dim[2])));
  lengths(g, s, TOKENS, true);
  gtensor y = g->x[x];
  y.kind = BLOCKS;
  y.tag = (int)(stride * 1000 + stride);
  y.dim[2] /= parts;
  print(s,
        " }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"kernel\": %lld, \"stride\": %lld, "
        "\"method\": \"%s\" } }",
        fresh(g, "c", y)->name, (long long)(stride * parts), (long long)stride, methods[method]);
}

static void add_rope(gen *g) {
  int x = pick(g, fits_heads, NULL);
  if (x >= 0 && aside(g, 15, 0.2)) {
    add_pool(g, x);
    return;
  }
  if (x < 0 || g->x[x].dim[2] % 2) return;
  char *s = begin(g, "rope");
  print(s, "\"x\": \"%s\"", use(g, x));
  lengths(g, s, TOKENS, true);
  if (chance(g, 0.2)) print(s, ", \"q_offset\": \"q_offset\"");
  gtensor y = g->x[x];
  print(s, " }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"dim\": %lld", fresh(g, "t", y)->name,
        (long long)(chance(g, 0.3) ? y.dim[2] / 4 * 2 : 0));
  if (aside(g, 1, 0.3)) print(s, ", \"interleaved\": true");
  if (aside(g, 2, 0.3))
    print(s,
          ", \"rope_type\": \"yarn\", \"factor\": 8, \"original_max_position_embeddings\": %lld, "
          "\"truncate\": %s",
          aside(g, 3, 0.5) ? 64LL : 4096LL, aside(g, 4, 0.5) ? "true" : "false");
  print(s, " } }");
}

static void add_cast(gen *g) {
  int x = pick(g, fits_plain, NULL);
  if (x < 0) return;
  char *s = begin(g, "cast");
  print(s, "\"x\": \"%s\"", use(g, x));
  lengths(g, s, g->x[x].kind, false);
  gtensor y = g->x[x];
  if (g->o.mixed) y.dtype = (rg_dtype)AMONG(g, RG_F32, RG_F32, RG_F16, RG_BF16);
  print(s, " }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"to\": \"%s\" } }",
        fresh(g, "t", y)->name, g->o.mixed ? rg_dtype_name(y.dtype) : "same");
}

static void add_concat(gen *g) {
  int a = plain(g, 8), n = 2 + (int)ot_below(g->t, 2);
  if (a < 0) return;
  gtensor y = g->x[a];
  int axis = 1 + (int)ot_below(g->t, y.rank - 1);
  if (y.dim[axis] > (g->o.large ? 400 : 24)) return;
  char *s = begin(g, "concat");
  print(s, "\"x\": [\"%s\"", use(g, a));
  for (int k = 1; k < n; k++) {
    int b = chance(g, 0.25) ? a : pick(g, fits_alike, &g->x[a]);
    print(s, ", \"%s\"", use(g, b));
    y.dim[axis] += g->x[b].dim[axis];
  }
  print(s, "]");
  lengths(g, s, y.kind, false);
  print(s, " }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"axis\": %d } }", fresh(g, "t", y)->name,
        axis);
}

/* May the view cut or move axis 0 of x? */
static bool rows_free(const gen *g, const gtensor *x) {
  return x->kind == LOOSE || ((g->o.whole || g->o.moved) && x->kind == TOKENS && x->dim[0] > S);
}

static void add_slice(gen *g) {
  int x = chance(g, 0.2) ? (int)ot_below(g->t, g->n) : pick(g, fits_plain, NULL);
  if (x < 0 || g->x[x].kind == INDEX || g->x[x].kind == LSE || g->x[x].rank < 2) return;
  gtensor y = g->x[x];
  bool free = y.kind == WEIGHT || rows_free(g, &y);
  int axis = free ? (int)ot_below(g->t, y.rank) : 1 + (int)ot_below(g->t, y.rank - 1);
  if (y.dim[axis] < 4) return;
  if (chance(g, 0.4)) { /* split, here and there unevenly */
    int64_t first = chance(g, 0.6) && y.dim[axis] % 2 == 0 ? y.dim[axis] / 2
                                                           : 1 + ot_below(g->t, y.dim[axis] - 1);
    gtensor z = y;
    z.dim[axis] -= first;
    y.dim[axis] = first;
    if (y.kind == WEIGHT && (y.dim[0] < 3 || z.dim[0] < 3)) return;
    char *s = begin(g, "split");
    print(s, "\"x\": \"%s\" }, \"out\": { \"y\": [\"%s\", ", use(g, x), fresh(g, "t", y)->name);
    print(s, "\"%s\"] }, \"attrs\": { \"axis\": %d", fresh(g, "t", z)->name, axis);
    if (y.dim[axis] != z.dim[axis] || chance(g, 0.5))
      print(s, ", \"sizes\": [%lld, %lld]", (long long)y.dim[axis], (long long)z.dim[axis]);
    print(s, " } }");
    return;
  }
  int64_t start = ot_below(g->t, y.dim[axis] / 2),
          stop = y.dim[axis] - ot_below(g->t, y.dim[axis] / 2);
  y.dim[axis] = stop - start;
  if (y.kind == WEIGHT && y.dim[0] < 3) return;
  char *s = begin(g, "slice");
  print(s,
        "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"axis\": %d, \"start\": %lld, "
        "\"stop\": "
        "%lld } }",
        use(g, x), fresh(g, "t", y)->name, axis, (long long)start, (long long)stop);
}

/* Of whatever there is: weights, choices, views. */
static void add_stop(gen *g) {
  const int x = chance(g, 0.3) ? (int)ot_below(g->t, g->n) : pick(g, fits_plain, NULL);
  if (x < 0) return;
  char *s = begin(g, "stop_gradient");
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" } }", use(g, x),
        fresh(g, "t", g->x[x])->name);
}

/* [T, N] to heads and back. A view that is not contiguous is made so first. */
static void add_reshape(gen *g) {
  int x = pick(g, chance(g, 0.7) ? fits_flat : fits_heads, NULL);
  if (x < 0) return;
  gtensor y = g->x[x];
  char shape[64];
  if (y.rank == 2) {
    int64_t D = y.dim[1] % g->D == 0 ? g->D : y.dim[1] % 4 == 0 ? 4 : y.dim[1];
    y.rank = 3;
    y.dim[1] /= D;
    y.dim[2] = D;
    snprintf(shape, sizeof shape, "0, -1, %lld", (long long)D);
  } else {
    y.rank = 2;
    y.dim[1] *= y.dim[2];
    snprintf(shape, sizeof shape, "0, %s", "-1");
  }
  char *s = begin(g, "cast"), dense[16];
  snprintf(dense, sizeof dense, "%s", fresh(g, "t", g->x[x])->name);
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" } }", use(g, x), dense);
  s = begin(g, "reshape");
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"shape\": [%s] } }", dense,
        fresh(g, "t", y)->name, shape);
}

/* Views of views on four axes: heads in groups, groups in front. */
static void add_transpose(gen *g) {
  int x = pick(g, fits_heads, NULL);
  /* rows and heads change places, there or back */
  if ((g->o.whole || g->o.moved) && chance(g, 0.5)) {
    int back = pick(g, fits_loose, NULL);
    if (back >= 0 && chance(g, 0.6)) x = back;
    if (x < 0) return;
    gtensor y = g->x[x];
    y.dim[0] = g->x[x].dim[1];
    y.dim[1] = g->x[x].dim[0];
    y.kind = g->x[x].kind == LOOSE ? TOKENS : LOOSE;
    char *s = begin(g, "transpose");
    print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"perm\": [1, 0, 2] } }",
          use(g, x), fresh(g, "t", y)->name);
    return;
  }
  if (x < 0 || g->x[x].dim[1] % 2) return;
  gtensor y = g->x[x];
  int64_t half = y.dim[1] / 2;
  char *s = begin(g, "cast"), first[16], second[16];
  snprintf(first, sizeof first, "%s", fresh(g, "t", y)->name);
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" } }", use(g, x), first);
  y.rank = 4;
  y.dim[3] = y.dim[2];
  y.dim[1] = 2;
  y.dim[2] = half;
  s = begin(g, "reshape");
  snprintf(second, sizeof second, "%s", fresh(g, "t", y)->name);
  print(
      s,
      "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"shape\": [0, 2, %lld, %lld] } }",
      first, second, (long long)half, (long long)y.dim[3]);
  y.dim[1] = half;
  y.dim[2] = 2;
  s = begin(g, "transpose");
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"perm\": [0, 2, 1, 3] } }",
        second, fresh(g, "t", y)->name);
}

/* Tame heads of this shape. */
static int heads(gen *g, int64_t H, int64_t D, rg_dtype dtype) {
  for (int tries = 0; tries < 6; tries++) {
    int i = ONE(g, TOKENS, dtype, T, H, D);
    if (g->x[i].size <= 1.5) return i;
  }
  return new_input(g, TOKENS, 3, (int64_t[]){T, H, D}, dtype);
}

/* Heads to go with q: of wide ones q's own products with itself would make all but one-hot weights,
 * whose gradients cancel out. */
static int keys_for(gen *g, int q, int64_t KH, int64_t D, rg_dtype dtype) {
  int k = heads(g, KH, D, dtype);
  return k == q && g->o.large ? new_input(g, TOKENS, 3, (int64_t[]){T, KH, D}, dtype) : k;
}

static void sequence_ports(gen *g, char *s, int64_t H, int sinks) {
  (void)H;
  print(s, ", \"cu_seqlens\": \"cu_seqlens\"");
  if (sinks >= 0) print(s, ", \"sinks\": \"%s\"", use(g, sinks));
}

static void out_ports(gen *g, char *s, gtensor o) {
  gtensor lse = {.kind = LSE, .rank = 2, .dim = {T, o.dim[1]}, .dtype = RG_F32, .size = 1};
  print(s, " }, \"out\": { \"o\": \"%s\"", fresh(g, "t", o)->name);
  if (chance(g, 0.7)) print(s, ", \"lse\": \"%s\"", fresh(g, "l", lse)->name);
  print(s, " }, \"attrs\": { ");
  if (chance(g, 0.2)) print(s, "\"softcap\": 3.0, ");
}

static void add_swa(gen *g) {
  int64_t KH = chance(g, 0.7) ? g->KH : AMONG(g, 1, 2, 3),
          H = KH * (chance(g, 0.7) ? g->G : AMONG(g, 1, 2)), D = g->D, E = g->E;
  rg_dtype dtype = any_float(g);
  bool apart = chance(g, 0.15);
  int q = heads(g, H, D, dtype), k, v;
  if (apart) {
    k = ONE(g, KEYS, dtype, S, KH, D);
    v = ONE(g, KEYS, dtype, S, KH, E);
    if (g->x[k].size > 1.5) return;
  } else {
    k = keys_for(g, q, KH, D, dtype);
    v = chance(g, 0.3) && D == E ? k : ONE(g, TOKENS, dtype, T, KH, E);
    if (KH == H && chance(g, 0.2) && !g->o.large) k = q;
  }
  int sinks = chance(g, 0.25) ? ONE(g, WEIGHT, dtype, H) : -1;
  char *s = begin(g, "swa_attn");
  print(s, "\"q\": \"%s\", \"k\": \"%s\", \"v\": \"%s\"", use(g, q), use(g, k), use(g, v));
  sequence_ports(g, s, H, sinks);
  if (apart) print(s, ", \"cu_seqlens_k\": \"cu_keys\"");
  if (apart || chance(g, 0.1)) print(s, ", \"q_offset\": \"q_offset\"");
  gtensor o = g->x[q];
  o.dim[2] = E;
  o.size = g->x[v].size;
  out_ports(g, s, o);
  print(s, "\"window_left\": %lld } }",
        (long long)(g->o.large ? AMONG(g, -1, -1, 0, 16, 63, 64, 129, 511)
                               : AMONG(g, -1, 0, 3, 7, 20)));
}

/* What a choice among blocks needs; `dot`: by pooled keys, one a block. */
typedef struct blocks {
  int64_t kernel, stride, block, top_n, init, local;
  bool dot;
} blocks;

static blocks draw_blocks(gen *g) {
  blocks b = {.block = 8, .top_n = 3, .init = 1, .local = 1};
  if (!g->o.large) {
    b.stride = AMONG(g, 2, 4), b.kernel = b.stride * AMONG(g, 1, 2);
    return b;
  }
  b.block = AMONG(g, 32, 64, 64, 128);
  b.stride = AMONG(g, 8, 16, 16, 32), b.kernel = b.stride * AMONG(g, 1, 2, 2, 4);
  b.dot = chance(g, 0.2);
  if (b.dot) b.kernel = b.stride = b.block;
  b.top_n = AMONG(g, 1, 2, 4, 4, 7, 16, 16, 32);
  b.local = b.top_n > 1 ? AMONG(g, 1, 2) : 1;
  b.init = AMONG(g, 0, 1, 1, 3);
  if (b.init + b.local > b.top_n) b.init = b.top_n - b.local;
  return b;
}

/* The first E columns of keys: values whose gradient is within theirs. */
static int first_columns(gen *g, int k, int64_t E) {
  gtensor y = g->x[k];
  y.dim[2] = E;
  char *s = begin(g, "slice");
  print(s, "\"x\": \"%s\" }, \"out\": { \"y\": \"%s\" }, \"attrs\": { \"axis\": 2, ", use(g, k),
        fresh(g, "v", y)->name);
  print(s, "\"start\": 0, \"stop\": %lld } }", (long long)E);
  return g->n - 1;
}

/* Compression, attention over it, the choice and attention over what was chosen. Keys
 * may have lengths of their own. */
static void add_nsa(gen *g) {
  static const char *const methods[] = {"mean", "linear", "swiglu", "sigmoid_mul"};
  rg_dtype dtype = any_float(g);
  const int64_t KH = g->KH, H = KH * g->G, D = g->D, E = g->E;
  const blocks b = draw_blocks(g);
  const bool apart = g->o.large && chance(g, 0.15), sinks = g->o.large && chance(g, 0.15),
             softcap = g->o.large && !b.dot && chance(g, 0.1);
  int q = heads(g, H, D, dtype), k, v, w[2];
  if (apart) {
    k = ONE(g, KEYS, dtype, S, KH, D), v = ONE(g, KEYS, dtype, S, KH, E);
    if (g->x[k].size > 1.5 || g->x[v].size > 4) return;
  } else {
    k = keys_for(g, q, KH, D, dtype), v = chance(g, 0.3) && D == E ? k : heads(g, KH, E, dtype);
  }
  int64_t m[2] = {ot_below(g->t, 4), ot_below(g->t, 4)};
  if (chance(g, 0.4)) m[1] = m[0];
  for (int i = 0; i < 2; i++) {
    const int64_t width = i ? E : D, rows = m[i] > 1 ? 2 * width : width;
    if (g->o.large && (b.dot || chance(g, 0.4) || rows * b.kernel * width > 600000)) m[i] = 0;
    w[i] = m[i] == 0 ? -1
           : i == 1 && m[0] == m[1] && D == E && chance(g, 0.4)
               ? w[0]
               : ONE(g, WEIGHT, dtype, rows, b.kernel * width);
  }
  const bool alone = D == E && aside(g, 12, 0.15); /* keys, which are values too */
  char *s = begin(g, "compress_kv");
  print(s, "\"k\": \"%s\", \"cu_seqlens\": \"%s\"", use(g, k), apart ? "cu_keys" : "cu_seqlens");
  if (!alone) print(s, ", \"v\": \"%s\"", use(g, v));
  for (int i = 0; i < (alone ? 1 : 2); i++)
    if (w[i] >= 0) print(s, ", \"%s\": \"%s\"", i ? "v_weight" : "k_weight", use(g, w[i]));
  gtensor c = {.kind = BLOCKS,
               .tag = (int)(b.kernel * 1000 + b.stride) * (apart ? -1 : 1),
               .rank = 3,
               .dim = {T, KH, D},
               .dtype = dtype,
               .size = 1};
  int ck = (int)(fresh(g, "c", c) - g->x);
  c.dim[2] = E;
  int cv = alone ? ck : (int)(fresh(g, "c", c) - g->x);
  print(s, " }, \"out\": { \"k\": \"%s\"", g->x[ck].name);
  if (!alone) print(s, ", \"v\": \"%s\"", g->x[cv].name);
  print(s, " }, \"attrs\": { \"kernel\": %lld, \"stride\": %lld, \"k_method\": \"%s\"",
        (long long)b.kernel, (long long)b.stride, methods[m[0]]);
  if (!alone) print(s, ", \"v_method\": \"%s\"", methods[m[1]]);
  print(s, " } }");
  if (chance(g, 0.2) && D == E) cv = ck;
  if (chance(g, 0.3)) { /* something between */
    c = g->x[cv];
    int old = pick(g, fits_alike, &c);
    s = begin(g, "add");
    print(s, "\"a\": [\"%s\", \"%s\"] }, ", use(g, cv), use(g, old));
    cv = (int)(fresh(g, "c", c) - g->x);
    print(s, "\"out\": { \"y\": \"%s\" } }", g->x[cv].name);
  }
  gtensor o = g->x[q], lse = {.kind = LSE, .rank = 2, .dim = {T, H}, .dtype = RG_F32, .size = 1};
  o.dim[2] = E;
  o.size = g->x[v].size;
  int l = (int)(fresh(g, "l", lse) - g->x);
  const char *own = apart ? ", \"cu_seqlens_k\": \"cu_keys\", \"q_offset\": \"q_offset\"" : "",
             *cap = softcap ? ", \"softcap\": 4.0" : "";
  s = begin(g, "cmp_attn");
  print(s, "\"q\": \"%s\", \"k\": \"%s\", \"v\": \"%s\"%s", use(g, q), use(g, ck), use(g, cv), own);
  sequence_ports(g, s, H, sinks ? ONE(g, WEIGHT, dtype, H) : -1);
  print(s,
        " }, \"out\": { \"o\": \"%s\", \"lse\": \"%s\" }, \"attrs\": { \"kernel\": %lld, "
        "\"stride\": %lld%s "
        "} }",
        fresh(g, "t", o)->name, g->x[l].name, (long long)b.kernel, (long long)b.stride, cap);
  if (chance(g, 0.25)) return;
  gtensor index = {.kind = INDEX, .rank = 3, .dim = {T, KH, b.top_n}, .dtype = RG_I32};
  int idx = (int)(fresh(g, "i", index) - g->x);
  s = begin(g, "topk");
  print(s, "\"q\": \"%s\", \"k\": \"%s\", \"cu_seqlens\": \"cu_seqlens\"%s", use(g, q), use(g, ck),
        own);
  const bool relu = b.dot && aside(g, 7, 0.4), bare = b.local < b.top_n && aside(g, 8, 0.2),
             tail = bare && b.init < b.top_n && aside(g, 9, 0.6),
             shared = b.dot && !relu && !bare && !apart && aside(g, 18, 0.3);
  if (!b.dot) print(s, ", \"lse\": \"%s\"", use(g, l));
  if (relu && aside(g, 10, 0.6)) {
    const int64_t of_heads[] = {T, H};
    print(s, ", \"weight\": \"%s\"", use(g, new_input(g, LSE, 2, of_heads, RG_F32)));
  }
  print(s,
        " }, \"out\": { \"idx\": \"%s\" }, \"attrs\": { \"kernel\": %lld, \"stride\": %lld, "
        "\"block\": %lld, ",
        g->x[idx].name, (long long)b.kernel, (long long)b.stride, (long long)b.block);
  print(s, "\"top_n\": %lld, \"init\": %lld, \"local\": %lld%s%s%s%s", (long long)b.top_n,
        (long long)b.init, (long long)(bare ? 0 : b.local),
        relu    ? ", \"score\": \"relu\""
        : b.dot ? ", \"score\": \"dot\""
                : "",
        aside(g, 11, 0.3) ? ", \"pool\": \"max\"" : "", tail ? ", \"tail\": true" : "", cap);
  if (shared) print(s, ", \"query_block\": %lld", (long long)(b.block % 2 ? b.block : b.block / 2));
  print(s, " } }");
  if (!apart && E < D && aside(g, 19, 0.4)) v = first_columns(g, k, E);
  s = begin(g, "slc_attn");
  print(s, "\"q\": \"%s\", \"k\": \"%s\", \"v\": \"%s\", \"idx\": \"%s\"%s", use(g, q), use(g, k),
        use(g, v), use(g, idx), own);
  sequence_ports(g, s, H, -1);
  const int named = g->n; /* o, and perhaps lse */
  out_ports(g, s, o);
  print(s, "\"block\": %lld } }", (long long)b.block);
  if (!aside(g, 13, 0.25)) return;
  char lse_of[24];
  snprintf(lse_of, sizeof lse_of, "n%d.lse", g->nodes - 1);
  if (g->n > named + 1) snprintf(lse_of, sizeof lse_of, "%s", use(g, named + 1));
  gtensor loss = {.kind = LSE, .rank = 2, .dim = {T, KH}, .dtype = RG_F32, .size = 1};
  s = begin(g, "index_loss");
  print(s, "\"q\": \"%s\", \"k\": \"%s\", \"lse\": \"%s\", \"index_q\": \"%s\"", use(g, q),
        use(g, k), lse_of, use(g, q));
  print(s, ", \"index_k\": \"%s\", \"idx\": \"%s\"%s", use(g, k), use(g, idx), own);
  sequence_ports(g, s, H, -1);
  print(s, " }, \"out\": { \"loss\": \"%s\" }, \"attrs\": { \"block\": %lld, ",
        fresh(g, "l", loss)->name, (long long)b.block);
  print(s, "\"index_scale\": 0.1, \"score\": \"%s\" } }", aside(g, 14, 0.5) ? "relu" : "dot");
}

static void add_combine(gen *g) {
  static const char *const acts[] = {"sigmoid", "softmax", "none"};
  int a = pick(g, fits_heads, NULL), n = 1 + (int)ot_below(g->t, 3);
  if (a < 0) return;
  gtensor y = g->x[a];
  int gate = ONE(g, TOKENS, any_float(g), T, y.dim[1], n);
  if (g->x[gate].size > 2) return;
  char *s = begin(g, "combine");
  print(s, "\"o\": [\"%s\"", use(g, a));
  for (int k = 1; k < n; k++) {
    int b = chance(g, 0.2) ? a : pick(g, fits_alike, &y);
    y.size += g->x[b].size;
    print(s, ", \"%s\"", use(g, b));
  }
  print(s, "], \"gate\": \"%s\"", use(g, gate));
  lengths(g, s, TOKENS, false);
  print(s, " }, \"out\": { \"o\": \"%s\" }, \"attrs\": { \"act\": \"%s\" } }",
        fresh(g, "t", y)->name, acts[ot_below(g->t, 3)]);
}

static void add_merge(gen *g) {
  int l[2], o[2];
  gtensor want = {.kind = LSE, .rank = 2, .dim = {T, g->KH * g->G}, .dtype = RG_F32};
  for (int k = 0; k < 2; k++) l[k] = pick(g, fits_alike, &want);
  if (l[0] < 0) return;
  rg_dtype dtype = any_float(g);
  for (int k = 0; k < 2; k++) o[k] = ONE(g, TOKENS, dtype, T, g->KH * g->G, g->E);
  char *s = begin(g, "merge_lse");
  print(s, "\"o\": [\"%s\", \"%s\"], \"lse\": [\"%s\", \"%s\"]", use(g, o[0]), use(g, o[1]),
        use(g, l[0]), use(g, l[1]));
  lengths(g, s, TOKENS, false);
  gtensor y = g->x[o[0]];
  print(s, " }, \"out\": { \"o\": \"%s\"", fresh(g, "t", y)->name);
  if (chance(g, 0.5)) print(s, ", \"lse\": \"%s\"", fresh(g, "l", g->x[l[0]])->name);
  print(s, " } }");
}

/* ---- the whole ---- */

static void add_outputs(gen *g) {
  int n = 0;
  for (int i = 0; i < g->n; i++) {
    const gtensor *x = &g->x[i];
    double p = x->kind == WEIGHT  ? 0.03
               : x->input         ? 0.05
               : x->kind == INDEX ? 0.5
               : x->read          ? 0.1
               : g->o.large       ? 0.8
                                  : 0.4;
    if (n >= (g->o.large ? 10 : 6) || !(chance(g, p) || (i == g->n - 1 && n == 0))) continue;
    print(g->outputs, "%s\"y%d\": \"%s\"", n ? ", " : "", n, x->name);
    n++;
    if (chance(g, 0.04)) { /* the same tensor twice */
      print(g->outputs, ", \"y%d\": \"%s\"", n, x->name);
      n++;
    }
  }
}

const char *graph_gen(ot *t, gen_options o) {
  static void (*const add[])(gen *) = {add_linear,  add_act,       add_mul,    add_add,   add_norm,
                                       add_rope,    add_cast,      add_concat, add_slice, add_slice,
                                       add_reshape, add_transpose, add_swa,    add_swa,   add_nsa,
                                       add_combine, add_merge,     add_add,    add_stop};
  gen *g = ot_alloc(t, sizeof *g);
  *g = (gen){.t = t, .o = o};
  g->inputs = ot_alloc(t, TEXT);
  g->outputs = ot_alloc(t, TEXT);
  g->KH = AMONG(g, 1, 2, 2, 4, 4, 6);
  g->G = AMONG(g, 1, 2, 3);
  g->D = g->E = AMONG(g, 4, 8, 8, 10);
  int64_t flat = g->KH * g->G * g->D;
  if (o.large) {
    g->dtype = (rg_dtype)AMONG(g, RG_BF16, RG_BF16, RG_BF16, RG_BF16, RG_F16, RG_F16, RG_F32);
    g->KH = AMONG(g, 1, 1, 2, 2, 4);
    g->G = AMONG(g, 1, 2, 3, 4, 4, 8, 16, 16, 64);
    if (g->KH * g->G > 64) g->KH = 1;
    g->D = AMONG(g, 64, 64, 128, 128, 128, 128, 128, 96, 192, 256, 40, 80);
    g->E = g->D == 192 ? 128 : chance(g, 0.7) ? g->D : AMONG(g, 64, 128, 24);
    flat = AMONG(g, 32, 64, 136, 256);
  }
  new_input(g, TOKENS, 2, (int64_t[]){T, flat}, any_float(g));
  new_input(g, TOKENS, 3, (int64_t[]){T, g->KH, g->D}, any_float(g));
  if (o.large) (chance(g, 0.7) ? add_nsa : add_swa)(g);
  for (int tries = 0; g->nodes < o.nodes && tries < 100; tries++)
    add[ot_below(t, (int64_t)(sizeof add / sizeof *add) - !o.stops)](g); /* add_stop is last */
  add_outputs(g);
  for (int i = g->nodes - 1; i > 0; i--) { /* order in a file is free */
    int64_t j = ot_below(t, i + 1);
    char *swap = g->node[i];
    g->node[i] = g->node[j];
    g->node[j] = swap;
  }
  size_t size = 4 * TEXT + (size_t)g->nodes * 512;
  char *text = ot_alloc(t, size);
  size_t n = (size_t)snprintf(
      text, size,
      "{ \"regraph\": 1, \"name\": \"random\", \"inputs\": {\n%s,\n"
      "\"cu_seqlens\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" },\n"
      "\"cu_keys\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" },\n"
      "\"unused\": { \"shape\": [\"S\"], \"dtype\": \"i32\" },\n"
      "\"q_offset\": { \"shape\": [\"B\"], \"dtype\": \"i32\" } },\n\"nodes\": [\n",
      g->inputs);
  for (int i = 0; i < g->nodes; i++)
    n += (size_t)snprintf(text + n, size - n, "%s%s", i ? ",\n" : "", g->node[i]);
  n += (size_t)snprintf(text + n, size - n, "],\n\"outputs\": { %s } }\n", g->outputs);
  if (n >= size) abort();
  return text;
}
