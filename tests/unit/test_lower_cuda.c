/* tests/unit/test_lower_cuda.c: from a plan to the launches of a GPU, checked without one.

     launches   are legal, say the same when asked again, point nowhere but into the bytes of their
                node's tensors and workspace, and change nothing but such pointers when everything
                is bound elsewhere
     older GPUs get no kernel that has the copy engine write, which initcheck does not follow

   Edges, copies and lanes: test_lower_edges.c. Without nvcc kernels have no addresses and tensor
   maps cannot be made: steps that need them are skipped and counted.
 */
#include "../harness/random_spec.h"
#include "../../kernels/attn/tokens.h"
#include "lower_case.h"

Test(lower_cuda, launches_of_examples) {
  bench b = open_bench(1);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      for (int k = 0; k < RGI_COUNT(policies); k++)
        for (int older = 0; older < 2; older++) {
          rg_plan *plan = plan_of(&b, policies[k], false, older);
          check_launches(&b, plan, examples[i]);
          rg_plan_destroy(plan);
        }
    }
  report(&b);
  close_bench(&b);
}

/* A serving step, whose lengths and tables only the device knows: caches as wide as models have
 * them, and small ones; rows for prompts, and for single tokens. */
Test(lower_cuda, launches_over_pages) {
  static const char *const name[] = {"nsa_serve", "serve_model"};
  static const rg_binding set[2][10] = {{{"M", 24, NULL},
                                         {"P", 90, NULL},
                                         {"F", 3, NULL},
                                         {"H", 4, NULL},
                                         {"KH", 2, NULL},
                                         {"D", 10, NULL},
                                         {"DV", 6, NULL},
                                         {"kernel", 8, NULL},
                                         {"stride", 8, NULL},
                                         {"block", 8, NULL}},
                                        {{"M", 24, NULL},
                                         {"P", 90, NULL},
                                         {"forks", 3, NULL},
                                         {"layers", 2, NULL},
                                         {"V", 50, NULL},
                                         {"H", 4, NULL},
                                         {"KH", 2, NULL},
                                         {"D", 16, NULL},
                                         {"DV", 8, NULL},
                                         {"W", 24, NULL}}};
  static const char split[] = "{ \"regraph_policy\": 1, \"split_kv\": true }";
  bench b = open_bench(9);
  int all = 0, shared_out = 0;
  for (int i = 0; i < 2; i++)
    for (int small = 0; small < 2; small++)
      for (int k = 0; k < 5; k++) {
        rg_error e = {0};
        char path[512];
        const bool older = k % 2;
        b.B = k < 2 || small ? 4 : i ? 100 : 60; /* or enough to fill a GPU's multiprocessors */
        b.T = k < 2 ? 70 : b.B;
        snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, name[i]);
        rg_spec_destroy(b.spec);
        CR_OK(rg_spec_load_file(b.ctx, path, set[i], small ? 10 : 3 + i, &b.spec, &e), &e);
        rg_plan *plan = plan_of(&b, k == 4 ? split : NULL, false, older);
        shared_out += plan->fusions->split;
        check_launches(&b, plan, name[i]);
        check_edges(b.t, plan, name[i]);
        for (int n = 0; n < plan->graph->nnode; n++)
          all += strcmp(plan->graph->node[n].op->name, "kv_nsa") == 0;
        rg_plan_destroy(plan);
      }
  cr_assert_gt(all, 0);
  cr_assert_gt(shared_out, 0);
  report(&b);
  close_bench(&b);
}

/* A batch shared out among ranks: collectives, tables, slots. Nothing of them moves with what is
 * bound but the rows that they pack and unpack, and they run in one order. */
Test(lower_cuda, ranks) {
  static const char *const of_ranks[] = {
      "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": 4 } }",
      "{ \"regraph_policy\": 1, \"cp\": { \"ranks\": 2, \"mode\": 2, \"wire\": \"bf16\" }, "
      "\"preset\": \"all\", \"split_heads\": 1 }"};
  bench b = open_bench(8);
  for (int i = 0; i < RGI_COUNT(examples); i++)
    for (int small = 0; small < 2; small++) {
      load_example(&b, examples[i], small);
      if (small) b.T = 256;
      for (int k = 0; k < RGI_COUNT(of_ranks); k++) {
        rg_plan *plan = plan_of(&b, of_ranks[k], false, k);
        const int before = b.library;
        check_launches(&b, plan, examples[i]);
        cr_assert_gt(b.library, before, "%s: no collective", examples[i]);
        check_edges(b.t, plan, examples[i]);
        rg_plan_destroy(plan);
      }
    }
  report(&b);
  close_bench(&b);
}

/* Shares of gradients of keys lie in the workspace and in rows of d.q that no window has come to
 * yet; windows go through all rows, and are fewer for it. */
Test(lower_cuda, shares_in_rows_to_come) {
  static const char text[] =
      "{ \"regraph\": 1, \"inputs\": {\n"
      " \"q\": { \"shape\": [\"T\", 64, 576], \"dtype\": \"bf16\", \"grad\": true },\n"
      " \"k\": { \"shape\": [\"T\", 1, 576], \"dtype\": \"bf16\", \"grad\": true },\n"
      " \"idx\": { \"shape\": [\"T\", 1, 2048], \"dtype\": \"i32\" },\n"
      " \"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } },\n \"nodes\": [\n"
      " { \"name\": \"value\", \"op\": \"slice\", \"in\": { \"x\": \"k\" }, \"out\": { \"y\": "
      "\"v\" "
      "}, \"attrs\": { \"axis\": 2, \"start\": 0, \"stop\": 512 } },\n"
      " { \"name\": \"a\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
      "\"v\", "
      "\"idx\": \"idx\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"o\" }, \"attrs\": { "
      "\"block\": 1 } } ],\n \"outputs\": { \"o\": \"o\" } }";
  bench b = open_bench(10);
  lo_list list;
  load_text(&b, text);
  for (int64_t T = 200; T <= 32768; T = T < 1000 ? 6000 : T < 7000 ? 32768 : T + 1) {
    b.T = T, b.B = 1;
    rg_plan *plan = plan_of(&b, NULL, true, false);
    const char *bad = lo_ask(b.t, plan, 0, &list);
    cr_assert(!bad, "%s", bad);
    int64_t row = 0, before = 0;
    int windows = 0, longer = 0;
    for (int i = 0; i < list.n; i++) {
      const lo_launch *l = &list.at[i];
      if (l->library || l->copies || l->launch.size != sizeof(rgk_tokens_bwd) ||
          l->launch.block[0] != RGK_TOKENS_THREADS)
        continue;
      rgk_tokens_bwd w;
      memcpy(&w, l->params, sizeof w);
      const int64_t share = (int64_t)2048 * 576 * 2, query = (int64_t)64 * 576 * 2,
                    more = w.call.rows - w.split;
      const char *to_come = (char *)w.call.a.dq.data + (row + w.call.rows) * query,
                 *end = (char *)w.call.a.dq.data + T * query;
      cr_assert_eq(w.call.row, row);
      cr_assert(w.call.rows > 0 && w.split > 0 && more >= 0);
      cr_assert(before == 0 || w.split <= before, "the workspace has room for %lld rows",
                (long long)before);
      if (more > 0)
        cr_assert((char *)w.more >= to_come && (char *)w.more + more * share <= end,
                  "T %lld, window of row %lld", (long long)T, (long long)row);
      before = windows ? before : w.split;
      row += w.call.rows;
      windows++, longer += more > 0;
    }
    if (windows)
      cr_assert(row == T && longer > 0 && windows <= (T + before - 1) / before &&
                (T < 32768 || windows < 40));
    else
      b.skipped++;
    rg_plan_destroy(plan);
  }
  close_bench(&b);
}

/* Lengths counted in merged rows, and a copy before the token axis moves. */
Test(lower_cuda, launches_behind_views) {
  static const char text[] =
      "{ \"regraph\": 1, \"inputs\": { \"x\": { \"shape\": [\"T\", 2, 8], \"dtype\": \"bf16\", "
      "\"grad\": "
      "true }, "
      "\"w\": { \"shape\": [16, 8], \"dtype\": \"bf16\", \"grad\": true }, "
      "\"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": ["
      "{ \"name\": \"p\", \"op\": \"silu\", \"in\": { \"x\": \"x\", \"cu_seqlens\": \"cu\" } }, "
      "{ \"name\": \"r\", \"op\": \"reshape\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"m\" "
      "}, "
      "\"attrs\": { \"shape\": [-1, 8] } }, "
      "{ \"name\": \"t\", \"op\": \"transpose\", \"in\": { \"x\": \"x\" }, \"out\": { \"y\": \"t\" "
      "}, "
      "\"attrs\": { \"perm\": [1, 0, 2] } }, "
      "{ \"name\": \"l\", \"op\": \"linear\", \"in\": { \"x\": \"m\", \"w\": \"w\" }, \"out\": { "
      "\"y\": "
      "\"y\" } }"
      " ], \"outputs\": { \"y\": \"y\", \"t\": \"t\" } }";
  bench b = open_bench(3);
  rg_error e = {0};
  load_text(&b, text);
  for (int older = 0; older < 2; older++) {
    rg_plan *plan = plan_of(&b, NULL, false, older);
    rg_text steps;
    CR_OK(rg_plan_write(plan, "steps", &steps, &e), &e);
    cr_assert(strstr(steps.data, "scale_lengths") && strstr(steps.data, "live"), "%s", steps.data);
    rg_text_destroy(&steps);
    check_launches(&b, plan, "views");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

Test(lower_cuda, launches_of_random_graphs) {
  bench b = open_bench(2);
  uint64_t first = round_seed(500, 24);
  for (uint64_t seed = first; seed < first + 24; seed++) {
    char what[32];
    snprintf(what, sizeof what, "random graph %d", (int)seed);
    load_random(&b, seed);
    rg_plan *plan = plan_of(&b, policies[seed / 2 % 2], false, seed % 4 == 0);
    check_launches(&b, plan, what);
    rg_plan_destroy(plan);
  }
  first = round_seed(1, 8);
  /* others: linear, silu, mul and add alone */
  for (uint64_t seed = first; seed < first + 8; seed++) {
    rg_error e = {0};
    uint64_t state = seed;
    rg_spec_destroy(b.spec);
    CR_OK(rgi_random_spec(b.ctx, &state, 20, &b.spec, &e), &e);
    rg_plan *plan = plan_of(&b, policies[seed % 2], false, seed % 4 == 0);
    check_launches(&b, plan, "linear, silu, mul, add");
    rg_plan_destroy(plan);
  }
  report(&b);
  close_bench(&b);
}

/* ---- for initcheck ---- */

static int step_of(const rg_plan *plan, const char *op) {
  for (int32_t i = 0; i < plan->nstep; i++)
    if (strcmp(plan->graph->node[plan->step[i].node].op->name, op) == 0) return i;
  return -1;
}

/* Where one gradient takes K's and V's by kernels that make them apart, both are summed before the
 * sum so far: it is looked at once, at the end. Otherwise cut and whole graphs differ in a bit. */
Test(lower_cuda, a_sum_so_far_comes_last) {
  static const char text[] =
      "{ \"regraph\": 1, \"inputs\": { \"q\": { \"shape\": [\"T\", 4, 16], \"dtype\": \"f32\" }, "
      "\"k\": { \"shape\": [\"T\", 2, 16], \"dtype\": \"f32\", \"grad\": \"accumulate\" }, "
      "\"idx\": { \"shape\": [\"T\", 2, 3], \"dtype\": \"i32\" }, "
      "\"cu\": { \"shape\": [\"B+1\"], \"dtype\": \"i32\" } }, \"nodes\": ["
      "{ \"name\": \"a\", \"op\": \"slc_attn\", \"in\": { \"q\": \"q\", \"k\": \"k\", \"v\": "
      "\"k\", "
      "\"idx\": \"idx\", \"cu_seqlens\": \"cu\" }, \"out\": { \"o\": \"o\" }, "
      "\"attrs\": { \"block\": 8 } } ], \"outputs\": { \"o\": \"o\" } }";
  bench b = open_bench(4);
  load_text(&b, text);
  rg_plan *plan = plan_of(&b, NULL, false, false);
  const int i = step_of(plan, "slc_attn.bwd");
  cr_assert_geq(i, 0);
  const rgi_step *s = &plan->step[i];
  const uint64_t sum = (uint64_t)(uintptr_t)lo_address(s->place[s->nin + s->call.out_begin[1]], 0);
  lo_list list;
  int n = 0, of_sum = 0, last = 0;
  OT_OK(lo_ask(b.t, plan, 0, &list));
  for (int k = 0; k < list.n; k++) {
    const lo_launch *x = &list.at[k];
    if (x->step != i || x->library || x->copies) continue;
    bool found = false;
    for (size_t w = 0; w < x->launch.size / sizeof *x->params; w++) found |= x->params[w] == sum;
    n++, of_sum += found, last = found ? n : last;
  }
  cr_assert_gt(n, 2);
  cr_assert(of_sum == 1 && last == n, "%d of %d launches take it, the last of them %d", of_sum, n,
            last);
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* initcheck takes what the copy engine stores for unwritten. Of test_gpu_random.c's seed 80559 it
 * therefore reports the first ordinary read of cmp_attn's o (24 wide, by wgmma, sixteen rows a
 * store): silu's, 16 bytes a thread. So tests/gpu_sanitize.sh has whole graphs planned for a GPU
 * without one; then no step may need a tensor map. */
Test(lower_cuda, initcheck_sees_all_writes) {
  const uint64_t seed = 80559;
  bench b = open_bench(3);
  ot *t = ot_begin(seed);
  gen_options o = {.large = true, .whole = ot_uniform(t) < 0.15, .mixed = ot_uniform(t) < 0.25};
  o.nodes = 4 + (int)ot_below(t, 12);
  load_text(&b, graph_gen(t, o));
  b.T = 482, b.B = 8;
  for (int older = 0; older < 2; older++) {
    rg_plan *plan = plan_of(&b, NULL, false, older);
    const int writer = step_of(plan, "cmp_attn"), reader = step_of(plan, "silu");
    cr_assert(writer >= 0 && reader > writer, "the seed draws another graph");
    const rgi_node *silu = &plan->graph->node[plan->step[reader].node],
                   *attn = &plan->graph->node[plan->step[writer].node];
    cr_assert_eq(silu->in[0], attn->out[0], "silu reads something else");
    const int maps = maps_of(&b, plan);
    if (older)
      cr_assert_eq(maps, 0, "%d tensor maps for an older GPU", maps);
    else if (strcmp(rgi_plan_path(plan, writer), "wgmma") == 0)
      cr_assert_gt(maps, 0);
    else
      fprintf(stderr, "this build has no wgmma kernel for f16: nothing to compare with\n");
    rg_plan_destroy(plan);
  }
  for (int i = 0; i < RGI_COUNT(examples); i++) {
    load_example(&b, examples[i], true);
    rg_plan *plan = plan_of(&b, policies[1], false, true);
    cr_assert_eq(maps_of(&b, plan), 0, "%s", examples[i]);
    rg_plan_destroy(plan);
  }
  ot_end(t);
  close_bench(&b);
}
