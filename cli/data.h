/* cli/data.h: the arrays of one run: given as .npy files or drawn, bound to a
 * session, summed up and written.
 */
#ifndef CLI_DATA_H
#define CLI_DATA_H

#include "cli.h"
#include "npy.h"

/* ---- drawing ---- */

/* Elements [first, first + n) of the normal numbers that belong to (seed, name);
 * see data.c for the formula. */
void data_normal(uint64_t seed, const char *name, int64_t first, float *dst, int64_t n);
/* Fills a whole tensor, rounded to dtype, on several threads; the values do not depend on their
 * number. */
void data_draw(uint64_t seed, const char *name, rg_dtype dtype, void *dst, int64_t n, int threads);
/* Starts of `sequences` near-equal sequences that cover `tokens`: dst [sequences + 1]. */
void data_sequences(int64_t tokens, int64_t sequences, int32_t *dst);

/* ---- what a tensor holds, in brief ---- */

typedef struct data_summary {
  double mean, rms, min, max; /* of the finite elements; NaN if there are none */
  int64_t nonfinite;
} data_summary;
void data_summarise(rg_dtype dtype, const void *src, int64_t n, data_summary *out);

/* ---- a session's tensors ---- */

/* A tensor of the plan, its memory, and the file it comes from or goes to. */
typedef struct data_tensor {
  rg_tensor_info info;
  void *data;   /* the host's */
  void *device; /* what is bound: `data` itself, or its copy on a GPU */
  int64_t elements;
  data_summary summary; /* of a result, after data_summaries */
  const char *file;     /* to write to, or NULL; borrowed from the arguments */
} data_tensor;

typedef struct data_file {
  char name[128];
  const char *path;
  npy_reader reader; /* open, if it is to be read */
} data_file;

typedef struct data_set {
  data_tensor *tensor;
  int ntensor;
  data_file *in, *grad_in, *out, *grad_out;
  int nin, ngrad_in, nout, ngrad_out;
  bool backward; /* the backward direction runs */
  /* weights are drawn small enough that what a product makes has its input's size: with others,
   * scores saturate and tie, and what takes time by its data takes another's */
  bool small_weights;
} data_set;

/* Opens the arrays of --in and --grad-in, looks up the names of all four flags in the spec, and
 * adds to c->solved what the inputs' shapes say about free dimensions. Free with data_close, also
 * after a failure. */
rg_status data_open(cli *c, data_set *d);
/* Allocates every tensor of the plan, fills what goes in, binds all to the session. */
rg_status data_bind(cli *c, data_set *d);
/* Binds the same tensors to another session of the plan. */
rg_status data_rebind(cli *c, data_set *d);
/* After the session's runs are over: results back into `data`. */
rg_status data_fetch(cli *c, data_set *d);
/* Outputs, and what backward made. */
bool data_is_result(const data_tensor *t);
/* Fills in what the results hold, in brief. */
void data_summaries(cli *c, data_set *d);
/* Writes what --out and --grad-out ask for. */
rg_status data_write(cli *c, data_set *d);
/* An error about an array's contents ("cu_seqlens[2] is …") gets the name of the array's file. */
void data_blame(cli *c, const data_set *d);
void data_close(const cli *c, data_set *d);

#endif
