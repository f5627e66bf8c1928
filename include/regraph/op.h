/* regraph/op.h: the op contract, for stock ops and plugins alike.

   An op is one `const struct rg_op`: its ports and attributes as data, and a few pure functions
   over an `rg_call` (shapes, strides, attributes; data pointers only while running). Nothing here
   knows the graph, so an op can be tested by filling an rg_call by hand.

   Promises an op makes:
     O1  run_cpu reads only its inputs, writes only its outputs and workspace, and allocates
         nothing.
     O2  The result depends on inputs and attributes alone, bit for bit: never on the number of
         threads, the workspace's old contents, strides, or on other sequences of the same pack.
     O3  Every element of every output is written; rows past the last live token are zero.
     O4  Rows past the last live token of an input are never used, not even multiplied by zero. (On
         a GPU too; lengths are live: cuda_steps sizes grids for capacity, kernels read cu_seqlens.)
     O5  Row and head strides are free; the last axis of every tensor of rank >= 1 has stride 1.
     O6  Contents that are wrong in one row or sequence harm that one alone. run_cpu may report them
         (rg_op_fail, RG_E_DATA) and return RG_OK: the run then goes on to its end and returns them.
 */
#ifndef REGRAPH_OP_H
#define REGRAPH_OP_H

#include <regraph/regraph.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RG_OP_ABI   3
#define RG_MAX_RANK 8

/* ---- shapes ---------------------------------------------------------------------------------- */

/* A concrete tensor as an op sees it. Strides count elements. */
typedef struct rg_arg {
  void *data; /* NULL for an absent optional port, and while only shapes are asked about */
  rg_dtype dtype;
  int32_t rank;
  int64_t dim[RG_MAX_RANK];
  int64_t stride[RG_MAX_RANK];
  /* on a GPU: `data` is a multiple of this many bytes (at most 16), known when planning */
  int32_t align;
} rg_arg;

/* An attribute's value; which member holds it follows from the attribute's type. */
typedef struct rg_value {
  int64_t i;     /* RG_ATTR_INT, RG_ATTR_BOOL, RG_ATTR_ENUM (index into rg_attr.choices) */
  double f;      /* RG_ATTR_FLOAT */
  int64_t *list; /* RG_ATTR_INTS, i of them */
  bool set;      /* given by the spec; otherwise the default stands */
} rg_value;

/* The GPU a call is planned for: what schedules and workspaces may depend on, besides shapes. */
typedef struct rg_gpu {
  int cc;  /* compute capability: 80, 90 */
  int sms; /* multiprocessors */
} rg_gpu;

/* One execution (or costing) of one node. in/out are flat; port p owns [begin[p],
 * begin[p+1]). An absent optional port has an empty range; an absent element of a list port
 * has data NULL, rank -1. */
typedef struct rg_call {
  const struct rg_op *op;
  const char *node;     /* the node's name, for messages */
  const rg_value *attr; /* op->nattr values, defaults filled in */
  const rg_arg *in;
  const int32_t *in_begin;
  const rg_arg *out;
  const int32_t *out_begin;
  void *workspace; /* the bytes `workspace` asked for, 256-aligned */
  int threads;     /* the most threads `parallel` uses: the number `workspace` was computed for */
  /* Calls fn(arg, task, thread) for task 0 … ntask-1, thread in [0, threads); returns when all are
   * done. Tasks are handed out dynamically: what a task computes must not depend on `thread`. */
  void (*parallel)(void *pool, int64_t ntask, void (*fn)(void *arg, int64_t task, int thread),
                   void *arg);
  void *pool;
  /* highest CPU level usable: 0 baseline, 1 AVX2+FMA+F16C, 2 AVX-512 (F, BW, DQ, VL) */
  int isa;
  rg_error *error; /* where run_cpu and cuda_steps put their error */
  /* NULL: the call is for the CPU. Else data and workspace are device addresses, never read by the
   * host */
  const rg_gpu *gpu;
  struct rg_comm *comm; /* of RG_OP_COMM, while running; NULL: there is one rank */
  /* the bytes `comm_bytes` asked for, 256-aligned: collectives touch nothing else */
  void *comm_block;
  /* on a GPU, for the library's own ops: where kernels leave what run_cpu would report, and the
   * number by which the session knows whose it is */
  int32_t *fault;
  int32_t fault_id;
} rg_call;

/* The single tensor on a port, or NULL if the port is absent. */
static inline const rg_arg *rg_in(const rg_call *c, int port) {
  return c->in_begin[port + 1] > c->in_begin[port] && c->in[c->in_begin[port]].rank >= 0
             ? &c->in[c->in_begin[port]]
             : 0;
}
static inline const rg_arg *rg_out(const rg_call *c, int port) {
  return c->out_begin[port + 1] > c->out_begin[port] && c->out[c->out_begin[port]].rank >= 0
             ? &c->out[c->out_begin[port]]
             : 0;
}
static inline int rg_in_count(const rg_call *c, int port) {
  return (int)(c->in_begin[port + 1] - c->in_begin[port]);
}
static inline int rg_out_count(const rg_call *c, int port) {
  return (int)(c->out_begin[port + 1] - c->out_begin[port]);
}

/* ---- ports and attributes, as data ----------------------------------------------------------- */

enum {
  RG_PORT_OPTIONAL = 1 << 0,
  RG_PORT_LIST = 1 << 1,  /* takes one or more tensors */
  RG_PORT_ROWS = 1 << 2,  /* axis 0 is the packed token axis of the node's (query) sequences */
  RG_PORT_KROWS = 1 << 3, /* axis 0 is the token axis of the key sequences, where they differ */
  /* int32 [B+1]: lengths of the ROWS ports; filled in by the loader where the spec leaves it out:
   * an optional one if the rows' lengths are known, a required one if the spec has one lengths
   * tensor */
  RG_PORT_SEQLENS = 1 << 4,
  RG_PORT_KSEQLENS = 1 << 5, /* the same for KROWS */
  /* out-port of a backward op: may be asked for in fp32, and to be added to the tensor on the
   * in-port "acc.NAME" (same tensor, in place), see below */
  RG_PORT_GRAD = 1 << 6,
  RG_PORT_OFFSETS = 1 << 7, /* int32 [B], each >= 0: position of a sequence's first query */
  /* axis 0 has a row for every `stride` (an attribute) rows of the tokens: on an in-port of the
   * keys' tokens, on an out-port of those on the ROWS ports */
  RG_PORT_BLOCKS = 1 << 8,
  /* state: an in-port and the out-port of the same name are one memory, in which the op makes the
   * out-tensor of the in-tensor. Shape, strides and dtype are the in-tensor's. An op with such
   * ports is RG_OP_STATE; neither port is optional. What it does not write keeps its bytes. */
  RG_PORT_STATE = 1 << 9,
  /* a weight of rank 1 whose gradient is one number an element, summed over the tokens; on the
   * in-ports "x" and "acc.x" and the out-port "d.x" of the backward op. Under context parallelism
   * it may come as a pair of twice the extent: values, then zeros, in fp32; the gradient then is
   * twice as long, too: the sum, then what is left of it beyond fp32 */
  RG_PORT_PAIR = 1 << 10
};

/* dtype sets */
#define RG_D(t)    (1u << (t))
#define RG_D_FLOAT (RG_D(RG_F32) | RG_D(RG_F16) | RG_D(RG_BF16))

/* `shape` is a comma-separated list of axes, "T,H,D" or "" for a scalar. A plain name is a
 * variable of the node: equal names must have equal extents. An out-port's axis may be an
 * expression over variables and integer attributes with + - * / (floor) and parentheses:
 * "T/stride". An in-port's axis may be one too; then it is checked. "..." alone means: any
 * rank, the same shape on all such ports; "*" alone: anything (the op's own check or rule
 * looks at it). `dtype` is a set; the variable rule for dtypes: ports whose `type` is the
 * same non-zero letter must agree, and an out-port with a letter takes that dtype; an
 * out-port without one has the only member of its set. */
typedef struct rg_port {
  const char *name;
  const char *shape;
  uint32_t flags;
  uint32_t dtypes;
  char type;
  /* axis that a head split cuts, or -1: not cut. 0 in an initialiser is axis 0, so say -1 */
  int8_t head_axis;
  const char *doc;
} rg_port;

typedef enum rg_attr_type {
  RG_ATTR_INT,
  RG_ATTR_FLOAT,
  RG_ATTR_BOOL,
  RG_ATTR_ENUM,
  RG_ATTR_INTS
} rg_attr_type;

typedef struct rg_attr {
  const char *name;
  rg_attr_type type;
  bool required;
  double min, max;            /* inclusive; for INTS of each element. Equal: unchecked */
  double def;                 /* default: number, 0/1, or index into choices */
  const char *const *choices; /* ENUM: NULL-terminated */
  const char *doc;
} rg_attr;

/* ---- cost ------------------------------------------------------------------------------------ */

typedef struct rg_cost {
  /* useful multiply-adds count two; at full capacity, causal masks counted as masked */
  double flops;
  double exps;  /* exponentials and other special functions */
  double bytes; /* each input read once, each output written once */
  double wire;  /* bytes that a rank sends to others */
  double host;  /* of a GPU: bytes from or to the host's memory */
} rg_cost;

/* ---- communication --------------------------------------------------------------------------- */

/* What a rank sends to both neighbours in rank order, and gets from them: `bytes` each, NULL
 * towards nobody. */
typedef struct rg_halo {
  const void *to_previous, *to_next;
  void *from_previous, *from_next;
} rg_halo;

/* One rank's end of a communicator. All ranks make the same calls in the same order; each names the
 * node that makes it. Buffers are dense; nothing is reduced on the way: sums are taken by ops, in
 * rank order. `stream` is NULL for memory of the host, else the cudaStream_t on which to enqueue
 * (perhaps capturing). Every function returns RG_E_COMM, on every rank and in bounded time, once a
 * rank has failed, is too late or calls something else; the message names rank, collective and what
 * differs. */
struct rg_comm {
  uint32_t abi; /* RG_OP_ABI */
  int size, rank;
  void *user; /* the engine's own */
  /* recv [size][bytes]: what every rank sent, by rank */
  rg_status (*all_gather)(rg_comm *c, const char *node, const void *send, void *recv, size_t bytes,
                          void *stream, rg_error *e);
  /* send, recv [size][bytes]: to every rank, from every rank */
  rg_status (*all_to_all)(rg_comm *c, const char *node, const void *send, void *recv, size_t bytes,
                          void *stream, rg_error *e);
  rg_status (*halo)(rg_comm *c, const char *node, const rg_halo *h, size_t bytes, void *stream,
                    rg_error *e);
  rg_status (*barrier)(rg_comm *c, const char *node, rg_error *e);
  /* This rank takes part no more: what others wait for, and all later calls, fail with `why`. From
   * any thread. */
  void (*abort)(rg_comm *c, const rg_error *why);
  void (*destroy)(rg_comm *c);
  /* On a capturing stream the collectives become part of the graph. false: sessions on a GPU run
   * step by step. */
  bool captures;
  /* NULL, or: RG_E_COMM once it has failed. Asked where the host has waited for a GPU, whose
   * collectives end without a word when they are aborted. */
  rg_status (*check)(rg_comm *c, rg_error *e);
  int sessions; /* that use it, counted by them: destroyed when the last one is, if not before */
  bool leaving; /* rg_comm_destroy was called */
};

/* ---- CUDA ------------------------------------------------------------------------------------ */

/* One kernel launch. `function` is the host address of a __global__ function that takes one struct
 * by value; `params` is that struct (copied by whoever takes the launch, and compared with what was
 * there before as bytes: leave no hole unset). */
typedef struct rg_launch {
  const void *function;
  uint32_t grid[3], block[3];
  uint32_t cluster; /* blocks of a cluster along x; 0: none */
  uint32_t shared;  /* bytes of dynamic shared memory */
  const void *params;
  size_t size;
} rg_launch;

/* A copy between a GPU's memory and the host's: `rows` times `width` bytes. */
typedef struct rg_copy {
  void *to;
  const void *from;
  size_t width, rows, to_pitch, from_pitch; /* pitch: from row to row */
  bool to_host;                             /* else from it */
} rg_copy;

/* Takes a node's launches, in the order in which they must run. The same calls serve eager runs,
 * building a graph and rebinding it: for given shapes and attributes an op hands over the same
 * launches every time, and only addresses inside params (and TMA maps made from them) differ. */
typedef struct rg_cuda rg_cuda;
struct rg_cuda {
  rg_status (*launch)(rg_cuda *x, const rg_launch *l);
  /* Work of a library: `record` enqueues it on the stream (a cudaStream_t, perhaps capturing),
   * allocating and synchronising nothing; `arg` is read during the call only. */
  rg_status (*library)(rg_cuda *x, rg_status (*record)(void *arg, void *stream), void *arg);
  /* The same, of a collective: it touches the comm block alone, which never moves, so what was
   * recorded once stays. */
  rg_status (*collective)(rg_cuda *x, rg_status (*record)(void *arg, void *stream), void *arg);
  void *blas; /* cublasLtHandle_t, made at the first need by rgk_blas */
  rg_error *error;
  rg_status (*copy)(rg_cuda *x, const rg_copy *c);
};

/* ---- the op ---------------------------------------------------------------------------------- */

enum {
  RG_OP_INTERNAL = 1 << 0,     /* not to be named in a spec */
  RG_OP_RECOMPUTABLE = 1 << 1, /* deterministic and free of side effects: a policy may name it */
  /* moves no bytes; handled by the graph (slice, split, reshape, transpose, join) */
  RG_OP_VIEW = 1 << 2,
  RG_OP_INPLACE =
      1 << 3, /* the first output may take the first input's bytes when that dies here */
  /* What becomes of the op where tokens are shared out among ranks. An op that says nothing is
   * refused there, unless no input of it has tokens. (A plugin's op may say ROWWISE.) ROWWISE: a
   * row of the outputs depends on that row of the inputs on ROWS ports (and its position, with an
   * OFFSETS port) alone. QUERYWISE: and on the keys on KROWS and BLOCKS ports, told by SEQLENS,
   * KSEQLENS and OFFSETS ports, all of which the op has. BLOCKWISE: makes compressed rows: row r of
   * a BLOCKS out-port out of the `kernel` tokens of the block that starts in [r·stride,
   * (r+1)·stride). */
  RG_OP_ROWWISE = 1 << 4,
  RG_OP_QUERYWISE = 1 << 5,
  RG_OP_BLOCKWISE = 1 << 6,
  RG_OP_COMM = 1 << 7, /* communicates: rg_call.comm has as many ranks as its attribute "ranks" */
  /* writes state, on RG_PORT_STATE ports. Not RECOMPUTABLE, no backward, no head axes, not for
   * plugins. O3 is not said of those ports. */
  RG_OP_STATE = 1 << 8,
  /* has no backward, though its outputs vary with its float inputs: where a gradient is asked for
   * of one of these, the plan is refused. (Without it, a missing backward stands for a gradient
   * that is zero.) */
  RG_OP_FORWARD_ONLY = 1 << 9
};

/* Backward. Most ops name a second op, the backward op, whose ports say by their names what they
 * carry:
 *   in  "x"       the forward input x           in  "out.x"  the forward output x
 *   in  "grad.x"  gradient of the output x      in  "acc.x"  (optional) fp32 sum so far for d.x
 *   in  "delta.x" (optional) out.x times grad.x, summed over the last axis; where bound, "out.x" is
 *       not
 *   out "d.x"     gradient of the input x, flag RG_PORT_GRAD
 * A bound "acc.x" is the same bytes as "d.x": the op adds to it instead of overwriting. Without it,
 * d.x is overwritten. d.x has x's dtype, or fp32 when several contributions are summed. List ports
 * stay lists. Attributes of a backward op are those of the forward op (same table). d.x of a weight
 * shared by all heads, on an op whose other ports have a head axis, must be summed from the LAST
 * head to the first, in fp32, head by head onto acc.x: then cutting the heads into groups (walked
 * last to first) changes no bit. Any other d.x is complete before it is added to acc.x, as one
 * term. */
typedef struct rg_op {
  uint32_t abi; /* RG_OP_ABI */
  const char *name;
  const char *doc; /* one line */
  uint32_t flags;
  const rg_port *in;
  int nin;
  const rg_port *out;
  int nout;
  const rg_attr *attrs;
  int nattr;

  /* Checks that the tables cannot say. Shapes of in and out are known, data is NULL. Symbolic
   * extents (no T given yet) are shown as RG_DIM_FREE: skip what depends on them. A plan for a GPU
   * asks once more, with gpu set. NULL: nothing more to check. */
  rg_status (*check)(const rg_call *c, rg_error *e);
  void (*cost)(const rg_call *c, rg_cost *out);
  /* NULL: none. From shapes, attributes, c->threads and c->gpu alone */
  size_t (*workspace)(const rg_call *c);
  size_t (*comm_bytes)(const rg_call *c); /* RG_OP_COMM: what it sends from and receives into */
  rg_status (*run_cpu)(const rg_call *c);
  /* Hands over the launches of one execution on a GPU; NULL: the op has none.
   * Promises O1 to O5 hold for them. */
  rg_status (*cuda_steps)(const rg_call *c, rg_cuda *x);
  /* Which kernels cuda_steps takes and why, in a few words: "wgmma", "plain: d_v 40". Static
   * text. */
  const char *(*cuda_path)(const rg_call *c);

  const char *backward; /* name of the backward op, or NULL */
  /* structural rules of the graph's own ops (views, add, …); NULL elsewhere */
  const struct rgi_rules *rules;
} rg_op;

/* Extent of an axis that depends on an unbound dimension, as `check` sees it. */
#define RG_DIM_FREE INT64_C(-1)

/* Reports a problem from check or run_cpu: returns `status`; first error wins. */
RG_API rg_status rg_op_fail(rg_error *e, rg_status status, const rg_call *c, const char *format,
                            ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 4, 5)))
#endif
    ;

/* ---- plugins --------------------------------------------------------------------------------- */

/* A plugin exports `const struct rg_plugin regraph_plugin`. Its ops live as long as the context. */
typedef struct rg_plugin {
  uint32_t abi; /* RG_OP_ABI at build time */
  const char *name;
  const rg_op *const *ops;
  int nop;
} rg_plugin;

#ifdef __cplusplus
}
#endif
#endif
