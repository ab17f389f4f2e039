// Which part of the problem a block works on next. The producer warp finds it and hands it to the others
// through a ring in shared memory, so that only one warp waits for cu_seqlens.
#pragma once

#include "common/hopper.cuh"
#include "common/warp.cuh"
#include "window_attention.h"
#include "window_attention_segments.cuh"

namespace infimm {

constexpr int kQueryRows = 128;  // of a tile: 64 for each of two consumer warpgroups
constexpr int kKeyRows = 128;
constexpr int kNegativeHead = -1;

// What the kernel gets. The maps must lie in the parameters themselves.
struct WindowAttentionLaunch {
  CUtensorMap q, k, v;
  WindowAttentionParams params;
  float scale_log2;       // softmax_scale * log2(e)
  int tiles_per_segment;  // of equal segments
  int num_slots;          // places for a tile of queries; a ragged segment may leave its last one empty
};

// A tile of queries of one head, with all keys of its segment.
struct Work {
  int head;            // kNegativeHead: there is none left
  int query_row;       // first row of the tile, behind the prefix
  int num_queries;     // rows of the tile that exist, from none to kQueryRows
  int key_row;         // first key behind the prefix
  int num_keys;        // behind the prefix
  int prefix_queries;  // rows before query_row that this block serves too: the first tile's task
  int prefix_keys;     // rows before key_row

  __device__ __forceinline__ int key_tiles() const { return (num_keys + kKeyRows - 1) / kKeyRows; }
};

struct WorkRing {
  static constexpr int kStages = 2;
  static constexpr int kSlotBytes = 32;
  static constexpr int kBytes = kStages * kSlotBytes;
  uint32_t slots;
  BarrierRing<kStages> barriers;

  // By one thread, after it has waited for the slot to be empty.
  __device__ __forceinline__ void write(int stage, const Work& work) const {
    const uint32_t slot = slots + stage * kSlotBytes;
    ptx::store_shared_int(slot, work.head);
    ptx::store_shared_int(slot + 4, work.query_row);
    ptx::store_shared_int(slot + 8, work.num_queries);
    ptx::store_shared_int(slot + 12, work.key_row);
    ptx::store_shared_int(slot + 16, work.num_keys);
    ptx::store_shared_int(slot + 20, work.prefix_queries);
    ptx::store_shared_int(slot + 24, work.prefix_keys);
    barriers.full(stage).arrive();
  }

  // By a whole warp.
  __device__ __forceinline__ Work read(RingPosition<kStages>& at) const {
    barriers.full(at.stage).wait(at.parity);
    const uint32_t slot = slots + at.stage * kSlotBytes;
    Work work;
    work.head = ptx::load_shared_int(slot);
    work.query_row = ptx::load_shared_int(slot + 4);
    work.num_queries = ptx::load_shared_int(slot + 8);
    work.key_row = ptx::load_shared_int(slot + 12);
    work.num_keys = ptx::load_shared_int(slot + 16);
    work.prefix_queries = ptx::load_shared_int(slot + 20);
    work.prefix_keys = ptx::load_shared_int(slot + 24);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) barriers.empty(at.stage).arrive();
    at.advance();
    return work;
  }
};

// The work at place `index` of the whole launch. By a whole warp. num_queries and prefix_queries are 0 where
// there is nothing to do.
__device__ __forceinline__ Work locate(const WindowAttentionLaunch& launch, int index) {
  const WindowAttentionParams& p = launch.params;
  const int slot = index % launch.num_slots;
  const bool ragged = p.cu_seqlens_q != nullptr;
  const int segment = ragged ? segment_of_slot(p.cu_seqlens_q, p.num_segments, kQueryRows, slot)
                             : slot / launch.tiles_per_segment;
  const int tile =
      ragged ? slot - first_slot(p.cu_seqlens_q, kQueryRows, segment) : slot % launch.tiles_per_segment;
  const int seqlen = static_cast<int>(p.seqlen);
  const Segment queries(p.cu_seqlens_q, segment, seqlen, p.total_q);
  const Segment keys(p.cu_seqlens_k, segment, seqlen, p.total_k);
  const int prefix_queries = queries.prefix(p.num_prefix_tokens);

  Work work;
  work.head = index / launch.num_slots;  // blocks that run together share the keys of a head
  work.query_row = queries.begin + prefix_queries + tile * kQueryRows;
  const int left = queries.end - work.query_row;
  work.num_queries = left < 0 ? 0 : left < kQueryRows ? left : kQueryRows;
  work.prefix_queries = tile == 0 ? prefix_queries : 0;
  work.prefix_keys = keys.prefix(p.num_prefix_tokens);
  work.key_row = keys.begin + work.prefix_keys;
  work.num_keys = keys.end - work.key_row;
  return work;
}

}  // namespace infimm
