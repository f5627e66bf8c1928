/* device/gate.cuh: combine's weights, made of gates (the formulas stand in ops/combine.c).
   Additions are never fused with what expf ends with, so that every kernel gets the same bits. */
#pragma once
#include "element.cuh"

namespace rgk {

enum { SIGMOID, SOFTMAX, NONE }; /* combine's attribute */

/* The larger one; a NaN stays, and then every weight is one. */
__device__ __forceinline__ float more_gate(float most, float x) {
  return x > most || x != x ? x : most;
}
__device__ __forceinline__ float gate_sum_add(float sum, float x, float most) {
  return __fadd_rn(sum, expf(x - most));
}
/* most, sum: for softmax */
__device__ __forceinline__ float gate_weight(int act, float x, float most, float sum) {
  if (act == SOFTMAX) return expf(x - most) / sum;
  return act == SIGMOID ? 1.0f / __fadd_rn(1.0f, expf(-x)) : x;
}

} // namespace rgk
