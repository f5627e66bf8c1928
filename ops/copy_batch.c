/* ops/copy_batch.c: page_copy and the paged_batch that is told of a cache by what it leaves, as one
 * node, which the fuse pass makes of them on a GPU: the one looks at pages, the other at the shape
 * alone. */
#include "../kernels/paged.h"
#include "cuda/paged.h"
#include "part.h"

extern const rg_op rgi_op_page_copy, rgi_op_paged_batch;

#define ANY RG_D_FLOAT | RG_D(RG_I32)
/* Ports begin with page_copy's. */
static const rg_port in[] = {
    {"cache", "*", RG_PORT_LIST | RG_PORT_STATE, ANY, 0, -1, "caches, axis 0 counts pages"},
    {"first.pages", "N,2", 0, RG_D(RG_I32), 0, -1, "source and target of each copy, or -1 and -1"},
    {"rows", "*", 0, ANY, 0, -1, "as paged_batch's"},
    {"lengths", "B", 0, RG_D(RG_I32), 0, -1, "as paged_batch's"},
    {"context", "B", 0, RG_D(RG_I32), 0, -1, "as paged_batch's"},
    {"pages", "B,M", 0, RG_D(RG_I32), 0, -1, "each sequence's pages, in order"},
};
static const rg_port out[] = {
    {"cache", "*", RG_PORT_LIST | RG_PORT_STATE, ANY, 0, -1, "the caches with those pages copied"},
    {"cu_seqlens", "B+1", 0, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    {"offset", "B", 0, RG_D(RG_I32), 0, -1, "as paged_batch's"},
    {"context", "B", 0, RG_D(RG_I32), 0, -1, "context, 0 for a sequence with a fault"},
    {"pages", "B,M", 0, RG_D(RG_I32), 0, -1, "pages in use, the others -1"},
    {"last", "B", 0, RG_D(RG_I32), 0, -1, "row of each sequence's last token, or -1"},
};
static const rg_attr attrs[] = {
    {"own", RG_ATTR_INT, true, 0, 65535, 0, NULL, "the cache that the tables are for"},
};

static void batch_of(const rg_call *c, rgi_part *p) {
  rgi_part_of(c, &rgi_op_paged_batch, p);
  p->in[p->in_begin[RGI_BATCH_CACHE]] = *rgi_in_at(c, 0, (int)c->attr[0].i);
}

static void cost(const rg_call *c, rg_cost *sum) {
  rgi_part p;
  rgi_op_page_copy.cost(c, sum);
  batch_of(c, &p);
  rgi_part_cost(&p, sum);
}

static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgi_part p;
  batch_of(c, &p);
  return rgi_cuda_copy_batch(c, &p.call, x);
}

static rg_status tell(const rg_call *c, const int32_t *number) {
  rgi_part p;
  if (number[0] >= RGK_COPY_PAGE) return rgi_op_page_copy.rules->fault(c, number);
  batch_of(c, &p);
  return rgi_op_paged_batch.rules->fault(&p.call, number);
}

const rg_op rgi_op_copy_batch = {.abi = RG_OP_ABI,
                                 .name = "copy_batch",
                                 .doc = "page_copy, and paged_batch of one of its caches",
                                 .flags = RG_OP_STATE | RG_OP_INTERNAL,
                                 .in = in,
                                 .nin = RGI_COUNT(in),
                                 .out = out,
                                 .nout = RGI_COUNT(out),
                                 .attrs = attrs,
                                 .nattr = RGI_COUNT(attrs),
                                 .cost = cost,
                                 .cuda_steps = steps,
                                 .cuda_path = rgi_cuda_paged_path,
                                 .rules = &(const rgi_rules){.fault = tell}};
