/* graph/policy.c: policies: what to recompute, as said by the user. What it does to a graph is
   recompute/'s business.

   One of "preset", "recompute" and "budget" (none of them: nothing is recomputed), and "nodes",
   "host", "split_heads", "split_kv" and "cp" beside any. A policy may also be one word: a preset or
   a budget.
 */
#include "policy.h"
#include "json.h"
#include <string.h>
#include <unistd.h>

enum { MOST_LISTED = 8192 };

static rg_status read_preset(rg_policy *p, const rgi_json *v, rg_error *e) {
  rgi_shown shown, hint;
  static const char *const known[] = {"none", "all"};
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/preset", NULL, e));
  if (strcmp(v->text, "none") == 0)
    p->preset = RGI_PRESET_NONE;
  else if (strcmp(v->text, "all") == 0)
    p->preset = RGI_PRESET_ALL;
  else
    return rgi_fail(e, RG_E_VALUE, "/preset", NULL, "'%s' is no preset; expected none or all%s",
                    rgi_show(&shown, v->text), rgi_near(&hint, v->text, known, RGI_COUNT(known)));
  return RG_OK;
}

static rg_status read_list(rg_policy *p, const rgi_json *v, rg_error *e) {
  rgi_names seen;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_ARRAY, "/recompute", NULL, e));
  if (v->n > MOST_LISTED)
    return rgi_fail(e, RG_E_LIMIT, "/recompute", NULL, "%d names; at most %d are possible", v->n,
                    MOST_LISTED);
  p->preset = RGI_PRESET_LIST;
  p->recompute = rgi_alloc_n(p->arena, (size_t)v->n, sizeof *p->recompute);
  p->pointer = rgi_alloc_n(p->arena, (size_t)v->n, sizeof *p->pointer);
  if (!p->recompute || !p->pointer || !rgi_names_init(&seen, p->arena, (size_t)v->n))
    return rgi_nomem(e);
  for (int i = 0; i < v->n; i++) {
    const rgi_json *name = &v->item[i];
    rgi_pointer at;
    rgi_shown shown;
    rgi_pointer_index(&at, "/recompute", i);
    RGI_TRY(rgi_json_expect(name, RGI_JSON_STRING, at.text, NULL, e));
    int first = rgi_names_add(&seen, name->text, i);
    if (first >= 0)
      return rgi_fail(e, RG_E_NAME, at.text, NULL, "'%s' is already listed at /recompute/%d",
                      rgi_show(&shown, name->text), first);
    p->recompute[i] = name->text;
    p->pointer[i] = rgi_strdup(p->arena, at.text);
    if (!p->pointer[i]) return rgi_nomem(e);
    p->nrecompute = i + 1;
  }
  return RG_OK;
}

static rg_status read_rules(rg_policy *p, const rgi_json *v, rg_error *e) {
  static const char *const known[] = {"auto", "keep", "recompute",
                                      "offload"}; /* in the order of rgi_action */
  rgi_shown shown, hint;
  RGI_TRY(rgi_json_expect(v, RGI_JSON_OBJECT, "/nodes", NULL, e));
  if (v->n > MOST_LISTED)
    return rgi_fail(e, RG_E_LIMIT, "/nodes", NULL, "%d names; at most %d are possible", v->n,
                    MOST_LISTED);
  p->rule = rgi_alloc_n(p->arena, (size_t)v->n, sizeof *p->rule);
  if (!p->rule) return rgi_nomem(e);
  for (int i = 0; i < v->n; i++) {
    rgi_pointer at;
    const char *word;
    int action = 0;
    rgi_pointer_key(&at, "/nodes", v->key[i]);
    RGI_TRY(rgi_json_expect(&v->item[i], RGI_JSON_STRING, at.text, NULL, e));
    word = v->item[i].text;
    while (action < RGI_COUNT(known) && strcmp(word, known[action]) != 0) action++;
    if (action == RGI_COUNT(known))
      return rgi_fail(e, RG_E_VALUE, at.text, NULL,
                      "'%s' can't be done to a node; expected keep, recompute, offload or auto%s",
                      rgi_show(&shown, word), rgi_near(&hint, word, known, RGI_COUNT(known)));
    p->rule[i] = (rgi_rule){v->key[i], rgi_strdup(p->arena, at.text), (rgi_action)action};
    if (!p->rule[i].pointer) return rgi_nomem(e);
    p->nrule = i + 1;
  }
  return RG_OK;
}

/* "least", or a number of bytes. */
static rg_status read_bytes(rg_policy *p, const rgi_json *v, const char *pointer, rg_error *e) {
  p->preset = RGI_PRESET_BUDGET;
  p->budget_at = pointer;
  p->least = v->type == RGI_JSON_STRING && strcmp(v->text, "least") == 0;
  return p->least ? RG_OK : rgi_json_bytes(v, pointer, &p->budget, e);
}

static rg_status read_budget(rg_policy *p, const rgi_json *v, rg_error *e) {
  static const char *const keys[] = {"bytes", "of"};
  rgi_shown shown;
  if (v->type != RGI_JSON_OBJECT) return read_bytes(p, v, "/budget", e);
  RGI_TRY(rgi_json_keys(v, "a budget", keys, RGI_COUNT(keys), 1, "/budget", NULL, e));
  const rgi_json *bytes = rgi_json_get(v, "bytes"), *of = rgi_json_get(v, "of");
  RGI_TRY(read_bytes(p, bytes, "/budget/bytes", e));
  if (!of) return RG_OK;
  RGI_TRY(rgi_json_expect(of, RGI_JSON_STRING, "/budget/of", NULL, e));
  p->budget_of_saved = strcmp(of->text, "saved") == 0;
  if (!p->budget_of_saved && strcmp(of->text, "peak") != 0)
    return rgi_fail(e, RG_E_VALUE, "/budget/of", NULL, "'%s' is neither peak nor saved",
                    rgi_show(&shown, of->text));
  return RG_OK;
}

/* One of the words, as its index. */
static rg_status read_choice(const rgi_json *v, const char *key, const char *const *words, int n,
                             int *out, rg_error *e) {
  rgi_pointer at;
  rgi_shown shown, hint;
  if (!v) return RG_OK;
  rgi_pointer_key(&at, "/cp", key);
  RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, at.text, NULL, e));
  for (*out = 0; *out < n; ++*out)
    if (strcmp(v->text, words[*out]) == 0) return RG_OK;
  return rgi_fail(e, RG_E_VALUE, at.text, NULL, "'%s' is neither %s nor %s%s",
                  rgi_show(&shown, v->text), words[0], words[1],
                  rgi_near(&hint, v->text, words, n));
}

static rg_status read_cp(rgi_cp_policy *cp, const rgi_json *v, rg_error *e) {
  static const char *const keys[] = {"ranks", "mode", "weights", "wire"};
  static const char *const weights[] = {"sum", "local"}, *const wires[] = {"f32", "bf16"};
  rgi_shown shown;
  int word = 0;
  RGI_TRY(rgi_json_keys(v, "cp", keys, RGI_COUNT(keys), 0, "/cp", NULL, e));
  const rgi_json *ranks = rgi_json_get(v, "ranks"), *mode = rgi_json_get(v, "mode");
  if (ranks) {
    RGI_TRY(rgi_json_expect(ranks, RGI_JSON_INT, "/cp/ranks", NULL, e));
    if (ranks->i < 1 || ranks->i > RGI_MOST_CP_RANKS)
      return rgi_fail(e, RG_E_VALUE, "/cp/ranks", NULL, "%lld ranks; expected 1 to %d",
                      (long long)ranks->i, RGI_MOST_CP_RANKS);
    cp->ranks = (int)ranks->i;
  }
  if (mode && mode->type == RGI_JSON_INT && (mode->i == RG_CP_BLOCKS || mode->i == RG_CP_ZIGZAG))
    cp->mode = (rg_cp_mode)mode->i;
  else if (mode && (mode->type != RGI_JSON_STRING || strcmp(mode->text, "auto") != 0))
    return rgi_fail(e, RG_E_VALUE, "/cp/mode", NULL, "expected 1, 2 or \"auto\", not %s",
                    rgi_json_kind(&shown, mode));
  RGI_TRY(
      read_choice(rgi_json_get(v, "weights"), "weights", weights, RGI_COUNT(weights), &word, e));
  cp->local_weights = word == 1;
  word = 0;
  RGI_TRY(read_choice(rgi_json_get(v, "wire"), "wire", wires, RGI_COUNT(wires), &word, e));
  cp->wire_bf16 = word == 1;
  return RG_OK;
}

static rg_status read_policy(rg_policy *p, const rgi_json *root, rg_error *e) {
  static const char *const keys[] = {"regraph_policy", "preset",      "recompute", "budget",
                                     "nodes",          "split_heads", "cp",        "doc",
                                     "$schema",        "host",        "split_kv"};
  RGI_TRY(rgi_json_is(root, "regraph_policy", e));
  RGI_TRY(rgi_json_keys(root, "a policy", keys, RGI_COUNT(keys), 1, "", NULL, e));
  const rgi_json *v = rgi_json_get(root, "regraph_policy");
  RGI_TRY(rgi_json_expect(v, RGI_JSON_INT, "/regraph_policy", NULL, e));
  if (v->i != 1)
    return rgi_fail(e, RG_E_VALUE, "/regraph_policy", NULL,
                    "format version %lld; this library reads version 1", (long long)v->i);
  const char *first = NULL;
  for (int i = 1; i <= 3; i++) {
    if (!rgi_json_get(root, keys[i])) continue;
    rgi_pointer at;
    if (first)
      return rgi_fail(
          e, RG_E_KEY, rgi_pointer_key(&at, "", keys[i]), NULL,
          "both '%s' and '%s'; a policy has at most one of preset, recompute and budget", first,
          keys[i]);
    first = keys[i];
  }
  if ((v = rgi_json_get(root, "preset"))) RGI_TRY(read_preset(p, v, e));
  if ((v = rgi_json_get(root, "recompute"))) RGI_TRY(read_list(p, v, e));
  if ((v = rgi_json_get(root, "budget"))) RGI_TRY(read_budget(p, v, e));
  if ((v = rgi_json_get(root, "nodes"))) RGI_TRY(read_rules(p, v, e));
  if ((v = rgi_json_get(root, "doc")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/doc", NULL, e));
  if ((v = rgi_json_get(root, "cp"))) RGI_TRY(read_cp(&p->cp, v, e));
  if ((v = rgi_json_get(root, "$schema")))
    RGI_TRY(rgi_json_expect(v, RGI_JSON_STRING, "/$schema", NULL, e));
  if ((v = rgi_json_get(root, "host"))) {
    RGI_TRY(rgi_json_bytes(v, "/host", &p->host, e));
    p->host_bound = true;
  }
  if ((v = rgi_json_get(root, "split_heads"))) {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_INT, "/split_heads", NULL, e));
    if (v->i < 1 || v->i > INT32_MAX)
      return rgi_fail(e, RG_E_VALUE, "/split_heads", NULL,
                      "groups of %lld KV heads; expected 1 or more", (long long)v->i);
    p->split_heads = (int)v->i;
  }
  if ((v = rgi_json_get(root, "split_kv"))) {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_BOOL, "/split_kv", NULL, e));
    p->split_kv = v->i;
  }
  return RG_OK;
}

/* A policy in a word: "none", "all", "least" or bytes such as 6GiB. */
static bool read_word(rg_policy *p, const char *word) {
  if (strcmp(word, "none") == 0) return true;
  if (strcmp(word, "all") == 0) {
    p->preset = RGI_PRESET_ALL;
    return true;
  }
  p->least = strcmp(word, "least") == 0;
  if (!p->least && rg_parse_size(word, &p->budget, NULL) != RG_OK) return false;
  p->preset = RGI_PRESET_BUDGET;
  return true;
}

static bool is_word(const char *text) {
  rg_policy p = {0};
  return read_word(&p, text);
}

static rg_status load(const rg_context *ctx, const rgi_source *source, rg_policy **out,
                      rg_error *e) {
  rg_status before = rgi_error_before(e), status;
  const rgi_json *root;
  rgi_arena *a = rgi_arena_create(ctx);
  rg_policy *p = a ? rgi_alloc(a, sizeof *p) : NULL;
  if (!p) {
    rgi_arena_destroy(a);
    return rgi_nomem(e);
  }
  *p = (rg_policy){.arena = a, .ctx = ctx};
  RGI_GOTO(status, rgi_source_copy(a, source, &p->source) ? RG_OK : rgi_nomem(e), fail);
  char word[32] = "";
  if (source->size < sizeof word) memcpy(word, source->text, source->size);
  if (source->size == 0 || strlen(word) != source->size || !read_word(p, word)) {
    RGI_GOTO(status, rgi_json_parse(a, source->text, source->size, &root, e), fail);
    RGI_GOTO(status, read_policy(p, root, e), fail);
  }
  *out = p;
  return RG_OK;
fail:
  rgi_error_place(e, before, source);
  rgi_arena_destroy(a);
  return status;
}

rg_status rg_policy_load_text(rg_context *ctx, const char *text, size_t size, const char *name,
                              rg_policy **out, rg_error *error) {
  if (out) *out = NULL;
  if (!ctx || !text || !out)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_policy_load_text needs a context, a text and a place for the policy");
  const rgi_source source = {name ? name : "policy", text, size};
  return load(ctx, &source, out, error);
}

rg_status rg_policy_load_file(rg_context *ctx, const char *path, rg_policy **out, rg_error *error) {
  char *text;
  size_t size;
  if (out) *out = NULL;
  if (!ctx || !path || !out)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_policy_load_file needs a context, a path and a place for the policy");
  if (is_word(path)) {
    const rgi_source word = {path, path, strlen(path)};
    return load(ctx, &word, out, error);
  }
  static const char *const words[] = {"none", "all", "least"};
  rgi_shown near;
  rg_status before = rgi_error_before(error);
  const char *digits = path + strspn(path, "+-.");
  /* bytes, but for a slip */
  if (*digits >= '0' && *digits <= '9' && !strchr(path, '/') && !strstr(path, ".json") &&
      access(path, F_OK) != 0) {
    int64_t bytes;
    const rg_status status = rg_parse_size(path, &bytes, error);
    rgi_error_file(error, before, path);
    return status;
  }
  if (!strpbrk(path, "./") && access(path, F_OK) != 0 && *rgi_near(&near, path, words, 3)) {
    const rg_status status =
        rgi_fail(error, RG_E_IO, NULL, NULL,
                 "there is no such file, and no such word for a policy%s", near.text);
    rgi_error_file(error, before, path);
    return status;
  }
  rg_status status = rgi_read_file(ctx, path, &text, &size, error);
  if (status == RG_OK) {
    const rgi_source source = {path, text, size};
    status = load(ctx, &source, out, error);
    rgi_free(ctx, text);
  }
  rgi_error_file(error, before, path);
  return status;
}

void rg_policy_destroy(rg_policy *policy) {
  if (policy) rgi_arena_destroy(policy->arena);
}

/* ---- against a graph ---- */

/* The fewest heads among the known extents of k ports: the KV heads that a group
 * is cut from. 0: none is known. */
static int64_t kv_heads(const rgi_graph *g) {
  int64_t fewest = 0;
  for (int n = 0; n < g->nnode; n++) {
    const rgi_node *node = &g->node[n];
    int p = rgi_in_port(node->op, "k"), t = p < 0 ? -1 : rgi_in(node, p);
    int axis = p < 0 ? -1 : node->op->in[p].head_axis;
    if (t < 0 || axis < 0 || axis >= g->tensor[t].rank) continue;
    rgi_dim d = g->tensor[t].dim[axis];
    if (rgi_dim_known(d) && d.c > 0 && (fewest == 0 || d.c < fewest)) fewest = d.c;
  }
  return fewest;
}

/* Does `name` fit the pattern, in which each '*' stands for any characters? */
static bool fits(const char *pattern, const char *name) {
  const char *star = NULL, *from = name; /* the last star, and where what follows it is tried */
  while (*name) {
    if (*pattern == '*') {
      star = ++pattern;
      from = name;
    } else if (*pattern == *name) {
      pattern++, name++;
    } else if (star) {
      pattern = star;
      name = ++from;
    } else {
      return false;
    }
  }
  return pattern[strspn(pattern, "*")] == '\0';
}

rgi_action rgi_policy_action(const rg_policy *policy, const char *name) {
  for (int i = policy->nrule - 1; i >= 0; i--)
    if (fits(policy->rule[i].name, name)) return policy->rule[i].action;
  return RGI_AUTO;
}

bool rgi_policy_lists(const rg_policy *policy, const char *name) {
  for (int i = 0; i < policy->nrecompute; i++)
    if (fits(policy->recompute[i], name)) return true;
  return false;
}

/* The copy that has `name` in a repeated block, or NULL. */
static const char *copy_of(const rgi_graph *g, const char *name) {
  const size_t n = strlen(name);
  for (int o = 0; o < g->norigin; o++) {
    const size_t whole = strlen(g->origin[o].name);
    if (whole > n && g->origin[o].name[whole - n - 1] == '_' &&
        strcmp(g->origin[o].name + whole - n, name) == 0)
      return g->origin[o].name;
  }
  return NULL;
}

/* One name or pattern: it fits something, and something that can be recomputed if that is asked. */
static rg_status check_name(const char *name, const char *pointer, bool recompute,
                            const rgi_graph *g, const rgi_names *index, const char *const *known,
                            rg_error *e) {
  rgi_shown shown, hint;
  bool any = false;
  if (strchr(name, '*')) {
    for (int o = 0; o < g->norigin; o++) {
      if (!fits(name, g->origin[o].name)) continue;
      if (!recompute || g->origin[o].op->flags & RG_OP_RECOMPUTABLE) return RG_OK;
      any = true;
    }
    return rgi_fail(e, RG_E_POLICY, pointer, NULL,
                    any ? "no node that fits '%s' can be recomputed or offloaded"
                        : "no node fits '%s'",
                    rgi_show(&shown, name));
  }
  const int o = rgi_names_get(index, name);
  const char *copy = o < 0 && *name ? copy_of(g, name) : NULL;
  if (copy)
    return rgi_fail(e, RG_E_POLICY, pointer, NULL,
                    "the spec has no node '%s', but '%s'; the pattern '*_%s' fits all such", name,
                    copy, name);
  if (o < 0)
    return rgi_fail(e, RG_E_POLICY, pointer, NULL, "the spec has no node '%s'%s",
                    rgi_show(&shown, name), rgi_hint(&hint, name, known, g->norigin));
  if (recompute && !(g->origin[o].op->flags & RG_OP_RECOMPUTABLE))
    return rgi_fail(e, RG_E_POLICY, pointer, name,
                    "'%s' can't be recomputed or offloaded: %s is %s", name, g->origin[o].op->name,
                    g->origin[o].op->flags & RG_OP_VIEW
                        ? "a view, which costs nothing to keep"
                        : "not a deterministic op without side effects");
  return RG_OK;
}

static rg_status check_listed(const rg_policy *policy, const rgi_graph *g, const rgi_names *index,
                              const char *const *known, rgi_errors *all, rg_error *e) {
  rg_status wrong = RG_OK;
  for (int i = 0; i < policy->nrecompute; i++)
    RGI_KEEP(all, wrong,
             check_name(policy->recompute[i], policy->pointer[i], true, g, index, known, e), e);
  for (int i = 0; i < policy->nrule; i++)
    RGI_KEEP(
        all, wrong,
        check_name(policy->rule[i].name, policy->rule[i].pointer,
                   policy->rule[i].action == RGI_RECOMPUTE || policy->rule[i].action == RGI_OFFLOAD,
                   g, index, known, e),
        e);
  return wrong;
}

static rg_status check_names(const rg_policy *policy, const rgi_graph *g, rgi_errors *all,
                             rg_error *e) {
  rg_status status = RG_OK;
  rgi_arena *a = rgi_arena_create(g->ctx);
  const char **known = a ? rgi_alloc_n(a, (size_t)g->norigin, sizeof *known) : NULL;
  rgi_names index;
  if (!known || !rgi_names_init(&index, a, (size_t)g->norigin)) {
    status = rgi_nomem(e);
    goto done;
  }
  for (int i = 0; i < g->norigin; i++) {
    known[i] = g->origin[i].name;
    rgi_names_add(&index, known[i], i);
  }
  status = check_listed(policy, g, &index, known, all, e);
done:
  rgi_arena_destroy(a);
  return status;
}

static rg_status check_split(const rg_policy *policy, const rgi_graph *forward, rg_error *e) {
  const int64_t heads = kv_heads(forward);
  if (!policy->split_heads || !heads || heads % policy->split_heads == 0) return RG_OK;
  return rgi_fail(e, RG_E_POLICY, "/split_heads", NULL,
                  "groups of %d do not divide the %lld KV heads", policy->split_heads,
                  (long long)heads);
}

static rg_status check(const rg_policy *policy, const rgi_graph *forward, rgi_errors *all,
                       rg_error *e) {
  rg_status wrong = RG_OK;
  RGI_KEEP(all, wrong, check_names(policy, forward, all, e), e);
  RGI_KEEP(all, wrong, check_split(policy, forward, e), e);
  return wrong;
}

rg_status rgi_policy_check(const rg_policy *policy, const rgi_graph *forward, rgi_errors *all,
                           rg_error *e) {
  const rg_status before = rgi_error_before(e), status = check(policy, forward, all, e);
  for (size_t i = 0; all && i < all->n; i++) rgi_error_place(&all->item[i], RG_OK, &policy->source);
  rgi_error_place(e, before, &policy->source);
  return status;
}
