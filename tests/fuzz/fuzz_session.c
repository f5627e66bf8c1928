/* tests/fuzz/fuzz_session.c: bytes → calls on sessions in any order, over tiny CPU plans.

   Two sessions share three sets of tensors and three blocks for saved values or scratch. Create,
   bind (another set, nothing, other tensors' memory; by name, by index), run (what is bound, or an
   array of pointers), change lengths (to wrong ones too), bind, adopt, move and forget saved
   blocks, move tensors, destroy. A model beside them knows what each call must answer, an error
   that the caller holds already must survive, and after a run that went well the results are the
   bits of a clean session over copies of what the run read.

   One of the plans has state, which a run that went well leaves as the clean session does, from the
   bytes that it found.

   What the header asks of callers is kept: memory that is freed is unbound and forgotten first, a
   block is adopted only while it holds a forward, and a forward whose tensors have moved is not
   gone back from.
 */
#include "exec/session.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  T = 22,
  B = 3,
  MOST = 24,
  SETS = 3,
  BLOCKS = 3,
  SESSIONS = 2,
  OWN = BLOCKS,
  PLANS = 5,
  STATE = PLANS - 1, /* the one with state */
  PAGES = 6,
  ROUNDS = 160
};

/* ' stands for " */
static const char spec_text[] =
    "{ 'regraph': 1, 'name': 'fuzz', 'inputs': {"
    "    'q': { 'shape': ['T', 2, 4], 'dtype': 'f32', 'grad': true },"
    "    'k': { 'shape': ['T', 2, 4], 'dtype': 'f32', 'grad': true },"
    "    'v': { 'shape': ['T', 2, 4], 'dtype': 'f32', 'grad': true },"
    "    'gate': { 'shape': ['T', 2, 2], 'dtype': 'f32', 'grad': true },"
    "    'w': { 'shape': [4, 4], 'dtype': 'f32', 'grad': 'accumulate' },"
    "    'b': { 'shape': [4], 'dtype': 'f32', 'grad': true },"
    "    'pos': { 'shape': ['B'], 'dtype': 'i32' },"
    "    'cu': { 'shape': ['B+1'], 'dtype': 'i32' } },"
    "  'nodes': ["
    "    { 'name': 'rope', 'op': 'rope', 'out': { 'y': 'qr' },"
    "      'in': { 'x': 'q', 'cu_seqlens': 'cu', 'q_offset': 'pos' } },"
    "    { 'name': 'cmp', 'op': 'compress_kv', 'attrs': { 'kernel': 4, 'stride': 2 },"
    "      'in': { 'k': 'k', 'v': 'v', 'cu_seqlens': 'cu' }, 'out': { 'k': 'ck', 'v': 'cv' } },"
    "    { 'name': 'cmp_o', 'op': 'cmp_attn', 'attrs': { 'kernel': 4, 'stride': 2 },"
    "      'in': { 'q': 'qr', 'k': 'ck', 'v': 'cv', 'cu_seqlens': 'cu' }, 'out': { 'o': 'co', "
    "'lse': 'cl' } "
    "},"
    "    { 'name': 'topk', 'op': 'topk', 'out': { 'idx': 'idx' },"
    "      'in': { 'q': 'qr', 'k': 'ck', 'lse': 'cl', 'cu_seqlens': 'cu' },"
    "      'attrs': { 'kernel': 4, 'stride': 2, 'block': 4, 'top_n': 2, 'init': 0, 'local': 1 } },"
    "    { 'name': 'slc_o', 'op': 'slc_attn', 'out': { 'o': 'so' }, 'attrs': { 'block': 4 },"
    "      'in': { 'q': 'qr', 'k': 'k', 'v': 'v', 'idx': 'idx', 'cu_seqlens': 'cu' } },"
    "    { 'name': 'combine', 'op': 'combine', 'in': { 'o': ['co', 'so'], 'gate': 'gate' },"
    "      'out': { 'o': 'o' } },"
    "    { 'name': 'rows', 'op': 'reshape', 'in': { 'x': 'v' }, 'out': { 'y': 'x' },"
    "      'attrs': { 'shape': [-1, 4] } },"
    "    { 'name': 'proj', 'op': 'linear', 'in': { 'x': 'x', 'w': 'w', 'b': 'b' }, 'out': { 'y': "
    "'m' } },"
    "    { 'name': 'back', 'op': 'reshape', 'in': { 'x': 'm' }, 'out': { 'y': 'y' },"
    "      'attrs': { 'shape': [-1, 2, 4] } } ],"
    "  'outputs': { 'o': 'o', 'y': 'y' } }";

/* `old` is read before it is written over, wherever it stands. */
static const char state_text[] =
    "{ 'regraph': 1, 'name': 'state', 'inputs': {"
    "    'q': { 'shape': ['T', 2, 4], 'dtype': 'f32' },"
    "    'pages': { 'shape': [2, 2], 'dtype': 'i32' },"
    "    'pos': { 'shape': ['B'], 'dtype': 'i32' },"
    "    'cu': { 'shape': ['B+1'], 'dtype': 'i32' } },"
    "  'state': { 'cache': { 'shape': [6, 2, 4], 'dtype': 'f32', 'next': 'cache_now' } },"
    "  'nodes': ["
    "    { 'name': 'copy', 'op': 'page_copy', 'in': { 'cache': ['cache'], 'pages': 'pages' },"
    "      'out': { 'cache': ['cache_now'] } },"
    "    { 'name': 'old', 'op': 'cast', 'in': { 'x': 'cache' }, 'out': { 'y': 'was' } },"
    "    { 'name': 'rope', 'op': 'rope', 'out': { 'y': 'y' },"
    "      'in': { 'x': 'q', 'cu_seqlens': 'cu', 'q_offset': 'pos' } } ],"
    "  'outputs': { 'y': 'y', 'was': 'was', 'now': 'cache_now' } }";

static const char *const policies[PLANS] = {
    NULL, "{ \"regraph_policy\": 1, \"preset\": \"all\" }",
    "{ \"regraph_policy\": 1, \"recompute\": [\"topk\", \"cmp\"], \"split_heads\": 1 }", NULL,
    NULL};

/* A plan and a session that nobody disturbs. Made once, never taken down. */
typedef struct subject {
  rg_plan *plan;
  int n; /* what can be bound */
  const rgi_bindable *t;
  rg_sizes size;
  bool gradients;
  rg_session *clean;
  char *reference[MOST];
} subject;

/* A forward that a session remembers. */
typedef struct memory {
  bool known; /* the session has met the block and not forgotten it */
  bool forwarded;
  bool stale;   /* a tensor of it has moved */
  bool guessed; /* adopted, and nobody remembers what the forward read */
  void *at[MOST];
  char *input[MOST]; /* copies of what it read, state as it found it, as long as `forwarded` */
  char *saved;       /* a copy of what it left in the block */
} memory;

typedef struct model {
  rg_session *s;
  bool own_saved, own_scratch, poison;
  void *bound[MOST];
  memory of[BLOCKS + 1];
  int current, scratch; /* a block, or OWN */
} model;

typedef struct world {
  const subject *on;
  const uint8_t *next, *end;
  char *tensor[SETS][MOST];
  char *block[BLOCKS];
  bool holds[BLOCKS]; /* the values of some forward */
  model session[SESSIONS];
  int last; /* errors: how the last call was given one */
} world;

#define REQUIRE(condition)                                            \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "fuzz_session:%d: %s\n", __LINE__, #condition); \
      abort();                                                        \
    }                                                                 \
  } while (0)

/* ends where it says, so that a sanitizer sees what goes past it */
static void *make(size_t size) {
  void *p = NULL;
  REQUIRE(posix_memalign(&p, 256, size ? size : 1) == 0);
  return p;
}
static void *copy_of(const void *from, size_t size) {
  void *p = make(size);
  if (size) memcpy(p, from, size);
  return p;
}
static uint8_t take(world *w) {
  return w->next < w->end ? *w->next++ : 0;
}
static size_t bytes_of(const world *w, int i) {
  return (size_t)w->on->t[i].info.bytes;
}
static rg_role role_of(const world *w, int i) {
  return w->on->t[i].info.role;
}
static bool of_forward(const world *w, int i) {
  return role_of(w, i) == RG_INPUT || role_of(w, i) == RG_OUTPUT || role_of(w, i) == RG_STATE;
}

/* ---- errors: none, a fresh one, or one that holds an earlier call's ---- */

static rg_error error;
static rg_error *error_for(world *w) {
  error = (rg_error){0};
  w->last = take(w) % 8;
  if (w->last == 1) error = (rg_error){.status = RG_E_COMM, .message = "earlier"};
  return w->last == 0 ? NULL : &error;
}
static void answers(const world *w, rg_status got, rg_status want, const char *call) {
  if (got != want) {
    fprintf(stderr, "fuzz_session: %s: %s, expected %s: %s\n", call, rg_status_name(got),
            rg_status_name(want), error.message);
    abort();
  }
  if (w->last == 0) return;
  if (w->last == 1)
    REQUIRE(error.status == RG_E_COMM && strcmp(error.message, "earlier") == 0);
  else
    REQUIRE(error.status == want && (want == RG_OK || error.message[0]));
}
#define CALL(w, want, name, ...) answers(w, name(__VA_ARGS__, error_for(w)), want, #name)

/* ---- what the model expects ---- */

typedef struct range {
  const char *data;
  size_t size;
  bool written;
} range;

static bool overlap(const world *w, const model *m, bool backward) {
  range r[MOST + 2];
  int n = 0;
  for (int i = 0; i < w->on->n; i++) {
    const rgi_bindable *b = &w->on->t[i];
    void *at = backward && of_forward(w, i) ? m->of[m->current].at[i] : m->bound[i];
    if (b->read[backward] || b->written[backward] ||
        (!backward && role_of(w, i) == RG_INPUT && b->read[1]))
      r[n++] = (range){at, bytes_of(w, i), b->written[backward]};
  }
  if (m->current != OWN) r[n++] = (range){w->block[m->current], (size_t)w->on->size.saved, true};
  if (m->scratch != OWN) r[n++] = (range){w->block[m->scratch], (size_t)w->on->size.scratch, true};
  for (int i = 0; i < n; i++)
    for (int k = 0; k < n; k++)
      if (i != k && r[i].written && r[i].size && r[k].size && r[i].data < r[k].data + r[k].size &&
          r[k].data < r[i].data + r[i].size)
        return true;
  return false;
}

static bool all_bound(const world *w, const model *m, bool gradients) {
  for (int i = 0; i < w->on->n; i++)
    if ((gradients || of_forward(w, i)) && !m->bound[i]) return false;
  return true;
}

static bool lengths_obey(const world *w, const model *m) {
  const int32_t *cu = NULL, *pos = NULL;
  for (int i = 0; i < w->on->n; i++) {
    if (w->on->t[i].info.seqlens) cu = m->bound[i];
    if (w->on->t[i].info.offsets) pos = m->bound[i];
  }
  bool good = cu[0] == 0 && cu[B] <= T;
  for (int i = 0; i < B && good; i++) good = cu[i] <= cu[i + 1];
  for (int i = 0; i < B && good; i++)
    good = pos[i] >= 0 && (int64_t)pos[i] + cu[i + 1] - cu[i] <= INT32_MAX;
  return good;
}

/* Is the list of copies sound, where there is one? If not, the run itself finds that out. */
static bool copies_obey(const world *w, const model *m) {
  const int32_t *x = NULL;
  for (int i = 0; i < w->on->n; i++)
    if (strcmp(w->on->t[i].info.name, "pages") == 0) x = m->bound[i];
  for (int i = 0; i < 4 && x; i += 2) {
    const int32_t *other = x + 2 - i;
    if (x[i] == -1 && x[i + 1] == -1) continue;
    for (int k = i; k < i + 2; k++)
      if (x[k] < 0 || x[k] >= PAGES) return false;
    if (other[0] == x[i + 1] || other[1] == x[i + 1]) return false;
  }
  return true;
}

static rg_status forward_status(const world *w, const model *m) {
  if (!all_bound(w, m, false) || !m->of[m->current].known || overlap(w, m, false))
    return RG_E_USAGE;
  return lengths_obey(w, m) ? RG_OK : RG_E_DATA;
}
static rg_status backward_status(const world *w, const model *m) {
  if (!w->on->gradients || !m->of[m->current].forwarded || !all_bound(w, m, true))
    return RG_E_USAGE;
  return overlap(w, m, true) ? RG_E_USAGE : RG_OK;
}

/* ---- memories ---- */

static const char *saved_at(const world *w, const model *m) {
  return m->current == OWN ? m->s->own_saved.data : w->block[m->current];
}

static void drop(world *w, memory *f) {
  for (int i = 0; i < w->on->n && f->forwarded; i++) free(f->input[i]);
  if (f->forwarded) free(f->saved);
  f->forwarded = f->stale = f->guessed = false;
  memset(f->input, 0, sizeof f->input);
  f->saved = NULL;
}

static void remember(world *w, model *m, char *const *state) {
  memory *f = &m->of[m->current];
  drop(w, f);
  f->forwarded = true;
  memcpy(f->at, m->bound, sizeof f->at);
  for (int i = 0; i < w->on->n; i++) {
    if (role_of(w, i) == RG_INPUT) f->input[i] = copy_of(m->bound[i], bytes_of(w, i));
    if (role_of(w, i) == RG_STATE) f->input[i] = copy_of(state[i], bytes_of(w, i));
  }
  f->saved = copy_of(saved_at(w, m), (size_t)w->on->size.saved);
}

/* Has anyone touched what the backward of this forward reads, lengths apart? */
static bool untouched(const world *w, const model *m) {
  const memory *f = &m->of[m->current];
  for (int i = 0; i < w->on->n; i++) {
    if (!of_forward(w, i) || w->on->t[i].info.seqlens || w->on->t[i].info.offsets) continue;
    const char *was = role_of(w, i) == RG_INPUT ? f->input[i] : w->on->reference[i];
    if (memcmp(f->at[i], was, bytes_of(w, i)) != 0) return false;
  }
  return memcmp(saved_at(w, m), f->saved, (size_t)w->on->size.saved) == 0;
}

/* The clean session's forward over what a forward read. */
static void clean_forward(const world *w, const memory *f) {
  for (int i = 0; i < w->on->n; i++)
    if (f->input[i]) memcpy(w->on->reference[i], f->input[i], bytes_of(w, i));
  error = (rg_error){0};
  if (rg_session_forward(w->on->clean, &error) != RG_OK) fprintf(stderr, "%s\n", error.message);
  REQUIRE(error.status == RG_OK);
}

static void same(const world *w, void *const *at, rg_role role) {
  for (int i = 0; i < w->on->n; i++)
    if (role_of(w, i) == role && memcmp(at[i], w->on->reference[i], bytes_of(w, i)) != 0) {
      fprintf(stderr, "fuzz_session: %s differs from a clean run's\n", w->on->t[i].info.name);
      abort();
    }
}

static size_t block_size(const world *w) {
  return (size_t)(w->on->size.saved > w->on->size.scratch ? w->on->size.saved
                                                          : w->on->size.scratch);
}

/* Blocks that a run has written to, as scratch or through tensors, hold no forward any more:
 * everyone forgets them. */
static void wrote(world *w, const model *m, bool backward) {
  for (int b = 0; b < BLOCKS; b++) {
    bool spoilt = m->scratch == b;
    for (int i = 0; i < w->on->n && !spoilt; i++) {
      const char *p = m->bound[i];
      spoilt = w->on->t[i].written[backward] && p >= w->block[b] && p < w->block[b] + block_size(w);
    }
    for (int s = 0; s < SESSIONS && spoilt; s++) {
      model *other = &w->session[s];
      if (!other->s || !other->of[b].known) continue;
      CALL(w, RG_OK, rg_session_forget_saved, other->s, w->block[b]);
      drop(w, &other->of[b]);
      other->of[b].known = false;
    }
    if (spoilt) w->holds[b] = false;
  }
}

/* ---- calls ---- */

static void create(world *w, model *m) {
  const int how = take(w), saved = take(w) % (BLOCKS + 1), scratch = take(w) % (BLOCKS + 1);
  if (m->s) return;
  *m = (model){.poison = how & 1, .current = saved, .scratch = scratch};
  m->own_saved = saved == OWN;
  m->own_scratch = scratch == OWN;
  rg_session_options o = {.debug_poison = m->poison,
                          .saved = saved == OWN ? NULL : w->block[saved],
                          .scratch = scratch == OWN ? NULL : w->block[scratch]};
  if (how % 16 == 7) {
    rg_session *none = NULL;
    o.scratch = w->block[0] + 4;
    CALL(w, RG_E_USAGE, rg_session_create, w->on->plan, &o, &none);
    REQUIRE(!none);
    return;
  }
  CALL(w, RG_OK, rg_session_create, w->on->plan, &o, &m->s);
  m->of[saved].known = true;
}

static void destroy(world *w, model *m) {
  for (int b = 0; b <= BLOCKS; b++) drop(w, &m->of[b]);
  rg_session_destroy(m->s);
  *m = (model){0};
}

static void bind(world *w, model *m) {
  const int i = take(w) % w->on->n, set = take(w) % SETS, how = take(w) % 16, k = take(w);
  const rg_tensor_info *t = &w->on->t[i].info;
  char *p = w->tensor[set][i];
  size_t bytes = (size_t)t->bytes;
  rg_status want = RG_OK;
  if (how == 0) {
    p = NULL;
  } else if (how == 1) {
    want = RG_E_USAGE;
    bytes += 4;
  } else if (how == 2) {
    want = RG_E_USAGE;
    p += 2;
  } else if (how < 6) { /* somewhere in another tensor's memory, where there is room */
    const int other = k % w->on->n;
    const size_t room = bytes_of(w, other), offset = (size_t)(k / w->on->n) * 4;
    if (bytes + offset <= room) p = w->tensor[set][other] + offset;
  } else if (how == 6 && block_size(w) >= bytes) {
    p = w->block[k % BLOCKS];
  } else if (how == 7) {
    want = RG_E_USAGE;
  }
  if (how == 7)
    CALL(w, want, rg_session_bind, m->s, t->role, "nobody", p, bytes);
  else if (k & 1)
    CALL(w, want, rg_session_bind_index, m->s, (size_t)i, p, bytes);
  else
    CALL(w, want, rg_session_bind, m->s, t->role, t->name, p, bytes);
  if (want == RG_OK) m->bound[i] = p;
}

static void bind_all(world *w, model *m) {
  const int set = take(w) % SETS;
  for (int i = 0; i < w->on->n; i++) {
    const rg_tensor_info *t = &w->on->t[i].info;
    REQUIRE(rg_session_bind(m->s, t->role, t->name, w->tensor[set][i], bytes_of(w, i), NULL) ==
            RG_OK);
    m->bound[i] = w->tensor[set][i];
  }
}

/* What rg_session_run is called with. */
typedef struct by_index {
  void *pointers[MOST];
  void *saved, *scratch;
} by_index;

static rg_status call_run(const model *m, rg_direction d, by_index *x, size_t n, rg_error *e) {
  return rg_session_run(m->s, d, x->pointers, n, x->saved, x->scratch, e);
}

/* Draws arguments. True: they make sense, and the model knows them as bound, which they are once
 * the call is made. False: the call has been made and refused, and nothing was bound. */
static bool draw_arguments(world *w, model *m, rg_direction d, by_index *x) {
  const int set = take(w) % SETS, how = take(w) % 16, k = take(w) % w->on->n;
  const int saved = take(w) % (BLOCKS + 1), scratch = take(w) % (BLOCKS + 1);
  bool good = true;
  size_t n = (size_t)w->on->n;
  for (int i = 0; i < w->on->n; i++) /* unread */
    x->pointers[i] = of_forward(w, i) == (d == RG_FORWARD) ? w->tensor[set][i] : (void *)x;
  x->saved = saved == OWN ? NULL : w->block[saved];
  x->scratch = scratch == OWN ? NULL : w->block[scratch];
  switch (how) {
  case 0: x->pointers[k] = NULL; break;
  case 1:
    good = of_forward(w, k) != (d == RG_FORWARD);
    x->pointers[k] = w->tensor[set][k] + 2;
    break;
  case 2: good = false, n--; break;
  case 3: good = false, d = (rg_direction)2; break;
  case 4: good = false, x->saved = w->block[k % BLOCKS] + 4; break;
  case 5: good = false, x->scratch = w->block[k % BLOCKS] + 4; break;
  default: break;
  }
  if (!good) {
    CALL(w, RG_E_USAGE, call_run, m, d, x, n);
    return false;
  }
  for (int i = 0; i < w->on->n; i++)
    if (of_forward(w, i) == (d == RG_FORWARD)) m->bound[i] = x->pointers[i];
  if (scratch != OWN) m->scratch = scratch;
  if (saved != OWN) {
    m->current = saved;
    m->of[saved].known = true;
  }
  return true;
}

static void forward(world *w, model *m, bool index) {
  by_index x;
  if (index && !draw_arguments(w, m, RG_FORWARD, &x)) return;
  rg_status want = forward_status(w, m);
  const bool broken = want == RG_OK && !copies_obey(w, m);
  if (broken) want = RG_E_DATA;
  char *state[MOST] = {NULL};
  for (int i = 0; i < w->on->n; i++)
    if (role_of(w, i) == RG_STATE && m->bound[i]) state[i] = copy_of(m->bound[i], bytes_of(w, i));
  if (index)
    CALL(w, want, call_run, m, RG_FORWARD, &x, (size_t)w->on->n);
  else
    CALL(w, want, rg_session_forward, m->s);
  for (int i = 0; i < w->on->n && want != RG_OK; i++)
    REQUIRE(!state[i] || memcmp(state[i], m->bound[i], bytes_of(w, i)) == 0);
  if (want == RG_OK || broken) wrote(w, m, false);
  if (broken) {
    drop(w, &m->of[m->current]);
    if (m->current != OWN) w->holds[m->current] = false;
  }
  if (want == RG_OK &&
      m->of[m->current].known) { /* not a block of no saved bytes that is scratch */
    remember(w, m, state);
    if (m->current != OWN) w->holds[m->current] = true;
    clean_forward(w, &m->of[m->current]);
    same(w, m->bound, RG_OUTPUT);
    same(w, m->bound, RG_STATE);
  }
  for (int i = 0; i < w->on->n; i++) free(state[i]);
}

static void backward(world *w, model *m, bool index) {
  /* a forward whose tensors have moved must not be gone back from: not with what is drawn here,
   * either */
  for (int b = 0; index && b <= BLOCKS; b++)
    if (m->of[b].forwarded && m->of[b].stale) return;
  by_index x;
  if (index && !draw_arguments(w, m, RG_BACKWARD, &x)) return;
  const rg_status want = backward_status(w, m);
  memory *f = &m->of[m->current];
  if (want == RG_OK && f->stale) return;
  bool compare = want == RG_OK && !f->guessed;
  if (compare) {
    clean_forward(w, f);
    compare = untouched(w, m);
    for (int i = 0; i < w->on->n; i++)
      if (!of_forward(w, i)) memcpy(w->on->reference[i], m->bound[i], bytes_of(w, i));
  }
  if (index)
    CALL(w, want, call_run, m, RG_BACKWARD, &x, (size_t)w->on->n);
  else
    CALL(w, want, rg_session_backward, m->s);
  if (want == RG_OK) wrote(w, m, true);
  if (!compare) return;
  REQUIRE(rg_session_backward(w->on->clean, NULL) == RG_OK);
  same(w, m->bound, RG_GRAD_OUT);
}

static void change_lengths(world *w) {
  static const int32_t cu[][B + 1] = {{0, 9, 9, 20}, {0, 0, 0, 0},   {0, 22, 22, 22},
                                      {0, 1, 2, 3},  {0, 7, 15, 22}, {0, 9, 8, 20},
                                      {1, 9, 9, 20}, {0, 9, 9, 23},  {-1, 0, 0, INT32_MAX}};
  static const int32_t pos[][B] = {
      {0, 0, 0}, {5, 0, 1 << 20}, {INT32_MAX - 22, 0, 0}, {-1, 0, 0}, {0, 0, INT32_MAX}};
  const int set = take(w) % SETS, a = take(w), b = take(w);
  for (int i = 0; i < w->on->n; i++) {
    if (w->on->t[i].info.seqlens) memcpy(w->tensor[set][i], cu[a % RGI_COUNT(cu)], sizeof cu[0]);
    if (w->on->t[i].info.offsets) memcpy(w->tensor[set][i], pos[b % RGI_COUNT(pos)], sizeof pos[0]);
  }
}

static void bind_saved(world *w, model *m) {
  const int b = take(w) % (BLOCKS + 1);
  const bool none = b == OWN && !m->own_saved && w->on->size.saved;
  CALL(w, none ? RG_E_USAGE : RG_OK, rg_session_bind_saved, m->s, b == OWN ? NULL : w->block[b]);
  if (none) return;
  m->current = b;
  m->of[b].known = true;
}

/* Only of a block that holds a forward's values: with that forward's tensors they can be gone back
 * from. */
static void adopt(world *w, model *m) {
  const int b = take(w) % BLOCKS;
  if (!w->holds[b]) return;
  const rg_status want = all_bound(w, m, false) ? RG_OK : RG_E_USAGE;
  CALL(w, want, rg_session_adopt_saved, m->s, w->block[b]);
  if (want != RG_OK) return;
  m->current = b;
  m->of[b].known = true;
  /* what it read, lengths included, is known where the forward is remembered by someone */
  memory *to = &m->of[b], *from = NULL;
  for (int s = 0; s < SESSIONS && !from; s++)
    if (w->session[s].of[b].forwarded && !w->session[s].of[b].guessed &&
        memcmp(w->session[s].of[b].saved, w->block[b], (size_t)w->on->size.saved) == 0)
      from = &w->session[s].of[b];
  memory now = {.known = true, .forwarded = true, .guessed = from == NULL};
  memcpy(now.at, m->bound, sizeof now.at);
  for (int i = 0; i < w->on->n; i++)
    if (role_of(w, i) == RG_INPUT)
      now.input[i] = copy_of(from ? from->input[i] : m->bound[i], bytes_of(w, i));
  now.saved = copy_of(w->block[b], (size_t)w->on->size.saved);
  drop(w, to);
  *to = now;
}

static void forget(world *w, model *m) {
  const int b = take(w) % BLOCKS;
  CALL(w, m->of[b].known ? RG_OK : RG_E_USAGE, rg_session_forget_saved, m->s, w->block[b]);
  drop(w, &m->of[b]);
  m->of[b].known = false;
}

static void bind_scratch(world *w, model *m) {
  const int b = take(w) % (BLOCKS + 1);
  const bool none = b == OWN && !m->own_scratch && w->on->size.scratch;
  CALL(w, none ? RG_E_USAGE : RG_OK, rg_session_bind_scratch, m->s, b == OWN ? NULL : w->block[b]);
  if (none) return;
  m->scratch = b;
}

/* A set's tensors move: whoever had them bound lets go, and no forward with them is gone back from
 * until its block is adopted with the new ones. */
static void move_tensors(world *w) {
  const int set = take(w) % SETS;
  for (int i = 0; i < w->on->n; i++) {
    char *old = w->tensor[set][i], *new = copy_of(old, bytes_of(w, i));
    for (int s = 0; s < SESSIONS; s++) {
      model *m = &w->session[s];
      for (int k = 0; k < w->on->n && m->s; k++) {
        const rg_tensor_info *t = &w->on->t[k].info;
        const char *p = m->bound[k];
        for (int b = 0; b <= BLOCKS; b++) {
          const char *q = m->of[b].at[k];
          if (m->of[b].forwarded && q >= old && q < old + bytes_of(w, i)) m->of[b].stale = true;
        }
        if (!p || p < old || p >= old + bytes_of(w, i)) continue;
        CALL(w, RG_OK, rg_session_bind, m->s, t->role, t->name, NULL, 0);
        m->bound[k] = NULL;
      }
    }
    free(old);
    w->tensor[set][i] = new;
  }
}

/* A block's bytes move: it is forgotten under its old address. Forwards can be adopted at the new
 * one. */
static void move_block(world *w) {
  const int b = take(w) % BLOCKS;
  const size_t size = block_size(w);
  char *old = w->block[b];
  for (int s = 0; s < SESSIONS; s++) {
    model *m = &w->session[s];
    if (m->s && m->scratch == b) return;
    for (int k = 0; k < w->on->n && m->s; k++) {
      const char *p = m->bound[k];
      if (p && p >= old && p < old + size) return; /* a tensor is bound there */
      for (int i = 0; i <= BLOCKS; i++) {
        const char *q = m->of[i].at[k];
        if (m->of[i].forwarded && q >= old && q < old + size) return;
      }
    }
  }
  for (int s = 0; s < SESSIONS; s++) {
    model *m = &w->session[s];
    if (!m->s || !m->of[b].known) continue;
    CALL(w, RG_OK, rg_session_forget_saved, m->s, old);
    drop(w, &m->of[b]);
    m->of[b].known = false;
  }
  w->block[b] = copy_of(old, size);
  free(old);
}

static void look(world *w, model *m) {
  char *host = make(bytes_of(w, 0));
  int64_t saved, scratch;
  rg_node_time time;
  const bool there = m->of[m->current].forwarded && !m->of[m->current].stale;
  if (there || !m->of[m->current].forwarded)
    CALL(w, there ? RG_OK : RG_E_USAGE, rg_session_read, m->s, w->on->t[0].info.name, host,
         bytes_of(w, 0));
  if (there) REQUIRE(memcmp(host, m->of[m->current].at[0], bytes_of(w, 0)) == 0);
  REQUIRE(rg_session_touched(m->s, &saved, &scratch) == (m->poison ? RG_OK : RG_E_USAGE));
  if (m->poison) REQUIRE(saved <= w->on->size.saved && scratch <= w->on->size.scratch);
  REQUIRE(rg_session_node_time(m->s, take(w) % 4, &time) == RG_OK);
  CALL(w, RG_OK, rg_session_synchronize, m->s);
  CALL(w, RG_E_USAGE, rg_session_set_stream, m->s, host);
  free(host);
}

/* ---- beginning and end ---- */

static void prepare(subject *x, int which) {
  rg_context *ctx = NULL;
  rg_spec *spec = NULL;
  rg_policy *policy = NULL;
  rg_error e = {0};
  rg_binding set[] = {{"T", T, NULL}, {"B", B, NULL}};
  rg_plan_options o = {
      .set = set, .nset = 2, .threads = 1, .pack_seconds = 0.05, .no_grad = which == 3};
  char text[sizeof spec_text + sizeof state_text];
  const char *from = which == STATE ? state_text : spec_text;
  const size_t size = strlen(from);
  for (size_t i = 0; i < size; i++) text[i] = from[i] == '\'' ? '"' : from[i];
  rg_context_create(NULL, &ctx, &e);
  rg_spec_load_text(ctx, text, size, "fuzz", NULL, 0, &spec, &e);
  if (policies[which])
    rg_policy_load_text(ctx, policies[which], strlen(policies[which]), "policy", &policy, &e);
  rg_plan_create(spec, policy, &o, &x->plan, &e);
  rg_session_create(x->plan, NULL, &x->clean, &e);
  if (e.status != RG_OK) fprintf(stderr, "fuzz_session: %s: %s\n", e.pointer, e.message);
  REQUIRE(e.status == RG_OK && x->plan->nbindable <= MOST);
  REQUIRE(rg_plan_sizes(x->plan, &x->size) == RG_OK);
  x->n = x->plan->nbindable;
  x->t = x->plan->bindable;
  for (int i = 0; i < x->n; i++) {
    const rg_tensor_info *t = &x->t[i].info;
    x->reference[i] = make((size_t)t->bytes);
    x->gradients = x->gradients || t->role == RG_GRAD_OUT;
    REQUIRE(rg_session_bind(x->clean, t->role, t->name, x->reference[i], (size_t)t->bytes, NULL) ==
            RG_OK);
  }
  rg_policy_destroy(policy);
  rg_spec_destroy(spec);
}

/* Small numbers; in the last set NaN past row 18, and starts that end there. */
static void fill(world *w, int set, int i) {
  const rg_tensor_info *t = &w->on->t[i].info;
  uint32_t state = (uint32_t)(set * 100 + i + 1) * 2654435761u;
  float *x = (float *)(void *)w->tensor[set][i];
  const int64_t n = t->bytes / 4, row = t->dim[0] == T ? n / T : n;
  static const int32_t cu[B + 1] = {0, 9, 9, 18};
  for (int64_t k = 0; k < n; k++) {
    state = state * 1664525u + 1013904223u;
    x[k] = (float)(state >> 8) / (1 << 23) - 1;
    if (set == 2 && k >= 18 * row) x[k] = NAN;
  }
  static const int32_t pages[SETS][4] = {{0, 1, -1, -1}, {3, 2, 5, 4}, {0, 1, 1, 2}};
  if (strcmp(t->name, "pages") == 0) memcpy(x, pages[set], sizeof pages[set]);
  if (t->seqlens) memcpy(x, cu, sizeof cu);
  if (t->offsets) memset(x, 0, (size_t)t->bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static subject subjects[PLANS];
  world w = {.next = data, .end = data + size};
  const int which = take(&w);
  subject *on = &subjects[which >= 0xf0 ? STATE : which % STATE];
  if (!on->plan) prepare(on, (int)(on - subjects));
  w.on = on;
  const size_t block = block_size(&w);
  for (int b = 0; b < BLOCKS; b++) memset(w.block[b] = make(block), 0x5a, block ? block : 1);
  for (int set = 0; set < SETS; set++)
    for (int i = 0; i < on->n; i++) {
      w.tensor[set][i] = make(bytes_of(&w, i));
      fill(&w, set, i);
    }
  for (int round = 0; round < ROUNDS && w.next < w.end; round++) {
    const int what = take(&w);
    model *m = &w.session[what & 1];
    if (!m->s) {
      create(&w, m);
      continue;
    }
    switch (what / 2 % 16) {
    case 0: bind(&w, m); break;
    case 1: bind_all(&w, m); break;
    case 2:
    case 3:
    case 4: forward(&w, m, what & 0x80); break;
    case 5:
    case 6:
    case 7: backward(&w, m, what & 0x80); break;
    case 8: change_lengths(&w); break;
    case 9: bind_saved(&w, m); break;
    case 10: adopt(&w, m); break;
    case 11: forget(&w, m); break;
    case 12: bind_scratch(&w, m); break;
    case 13: take(&w) % 2 ? move_tensors(&w) : move_block(&w); break;
    case 14: look(&w, m); break;
    default:
      if (take(&w) % 4 == 0) destroy(&w, m);
      break;
    }
  }
  for (int s = 0; s < SESSIONS; s++) destroy(&w, &w.session[s]);
  for (int b = 0; b < BLOCKS; b++) free(w.block[b]);
  for (int set = 0; set < SETS; set++)
    for (int i = 0; i < on->n; i++) free(w.tensor[set][i]);
  return 0;
}
