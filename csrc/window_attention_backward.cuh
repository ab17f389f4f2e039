// The backward of attention inside windows for sm_90a: a block for every 128 keys of a key head. Of its three
// warpgroups the first one's warp 0 copies keys, values, queries and dout (TMA) and its warp 1 lse and delta;
// the other two multiply (..._backward_consumer.cuh).
#pragma once

#include "window_attention_backward_consumer.cuh"

namespace infimm {

constexpr float kBackwardLog2E = 1.4426950408889634f;
// Registers of a thread after the hand-over; together at most the 168 a thread that the launch gets.
constexpr int kBackwardConsumerRegisters = 232;
constexpr int kBackwardProducerRegisters = 40;
static_assert(kBackwardProducerRegisters + 2 * kBackwardConsumerRegisters <= 3 * 168,
              "more registers than a launch has");

// Calls step(head, first query of the segment, stage) for every step of the block, once its stage is empty.
template <int HEAD_DIM, typename Step>
__device__ __forceinline__ void for_each_step(const WindowAttentionBackwardLaunch& launch,
                                              const BackwardWork& work,
                                              const BackwardShared<HEAD_DIM>& shared, Step step) {
  const int group = static_cast<int>(launch.params.num_heads / launch.params.num_kv_heads);
  RingPosition<kBackwardStages> at;
  for (int i = 0; i < group; ++i) {
    for (int tile = 0; tile < work.query_tiles(); ++tile) {
      shared.query_barriers().empty(at.stage).wait(at.parity ^ 1);
      step(work.kv_head * group + i, tile * kBackwardQueries, at.stage);
      at.advance();
    }
  }
}

// By one thread.
template <int HEAD_DIM>
__device__ __forceinline__ void copy_tiles(const WindowAttentionBackwardLaunch& launch,
                                           const BackwardWork& work, const BackwardShared<HEAD_DIM>& shared) {
  using Shared = BackwardShared<HEAD_DIM>;
  shared.key_barrier().arrive_expect(2 * Shared::KeyTile::kBytes);
  shared.keys().copy(&launch.k, shared.key_barrier(), work.kv_head, work.key_row);
  shared.values().copy(&launch.v, shared.key_barrier(), work.kv_head, work.key_row);
  for_each_step<HEAD_DIM>(launch, work, shared, [&](int head, int query, int stage) {
    const Barrier full = shared.query_barriers().full(stage);
    full.arrive_expect(2 * Shared::QueryTile::kBytes);
    shared.queries(stage).copy(&launch.q, full, head, work.query_row + query);
    shared.dout(stage).copy(&launch.dout, full, head, work.query_row + query);
  });
}

// By one warp. Queries that do not exist get an lse of +inf, which makes their weights 0.
template <int HEAD_DIM>
__device__ __forceinline__ void copy_statistics(const WindowAttentionBackwardLaunch& launch,
                                                const BackwardWork& work,
                                                const BackwardShared<HEAD_DIM>& shared) {
  const WindowAttentionBackwardParams& p = launch.params;
  for_each_step<HEAD_DIM>(launch, work, shared, [&](int head, int query, int stage) {
    for (int i = threadIdx.x % kWarpSize; i < kBackwardQueries; i += kWarpSize) {
      const bool exists = query + i < work.num_queries;
      const int64_t from = head * p.total_q + work.query_row + query + i;
      ptx::store_shared_float(shared.lse(stage) + i * 4,
                              exists ? __ldg(p.lse + from) * kBackwardLog2E : INFINITY);
      ptx::store_shared_float(shared.delta(stage) + i * 4, exists ? __ldg(p.delta + from) : 0.0f);
    }
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().full(stage).arrive();
  });
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    window_attention_backward_kernel(const __grid_constant__ WindowAttentionBackwardLaunch launch) {
  const BackwardShared<HEAD_DIM> shared;
  const BackwardWork work = locate(launch);
  if (work.num_keys == 0) return;
  if (threadIdx.x == 0) {
    shared.key_barrier().init(1);
    shared.query_barriers().init(kBackwardConsumers / kWarpSize, 2);
    ptx::fence_mbarrier_init();
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
    ptx::prefetch_map(&launch.dout);
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<kBackwardProducerRegisters>();
    if (threadIdx.x == 0) {
      copy_tiles<HEAD_DIM>(launch, work, shared);
    } else if (threadIdx.x / kWarpSize == 1) {
      copy_statistics<HEAD_DIM>(launch, work, shared);
    }
  } else {
    ptx::take_registers<kBackwardConsumerRegisters>();
    BackwardConsumer<T, HEAD_DIM>(launch, work, warpgroup - 1).run();
  }
}

}  // namespace infimm
