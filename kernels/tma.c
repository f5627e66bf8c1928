/* kernels/tma.c: see tma.h. The one driver call is found at run time, so nothing links to
 * libcuda. */
#include "tma.h"
#include "../graph/base.h"
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <string.h>

rg_status rgk_map_make(rgk_map *map, const rgk_map_of *of, rg_error *e) {
  void *found = NULL;
  enum cudaDriverEntryPointQueryResult query;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                       &query) != cudaSuccess ||
      !found)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL, "the NVIDIA driver lacks cuTensorMapEncodeTiled");
  const cuuint64_t size = of->dtype == RG_F32 || of->dtype == RG_I32 ? 4 : 2;
  const CUtensorMapDataType type = of->dtype == RG_F32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : of->dtype == RG_I32 ? CU_TENSOR_MAP_DATA_TYPE_INT32
                                   : of->dtype == RG_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMapSwizzle swizzle = of->swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : of->swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : of->swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t dim[RGK_MAP_RANK], stride[RGK_MAP_RANK];
  cuuint32_t box[RGK_MAP_RANK], step[RGK_MAP_RANK];
  for (int i = 0; i < of->rank; i++) {
    dim[i] = (cuuint64_t)of->dim[i];
    box[i] = (cuuint32_t)of->box[i];
    step[i] = 1;
    /* an axis of one element may have any stride, even 0; the driver wants an aligned one */
    if (i > 0) stride[i - 1] = of->dim[i] > 1 ? (cuuint64_t)of->stride[i] * size : 16;
  }
  CUtensorMap m;
  PFN_cuTensorMapEncodeTiled_v12000 encode = (PFN_cuTensorMapEncodeTiled_v12000)(uintptr_t)found;
  CUresult r = encode(&m, type, (cuuint32_t)of->rank, (void *)(uintptr_t)of->data, dim, stride, box,
                      step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS)
    return rgi_fail(e, RG_E_DEVICE, NULL, NULL,
                    "cuTensorMapEncodeTiled refused a tensor (error %d)", (int)r);
  memcpy(map, &m, sizeof *map);
  return RG_OK;
}
