/* kernels/blas.c: see blas.h. */
#include "blas.h"
#include "../graph/base.h"
#include <cublasLt.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

/* cuBLASLt is opened at the first product, and only there: one build then serves machines with a
 * GPU and without, and a process that has the library already (PyTorch's) is not given a second
 * one. */
#define LT_TEXT_(x) #x
#define LT_TEXT(x)  LT_TEXT_(x)
#define LT_FILE     "libcublasLt.so." LT_TEXT(CUBLAS_VER_MAJOR)

#define LT_EACH(F)                \
  F(Create)                       \
  F(Destroy)                      \
  F(MatmulDescCreate)             \
  F(MatmulDescDestroy)            \
  F(MatmulDescSetAttribute)       \
  F(MatrixLayoutCreate)           \
  F(MatrixLayoutDestroy)          \
  F(MatmulPreferenceCreate)       \
  F(MatmulPreferenceDestroy)      \
  F(MatmulPreferenceSetAttribute) \
  F(MatmulAlgoGetHeuristic)       \
  F(MatmulAlgoCheck)              \
  F(Matmul)

static struct {
  char missing[256]; /* why there are no functions; "" where there are */
#define LT_MEMBER(name) __typeof__(cublasLt##name) *name;
  LT_EACH(LT_MEMBER)
} lt;
static pthread_once_t lt_once = PTHREAD_ONCE_INIT;

static void lt_open(void) {
  void *library = dlopen(LT_FILE, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(lt.missing, sizeof lt.missing, "%s", dlerror());
    return;
  }
#define LT_FIND(name)                                    \
  *(void **)&lt.name = dlsym(library, "cublasLt" #name); \
  if (!lt.name) snprintf(lt.missing, sizeof lt.missing, LT_FILE " has no cublasLt" #name);
  LT_EACH(LT_FIND)
}

void *rgk_blas(rg_cuda *x) {
  cublasLtHandle_t handle = NULL;
  pthread_once(&lt_once, lt_open); /* also where the handle is given */
  if (x->blas && !*lt.missing) return x->blas;
  if (*lt.missing)
    rgi_fail(
        x->error, RG_E_DEVICE, NULL, NULL,
        "cuBLASLt is needed and was not found (%s); install the CUDA %d libraries or PyTorch for "
        "CUDA %d, or name their folder in LD_LIBRARY_PATH",
        lt.missing, CUBLAS_VER_MAJOR, CUBLAS_VER_MAJOR);
  else if (lt.Create(&handle) != CUBLAS_STATUS_SUCCESS)
    rgi_fail(x->error, RG_E_DEVICE, NULL, NULL, "cuBLASLt did not start");
  return x->blas = handle;
}

void rgk_blas_destroy(void *handle) {
  if (handle) lt.Destroy((cublasLtHandle_t)handle);
}

/* cuBLASLt speaks column-major: Cᵀ = op(B)ᵀ·Aᵀ, its A is our B. */
typedef struct job {
  const rgk_product *p;
  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t b, a, c;          /* with m rows */
  cublasLtMatrixLayout_t usual_a, usual_c; /* with RGK_PRODUCT_ROWS */
  cublasLtMatmulPreference_t wish;
} job;

static bool layout(cublasLtMatrixLayout_t *l, rg_dtype t, int64_t rows, int64_t columns,
                   int64_t ld) {
  cudaDataType_t type = t == RG_F32 ? CUDA_R_32F : t == RG_F16 ? CUDA_R_16F : CUDA_R_16BF;
  return lt.MatrixLayoutCreate(l, type, (uint64_t)columns, (uint64_t)rows, ld) ==
         CUBLAS_STATUS_SUCCESS;
}

static bool describe(job *j) {
  const rgk_product *p = j->p;
  const cublasOperation_t turn = p->transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const uint32_t align = 16, whole = CUBLASLT_REDUCTION_SCHEME_NONE;
  const uint64_t room = 0;
  bool ok =
      lt.MatmulDescCreate(&j->op, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
      layout(&j->b, p->dtype, p->transposed ? p->n : p->k, p->transposed ? p->k : p->n, p->ldb) &&
      layout(&j->a, p->dtype, p->m, p->k, p->lda) &&
      layout(&j->c, p->c_dtype, p->m, p->n, p->ldc) &&
      layout(&j->usual_a, p->dtype, RGK_PRODUCT_ROWS, p->k, p->k) &&
      layout(&j->usual_c, p->c_dtype, RGK_PRODUCT_ROWS, p->n, p->n) &&
      lt.MatmulPreferenceCreate(&j->wish) == CUBLAS_STATUS_SUCCESS;
  if (!ok) return false;
  lt.MatmulDescSetAttribute(j->op, CUBLASLT_MATMUL_DESC_TRANSA, &turn, sizeof turn);
  if (p->bias) {
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const cudaDataType_t type = p->dtype == RG_F16 ? CUDA_R_16F : CUDA_R_16BF;
    lt.MatmulDescSetAttribute(j->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    lt.MatmulDescSetAttribute(j->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
    lt.MatmulDescSetAttribute(j->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type);
  }
  const cublasLtMatmulPreferenceAttributes_t aligned[] = {
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
  for (int i = 0; i < 4; i++)
    lt.MatmulPreferenceSetAttribute(j->wish, aligned[i], &align, sizeof align);
  lt.MatmulPreferenceSetAttribute(j->wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                  sizeof room);
  lt.MatmulPreferenceSetAttribute(j->wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &whole,
                                  sizeof whole);
  return true;
}

static bool choose(const job *j, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t c,
                   cublasLtMatmulHeuristicResult_t *found) {
  int n = 0;
  return lt.MatmulAlgoGetHeuristic(j->handle, j->op, j->b, a, c, c, j->wish, 1, found, &n) ==
             CUBLAS_STATUS_SUCCESS &&
         n == 1;
}

static rg_status record(void *arg, void *stream) {
  const job *j = arg;
  const rgk_product *p = j->p;
  const float one = 1, zero = 0;
  cublasLtMatmulHeuristicResult_t found, fits;
  bool ok = choose(j, j->usual_a, j->usual_c, &found) &&
            lt.MatmulAlgoCheck(j->handle, j->op, j->b, j->a, j->c, j->c, &found.algo, &fits) ==
                CUBLAS_STATUS_SUCCESS &&
            fits.workspaceSize == 0;
  if (!ok && !choose(j, j->a, j->c, &found)) return RG_E_DEVICE;
  return lt.Matmul(j->handle, j->op, &one, p->b, j->b, p->a, j->a, &zero, p->c, j->c, p->c, j->c,
                   &found.algo, NULL, 0, (cudaStream_t)stream) == CUBLAS_STATUS_SUCCESS
             ? RG_OK
             : RG_E_DEVICE;
}

rg_status rgk_blas_product(rg_cuda *x, const rgk_product *p) {
  job j = {.p = p, .handle = (cublasLtHandle_t)rgk_blas(x)};
  rg_status status;
  if (p->m == 0 || p->n == 0) return RG_OK;
  if (!j.handle) return RG_E_DEVICE;
  status = describe(&j)
               ? x->library(x, record, &j)
               : rgi_fail(x->error, RG_E_DEVICE, NULL, NULL, "cuBLASLt refused a product's shape");
  if (j.wish) lt.MatmulPreferenceDestroy(j.wish);
  cublasLtMatrixLayout_t layouts[] = {j.a, j.b, j.c, j.usual_a, j.usual_c};
  for (int i = 0; i < RGI_COUNT(layouts); i++)
    if (layouts[i]) lt.MatrixLayoutDestroy(layouts[i]);
  if (j.op) lt.MatmulDescDestroy(j.op);
  return status;
}
