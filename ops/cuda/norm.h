/* ops/cuda/norm.h: rmsnorm, layernorm and rope on a GPU: fills the structs of kernels/norm.h and
 * rope.h from calls. */
#ifndef RGI_CUDA_NORM_H
#define RGI_CUDA_NORM_H

#include "../../kernels/norm.h"
#include "../../kernels/rope.h"
#include "../ops.h"
#include "../rope.h"

typedef struct rgi_norm {
  const rg_arg *x, *weight, *cu, *y; /* y: the output, or d.x (NULL: not wanted) */
  const rg_arg *dy, *dw;             /* dy NULL: forward */
  bool add, add_w;
  double eps;
} rgi_norm;
rg_status rgi_cuda_norm(const rg_call *c, const rgi_norm *n, rg_cuda *x);
size_t rgi_cuda_norm_workspace(const rgi_norm *n);
const char *rgi_cuda_norm_path(const rgi_norm *n);

typedef struct rgi_layer {
  const rg_arg *x, *weight, *bias, *cu, *y; /* y: the output, or d.x (NULL: not wanted) */
  const rg_arg *dy, *dw, *db;               /* dy NULL: forward */
  bool add, add_w, add_b;
  double eps;
} rgi_layer;
rg_status rgi_cuda_layer(const rg_call *c, const rgi_layer *l, rg_cuda *x);
size_t rgi_cuda_layer_workspace(const rgi_layer *l);
const char *rgi_cuda_layer_path(const rgi_layer *l);

typedef struct rgi_rope {
  const rg_arg *x, *y, *cu, *offset; /* offset NULL: zeros; y NULL: not wanted */
  rgi_rope_scale scale;
  bool back, add;
} rgi_rope;
rg_status rgi_cuda_rope(const rgi_rope *r, rg_cuda *x);
const char *rgi_cuda_rope_path(const rgi_rope *r);

#endif
