/* tests/unit/test_lower_gpus.c: plans for each compute capability from 8.0 on, without a GPU.

     shared memory   no launch asks for more than a block has there, whatever the widths and groups
     choice_by_relu  reserves what the kernels that take it use, and no others' memory
     runs_on         a plan is refused, by name, where its kernels or its shared memory are missing

   What blocks have is written here as NVIDIA's programming guide has it, not as the library does.
 */
#include "../harness/lower.h"
#include "run_util.h"
#include <unistd.h>

#ifdef REGRAPH_CUDA
#include "../../kernels/tma.h"
/* In place of kernels/tma.c, which needs a driver. */
rg_status rgk_map_make(rgk_map *map, const rgk_map_of *of, rg_error *e) {
  (void)of, (void)e;
  memset(map, 0, sizeof *map);
  return RG_OK;
}
#endif

static const struct {
  int cc, sms, kb; /* of a block */
} gpus[] = {{80, 108, 163}, {86, 82, 99},    {89, 128, 99},
            {90, 132, 227}, {100, 148, 227}, {120, 170, 99}};
enum { GPUS = RGI_COUNT(gpus) };

typedef struct bench {
  ot *t;
  rg_context *ctx;
  char profile[64];
  int launches, skipped;
} bench;

static bench open_bench(void) {
  rg_error e = {0};
  bench b = {.t = ot_begin(1)};
  CR_OK(rg_context_create(NULL, &b.ctx, &e), &e);
  snprintf(b.profile, sizeof b.profile, "/tmp/regraph_gpus_XXXXXX");
  const int file = mkstemp(b.profile);
  cr_assert_geq(file, 0);
  close(file);
  return b;
}
static void close_bench(bench *b) {
  unlink(b->profile);
  rg_context_destroy(b->ctx);
  ot_end(b->t);
}

typedef struct heads {
  int H, KH, D, DV;
  const char *dtype;
} heads;

/* h NULL: heads as the example has them. */
static rg_plan *plan_for(const bench *b, const char *example, const heads *h, int gpu) {
  rg_error e = {0};
  rg_spec *spec = NULL;
  rg_plan *plan = NULL;
  char path[512];
  FILE *f = fopen(b->profile, "w");
  cr_assert(f);
  fprintf(f,
          "{ \"regraph_profile\": 1, \"name\": \"one\", \"doc\": \"a test's\", "
          "\"device\": \"cuda\", \"compute_capability\": %d, \"multiprocessors\": %d, "
          "\"special_gops\": 1000, \"bandwidth_gbs\": 900, \"step_us\": 3, \"memory\": \"80GB\", "
          "\"efficiency\": 0.5, "
          "\"matrix_gflops\": { \"f32\": 20000, \"f16\": 100000, \"bf16\": 100000 } }\n",
          gpus[gpu].cc, gpus[gpu].sms);
  cr_assert_eq(fclose(f), 0);
  const heads none = {0};
  const heads *of = h ? h : &none;
  const rg_binding of_spec[] = {{"H", of->H, NULL},
                                {"KH", of->KH, NULL},
                                {"D", of->D, NULL},
                                {"DV", of->DV, NULL},
                                {"dtype", 0, of->dtype}},
                   of_plan[] = {{"T", 4096, NULL}, {"B", 3, NULL}};
  const rg_plan_options o = {.set = of_plan,
                             .nset = RGI_COUNT(of_plan),
                             .device = "cuda",
                             .profile_path = b->profile,
                             .pack_seconds = 0.1};
  snprintf(path, sizeof path, "%s/examples/%s.json", RG_SOURCE_DIR, example);
  CR_OK(rg_spec_load_file(b->ctx, path, of_spec, h ? RGI_COUNT(of_spec) : 0, &spec, &e), &e);
  CR_OK(rg_plan_create(spec, NULL, &o, &plan, &e), &e);
  rg_spec_destroy(spec);
  return plan;
}

/* The first launch that asks for more than `kb`, in words, or NULL. */
static const char *too_much(bench *b, const rg_plan *plan, int kb) {
  lo_list list;
  const char *wrong = NULL;
  OT_OK(lo_ask(b->t, plan, 0, &list));
  b->skipped += list.skipped;
  for (int i = 0; i < list.n; i++) {
    const lo_launch *x = &list.at[i];
    if (x->library || x->copies) continue;
    b->launches++;
    if (x->launch.shared <= (uint32_t)kb << 10 || wrong) continue;
    const char *path = rgi_plan_path(plan, x->step);
    wrong = ot_text(b->t, "%s (%s): %u bytes of shared memory, a block has %d KB",
                    plan->graph->node[plan->step[x->step].node].name, path ? path : "-",
                    x->launch.shared, kb);
  }
  return wrong;
}

static const int widths[][2] = {{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}};
static const int groups[][2] = {{8, 8}, {16, 4}, {32, 2}, {32, 1}}; /* 1, 4, 16, 32 to a KV head */
static const char *const dtypes[] = {"bf16", "f16"};
static const char *const examples[] = {"nsa", "nsa_linear", "dense_causal"};

Test(lower_gpus, shared_memory) {
  bench b = open_bench();
  int by_mma = 0;
  for (int gpu = 0; gpu < GPUS; gpu++)
    for (int w = 0; w < RGI_COUNT(widths); w++)
      for (int g = 0; g < RGI_COUNT(groups); g++)
        for (int d = 0; d < RGI_COUNT(dtypes); d++)
          for (int i = 0; i < RGI_COUNT(examples); i++) {
            const heads h = {groups[g][0], groups[g][1], widths[w][0], widths[w][1], dtypes[d]};
            rg_plan *plan = plan_for(&b, examples[i], &h, gpu);
            cr_assert_eq(plan->gpu.cc, gpus[gpu].cc);
            const char *wrong = too_much(&b, plan, gpus[gpu].kb);
            cr_assert(!wrong, "%s, %d/%d heads of %d/%d, %s, %d.%d: %s", examples[i], h.H, h.KH,
                      h.D, h.DV, h.dtype, gpus[gpu].cc / 10, gpus[gpu].cc % 10, wrong);
            for (int32_t s = 0; s < plan->nstep; s++) {
              const char *path = rgi_plan_path(plan, s);
              by_mma += path && strncmp(path, "mma", 3) == 0;
            }
            rg_plan_destroy(plan);
          }
  fprintf(stderr, "%d launches, %d steps skipped, %d steps by mma\n", b.launches, b.skipped,
          by_mma);
  cr_assert(b.launches > 0 && by_mma > 0);
#ifdef REGRAPH_CUDA
  cr_assert_eq(b.skipped, 0);
#endif
  close_bench(&b);
}

/* Where the larger GPU's tiles do not fit the smaller, which is therefore to be refused: heads of
 * 256 by mma, for 8.0. */
Test(lower_gpus, tiles_of_a_larger_gpu_do_not_fit) {
  bench b = open_bench();
  const heads h = {16, 4, 256, 256, "bf16"};
  rg_plan *plan = plan_for(&b, "dense_causal", &h, 0);
  const char *path = rgi_plan_path(plan, 0);
  if (strncmp(path, "mma", 3) == 0)
    cr_assert(too_much(&b, plan, 99), "for 8.0 and no launch above 99 KB");
  else
    fprintf(stderr, "this build has no mma kernel for heads of 256: nothing to compare with\n");
  cr_assert(!too_much(&b, plan, 163));
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* Hopper's kernels write all scores, the plain ones 64 queries' best 2048 a block. */
Test(lower_gpus, choice_by_relu) {
  bench b = open_bench();
  rg_plan *plan = plan_for(&b, "variants/dsa", NULL, 3);
  int32_t s = 0;
  while (strcmp(plan->graph->node[plan->step[s].node].op->name, "topk") != 0) s++;
  const bool scores = strcmp(rgi_plan_path(plan, s), "wgmma") == 0;
  const int64_t blocks = 4096 / 64 + 3 + 1;
  if (!scores) fprintf(stderr, "this build has no kernel for scores by relu\n");
  cr_assert_eq(plan->step[s].workspace_size,
               scores ? INT64_C(4096) * 4096 * 4 : blocks * 64 * 2048 * 8, "%lld bytes",
               (long long)plan->step[s].workspace_size);
  rg_plan_destroy(plan);
  close_bench(&b);
}

/* Rows: the plan's; columns: the GPU's that is there. A newer one has an older one's kernels, but
 * for Hopper's, where a block has the shared memory. */
Test(lower_gpus, runs_on) {
  static const char runs[GPUS][GPUS + 1] = {
      /* 8.0 6 9 9.0 10.0 12.0 */
      "y--yy-", /* 8.0 */
      "-yyyyy", /* 8.6 */
      "--yyyy", /* 8.9 */
      "---y--", /* 9.0 */
      "----y-", /* 10.0 */
      "-----y"  /* 12.0 */
  };
  bench b = open_bench();
  const heads h = {8, 8, 64, 64, "bf16"};
  for (int i = 0; i < GPUS; i++) {
    rg_plan *plan = plan_for(&b, "dense_causal", &h, i);
    for (int k = 0; k < GPUS; k++) {
      rg_error e = {0};
      char of_plan[16], of_gpu[16];
      const rg_gpu here = {.cc = gpus[k].cc, .sms = gpus[k].sms};
      const rg_status status = rgi_plan_runs_on(plan, &here, &e);
      snprintf(of_plan, sizeof of_plan, "%d.%d", gpus[i].cc / 10, gpus[i].cc % 10);
      snprintf(of_gpu, sizeof of_gpu, "%d.%d", gpus[k].cc / 10, gpus[k].cc % 10);
      if (runs[i][k] == 'y') {
        cr_assert_eq(status, RG_OK, "a plan for %s on %s: %s", of_plan, of_gpu, e.message);
        cr_assert_geq(gpus[k].kb, gpus[i].kb, "%s on %s", of_plan, of_gpu);
        continue;
      }
      cr_assert_eq(status, RG_E_DEVICE, "a plan for %s on %s", of_plan, of_gpu);
      cr_assert(strstr(e.message, of_plan) && strstr(e.message, of_gpu), "%s", e.message);
      if (gpus[k].cc > gpus[i].cc && gpus[i].cc != 90)
        cr_assert(strstr(e.message, "shared memory"), "%s", e.message);
    }
    rg_plan_destroy(plan);
  }
  close_bench(&b);
}
