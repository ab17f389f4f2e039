// Shared memory of the backward kernel, what it is launched with, and the part of the problem of a block.
#pragma once

#include "common/hopper.cuh"
#include "window_attention_backward.h"
#include "window_attention_segments.cuh"

namespace infimm {

constexpr int kBackwardKeys = 128;    // of a block: 64 for each of two consumer warpgroups
constexpr int kBackwardQueries = 64;  // of a step
constexpr int kBackwardStages = 2;
constexpr int kBackwardConsumers = 2 * kWarpgroup;
constexpr int kBackwardThreads = kWarpgroup + kBackwardConsumers;

// What the kernel gets. The maps must lie in the parameters themselves.
struct WindowAttentionBackwardLaunch {
  CUtensorMap q, k, v, dout;
  WindowAttentionBackwardParams params;
  float scale_log2;       // softmax_scale * log2(e)
  int tiles_per_segment;  // of equal segments
  int num_slots;          // places for a tile of keys
};

// 128 keys of one key head, with all queries of their segment.
struct BackwardWork {
  int kv_head;
  int key_row;
  int num_keys;  // from none to kBackwardKeys
  int query_row;
  int num_queries;

  __device__ __forceinline__ int query_tiles() const {
    return (num_queries + kBackwardQueries - 1) / kBackwardQueries;
  }
};

// Of this block. By a whole warp.
__device__ __forceinline__ BackwardWork locate(const WindowAttentionBackwardLaunch& launch) {
  const WindowAttentionBackwardParams& p = launch.params;
  const int slot = blockIdx.x % launch.num_slots;
  const bool ragged = p.cu_seqlens_k != nullptr;
  const int segment = ragged ? segment_of_slot(p.cu_seqlens_k, p.num_segments, kBackwardKeys, slot)
                             : slot / launch.tiles_per_segment;
  const int tile =
      ragged ? slot - first_slot(p.cu_seqlens_k, kBackwardKeys, segment) : slot % launch.tiles_per_segment;
  const int seqlen = static_cast<int>(p.seqlen);
  const Segment queries(p.cu_seqlens_q, segment, seqlen, p.total_q);
  const Segment keys(p.cu_seqlens_k, segment, seqlen, p.total_k);
  BackwardWork work;
  work.kv_head = blockIdx.x / launch.num_slots;
  work.key_row = keys.begin + keys.prefix(p.num_prefix_tokens) + tile * kBackwardKeys;
  const int left = keys.end - work.key_row;
  work.num_keys = left < 0 ? 0 : left < kBackwardKeys ? left : kBackwardKeys;
  work.query_row = queries.begin;
  work.num_queries = queries.end - queries.begin;
  return work;
}

template <int HEAD_DIM>
struct BackwardShared {
  using KeyTile = Tile<kBackwardKeys, HEAD_DIM>;
  using QueryTile = Tile<kBackwardQueries, HEAD_DIM>;
  using GradientTile = Tile<kBackwardKeys, kBackwardQueries>;  // of the scores: a row for each key
  // lse in units of log 2, then delta, of a step's queries
  static constexpr int kStatisticsBytes = 2 * kBackwardQueries * 4;

  // Offsets in bytes; tiles first, which are multiples of 1024.
  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + KeyTile::kBytes;
  static constexpr int kQueries = kValues + KeyTile::kBytes;
  static constexpr int kDout = kQueries + kBackwardStages * QueryTile::kBytes;
  static constexpr int kGradients = kDout + kBackwardStages * QueryTile::kBytes;
  static constexpr int kStatistics = kGradients + 2 * GradientTile::kBytes;
  static constexpr int kKeyBarrier = kStatistics + kBackwardStages * kStatisticsBytes;
  static constexpr int kQueryBarriers = kKeyBarrier + Barrier::kBytes;
  static constexpr int kEnd = kQueryBarriers + BarrierRing<kBackwardStages>::kBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kBytes = kAlignment + kEnd;

  uint32_t base;

  __device__ __forceinline__ BackwardShared()
      : base((ptx::shared_window() + kAlignment - 1) / kAlignment * kAlignment) {}

  __device__ __forceinline__ KeyTile keys() const { return {base + kKeys}; }
  __device__ __forceinline__ KeyTile values() const { return {base + kValues}; }
  __device__ __forceinline__ QueryTile queries(int stage) const {
    return {base + kQueries + stage * QueryTile::kBytes};
  }
  __device__ __forceinline__ QueryTile dout(int stage) const {
    return {base + kDout + stage * QueryTile::kBytes};
  }
  __device__ __forceinline__ GradientTile gradients(int buffer) const {
    return {base + kGradients + buffer * GradientTile::kBytes};
  }
  __device__ __forceinline__ uint32_t lse(int stage) const {
    return base + kStatistics + stage * kStatisticsBytes;
  }
  __device__ __forceinline__ uint32_t delta(int stage) const { return lse(stage) + kBackwardQueries * 4; }
  __device__ __forceinline__ Barrier key_barrier() const { return {base + kKeyBarrier}; }
  __device__ __forceinline__ BarrierRing<kBackwardStages> query_barriers() const {
    return {base + kQueryBarriers};
  }
};

}  // namespace infimm
