/* cli/ranks.c: see ranks.h. A rank's thread waits for a command, obeys it, says so, and waits
 * again. */
#include "ranks.h"
#include <pthread.h>
#include <regraph/op.h>
#include <stdlib.h>
#include <string.h>

typedef enum command { OPEN, FORWARD, BACKWARD, QUIT } command;

typedef struct rank {
  struct cli_ranks *all;
  int number;
  pthread_t thread;
  bool started;
  rg_comm *comm;
  rg_session *session;
  void **data; /* this rank's share of each tensor of the set */
  rg_status status;
  rg_error error;
  int64_t bytes; /* that the session asked for */
} rank;

typedef struct cli_ranks {
  cli *c;
  const data_set *d;
  rg_cp_info cp;
  int here;              /* ranks in this process: all, or under a launcher its own */
  const int32_t *starts; /* of the batch */
  size_t entries;
  pthread_mutex_t lock;
  pthread_cond_t moved;
  command command;
  int turn, busy;
  rank rank[];
} cli_ranks_state;

int cli_ranks(const cli *c) {
  rg_cp_info cp = {.ranks = 1};
  if (c->plan) rg_plan_cp(c->plan, &cp);
  return cp.ranks;
}

/* ---- a rank's work ---- */

static void *count_alloc(void *user, size_t size) {
  rank *r = user;
  void *p = NULL;
  if (rg_memory_alloc(r->all->c->plan, size, &p, NULL) == RG_OK) r->bytes += (int64_t)size;
  return p;
}
static void count_free(void *user, void *p) {
  rg_memory_free(((rank *)user)->all->c->plan, p);
}

static rg_status open_session(rank *r) {
  const data_set *d = r->all->d;
  rg_allocator hook = {count_alloc, count_free, r};
  rg_session_options o = {
      .size = sizeof o, .arena = &hook, .comm = r->comm, .eager = r->all->c->args.eager};
  rg_status s = rg_session_create(r->all->c->plan, &o, &r->session, &r->error);
  for (int i = 0; i < d->ntensor && s == RG_OK; i++) {
    rg_tensor_info t;
    rg_plan_tensor(r->all->c->plan, (size_t)i, &t);
    if (r->data[i])
      s = rg_session_bind(r->session, t.role, t.name, r->data[i], (size_t)t.bytes, &r->error);
  }
  return s;
}

static void obey(rank *r, command what) {
  if (r->status != RG_OK || what == QUIT) return;
  if (what == OPEN) r->status = open_session(r);
  if (what == FORWARD) r->status = rg_session_forward(r->session, &r->error);
  if (what == BACKWARD) r->status = rg_session_backward(r->session, &r->error);
  if (what != OPEN && r->status == RG_OK) r->status = rg_session_synchronize(r->session, &r->error);
  if (r->status != RG_OK) { /* the others need not wait for it */
    rg_comm_destroy(r->comm, &r->error);
    r->comm = NULL;
  }
}

static void *serve(void *arg) {
  rank *r = arg;
  cli_ranks_state *all = r->all;
  int turn = 0;
  for (command what = OPEN; what != QUIT;) {
    pthread_mutex_lock(&all->lock);
    while (all->turn == turn) pthread_cond_wait(&all->moved, &all->lock);
    turn = all->turn;
    what = all->command;
    pthread_mutex_unlock(&all->lock);
    obey(r, what);
    pthread_mutex_lock(&all->lock);
    all->busy--;
    pthread_cond_broadcast(&all->moved);
    pthread_mutex_unlock(&all->lock);
  }
  return NULL;
}

/* Tells the other ranks here, does the first one's part, waits. */
static void order(cli_ranks_state *all, command what) {
  pthread_mutex_lock(&all->lock);
  all->command = what;
  all->busy = 0;
  for (int i = 1; i < all->here; i++) all->busy += all->rank[i].started;
  all->turn++;
  pthread_cond_broadcast(&all->moved);
  pthread_mutex_unlock(&all->lock);
  obey(&all->rank[0], what);
  pthread_mutex_lock(&all->lock);
  while (all->busy > 0) pthread_cond_wait(&all->moved, &all->lock);
  pthread_mutex_unlock(&all->lock);
}

/* What went wrong: a rank's own failure rather than that the others had to stop. */
static rg_status failed(cli *c) {
  const cli_ranks_state *all = c->ranks;
  const rank *worst = NULL;
  for (int i = 0; i < all->here; i++) {
    const rank *r = &all->rank[i];
    if (r->status == RG_OK) continue;
    if (!worst || (worst->status == RG_E_COMM && r->status != RG_E_COMM)) worst = r;
  }
  if (!worst) return RG_OK;
  if (c->error.status == RG_OK) c->error = worst->error;
  return worst->status;
}

/* ---- sharing out ---- */

/* Rows of the whole array that slot `slot` of a rank has. */
static rg_range range_of(const cli_ranks_state *all, int number, int slot, int64_t rows) {
  rg_range r[2] = {{0, 0}, {0, 0}};
  rg_cp_rows(all->starts, all->entries, all->cp.capacity, all->cp.ranks, all->cp.mode, number, r,
             NULL);
  return (rg_range){r[slot].begin * rows / all->cp.capacity, r[slot].end * rows / all->cp.capacity};
}

/* A slot's rows within the whole array, and their bytes. */
static char *rows_of(const cli_ranks_state *all, const data_tensor *t, int number, int slot,
                     size_t *size) {
  const int64_t rows = t->info.dim[0], row = rows ? t->info.bytes / rows : 0;
  const rg_range at = range_of(all, number, slot, rows);
  *size = (size_t)((at.end - at.begin) * row);
  return (char *)t->data + at.begin * row;
}

static rg_status share_out(cli *c, rank *r) {
  const data_set *d = r->all->d;
  r->data = calloc((size_t)d->ntensor + 1, sizeof *r->data);
  if (!r->data) return cli_nomem(&c->error);
  for (int i = 0; i < d->ntensor; i++) {
    const data_tensor *t = &d->tensor[i];
    rg_tensor_info own;
    rg_plan_tensor(c->plan, (size_t)i, &own);
    if (!t->data) continue;
    rg_status s =
        rg_memory_alloc(c->plan, own.bytes ? (size_t)own.bytes : 1, &r->data[i], &c->error);
    if (!own.sharded && s == RG_OK)
      s = rg_memory_write(c->plan, r->data[i], t->data, (size_t)own.bytes, &c->error);
    char *share = r->data[i];
    for (int slot = 0; slot < 2 && own.sharded && s == RG_OK; slot++) {
      size_t size;
      const char *there = rows_of(r->all, t, r->number, slot, &size);
      s = rg_memory_write(c->plan, share, there, size, &c->error);
      share += size;
    }
    if (s != RG_OK) return s;
  }
  return RG_OK;
}

/* to += from, rounded to the tensor's type once a rank. */
static void add_to(const rg_tensor_info *t, void *to, const void *from) {
  enum { CHUNK = 1024 };
  const size_t size = rg_dtype_size(t->dtype), n = (size_t)t->bytes / size;
  float a[CHUNK], b[CHUNK];
  for (size_t i = 0; i < n; i += CHUNK) {
    const size_t k = n - i < CHUNK ? n - i : CHUNK;
    rg_convert(RG_F32, a, t->dtype, (char *)to + i * size, k);
    rg_convert(RG_F32, b, t->dtype, (const char *)from + i * size, k);
    for (size_t j = 0; j < k; j++) a[j] += b[j];
    rg_convert(t->dtype, (char *)to + i * size, RG_F32, a, k);
  }
}

/* What every rank has of tensor i, one after the other: of the ranks here, or by way of the other
 * processes. Free it. */
static rg_status fetch_shares(cli *c, int i, size_t bytes, char **out) {
  const cli_ranks_state *all = c->ranks;
  rg_comm *comm = all->rank[0].comm;
  rg_tensor_info t;
  rg_status s = RG_OK;
  rg_plan_tensor(c->plan, (size_t)i, &t);
  *out = malloc(bytes * (size_t)all->cp.ranks + 1);
  char *mine = all->here < all->cp.ranks ? malloc(bytes + 1) : NULL;
  if (!*out || (!mine && all->here < all->cp.ranks)) s = cli_nomem(&c->error);
  for (int r = 0; r < all->here && s == RG_OK; r++)
    s = rg_memory_read(c->plan, mine ? mine : *out + (size_t)r * bytes, all->rank[r].data[i], bytes,
                       &c->error);
  if (mine && s == RG_OK) s = comm->all_gather(comm, t.name, mine, *out, bytes, NULL, &c->error);
  free(mine);
  return s;
}

static rg_status join(cli *c, data_tensor *t, int i) {
  const cli_ranks_state *all = c->ranks;
  char *shares = NULL;
  rg_tensor_info own;
  rg_plan_tensor(c->plan, (size_t)i, &own);
  rg_status s = fetch_shares(c, i, (size_t)own.bytes, &shares);
  for (int r = 0; r < all->cp.ranks && s == RG_OK; r++) {
    const char *share = shares + r * own.bytes;
    for (int slot = 0; slot < 2 && t->info.sharded; slot++) {
      size_t size;
      char *there = rows_of(all, t, r, slot, &size);
      memcpy(there, share, size);
      share += size;
    }
    if (!t->info.sharded && r == 0) memcpy(t->data, share, (size_t)t->info.bytes);
    if (!t->info.sharded && r > 0 && t->info.partial) add_to(&t->info, t->data, share);
  }
  free(shares);
  return s;
}

rg_status cli_ranks_gather(cli *c, data_set *d) {
  rg_status s = RG_OK;
  for (int i = 0; i < d->ntensor && s == RG_OK; i++) {
    data_tensor *t = &d->tensor[i];
    if (t->data && (t->info.role == RG_OUTPUT || t->info.role == RG_GRAD_OUT)) s = join(c, t, i);
  }
  return s;
}

/* ---- life ---- */

static rg_status check_starts(cli *c, cli_ranks_state *all) {
  rg_range range[2];
  for (int i = 0; i < all->d->ntensor && !all->starts; i++) {
    const data_tensor *t = &all->d->tensor[i];
    if (t->info.role != RG_INPUT || !t->info.seqlens) continue;
    all->starts = t->data;
    all->entries = (size_t)t->elements;
  }
  return rg_cp_rows(all->starts, all->entries, all->cp.capacity, all->cp.ranks, all->cp.mode, 0,
                    range, &c->error);
}

/* Of the GPUs that this process may see, the one that its place on the host has; a launcher that
 * shows each process but its own has done it. Before anything asks for a GPU. */
rg_status cli_ranks_place(cli *c) {
  int launched = 1, local = 0;
  char number[16];
  rg_comm_launched(NULL, &launched, &local);
  if (launched <= 1 || !cli_on_gpu(c)) return RG_OK;
  const char *at = getenv("CUDA_VISIBLE_DEVICES");
  snprintf(number, sizeof number, "%d", local);
  if (!at || !at[0])
    return setenv("CUDA_VISIBLE_DEVICES", number, 1) == 0 ? RG_OK : cli_nomem(&c->error);
  for (int i = 0; i < local && at; i++) at = (at = strchr(at, ',')) ? at + 1 : NULL;
  if (!at) return RG_OK;
  char *own = strndup(at, strcspn(at, ","));
  const bool set = own && setenv("CUDA_VISIBLE_DEVICES", own, 1) == 0;
  free(own);
  return set ? RG_OK : cli_nomem(&c->error);
}

rg_status cli_ranks_check(cli *c) {
  int launched = 1;
  rg_comm_launched(NULL, &launched, NULL);
  if (launched <= 1 || launched == cli_ranks(c)) return RG_OK;
  return cli_fail(&c->error, RG_E_USAGE, NULL,
                  "the launcher started %d ranks, the plan is for %d; expected --cp %d", launched,
                  cli_ranks(c), launched);
}

rg_status cli_ranks_alone(cli *c) {
  int launched = 1;
  rg_comm_launched(NULL, &launched, NULL);
  if (launched <= 1) return RG_OK;
  return cli_fail(&c->error, RG_E_USAGE, NULL,
                  "bench has its ranks in one process and can not be one of %d", launched);
}

bool cli_ranks_writes(const cli *c) {
  return !c->ranks || c->ranks->rank[0].number == 0;
}

rg_status cli_ranks_open(cli *c, const data_set *d) {
  const int ranks = cli_ranks(c);
  int number = 0, launched = 1;
  rg_comm_launched(&number, &launched, NULL);
  const int n = launched > 1 ? 1 : ranks;
  cli_ranks_state *all = calloc(1, sizeof *all + (size_t)n * sizeof *all->rank);
  rg_comm **comm = calloc((size_t)n, sizeof *comm);
  if (!all || !comm) {
    free(all);
    free(comm);
    return cli_nomem(&c->error);
  }
  c->ranks = all;
  all->c = c;
  all->d = d;
  all->here = n;
  rg_plan_cp(c->plan, &all->cp);
  pthread_mutex_init(&all->lock, NULL);
  pthread_cond_init(&all->moved, NULL);
  rg_status s = check_starts(c, all);
  if (s == RG_OK && n == ranks) s = rg_comm_threads(c->ctx, n, 0, comm, &c->error);
  const rg_comm_options o = {.size = sizeof o, .cuda = cli_on_gpu(c)};
  if (s == RG_OK && n < ranks) s = rg_comm_processes(c->ctx, &o, comm, &c->error);
  for (int i = 0; i < n; i++)
    all->rank[i] = (rank){.all = all, .number = number + i, .comm = comm[i]};
  free(comm);
  for (int i = 0; i < n && s == RG_OK; i++) s = share_out(c, &all->rank[i]);
  for (int i = 1; i < n && s == RG_OK; i++) {
    all->rank[i].started = cli_thread_start(&all->rank[i].thread, serve, &all->rank[i]) == 0;
    if (!all->rank[i].started)
      s = cli_fail(&c->error, RG_E_NOMEM, NULL, "no thread for rank %d", i);
  }
  if (s != RG_OK) return s;
  order(all, OPEN);
  c->session = all->rank[0].session;
  c->arena_peak = all->rank[0].bytes;
  return failed(c);
}

void cli_ranks_close(cli *c) {
  cli_ranks_state *all = c->ranks;
  if (!all) return;
  order(all, QUIT);
  for (int i = 0; i < all->here; i++) {
    rank *r = &all->rank[i];
    if (r->started) pthread_join(r->thread, NULL);
    rg_session_destroy(r->session);
    rg_comm_destroy(r->comm, NULL);
    for (int k = 0; k < all->d->ntensor && r->data; k++)
      if (r->data[k]) rg_memory_free(c->plan, r->data[k]);
    free(r->data);
  }
  c->session = NULL;
  c->ranks = NULL;
  pthread_cond_destroy(&all->moved);
  pthread_mutex_destroy(&all->lock);
  free(all);
}

rg_status cli_direction(cli *c, bool backward) {
  if (c->ranks) {
    order(c->ranks, backward ? BACKWARD : FORWARD);
    return failed(c);
  }
  rg_status s = backward ? rg_session_backward(c->session, &c->error)
                         : rg_session_forward(c->session, &c->error);
  return s == RG_OK ? rg_session_synchronize(c->session, &c->error) : s;
}
