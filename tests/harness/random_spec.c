/* tests/harness/random_spec.c: see random_spec.h. */
#include "random_spec.h"
#include "graph/base.h"
#include <string.h>

int rgi_draw(uint64_t *state, int n) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (int)((*state >> 33) % (uint64_t)n);
}

/* One of the `reach` newest of tensors 0 … i - 1. */
static int draw_recent(uint64_t *state, int i, int reach) {
  return i > reach ? i - reach + rgi_draw(state, reach) : rgi_draw(state, i);
}

rg_status rgi_random_spec(rg_context *ctx, uint64_t *state, int nodes, rg_spec **out, rg_error *e) {
  return rgi_random_spec_near(ctx, state, nodes, nodes, out, e);
}

rg_status rgi_random_spec_near(rg_context *ctx, uint64_t *state, int nodes, int reach,
                               rg_spec **out, rg_error *e) {
  static const char *const width[] = {"16", "48"};
  char *kind = rgi_malloc(ctx, (size_t)nodes + 1); /* width of tensor i */
  rgi_buf s;
  if (!kind) return rgi_nomem(e);
  memset(kind, 0, (size_t)nodes + 1);
  rgi_buf_init(&s, ctx);
  rgi_buf_printf(&s, "{\"regraph\":1,\"name\":\"random\",\"inputs\":{"
                     "\"x0\":{\"shape\":[\"T\",16],\"dtype\":\"f32\",\"grad\":true}");
  for (int from = 0; from < 2; from++)
    for (int to = 0; to < 2; to++)
      rgi_buf_printf(&s, ",\"w%d%d\":{\"shape\":[%s,%s],\"dtype\":\"f32\",\"grad\":true}", from, to,
                     width[to], width[from]);
  rgi_buf_printf(&s, "},\"nodes\":[");
  for (int i = 1; i <= nodes; i++) {
    int a = draw_recent(state, i, reach), b = draw_recent(state, i, reach);
    for (int tries = 0; kind[b] != kind[a] && tries < 8; tries++) b = draw_recent(state, i, reach);
    kind[i] = kind[a];
    rgi_buf_printf(&s, "%s{\"name\":\"n%d\",\"out\":{\"y\":\"x%d\"},", i > 1 ? "," : "", i, i);
    switch (rgi_draw(state, kind[a] == kind[b] ? 4 : 2)) {
    case 0:
      kind[i] = rgi_draw(state, 2);
      rgi_buf_printf(&s, "\"op\":\"linear\",\"in\":{\"x\":\"x%d\",\"w\":\"w%d%d\"}}", a, kind[a],
                     kind[i]);
      break;
    case 1: rgi_buf_printf(&s, "\"op\":\"silu\",\"in\":{\"x\":\"x%d\"}}", a); break;
    case 2: rgi_buf_printf(&s, "\"op\":\"mul\",\"in\":{\"a\":\"x%d\",\"b\":\"x%d\"}}", a, b); break;
    default: rgi_buf_printf(&s, "\"op\":\"add\",\"in\":{\"a\":[\"x%d\",\"x%d\"]}}", a, b); break;
    }
  }
  rgi_buf_printf(&s, "],\"outputs\":{\"y\":\"x%d\",\"z\":\"x%d\"}}", nodes, nodes - 1);
  rgi_free(ctx, kind);
  rg_text text;
  RGI_TRY(rgi_buf_finish(&s, &text, e));
  rg_status status = rg_spec_load_text(ctx, text.data, text.size, "random", NULL, 0, out, e);
  rg_text_destroy(&text);
  return status;
}
