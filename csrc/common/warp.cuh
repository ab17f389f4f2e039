#pragma once

#include <cuda_runtime.h>

namespace infimm {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over each group of WIDTH neighbouring lanes, in all of them.
template <int WIDTH>
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}

// The sum of the lanes up to this one.
__device__ __forceinline__ int64_t warp_running_sum(int64_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const long long before = __shfl_up_sync(kWholeWarp, static_cast<long long>(value), offset);
    if (lane >= offset) value += before;
  }
  return value;
}

// Lane i returns the warp's sum of values[i]: 31 shuffles, where 32 separate sums would take 160.
template <int HALF = kWarpSize / 2>
__device__ __forceinline__ float warp_transposed_sum(float (&values)[2 * HALF], int lane) {
  const bool upper = lane & HALF;
  float halves[HALF];
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float kept = upper ? values[i + HALF] : values[i];
    const float given = upper ? values[i] : values[i + HALF];
    halves[i] = kept + __shfl_xor_sync(kWholeWarp, given, HALF);
  }
  if constexpr (HALF == 1) {
    return halves[0];
  } else {
    return warp_transposed_sum<HALF / 2>(halves, lane);
  }
}

}  // namespace infimm
