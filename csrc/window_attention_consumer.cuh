// A consumer warpgroup: 64 queries of the tile, all keys. Scores of the next key tile are multiplied while
// the weights of this one meet their values ("intra-warpgroup overlap", Shah et al. 2024, FlashAttention-3).
#pragma once

#include "window_attention_shared.cuh"

namespace infimm {

constexpr float kLn2 = 0.69314718055994531f;
constexpr int kConsumerBarrier = 1;

// The online softmax of the two rows of a thread. wgmma gives thread t of a warp the rows t / 4 and t / 4 + 8
// of the warp's 16, in each of them the columns 2 * (t % 4) + {0, 1} of every 8; so values[4 * i + 2 * r +
// c].
struct RowStatistics {
  float largest[2] = {-INFINITY, -INFINITY};  // of score * scale_log2
  float sum[2] = {0.0f, 0.0f};                // this thread's part
};

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 1));
  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));
}

// Scores become weights 2^(score * scale - largest); what was added up before has to be multiplied by
// rescale.
template <int N>
__device__ __forceinline__ void to_weights(float (&scores)[N], RowStatistics& rows, float (&rescale)[2],
                                           float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = scores[2 * r];
#pragma unroll
    for (int i = 0; i < N; i += 4) largest = fmaxf(largest, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
    largest = fmaxf(rows.largest[r], quad_max(largest) * scale_log2);
    rescale[r] = shifted_exp2(rows.largest[r], largest);
    rows.largest[r] = largest;
    const float shift = largest == -INFINITY ? 0.0f : largest;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[i + 2 * r + c];
        score = ptx::exp2_approx(fmaf(score, scale_log2, -shift));
        sum += score;
      }
    }
    rows.sum[r] = fmaf(rows.sum[r], rescale[r], sum);
  }
}

// Keys from `count` on do not exist.
template <int N>
__device__ __forceinline__ void mask_scores(float (&scores)[N], int count) {
  const int first = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < N; i += 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (2 * i + first + j % 2 >= count) scores[i + j] = -INFINITY;
    }
  }
}

template <int N>
__device__ __forceinline__ void multiply_rows(float (&values)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] *= factor[i / 2 % 2];
}

template <typename T, int HEAD_DIM>
struct WindowConsumer {
  using Shared = WindowShared<HEAD_DIM>;
  const WindowAttentionLaunch& launch;
  const Shared shared;
  const int first_row;  // of this warpgroup in the tile

  float scores[kKeyRows / 2];
  uint32_t weights[kKeyRows / 4];
  float acc[HEAD_DIM / 2];
  RowStatistics rows;

  __device__ __forceinline__ WindowConsumer(const WindowAttentionLaunch& l, int warpgroup)
      : launch(l), first_row(warpgroup * 64) {}

  static __device__ __forceinline__ void release(Barrier barrier) {
    if (threadIdx.x % kWarpSize == 0) barrier.arrive();
  }

  __device__ __forceinline__ int row(int r) const {
    return first_row + threadIdx.x % kWarpgroup / kWarpSize * 16 + threadIdx.x % kWarpSize / 4 + 8 * r;
  }

  // Keys before the tiles, one by one and outside the tensor cores: the four threads of a row share its dot
  // product, then each adds the value to its own channels.
  __device__ __forceinline__ void add_prefix_keys(const Work& work) {
    const WindowAttentionParams& p = launch.params;
    const int64_t kv_head = work.head / (p.num_heads / p.num_kv_heads), quarter = threadIdx.x % 4;
    for (int i = 0; i < work.prefix_keys; ++i) {
      const int64_t token = work.key_row - work.prefix_keys + i;
      const T* key = static_cast<const T*>(p.k) + token * p.k_stride_token + kv_head * p.k_stride_head;
      const T* value = static_cast<const T*>(p.v) + token * p.v_stride_token + kv_head * p.v_stride_head;
      float factor[2], weight[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float score = 0.0f;
        for (int piece = static_cast<int>(quarter); piece < HEAD_DIM / 8; piece += 4) {
          const uint4 a = ptx::load_shared_16(shared.query().piece(row(r), piece));
          const uint4 b = __ldg(reinterpret_cast<const uint4*>(key + piece * 8));
          score += dot(a.x, b.x) + dot(a.y, b.y) + dot(a.z, b.z) + dot(a.w, b.w);
        }
        score += __shfl_xor_sync(kWholeWarp, score, 1);
        score += __shfl_xor_sync(kWholeWarp, score, 2);
        score *= launch.scale_log2;
        // fmaxf drops a NaN; the weight below keeps it.
        const float largest = fmaxf(rows.largest[r], score);
        factor[r] = shifted_exp2(rows.largest[r], largest);
        weight[r] = shifted_exp2(score, largest);
        rows.largest[r] = largest;
        rows.sum[r] = fmaf(rows.sum[r], factor[r], quarter == 0 ? weight[r] : 0.0f);
      }
#pragma unroll
      for (int c = 0; c < HEAD_DIM / 8; ++c) {
        const float2 v =
            unpack_pair<T>(__ldg(reinterpret_cast<const uint32_t*>(value + c * 8 + 2 * quarter)));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          acc[4 * c + 2 * r] = fmaf(weight[r], v.x, acc[4 * c + 2 * r] * factor[r]);
          acc[4 * c + 2 * r + 1] = fmaf(weight[r], v.y, acc[4 * c + 2 * r + 1] * factor[r]);
        }
      }
    }
  }

  static __device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
    const float2 x = unpack_pair<T>(a), y = unpack_pair<T>(b);
    return fmaf(x.x, y.x, x.y * y.y);
  }

  // scores = q k^T, in flight.
  __device__ __forceinline__ void multiply_keys(int stage) {
#pragma unroll
    for (int step = 0; step < Shared::KeyTile::kSteps; ++step) {
      ptx::wgmma<T, kKeyRows>(scores, shared.query().by_channel(first_row, step),
                              shared.keys(stage).by_channel(0, step), step > 0);
    }
    ptx::wgmma_commit();
  }

  // acc += weights v, in flight.
  __device__ __forceinline__ void multiply_values(int stage) {
#pragma unroll
    for (int step = 0; step < kKeyRows / 16; ++step) {
      const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                             weights[4 * step + 3]};
      ptx::wgmma_transposed<T, HEAD_DIM>(acc, a, shared.values(stage).by_row(step));
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void hold_all() {
    ptx::hold(scores);
    ptx::hold(weights);
    ptx::hold(acc);
  }

  // Rows of a value tile behind the segment belong to another one: a weight of 0 would make NaN of its inf.
  // By both warpgroups.
  __device__ __forceinline__ void clear_values(int stage, int count) {
    constexpr int kPieces = Shared::KeyTile::kBoxes * 8;
    const int thread = threadIdx.x - kWarpgroup;
    for (int i = count * kPieces + thread; i < kKeyRows * kPieces; i += kConsumerWarpgroups * kWarpgroup) {
      ptx::store_shared_16(shared.values(stage).piece(i / kPieces, i % kPieces), uint4{0, 0, 0, 0});
    }
    ptx::fence_async_proxy();
    ptx::named_barrier(kConsumerBarrier, kConsumerWarpgroups * kWarpgroup);
  }

  __device__ __forceinline__ void attend(const Work& work, RingPosition<kKeyStages>& at, int query_parity) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) acc[i] = 0.0f;
    rows = RowStatistics();
    shared.query_barriers().full(0).wait(query_parity);
    add_prefix_keys(work);
    const int tiles = work.key_tiles();
    if (tiles == 0) {
      __syncwarp();
      release(shared.query_barriers().empty(0));
      return;
    }
    const int last_count = work.num_keys - (tiles - 1) * kKeyRows;
    float rescale[2];
    shared.key_barriers().full(at.stage).wait(at.parity);
    hold_all();
    ptx::wgmma_fence();
    multiply_keys(at.stage);
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
    release(shared.key_barriers().empty(at.stage));
    if (tiles == 1 && last_count < kKeyRows) mask_scores(scores, last_count);
    to_weights(scores, rows, rescale, launch.scale_log2);
    pack<T>(scores, weights);
    multiply_rows(acc, rescale);
    for (int tile = 1; tile < tiles; ++tile) {
      const RingPosition<kKeyStages> before = at;
      at.advance();
      shared.key_barriers().full(at.stage).wait(at.parity);
      shared.value_barriers().full(before.stage).wait(before.parity);
      hold_all();
      ptx::wgmma_fence();
      multiply_keys(at.stage);
      multiply_values(before.stage);
      ptx::wgmma_wait<1>();
      ptx::hold(scores);
      release(shared.key_barriers().empty(at.stage));
      if (tile == tiles - 1 && last_count < kKeyRows) mask_scores(scores, last_count);
      to_weights(scores, rows, rescale, launch.scale_log2);
      ptx::wgmma_wait<0>();
      hold_all();
      release(shared.value_barriers().empty(before.stage));
      multiply_rows(acc, rescale);
      pack<T>(scores, weights);
    }
    release(shared.query_barriers().empty(0));
    shared.value_barriers().full(at.stage).wait(at.parity);
    if (last_count < kKeyRows) clear_values(at.stage, last_count);
    hold_all();
    ptx::wgmma_fence();
    multiply_values(at.stage);
    ptx::wgmma_wait<0>();
    ptx::hold(acc);
    release(shared.value_barriers().empty(at.stage));
    at.advance();
  }

  __device__ __forceinline__ void store(const Work& work) {
    const WindowAttentionParams& p = launch.params;
    const bool no_keys = work.num_keys + work.prefix_keys == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = rows.sum[r];
      sum += __shfl_xor_sync(kWholeWarp, sum, 1);
      sum += __shfl_xor_sync(kWholeWarp, sum, 2);
      if (row(r) >= work.num_queries) continue;
      const float factor = no_keys ? 0.0f : 1.0f / sum;
      const int64_t token = work.query_row + row(r);
      T* out = static_cast<T*>(p.out) + (token * p.num_heads + work.head) * HEAD_DIM + threadIdx.x % 4 * 2;
#pragma unroll
      for (int c = 0; c < HEAD_DIM / 8; ++c) {
        *reinterpret_cast<uint32_t*>(out + c * 8) =
            pack_pair<T>(acc[4 * c + 2 * r] * factor, acc[4 * c + 2 * r + 1] * factor);
      }
      if (threadIdx.x % 4 == 0) p.lse[work.head * p.total_q + token] = rows.largest[r] * kLn2 + logf(sum);
    }
  }

  __device__ __forceinline__ void run() {
    RingPosition<WorkRing::kStages> work_at;
    RingPosition<kKeyStages> key_at;
    for (int query_parity = 0;; query_parity ^= 1) {
      const Work work = shared.work().read(work_at);
      if (work.head == kNegativeHead) return;
      attend(work, key_at, query_parity);
      store(work);
    }
  }
};

}  // namespace infimm
