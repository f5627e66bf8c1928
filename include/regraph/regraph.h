/* regraph: an executor for attention graphs with selective recomputation.

     #include <regraph/regraph.h>

     rg_error err = {0};
     rg_context *ctx; rg_spec *spec; rg_policy *policy; rg_plan *plan; rg_session *s;
     rg_binding set[] = {{"T", 4096}, {"B", 2}};

     rg_context_create(NULL, &ctx, &err);
     rg_spec_load_file(ctx, "examples/nsa.json", set, 2, &spec, &err);
     rg_policy_load_file(ctx, "examples/policies/all.json", &policy, &err);
     rg_plan_create(spec, policy, NULL, &plan, &err);
     rg_session_create(plan, NULL, &s, &err);

     rg_session_bind(s, RG_INPUT, "q", q, q_bytes, &err);       // ... k, v, gate, cu_seqlens
     rg_session_bind(s, RG_OUTPUT, "o", o, o_bytes, &err);
     rg_session_bind(s, RG_GRAD_IN, "o", d_o, o_bytes, &err);   // gradient of the output o
     rg_session_bind(s, RG_GRAD_OUT, "q", dq, q_bytes, &err);   // ... k, v, gate
     rg_session_forward(s, &err);
     rg_session_backward(s, &err);
     if (err.status) {
       char line[1024];
       rg_error_format(&err, line, sizeof line);
       fputs(line, stderr);
     }

     rg_session_destroy(s); rg_plan_destroy(plan); rg_policy_destroy(policy);
     rg_spec_destroy(spec); rg_context_destroy(ctx);

   Rules that hold everywhere:
     - Every function that can fail returns an rg_status and takes an rg_error (may be NULL). The
       first error wins: an rg_error that already holds one is left alone, so a chain may be checked
       once at its end.
     - On failure no object is created and every out-pointer is NULL (accepted by every later call,
       which then fails with RG_E_USAGE, and by every destroy).
     - Destroy in reverse order of creation. A plan keeps what it needs of spec and policy: both may
       go first. A context must outlive what was made from it.
     - Context, spec, policy and plan are immutable after creation and may be shared between threads
       (plugins must be loaded before). A session belongs to one thread at a time. There is no
       global state.
     - Structs of options may grow at their end, and open with `size` for that: sizeof the
       struct, or 0, which stands for the members it had in 0.1.0, so `{0}` is all defaults and
       stays valid. A later member says since when it is there, and counts only where `size`
       reaches past it. Options that a newer caller sets and this library does not know are
       RG_E_USAGE. Every other struct keeps its layout within a minor version.
 */
#ifndef REGRAPH_REGRAPH_H
#define REGRAPH_REGRAPH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RG_VERSION_MAJOR 0
#define RG_VERSION_MINOR 1
#define RG_VERSION_PATCH 0

#if defined(__GNUC__)
#define RG_API __attribute__((visibility("default")))
#else
#define RG_API
#endif

/* ---- status and errors ----------------------------------------------------------------------- */

typedef enum rg_status {
  RG_OK = 0,
  /* a call or command that makes no sense: NULL handle, unbound dimension, unknown flag */
  RG_E_USAGE,
  RG_E_IO,         /* a file that can't be read or written */
  RG_E_SYNTAX,     /* not JSON, not UTF-8, not .npy, not CSV */
  RG_E_LIMIT,      /* past a stated limit: file size, depth, nodes, elements */
  RG_E_KEY,        /* unknown, duplicate or missing key */
  RG_E_TYPE,       /* JSON value of the wrong type */
  RG_E_VALUE,      /* value out of range, unknown choice, bad expression */
  RG_E_NAME,       /* dangling, duplicate or malformed name */
  RG_E_CYCLE,      /* nodes that wait for each other */
  RG_E_RANK,       /* wrong number of axes */
  RG_E_SHAPE,      /* extents that do not fit */
  RG_E_DTYPE,      /* element types that do not fit */
  RG_E_OVERFLOW,   /* arithmetic on sizes that leaves 64 bits or the limits */
  RG_E_POLICY,     /* a policy that does not fit the spec */
  RG_E_DATA,       /* array contents that break a rule, such as cu_seqlens that decrease */
  RG_E_INFEASIBLE, /* no choice meets the memory budget */
  RG_E_DEVICE,     /* device missing, failed or out of memory */
  RG_E_COMM,       /* communication */
  RG_E_NOMEM,      /* host memory */
  RG_E_PLUGIN,     /* a plugin that can't be loaded or has another ABI */
  RG_E_INTERNAL    /* a broken invariant: a bug in regraph, please report */
} rg_status;

typedef struct rg_error {
  rg_status status;
  int line, column;  /* of a syntax error or what `pointer` points to, from 1; 0: not known */
  char file[256];    /* file, or "" */
  char pointer[256]; /* JSON pointer into it, or "" */
  char node[128];    /* node concerned, or "" */
  char message[640]; /* one sentence: the offending value and what was expected */
} rg_error;

RG_API const char *rg_version(void);
/* "RG_E_SHAPE" and so on; static. */
RG_API const char *rg_status_name(rg_status status);
/* The command's exit code for a status: 0, 2 usage, 3 bad input, 4 infeasible, 5 device, 6 comm, 1
 * other. */
RG_API int rg_status_exit_code(rg_status status);
/* Writes "FILE:LINE:COLUMN: POINTER: CODE: sentence", without what is not known (without newline,
 * and nothing in it but printable text); returns what snprintf would. error NULL: as one that holds
 * none. */
RG_API int rg_error_format(const rg_error *error, char *buffer, size_t size);

/* ---- text ---------------------------------------------------------------------------------------
 * What the library says, reads and guesses, for front ends that do likewise. */

/* `text` with control characters and bytes that are not UTF-8 escaped (\n, \t, \r, \x1b), cut off
 * at a whole character where it does not fit. What is printable stays as it is. Returns buffer. */
RG_API const char *rg_printable(const char *text, char *buffer, size_t size);
/* The candidate nearest to `word` by edit distance, or NULL if none is near. */
RG_API const char *rg_nearest(const char *word, const char *const *candidates, int n);
/* A number of bytes: digits, perhaps decimals (six at most; rounded down to a byte), perhaps a
 * blank, perhaps a unit: B; KB or kB, MB, GB, TB, powers of 1000; KiB, MiB, GiB, TiB, and K, M, G,
 * T alone, powers of 1024. RG_E_VALUE for anything else, RG_E_OVERFLOW past 2^63 - 1; *bytes is
 * untouched then. */
RG_API rg_status rg_parse_size(const char *text, int64_t *bytes, rg_error *error);

/* ---- types ----------------------------------------------------------------------------------- */

typedef enum rg_dtype { RG_F32, RG_F16, RG_BF16, RG_I32, RG_DTYPE_COUNT } rg_dtype;

RG_API const char *rg_dtype_name(rg_dtype dtype); /* "f32", "f16", "bf16", "i32" */
RG_API size_t rg_dtype_size(rg_dtype dtype);
/* Converts n elements; from or to f32 (i32 only to itself). Rounds to nearest even. */
RG_API void rg_convert(rg_dtype to, void *dst, rg_dtype from, const void *src, size_t n);

typedef struct rg_context rg_context;
typedef struct rg_spec rg_spec;
typedef struct rg_policy rg_policy;
typedef struct rg_plan rg_plan;
typedef struct rg_session rg_session;

/* Sets a free dimension or overrides a parameter: `text` where not NULL (a string or a number, as
 * on the command line: "64K" is 65536), else `value`. Borrowed during the call only. */
typedef struct rg_binding {
  const char *name;
  int64_t value;
  const char *text;
} rg_binding;

/* Text a report returns; free with rg_text_destroy. */
typedef struct rg_text {
  char *data; /* NUL-terminated */
  size_t size;
  rg_context *ctx;
} rg_text;
RG_API void rg_text_destroy(rg_text *text);

/* ---- context --------------------------------------------------------------------------------- */

typedef struct rg_allocator {
  void *(*alloc)(void *user, size_t size); /* 16-byte aligned, or NULL */
  void (*free)(void *user, void *ptr);
  void *user;
} rg_allocator;

/* host NULL: malloc. The allocator must be safe to call from several threads if the context is
 * shared. */
RG_API rg_status rg_context_create(const rg_allocator *host, rg_context **out, rg_error *error);
RG_API void rg_context_destroy(rg_context *ctx);
/* Adds the ops of a plugin (see regraph/op.h). Not while other threads use the context. */
RG_API rg_status rg_plugin_load(rg_context *ctx, const char *path, rg_error *error);

/* Machine-readable descriptions. `what`: "ops" (text), "ops-json", or a JSON Schema: of what is
 * read, "schema-spec", "schema-policy", "schema-profile"; of what is printed as JSON,
 * "schema-plan", "schema-pareto", "schema-run", "schema-bench", "schema-check", "schema-ops";
 * "schema-trace" is the report's of that name. */
RG_API rg_status rg_describe(rg_context *ctx, const char *what, rg_text *out, rg_error *error);

/* ---- spec and policy ------------------------------------------------------------------------- */

RG_API rg_status rg_spec_load_file(rg_context *ctx, const char *path, const rg_binding *set,
                                   size_t nset, rg_spec **out, rg_error *error);
/* `name` stands for the file in messages. */
RG_API rg_status rg_spec_load_text(rg_context *ctx, const char *text, size_t size, const char *name,
                                   const rg_binding *set, size_t nset, rg_spec **out,
                                   rg_error *error);
/* The same for people who mend files: all that is wrong, as far as it can be told at once, up to
 * `most` errors. errors[0] is the one that the function above gives; what only follows from another
 * is left out. *n is how many there are; if it is `most`, there may be more. */
RG_API rg_status rg_spec_load_file_all(rg_context *ctx, const char *path, const rg_binding *set,
                                       size_t nset, rg_spec **out, rg_error *errors, size_t most,
                                       size_t *n);
RG_API rg_status rg_spec_load_text_all(rg_context *ctx, const char *text, size_t size,
                                       const char *name, const rg_binding *set, size_t nset,
                                       rg_spec **out, rg_error *errors, size_t most, size_t *n);
RG_API void rg_spec_destroy(rg_spec *spec);

/* Instead of a path or a JSON text a policy may be one word: "none", "all", "least" (the least
 * memory) or a budget of peak memory, such as "6GiB". */
RG_API rg_status rg_policy_load_file(rg_context *ctx, const char *path, rg_policy **out,
                                     rg_error *error);
RG_API rg_status rg_policy_load_text(rg_context *ctx, const char *text, size_t size,
                                     const char *name, rg_policy **out, rg_error *error);
RG_API void rg_policy_destroy(rg_policy *policy);

/* Checks everything about spec and policy that does not need the unbound
 * dimensions; with all bound, everything. */
RG_API rg_status rg_check(const rg_spec *spec, const rg_policy *policy, rg_error *error);
/* The same, up to `most` errors at once. */
RG_API rg_status rg_check_all(const rg_spec *spec, const rg_policy *policy, rg_error *errors,
                              size_t most, size_t *n);

/* Text dump ("text"), Graphviz ("dot") or a one-screen summary ("summary") of the checked forward
 * graph; or the document ("json") that loads to the same spec, given the same bindings: they are
 * not part of it. */
RG_API rg_status rg_spec_write(const rg_spec *spec, const char *format, rg_text *out,
                               rg_error *error);

/* RG_STATE: memory that a forward reads and leaves its new version in, and nothing else of the
 * session writes; poisoning spares it. A call that is refused leaves it as it was; after one that
 * failed while running, what it holds is not known. */
typedef enum rg_role { RG_INPUT, RG_OUTPUT, RG_GRAD_IN, RG_GRAD_OUT, RG_STATE } rg_role;

/* A tensor the caller binds. Names belong to the object asked. */
typedef struct rg_tensor_info {
  const char *name;
  rg_role role;
  rg_dtype dtype;
  int rank;
  int alignment;    /* of a bound pointer, in bytes; -1: depends on the device, so ask a plan */
  int64_t dim[8];   /* -1: depends on an unbound dimension */
  int64_t bytes;    /* dense, row-major; -1 likewise */
  bool accumulates; /* RG_GRAD_OUT into an fp32 buffer that is added to (grad "accumulate") */
  bool seqlens;     /* holds sequence starts, as cu_seqlens does */
  bool offsets;     /* holds positions of first queries */
  bool sharded;     /* dim[0] counts this rank's share of the rows: those that rg_cp_rows names */
  bool partial;     /* a gradient to which other ranks have terms, too (cp weights "local") */
} rg_tensor_info;

/* The i-th bindable tensor: inputs with state, outputs, then gradients; RG_E_USAGE past the
 * end (nothing is reported then). */
RG_API rg_status rg_spec_tensor(const rg_spec *spec, size_t i, rg_tensor_info *out);

/* Solves the spec's free dimensions from the shape of one input ("B+1" against 3 gives B = 2).
 * Adds to solved[0 … *nsolved) what it finds; RG_E_SHAPE where shapes contradict each other or
 * the spec. Names belong to the spec. */
RG_API rg_status rg_spec_solve(const rg_spec *spec, const char *input, int rank, const int64_t *dim,
                               rg_binding *solved, size_t capacity, size_t *nsolved,
                               rg_error *error);

/* ---- plan ------------------------------------------------------------------------------------ */

typedef struct rg_plan_options {
  size_t size;
  const rg_binding *set; /* binds what the spec left free */
  size_t nset;
  const char *device; /* "cpu" (default) or "cuda" */
  /* device profile: a file (JSON), its name in the cache folder, or "shipped"; NULL: what the
   * environment's REGRAPH_PROFILE says, else this machine's own if it was tuned (rg_profile_path),
   * else the one shipped for the device */
  const char *profile_path;
  int threads;   /* 0: as many as cores */
  bool no_grad;  /* forward only, whatever the spec says */
  bool no_reuse; /* planner off: every tensor gets bytes of its own */
  bool no_inplace;
  /* cuda: independent branches may share bytes, and then run one after another. The policy's budget
   * and split_heads imply it */
  bool no_lanes;
  /* fuse pass off: a gradient of several branches is computed for all of them at once */
  bool no_fuse;
  /* a budget's plan is looked for on one core, not two; it is the same, and takes longer */
  bool plan_alone;
  /* Time limit for the exact packer; 0: so much work instead, some 2 s of it, and then the same
   * spec and policy give the same plan on every machine. */
  double pack_seconds;
  /* Called now and then during long work with a stage name and done/total (total 0: unknown). */
  void (*progress)(void *user, const char *stage, double done, double total);
  void *progress_user;
  /* ranks of context parallelism; 0: what the policy says. The plan is the same on all of them */
  int64_t cp;
} rg_plan_options;

RG_API rg_status rg_plan_create(const rg_spec *spec, const rg_policy *policy,
                                const rg_plan_options *options, rg_plan **out, rg_error *error);
RG_API void rg_plan_destroy(rg_plan *plan);

typedef struct rg_sizes {
  int64_t saved; /* bytes that live from forward to backward, one such block per call in flight */
  /* bytes used inside a direction; sessions that never run at once may share one block */
  int64_t scratch;
  int64_t forward_scratch, backward_scratch;
  /* saved + comm + the most scratch bytes alive at once: no packing can do better */
  int64_t lower_bound;
  int64_t predicted_peak; /* saved + scratch + comm */
  int64_t comm;           /* what collectives send from and receive into; sessions never share it */
  /* bytes of the host's memory that live from forward to backward, a block of their own beside each
   * saved block: what the policy offloads */
  int64_t host;
} rg_sizes;
RG_API rg_status rg_plan_sizes(const rg_plan *plan, rg_sizes *out);
RG_API rg_status rg_plan_tensor(const rg_plan *plan, size_t i, rg_tensor_info *out);

/* What a node is there for: it stems from the spec; it carries gradients; it computes again in
 * backward what its original in forward did; it sums or casts gradients. */
typedef enum rg_node_kind {
  RG_NODE_PRIMAL,
  RG_NODE_GRADIENT,
  RG_NODE_CLONE,
  RG_NODE_GLUE
} rg_node_kind;

/* A node of the differentiated, rewritten graph. Names belong to the plan. */
typedef struct rg_node_info {
  const char *name;
  const char *op;
  /* the node of the spec it stems from, by which policies name it; NULL: none */
  const char *spec_node;
  /* which kernels it takes and why, "plain: d_v 40"; NULL where there is but one way */
  const char *kernels;
  rg_node_kind kind;
  bool backward; /* runs in the backward */
  /* what this node of the forward writes is given up and computed again by clones */
  bool recomputed;
  int group;       /* head group, or -1 */
  int step;        /* rg_session_node_time counts so; -1: a view, which runs nothing */
  int64_t written; /* bytes of the tensors it writes */
  int64_t workspace;
  double flops, bytes; /* the cost model's; bytes are those read and written */
  double model_ms;
  double roofline_ms;
  double exps;    /* the cost model's, too */
  rg_dtype dtype; /* whose rate of products it takes */
} rg_node_info;
/* The i-th node in the order in which they run; RG_E_USAGE past the end (nothing is reported
 * then). */
RG_API rg_status rg_plan_node(const rg_plan *plan, size_t i, rg_node_info *out);

/* `format`: "text" (report), "json", "dot", "timeline" (text; "timeline:72" for lines of at most 72
 * columns, 40 to 400), "svg" (memory timeline), "graph" (full dump of the differentiated, rewritten
 * graph), "steps". */
RG_API rg_status rg_plan_write(const rg_plan *plan, const char *format, rg_text *out,
                               rg_error *error);

/* What a report may show besides the plan itself. Zeros and NULL: nothing of the kind. All borrowed
 * during the call only. */
typedef struct rg_report_options {
  size_t size;
  /* what each step took (rg_session_node_time counts so), and whole directions, in ms */
  const double *step_ms;
  size_t nstep;
  double forward_ms, backward_ms;
  int64_t measured_peak; /* bytes that a run asked for */
  const char *source;    /* how that was measured: "median of 5 on the CPU, 2 threads" */
  /* "html": what rg_pareto ("json") and rg_plan_write ("json") of another plan gave */
  const char *front, *against;
} rg_report_options;
/* `format`: "html", one page that needs nothing else, or "trace", events for Perfetto and
 * chrome://tracing. Options may be NULL. */
RG_API rg_status rg_plan_report(const rg_plan *plan, const char *format,
                                const rg_report_options *options, rg_text *out, rg_error *error);

/* The front of (peak bytes, extra milliseconds) over all recompute choices, of a policy with `host`
 * over those of what to offload, too; `format` "text", "json" or "svg". */
RG_API rg_status rg_pareto(const rg_spec *spec, const rg_policy *policy,
                           const rg_plan_options *options, const char *format, rg_text *out,
                           rg_error *error);

/* ---- profiles --------------------------------------------------------------------------------
 * What a device takes for which op, as `regraph tune` measures it. Plans choose by it. */

/* One call that was measured: as rg_plan_node describes it, and how long it took. */
typedef struct rg_measured {
  const char *op, *kernels; /* kernels may be NULL */
  rg_dtype dtype;
  double flops, exps, bytes;
  double ms;
} rg_measured;

typedef struct rg_profile_options {
  size_t size;
  const char *device; /* "cpu" (default) or "cuda" */
  const char *name;   /* of the machine; NULL: the GPU's, or "cpu" */
  /* where the times come from, as plans will say: "measured at COMMIT on one H200" */
  const char *source;
  int threads; /* cpu */
  /* cpu: peak rates in 10^9 a second; 0, and on a GPU: those of the shipped profile. (A GPU's link
   * to the host is measured when the profile is written.) */
  double matrix_gflops, special_gops, bandwidth_gbs;
} rg_profile_options;

/* Makes a profile of measurements on this machine. Calls alike (op, kernels, dtype and work) become
 * one, of their median. */
RG_API rg_status rg_profile_write(rg_context *ctx, const rg_profile_options *options,
                                  const rg_measured *measured, size_t n, rg_text *out,
                                  rg_error *error);
/* Where plans look for the profile of that name, and for this machine's ("cpu", "cuda"): a file in
 * the user's cache folder. RG_E_USAGE where there is none, or no room. */
RG_API rg_status rg_profile_path(const char *name, char *buffer, size_t size, rg_error *error);

/* ---- context parallelism ---------------------------------------------------------------------
 * The T rows of a batch are cut into 2·ranks chunks; a rank owns two of them (docs/cp.md). */

typedef enum rg_cp_mode {
  RG_CP_AUTO,   /* per batch, whichever of the two gives the busiest rank less to do */
  RG_CP_BLOCKS, /* mode 1: rank r owns chunks 2r and 2r + 1 */
  RG_CP_ZIGZAG  /* mode 2: chunks r and 2·ranks - 1 - r */
} rg_cp_mode;

typedef struct rg_range {
  int64_t begin, end; /* rows [begin, end) */
} rg_range;

/* How a plan shares out its rows: 1 rank where it does not. */
typedef struct rg_cp_info {
  int ranks;
  rg_cp_mode mode;
  int64_t capacity; /* rows of all ranks; 0 with 1 rank */
} rg_cp_info;
RG_API rg_status rg_plan_cp(const rg_plan *plan, rg_cp_info *out);

/* The rows of a batch that a rank owns, in the order in which its tensors hold them. `capacity` is
 * the plan's T, a multiple of 2·ranks; cu_seqlens has `entries` starts. For a data loader: needs no
 * plan, allocates nothing. */
RG_API rg_status rg_cp_rows(const int32_t *cu_seqlens, size_t entries, int64_t capacity, int ranks,
                            rg_cp_mode mode, int rank, rg_range out[2], rg_error *error);

/* The rows that a rank has in the layout of TransformerEngine and Megatron, which cut every
 * document of a batch, of a multiple of 2·ranks rows, into 2·ranks chunks: of each in turn, chunk
 * `rank` and chunk 2·ranks - 1 - rank. Fills rows[0 … n), n being what the documents have together
 * / ranks. For those who bring batches over from there: sessions take the layout above. */
RG_API rg_status rg_cp_document_rows(const int32_t *cu_seqlens, size_t entries, int ranks, int rank,
                                     int64_t *rows, size_t n, rg_error *error);

/* One rank's end of a communicator; regraph/op.h has its members, for callers that bring functions
 * of their own (MPI's, a framework's). A rank uses its end from one thread at a time. */
typedef struct rg_comm rg_comm;

/* Ranks that are threads of this process: fills comm[0 … ranks). A collective that not every rank
 * has reached `deadline` seconds after the first one (0: 60) ends all ranks with RG_E_COMM. */
RG_API rg_status rg_comm_threads(rg_context *ctx, int ranks, double deadline, rg_comm **comm,
                                 rg_error *error);
/* Ranks that are processes, this one being one of them. Where the options say nothing, launchers'
 * variables do (torchrun, mpirun, srun; MASTER_ADDR, and REGRAPH_MASTER_PORT or the port after
 * MASTER_PORT); without any there is one rank. Rank 0's process listens at the address. Collective:
 * returns when all ranks have come. Zeros are defaults. */
typedef struct rg_comm_options {
  size_t size;         /* sizeof this struct, or 0 */
  int rank, ranks;     /* ranks 0: the environment's */
  const char *address; /* of rank 0's host */
  int port;
  bool cuda;       /* collectives on GPUs, one a process, by NCCL, which is loaded now */
  double deadline; /* seconds; 0: 60 */
} rg_comm_options;
RG_API rg_status rg_comm_processes(rg_context *ctx, const rg_comm_options *options, rg_comm **comm,
                                   rg_error *error);
/* Did a launcher start this process, and as which rank of how many, which of its host? Pointers may
 * be NULL. */
RG_API int rg_comm_launched(int *rank, int *ranks, int *local);
/* This rank is done, or has failed: `why` (NULL: nothing is wrong) then ends the others'
 * collectives. Sessions that use it may be destroyed before or after. */
RG_API void rg_comm_destroy(rg_comm *comm, const rg_error *why);

/* ---- session --------------------------------------------------------------------------------- */

/* RG_OK if sessions for this device ("cpu", "cuda") run on this machine; otherwise what is
 * missing. */
RG_API rg_status rg_device_check(const char *device, rg_error *error);

typedef struct rg_session_options {
  size_t size;
  /* Memory for the arena. NULL: the session asks `arena` (or malloc) for it, once, in
   * rg_session_create. Supplied blocks start on multiples of 256 bytes (on the CPU 64 will do) and
   * hold rg_sizes.saved / .scratch bytes; they are borrowed. `arena` is asked for exactly those
   * bytes (device memory for a cuda plan); where what it returns is not 256-byte aligned, it is
   * given back and asked for 255 more. */
  void *saved, *scratch;
  const rg_allocator *arena;
  /* cuda: run the steps one by one instead of replaying a graph; each is timed */
  bool eager;
  bool debug_poison; /* fill the arena and all outputs with NaN before each run, check guards after
                        each step */
  /* cuda: the cudaStream_t that runs are enqueued on; NULL: the default stream */
  void *stream;
  /* This rank's end, of as many ranks as the plan has, borrowed; where a rank fails, so do the runs
   * of all. With it, creating a session is collective: ranks compare what they must have in
   * common. */
  rg_comm *comm;
  /* rg_sizes.host bytes of the host's memory for the block above, aligned as that is, borrowed.
   * NULL: the session takes them from malloc. */
  void *host;
} rg_session_options;

RG_API rg_status rg_session_create(const rg_plan *plan, const rg_session_options *options,
                                   rg_session **out, rg_error *error);
RG_API void rg_session_destroy(rg_session *session);

/* Binds caller memory (dense, row-major, naturally aligned, borrowed until unbound or
 * rebound; ptr NULL unbinds). `bytes` must be the tensor's exactly. A backward reads inputs and
 * outputs where its forward had them, and they must still be there; but it goes by the lengths
 * and positions that the forward read, of which the saved block holds a copy. */
RG_API rg_status rg_session_bind(rg_session *session, rg_role role, const char *name, void *ptr,
                                 size_t bytes, rg_error *error);
/* The same by index: that of rg_plan_tensor. No name is looked up. */
RG_API rg_status rg_session_bind_index(rg_session *session, size_t i, void *ptr, size_t bytes,
                                       rg_error *error);
/* Another saved block (several calls in flight: bind A, forward, bind B, forward, bind A, backward
 * …). */
RG_API rg_status rg_session_bind_saved(rg_session *session, void *saved, rg_error *error);
/* Binds a block that holds the values of a forward with the inputs and outputs bound now: another
 * session of the plan ran it, or the block or a tensor stood elsewhere then. */
RG_API rg_status rg_session_adopt_saved(rg_session *session, void *saved, rg_error *error);
/* The session forgets a block it was given and what ran on it; if it is the bound one, another must
 * be bound before the next forward. Blocks of ever new addresses need this, or the session
 * remembers them all. */
RG_API rg_status rg_session_forget_saved(rg_session *session, void *saved, rg_error *error);
/* The host block of the saved block that is bound, in which what is offloaded waits for the
 * backward; NULL: the session's own. One block serves one forward: bound for another saved block,
 * or another in its place, the forward before is forgotten. Where rg_sizes.host is 0 none is
 * needed. */
RG_API rg_status rg_session_bind_host(rg_session *session, void *host, rg_error *error);
RG_API rg_status rg_session_bind_scratch(rg_session *session, void *scratch, rg_error *error);

/* cuda: later runs are enqueued on this stream (a cudaStream_t). */
RG_API rg_status rg_session_set_stream(rg_session *session, void *stream, rg_error *error);
/* Waits for the session's runs; reports what went wrong in them: a fault of the device (the session
 * is lost then: every later call fails at once), or lengths that broke a rule (the run used them
 * clamped). */
RG_API rg_status rg_session_synchronize(rg_session *session, rg_error *error);

/* Every gradient must be bound for backward, every input and output for both. What a run writes
 * shares bytes with nothing else that it touches: neither with a bound tensor nor with the saved
 * and scratch blocks (tensors that are only read may share theirs). A call that fails with
 * RG_E_USAGE or RG_E_DATA has changed nothing: a forward that went before can still be gone back
 * from. On a GPU they enqueue work and return; a stream that is being captured records the steps
 * instead of running them.
 *
 * Memory: on the CPU a run allocates nothing. On a GPU neither does a replay of one of the graphs
 * that a session keeps, a few for each direction, by the addresses they were made for. A run with
 * other addresses builds one or patches one, which takes host memory from the context's allocator
 * and whatever the driver needs (code of kernels, a library's handle). No run asks for device
 * memory of its own. */
RG_API rg_status rg_session_forward(rg_session *session, rg_error *error);
RG_API rg_status rg_session_backward(rg_session *session, rg_error *error);

typedef enum rg_direction { RG_FORWARD, RG_BACKWARD } rg_direction;

/* Binds and runs in one call: pointers[i] stands for the i-th of the plan's n tensors
 * (rg_plan_tensor), borrowed as bound memory is. A forward binds those of inputs and outputs, a
 * backward those of gradients; the others are not looked at, so one array serves both. `saved` and
 * `scratch` NULL: the blocks that are bound. Where an argument makes no sense nothing is bound;
 * after that, it is as if the calls had been made one by one. */
RG_API rg_status rg_session_run(rg_session *session, rg_direction direction, void *const *pointers,
                                size_t n, void *saved, void *scratch, rg_error *error);

/* The same where every run has memory of its own, as in frameworks with an allocator: in both
 * directions all pointers that the direction reads count, those of inputs and outputs in a
 * backward, too, which adopts `saved`: any session of the plan may have run the forward. It is
 * enqueued on `stream` (CPU: NULL). Afterwards the session knows neither `saved` nor what ran on
 * it. */
RG_API rg_status rg_session_run_on(rg_session *session, rg_direction direction,
                                   void *const *pointers, size_t n, void *saved, void *scratch,
                                   void *stream, rg_error *error);

typedef struct rg_node_time {
  const char *name;
  const char *op;
  bool backward;
  double ms;           /* of the last run */
  double flops, bytes; /* the cost model's, at the plan's capacities */
  double model_ms;
  double roofline_ms; /* what the profile's rates allow at best */
} rg_node_time;
/* Time of the i-th step in the last run; RG_E_USAGE past the end. */
RG_API rg_status rg_session_node_time(const rg_session *session, size_t i, rg_node_time *out);

typedef struct rg_node_work {
  double flops, bytes;
  double roofline_ms; /* what the profile's rates allow at best */
} rg_node_work;
/* What the i-th step has to do at the lengths that are bound (on a GPU: that the last forward
 * copied, and it waits for the session's stream). A step without lengths counts as in
 * rg_node_time. */
RG_API rg_status rg_session_node_work(rg_session *session, size_t i, rg_node_work *out,
                                      rg_error *error);

/* Reads an intermediate tensor of the last forward (for tests and reports): dense copy into `dst`
 * as stored. Only tensors that still live (saved, inputs, outputs); RG_E_NAME otherwise. */
RG_API rg_status rg_session_read(rg_session *session, const char *tensor, void *dst, size_t bytes,
                                 rg_error *error);
/* Highest byte + 1 that the last runs touched in saved and scratch; needs debug_poison. */
RG_API rg_status rg_session_touched(const rg_session *session, int64_t *saved, int64_t *scratch);

/* Memory that the plan's device reads and writes (on the CPU: the host's), for callers without a
 * GPU library of their own. 256-byte aligned. write and read copy from and to the host and wait for
 * it. */
RG_API rg_status rg_memory_alloc(const rg_plan *plan, size_t bytes, void **out, rg_error *error);
RG_API void rg_memory_free(const rg_plan *plan, void *ptr);
RG_API rg_status rg_memory_write(const rg_plan *plan, void *dst, const void *src, size_t bytes,
                                 rg_error *error);
RG_API rg_status rg_memory_read(const rg_plan *plan, void *dst, const void *src, size_t bytes,
                                rg_error *error);

/* ---- packing as a service -------------------------------------------------------------------- */

typedef struct rg_buffer {
  int64_t lower,
      upper; /* alive in [lower, upper); equal: at no time, at an offset that fits below the peak */
  int64_t size;
  int64_t offset; /* result */
} rg_buffer;

typedef struct rg_pack_options {
  size_t size;
  double seconds;   /* time limit for the exact search; 0: 5 */
  int64_t capacity; /* > 0: stop at the first packing that fits */
  int64_t align;    /* 0: 1 */
} rg_pack_options;

typedef struct rg_pack_result {
  int64_t peak, lower_bound;
  bool optimal; /* proved */
  int64_t nodes_explored;
  double seconds;
} rg_pack_result;

RG_API rg_status rg_pack(rg_context *ctx, rg_buffer *buffers, size_t n,
                         const rg_pack_options *options, rg_pack_result *out, rg_error *error);

/* The same for a file of lines "id,lower,upper,size" (with a header; other columns are kept; a
 * field may stand in double quotes): returns the file with a column "offset" in `out`. */
RG_API rg_status rg_pack_csv(rg_context *ctx, const char *path, const rg_pack_options *options,
                             rg_text *out, rg_pack_result *result, rg_error *error);

#ifdef __cplusplus
}
#endif

#include "build.h"   /* rg_builder, rg_build_* */
#include "serving.h" /* rg_pages_*, rg_queue_* */
#endif
