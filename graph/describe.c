/* graph/describe.c: what can be written in a spec or a policy, for people and for machines, all
   from the op table.

   "ops" is for reading, "ops-json" for tools, the schemas (JSON Schema, draft 2020-12) for editors
   and generators. The schemas say everything that can be said without running the loader: keys,
   JSON types, ranges, choices, ports. Those of profiles and of what is printed as JSON need no op
   table: they stand in schemas/, embedded at build time, and a test holds the command to them.
 */
#include "ir.h"
#include "json.h"
#include <stdio.h>
#include <string.h>

static bool public_op(const rg_op *op) {
  return !(op->flags & RG_OP_INTERNAL);
}
/* A spec must name something there: the loader fills sequence starts in. */
static bool required_input(const rg_port *p) {
  return !(p->flags & (RG_PORT_OPTIONAL | RG_PORT_SEQLENS));
}
static bool filled_in(const rg_port *p) {
  return (p->flags & (RG_PORT_OPTIONAL | RG_PORT_SEQLENS)) == RG_PORT_SEQLENS;
}
static bool has_gradient(const rg_op *op) {
  return op->backward || (op->rules && op->rules->backward);
}

static const char *const attr_types[] = {[RG_ATTR_INT] = "int",
                                         [RG_ATTR_FLOAT] = "float",
                                         [RG_ATTR_BOOL] = "bool",
                                         [RG_ATTR_ENUM] = "enum",
                                         [RG_ATTR_INTS] = "ints"};

static void add_text(rgi_buf *b, const char *text) {
  rgi_buf_add(b, text, strlen(text));
}

/* ---- for reading ---- */

static void port_text(rgi_buf *b, const char *side, const rg_port *p) {
  char shape[96], dtypes[64] = "";
  size_t n = 0;
  snprintf(shape, sizeof shape, "[%s]", p->shape);
  for (int d = 0; d < RG_DTYPE_COUNT; d++)
    if (p->dtypes & RG_D(d) && n < sizeof dtypes)
      n += (size_t)snprintf(dtypes + n, sizeof dtypes - n, "%s%s", n ? "|" : "",
                            rg_dtype_name((rg_dtype)d));
  rgi_buf_printf(b, "  %-4s %-14s %-16s %-16s %s%s%s\n", side, p->name, shape, dtypes,
                 p->doc ? p->doc : "", p->flags & RG_PORT_LIST ? " (list)" : "",
                 p->flags & RG_PORT_OPTIONAL ? " (optional)"
                 : filled_in(p)              ? " (filled in)"
                                             : "");
}

static void attr_text(rgi_buf *b, const rg_attr *a) {
  rgi_buf_printf(b, "  attr %-14s ", a->name);
  if (a->type == RG_ATTR_ENUM) {
    for (int i = 0; a->choices[i]; i++) rgi_buf_printf(b, "%s%s", i ? "|" : "", a->choices[i]);
  } else {
    add_text(b, attr_types[a->type]);
    const char *to = a->type == RG_ATTR_FLOAT ? " %.12g to %.12g" : " %.0f to %.0f";
    if (a->min != a->max) rgi_buf_printf(b, to, a->min, a->max);
  }
  if (a->required)
    add_text(b, ", required");
  else if (a->type == RG_ATTR_ENUM)
    rgi_buf_printf(b, ", default %s", a->choices[(int)a->def]);
  else if (a->type == RG_ATTR_BOOL)
    rgi_buf_printf(b, ", default %s", a->def != 0 ? "true" : "false");
  else if (a->type != RG_ATTR_INTS)
    rgi_buf_printf(b, ", default %.12g", a->def);
  rgi_buf_printf(b, ": %s\n", a->doc ? a->doc : "");
}

static void ops_text(const rg_context *ctx, rgi_buf *b) {
  for (int i = 0; i < ctx->nop; i++) {
    const rg_op *op = ctx->op[i];
    if (!public_op(op)) continue;
    rgi_buf_printf(b, "%s: %s%s%s%s\n", op->name, op->doc ? op->doc : "",
                   op->flags & RG_OP_VIEW ? " [view]" : "",
                   op->flags & RG_OP_RECOMPUTABLE ? " [recomputable]" : "",
                   has_gradient(op) ? " [gradient]" : "");
    for (int p = 0; p < op->nin; p++) port_text(b, "in", &op->in[p]);
    for (int p = 0; p < op->nout; p++) port_text(b, "out", &op->out[p]);
    for (int a = 0; a < op->nattr; a++) attr_text(b, &op->attrs[a]);
  }
}

/* ---- for tools ---- */

static void ports_json(rgi_buf *b, const rg_port *port, int n) {
  for (int p = 0; p < n; p++) {
    bool first = true;
    rgi_buf_printf(b, "%s{\"name\": \"%s\", \"shape\": \"%s\", \"dtypes\": [", p ? ", " : "",
                   port[p].name, port[p].shape);
    for (int d = 0; d < RG_DTYPE_COUNT; d++) {
      if (!(port[p].dtypes & RG_D(d))) continue;
      rgi_buf_printf(b, "%s\"%s\"", first ? "" : ", ", rg_dtype_name((rg_dtype)d));
      first = false;
    }
    rgi_buf_printf(
        b, "], \"optional\": %s, \"filled_in\": %s, \"list\": %s, \"head_axis\": %d, \"doc\": ",
        port[p].flags & RG_PORT_OPTIONAL ? "true" : "false", filled_in(&port[p]) ? "true" : "false",
        port[p].flags & RG_PORT_LIST ? "true" : "false", port[p].head_axis);
    rgi_buf_json(b, port[p].doc ? port[p].doc : "");
    add_text(b, "}");
  }
}

static void choices_json(rgi_buf *b, const rg_attr *a) {
  add_text(b, "[");
  for (int i = 0; a->choices[i]; i++) {
    if (i) add_text(b, ", ");
    rgi_buf_json(b, a->choices[i]);
  }
  add_text(b, "]");
}

/* ", KEY: value" where the attribute has a default that JSON can show. */
static void default_json(rgi_buf *b, const rg_attr *a) {
  if (a->required || a->type == RG_ATTR_INTS) return;
  add_text(b, ", \"default\": ");
  if (a->type == RG_ATTR_ENUM)
    rgi_buf_json(b, a->choices[(int)a->def]);
  else if (a->type == RG_ATTR_BOOL)
    add_text(b, a->def != 0 ? "true" : "false");
  else
    rgi_buf_printf(b, "%.17g", a->def);
}

static void ops_json(const rg_context *ctx, rgi_buf *b) {
  add_text(b, "{\"version\": 1, \"ops\": [");
  for (int i = 0; i < ctx->nop; i++) {
    const rg_op *op = ctx->op[i];
    rgi_buf_printf(b, "%s\n  {\"name\": \"%s\", \"doc\": ", i ? "," : "", op->name);
    rgi_buf_json(b, op->doc ? op->doc : "");
    rgi_buf_printf(
        b,
        ", \"internal\": %s, \"view\": %s, \"recomputable\": %s, \"gradient\": %s,\n   \"in\": [",
        public_op(op) ? "false" : "true", op->flags & RG_OP_VIEW ? "true" : "false",
        op->flags & RG_OP_RECOMPUTABLE ? "true" : "false", has_gradient(op) ? "true" : "false");
    ports_json(b, op->in, op->nin);
    add_text(b, "],\n   \"out\": [");
    ports_json(b, op->out, op->nout);
    add_text(b, "],\n   \"attrs\": [");
    for (int k = 0; k < op->nattr; k++) {
      const rg_attr *a = &op->attrs[k];
      rgi_buf_printf(b, "%s{\"name\": \"%s\", \"type\": \"%s\", \"required\": %s", k ? ", " : "",
                     a->name, attr_types[a->type], a->required ? "true" : "false");
      if (a->min != a->max) rgi_buf_printf(b, ", \"min\": %.17g, \"max\": %.17g", a->min, a->max);
      if (a->type == RG_ATTR_ENUM) {
        add_text(b, ", \"choices\": ");
        choices_json(b, a);
      }
      default_json(b, a);
      add_text(b, ", \"doc\": ");
      rgi_buf_json(b, a->doc ? a->doc : "");
      add_text(b, "}");
    }
    add_text(b, "]}");
  }
  add_text(b, "\n]}\n");
}

/* ---- JSON Schema ---- */

#define IDENTIFIER "[A-Za-z_][A-Za-z0-9_]{0,63}"

static void schema_head(rgi_buf *b, const char *title) {
  rgi_buf_printf(
      b, "{\"$schema\": \"https://json-schema.org/draft/2020-12/schema\",\n \"title\": \"%s\",\n",
      title);
}

static void range(rgi_buf *b, const rg_attr *a) {
  if (a->min != a->max)
    rgi_buf_printf(b, ", \"minimum\": %.17g, \"maximum\": %.17g", a->min, a->max);
}

static void attr_schema(rgi_buf *b, const rg_attr *a) {
  rgi_buf_printf(b, "\"%s\": {\"description\": ", a->name);
  rgi_buf_json(b, a->doc ? a->doc : "");
  default_json(b, a);
  add_text(b, ", ");
  switch (a->type) {
  case RG_ATTR_INT:
    add_text(b, "\"anyOf\": [{\"type\": \"integer\"");
    range(b, a);
    add_text(b, "}, {\"$ref\": \"#/$defs/expression\"}, {\"$ref\": \"#/$defs/param\"}]");
    break;
  case RG_ATTR_FLOAT:
    add_text(b, "\"anyOf\": [{\"type\": \"number\"");
    range(b, a);
    add_text(b, "}, {\"$ref\": \"#/$defs/param\"}]");
    break;
  case RG_ATTR_BOOL:
    add_text(b, "\"anyOf\": [{\"type\": \"boolean\"}, {\"$ref\": \"#/$defs/param\"}]");
    break;
  case RG_ATTR_ENUM:
    add_text(b, "\"anyOf\": [{\"enum\": ");
    choices_json(b, a);
    add_text(b, "}, {\"$ref\": \"#/$defs/param\"}]");
    break;
  case RG_ATTR_INTS:
    add_text(b, "\"type\": \"array\", \"items\": {\"anyOf\": [{\"type\": \"integer\"");
    range(b, a);
    add_text(b, "}, {\"$ref\": \"#/$defs/expression\"}, {\"$ref\": \"#/$defs/param\"}]}");
    break;
  }
  add_text(b, "}");
}

/* `"in": {…}` or `"out": {…}`; what the object itself requires is written into it. */
static void ports_schema(rgi_buf *b, const char *side, const rg_port *port, int n) {
  bool in = strcmp(side, "in") == 0, first = true;
  rgi_buf_printf(
      b, "\"%s\": {\"type\": \"object\", \"additionalProperties\": false, \"properties\": {", side);
  for (int p = 0; p < n; p++) {
    const char *kind = in ? (port[p].flags & RG_PORT_LIST ? "tensors" : "tensor")
                          : (port[p].flags & RG_PORT_LIST ? "names" : "name");
    rgi_buf_printf(b, "%s\"%s\": {\"$ref\": \"#/$defs/%s\", \"description\": ", p ? ", " : "",
                   port[p].name, kind);
    rgi_buf_json(b, port[p].doc ? port[p].doc : "");
    add_text(b, "}");
  }
  add_text(b, "}, \"required\": [");
  for (int p = 0; p < n; p++) {
    const bool list = (port[p].flags & (RG_PORT_LIST | RG_PORT_OPTIONAL)) == RG_PORT_LIST;
    if (in ? !required_input(&port[p]) : !list) continue;
    rgi_buf_printf(b, "%s\"%s\"", first ? "" : ", ", port[p].name);
    first = false;
  }
  add_text(b, "]}");
}

static void op_schema(rgi_buf *b, const rg_op *op) {
  bool in = false, out = false, attrs = false, first = true;
  for (int p = 0; p < op->nin; p++) in = in || required_input(&op->in[p]);
  for (int p = 0; p < op->nout; p++)
    out = out || (op->out[p].flags & (RG_PORT_LIST | RG_PORT_OPTIONAL)) == RG_PORT_LIST;
  for (int a = 0; a < op->nattr; a++) attrs = attrs || op->attrs[a].required;
  rgi_buf_printf(
      b,
      ",\n  \"op_%s\": {\"type\": \"object\", \"additionalProperties\": false, \"description\": ",
      op->name);
  rgi_buf_json(b, op->doc ? op->doc : "");
  rgi_buf_printf(b, ",\n   \"required\": [\"name\", \"op\"%s%s%s],\n   \"properties\": {",
                 in ? ", \"in\"" : "", out ? ", \"out\"" : "", attrs ? ", \"attrs\"" : "");
  rgi_buf_printf(
      b,
      "\"name\": {\"$ref\": \"#/$defs/name\"}, \"op\": {\"const\": \"%s\"}, \"doc\": {\"type\": "
      "\"string\"},\n    ",
      op->name);
  ports_schema(b, "in", op->in, op->nin);
  add_text(b, ",\n    ");
  ports_schema(b, "out", op->out, op->nout);
  add_text(b, ",\n    \"attrs\": {\"type\": \"object\", \"additionalProperties\": false, "
              "\"properties\": {");
  for (int a = 0; a < op->nattr; a++) {
    if (a) add_text(b, ", ");
    attr_schema(b, &op->attrs[a]);
  }
  add_text(b, "}, \"required\": [");
  for (int a = 0; a < op->nattr; a++) {
    if (!op->attrs[a].required) continue;
    rgi_buf_printf(b, "%s\"%s\"", first ? "" : ", ", op->attrs[a].name);
    first = false;
  }
  add_text(b, "]}}}");
}

/* A node of any op, by one op's rules at a time, so that messages are about it. */
static void node_schema(const rg_context *ctx, rgi_buf *b) {
  bool first = true;
  add_text(b, ",\n  \"node\": {\"type\": \"object\", \"required\": [\"name\", \"op\"], "
              "\"properties\": {\"op\": {\"enum\": [");
  for (int i = 0; i < ctx->nop; i++) {
    if (!public_op(ctx->op[i])) continue;
    rgi_buf_printf(b, "%s\"%s\"", first ? "" : ", ", ctx->op[i]->name);
    first = false;
  }
  add_text(b, "]}}, \"allOf\": [");
  first = true;
  for (int i = 0; i < ctx->nop; i++) {
    const char *op = ctx->op[i]->name;
    if (!public_op(ctx->op[i])) continue;
    rgi_buf_printf(b,
                   "%s\n   {\"if\": {\"required\": [\"op\"], \"properties\": {\"op\": "
                   "{\"const\": \"%s\"}}}, \"then\": {\"$ref\": \"#/$defs/op_%s\"}}",
                   first ? "" : ",", op, op);
    first = false;
  }
  add_text(b, "]}");
}

static void block_schema(rgi_buf *b) {
  add_text(
      b, ",\n  \"block\": {\"description\": \"nodes that are repeated\", \"type\": \"object\", "
         "\"additionalProperties\": false, \"required\": [\"repeat\", \"name\", \"nodes\"], "
         "\"properties\": {\n"
         "   \"repeat\": {\"anyOf\": [{\"type\": \"integer\", \"minimum\": 1, \"maximum\": 16384}, "
         "{\"$ref\": \"#/$defs/param\"}]},\n"
         "   \"name\": {\"$ref\": \"#/$defs/name\"}, \"doc\": {\"type\": \"string\"},\n"
         "   \"carry\": {\"type\": \"object\", \"additionalProperties\": {\"type\": \"object\", "
         "\"additionalProperties\": false, \"required\": [\"first\", \"next\"], \"properties\": "
         "{\"first\": "
         "{\"$ref\": \"#/$defs/tensor\"}, \"next\": {\"$ref\": \"#/$defs/tensor\"}}}},\n"
         "   \"inputs\": {\"type\": \"object\", \"propertyNames\": {\"$ref\": \"#/$defs/name\"}, "
         "\"additionalProperties\": {\"$ref\": \"#/$defs/input\"}},\n"
         "   \"state\": {\"type\": \"object\", \"propertyNames\": {\"$ref\": \"#/$defs/name\"}, "
         "\"additionalProperties\": {\"$ref\": \"#/$defs/state\"}},\n"
         "   \"out\": {\"type\": \"object\", \"propertyNames\": {\"$ref\": \"#/$defs/name\"}, "
         "\"additionalProperties\": {\"$ref\": \"#/$defs/tensor\"}},\n"
         "   \"nodes\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/node\"}}}}");
}

/* What inputs and state have in common. */
#define SHAPE_AND_DTYPE                                                                       \
  "   \"shape\": {\"type\": \"array\", \"maxItems\": 8, \"items\": {\"anyOf\": [{\"type\": "  \
  "\"integer\", "                                                                             \
  "\"minimum\": 1, \"maximum\": 1099511627776}, {\"$ref\": \"#/$defs/expression\"}]}},\n"     \
  "   \"dtype\": {\"anyOf\": [{\"enum\": [\"f32\", \"f16\", \"bf16\", \"i32\"]}, {\"$ref\": " \
  "\"#/$defs/param\"}]},\n"

static void spec_schema(const rg_context *ctx, rgi_buf *b) {
  schema_head(b, "regraph spec, version 1");
  add_text(
      b,
      " \"type\": \"object\", \"additionalProperties\": false, \"required\": [\"regraph\", "
      "\"inputs\", \"nodes\", "
      "\"outputs\"],\n \"properties\": {\n"
      "  \"regraph\": {\"const\": 1},\n"
      "  \"name\": {\"$ref\": \"#/$defs/name\"},\n"
      "  \"doc\": {\"type\": \"string\"},\n"
      "  \"$schema\": {\"type\": \"string\"},\n"
      "  \"params\": {\"type\": \"object\", \"maxProperties\": 4096, \"propertyNames\": {\"$ref\": "
      "\"#/$defs/name\"}, "
      "\"additionalProperties\": {\"type\": [\"number\", \"string\", \"boolean\"]}},\n"
      "  \"inputs\": {\"type\": \"object\", \"maxProperties\": 4096, \"propertyNames\": {\"$ref\": "
      "\"#/$defs/name\"}, "
      "\"additionalProperties\": {\"$ref\": \"#/$defs/input\"}},\n"
      "  \"state\": {\"type\": \"object\", \"maxProperties\": 4096, \"propertyNames\": {\"$ref\": "
      "\"#/$defs/name\"}, "
      "\"additionalProperties\": {\"$ref\": \"#/$defs/state\"}},\n"
      "  \"nodes\": {\"type\": \"array\", \"maxItems\": 16384, \"items\": {\"if\": "
      "{\"required\": [\"repeat\"]}, \"then\": {\"$ref\": \"#/$defs/block\"}, \"else\": "
      "{\"$ref\": \"#/$defs/node\"}}},\n"
      "  \"outputs\": {\"type\": \"object\", \"minProperties\": 1, \"maxProperties\": 4096, "
      "\"propertyNames\": "
      "{\"$ref\": \"#/$defs/name\"}, \"additionalProperties\": {\"$ref\": \"#/$defs/tensor\"}}},\n"
      " \"$defs\": {\n"
      "  \"name\": {\"type\": \"string\", \"pattern\": \"^" IDENTIFIER "$\"},\n"
      "  \"names\": {\"anyOf\": [{\"$ref\": \"#/$defs/name\"}, {\"type\": \"array\", \"minItems\": "
      "1, "
      "\"items\": {\"$ref\": \"#/$defs/name\"}}]},\n"
      "  \"tensor\": {\"description\": \"an input, a named output of a node, or NODE.PORT\", "
      "\"type\": "
      "\"string\", \"pattern\": \"^" IDENTIFIER "([.][A-Za-z0-9_.]+)?$\"},\n"
      "  \"tensors\": {\"anyOf\": [{\"$ref\": \"#/$defs/tensor\"}, {\"type\": \"array\", "
      "\"minItems\": 1, "
      "\"items\": {\"$ref\": \"#/$defs/tensor\"}}]},\n"
      "  \"param\": {\"description\": \"the value of a parameter\", \"type\": \"string\", "
      "\"pattern\": "
      "\"^[$]" IDENTIFIER "$\"},\n"
      "  \"expression\": {\"description\": \"integers, names, + - * / (rounding down) and "
      "parentheses\", "
      "\"type\": \"string\", \"pattern\": \"^[-+*/() \\\\t0-9A-Za-z_]+$\"},\n"
      "  \"input\": {\"type\": \"object\", \"additionalProperties\": false, \"required\": "
      "[\"shape\", "
      "\"dtype\"], \"properties\": {\n" SHAPE_AND_DTYPE
      "   \"grad\": {\"enum\": [true, false, \"accumulate\"]},\n"
      "   \"doc\": {\"type\": \"string\"}}},\n"
      "  \"state\": {\"description\": \"memory that the graph reads and writes; `next` is its last "
      "version\", \"type\": \"object\", \"additionalProperties\": false, \"required\": "
      "[\"shape\", \"dtype\", \"next\"], \"properties\": {\n" SHAPE_AND_DTYPE
      "   \"next\": {\"$ref\": \"#/$defs/tensor\"},\n"
      "   \"doc\": {\"type\": \"string\"}}}");
  for (int i = 0; i < ctx->nop; i++)
    if (public_op(ctx->op[i])) op_schema(b, ctx->op[i]);
  node_schema(ctx, b);
  block_schema(b);
  add_text(b, "}}\n");
}

static void policy_schema(rgi_buf *b) {
  schema_head(b, "regraph policy, version 1");
  add_text(b, " \"type\": \"object\", \"additionalProperties\": false, \"required\": "
              "[\"regraph_policy\"],\n"
              " \"properties\": {\n"
              "  \"regraph_policy\": {\"const\": 1},\n"
              "  \"doc\": {\"type\": \"string\"},\n"
              "  \"$schema\": {\"type\": \"string\"},\n"
              "  \"preset\": {\"enum\": [\"none\", \"all\"], \"default\": \"none\"},\n"
              "  \"recompute\": {\"type\": \"array\", \"maxItems\": 8192, \"uniqueItems\": true, "
              "\"items\": "
              "{\"type\": "
              "\"string\"}},\n"
              "  \"nodes\": {\"description\": \"what is to become of single nodes; * stands for "
              "any characters\", "
              "\"type\": \"object\", \"maxProperties\": 8192, \"additionalProperties\": {\"enum\": "
              "[\"keep\", "
              "\"recompute\", \"offload\", \"auto\"]}},\n"
              "  \"host\": {\"description\": \"most bytes of the host's memory for what is "
              "offloaded\", \"$ref\": \"#/$defs/size\"},\n"
              "  \"budget\": {\"anyOf\": [{\"$ref\": \"#/$defs/bytes\"}, {\"type\": \"object\", "
              "\"additionalProperties\": false, \"required\": [\"bytes\"], \"properties\": {\n"
              "   \"bytes\": {\"$ref\": \"#/$defs/bytes\"},\n"
              "   \"of\": {\"enum\": [\"peak\", \"saved\"], \"default\": \"peak\"}}}]},\n"
              "  \"split_heads\": {\"description\": \"KV heads a group\", \"type\": \"integer\", "
              "\"minimum\": 1, "
              "\"maximum\": 2147483647},\n"
              "  \"split_kv\": {\"description\": \"share out the keys of a step's single tokens: "
              "other bits\", \"type\": \"boolean\", \"default\": false},\n"
              "  \"cp\": {\"description\": \"context parallelism\", \"type\": \"object\", "
              "\"additionalProperties\": false, \"properties\": {\n"
              "   \"ranks\": {\"type\": \"integer\", \"minimum\": 1, \"maximum\": 1024},\n"
              "   \"mode\": {\"enum\": [1, 2, \"auto\"], \"default\": \"auto\"},\n"
              "   \"weights\": {\"enum\": [\"sum\", \"local\"], \"default\": \"sum\"},\n"
              "   \"wire\": {\"enum\": [\"f32\", \"bf16\"], \"default\": \"f32\"}}}},\n"
              " \"$defs\": {\"bytes\": {\"anyOf\": [{\"const\": \"least\"}, "
              "{\"$ref\": \"#/$defs/size\"}]},\n"
              "  \"size\": {\"anyOf\": [{\"type\": \"integer\", \"minimum\": 0, "
              "\"maximum\": 9223372036854775807}, {\"type\": \"string\", \"pattern\": "
              "\"^[0-9]+([.][0-9]{1,6})? ?(B|[kKMGT](i?B)?)?$\"}]}},\n"
              " \"allOf\": [{\"not\": {\"required\": [\"preset\", \"recompute\"]}}, {\"not\": "
              "{\"required\": "
              "[\"preset\", "
              "\"budget\"]}}, {\"not\": {\"required\": [\"recompute\", \"budget\"]}}]}\n");
}

static void policy_topic(const rg_context *ctx, rgi_buf *b) {
  (void)ctx;
  policy_schema(b);
}

/* One for each file of schemas/. */
extern const char *const rgi_schema_plan;
extern const char *const rgi_schema_pareto;
extern const char *const rgi_schema_run;
extern const char *const rgi_schema_bench;
extern const char *const rgi_schema_check;
extern const char *const rgi_schema_ops;
extern const char *const rgi_schema_profile;
extern const char *const rgi_schema_trace;

rg_status rg_describe(rg_context *ctx, const char *what, rg_text *out, rg_error *error) {
  static const struct {
    const char *name;
    void (*write)(const rg_context *ctx, rgi_buf *b);
    const char *const *text; /* instead */
  } topic[] = {{"ops", ops_text, NULL},
               {"ops-json", ops_json, NULL},
               {"schema-spec", spec_schema, NULL},
               {"schema-policy", policy_topic, NULL},
               {"schema-profile", NULL, &rgi_schema_profile},
               {"schema-plan", NULL, &rgi_schema_plan},
               {"schema-pareto", NULL, &rgi_schema_pareto},
               {"schema-run", NULL, &rgi_schema_run},
               {"schema-bench", NULL, &rgi_schema_bench},
               {"schema-check", NULL, &rgi_schema_check},
               {"schema-ops", NULL, &rgi_schema_ops},
               {"schema-trace", NULL, &rgi_schema_trace}};
  const char *known[RGI_COUNT(topic)];
  rgi_buf b;
  rgi_shown shown, hint;
  if (out) *out = (rg_text){0};
  if (!ctx || !what || !out)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_describe needs a context, a topic and a place for the text");
  for (int i = 0; i < RGI_COUNT(topic); i++) {
    known[i] = topic[i].name;
    if (strcmp(what, known[i]) != 0) continue;
    rgi_buf_init(&b, ctx);
    if (topic[i].write)
      topic[i].write(ctx, &b);
    else
      add_text(&b, *topic[i].text);
    return rgi_buf_finish(&b, out, error);
  }
  return rgi_fail(error, RG_E_USAGE, NULL, NULL, "there is no description '%s'%s",
                  rgi_show(&shown, what), rgi_hint(&hint, what, known, RGI_COUNT(known)));
}
