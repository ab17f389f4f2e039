// Segments of packed tokens, and the tiles that they are cut into.
#pragma once

#include "common/warp.cuh"

namespace infimm {

// Rows [begin, end) of a tensor of `total` rows. On a GPU nobody has checked the values of cu_seqlens.
struct Segment {
  int begin, end;
  __device__ __forceinline__ Segment(const int32_t* cu_seqlens, int index, int seqlen, int64_t total) {
    const int last = static_cast<int>(total);
    const int first = cu_seqlens ? __ldg(cu_seqlens + index) : index * seqlen;
    const int after = cu_seqlens ? __ldg(cu_seqlens + index + 1) : first + seqlen;
    begin = first < 0 ? 0 : first > last ? last : first;
    end = after < begin ? begin : after > last ? last : after;
  }
  __device__ __forceinline__ int prefix(int64_t num_prefix_tokens) const {
    const int length = end - begin;
    return length < num_prefix_tokens ? length : static_cast<int>(num_prefix_tokens);
  }
};

// Places for tiles of `rows` rows: those of segment s start at cu_seqlens[s] / rows + s, which leaves room
// for all its tiles however it lies, and needs no table. The last place of a segment may stay empty.
__device__ __forceinline__ int first_slot(const int32_t* cu_seqlens, int rows, int segment) {
  return __ldg(cu_seqlens + segment) / rows + segment;
}

// The last segment that starts at or before `slot`. By a whole warp: each round asks 32 segments.
__device__ __forceinline__ int segment_of_slot(const int32_t* cu_seqlens, int64_t num_segments, int rows,
                                               int slot) {
  const int lane = threadIdx.x % kWarpSize;
  int low = 0, high = static_cast<int>(num_segments);  // the answer is in [low, high)
  while (high - low > 1) {
    const int step = (high - low + kWarpSize - 1) / kWarpSize;
    const int probe = low + lane * step;
    const bool starts_before = probe < high && first_slot(cu_seqlens, rows, probe) <= slot;
    const int count = __popc(__ballot_sync(kWholeWarp, starts_before));
    if (count == 0) return 0;  // only values that are no cu_seqlens do that
    low += (count - 1) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

}  // namespace infimm
