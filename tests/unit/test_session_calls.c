/* tests/unit/test_session_calls.c: what sessions refuse, and what a refused call leaves as it was;
   by whose lengths a backward goes; memory that a run would write over.
 */
#include "run_util.h"

enum { T = 150, B = 3 };
static const int lengths[B] = {70, 0, 75};

static rg_context *ctx;
static rg_spec *spec;
static rg_plan *plan;
static buffers io;

static void setup(void) {
  char text[8192];
  rg_error e = {0};
  CR_OK(rg_context_create(NULL, &ctx, &e), &e);
  spec = load_spec(ctx, nsa_spec("f32", true, text, sizeof text));
  plan = make_plan(spec, NULL, T, B, 2);
  make_buffers(plan, 3, T, lengths, &io);
}
static void teardown(void) {
  free_buffers(&io);
  rg_plan_destroy(plan);
  rg_spec_destroy(spec);
  rg_context_destroy(ctx);
}

static rg_session *session(const rg_session_options *o) {
  rg_session *s = NULL;
  rg_error e = {0};
  CR_OK(rg_session_create(plan, o, &s, &e), &e);
  return s;
}

/* An rg_error that holds an earlier call's stays as it is, whatever is wrong now; the calls fail
 * all the same, and those with nothing to fail at do their work. */
Test(session, first_error_wins, .init = setup, .fini = teardown) {
  const rg_error earlier = {.status = RG_E_SHAPE, .line = 7, .message = "an earlier call's"};
  rg_error e = earlier;
  rg_session *s = session(NULL), *none = s;
  void *pointers[MOST_TENSORS] = {NULL};
  char word[4];
#define STAYS(call, code)                                                        \
  do {                                                                           \
    cr_assert_eq(call, code, "%s", #call);                                       \
    cr_assert_eq(memcmp(&e, &earlier, sizeof e), 0, "%s: %s", #call, e.message); \
  } while (0)
  STAYS(rg_session_create(NULL, NULL, &none, &e), RG_E_USAGE);
  cr_assert_null(none);
  STAYS(rg_session_backward(s, &e), RG_E_USAGE);
  STAYS(rg_session_forward(s, &e), RG_E_USAGE);
  STAYS(rg_session_run(s, RG_FORWARD, pointers, (size_t)io.n, NULL, NULL, &e), RG_E_USAGE);
  STAYS(rg_session_run(s, RG_FORWARD, pointers, 1, NULL, NULL, &e), RG_E_USAGE);
  STAYS(rg_session_bind(s, RG_INPUT, "qq", io.data[0], 4, &e), RG_E_USAGE);
  STAYS(rg_session_bind_index(s, SIZE_MAX, NULL, 0, &e), RG_E_USAGE);
  STAYS(rg_session_bind_saved(s, word + 1, &e), RG_E_USAGE);
  STAYS(rg_session_bind_scratch(s, word + 1, &e), RG_E_USAGE);
  STAYS(rg_session_adopt_saved(s, NULL, &e), RG_E_USAGE);
  STAYS(rg_session_forget_saved(s, word, &e), RG_E_USAGE);
  STAYS(rg_session_set_stream(s, word, &e), RG_E_USAGE);
  STAYS(rg_session_read(s, "q", word, 4, &e), RG_E_USAGE);
  bind_all(s, &io);
  STAYS(rg_session_forward(s, &e), RG_OK);
  STAYS(rg_session_backward(s, &e), RG_OK);
  STAYS(rg_session_synchronize(s, &e), RG_OK);
  int32_t *cu = buffer(&io, RG_INPUT, "cu_seqlens");
  cu[1] = -1;
  STAYS(rg_session_forward(s, &e), RG_E_DATA);
  rg_session_destroy(s);
}

/* Binds one tensor to other memory of its size. */
static void bind_at(rg_session *s, rg_role role, const char *name, void *ptr) {
  rg_error e = {0};
  for (int i = 0; i < io.n; i++)
    if (io.info[i].role == role && strcmp(io.info[i].name, name) == 0)
      CR_OK(rg_session_bind(s, role, name, ptr, (size_t)io.info[i].bytes, &e), &e);
}

/* A forward that is refused leaves the one before it as it was. */
Test(session, refused_forwards, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_session *clean = session(NULL), *s = session(NULL);
  bind_all(clean, &io);
  run_both(clean);
  for (int way = 0; way < 3; way++) {
    buffers mine;
    make_buffers(plan, 3, T, lengths, &mine);
    bind_all(s, &mine);
    CR_OK(rg_session_forward(s, &e), &e);
    int32_t *cu = buffer(&mine, RG_INPUT, "cu_seqlens"), was = cu[1];
    if (way == 0) {
      bind_at(s, RG_INPUT, "v", NULL);
      FAILS(rg_session_forward(s, &e), RG_E_USAGE, "\"v\"");
    } else if (way == 1) {
      cu[1] = T + 1;
      FAILS(rg_session_forward(s, &e), RG_E_DATA, "cu_seqlens[2]");
      cu[1] = was;
    } else {
      bind_at(s, RG_OUTPUT, "o", buffer(&mine, RG_INPUT, "q"));
      FAILS(rg_session_forward(s, &e), RG_E_USAGE, "\"o\"");
    }
    bind_all(s, &mine);
    CR_OK(rg_session_backward(s, &e), &e);
    same_results(&io, &mine, "after a refused forward");
    free_buffers(&mine);
  }
  rg_session_destroy(s);
  rg_session_destroy(clean);
}

/* A backward goes by the lengths of its forward, whatever has become of the caller's. */
Test(session, lengths_of_the_forward, .init = setup, .fini = teardown) {
  static const int32_t later[][B + 1] = {{0, 10, 20, 30},
                                         {0, T, T, T},
                                         {0, 0, 0, 0},
                                         {0, 1 << 20, 1 << 24, INT32_MAX},
                                         {-5, -(1 << 24), 9, -1}};
  rg_error e = {0};
  rg_session *clean = session(NULL);
  bind_all(clean, &io);
  run_both(clean);
  rg_session_destroy(clean);
  for (size_t i = 0; i < sizeof later / sizeof *later; i++) {
    rg_session_options o = {.debug_poison = i & 1};
    rg_session *s = session(&o);
    buffers mine;
    make_buffers(plan, 3, T, lengths, &mine);
    bind_all(s, &mine);
    CR_OK(rg_session_forward(s, &e), &e);
    memcpy(buffer(&mine, RG_INPUT, "cu_seqlens"), later[i], sizeof later[i]);
    CR_OK(rg_session_backward(s, &e), &e);
    same_results(&io, &mine, "lengths changed after the forward");
    rg_session_destroy(s);
    free_buffers(&mine);
  }
}

/* What a run writes shares bytes with nothing else that it touches; what is only read may. */
Test(session, overlaps, .init = setup, .fini = teardown) {
  rg_error e = {0};
  rg_session *s = session(NULL);
  rg_sizes z;
  cr_assert_eq(rg_plan_sizes(plan, &z), RG_OK);
  enum { BYTES = T * 4 * 16 * 4 }; /* of q, o and their gradients */
  char *two = NULL;
  cr_assert_eq(posix_memalign((void **)&two, 256, 2 * BYTES + (size_t)z.saved), 0);
  memset(two, 0, 2 * BYTES);
  bind_all(s, &io);
  static const struct {
    rg_role role[2];
    const char *name[2];
    int64_t offset[2];
    const char *part[2]; /* of the refusal of forward, of backward; NULL: fine */
  } pair[] = {
      {{RG_OUTPUT, RG_INPUT},
       {"o", "q"},
       {0, 0},
       {"the output \"o\" would be written over the input \"q\"", ""}},
      {{RG_OUTPUT, RG_INPUT}, {"o", "q"}, {BYTES - 16, 0}, {"the input \"q\"", ""}},
      {{RG_OUTPUT, RG_INPUT}, {"o", "q"}, {0, BYTES - 16}, {"the output \"o\"", ""}},
      {{RG_OUTPUT, RG_INPUT}, {"o", "q"}, {0, BYTES}, {NULL, NULL}},
      {{RG_OUTPUT, RG_INPUT}, {"o", "cu_seqlens"}, {0, 64}, {"the input \"cu_seqlens\"", ""}},
      {{RG_GRAD_OUT, RG_INPUT},
       {"q", "q"},
       {0, 0},
       {NULL, "the gradient of input \"q\" would be written over"}},
      {{RG_GRAD_OUT, RG_GRAD_IN}, {"q", "o"}, {0, 0}, {NULL, "over the gradient of output \"o\""}},
      {{RG_GRAD_OUT, RG_GRAD_OUT}, {"q", "k"}, {0, 16}, {NULL, "the gradient of input \"k\""}},
      {{RG_GRAD_OUT, RG_GRAD_OUT}, {"q", "wk"}, {0, 16}, {NULL, "the gradient of input \"wk\""}},
      {{RG_GRAD_IN, RG_OUTPUT}, {"o", "o"}, {0, 0}, {NULL, NULL}},
      {{RG_GRAD_IN, RG_INPUT}, {"o", "q"}, {0, 0}, {NULL, NULL}},
      {{RG_INPUT, RG_INPUT}, {"k", "v"}, {0, 0}, {NULL, NULL}},
  };
  for (size_t i = 0; i < sizeof pair / sizeof *pair; i++) {
    bind_all(s, &io);
    for (int k = 0; k < 2; k++)
      bind_at(s, pair[i].role[k], pair[i].name[k], two + pair[i].offset[k]);
    if (strcmp(pair[i].name[1], "cu_seqlens") == 0) memset(two, 0, BYTES);
    if (pair[i].part[0]) {
      FAILS(rg_session_forward(s, &e), RG_E_USAGE, pair[i].part[0]);
      continue;
    }
    CR_OK(rg_session_forward(s, &e), &e);
    if (pair[i].part[1])
      FAILS(rg_session_backward(s, &e), RG_E_USAGE, pair[i].part[1]);
    else
      CR_OK(rg_session_backward(s, &e), &e);
  }
  bind_all(s, &io);
  CR_OK(rg_session_bind_saved(s, two, &e), &e);
  bind_at(s, RG_OUTPUT, "o", two);
  FAILS(rg_session_forward(s, &e), RG_E_USAGE, "the saved block");
  bind_at(s, RG_OUTPUT, "o", buffer(&io, RG_OUTPUT, "o"));
  CR_OK(rg_session_forward(s, &e), &e);
  CR_OK(rg_session_bind_scratch(s, two + 256, &e), &e);
  FAILS(rg_session_backward(s, &e), RG_E_USAGE, "the scratch block");
  CR_OK(rg_session_bind_scratch(s, NULL, &e), &e);
  CR_OK(rg_session_backward(s, &e), &e);
  rg_session_destroy(s);
  free(two);
}
