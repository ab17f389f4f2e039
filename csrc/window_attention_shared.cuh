// Shared memory of the window-attention kernel.
#pragma once

#include "window_attention_schedule.cuh"

namespace infimm {

constexpr int kConsumerWarpgroups = 2;
constexpr int kConsumerWarps = kConsumerWarpgroups * kWarpgroup / kWarpSize;
constexpr int kHelperWarps = 3;
constexpr int kWindowThreads = (1 + kConsumerWarpgroups) * kWarpgroup;
constexpr int kKeyStages = 2;

template <int HEAD_DIM>
struct WindowShared {
  using QueryTile = Tile<kQueryRows, HEAD_DIM>;
  using KeyTile = Tile<kKeyRows, HEAD_DIM>;
  static constexpr int kRow = QueryTile::kBoxes * QueryTile::kBoxChannels;  // floats of a prefix query

  // Offsets in bytes; tiles first, which are multiples of 1024.
  static constexpr int kQuery = 0;
  static constexpr int kKeys = kQuery + QueryTile::kBytes;
  static constexpr int kValues = kKeys + kKeyStages * KeyTile::kBytes;
  static constexpr int kWork = kValues + kKeyStages * KeyTile::kBytes;
  static constexpr int kWorkBarriers = kWork + WorkRing::kBytes;
  static constexpr int kQueryBarriers = kWorkBarriers + BarrierRing<WorkRing::kStages>::kBytes;
  static constexpr int kKeyBarriers = kQueryBarriers + BarrierRing<1>::kBytes;
  static constexpr int kValueBarriers = kKeyBarriers + BarrierRing<kKeyStages>::kBytes;
  static constexpr int kPrefix = (kValueBarriers + BarrierRing<kKeyStages>::kBytes + 127) / 128 * 128;
  // Per helper warp and prefix query: the query, the weighted sum of values, the largest score, the sum.
  static constexpr int kStateFloats = 2 * kRow + 4;
  static constexpr int kPrefixBytes = kHelperWarps * kWindowAttentionMaxPrefix * kStateFloats * 4;
  static constexpr int kAlignment = 1024;
  // What a launch asks for. Without prefix tokens nobody uses the states.
  static constexpr int bytes(bool prefix) { return kAlignment + kPrefix + (prefix ? kPrefixBytes : 0); }

  uint32_t base;

  __device__ __forceinline__ WindowShared()
      : base((ptx::shared_window() + kAlignment - 1) / kAlignment * kAlignment) {}

  __device__ __forceinline__ QueryTile query() const { return {base + kQuery}; }
  __device__ __forceinline__ KeyTile keys(int stage) const {
    return {base + kKeys + stage * KeyTile::kBytes};
  }
  __device__ __forceinline__ KeyTile values(int stage) const {
    return {base + kValues + stage * KeyTile::kBytes};
  }
  __device__ __forceinline__ WorkRing work() const { return {base + kWork, {base + kWorkBarriers}}; }
  __device__ __forceinline__ BarrierRing<1> query_barriers() const { return {base + kQueryBarriers}; }
  __device__ __forceinline__ BarrierRing<kKeyStages> key_barriers() const { return {base + kKeyBarriers}; }
  __device__ __forceinline__ BarrierRing<kKeyStages> value_barriers() const {
    return {base + kValueBarriers};
  }
  __device__ __forceinline__ uint32_t prefix_state(int helper, int query) const {
    return base + kPrefix + (helper * static_cast<int>(kWindowAttentionMaxPrefix) + query) * kStateFloats * 4;
  }
};

}  // namespace infimm
