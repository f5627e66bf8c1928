/* cli/data.c: see data.h.

   Drawn values. Each is a pure function of (seed, name, index), so it depends neither on dtype nor
   on threads nor on other tensors. With all arithmetic on 64-bit unsigned integers:

       key   = seed xor fnv1a(name)
       fnv1a:  h = 0xcbf29ce484222325; for each byte: h ^= byte, h *= 0x100000001b3
       z(n)  = mix(key + (n+1)·0x9e3779b97f4a7c15)      the n-th output of splitmix64 from state key
       mix(x): x ^= x>>30; x *= 0xbf58476d1ce4e5b9; x ^= x>>27; x *= 0x94d049bb133111eb; x ^= x>>31
       u1    = ((z(2p) >> 11) + 1/2) · 2^-53,   u2 = (z(2p+1) >> 11) · 2^-53
       element 2p = √(−2 ln u1)·cos(2π u2),     element 2p+1 = √(−2 ln u1)·sin(2π u2)

   rounded to float32, then to the tensor's dtype. The gradient of output x is drawn under the name
   "grad.x".
 */
#include "data.h"
#include "ranks.h"
#include "save.h"
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- drawing ---- */

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

static uint64_t fnv1a(const char *name) {
  uint64_t h = UINT64_C(0xcbf29ce484222325);
  for (; *name; name++) h = (h ^ (unsigned char)*name) * UINT64_C(0x100000001b3);
  return h;
}

static void normal_pair(uint64_t key, uint64_t pair, float out[2]) {
  uint64_t a = mix(key + (2 * pair + 1) * UINT64_C(0x9e3779b97f4a7c15));
  uint64_t b = mix(key + (2 * pair + 2) * UINT64_C(0x9e3779b97f4a7c15));
  double u1 = ((double)(a >> 11) + 0.5) * 0x1p-53, u2 = (double)(b >> 11) * 0x1p-53;
  double r = sqrt(-2 * log(u1)), angle = 6.283185307179586476925 * u2;
  out[0] = (float)(r * cos(angle));
  out[1] = (float)(r * sin(angle));
}

void data_normal(uint64_t seed, const char *name, int64_t first, float *dst, int64_t n) {
  uint64_t key = seed ^ fnv1a(name);
  float pair[2];
  int64_t i = 0;
  if (n > 0 && first % 2) {
    normal_pair(key, (uint64_t)first / 2, pair);
    dst[i++] = pair[1];
  }
  for (; i < n; i += 2) {
    normal_pair(key, (uint64_t)(first + i) / 2, pair);
    dst[i] = pair[0];
    if (i + 1 < n) dst[i + 1] = pair[1];
  }
}

#define DRAW_CHUNK 4096 /* elements */

typedef struct draw {
  uint64_t seed;
  const char *name;
  rg_dtype dtype;
  char *dst;
  int64_t first, end;
} draw;

static void *draw_range(void *arg) {
  const draw *w = arg;
  float chunk[DRAW_CHUNK];
  for (int64_t i = w->first; i < w->end; i += DRAW_CHUNK) {
    int64_t n = w->end - i < DRAW_CHUNK ? w->end - i : DRAW_CHUNK;
    data_normal(w->seed, w->name, i, chunk, n);
    rg_convert(w->dtype, w->dst + (size_t)i * rg_dtype_size(w->dtype), RG_F32, chunk, (size_t)n);
  }
  return NULL;
}

void data_draw(uint64_t seed, const char *name, rg_dtype dtype, void *dst, int64_t n, int threads) {
  enum { MOST = 64 };
  pthread_t thread[MOST];
  bool started[MOST] = {false};
  draw work[MOST];
  if (threads > MOST) threads = MOST;
  if (n < 16 * DRAW_CHUNK) threads = 1; /* not worth a thread */
  int64_t share = (n / threads + 2) & ~INT64_C(1);
  for (int t = 0; t < threads; t++) {
    int64_t first = t * share < n ? t * share : n;
    work[t] = (draw){seed, name, dtype, dst, first, n - first < share ? n : first + share};
    if (t > 0) started[t] = cli_thread_start(&thread[t], draw_range, &work[t]) == 0;
  }
  for (int t = 0; t < threads; t++) /* the first share, and those no thread was to be had for */
    if (!started[t]) draw_range(&work[t]);
  for (int t = 1; t < threads; t++)
    if (started[t]) pthread_join(thread[t], NULL);
}

void data_sequences(int64_t tokens, int64_t sequences, int32_t *dst) {
  int64_t length = sequences ? tokens / sequences : 0, longer = sequences ? tokens % sequences : 0;
  dst[0] = 0;
  for (int64_t b = 0; b < sequences; b++) dst[b + 1] = (int32_t)(dst[b] + length + (b < longer));
}

/* ---- summary ---- */

void data_summarise(rg_dtype dtype, const void *src, int64_t n, data_summary *out) {
  double sum = 0, squares = 0, low = INFINITY, high = -INFINITY;
  int64_t finite = 0;
  float chunk[DRAW_CHUNK];
  for (int64_t i = 0; i < n; i += DRAW_CHUNK) {
    int64_t k = n - i < DRAW_CHUNK ? n - i : DRAW_CHUNK;
    if (dtype != RG_I32)
      rg_convert(RG_F32, chunk, dtype, (const char *)src + (size_t)i * rg_dtype_size(dtype),
                 (size_t)k);
    for (int64_t j = 0; j < k; j++) {
      double x = dtype == RG_I32 ? ((const int32_t *)src)[i + j] : chunk[j];
      if (!isfinite(x)) continue;
      finite++;
      sum += x;
      squares += x * x;
      if (x < low) low = x;
      if (x > high) high = x;
    }
  }
  *out = (data_summary){NAN, NAN, NAN, NAN, n - finite};
  if (finite) {
    out->mean = sum / (double)finite;
    out->rms = sqrt(squares / (double)finite);
    out->min = low;
    out->max = high;
  }
}

/* ---- flags to files ---- */

/* by rg_role */
static const char *const role_flag[] = {"--in", "--out", "--grad-in", "--grad-out"};

/* The spec's tensor of that role and name; otherwise an error that names what there is. */
static rg_status find_in_spec(cli *c, rg_role role, const char *name, rg_tensor_info *out) {
  const char *names[256];
  int n = 0;
  rg_tensor_info info;
  for (size_t i = 0; rg_spec_tensor(c->spec, i, &info) == RG_OK; i++) {
    if (info.role != role && (role != RG_INPUT || info.role != RG_STATE)) continue;
    if (strcmp(info.name, name) == 0) {
      *out = info;
      return RG_OK;
    }
    if (n < 256) names[n++] = info.name;
  }
  static const char *const what[] = {"input", "output", "output with a gradient",
                                     "input with a gradient"};
  const char *near = rg_nearest(name, names, n);
  if (near)
    return cli_fail(&c->error, RG_E_USAGE, "regraph run",
                    "%s %s=…: the spec has no %s '%s'; did you mean '%s'?", role_flag[role], name,
                    what[role], name, near);
  char known[256] = "";
  size_t size = 0;
  for (int i = 0; i < n && size < sizeof known; i++)
    size += (size_t)snprintf(known + size, sizeof known - size, "%s%s", i ? ", " : "; it has ",
                             names[i]);
  return cli_fail(&c->error, RG_E_USAGE, "regraph run", "%s %s=…: the spec has no %s '%s'%s",
                  role_flag[role], name, what[role], name, size < sizeof known ? known : "");
}

/* Two results in one file would be one too few, and what is read is not to be lost. */
static rg_status check_apart(cli *c, const data_set *d) {
  for (int i = 0; i < d->nout + d->ngrad_out; i++) {
    const data_file *x = i < d->nout ? &d->out[i] : &d->grad_out[i - d->nout];
    const rg_status s = cli_spare(c, role_flag[i < d->nout ? RG_OUTPUT : RG_GRAD_OUT], x->path);
    if (s != RG_OK) return s;
    for (int j = 0; j < i; j++) {
      const data_file *y = j < d->nout ? &d->out[j] : &d->grad_out[j - d->nout];
      if (cli_save_same(x->path, y->path))
        return cli_fail(&c->error, RG_E_USAGE, "regraph run",
                        "%s %s and %s %s both write '%s'; give each a file of its own",
                        role_flag[j < d->nout ? RG_OUTPUT : RG_GRAD_OUT], y->name,
                        role_flag[i < d->nout ? RG_OUTPUT : RG_GRAD_OUT], x->name, x->path);
    }
  }
  return RG_OK;
}

static rg_status open_list(cli *c, const cli_list *list, rg_role role, data_file **files, int *n) {
  *files = calloc((size_t)list->n + 1, sizeof **files);
  if (!*files) return cli_nomem(&c->error);
  for (int i = 0; i < list->n; i++) {
    data_file *f = &(*files)[*n];
    if (!cli_split(list->item[i], f->name, sizeof f->name, &f->path))
      return cli_fail(&c->error, RG_E_USAGE, "regraph run", "%s '%s': expected NAME=FILE.npy",
                      role_flag[role], list->item[i]);
    for (int j = 0; j < *n; j++)
      if (strcmp((*files)[j].name, f->name) == 0)
        return cli_fail(&c->error, RG_E_USAGE, "regraph run", "%s names '%s' twice",
                        role_flag[role], f->name);
    rg_tensor_info info;
    rg_status s = find_in_spec(c, role, f->name, &info);
    if (s != RG_OK) return s;
    ++*n;
    if (role == RG_OUTPUT || role == RG_GRAD_OUT) {
      s = cli_writable(c, f->path);
      if (s != RG_OK) return s;
      continue;
    }
    s = npy_open(&f->reader, f->path, &c->error);
    cli_suggest_file(&c->error, f->path);
    if (s != RG_OK) return s;
    if ((info.dtype == RG_I32) != (f->reader.dtype == RG_I32))
      return cli_fail(&c->error, RG_E_DTYPE, f->path, "elements are %s, but '%s' takes %s",
                      f->reader.dtype == RG_I32 ? "int32" : "float32", f->name,
                      info.dtype == RG_I32 ? "int32" : "float32");
  }
  return RG_OK;
}

rg_status data_open(cli *c, data_set *d) {
  const cli_args *a = &c->args;
  rg_status s = open_list(c, &a->in, RG_INPUT, &d->in, &d->nin);
  if (s == RG_OK) s = open_list(c, &a->out, RG_OUTPUT, &d->out, &d->nout);
  if (s == RG_OK) s = open_list(c, &a->grad_in, RG_GRAD_IN, &d->grad_in, &d->ngrad_in);
  if (s == RG_OK) s = open_list(c, &a->grad_out, RG_GRAD_OUT, &d->grad_out, &d->ngrad_out);
  if (s == RG_OK) s = check_apart(c, d);
  if (s != RG_OK) return s;
  d->backward = a->backward || d->ngrad_in || d->ngrad_out;
  if (d->backward && a->no_grad)
    return cli_fail(&c->error, RG_E_USAGE, "regraph run",
                    "--no-grad leaves no backward direction to run");
  /* An axis with two unknowns waits until another array has settled one of them. */
  for (size_t before = SIZE_MAX; before != c->nsolved;) {
    before = c->nsolved;
    for (int i = 0; i < d->nin; i++) {
      npy_reader *r = &d->in[i].reader;
      s = rg_spec_solve(c->spec, d->in[i].name, r->rank, r->dim, c->solved,
                        sizeof c->solved / sizeof *c->solved, &c->nsolved, &c->error);
      if (s != RG_OK) return s;
    }
  }
  return RG_OK;
}

/* ---- the session's tensors ---- */

static data_file *find_file(data_file *files, int n, const char *name) {
  for (int i = 0; i < n; i++)
    if (strcmp(files[i].name, name) == 0) return &files[i];
  return NULL;
}

/* "[2, 3]" into buffer. */
static const char *shape_text(int rank, const int64_t *dim, char *buffer, size_t size) {
  size_t n = (size_t)snprintf(buffer, size, "[");
  for (int i = 0; i < rank && n < size; i++)
    n += (size_t)snprintf(buffer + n, size - n, "%s%lld", i ? ", " : "", (long long)dim[i]);
  if (n < size) snprintf(buffer + n, size - n, "]");
  return buffer;
}

static rg_status read_tensor(cli *c, data_file *f, const data_tensor *t) {
  const npy_reader *r = &f->reader;
  bool same = r->rank == t->info.rank;
  for (int i = 0; same && i < r->rank; i++) same = r->dim[i] == t->info.dim[i];
  if (!same) {
    char have[160], want[160];
    return cli_fail(&c->error, r->rank == t->info.rank ? RG_E_SHAPE : RG_E_RANK, f->path,
                    "the array has shape %s, but '%s' is %s",
                    shape_text(r->rank, r->dim, have, sizeof have), f->name,
                    shape_text(t->info.rank, t->info.dim, want, sizeof want));
  }
  return npy_read(&f->reader, t->info.dtype, t->data, &c->error);
}

/* Tokens that drawn sequences cut up. Outputs and arrays of rank 3 have packed tokens in front; of
 * several lengths (keys longer than queries) the least fits all. */
static int64_t token_capacity(const data_set *d) {
  int64_t least = -1;
  for (int i = 0; i < d->ntensor; i++) {
    const rg_tensor_info *t = &d->tensor[i].info;
    bool rows = (t->role == RG_OUTPUT && t->rank >= 2) || (t->role == RG_INPUT && t->rank == 3);
    if (rows && (least < 0 || t->dim[0] < least)) least = t->dim[0];
  }
  return least < 0 ? 0 : least;
}

/* Of rank 2, and its rows are no tokens. */
static bool is_weight(const data_set *d, const rg_tensor_info *i) {
  return i->role == RG_INPUT && i->rank == 2 && i->dim[0] != token_capacity(d) && i->dim[1] > 0;
}

static void scale(data_tensor *t, float by) {
  enum { AT_ONCE = 1024 };
  float x[AT_ONCE];
  const size_t size = rg_dtype_size(t->info.dtype);
  for (int64_t from = 0; from < t->elements; from += AT_ONCE) {
    const size_t n = (size_t)(t->elements - from < AT_ONCE ? t->elements - from : AT_ONCE);
    char *at = (char *)t->data + (size_t)from * size;
    rg_convert(RG_F32, x, t->info.dtype, at, n);
    for (size_t i = 0; i < n; i++) x[i] *= by;
    rg_convert(t->info.dtype, at, RG_F32, x, n);
  }
}

static rg_status fill_tensor(cli *c, const data_set *d, data_tensor *t) {
  const rg_tensor_info *i = &t->info;
  data_file *f = NULL;
  if (i->role == RG_INPUT || i->role == RG_STATE) f = find_file(d->in, d->nin, i->name);
  if (i->role == RG_GRAD_IN) f = find_file(d->grad_in, d->ngrad_in, i->name);
  if (f) return read_tensor(c, f, t);
  if (i->role == RG_INPUT && i->seqlens) {
    data_sequences(token_capacity(d), t->elements - 1, t->data);
  } else if (i->role == RG_INPUT && i->dtype == RG_I32 && !i->offsets) {
    return cli_fail(
        &c->error, RG_E_USAGE, c->args.positional[0],
        "input '%s' holds integers, which can't be drawn; give them by --in %s=FILE.npy", i->name,
        i->name);
  } else if (i->dtype != RG_I32 && (i->role == RG_INPUT || i->role == RG_GRAD_IN)) {
    char name[160];
    snprintf(name, sizeof name, "%s%s", i->role == RG_GRAD_IN ? "grad." : "", i->name);
    data_draw(c->args.seed, name, i->dtype, t->data, t->elements, cli_threads(c));
    if (d->small_weights && is_weight(d, i)) scale(t, 1 / sqrtf((float)i->dim[1]));
  } /* else: offsets, state, outputs and sums start at zero, as allocated */
  return RG_OK;
}

/* The tensor's memory on the plan's device, holding what the host's holds. */
static rg_status to_device(cli *c, data_tensor *t) {
  if (!cli_on_gpu(c) || cli_ranks(c) > 1) { /* ranks have shares of their own */
    t->device = t->data;
    return RG_OK;
  }
  rg_status s = rg_memory_alloc(c->plan, (size_t)t->info.bytes, &t->device, &c->error);
  return s == RG_OK ? rg_memory_write(c->plan, t->device, t->data, (size_t)t->info.bytes, &c->error)
                    : s;
}

static bool is_filled(const data_tensor *t) {
  return t->data &&
         (t->info.role == RG_INPUT || t->info.role == RG_GRAD_IN || t->info.role == RG_STATE);
}

rg_status data_bind(cli *c, data_set *d) {
  rg_tensor_info info;
  size_t n = 0;
  while (rg_plan_tensor(c->plan, n, &info) == RG_OK) n++;
  d->tensor = calloc(n + 1, sizeof *d->tensor);
  if (!d->tensor) return cli_nomem(&c->error);
  bool gradients = false;
  for (; d->ntensor < (int)n; d->ntensor++) {
    data_tensor *t = &d->tensor[d->ntensor];
    rg_plan_tensor(c->plan, (size_t)d->ntensor, &t->info);
    if (t->info.sharded) { /* the array is the whole batch's */
      t->info.dim[0] *= cli_ranks(c);
      t->info.bytes *= cli_ranks(c);
    }
    const bool gradient = t->info.role == RG_GRAD_IN || t->info.role == RG_GRAD_OUT;
    gradients |= t->info.role == RG_GRAD_OUT;
    t->elements = t->info.bytes / (int64_t)rg_dtype_size(t->info.dtype);
    if (!d->backward && gradient) continue;
    t->data = calloc(t->info.bytes ? (size_t)t->info.bytes : 1, 1);
    if (!t->data) {
      d->ntensor++; /* so that data_close sees a consistent list */
      char size[32];
      return cli_fail(&c->error, RG_E_NOMEM, c->args.positional[0], "no memory for '%s', %s",
                      t->info.name, rg_human_bytes(t->info.bytes, size));
    }
  }
  if (d->backward && !gradients)
    return cli_fail(&c->error, RG_E_USAGE, c->args.positional[0],
                    "there is no backward direction to run: no input has \"grad\": true");
  double filled = 0, all = 0;
  for (int i = 0; i < d->ntensor; i++)
    all += is_filled(&d->tensor[i]) ? (double)d->tensor[i].info.bytes : 0;
  for (int i = 0; i < d->ntensor; i++) {
    data_tensor *t = &d->tensor[i];
    data_file *f = NULL;
    if (!t->data) continue; /* a gradient, and only forward runs */
    cli_progress(c, "filling inputs", filled, all);
    if (is_filled(t)) filled += (double)t->info.bytes;
    rg_status s = fill_tensor(c, d, t);
    if (s == RG_OK) s = to_device(c, t);
    if (s != RG_OK) return s;
    if (t->info.role == RG_OUTPUT) f = find_file(d->out, d->nout, t->info.name);
    if (t->info.role == RG_GRAD_OUT) f = find_file(d->grad_out, d->ngrad_out, t->info.name);
    if (f) t->file = f->path;
  }
  cli_progress_end(c);
  return cli_ranks(c) > 1 ? RG_OK : data_rebind(c, d);
}

rg_status data_rebind(cli *c, data_set *d) {
  rg_status s = RG_OK;
  for (int i = 0; i < d->ntensor && s == RG_OK; i++) {
    const data_tensor *t = &d->tensor[i];
    if (t->data)
      s = rg_session_bind(c->session, t->info.role, t->info.name, t->device, (size_t)t->info.bytes,
                          &c->error);
  }
  return s;
}

rg_status data_fetch(cli *c, data_set *d) {
  rg_status s = RG_OK;
  for (int i = 0; i < d->ntensor && s == RG_OK; i++) {
    const data_tensor *t = &d->tensor[i];
    if (t->data && t->device != t->data &&
        (t->info.role == RG_OUTPUT || t->info.role == RG_GRAD_OUT))
      s = rg_memory_read(c->plan, t->data, t->device, (size_t)t->info.bytes, &c->error);
  }
  return s;
}

bool data_is_result(const data_tensor *t) {
  return t->data && (t->info.role == RG_OUTPUT || t->info.role == RG_GRAD_OUT);
}

void data_summaries(cli *c, data_set *d) {
  for (int i = 0; i < d->ntensor; i++) {
    data_tensor *t = &d->tensor[i];
    cli_progress(c, "looking at results", i, d->ntensor);
    if (data_is_result(t)) data_summarise(t->info.dtype, t->data, t->elements, &t->summary);
  }
  cli_progress_end(c);
}

rg_status data_write(cli *c, data_set *d) {
  for (int i = 0; i < d->ntensor; i++) {
    const data_tensor *t = &d->tensor[i];
    if (!t->file) continue;
    cli_progress(c, "writing results", i, d->ntensor);
    rg_status s = npy_write(t->file, t->info.dtype, t->info.rank, t->info.dim, t->data, &c->error);
    if (s != RG_OK) {
      c->write_failed = true;
      return s;
    }
  }
  return RG_OK;
}

void data_blame(cli *c, const data_set *d) {
  rg_error *e = &c->error;
  size_t n = strcspn(e->message, "[");
  /* a node speaks of its ports, which may have the names of inputs that it does not read */
  if (e->status != RG_E_DATA || e->file[0] || e->node[0]) return;
  for (int i = 0; i < d->nin; i++)
    if (strlen(d->in[i].name) == n && memcmp(d->in[i].name, e->message, n) == 0)
      snprintf(e->file, sizeof e->file, "%s", d->in[i].path);
}

void data_close(const cli *c, data_set *d) {
  for (int i = 0; i < d->ntensor; i++) {
    if (d->tensor[i].device != d->tensor[i].data) rg_memory_free(c->plan, d->tensor[i].device);
    free(d->tensor[i].data);
  }
  free(d->tensor);
  for (int i = 0; i < d->nin; i++) npy_close(&d->in[i].reader);
  for (int i = 0; i < d->ngrad_in; i++) npy_close(&d->grad_in[i].reader);
  free(d->in);
  free(d->grad_in);
  free(d->out);
  free(d->grad_out);
  *d = (data_set){0};
}
