/* ops/cuda/norm.c: see norm.h. */
#include "norm.h"
#include "rows.h"

enum { CHUNK = 8 };

/* ---- rmsnorm ---- */

enum {
  MOST_BLOCKS =
      /* of the backward, each with a row of partial sums: 4 for each multiprocessor of an H100 */
  528,
  /* rows that a group of threads takes one after the other, where there are that many */
  FEWEST_TURNS = 8
};

typedef struct norm_plan {
  int64_t rows, width, per_block, blocks; /* blocks: of the backward */
  int group, held;
} norm_plan;

/* From shapes alone, so that sums have the same order on every GPU. */
static norm_plan plan_norm(const rg_arg *x) {
  norm_plan n = {.rows = 1, .width = x->dim[x->rank - 1], .group = 1, .held = 1};
  for (int a = 0; a + 1 < x->rank; a++) n.rows *= x->dim[a];
  while (n.group < 32 && n.group * CHUNK < n.width) n.group *= 2;
  if (n.group * CHUNK * 4 < n.width) n.group = RGK_NORM_THREADS;
  while (n.held < 4 && n.group * CHUNK * n.held < n.width) n.held *= 2;
  int64_t slots = RGK_NORM_THREADS / n.group,
          blocks = (n.rows + slots * FEWEST_TURNS - 1) / (slots * FEWEST_TURNS);
  if (blocks > MOST_BLOCKS) blocks = MOST_BLOCKS;
  if (blocks < 1) blocks = 1;
  n.per_block = ((n.rows + blocks - 1) / blocks + slots - 1) / slots * slots;
  n.blocks = n.rows ? (n.rows + n.per_block - 1) / n.per_block : 0;
  return n;
}

size_t rgi_cuda_norm_workspace(const rgi_norm *n) {
  norm_plan plan = plan_norm(n->x);
  return n->dw ? (size_t)plan.blocks * (size_t)plan.width * sizeof(float) : 0;
}

/* Fills the walk; returns whether all rows lie on 16 bytes. */
static bool walk_norm(const rgi_norm *n, rgk_walk *w, rgk_walked *x) {
  const rg_arg *tensor[3] = {n->x, n->dy ? n->dy : n->y, n->dy && n->y ? n->y : n->x};
  int count = n->dy && n->y ? 3 : 2;
  rgi_cuda_walk(w, x, tensor, count, true);
  if (n->x->dim[n->x->rank - 1] % CHUNK || !rgi_cuda_vectors(w, x, tensor, count)) return false;
  return !n->weight || n->weight->align >= 16;
}

rg_status rgi_cuda_norm(const rg_call *c, const rgi_norm *n, rg_cuda *x) {
  norm_plan plan = plan_norm(n->x);
  int64_t tokens = n->x->rank > 1 ? n->x->dim[0] : 1;
  rgk_norm_params p = {.seqs = rgk_seqs_of(n->cu, tokens),
                       .rows = plan.rows,
                       .width = plan.width,
                       .per_token = tokens ? plan.rows / tokens : 0,
                       .group = plan.group,
                       .weight = n->weight ? n->weight->data : NULL,
                       .eps = (float)n->eps,
                       .per_width = 1.0f / (float)plan.width,
                       .add = n->add,
                       .per_block = plan.per_block,
                       .partial = n->dw ? c->workspace : NULL};
  bool fast = walk_norm(n, &p.w, p.t), empty = plan.rows * plan.width == 0;
  int64_t slots = RGK_NORM_THREADS / plan.group;
  if (!n->dy)
    return empty
               ? RG_OK
               : x->launch(
                     x, &(rg_launch){
                            .function = rgk_norm_fwd(fast, n->x->dtype, plan.held),
                            .grid = {rgk_blocks(plan.rows, slots * RGK_NORM_ROWS(plan.held)), 1, 1},
                            .block = {RGK_NORM_THREADS, 1, 1},
                            .params = &p,
                            .size = sizeof p});
  int held = plan.held == 1 ? 1 : 4;
  size_t size = rg_dtype_size(n->x->dtype),
         shared = fast ? RGK_NORM_STAGE_BYTES((size_t)held, size) : 0;
  size_t columns =
      n->dw && plan.group <= 32 ? (size_t)plan.width * RGK_NORM_THREADS / 32 * sizeof(float) : 0;
  if ((n->y || n->dw) && !empty)
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_norm_bwd(fast, n->x->dtype, held),
                                      .grid = {(uint32_t)plan.blocks, 1, 1},
                                      .block = {RGK_NORM_THREADS, 1, 1},
                                      .shared = (uint32_t)(shared > columns ? shared : columns),
                                      .params = &p,
                                      .size = sizeof p}));
  if (!n->dw || plan.width == 0) return RG_OK;
  rgk_norm_sum_params sum = {.partial = p.partial,
                             .n = plan.blocks,
                             .width = plan.width,
                             .to = n->dw->data,
                             .dtype = (int32_t)n->dw->dtype,
                             .add = n->add_w};
  return x->launch(x, &(rg_launch){.function = rgk_norm_sum(),
                                   .grid = {rgk_blocks(plan.width, RGK_NORM_COLUMNS), 1, 1},
                                   .block = {RGK_NORM_COLUMNS, RGK_NORM_SLICES, 1},
                                   .params = &sum,
                                   .size = sizeof sum});
}

const char *rgi_cuda_norm_path(const rgi_norm *n) {
  rgk_walk w;
  rgk_walked x[3];
  if (n->dy && !n->y && !n->dw) return "nothing wanted";
  bool fast = walk_norm(n, &w, x);
  if (plan_norm(n->x).group > 32)
    return fast ? "block per row, 16-byte vectors" : "block per row, plain: alignment";
  return fast ? "16-byte vectors" : "plain: alignment";
}

/* ---- layernorm: rows, then columns, then their blocks ---- */

typedef struct layer_plan {
  int64_t rows, width, per_block, blocks;
} layer_plan;

static layer_plan plan_layer(const rg_arg *x) {
  layer_plan l = {.rows = 1, .width = x->dim[x->rank - 1]};
  for (int a = 0; a + 1 < x->rank; a++) l.rows *= x->dim[a];
  l.per_block = (l.rows + MOST_BLOCKS - 1) / MOST_BLOCKS;
  if (l.per_block < RGK_LAYER_ROWS) l.per_block = RGK_LAYER_ROWS;
  l.blocks = (l.rows + l.per_block - 1) / l.per_block;
  return l;
}

/* The workspace: stats [rows, 2], partial sums [2, blocks, width]; none without dw and db. */
size_t rgi_cuda_layer_workspace(const rgi_layer *l) {
  layer_plan plan = plan_layer(l->x);
  if (!l->dw && !l->db) return 0;
  return (size_t)(2 * plan.rows + 2 * plan.blocks * plan.width) * sizeof(float);
}

static rg_status layer_sum(rg_cuda *x, const layer_plan *plan, const float *partial,
                           const rg_arg *to, bool add) {
  rgk_norm_sum_params sum = {.partial = partial,
                             .n = plan->blocks,
                             .width = plan->width,
                             .to = to->data,
                             .dtype = (int32_t)to->dtype,
                             .add = add};
  return x->launch(x, &(rg_launch){.function = rgk_norm_sum(),
                                   .grid = {rgk_blocks(plan->width, RGK_NORM_COLUMNS), 1, 1},
                                   .block = {RGK_NORM_COLUMNS, RGK_NORM_SLICES, 1},
                                   .params = &sum,
                                   .size = sizeof sum});
}

rg_status rgi_cuda_layer(const rg_call *c, const rgi_layer *l, rg_cuda *x) {
  layer_plan plan = plan_layer(l->x);
  int64_t tokens = l->x->rank > 1 ? l->x->dim[0] : 1;
  bool sums = l->dw || l->db, empty = plan.rows * plan.width == 0;
  float *stats = sums ? c->workspace : NULL, *partial = sums ? stats + 2 * plan.rows : NULL;
  rgk_layer_params p = {.seqs = rgk_seqs_of(l->cu, tokens),
                        .rows = plan.rows,
                        .width = plan.width,
                        .per_token = tokens ? plan.rows / tokens : 0,
                        .weight = l->weight ? l->weight->data : NULL,
                        .bias = l->bias ? l->bias->data : NULL,
                        .eps = (float)l->eps,
                        .per_width = 1.0f / (float)plan.width,
                        .add = l->add,
                        .per_block = plan.per_block,
                        .stats = stats,
                        .partial = partial};
  const rg_arg *tensor[3] = {l->x, l->dy ? l->dy : l->y, l->y};
  rgi_cuda_walk(&p.w, p.t, tensor, l->dy && l->y ? 3 : 2, true);
  if (!empty && (l->y || sums))
    RGI_TRY(x->launch(x, &(rg_launch){.function = l->dy ? rgk_layer_bwd() : rgk_layer_fwd(),
                                      .grid = {rgk_blocks(plan.rows, RGK_NORM_THREADS / 32), 1, 1},
                                      .block = {RGK_NORM_THREADS, 1, 1},
                                      .params = &p,
                                      .size = sizeof p}));
  if (!sums || plan.width == 0) return RG_OK;
  if (!empty)
    RGI_TRY(x->launch(x, &(rg_launch){.function = rgk_layer_columns(),
                                      .grid = {rgk_blocks(plan.width, RGK_NORM_COLUMNS),
                                               (uint32_t)plan.blocks, 1},
                                      .block = {RGK_NORM_COLUMNS, RGK_LAYER_SLICES, 1},
                                      .params = &p,
                                      .size = sizeof p}));
  if (l->dw) RGI_TRY(layer_sum(x, &plan, partial, l->dw, l->add_w));
  if (!l->db) return RG_OK;
  return layer_sum(x, &plan, partial + plan.blocks * plan.width, l->db, l->add_b);
}

const char *rgi_cuda_layer_path(const rgi_layer *l) {
  return l->dy && !l->y && !l->dw && !l->db ? "nothing wanted" : "plain";
}

/* ---- rope: a launch per RGK_ROPE_PAIRS pairs, and a copy of the features past them ---- */

static bool rope_vectors(const rgi_rope *r) {
  return rgi_cuda_row_vectors(r->x) && rgi_cuda_row_vectors(r->y) && r->scale.half % CHUNK == 0;
}

/* Features past those that turn. */
static rg_arg rest_of(const rg_arg *x, int64_t dim) {
  return rgi_slice(x, 2, dim, x->dim[2] - dim);
}

/* Two chunks of pairs for each thread, within what makes angles worth sharing and blocks many. */
static int32_t tokens_per_block(int64_t heads, int32_t pairs) {
  int64_t n = 2 * RGK_ROPE_THREADS / (heads * ((pairs + CHUNK - 1) / CHUNK));
  int64_t most =
      RGK_ROPE_ANGLES / pairs < RGK_ROPE_TOKENS ? RGK_ROPE_ANGLES / pairs : RGK_ROPE_TOKENS;
  return (int32_t)(n < 4 ? 4 : n > most ? most : n);
}

rg_status rgi_cuda_rope(const rgi_rope *r, rg_cuda *x) {
  if (!r->y || r->x->dim[0] * r->x->dim[1] == 0) return RG_OK;
  int64_t half = r->scale.half, dim = 2 * half;
  rgk_rope_params p = {.seqs = rgk_seqs_of(r->cu, r->x->dim[0]),
                       .offset = r->offset ? r->offset->data : NULL,
                       .x = rgk_of(r->x),
                       .y = rgk_of(r->y),
                       .rows = r->x->dim[0],
                       .heads = r->x->dim[1],
                       .half = half,
                       .back = r->back,
                       .add = r->add,
                       .magnitude = (float)r->scale.magnitude};
  for (p.first = 0; p.first < half; p.first += RGK_ROPE_PAIRS) {
    int64_t left = half - p.first;
    p.pairs = left < RGK_ROPE_PAIRS ? (int32_t)left : RGK_ROPE_PAIRS;
    for (int i = 0; i < p.pairs; i++)
      p.turns[i] = rgi_rope_frequency(&r->scale, p.first + i) / 6.283185307179586477;
    p.tokens = tokens_per_block(p.heads, p.pairs);
    RGI_TRY(x->launch(
        x, &(rg_launch){.function = rgk_rope(rope_vectors(r), r->x->dtype, r->scale.interleaved),
                        .grid = {rgk_blocks(p.rows, p.tokens), 1, 1},
                        .block = {RGK_ROPE_THREADS, 1, 1},
                        .params = &p,
                        .size = sizeof p}));
  }
  if (dim == r->x->dim[2]) return RG_OK;
  rg_arg from = rest_of(r->x, dim), to = rest_of(r->y, dim);
  rgi_map copy = {.map = RGK_COPY, .cu = r->cu, .tensor = {&from, &to}, .add = {r->add}};
  return rgi_cuda_map(x, &copy);
}

const char *rgi_cuda_rope_path(const rgi_rope *r) {
  if (!r->y) return "nothing wanted";
  return rope_vectors(r) ? "16-byte vectors" : "plain: alignment";
}
