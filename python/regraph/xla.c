/* python/regraph/xla.c: what XLA calls to run a plan of regraph.jax, without Python. jax.py has it
 * compiled where it is first wanted, against the headers of the jaxlib and the regraph that are
 * there.
 *
 * A program of XLA names a plan by a number; regraph_xla_add tells which plan that is, once and for
 * the life of the process, since nobody says when the last such program has gone. XLA gives a call
 * its stream and all of its memory. Each stream has sessions of its own, one for each call that is
 * being enqueued on it at the same time.
 *
 *   call      arguments                                         results
 *   forward   inputs                                            outputs, saved, scratch
 *   backward  inputs, outputs, saved, gradients of outputs,     gradients of inputs, scratch
 *             and whatever aliases results
 */
#include <pthread.h>
#include <regraph/regraph.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <xla/ffi/api/c_api.h>

typedef rg_status create_session(const rg_plan *, const rg_session_options *, rg_session **,
                                 rg_error *);
typedef int format_error(const rg_error *, char *, size_t);
typedef rg_status run_session(rg_session *, rg_direction, void *const *, size_t, void *, void *,
                              void *, rg_error *);

/* How a plan is run: its tensors by role, in the order that rg_role has, and the functions of the
 * library that made it. Mirrored in jax.py. */
typedef struct regraph_xla_plan {
  int64_t number;
  const rg_plan *plan;
  create_session *create;
  run_session *run;
  format_error *format;
  int64_t count[4];
  bool cuda, eager;
} regraph_xla_plan;

typedef struct worker {
  rg_session *session; /* made by the first call */
  void *stream;
  pthread_mutex_t busy;
  struct worker *next;
  void *pointers[]; /* of the plan's tensors, in its order */
} worker;

typedef struct entry {
  regraph_xla_plan about;
  worker *workers;
  struct entry *next;
} entry;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of both kinds of list */
static entry *entries;

static entry *find(int64_t number) {
  entry *e = entries;
  while (e && e->about.number != number) e = e->next;
  return e;
}

/* False: no memory. A number that is there already keeps its plan. */
bool regraph_xla_add(const regraph_xla_plan *about) {
  pthread_mutex_lock(&lock);
  bool there = find(about->number);
  entry *e = there ? NULL : malloc(sizeof *e);
  if (e) {
    *e = (entry){*about, NULL, entries};
    entries = e;
  }
  pthread_mutex_unlock(&lock);
  return there || e;
}

static size_t tensors(const entry *e) {
  size_t n = 0;
  for (int role = RG_INPUT; role <= RG_GRAD_OUT; role++) n += (size_t)e->about.count[role];
  return n;
}

/* A worker of the stream that nobody else has, its mutex taken. NULL: no memory. */
static worker *take(entry *e, void *stream) {
  pthread_mutex_lock(&lock);
  worker *w = e->workers;
  while (w && (w->stream != stream || pthread_mutex_trylock(&w->busy))) w = w->next;
  if (!w && (w = calloc(1, sizeof *w + tensors(e) * sizeof w->pointers[0]))) {
    w->stream = stream;
    w->next = e->workers;
    pthread_mutex_init(&w->busy, NULL);
    pthread_mutex_lock(&w->busy);
    e->workers = w;
  }
  pthread_mutex_unlock(&lock);
  return w;
}

static rg_status run(const entry *e, worker *w, rg_direction direction, void *saved, void *scratch,
                     rg_error *error) {
  const regraph_xla_plan *about = &e->about;
  if (!w->session) {
    rg_session_options options = {.size = sizeof options,
                                  .saved = saved,
                                  .scratch = scratch,
                                  .eager = about->eager,
                                  .stream = w->stream};
    rg_status status = about->create(about->plan, &options, &w->session, error);
    if (status) return status;
  }
  return about->run(w->session, direction, w->pointers, tensors(e), saved, scratch, w->stream,
                    error);
}

/* ---- what XLA hands over ---- */

static XLA_FFI_Error *fail(const XLA_FFI_Api *api, XLA_FFI_Error_Code code, const char *message) {
  return api->XLA_FFI_Error_Create(&(XLA_FFI_Error_Create_Args){
      .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE, .message = message, .errc = code});
}

/* The stream; NULL where the call does not run on a GPU. */
static void *stream_of(const XLA_FFI_CallFrame *f) {
  XLA_FFI_Stream_Get_Args get = {.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE, .ctx = f->ctx};
  XLA_FFI_Error *error = f->api->XLA_FFI_Stream_Get(&get);
  if (!error) return get.stream;
  f->api->XLA_FFI_Error_Destroy(&(XLA_FFI_Error_Destroy_Args){
      .struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error});
  return NULL;
}

static void *address(void *buffer) {
  return ((const XLA_FFI_Buffer *)buffer)->data;
}

static XLA_FFI_Error *call(XLA_FFI_CallFrame *f, rg_direction direction) {
  if (f->extension_start && f->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *about = ((XLA_FFI_Metadata_Extension *)f->extension_start)->metadata;
    about->api_version = (XLA_FFI_Api_Version){.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE,
                                               .major_version = XLA_FFI_API_MAJOR,
                                               .minor_version = XLA_FFI_API_MINOR};
    return NULL;
  }
  if (f->attrs.size != 1 || f->attrs.types[0] != XLA_FFI_AttrType_SCALAR)
    return fail(f->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, "regraph: expected a plan's number");
  const int64_t number = *(const int64_t *)((const XLA_FFI_Scalar *)f->attrs.attrs[0])->value;
  pthread_mutex_lock(&lock);
  entry *e = find(number);
  pthread_mutex_unlock(&lock);
  if (!e)
    return fail(f->api, XLA_FFI_Error_Code_FAILED_PRECONDITION,
                "regraph: the program was compiled in another process, and its plan is not in this "
                "one; trace the function here");
  const int64_t *count = e->about.count, bound = count[RG_INPUT] + count[RG_OUTPUT];
  const bool back = direction == RG_BACKWARD;
  const int64_t arguments = back ? bound + 1 + count[RG_GRAD_IN] : count[RG_INPUT];
  const int64_t results = back ? count[RG_GRAD_OUT] + 1 : count[RG_OUTPUT] + 2;
  if (f->args.size < arguments || f->rets.size != results)
    return fail(f->api, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                "regraph: the call's arrays are not those of its plan");
  void *stream = stream_of(f);
  if ((stream != NULL) != e->about.cuda)
    return fail(f->api, XLA_FFI_Error_Code_INVALID_ARGUMENT,
                e->about.cuda ? "regraph: the plan is for a GPU and the arrays are on the host; "
                                "put them there, or say device=\"cpu\""
                              : "regraph: the plan is for the host and the arrays are on a GPU");
  worker *w = take(e, stream);
  if (!w) return fail(f->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "regraph: no memory");
  void **in = f->args.args, **out = f->rets.rets, **to = w->pointers;
  void *scratch = address(out[results - 1]);
  void *saved = address(back ? in[bound] : out[results - 2]);
  for (int64_t i = 0; i < (back ? bound : arguments); i++) *to++ = address(in[i]);
  for (int64_t i = bound + 1; i < arguments; i++) *to++ = address(in[i]);
  for (int64_t i = 0; i < results - (back ? 1 : 2); i++) *to++ = address(out[i]);
  rg_error error = {0};
  rg_status status = run(e, w, direction, saved, scratch, &error);
  pthread_mutex_unlock(&w->busy);
  if (!status) return NULL;
  char line[1536];
  e->about.format(&error, line, sizeof line);
  const bool theirs = status == RG_E_DATA || status == RG_E_USAGE;
  return fail(f->api, theirs ? XLA_FFI_Error_Code_INVALID_ARGUMENT : XLA_FFI_Error_Code_INTERNAL,
              line);
}

XLA_FFI_Error *regraph_xla_forward(XLA_FFI_CallFrame *frame) {
  return call(frame, RG_FORWARD);
}

XLA_FFI_Error *regraph_xla_backward(XLA_FFI_CallFrame *frame) {
  return call(frame, RG_BACKWARD);
}
