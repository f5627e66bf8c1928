/* graph/repeat.c: blocks of nodes that a spec repeats, written out before anything else looks at
   them.

       { "repeat": 12, "name": "layer", "carry": { "x": { "first": "embedded", "next": "y" } },
         "inputs": { … }, "nodes": [ … ], "out": { "h": "y" } }

   stands among the nodes. Copy i's nodes, tensors and inputs are called layer{i}_NAME. Inside, a
   name is the copy's own tensor, or a carried one (of the copy before; in the first copy the tensor
   `first`), or else one from outside; outside, "h" is the last copy's "y". The result is JSON as a
   user would have written it; errors point to where it stands in the file.
 */
#include "spec.h"
#include <stdio.h>
#include <string.h>

typedef struct block {
  const rgi_json *carry, *inputs, *state, *nodes, *out; /* NULL where absent, but for nodes */
  const char *name;
  rgi_names own; /* what each copy makes: tensors, inputs; nodes as "NODE." */
  int count, place;
} block;

typedef struct expansion {
  rg_spec *spec;
  block *block; /* per element of the nodes, count 0: a plain node */
  rgi_json *input, *node;
  const char **input_key;
  int ninput, nnode;
  rg_error *e;
} expansion;

/* ---- reading a block ---- */

/* An integer, or "$name" for a parameter, as it is given at load. */
static rg_status read_count(expansion *x, const rgi_json *v, const char *pointer, int *out) {
  const rg_spec *s = x->spec;
  rgi_shown shown;
  int64_t n = 0;
  const bool named = v->type == RGI_JSON_STRING && v->text[0] == '$';
  if (named) {
    const rgi_json *p = s->params ? rgi_json_get(s->params, v->text + 1) : NULL;
    if (!p || p->type != RGI_JSON_INT)
      return rgi_fail(x->e, RG_E_NAME, pointer, NULL, "there is no integer parameter '%s'",
                      rgi_show(&shown, v->text + 1));
    n = p->i;
    for (size_t i = 0; i < s->nset; i++) {
      const rg_binding *set = &s->set[i];
      if (strcmp(set->name, v->text + 1) != 0) continue;
      n = set->value;
      if (set->text && !rgi_parse_count(set->text, &n))
        return rgi_fail(x->e, RG_E_USAGE, NULL, NULL,
                        "parameter '%s' is set to '%s'; expected a number of copies", set->name,
                        rgi_show(&shown, set->text));
    }
  } else {
    RGI_TRY(rgi_json_expect(v, RGI_JSON_INT, pointer, NULL, x->e));
    n = v->i;
  }
  if (n < 1 || n > RGI_MOST_NODES)
    return rgi_fail(x->e, RG_E_VALUE, pointer, NULL, "%lld copies; expected 1 to %d", (long long)n,
                    RGI_MOST_NODES);
  *out = (int)n;
  if (!named) return RG_OK;
  rgi_repeat *r = &x->spec->repeat[x->spec->nrepeat++];
  *r = (rgi_repeat){v->text + 1, n};
  return RG_OK;
}

static rg_status own(expansion *x, block *b, const char *name) {
  (void)x;
  rgi_names_add(&b->own, name, 0); /* made twice: the elaboration will say so */
  return RG_OK;
}

/* What a copy makes. What is no name is for the elaboration to refuse. */
static rg_status read_own(expansion *x, block *b) {
  size_t n = (b->inputs ? (size_t)b->inputs->n : 0) + (b->state ? (size_t)b->state->n : 0);
  for (int pass = 0; pass < 2; pass++) {
    if (pass && !rgi_names_init(&b->own, x->spec->arena, n)) return rgi_nomem(x->e);
    for (int i = 0; pass && b->inputs && i < b->inputs->n; i++)
      RGI_TRY(own(x, b, b->inputs->key[i]));
    for (int i = 0; pass && b->state && i < b->state->n; i++) RGI_TRY(own(x, b, b->state->key[i]));
    for (int i = 0; i < b->nodes->n; i++) {
      const rgi_json *v = &b->nodes->item[i];
      const bool object = v->type == RGI_JSON_OBJECT;
      const rgi_json *name = object ? rgi_json_get(v, "name") : NULL,
                     *out = object ? rgi_json_get(v, "out") : NULL;
      n++;
      if (pass && name && name->type == RGI_JSON_STRING) {
        const char *dotted = rgi_format(x->spec->arena, "%s.", name->text);
        if (!dotted) return rgi_nomem(x->e);
        RGI_TRY(own(x, b, dotted));
      }
      for (int k = 0; out && out->type == RGI_JSON_OBJECT && k < out->n; k++) {
        const rgi_json *made = &out->item[k];
        const int count = made->type == RGI_JSON_ARRAY ? made->n : 1;
        n += (size_t)count;
        for (int j = 0; pass && j < count; j++) {
          const rgi_json *one = made->type == RGI_JSON_ARRAY ? &made->item[j] : made;
          if (one->type == RGI_JSON_STRING) RGI_TRY(own(x, b, one->text));
        }
      }
    }
  }
  return RG_OK;
}

static rg_status member(expansion *x, const rgi_json *v, const char *key, rgi_json_type type,
                        const char *at, const rgi_json **out) {
  rgi_pointer p;
  *out = rgi_json_get(v, key);
  return *out ? rgi_json_expect(*out, type, rgi_pointer_key(&p, at, key), NULL, x->e) : RG_OK;
}

static bool is_own(const block *b, const char *name) {
  char node[80];
  const char *dot = strchr(name, '.');
  if (rgi_names_get(&b->own, name) >= 0) return true;
  if (!dot || dot - name > 70) return false;
  snprintf(node, sizeof node, "%.*s", (int)(dot - name + 1), name);
  return rgi_names_get(&b->own, node) >= 0;
}

static rg_status require_own(expansion *x, const block *b, const char *name, const char *pointer) {
  rgi_shown shown, hint;
  if (is_own(b, name)) return RG_OK;
  const char **made = rgi_alloc_n(x->spec->arena, (size_t)b->own.mask + 1, sizeof *made);
  int n = 0;
  if (!made) return rgi_nomem(x->e);
  for (uint32_t i = 0; i <= b->own.mask; i++) /* those that end in a dot are nodes' */
    if (b->own.key[i] && !strchr(b->own.key[i], '.')) made[n++] = b->own.key[i];
  return rgi_fail(x->e, RG_E_NAME, pointer, NULL, "the block makes no tensor '%s'%s",
                  rgi_show(&shown, name), rgi_hint(&hint, name, made, n));
}

static rg_status note_first(expansion *x, const char *name, const char *pointer) {
  rgi_first *f = rgi_alloc(x->spec->arena, sizeof *f);
  if (f) *f = (rgi_first){x->spec->first, name, rgi_strdup(x->spec->arena, pointer)};
  if (!f || !f->pointer) return rgi_nomem(x->e);
  x->spec->first = f;
  return RG_OK;
}

static rg_status read_block(expansion *x, block *b, int place) {
  static const char *const keys[] = {"repeat", "name",  "nodes", "carry",
                                     "inputs", "state", "out",   "doc"};
  static const char *const carried[] = {"first", "next"};
  const rgi_json *v = &x->spec->nodes->item[place], *name;
  rgi_pointer at, p, q;
  rgi_pointer_index(&at, "/nodes", place);
  RGI_TRY(rgi_json_keys(v, "a block", keys, RGI_COUNT(keys), 3, at.text, NULL, x->e));
  RGI_TRY(member(x, v, "name", RGI_JSON_STRING, at.text, &name));
  RGI_TRY(rgi_check_identifier(name->text, "block", rgi_pointer_key(&p, at.text, "name"), x->e));
  RGI_TRY(member(x, v, "nodes", RGI_JSON_ARRAY, at.text, &b->nodes));
  RGI_TRY(member(x, v, "carry", RGI_JSON_OBJECT, at.text, &b->carry));
  RGI_TRY(member(x, v, "inputs", RGI_JSON_OBJECT, at.text, &b->inputs));
  RGI_TRY(member(x, v, "state", RGI_JSON_OBJECT, at.text, &b->state));
  RGI_TRY(member(x, v, "out", RGI_JSON_OBJECT, at.text, &b->out));
  RGI_TRY(member(x, v, "doc", RGI_JSON_STRING, at.text, &v));
  v = &x->spec->nodes->item[place];
  RGI_TRY(
      read_count(x, rgi_json_get(v, "repeat"), rgi_pointer_key(&p, at.text, "repeat"), &b->count));
  b->name = name->text;
  b->place = place;
  RGI_TRY(read_own(x, b));
  rgi_pointer_key(&p, at.text, "carry");
  for (int i = 0; b->carry && i < b->carry->n; i++) {
    const rgi_json *c = &b->carry->item[i];
    rgi_pointer_key(&q, p.text, b->carry->key[i]);
    RGI_TRY(rgi_json_keys(c, "a carried tensor", carried, 2, 2, q.text, NULL, x->e));
    for (int k = 0; k < 2; k++) {
      rgi_pointer r;
      const rgi_json *t = rgi_json_get(c, carried[k]);
      rgi_pointer_key(&r, q.text, carried[k]);
      RGI_TRY(rgi_json_expect(t, RGI_JSON_STRING, r.text, NULL, x->e));
      if (k == 0) RGI_TRY(note_first(x, t->text, r.text));
      if (k == 1) RGI_TRY(require_own(x, b, t->text, r.text));
    }
  }
  rgi_pointer_key(&p, at.text, "out");
  for (int i = 0; b->out && i < b->out->n; i++) {
    rgi_pointer_key(&q, p.text, b->out->key[i]);
    RGI_TRY(rgi_json_expect(&b->out->item[i], RGI_JSON_STRING, q.text, NULL, x->e));
    RGI_TRY(require_own(x, b, b->out->item[i].text, q.text));
  }
  return RG_OK;
}

/* ---- names ---- */

static const char *in_copy(expansion *x, const block *b, int copy, const char *name) {
  return rgi_format(x->spec->arena, "%s%d_%s", b->name, copy, name);
}

/* A name outside of blocks: what a block hands out, or itself. */
static const char *outside(expansion *x, const char *name) {
  for (int i = 0; i < x->spec->nodes->n; i++) {
    const block *b = &x->block[i];
    const rgi_json *v = b->count && b->out ? rgi_json_get(b->out, name) : NULL;
    if (v) return in_copy(x, b, b->count - 1, v->text);
  }
  return name;
}

/* A name read in copy `copy` of block b (NULL: outside). NULL on NOMEM. */
static const char *meaning(expansion *x, const block *b, int copy, const char *name) {
  if (b && is_own(b, name)) return in_copy(x, b, copy, name);
  const rgi_json *c = b && b->carry ? rgi_json_get(b->carry, name) : NULL;
  if (!c) return outside(x, name);
  return copy == 0 ? outside(x, rgi_json_get(c, "first")->text)
                   : in_copy(x, b, copy - 1, rgi_json_get(c, "next")->text);
}

/* ---- writing out ---- */

typedef const char *(*renamer)(expansion *x, const block *b, int copy, const char *name);

/* A copy of `v` in which strings, in arrays and objects too, are renamed. */
static rg_status renamed(expansion *x, const block *b, int copy, const rgi_json *v, renamer f,
                         rgi_json *out) {
  *out = *v;
  if (v->type == RGI_JSON_STRING) {
    out->text = f(x, b, copy, v->text);
    return out->text ? RG_OK : rgi_nomem(x->e);
  }
  if (v->type != RGI_JSON_ARRAY && v->type != RGI_JSON_OBJECT) return RG_OK;
  rgi_json *item = rgi_alloc_n(x->spec->arena, (size_t)v->n + 1, sizeof *item);
  if (!item) return rgi_nomem(x->e);
  for (int i = 0; i < v->n; i++) RGI_TRY(renamed(x, b, copy, &v->item[i], f, &item[i]));
  out->item = item;
  return RG_OK;
}

static rg_status add_node(expansion *x, const block *b, int copy, const rgi_json *v,
                          const char *pointer) {
  rg_spec *s = x->spec;
  if (x->nnode == RGI_MOST_NODES)
    return rgi_fail(x->e, RG_E_LIMIT, "/nodes", NULL, "more than %d nodes, repeated ones counted",
                    RGI_MOST_NODES);
  rgi_json *to = &x->node[x->nnode];
  *to = *v;
  s->node_at[x->nnode++] = pointer;
  if (v->type != RGI_JSON_OBJECT) return RG_OK;
  rgi_json *item = rgi_alloc_n(s->arena, (size_t)v->n + 1, sizeof *item);
  if (!item) return rgi_nomem(x->e);
  for (int i = 0; i < v->n; i++) {
    const char *key = v->key[i];
    const bool makes = b && (strcmp(key, "name") == 0 || strcmp(key, "out") == 0);
    item[i] = v->item[i];
    if (makes)
      RGI_TRY(renamed(x, b, copy, &v->item[i], in_copy, &item[i]));
    else if (strcmp(key, "in") == 0)
      RGI_TRY(renamed(x, b, copy, &v->item[i], meaning, &item[i]));
  }
  to->item = item;
  return RG_OK;
}

/* State as copy `copy` declares it: `next` is the copy's own tensor. */
static rg_status state_of_copy(expansion *x, const block *b, int copy, rgi_json *v) {
  if (v->type != RGI_JSON_OBJECT) return RG_OK; /* the elaboration will say so */
  rgi_json *item = rgi_alloc_n(x->spec->arena, (size_t)v->n + 1, sizeof *item);
  if (!item) return rgi_nomem(x->e);
  for (int i = 0; i < v->n; i++) {
    item[i] = v->item[i];
    if (strcmp(v->key[i], "next") == 0)
      RGI_TRY(renamed(x, b, copy, &v->item[i], meaning, &item[i]));
  }
  v->item = item;
  return RG_OK;
}

/* All of `list`, which stands at `where`; NULL: nothing. b NULL: outside of blocks. */
static rg_status add_inputs(expansion *x, const block *b, int copy, const rgi_json *list,
                            const char *where, bool state) {
  rg_spec *s = x->spec;
  rgi_pointer p;
  for (int i = 0; list && i < list->n; i++) {
    const int k = x->ninput;
    if (k == RGI_MOST_NAMES)
      return rgi_fail(x->e, RG_E_LIMIT, "/inputs", NULL,
                      "more than %d inputs, state and repeated ones counted", RGI_MOST_NAMES);
    x->input[k] = list->item[i];
    if (state) RGI_TRY(state_of_copy(x, b, copy, &x->input[k]));
    x->input_key[k] = b ? in_copy(x, b, copy, list->key[i]) : list->key[i];
    s->input_at[k] = rgi_strdup(s->arena, rgi_pointer_key(&p, where, list->key[i]));
    s->is_state[k] = state;
    if (!x->input_key[k] || !s->input_at[k]) return rgi_nomem(x->e);
    x->ninput++;
  }
  return RG_OK;
}

static rg_status write_block(expansion *x, const block *b) {
  rg_spec *s = x->spec;
  rgi_pointer at, where, p;
  rgi_pointer_index(&at, "/nodes", b->place);
  for (int copy = 0; copy < b->count; copy++) {
    rgi_pointer_key(&where, at.text, "inputs");
    RGI_TRY(add_inputs(x, b, copy, b->inputs, where.text, false));
    rgi_pointer_key(&where, at.text, "state");
    RGI_TRY(add_inputs(x, b, copy, b->state, where.text, true));
    rgi_pointer_key(&where, at.text, "nodes");
    for (int i = 0; i < b->nodes->n; i++) {
      const char *pointer = rgi_strdup(s->arena, rgi_pointer_index(&p, where.text, i));
      if (!pointer) return rgi_nomem(x->e);
      RGI_TRY(add_node(x, b, copy, &b->nodes->item[i], pointer));
    }
  }
  return RG_OK;
}

static rg_status write_all(expansion *x) {
  rg_spec *s = x->spec;
  rgi_pointer p;
  RGI_TRY(add_inputs(x, NULL, 0, s->inputs, "/inputs", false));
  RGI_TRY(add_inputs(x, NULL, 0, s->state, "/state", true));
  for (int i = 0; i < s->nodes->n; i++) {
    if (x->block[i].count) {
      RGI_TRY(write_block(x, &x->block[i]));
      continue;
    }
    const char *pointer = rgi_strdup(s->arena, rgi_pointer_index(&p, "/nodes", i));
    if (!pointer) return rgi_nomem(x->e);
    RGI_TRY(add_node(x, NULL, 0, &s->nodes->item[i], pointer));
  }
  return RG_OK;
}

static rg_status replace(expansion *x) {
  rg_spec *s = x->spec;
  rgi_json *inputs = rgi_alloc(s->arena, sizeof *inputs),
           *nodes = rgi_alloc(s->arena, sizeof *nodes);
  rgi_json *outputs = rgi_alloc(s->arena, sizeof *outputs);
  rgi_names seen;
  if (!inputs || !nodes || !outputs || !rgi_names_init(&seen, s->arena, (size_t)x->ninput))
    return rgi_nomem(x->e);
  for (int i = 0; i < x->ninput; i++)
    if (rgi_names_add(&seen, x->input_key[i], i) >= 0)
      return rgi_fail(x->e, RG_E_NAME, s->input_at[i], NULL, "the input '%s' is already there",
                      x->input_key[i]);
  RGI_TRY(renamed(x, NULL, 0, s->outputs, meaning, outputs));
  *inputs =
      (rgi_json){.type = RGI_JSON_OBJECT, .n = x->ninput, .item = x->input, .key = x->input_key};
  *nodes = (rgi_json){.type = RGI_JSON_ARRAY, .n = x->nnode, .item = x->node};
  s->inputs = inputs;
  s->nodes = nodes;
  s->outputs = outputs;
  return RG_OK;
}

rg_status rgi_spec_repeat(rg_spec *s, rg_error *e) {
  expansion x = {.spec = s, .e = e};
  int blocks = 0;
  for (int i = 0; i < s->nodes->n; i++)
    blocks += s->nodes->item[i].type == RGI_JSON_OBJECT &&
              rgi_json_get(&s->nodes->item[i], "repeat") != NULL;
  if (blocks == 0 && !s->state) return RG_OK;
  x.block = rgi_alloc_n(s->arena, (size_t)s->nodes->n, sizeof *x.block);
  x.node = rgi_alloc_n(s->arena, RGI_MOST_NODES, sizeof *x.node);
  x.input = rgi_alloc_n(s->arena, RGI_MOST_NAMES, sizeof *x.input);
  x.input_key = rgi_alloc_n(s->arena, RGI_MOST_NAMES, sizeof *x.input_key);
  s->node_at = rgi_alloc_n(s->arena, RGI_MOST_NODES, sizeof *s->node_at);
  s->input_at = rgi_alloc_n(s->arena, RGI_MOST_NAMES, sizeof *s->input_at);
  s->is_state = rgi_alloc_n(s->arena, RGI_MOST_NAMES, sizeof *s->is_state);
  s->repeat = rgi_alloc_n(s->arena, (size_t)blocks, sizeof *s->repeat);
  if (!s->is_state || !x.block || !x.node || !x.input || !x.input_key || !s->node_at ||
      !s->input_at || !s->repeat)
    return rgi_nomem(e);
  for (int i = 0; i < s->nodes->n; i++)
    if (s->nodes->item[i].type == RGI_JSON_OBJECT && rgi_json_get(&s->nodes->item[i], "repeat"))
      RGI_TRY(read_block(&x, &x.block[i], i));
  RGI_TRY(write_all(&x));
  return replace(&x);
}
