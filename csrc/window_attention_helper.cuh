// Three warps that compute the rows of the prefix queries (CLS) beside the consumers, from the same key and
// value tiles, without tensor cores: one row would fill a sixteenth of the smallest of their tiles.
#pragma once

#include "window_attention_shared.cuh"

namespace infimm {

constexpr int kHelperBarrier = 2;

template <typename T, int HEAD_DIM>
struct WindowHelper {
  using Shared = WindowShared<HEAD_DIM>;
  static constexpr int kPieces = HEAD_DIM / 8;
  static constexpr int kLaneChannels = 4;  // of the weighted sum; lanes beyond head_dim have none
  const WindowAttentionLaunch& launch;
  const Shared shared;
  const int helper = threadIdx.x / kWarpSize - 1;
  const int lane = threadIdx.x % kWarpSize;

  // Where a prefix query of this warp has its query, its weighted sum and its statistics.
  struct State {
    uint32_t query, acc, largest, sum;
  };
  __device__ __forceinline__ State state(int of_helper, int query) const {
    const uint32_t at = shared.prefix_state(of_helper, query);
    return {at, at + Shared::kRow * 4, at + 2 * Shared::kRow * 4, at + 2 * Shared::kRow * 4 + 4};
  }

  __device__ __forceinline__ void clear(const Work& work, int query) const {
    const WindowAttentionParams& p = launch.params;
    const int64_t token = work.query_row - work.prefix_queries + query;
    const T* from = static_cast<const T*>(p.q) + token * p.q_stride_token + work.head * p.q_stride_head;
    const State s = state(helper, query);
    for (int channel = lane * 2; channel < HEAD_DIM; channel += 2 * kWarpSize) {
      const float2 pair = unpack_pair<T>(__ldg(reinterpret_cast<const uint32_t*>(from + channel)));
      ptx::store_shared_float(s.query + channel * 4, pair.x);
      ptx::store_shared_float(s.query + channel * 4 + 4, pair.y);
    }
    for (int channel = lane; channel < HEAD_DIM; channel += kWarpSize)
      ptx::store_shared_float(s.acc + channel * 4, 0.0f);
    if (lane == 0) {
      ptx::store_shared_float(s.largest, -INFINITY);
      ptx::store_shared_float(s.sum, 0.0f);
    }
    __syncwarp();
  }

  __device__ __forceinline__ float dot(uint32_t query, uint32_t pair, int channel) const {
    const float2 k = unpack_pair<T>(pair);
    return fmaf(ptx::load_shared_float(query + channel * 4), k.x,
                ptx::load_shared_float(query + channel * 4 + 4) * k.y);
  }

  // Adds `count` keys, a lane each, to one query. key_piece(row, piece) and value_pairs(row, channel) give 8
  // channels of a key and 4 of a value.
  template <typename KeyPiece, typename ValuePairs>
  __device__ __forceinline__ void add_keys(int query, int count, KeyPiece key_piece, ValuePairs value_pairs) {
    const State s = state(helper, query);
    float score = -INFINITY;
    if (lane < count) {
      score = 0.0f;
#pragma unroll 2
      for (int piece = 0; piece < kPieces; ++piece) {
        const uint4 k = key_piece(lane, piece);
        score += dot(s.query, k.x, piece * 8) + dot(s.query, k.y, piece * 8 + 2) +
                 dot(s.query, k.z, piece * 8 + 4) + dot(s.query, k.w, piece * 8 + 6);
      }
      score *= launch.scale_log2;
    }
    const float before = ptx::load_shared_float(s.largest);
    const float largest = fmaxf(before, warp_max(score));
    const float rescale = shifted_exp2(before, largest);
    const float weight = shifted_exp2(score, largest);
    const float sum = fmaf(ptx::load_shared_float(s.sum), rescale, group_sum<kWarpSize>(weight));
    const int channel = lane * kLaneChannels;
    const bool has_channels = channel < HEAD_DIM;
    float acc[kLaneChannels] = {};
    if (has_channels) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i)
        acc[i] = ptx::load_shared_float(s.acc + (channel + i) * 4) * rescale;
    }
    for (int row = 0; row < count; ++row) {
      const float w = __shfl_sync(kWholeWarp, weight, row);
      if (has_channels) {
        const uint2 v = value_pairs(row, channel);
        const float2 low = unpack_pair<T>(v.x), high = unpack_pair<T>(v.y);
        acc[0] = fmaf(w, low.x, acc[0]);
        acc[1] = fmaf(w, low.y, acc[1]);
        acc[2] = fmaf(w, high.x, acc[2]);
        acc[3] = fmaf(w, high.y, acc[3]);
      }
    }
    if (has_channels) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) ptx::store_shared_float(s.acc + (channel + i) * 4, acc[i]);
    }
    __syncwarp();  // everyone has read the statistics
    if (lane == 0) {
      ptx::store_shared_float(s.largest, largest);
      ptx::store_shared_float(s.sum, sum);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void add_prefix_keys(const Work& work, int query) {
    const WindowAttentionParams& p = launch.params;
    const int64_t kv_head = work.head / (p.num_heads / p.num_kv_heads);
    const int64_t token = work.key_row - work.prefix_keys;
    const T* key = static_cast<const T*>(p.k) + token * p.k_stride_token + kv_head * p.k_stride_head;
    const T* value = static_cast<const T*>(p.v) + token * p.v_stride_token + kv_head * p.v_stride_head;
    add_keys(
        query, work.prefix_keys,
        [&](int row, int piece) {
          return __ldg(reinterpret_cast<const uint4*>(key + row * p.k_stride_token + piece * 8));
        },
        [&](int row, int channel) {
          return __ldg(reinterpret_cast<const uint2*>(value + row * p.v_stride_token + channel));
        });
  }

  // Groups of 32 keys of a tile go around the helpers, another one first in every tile.
  __device__ __forceinline__ void add_tile(const Work& work, int stage, int tile) {
    const int left = work.num_keys - tile * kKeyRows;
    const auto keys = shared.keys(stage), values = shared.values(stage);
    for (int group = (helper + tile) % kHelperWarps; group * kWarpSize < kKeyRows; group += kHelperWarps) {
      const int first = group * kWarpSize;
      const int count = left - first < kWarpSize ? left - first : kWarpSize;
      if (count <= 0) continue;
      for (int query = 0; query < work.prefix_queries; ++query) {
        add_keys(
            query, count,
            [&](int row, int piece) { return ptx::load_shared_16(keys.piece(first + row, piece)); },
            [&](int row, int channel) {
              return ptx::load_shared_8(values.piece(first + row, channel / 8) + channel % 8 * 2);
            });
      }
    }
  }

  // Adds up what the helpers have and writes the rows: a helper each query in turn.
  __device__ __forceinline__ void store(const Work& work) const {
    const WindowAttentionParams& p = launch.params;
    const bool no_keys = work.num_keys + work.prefix_keys == 0;
    for (int query = helper; query < work.prefix_queries; query += kHelperWarps) {
      float largest = -INFINITY, sum = 0.0f, factor[kHelperWarps];
#pragma unroll
      for (int h = 0; h < kHelperWarps; ++h)
        largest = fmaxf(largest, ptx::load_shared_float(state(h, query).largest));
#pragma unroll
      for (int h = 0; h < kHelperWarps; ++h) {
        factor[h] = shifted_exp2(ptx::load_shared_float(state(h, query).largest), largest);
        sum = fmaf(ptx::load_shared_float(state(h, query).sum), factor[h], sum);
      }
      const float normalise = no_keys ? 0.0f : 1.0f / sum;
      const int64_t token = work.query_row - work.prefix_queries + query;
      T* out = static_cast<T*>(p.out) + (token * p.num_heads + work.head) * HEAD_DIM;
      for (int channel = lane * 2; channel < HEAD_DIM; channel += 2 * kWarpSize) {
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int h = 0; h < kHelperWarps; ++h) {
          low = fmaf(ptx::load_shared_float(state(h, query).acc + channel * 4), factor[h], low);
          high = fmaf(ptx::load_shared_float(state(h, query).acc + channel * 4 + 4), factor[h], high);
        }
        *reinterpret_cast<uint32_t*>(out + channel) = pack_pair<T>(low * normalise, high * normalise);
      }
      if (lane == 0) p.lse[work.head * p.total_q + token] = largest * kLn2 + logf(sum);
    }
  }

  __device__ __forceinline__ void run() {
    RingPosition<WorkRing::kStages> work_at;
    RingPosition<kKeyStages> key_at;
    for (;;) {
      const Work work = shared.work().read(work_at);
      if (work.head == kNegativeHead) return;
      for (int query = 0; query < work.prefix_queries; ++query) {
        clear(work, query);
        if (helper == 0 && work.prefix_keys > 0) add_prefix_keys(work, query);
      }
      for (int tile = 0; tile < work.key_tiles(); ++tile) {
        shared.key_barriers().full(key_at.stage).wait(key_at.parity);
        shared.value_barriers().full(key_at.stage).wait(key_at.parity);
        if (work.prefix_queries > 0) add_tile(work, key_at.stage, tile);
        __syncwarp();
        if (lane == 0) {
          shared.key_barriers().empty(key_at.stage).arrive();
          shared.value_barriers().empty(key_at.stage).arrive();
        }
        key_at.advance();
      }
      if (work.prefix_queries > 0) {
        ptx::named_barrier(kHelperBarrier, kHelperWarps * kWarpSize);
        store(work);
        ptx::named_barrier(kHelperBarrier, kHelperWarps * kWarpSize);
      }
    }
  }
};

}  // namespace infimm
