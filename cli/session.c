/* cli/session.c: from arguments to context, spec, policy, plan and session. */
#include "cli.h"
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* --set NAME=VALUE … → bindings. The same name may come again only with the same value. */
rg_status cli_parse_set(cli *c) {
  const cli_list *list = &c->args.set;
  char where[32];
  snprintf(where, sizeof where, "regraph %s", c->args.command->name);
  c->set = calloc((size_t)list->n + 1, sizeof *c->set);
  if (!c->set) return cli_nomem(&c->error);
  for (int i = 0; i < list->n; i++) {
    char name[128];
    const char *value;
    if (!cli_split(list->item[i], name, sizeof name, &value))
      return cli_fail(&c->error, RG_E_USAGE, where,
                      "--set '%s': expected NAME=VALUE, as in --set T=4096", list->item[i]);
    bool again = false;
    for (size_t j = 0; j < c->nset && !again; j++) {
      again = strcmp(c->set[j].name, name) == 0;
      if (again && strcmp(c->set[j].text, value) != 0)
        return cli_fail(&c->error, RG_E_USAGE, where, "--set gives '%s' two values, '%s' and '%s'",
                        name, c->set[j].text, value);
    }
    if (again) continue;
    c->set[c->nset].name = strdup(name);
    if (!c->set[c->nset].name) return cli_nomem(&c->error);
    c->set[c->nset++].text = value;
  }
  return RG_OK;
}

/* A call gave n errors. */
static rg_status note_errors(cli *c, rg_status s, size_t n) {
  c->nerror = n;
  if (n && c->error.status == RG_OK) c->error = c->errors[0];
  return s;
}

/* The spec on standard input. What is too long is the loader's to refuse. */
static rg_status read_spec(cli *c) {
  size_t size = 0, room = 1 << 16;
  const size_t most = (16u << 20) + 1;
  char *text = malloc(room);
  if (!text) return cli_nomem(&c->error);
  while (!feof(stdin) && !ferror(stdin) && size < most) {
    if (size == room) {
      char *more = realloc(text, room *= 2);
      if (!more) {
        free(text);
        return cli_nomem(&c->error);
      }
      text = more;
    }
    size += fread(text + size, 1, room - size, stdin);
  }
  size_t n = 0;
  rg_status s = RG_E_IO;
  if (ferror(stdin))
    cli_fail(&c->error, s, "standard input", "can't be read: %s", strerror(errno));
  else
    s = rg_spec_load_text_all(c->ctx, text, size, "standard input", c->set, c->nset, &c->spec,
                              c->errors, CLI_MOST_ERRORS, &n);
  free(text);
  return note_errors(c, s, n);
}

static rg_status load_spec(cli *c) {
  const char *path = c->args.positional[0];
  size_t n;
  if (strcmp(path, "-") == 0) return read_spec(c);
  rg_status s = rg_spec_load_file_all(c->ctx, path, c->set, c->nset, &c->spec, c->errors,
                                      CLI_MOST_ERRORS, &n);
  if (n) cli_suggest_file(&c->errors[0], path);
  return note_errors(c, s, n);
}

/* What is wrong with it stands behind what is wrong with the spec. */
static rg_status load_policy(cli *c) {
  rg_error e = {0};
  const char *path = c->args.policy;
  if (path && strcmp(path, "-") == 0) path = "/dev/stdin";
  rg_status s = path ? rg_policy_load_file(c->ctx, path, &c->policy, &e) : RG_OK;
  if (s != RG_OK && !strstr(e.message, "nearest")) cli_suggest_file(&e, path);
  if (s != RG_OK && c->error.status == RG_OK) c->error = e;
  if (s != RG_OK && c->nerror > 0 && c->nerror < CLI_MOST_ERRORS) c->errors[c->nerror++] = e;
  return s;
}

rg_status cli_check(cli *c) {
  size_t n;
  rg_status s = rg_check_all(c->spec, c->policy, c->errors, CLI_MOST_ERRORS, &n);
  return note_errors(c, s, n);
}

rg_status cli_open(cli *c) {
  const cli_args *a = &c->args;
  const char *first = a->positional[0];
  if (first && strcmp(first, "-") == 0) first = "standard input";
  rg_printable(first, c->shown, sizeof c->shown);
  rg_status s = rg_context_create(NULL, &c->ctx, &c->error);
  for (int i = 0; s == RG_OK && i < a->plugin.n; i++)
    s = rg_plugin_load(c->ctx, a->plugin.item[i], &c->error);
  if (s != RG_OK || strcmp(a->command->positional, "SPEC") != 0) return s;
  s = cli_parse_set(c);
  if (s != RG_OK) return s;
  s = load_spec(c);
  const rg_status policy = load_policy(c);
  return s != RG_OK ? s : policy;
}

void cli_default_sequences(cli *c) {
  rg_tensor_info info;
  for (size_t i = 0; rg_spec_tensor(c->spec, i, &info) == RG_OK; i++) {
    if (info.role != RG_INPUT || !info.seqlens || info.rank != 1 || info.dim[0] >= 0) continue;
    /* An extent of "B+1" that must be 2 says B = 1. Where B is solved already this contradicts it,
     * and changes nothing. */
    const int64_t two = 2;
    size_t before = c->nsolved;
    rg_error ignored = {0};
    if (rg_spec_solve(c->spec, info.name, 1, &two, c->solved, sizeof c->solved / sizeof *c->solved,
                      &c->nsolved, &ignored) != RG_OK)
      c->nsolved = before;
  }
}

/* The stages of planning; that of the packer has a limit of its own. */
static void plan_progress(void *user, const char *stage, double done, double total) {
  const cli *c = user;
  char text[64];
  snprintf(text, sizeof text, "planning: %s", stage);
  if (c->args.limit > 0 && strcmp(stage, "memplan") == 0)
    cli_progress_expect(c, text, c->args.limit, true);
  else
    cli_progress(user, text, done, total);
}

bool cli_on_gpu(const cli *c) {
  return strcmp(c->args.device, "cuda") == 0;
}

void cli_plan_options(cli *c, rg_plan_options *o) {
  const cli_args *a = &c->args;
  *o = (rg_plan_options){.set = c->solved,
                         .nset = c->nsolved,
                         .device = a->device,
                         .profile_path = a->profile,
                         .threads = a->threads > INT_MAX ? INT_MAX : (int)a->threads,
                         .no_grad = a->no_grad,
                         .no_reuse = a->no_reuse,
                         .no_inplace = a->no_inplace,
                         .no_fuse = a->no_fuse,
                         .pack_seconds = a->limit,
                         .progress = plan_progress,
                         .progress_user = c,
                         .cp = a->cp};
  /* ranks share this machine's cores */
  if (a->cp > 1 && !a->threads)
    o->threads = cli_threads(c) > a->cp ? cli_threads(c) / (int)a->cp : 1;
}

rg_status cli_make_plan(cli *c) {
  rg_plan_options o;
  cli_plan_options(c, &o);
  rg_status s = rg_plan_create(c->spec, c->policy, &o, &c->plan, &c->error);
  cli_progress_end(c);
  if (s == RG_E_POLICY) cli_check(c); /* which says all that is wrong with it */
  return s;
}

/* The arena hook: the device's memory, counted. */
static void *hook_alloc(void *user, size_t size) {
  cli *c = user;
  for (size_t i = 0; i < sizeof c->arena / sizeof *c->arena; i++) {
    if (c->arena[i].ptr) continue;
    if (rg_memory_alloc(c->plan, size, &c->arena[i].ptr, NULL) != RG_OK) return NULL;
    c->arena[i].size = (int64_t)size;
    c->arena_now += (int64_t)size;
    if (c->arena_now > c->arena_peak) c->arena_peak = c->arena_now;
    return c->arena[i].ptr;
  }
  return NULL;
}

static void hook_free(void *user, void *ptr) {
  cli *c = user;
  for (size_t i = 0; i < sizeof c->arena / sizeof *c->arena; i++)
    if (ptr && c->arena[i].ptr == ptr) {
      c->arena_now -= c->arena[i].size;
      c->arena[i].ptr = NULL;
      rg_memory_free(c->plan, ptr);
      return;
    }
}

rg_status cli_make_session(cli *c, bool eager) {
  rg_allocator hook = {hook_alloc, hook_free, c};
  rg_session_options o = {.arena = &hook, .eager = eager};
  return rg_session_create(c->plan, &o, &c->session, &c->error);
}

void cli_close(cli *c) {
  cli_progress_end(c);
  rg_session_destroy(c->session);
  rg_plan_destroy(c->plan);
  rg_policy_destroy(c->policy);
  rg_spec_destroy(c->spec);
  rg_context_destroy(c->ctx);
  for (size_t i = 0; i < c->nset; i++) free((char *)c->set[i].name);
  free(c->set);
  cli_args_free(&c->args);
}
