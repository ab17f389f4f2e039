// Attention inside windows for sm_90a. A block has three warpgroups and stays for many tiles of queries:
//   producer warp       copies queries, keys and values (TMA) and says what is next (..._schedule.cuh)
//   3 helper warps      the rows of prefix queries, CLS (..._helper.cuh)
//   2 x 4 consumer warps  everything else, on tensor cores (..._consumer.cuh)
// They meet at barriers in shared memory alone (..._shared.cuh): a full barrier says that a buffer has been
// filled, an empty one that all its readers are done.
#pragma once

#include "window_attention_consumer.cuh"
#include "window_attention_helper.cuh"

namespace infimm {

// Registers of a thread after the hand-over; together at most the 168 a thread that the launch gets.
constexpr int kConsumerRegisters = 216;
constexpr int kProducerRegisters = 72;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168, "more registers than a launch has");

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void produce(const WindowAttentionLaunch& launch,
                                        const WindowShared<HEAD_DIM>& shared) {
  using Shared = WindowShared<HEAD_DIM>;
  const WindowAttentionParams& p = launch.params;
  const bool leader = threadIdx.x == 0;
  const int heads_per_kv_head = static_cast<int>(p.num_heads / p.num_kv_heads);
  const int total = launch.num_slots * static_cast<int>(p.num_heads);
  RingPosition<WorkRing::kStages> work_at;
  RingPosition<1> query_at;
  RingPosition<kKeyStages> key_at;
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const Work work = locate(launch, index);
    if (work.num_queries + work.prefix_queries == 0) continue;
    if (leader) {
      shared.work().barriers.empty(work_at.stage).wait(work_at.parity ^ 1);
      shared.work().write(work_at.stage, work);
      const Barrier query_full = shared.query_barriers().full(0);
      shared.query_barriers().empty(0).wait(query_at.parity ^ 1);
      query_full.arrive_expect(Shared::QueryTile::kBytes);
      shared.query().copy(&launch.q, query_full, work.head, work.query_row);
      for (int tile = 0; tile < work.key_tiles(); ++tile) {
        const int stage = key_at.stage, token = work.key_row + tile * kKeyRows;
        const int kv_head = work.head / heads_per_kv_head;
        const Barrier key_full = shared.key_barriers().full(stage);
        shared.key_barriers().empty(stage).wait(key_at.parity ^ 1);
        key_full.arrive_expect(Shared::KeyTile::kBytes);
        shared.keys(stage).copy(&launch.k, key_full, kv_head, token);
        const Barrier value_full = shared.value_barriers().full(stage);
        shared.value_barriers().empty(stage).wait(key_at.parity ^ 1);
        value_full.arrive_expect(Shared::KeyTile::kBytes);
        shared.values(stage).copy(&launch.v, value_full, kv_head, token);
        key_at.advance();
      }
    }
    work_at.advance();
    query_at.advance();
    __syncwarp();
  }
  if (leader) {
    Work none = {};
    none.head = kNegativeHead;
    shared.work().barriers.empty(work_at.stage).wait(work_at.parity ^ 1);
    shared.work().write(work_at.stage, none);
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kWindowThreads, 1)
    window_attention_kernel(const __grid_constant__ WindowAttentionLaunch launch) {
  const WindowShared<HEAD_DIM> shared;
  const bool prefix = launch.params.num_prefix_tokens > 0;
  if (threadIdx.x == 0) {
    const int helpers = prefix ? kHelperWarps : 0;
    shared.work().barriers.init(kConsumerWarps + helpers);
    shared.query_barriers().init(kConsumerWarps);
    shared.key_barriers().init(kConsumerWarps + helpers);
    shared.value_barriers().init(kConsumerWarps + helpers);
    ptx::fence_mbarrier_init();
    ptx::prefetch_map(&launch.q);
    ptx::prefetch_map(&launch.k);
    ptx::prefetch_map(&launch.v);
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x < kWarpSize) {
      produce<T, HEAD_DIM>(launch, shared);
    } else if (prefix) {
      WindowHelper<T, HEAD_DIM>{launch}.run();
    }
  } else {
    ptx::take_registers<kConsumerRegisters>();
    WindowConsumer<T, HEAD_DIM>(launch, warpgroup - 1).run();
  }
}

}  // namespace infimm
