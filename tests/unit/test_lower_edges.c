/* tests/unit/test_lower_edges.c: what may run beside what on a GPU, checked without one.

     edges      leave no two steps side by side that touch the same byte, one of them writing
     copies     of what is offloaded run beside what computes, one by one, and come back in time
     lanes      cost memory where they may, and are given up where the policy asks for less
 */
#include "lower_case.h"

/* ---- edges ---- */

Test(lower_cuda, edges_of_examples) {
  bench b = open_bench(3);
  for (int i = 0; i < RGI_COUNT(examples); i++) {
    load_example(&b, examples[i], true);
    for (int k = 0; k < RGI_COUNT(policies); k++)
      for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
        rg_plan *plan = plan_of(&b, policies[k], no_lanes, false);
        int apart = check_edges(b.t, plan, examples[i]);
        if (i == 0 && k == 0 && !no_lanes) cr_assert_gt(apart, 0, "nsa has no branches");
        rg_plan_destroy(plan);
      }
  }
  close_bench(&b);
}

Test(lower_cuda, edges_of_random_graphs) {
  bench b = open_bench(4);
  int apart = 0;
  uint64_t first = round_seed(600, 40);
  for (uint64_t seed = first; seed < first + 40; seed++) {
    char what[32];
    snprintf(what, sizeof what, "random graph %d", (int)seed);
    load_random(&b, seed);
    for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
      rg_plan *plan = plan_of(&b, policies[seed % 2], no_lanes, false);
      apart += check_edges(b.t, plan, what);
      rg_plan_destroy(plan);
    }
  }
  cr_assert_gt(apart, 0);
  close_bench(&b);
}

/* The checker itself sees a missing edge. */
Test(lower_cuda, a_missing_edge_shows) {
  bench b = open_bench(5);
  load_example(&b, "nsa", true);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  int shown = 0;
  for (int i = 0; i < plan->nstep; i++) {
    int32_t *after = plan->after[i], first = after[0];
    const char *what = NULL;
    after[0] = -1;
    if (first >= 0) {
      count_apart(b.t, plan, &what);
      cr_assert(what, "step %d may run before step %d", i, first);
      shown++;
    }
    after[0] = first;
  }
  cr_assert_gt(shown, 0);
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* ---- copies ---- */

/* Copies of what is offloaded: they run one by one, on a lane that nothing else takes, beside what
 * computes; all bytes of a tensor leave once and come back once. */
static void check_offload(bench *b, const rg_plan *plan, const char *what) {
  lo_list list;
  int64_t bytes[2] = {0, 0}, moved[2] = {0, 0};
  check_launches(b, plan, what);
  check_edges(b->t, plan, what);
  for (int32_t i = 0; i < plan->nstep; i++) {
    const bool backward = i >= plan->nforward;
    for (int32_t k = backward ? plan->nforward : 0; k < i; k++) {
      const bool one = rgi_is_copy(plan->graph, plan->step[i].node),
                 other = rgi_is_copy(plan->graph, plan->step[k].node);
      cr_assert(one == other || plan->lane[i] != plan->lane[k], "%s: %s and %s share a lane", what,
                node_of(plan, i), node_of(plan, k));
      cr_assert(!one || !other || plan->lane[i] == plan->lane[k], "%s: two lanes of copies", what);
    }
    if (rgi_is_copy(plan->graph, plan->step[i].node))
      bytes[backward] +=
          rgi_bytes(&plan->graph->tensor[plan->graph->node[plan->step[i].node].out[0]]);
  }
  OT_OK(lo_ask(b->t, plan, 0, &list));
  for (int i = 0; i < list.n; i++)
    if (list.at[i].copies) {
      const rg_copy *c = &list.at[i].copy;
      cr_assert_eq(c->to_host, list.at[i].step < plan->nforward);
      moved[!c->to_host] += (int64_t)(c->width * c->rows);
    }
  cr_assert(bytes[0] == moved[0] && bytes[1] == moved[1], "%s", what);
  cr_assert(bytes[0] == bytes[1] && bytes[0] <= plan->sizes.host &&
                bytes[0] + 512 * plan->nstep >= plan->sizes.host,
            "%s: %lld leave, %lld come back, %lld wait", what, (long long)bytes[0],
            (long long)bytes[1], (long long)plan->sizes.host);
}

static const char *const offloads[] = {
    "{ \"regraph_policy\": 1, \"nodes\": { \"*\": \"offload\" } }",
    "{ \"regraph_policy\": 1, \"nodes\": { \"*\": \"offload\" }, \"split_heads\": 1 }",
    "{ \"regraph_policy\": 1, \"nodes\": { \"*o*\": \"offload\" }, \"preset\": \"all\" }"};

Test(lower_cuda, offload_of_examples) {
  bench b = open_bench(11);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      for (int k = 0; k < (small ? RGI_COUNT(offloads) : 1); k++) {
        rg_plan *plan = plan_of(&b, offloads[k], false, k == 1);
        if (i < 3) cr_assert_gt(plan->sizes.host, 0, "%s", examples[i]);
        check_offload(&b, plan, examples[i]);
        rg_plan_destroy(plan);
      }
    }
  report(&b);
  close_bench(&b);
}

Test(lower_cuda, offload_of_random_graphs) {
  bench b = open_bench(12);
  const uint64_t first = round_seed(800, 16);
  for (uint64_t seed = first; seed < first + 16; seed++) {
    load_random(&b, seed);
    rg_plan *plan = plan_of(&b, offloads[0], false, seed % 4 == 0);
    check_offload(&b, plan, "a random graph");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

/* Layers one after the other, times by a profile of our own: a copy of an early layer runs beside
 * the later ones, takes its bytes with it for as long as it lasts, and costs nothing; with a link
 * so slow that it lasts longer than all that is computed, the rest of it is waited for. */
Test(lower_cuda, windows) {
  bench b = open_bench(13);
  double wait[3];
  int leaves[3];
  static const double gbs[3] = {1e9, 900, 1}; /* of the host's link */
  for (int k = 0; k < 3; k++) {
    char text[1024];
    snprintf(text, sizeof text,
             "{ \"regraph_profile\": 1, \"device\": \"cuda\", \"special_gops\": 1000, "
             "\"bandwidth_gbs\": 900, \"host_gbs\": %g, \"memory\": \"24GB\", \"step_us\": 3, "
             "\"compute_capability\": 86, "
             "\"matrix_gflops\": { \"f32\": 20000, \"f16\": 100000, \"bf16\": 100000 } }",
             gbs[k]);
    FILE *f = fopen(b.older, "w");
    cr_assert(f && fputs(text, f) >= 0 && fclose(f) == 0);
    rg_spec_destroy(b.spec);
    char spec[4096], *at = spec;
    at += sprintf(at, "{ \"regraph\": 1, \"inputs\": { \"x0\": { \"shape\": [\"T\", 64], "
                      "\"dtype\": \"f32\", \"grad\": true } }, \"nodes\": [");
    for (int i = 0; i < 12; i++)
      at += sprintf(at,
                    "%s{ \"name\": \"n%d\", \"op\": \"silu\", \"in\": { \"x\": \"x%d\" }, "
                    "\"out\": { \"y\": \"x%d\" } }",
                    i ? ", " : "", i, i, i + 1);
    sprintf(at, "], \"outputs\": { \"y\": \"x12\" } }");
    b.spec = load_spec(b.ctx, spec);
    b.T = 1 << 16;
    rg_plan *plan =
        plan_of(&b, "{ \"regraph_policy\": 1, \"nodes\": { \"n2\": \"offload\" } }", false, true);
    check_offload(&b, plan, "windows");
    wait[k] = plan->offload_ms[0] + plan->offload_ms[1];
    int copy = -1, reader = -1;
    leaves[k] = 0;
    while (!rgi_is_copy(plan->graph, plan->step[leaves[k]].node)) leaves[k]++;
    for (int32_t i = plan->nforward; i < plan->nstep; i++) {
      const rgi_node *n = &plan->graph->node[plan->step[i].node];
      if (rgi_is_copy(plan->graph, plan->step[i].node)) copy = i;
      if (copy >= 0 && reader < 0 && strcmp(n->name, "n3.bwd") == 0) reader = i;
    }
    cr_assert(copy >= 0 && reader > copy, "n3.bwd is to read what came back");
    if (k == 0) cr_assert_leq(reader, copy + 2, "a short copy begins while the node before runs");
    if (k == 2)
      cr_assert_eq(copy, plan->nforward, "one that takes for ever is as early as it gets");
    rg_plan_destroy(plan);
  }
  cr_assert_eq(wait[0], 0);
  cr_assert_eq(wait[1], 0);
  cr_assert_gt(wait[2], 2 * 16 - 1.0, "16 MiB at 1 GB/s either way: %g ms", wait[2]);
  cr_assert(leaves[0] <= 4 && leaves[1] >= leaves[0] && leaves[1] < 12 && leaves[2] == 12,
            "the copy is over at step %d, %d, %d", leaves[0], leaves[1], leaves[2]);
  close_bench(&b);
}

/* A budget that may be met by offloading is, where copies hide: several layers, the time of nothing
 * computed again. */
Test(lower_cuda, offload_for_a_budget) {
  bench b = open_bench(14);
  rg_error e = {0};
  const rg_binding few = {"layers", 2, NULL};
  CR_OK(rg_spec_load_file(b.ctx, RG_SOURCE_DIR "/examples/nsa_model.json", &few, 1, &b.spec, &e),
        &e);
  b.T = 8192, b.B = 3;
  rg_plan *kept = plan_of(&b, NULL, true, false);
  char policy[2][256];
  for (int host = 0; host < 2; host++)
    snprintf(policy[host], sizeof *policy,
             "{ \"regraph_policy\": 1, \"budget\": %lld, \"host\": %d }",
             (long long)(kept->sizes.predicted_peak - (16 << 20)), host ? 256 << 20 : 0);
  rg_plan *alone = plan_of(&b, policy[0], false, false),
          *plan = plan_of(&b, policy[1], false, false);
  cr_assert(alone->choice->extra_ms > 0 && alone->sizes.host == 0);
  cr_assert_eq(plan->choice->extra_ms + plan->choice->wait_ms, 0);
  cr_assert(plan->sizes.host > 0 && plan->sizes.host <= 256 << 20);
  cr_assert_leq(plan->sizes.predicted_peak, kept->sizes.predicted_peak - (16 << 20));
  check_offload(&b, plan, "nsa_model");
  rg_plan_destroy(plan);
  rg_plan_destroy(alone);
  rg_plan_destroy(kept);
  close_bench(&b);
}

/* ---- lanes ---- */

static void same_plan(bench *b, const char *policy) {
  rg_plan *with = plan_of(b, policy, false, false), *without = plan_of(b, policy, true, false);
  cr_assert_eq(with->sizes.predicted_peak, without->sizes.predicted_peak, "%s", policy);
  cr_assert_eq(with->nstep, without->nstep);
  for (int i = 0; i < with->nstep; i++)
    for (int k = 0; k == 0 || with->after[i][k - 1] >= 0; k++)
      cr_assert_eq(with->after[i][k], without->after[i][k], "%s", policy);
  rg_plan_destroy(with);
  rg_plan_destroy(without);
}

Test(lower_cuda, lanes_are_given_up) {
  bench b = open_bench(6);
  int64_t scratch[2] = {0, 0};
  int apart[2] = {0, 0};
  for (uint64_t seed = 700; seed < 720; seed++) { /* side by side costs memory, taken together */
    load_random(&b, seed);
    for (int no_lanes = 0; no_lanes < 2; no_lanes++) {
      rg_plan *plan = plan_of(&b, NULL, no_lanes, false);
      scratch[no_lanes] += plan->sizes.scratch;
      apart[no_lanes] += check_edges(b.t, plan, "random");
      rg_plan_destroy(plan);
    }
  }
  cr_assert(scratch[0] > scratch[1] && apart[0] > apart[1],
            "with lanes %lld bytes and %d pairs, without %lld and %d", (long long)scratch[0],
            apart[0], (long long)scratch[1], apart[1]);
  load_example(&b, "nsa", false);
  same_plan(&b, "{ \"regraph_policy\": 1, \"split_heads\": 1 }");
  same_plan(&b, "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": \"6GiB\", \"of\": \"peak\" } }");
  close_bench(&b);
}

/* More branches than a kernel's parameters hold are refused by the plan, not by the run. */
Test(lower_cuda, too_many_branches) {
  bench b = open_bench(9);
  for (int n = 32; n <= 33; n++) {
    rg_error e = {0};
    rg_plan *plan = NULL;
    char text[2048], *at = text;
    at +=
        sprintf(at, "{ \"regraph\": 1, \"name\": \"many\", \"inputs\": {"
                    "\"a\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"f32\", \"grad\": true },"
                    "\"l\": { \"shape\": [\"T\", 2], \"dtype\": \"f32\" } },"
                    "\"nodes\": [ { \"name\": \"all\", \"op\": \"merge_lse\", \"in\": { \"o\": [");
    for (int i = 0; i < n; i++) at += sprintf(at, "%s\"a\"", i ? "," : "");
    at += sprintf(at, "], \"lse\": [");
    for (int i = 0; i < n; i++) at += sprintf(at, "%s\"l\"", i ? "," : "");
    sprintf(at, "] }, \"out\": { \"o\": \"y\" } } ], \"outputs\": { \"y\": \"y\" } }");
    rg_spec *spec = load_spec(b.ctx, text);
    const rg_binding set[] = {{"T", 16, NULL}};
    for (int cuda = 0; cuda < 2; cuda++) {
      rg_plan_options o = {.set = set, .nset = 1, .device = cuda ? "cuda" : "cpu"};
      const rg_status status = rg_plan_create(spec, NULL, &o, &plan, &e);
      cr_assert_eq(status, cuda && n > 32 ? RG_E_LIMIT : RG_OK, "%d: %s", n, e.message);
      if (status != RG_OK)
        cr_assert(strcmp(e.node, "all") == 0 && strstr(e.message, "in groups"), "%s", e.message);
      rg_plan_destroy(plan);
    }
    rg_spec_destroy(spec);
  }
  close_bench(&b);
}

/* Copies of lengths are bytes like any others: they count in what is predicted and against a
 * budget. */
Test(lower_cuda, copies_of_lengths_count) {
  bench b = open_bench(8);
  load_example(&b, "nsa", true);
  b.B = 50000;
  rg_plan *keep = plan_of(&b, NULL, true, false);
  cr_assert_eq(keep->nclean, 1);
  cr_assert_geq(keep->memory->reserved, 4 * (b.B + 1));
  cr_assert_eq(keep->choice->saved_after, keep->sizes.saved);
  const int64_t most = keep->sizes.predicted_peak, saved = keep->sizes.saved;
  for (int k = 0; k < 5; k++) {
    char policy[128];
    const bool of_saved = k > 0;
    const int64_t budget = (of_saved ? saved : most) - (k < 2 ? 0 : k < 3 ? 1 : 4000 * k);
    snprintf(policy, sizeof policy,
             "{ \"regraph_policy\": 1, \"budget\": { \"bytes\": %lld, \"of\": \"%s\" } }",
             (long long)budget, of_saved ? "saved" : "peak");
    rg_plan *plan = plan_of(&b, policy, false, false);
    cr_assert_leq(of_saved ? plan->sizes.saved : plan->sizes.predicted_peak, budget, "%s", policy);
    cr_assert_eq(plan->choice->saved_after, plan->sizes.saved, "%s", policy);
    if (k < 2) cr_assert_eq(plan->nstep, keep->nstep, "%s recomputes", policy);
    rg_plan_destroy(plan);
  }
  rg_plan_destroy(keep);
  close_bench(&b);
}

Test(lower_cuda, dot_shows_lanes) {
  bench b = open_bench(7);
  rg_error e = {0};
  rg_text text;
  load_example(&b, "nsa", false);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  CR_OK(rg_plan_write(plan, "dot", &text, &e), &e);
  cr_assert(strstr(text.data, "cluster_forward") && strstr(text.data, "cluster_backward"));
  for (int i = 0; i < plan->nstep; i++) {
    char line[256];
    snprintf(line, sizeof line, "    s%d [label=\"%s\\n", i, node_of(plan, i));
    const char *at = strstr(text.data, line);
    cr_assert(at, "%s", line);
    snprintf(line, sizeof line, "\\nlane %d\"", plan->lane[i]);
    cr_assert(strstr(at, line) && strstr(at, line) < strchr(at, '\n'), "%s of %s", line,
              node_of(plan, i));
    for (const int32_t *p = plan->after[i]; *p >= 0; p++) {
      snprintf(line, sizeof line, "s%d -> s%d [", *p, i);
      cr_assert(strstr(text.data, line), "%s", line);
    }
  }
  rg_text_destroy(&text);
  rg_plan_destroy(plan);
  close_bench(&b);
}
