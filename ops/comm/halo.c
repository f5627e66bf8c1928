/* ops/comm/halo.c: a few rows of the chunks before and after (halo), and the way back, which adds
 * (halo_add).
 *
 * A rank has one chunk of rows for each tensor on the list, all of one length L.
 *
 *     halo       y_s = | left rows of the chunk before | the chunk | right rows of the one after |
 *     halo_add   x   = the chunks' own middles + what stands in other chunks' halos for their rows
 *
 * The one is the other's gradient. Before the first chunk and after the last there are zeros. Sums
 * are taken in fp32, by chunk: the one before, the own, the one after.
 *
 * Whatever the order of chunks in modes 1 and 2 (../cp/tables.h), a neighbour chunk is on this
 * rank, the one before or the one after, and no rank owes another more than `left` rows and `right`
 * rows. So a message has both, | left | right |, and peers and sizes are the same for every batch:
 *
 *     comm block   | to previous | to next | from previous | from next |
 */
#include "comm.h"
#include "../cuda/comm.h"

enum { A_RANKS, A_LEFT, A_RIGHT };
enum { IN_X, IN_ORDER, IN_CU };
enum {
  TO_PREVIOUS = RGK_TO_PREVIOUS,
  TO_NEXT = RGK_TO_NEXT,
  FROM_PREVIOUS = RGK_FROM_PREVIOUS,
  FROM_NEXT = RGK_FROM_NEXT,
  MESSAGES = RGK_MESSAGES
};

static const rg_attr attrs[] = {
    {"ranks", RG_ATTR_INT, true, 1, RGI_MOST_RANKS, 1, NULL, "ranks there are"},
    {"left", RG_ATTR_INT, false, 0, 1 << 24, 0, NULL,
     "rows of the chunk before; at most a chunk has"},
    {"right", RG_ATTR_INT, false, 0, 1 << 24, 0, NULL,
     "rows of the chunk after; at most a chunk has"},
};
#define ORDER                                                                                     \
  {                                                                                               \
    "order", "C", RG_PORT_OPTIONAL, RG_D(RG_I32), 0, -1,                                          \
        "place of each of C chunks among the ranks' chunks, rank by rank; absent: one after the " \
        "other"                                                                                   \
  }

/* ---- shapes ---- */

static rg_status check_chunk(const rgi_graph *g, int node, int64_t slots, rgi_dim chunk,
                             const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const int64_t left = n->attr[A_LEFT].i, right = n->attr[A_RIGHT].i, ranks = n->attr[A_RANKS].i;
  const int order = rgi_in(n, IN_ORDER);
  if (rgi_dim_known(chunk) && (left > chunk.c || right > chunk.c))
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                    "left %lld and right %lld rows; chunks have %lld, expected no more than that",
                    (long long)left, (long long)right, (long long)chunk.c);
  if (order >= 0 && rgi_dim_known(g->tensor[order].dim[0]) &&
      g->tensor[order].dim[0].c != slots * ranks)
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                    "order has %lld chunks; expected %lld on each of %lld ranks",
                    (long long)g->tensor[order].dim[0].c, (long long)slots, (long long)ranks);
  return RG_OK;
}

static rg_status halo_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const rgi_tensor x = g->tensor[n->in[0]];
  const int64_t slots = rgi_nout(n), halo = n->attr[A_LEFT].i + n->attr[A_RIGHT].i;
  rgi_dim chunk, rows;
  if (x.rank < 1 || slots < 1 || (rgi_dim_known(x.dim[0]) && x.dim[0].c % slots))
    return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                    "\"%s\" does not divide into %lld chunks of rows", x.name, (long long)slots);
  RGI_TRY(rgi_dim_binary(g->arena, '/', x.dim[0], rgi_dim_of(slots), &chunk, e));
  RGI_TRY(check_chunk(g, node, slots, chunk, pointer, e));
  RGI_TRY(rgi_dim_binary(g->arena, '+', chunk, rgi_dim_of(halo), &rows, e));
  for (int i = 0; i < slots; i++)
    if (n->out[i] >= 0) rgi_tensor_like(g, n->out[i], &x, &rows);
  return RG_OK;
}

static rg_status add_infer(rgi_graph *g, int node, const char *pointer, rg_error *e) {
  const rgi_node *n = &g->node[node];
  const int64_t slots = n->in_begin[1], halo = n->attr[A_LEFT].i + n->attr[A_RIGHT].i;
  const rgi_tensor *like = NULL;
  rgi_dim chunk, rows;
  for (int i = 0; i < slots; i++) {
    const rgi_tensor *x = n->in[i] >= 0 ? &g->tensor[n->in[i]] : NULL;
    if (!x) continue;
    bool same = x->rank > 0 && (!like || x->rank == like->rank);
    for (int d = 0; d < x->rank && same && like; d++) same = rgi_dim_equal(x->dim[d], like->dim[d]);
    if (!same)
      return rgi_fail(e, RG_E_SHAPE, pointer, n->name,
                      "\"%s\" has not the shape of the other chunks", x->name);
    like = x;
  }
  if (!like) return rgi_fail(e, RG_E_KEY, pointer, n->name, "no chunk is given");
  RGI_TRY(rgi_dim_binary(g->arena, '-', like->dim[0], rgi_dim_of(halo), &chunk, e));
  RGI_TRY(check_chunk(g, node, slots, chunk, pointer, e));
  RGI_TRY(rgi_dim_binary(g->arena, '*', chunk, rgi_dim_of(slots), &rows, e));
  const rgi_tensor copy = *like;
  rgi_tensor_like(g, n->out[0], &copy, &rows);
  return RG_OK;
}

/* ---- one call ---- */

typedef struct call {
  const rg_call *c;
  const rg_arg *order;
  const rg_arg *like; /* a tensor with the chunks' dtype and trailing axes */
  int ranks, rank;
  int64_t slots, chunk, left, right;
  size_t row, message; /* bytes */
} call;

/* NULL while nothing but shapes is asked about, and where nothing travels. */
static char *message(const call *h, int which) {
  char *block = h->c->comm_block;
  return block ? block + (size_t)which * RGI_ROUND256(h->message) : NULL;
}

static call describe(const rg_call *c, int64_t slots, const rg_arg *like, int64_t chunk) {
  call h = {.c = c,
            .order = rg_in(c, IN_ORDER),
            .like = like,
            .ranks = rgi_ranks(c, A_RANKS),
            .rank = rgi_rank(c),
            .slots = slots,
            .chunk = chunk,
            .left = c->attr[A_LEFT].i,
            .right = c->attr[A_RIGHT].i};
  h.row = (size_t)rgi_row_elements(like) * rg_dtype_size(like->dtype);
  h.message = h.row * (size_t)(h.left + h.right);
  return h;
}

static size_t comm_of(const call *h) {
  return MESSAGES * RGI_ROUND256(h->message);
}

/* The chunk in a slot of this rank. */
static int64_t chunk_in(const call *h, int64_t slot) {
  const int64_t place = h->rank * h->slots + slot;
  for (int64_t i = 0; i < h->slots * h->ranks; i++)
    if (rgi_place(h->order, i) == place) return i;
  return place;
}

/* Where chunk `to` is: its slot if on this rank, else -1 and the message to (or from) its rank. */
static rg_status find(const call *h, int64_t to, int64_t *slot, int *which, rg_error *e) {
  const int64_t place = rgi_place(h->order, to);
  const int rank = (int)(place / h->slots);
  *slot = rank == h->rank ? place % h->slots : -1;
  *which = rank < h->rank ? TO_PREVIOUS : TO_NEXT;
  if (rank >= h->rank - 1 && rank <= h->rank + 1) return RG_OK;
  return rg_op_fail(e, RG_E_DATA, h->c,
                    "chunk %lld is on rank %d, its neighbour on rank %d: not side by side",
                    (long long)to, rank, h->rank);
}

static rg_halo messages(const call *h) {
  const bool previous = h->rank > 0, next = h->rank + 1 < h->ranks;
  return (rg_halo){.to_previous = previous ? message(h, TO_PREVIOUS) : NULL,
                   .to_next = next ? message(h, TO_NEXT) : NULL,
                   .from_previous = previous ? message(h, FROM_PREVIOUS) : NULL,
                   .from_next = next ? message(h, FROM_NEXT) : NULL};
}

static rg_status swap(const call *h) {
  const rg_halo m = messages(h);
  if (!h->c->comm || h->message == 0) return RG_OK;
  return h->c->comm->halo(h->c->comm, h->c->node, &m, h->message, NULL, h->c->error);
}

/* n rows of a message: of its left part, or of its right part. */
static rg_arg part(const call *h, int which, bool right) {
  char *at = message(h, which);
  if (at && right) at += (size_t)h->left * h->row;
  return rgi_dense_rows(h->like, right ? h->right : h->left, at, h->like->dtype);
}

/* ---- halo ---- */

static void copy(const call *h, const rg_arg *to, const rg_arg *from, int64_t live) {
  if (to->dim[0] > 0) rgi_copy_rows(h->c, to, from, live);
}

/* Rows [first, first + n) of slot s of x. */
static void take(const call *h, const rg_arg *x, int64_t live, int64_t s, int64_t first, int64_t n,
                 const rg_arg *to) {
  const rg_arg from = rgi_rows(x, s * h->chunk + first, n);
  copy(h, to, &from, live - s * h->chunk - first);
}

static rg_status halo_run(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X);
  const int64_t slots = rg_out_count(c, 0), all = slots * rgi_ranks(c, A_RANKS);
  const call h = describe(c, slots, x, x->dim[0] / slots);
  const int64_t live = rgi_live_rows(rg_in(c, IN_CU), x->dim[0]), L = h.chunk;
  RGI_TRY(rgi_check_order(c, h.order));
  if (c->comm && h.message) memset(message(&h, TO_PREVIOUS), 0, 2 * RGI_ROUND256(h.message));
  for (int pass = 0; pass < 2; pass++) { /* what others get, then what they sent */
    for (int64_t s = 0; s < slots; s++) {
      const int64_t chunk = chunk_in(&h, s);
      const rg_arg *y = rgi_out_at(c, 0, (int)s);
      int64_t slot;
      int which;
      for (int after = 0; after < 2; after++) {
        const int64_t other = after ? chunk + 1 : chunk - 1, n = after ? h.right : h.left;
        const bool there = other >= 0 && other < all;
        if (there) RGI_TRY(find(&h, other, &slot, &which, c->error));
        if (pass == 0 && there && slot < 0) { /* my end is the left halo of the chunk after me */
          const rg_arg to = part(&h, which, !after);
          take(&h, x, live, s, after ? L - h.left : 0, after ? h.left : h.right, &to);
        }
        if (pass == 0 || !y) continue;
        const rg_arg to = rgi_rows(y, after ? h.left + L : 0, n);
        if (!there) {
          copy(&h, &to, &to, 0); /* zeros */
        } else if (slot >= 0) {
          take(&h, x, live, slot, after ? 0 : L - n, n, &to);
        } else {
          const rg_arg from = part(&h, which + FROM_PREVIOUS, after);
          copy(&h, &to, &from, n);
        }
      }
      if (pass == 0 || !y) continue;
      const rg_arg middle = rgi_rows(y, h.left, L);
      take(&h, x, live, s, 0, L, &middle);
    }
    if (pass == 0) RGI_TRY(swap(&h));
  }
  return RG_OK;
}

/* ---- on a GPU ---- */

static rgi_cuda_halo describe_cuda(const call *h) {
  rgi_cuda_halo k = {.order = h->order,
                     .slots = (int)h->slots,
                     .ranks = h->ranks,
                     .rank = h->rank,
                     .chunk = h->chunk,
                     .left = h->left,
                     .right = h->right};
  for (int i = 0; i < MESSAGES; i++) k.message[i] = message(h, i);
  return k;
}

static rg_status swap_cuda(const call *h, rg_cuda *x) {
  const rg_halo m = messages(h);
  return rgi_cuda_swap(h->c, x, h->ranks, &m, (int64_t)h->message);
}

static rg_status clear_messages(const call *h, rg_cuda *x) {
  const int64_t both = 2 * (int64_t)RGI_ROUND256(h->message);
  return h->ranks > 1 ? rgi_cuda_clear(x, message(h, TO_PREVIOUS), both, RG_F32) : RG_OK;
}

static rg_status halo_cuda(const rg_call *c, rg_cuda *x) {
  const rg_arg *from = rg_in(c, IN_X);
  const int64_t slots = rg_out_count(c, 0);
  const call h = describe(c, slots, from, from->dim[0] / slots);
  rgi_cuda_halo k = describe_cuda(&h);
  k.x[0] = from, k.n = 1, k.cu = rg_in(c, IN_CU);
  RGI_TRY(clear_messages(&h, x));
  for (int s = 0; s < slots && h.ranks > 1; s++)
    RGI_TRY(rgi_cuda_halo_launch(x, &k, rgk_halo_send, s, true));
  RGI_TRY(swap_cuda(&h, x));
  for (int s = 0; s < slots; s++) {
    k.y = rgi_out_at(c, 0, s);
    if (k.y) RGI_TRY(rgi_cuda_halo_launch(x, &k, rgk_halo_take, s, false));
  }
  return RG_OK;
}

static size_t halo_comm(const rg_call *c) {
  const rg_arg *x = rg_in(c, IN_X);
  const call h = describe(c, rg_out_count(c, 0), x, 0);
  return comm_of(&h);
}

static void halo_cost(const rg_call *c, rg_cost *out) {
  const call h = describe(c, rg_out_count(c, 0), rg_in(c, IN_X), 0);
  *out = (rg_cost){.bytes = rgi_call_bytes(c), .wire = h.ranks > 1 ? 2 * (double)h.message : 0};
}

static rg_status halo_backward(rgi_backward *b, int node, rg_error *e) {
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  const int slots = rgi_nout(n);
  int *in = rgi_alloc_n(rgi_bwd_graph(b)->arena, (size_t)slots + 1, sizeof *in), made;
  if (!in) return rgi_nomem(e);
  for (int i = 0; i < slots; i++) in[i] = rgi_bwd_gradient(b, node, i);
  in[slots] = rgi_in(n, IN_ORDER);
  const int count[] = {slots, in[slots] >= 0};
  RGI_TRY(rgi_bwd_node(b, node, "halo_add", n->attr, in, count, ".add", 1, &made, e));
  return rgi_bwd_hand_over(b, node, 0, made, e);
}

static const rg_port halo_in[] = {
    [IN_X] = {"x", "*", RG_PORT_ROWS, RG_D_FLOAT, 'X', -1,
              "this rank's chunks, one after the other"},
    [IN_ORDER] = ORDER,
    [IN_CU] = {"cu_seqlens", "B1", RG_PORT_OPTIONAL | RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1,
               "starts of the sequences in x; rows past them are taken for zeros"},
};
static const rg_port halo_out[] = {
    {"y", "*", RG_PORT_LIST, RG_D_FLOAT, 'X', -1, "each chunk between rows of its neighbours"},
};
static const rgi_rules halo_rules = {.infer = halo_infer, .backward = halo_backward, .wide = true};
const rg_op rgi_op_halo = {
    .abi = RG_OP_ABI,
    .name = "halo",
    .doc = "each chunk with rows of the chunks before and after, which other ranks may have",
    .flags = RG_OP_RECOMPUTABLE | RG_OP_COMM,
    .in = halo_in,
    .nin = RGI_COUNT(halo_in),
    .out = halo_out,
    .nout = RGI_COUNT(halo_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .cost = halo_cost,
    .comm_bytes = halo_comm,
    .run_cpu = halo_run,
    .cuda_steps = halo_cuda,
    .rules = &halo_rules};

/* ---- halo_add ---- */

/* One row of a sum. */
typedef struct adder {
  const call *h;
  rg_arg to;            /* a slot's rows of x */
  const rg_arg *own;    /* its y, or NULL */
  rg_arg before, after; /* rows for its first and last rows; dim[0] 0 if there are none */
} adder;

/* sum (+)= n elements of row `row` of a, from column `at` on. */
static bool add_row(const adder *w, const rg_arg *a, int64_t row, const int64_t *index, int64_t at,
                    int64_t n, bool begun, float *sum) {
  float term[RGI_PIECE];
  int64_t e = row * a->stride[0] + at;
  for (int d = 1; d + 1 < a->rank; d++) e += index[d] * a->stride[d];
  rgi_load_by(w->h->c->isa, begun ? term : sum, a->dtype,
              (const char *)a->data + e * (int64_t)rg_dtype_size(a->dtype), n);
  if (begun) rgi_store_add(sum, term, n);
  return true;
}

static void add_task(void *arg, int64_t row, int thread) {
  const adder *w = arg;
  const call *h = w->h;
  const rg_arg *to = &w->to;
  const int last = to->rank - 1;
  const int64_t width = last > 0 ? to->dim[last] : 1, n = width ? rgi_row_elements(to) / width : 0;
  const int64_t tail = row - (h->chunk - w->after.dim[0]);
  float sum[RGI_PIECE];
  (void)thread;
  for (int64_t k = 0; k < n; k++) {
    int64_t index[RG_MAX_RANK] = {row}, rest = k;
    for (int d = last - 1; d > 0; d--) index[d] = rest % to->dim[d], rest /= to->dim[d];
    for (int64_t at = 0; at < width; at += RGI_PIECE) {
      const int64_t piece = width - at < RGI_PIECE ? width - at : RGI_PIECE;
      bool begun = false;
      if (row < w->before.dim[0]) begun = add_row(w, &w->before, row, index, at, piece, begun, sum);
      if (w->own) begun = add_row(w, w->own, h->left + row, index, at, piece, begun, sum);
      if (tail >= 0) begun = add_row(w, &w->after, tail, index, at, piece, begun, sum);
      if (!begun) memset(sum, 0, sizeof sum);
      int64_t e = row * to->stride[0] + at;
      for (int d = 1; d < last; d++) e += index[d] * to->stride[d];
      rgi_store_by(h->c->isa, (char *)to->data + e * (int64_t)rg_dtype_size(to->dtype), to->dtype,
                   sum, piece);
    }
  }
}

/* What the chunk before (after) has in its halo for mine, or no rows. */
static rg_status from_halo(const call *h, int64_t chunk, bool after, rg_arg *out) {
  const int64_t other = after ? chunk + 1 : chunk - 1, n = after ? h->left : h->right;
  int64_t slot;
  int which;
  *out = rgi_dense_rows(h->like, 0, NULL, h->like->dtype);
  if (other < 0 || other >= h->slots * h->ranks || n == 0) return RG_OK;
  RGI_TRY(find(h, other, &slot, &which, h->c->error));
  if (slot < 0) {
    *out = part(h, which + FROM_PREVIOUS, !after);
    return RG_OK;
  }
  const rg_arg *y = rgi_in_at(h->c, 0, (int)slot);
  if (y) *out = rgi_rows(y, after ? 0 : h->left + h->chunk, n);
  return RG_OK;
}

static rg_status add_run(const rg_call *c) {
  const rg_arg *x = rg_out(c, 0);
  const int64_t slots = rg_in_count(c, 0);
  const call h = describe(c, slots, x, x->dim[0] / slots);
  RGI_TRY(rgi_check_order(c, h.order));
  if (c->comm && h.message) memset(message(&h, TO_PREVIOUS), 0, 2 * RGI_ROUND256(h.message));
  for (int64_t s = 0; s < slots; s++) {
    const int64_t chunk = chunk_in(&h, s);
    const rg_arg *y = rgi_in_at(c, 0, (int)s);
    for (int after = 0; after < 2 && y; after++) {
      const int64_t other = after ? chunk + 1 : chunk - 1;
      int64_t slot;
      int which;
      if (other < 0 || other >= slots * h.ranks) continue;
      RGI_TRY(find(&h, other, &slot, &which, c->error));
      if (slot >= 0) continue;
      const rg_arg to = part(&h, which, after),
                   from = rgi_rows(y, after ? h.left + h.chunk : 0, to.dim[0]);
      copy(&h, &to, &from, INT64_MAX);
    }
  }
  RGI_TRY(swap(&h));
  for (int64_t s = 0; s < slots; s++) {
    adder w = {.h = &h, .to = rgi_rows(x, s * h.chunk, h.chunk), .own = rgi_in_at(c, 0, (int)s)};
    RGI_TRY(from_halo(&h, chunk_in(&h, s), false, &w.before));
    RGI_TRY(from_halo(&h, chunk_in(&h, s), true, &w.after));
    c->parallel(c->pool, h.chunk, add_task, &w);
  }
  return RG_OK;
}

static rg_status add_cuda(const rg_call *c, rg_cuda *x) {
  const rg_arg *to = rg_out(c, 0);
  const int64_t slots = rg_in_count(c, 0);
  const call h = describe(c, slots, to, to->dim[0] / slots);
  rgi_cuda_halo k = describe_cuda(&h);
  k.n = (int)slots;
  for (int s = 0; s < slots; s++) k.x[s] = rgi_in_at(c, 0, s);
  RGI_TRY(clear_messages(&h, x));
  for (int s = 0; s < slots && h.ranks > 1; s++)
    if (k.x[s]) RGI_TRY(rgi_cuda_halo_launch(x, &k, rgk_halo_add_send, s, true));
  RGI_TRY(swap_cuda(&h, x));
  k.y = to;
  for (int s = 0; s < slots; s++) RGI_TRY(rgi_cuda_halo_launch(x, &k, rgk_halo_add_take, s, false));
  return RG_OK;
}

/* A launch says where each slot's rows are. */
static rg_status add_check(const rg_call *c, rg_error *e) {
  if (!c->gpu || rg_in_count(c, 0) <= RGK_HALO_SLOTS) return RG_OK;
  return rg_op_fail(e, RG_E_LIMIT, c, "%d chunks a rank; on a GPU there are at most %d",
                    rg_in_count(c, 0), RGK_HALO_SLOTS);
}

static size_t add_comm(const rg_call *c) {
  const call h = describe(c, rg_in_count(c, 0), rg_out(c, 0), 0);
  return comm_of(&h);
}

static void add_cost(const rg_call *c, rg_cost *out) {
  const call h = describe(c, rg_in_count(c, 0), rg_out(c, 0), 0);
  *out = (rg_cost){.bytes = rgi_call_bytes(c), .wire = h.ranks > 1 ? 2 * (double)h.message : 0};
}

static rg_status add_backward(rgi_backward *b, int node, rg_error *e) {
  const rgi_node *n = &rgi_bwd_graph(b)->node[node];
  const int slots = n->in_begin[1], in[] = {rgi_bwd_gradient(b, node, 0), rgi_in(n, IN_ORDER)};
  const int count[] = {1, in[1] >= 0, 0};
  int *made = rgi_alloc_n(rgi_bwd_graph(b)->arena, (size_t)slots + 1, sizeof *made);
  if (!made) return rgi_nomem(e);
  if (in[0] < 0) return RG_OK;
  RGI_TRY(rgi_bwd_node(b, node, "halo", n->attr, in, count, ".halo", slots, made, e));
  for (int i = 0; i < slots; i++) RGI_TRY(rgi_bwd_give(b, node, i, made[i], -1, 0, e));
  return RG_OK;
}

static const rg_port add_in[] = {
    [IN_X] = {"x", "*", RG_PORT_LIST, RG_D_FLOAT, 'X', -1,
              "each chunk between rows for its neighbours"},
    [IN_ORDER] = ORDER,
};
static const rg_port add_out[] = {
    {"y", "*", 0, RG_D_FLOAT, 'X', -1,
     "this rank's chunks, one after the other, with what others had for them"},
};
static const rgi_rules add_rules = {.infer = add_infer, .backward = add_backward, .wide = true};
const rg_op rgi_op_halo_add = {
    .abi = RG_OP_ABI,
    .name = "halo_add",
    .doc = "chunks without their halos, which are added to the chunks they belong to",
    .flags = RG_OP_COMM,
    .in = add_in,
    .nin = RGI_COUNT(add_in),
    .out = add_out,
    .nout = RGI_COUNT(add_out),
    .attrs = attrs,
    .nattr = RGI_COUNT(attrs),
    .check = add_check,
    .cost = add_cost,
    .comm_bytes = add_comm,
    .run_cpu = add_run,
    .cuda_steps = add_cuda,
    .rules = &add_rules};
