// A consumer warpgroup of the backward: 64 keys of the block's 128, all queries of all heads of the key head,
// 64 queries a step. Everything is transposed, a row for each key, so that the weights and the gradients of
// the scores come out of two products as the left operands of the next two. dq alone sums over keys: for it
// both warpgroups put their gradients of the scores into shared memory, and take turns in multiplying all 128
// keys.
#pragma once

#include "window_attention_backward_shared.cuh"

namespace infimm {

constexpr int kBackwardBarrier = 1;

template <typename T, int HEAD_DIM>
struct BackwardConsumer {
  using Shared = BackwardShared<HEAD_DIM>;
  const WindowAttentionBackwardLaunch& launch;
  const BackwardWork work;
  const Shared shared;
  const int warpgroup;

  float scores[kBackwardQueries / 2];     // then the weights p
  float gradients[kBackwardQueries / 2];  // of the weights, then of the scores: ds
  uint32_t packed_weights[kBackwardQueries / 4];
  uint32_t packed_gradients[kBackwardQueries / 4];
  float dk[HEAD_DIM / 2], dv[HEAD_DIM / 2], dq[HEAD_DIM / 2];

  __device__ __forceinline__ BackwardConsumer(const WindowAttentionBackwardLaunch& l, const BackwardWork& w,
                                              int group)
      : launch(l), work(w), warpgroup(group) {}

  // A thread has the keys row(0) and row(1) of the block, and of every 8 queries 2 * (t % 4) + {0, 1}.
  __device__ __forceinline__ int row(int r) const {
    return warpgroup * 64 + threadIdx.x % kWarpgroup / kWarpSize * 16 + threadIdx.x % kWarpSize / 4 + 8 * r;
  }

  static __device__ __forceinline__ void meet_consumers() {
    ptx::named_barrier(kBackwardBarrier, kBackwardConsumers);
  }

  // Rows from `count` on belong to other segments, or to none: what they hold may be no number.
  template <typename AnyTile>
  static __device__ __forceinline__ void clear_rows(const AnyTile& tile, int count, int rows) {
    constexpr int kPieces = AnyTile::kBoxes * 8;
    const int thread = threadIdx.x - kWarpgroup;
    for (int i = count * kPieces + thread; i < rows * kPieces; i += kBackwardConsumers)
      ptx::store_shared_16(tile.piece(i / kPieces, i % kPieces), uint4{0, 0, 0, 0});
  }

  // scores = k q^T and gradients = v dout^T, in flight.
  __device__ __forceinline__ void multiply_queries(int stage) {
#pragma unroll
    for (int step = 0; step < Shared::KeyTile::kSteps; ++step)
      ptx::wgmma<T, kBackwardQueries>(scores, shared.keys().by_channel(warpgroup * 64, step),
                                      shared.queries(stage).by_channel(0, step), step > 0);
    ptx::wgmma_commit();
#pragma unroll
    for (int step = 0; step < Shared::KeyTile::kSteps; ++step)
      ptx::wgmma<T, kBackwardQueries>(gradients, shared.values().by_channel(warpgroup * 64, step),
                                      shared.dout(stage).by_channel(0, step), step > 0);
    ptx::wgmma_commit();
  }

  // p = 2^(score * scale - lse), 0 for keys that do not exist.
  __device__ __forceinline__ void to_weights(int stage) {
#pragma unroll
    for (int i = 0; i < kBackwardQueries / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int query = i * 8 + threadIdx.x % 4 * 2 + c;
        const float lse = ptx::load_shared_float(shared.lse(stage) + query * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& score = scores[4 * i + 2 * r + c];
          score = row(r) < work.num_keys ? ptx::exp2_approx(fmaf(score, launch.scale_log2, -lse)) : 0.0f;
        }
      }
    }
  }

  // ds = p * (dp - delta)
  __device__ __forceinline__ void to_score_gradients(int stage) {
#pragma unroll
    for (int i = 0; i < kBackwardQueries / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int query = i * 8 + threadIdx.x % 4 * 2 + c;
        const float delta = ptx::load_shared_float(shared.delta(stage) + query * 4);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = 4 * i + 2 * r + c;
          gradients[at] = row(r) < work.num_keys ? scores[at] * (gradients[at] - delta) : 0.0f;
        }
      }
    }
  }

  // sums += packed rows, in flight.
  __device__ __forceinline__ void add_rows(float (&sums)[HEAD_DIM / 2],
                                           const uint32_t (&packed)[kBackwardQueries / 4],
                                           const typename Shared::QueryTile& rows) {
#pragma unroll
    for (int step = 0; step < kBackwardQueries / 16; ++step) {
      const uint32_t a[4] = {packed[4 * step], packed[4 * step + 1], packed[4 * step + 2],
                             packed[4 * step + 3]};
      ptx::wgmma_transposed<T, HEAD_DIM>(sums, a, rows.by_row(step));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void share_gradients(int buffer) {
#pragma unroll
    for (int i = 0; i < kBackwardQueries / 8; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
        ptx::store_shared_int(shared.gradients(buffer).piece(row(r), i) + threadIdx.x % 4 * 4,
                              static_cast<int>(packed_gradients[2 * i + r]));
    }
    ptx::fence_async_proxy();
    meet_consumers();
  }

  // dq = ds^T k over all keys of the block, in flight.
  __device__ __forceinline__ void multiply_gradients(int buffer) {
#pragma unroll
    for (int step = 0; step < kBackwardKeys / 16; ++step)
      ptx::wgmma_both_transposed<T, HEAD_DIM>(dq, shared.gradients(buffer).by_row(step),
                                              shared.keys().by_row(step), step > 0);
    ptx::wgmma_commit();
  }

  // A thread has two queries of the step here.
  __device__ __forceinline__ void add_dq(int head, int first_query) {
    const WindowAttentionBackwardParams& p = launch.params;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_query + row(r) - warpgroup * 64;
      if (query >= work.num_queries) continue;
      const int64_t token = work.query_row + query;
      float* sum = p.dq_sum + (token * p.num_heads + head) * HEAD_DIM + threadIdx.x % 4 * 2;
#pragma unroll
      for (int c = 0; c < HEAD_DIM / 8; ++c)
        ptx::add_global_pair(sum + c * 8, dq[4 * c + 2 * r], dq[4 * c + 2 * r + 1]);
    }
  }

  __device__ __forceinline__ void add_queries(int head, int tile, int stage, int buffer) {
    const int count = work.num_queries - tile * kBackwardQueries;
    if (count < kBackwardQueries) {
      clear_rows(shared.queries(stage), count, kBackwardQueries);
      clear_rows(shared.dout(stage), count, kBackwardQueries);
      ptx::fence_async_proxy();
      meet_consumers();
    }
    ptx::hold(scores);
    ptx::hold(gradients);
    ptx::wgmma_fence();
    multiply_queries(stage);
    ptx::wgmma_wait<1>();
    ptx::hold(scores);
    to_weights(stage);
    pack<T>(scores, packed_weights);
    ptx::wgmma_wait<0>();
    ptx::hold(gradients);
    to_score_gradients(stage);
    pack<T>(gradients, packed_gradients);
    share_gradients(buffer);
    const bool my_turn = buffer == warpgroup;
    ptx::hold(packed_weights);
    ptx::hold(packed_gradients);
    ptx::hold(dk);
    ptx::hold(dv);
    ptx::wgmma_fence();
    add_rows(dv, packed_weights, shared.dout(stage));
    add_rows(dk, packed_gradients, shared.queries(stage));
    ptx::wgmma_wait<0>();
    ptx::hold(dk);
    ptx::hold(dv);
    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().empty(stage).arrive();
    if (my_turn) {
      ptx::hold(dq);
      ptx::wgmma_fence();
      multiply_gradients(buffer);
      ptx::wgmma_wait<0>();
      ptx::hold(dq);
      add_dq(head, tile * kBackwardQueries);
    }
  }

  __device__ __forceinline__ void store(void* to, const float (&rows)[HEAD_DIM / 2], int64_t stride_token,
                                        int64_t stride_head, float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row(r) >= work.num_keys) continue;
      const int64_t token = work.key_row + row(r);
      T* out = static_cast<T*>(to) + token * stride_token + work.kv_head * stride_head + threadIdx.x % 4 * 2;
#pragma unroll
      for (int c = 0; c < HEAD_DIM / 8; ++c)
        *reinterpret_cast<uint32_t*>(out + c * 8) =
            pack_pair<T>(rows[4 * c + 2 * r] * scale, rows[4 * c + 2 * r + 1] * scale);
    }
  }

  __device__ __forceinline__ void run() {
    const WindowAttentionBackwardParams& p = launch.params;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) dk[i] = dv[i] = dq[i] = 0.0f;
    shared.key_barrier().wait(0);
    if (work.num_keys < kBackwardKeys) {
      // Of the values a row meets its own gradients alone, which are left out.
      clear_rows(shared.keys(), work.num_keys, kBackwardKeys);
      ptx::fence_async_proxy();
      meet_consumers();
    }
    const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
    RingPosition<kBackwardStages> at;
    int buffer = 0;
    for (int i = 0; i < group; ++i) {
      for (int tile = 0; tile < work.query_tiles(); ++tile) {
        shared.query_barriers().full(at.stage).wait(at.parity);
        add_queries(work.kv_head * group + i, tile, at.stage, buffer);
        at.advance();
        buffer ^= 1;
      }
    }
    store(p.dk, dk, p.dk_stride_token, p.dk_stride_head, p.softmax_scale);
    store(p.dv, dv, p.dv_stride_token, p.dv_stride_head, 1.0f);
  }
};

}  // namespace infimm
