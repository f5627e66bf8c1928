/* ops/kv_step.c: kv_append and the kv_compress of what it appends to as one node, which the fuse
 * pass makes of them on a GPU: the same bits. */
#include "compress.h"
#include "cuda/paged.h"
#include "part.h"

extern const rg_op rgi_op_kv_append, rgi_op_kv_compress;

static const rg_port in[] = {
    {"k", "T,KH,D", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "keys of this step"},
    {"v", "T,KH,E", RG_PORT_ROWS, RG_D_FLOAT, 'F', -1, "values of this step"},
    {"cu_seqlens", "B1", RG_PORT_SEQLENS, RG_D(RG_I32), 0, -1, "starts of the sequences"},
    RGI_PAGED_IN,
    RGI_KV_STATE_IN,
};
static const rg_port out[] = {
    RGI_KV_STATE_OUT,
};

static void cost(const rg_call *c, rg_cost *sum) {
  rgi_part p;
  rgi_part_of(c, &rgi_op_kv_append, &p);
  rgi_part_cost(&p, sum);
  rgi_part_of(c, &rgi_op_kv_compress, &p);
  rgi_part_cost(&p, sum);
}

static rg_status steps(const rg_call *c, rg_cuda *x) {
  rgi_part append, compress;
  rgi_part_of(c, &rgi_op_kv_append, &append);
  rgi_part_of(c, &rgi_op_kv_compress, &compress);
  return rgi_cuda_kv_step(&append.call, &compress.call, x);
}

static const char *path(const rg_call *c) {
  (void)c;
  return "16-byte vectors; mean";
}

const rg_op rgi_op_kv_step = {
    .abi = RG_OP_ABI,
    .name = "kv_step",
    .doc = "kv_append and kv_compress of the same caches",
    .flags = RG_OP_STATE | RG_OP_INTERNAL,
    .in = in,
    .nin = RGI_COUNT(in),
    .out = out,
    .nout = RGI_COUNT(out),
    .attrs = rgi_compress_attrs,
    .nattr = RGI_CMP_NATTR,
    .cost = cost,
    .cuda_steps = steps,
    .cuda_path = path,
};
