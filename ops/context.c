/* ops/context.c: the context: the table of stock ops, and what of this CPU they may use. */
#include "../graph/plugin.h"
#include "ops.h"
#include <stdlib.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define RGI_OP(x) extern const rg_op rgi_op_##x;
#include "op_list.h"
#undef RGI_OP

static const rg_op *const stock[] = {
#define RGI_OP(x) &rgi_op_##x,
#include "op_list.h"
#undef RGI_OP
};

static void *plain_alloc(void *user, size_t size) {
  (void)user;
  return malloc(size);
}
static void plain_free(void *user, void *ptr) {
  (void)user;
  free(ptr);
}

static int by_name(const void *a, const void *b) {
  return strcmp((*(const rg_op *const *)a)->name, (*(const rg_op *const *)b)->name);
}

static int cpu_level(void) {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  bool f16c =
      /* not every compiler's cpu_supports knows it */
      __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  __builtin_cpu_init();
  bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return avx2 ? 1 : 0;
#else
  return 0;
#endif
}

bool rgi_plain_malloc(const rg_context *ctx) {
  return ctx->host.alloc == plain_alloc;
}

rg_status rg_context_create(const rg_allocator *host, rg_context **out, rg_error *error) {
  if (!out)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "rg_context_create needs a place for the context");
  *out = NULL;
  rg_allocator a = host ? *host : (rg_allocator){.alloc = plain_alloc, .free = plain_free};
  if (!a.alloc || !a.free)
    return rgi_fail(error, RG_E_USAGE, NULL, NULL,
                    "the allocator lacks an alloc or a free function");
  rg_context *ctx = a.alloc(a.user, sizeof *ctx);
  if (!ctx) return rgi_nomem(error);
  *ctx = (rg_context){.host = a, .nop = RGI_COUNT(stock), .isa = cpu_level()};
  ctx->op = rgi_malloc(ctx, sizeof stock);
  if (!ctx->op) {
    a.free(a.user, ctx);
    return rgi_nomem(error);
  }
  memcpy(ctx->op, stock, sizeof stock);
  qsort(ctx->op, (size_t)ctx->nop, sizeof *ctx->op, by_name);
  *out = ctx;
  return RG_OK;
}

void rg_context_destroy(rg_context *ctx) {
  if (!ctx) return;
  rg_allocator a = ctx->host;
  rgi_plugins_unload(ctx);
  rgi_free(ctx, ctx->op);
  a.free(a.user, ctx);
}
