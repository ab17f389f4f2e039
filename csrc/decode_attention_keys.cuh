// The plan of decode_attention_kernel and its first phase; decode_attention.cuh has the others.
#pragma once

#include "common/memory.cuh"
#include "common/vector.cuh"
#include "common/warp.cuh"
#include "decode_attention.h"

namespace infimm {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeWarps = kDecodeThreads / kWarpSize;
constexpr int kDecodeChunk = 8;          // channels of one lane
constexpr int kDecodeMinShare = 64;      // keys; less does not pay for a partial result
constexpr int kDecodeColumns = 4;        // of the output, per warp
constexpr int kDecodeProjectedRows = 8;  // kDecodeColumns * kDecodeProjectedRows sums: one per lane
constexpr int kDecodeInnerChunk = 1024;  // channels of the attention rows in shared memory at a time
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNegativeInfinity = -INFINITY;

// Where the parts of the shared memory begin, in bytes. The phases use the last part one after another.
struct DecodeShared {
  int first_keys;
  int phase;
  int bytes;
};

template <int LANES, int ROWS>
inline __host__ __device__ DecodeShared decode_shared(const DecodeAttentionParams& p) {
  constexpr int kPadded = LANES * kDecodeChunk;
  const int batch = static_cast<int>(p.batch);
  const int rows = p.batch * p.text_len < kDecodeProjectedRows ? static_cast<int>(p.batch * p.text_len)
                                                               : kDecodeProjectedRows;
  const int attend = ROWS * kPadded + kDecodeWarps * ROWS * (kPadded + 2);
  const int combine = kDecodeWarps * (kPadded + 1);
  const int project = rows * kDecodeInnerChunk;
  int floats = attend > combine ? attend : combine;
  if (project > floats) floats = project;
  DecodeShared shared;
  shared.first_keys = (batch + 1) * static_cast<int>(sizeof(int64_t));
  shared.phase = (shared.first_keys + batch * static_cast<int>(sizeof(int32_t)) + 15) / 16 * 16;
  shared.bytes = shared.phase + floats * static_cast<int>(sizeof(float));
  return shared;
}

// What a block knows of the whole problem. "Work" counts keys over all (sample, kv head) pairs in this order.
struct DecodePlan {
  const int64_t* starts;      // [batch + 1] running sum of the samples' keys, in shared memory
  const int32_t* first_keys;  // [batch]
  float* phase;               // the shared memory of the phase
  float* partials;            // [slots, slot_rows, head_dim]
  float* statistics;          // [slots, slot_rows, 2] = (largest score, sum of exponentials)
  float* attention;           // [batch * text_len, inner]
  int64_t work;
  int64_t active_blocks;  // those with a share, which then has at least one key
  int group;              // query heads of a kv head
  int slot_rows;          // rows of one pair: text_len * group
  int inner;

  __device__ __forceinline__ int64_t num_keys(int64_t sample) const {
    return starts[sample + 1] - starts[sample];
  }
  __device__ __forceinline__ int64_t share_begin(int64_t block) const { return work * block / active_blocks; }
  // The block in whose share a key lies.
  __device__ __forceinline__ int64_t owner(int64_t key) const {
    return ((key + 1) * active_blocks - 1) / work;
  }
};

// Every block makes the same plan. All threads call this.
template <int LANES, int ROWS>
__device__ __forceinline__ DecodePlan make_plan(const DecodeAttentionParams& p) {
  const DecodeShared shared = decode_shared<LANES, ROWS>(p);
  char* memory = static_cast<char*>(dynamic_shared_memory());
  int64_t* starts = reinterpret_cast<int64_t*>(memory);
  int32_t* first_keys = reinterpret_cast<int32_t*>(memory + shared.first_keys);
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    int64_t before = 0;
    for (int64_t sample = lane; sample - lane < p.batch; sample += kWarpSize) {
      int64_t first = 0, end = 0;
      if (sample < p.batch) {
        const int32_t* range = p.key_ranges + sample * p.key_ranges_stride_sample;
        first = __ldg(range);
        end = __ldg(range + p.key_ranges_stride_bound);
        first = first < 0 ? 0 : first > p.total ? p.total : first;
        end = end < first ? first : end > p.total ? p.total : end;
      }
      const int64_t until = before + warp_running_sum(end - first, lane);
      if (sample < p.batch) {
        first_keys[sample] = static_cast<int32_t>(first);
        starts[sample + 1] = until;
      }
      before = __shfl_sync(kWholeWarp, static_cast<long long>(until), kWarpSize - 1);
    }
    if (lane == 0) starts[0] = 0;
  }
  __syncthreads();

  DecodePlan plan;
  plan.starts = starts;
  plan.first_keys = first_keys;
  plan.phase = reinterpret_cast<float*>(memory + shared.phase);
  plan.group = static_cast<int>(p.num_heads / p.num_kv_heads);
  plan.slot_rows = static_cast<int>(p.text_len) * plan.group;
  plan.inner = static_cast<int>(p.num_heads * p.head_dim);
  const int64_t slots = p.max_blocks + p.batch * p.num_kv_heads;
  plan.partials = p.workspace;
  plan.statistics = plan.partials + slots * plan.slot_rows * p.head_dim;
  plan.attention = plan.statistics + slots * plan.slot_rows * 2;
  plan.work = starts[p.batch] * p.num_kv_heads;
  const int64_t shares = (plan.work + kDecodeMinShare - 1) / kDecodeMinShare;
  plan.active_blocks = shares < gridDim.x ? shares : gridDim.x;
  return plan;
}

// exp(score - largest). Without a score above -inf it is 0, and not NaN, until the last division.
__device__ __forceinline__ float shifted_exp(float score, float largest) {
  return exp2f((score - (largest == kNegativeInfinity ? 0.0f : largest)) * kLog2E);
}

// --- phase 1 ------------------------------------------------------------

// A run of keys of one kv head; the pointers are at channel 0 of the first one.
template <typename T>
struct DecodeKeys {
  const T* key;
  const T* value;
  int count;
};

// Keys that a lane group loads at once, one step ahead: as many as the registers of 2 blocks per SM (one
// row) or of one hold. That keeps 16 warps * 32 lanes * 32 bytes * 2 = 32 KB in flight on an SM for one row
// of 16-bit elements, 8 * 32 * 32 * 3 = 24 KB for more rows; 4.3 TB/s over 132 SMs at 700 ns need 23 KB.
template <typename T, int ROWS, int BYTES>
constexpr int kDecodeUnroll = BYTES < 16 ? 1 : (sizeof(T) == 2 ? 2 : 1) + (ROWS == 1 ? 0 : 1);

// The next UNROLL keys of a lane group, a chunk of channels per lane.
template <typename T, int LANES, int UNROLL, int BYTES>
struct DecodeStep {
  static constexpr int kGroups = kWarpSize / LANES;
  static constexpr int kKeys = kGroups * UNROLL;
  Chunk<T, kDecodeChunk, BYTES> key[UNROLL], value[UNROLL];

  __device__ __forceinline__ void load(const DecodeAttentionParams& p, const DecodeKeys<T>& keys, int first,
                                       int channel) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int token = first + u * kGroups;
      if (token < keys.count && channel < p.head_dim) {
        key[u].load(keys.key + token * p.key_stride_token + channel);
        value[u].load(keys.value + token * p.value_stride_token + channel);
      } else {
        key[u].clear();
        value[u].clear();
      }
    }
  }
};

// A running softmax over the keys one lane group has seen; a lane holds kDecodeChunk channels of the sum.
template <int ROWS>
struct DecodeState {
  float largest[ROWS];
  float sum[ROWS];
  float acc[ROWS][kDecodeChunk];

  __device__ __forceinline__ DecodeState() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      largest[r] = kNegativeInfinity;
      sum[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < kDecodeChunk; ++i) acc[r][i] = 0.0f;
    }
  }

  template <typename T, int LANES, int UNROLL, int BYTES>
  __device__ __forceinline__ void add(const DecodeStep<T, LANES, UNROLL, BYTES>& step, const float* query,
                                      float scale, int first, int count) {
    float key[UNROLL][kDecodeChunk], score[ROWS][UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) step.key[u].to_floats(key[u]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float channels[kDecodeChunk];
      load_floats(query + r * LANES * kDecodeChunk, channels);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < kDecodeChunk; ++i) product = fmaf(channels[i], key[u][i], product);
        score[r][u] = group_sum<LANES>(product) * scale;
        if (first + u * (kWarpSize / LANES) >= count) score[r][u] = kNegativeInfinity;
      }
      float next = largest[r];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) next = fmaxf(next, score[r][u]);
      const float rescale = shifted_exp(largest[r], next);
      largest[r] = next;
      sum[r] *= rescale;
#pragma unroll
      for (int i = 0; i < kDecodeChunk; ++i) acc[r][i] *= rescale;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float value[kDecodeChunk];
      step.value[u].to_floats(value);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float weight = shifted_exp(score[r][u], largest[r]);
        sum[r] += weight;
#pragma unroll
        for (int i = 0; i < kDecodeChunk; ++i) acc[r][i] = fmaf(weight, value[i], acc[r][i]);
      }
    }
  }

  // Adds the other lane groups of the warp.
  template <int LANES>
  __device__ __forceinline__ void merge_groups() {
#pragma unroll
    for (int offset = LANES; offset < kWarpSize; offset *= 2) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float other = __shfl_xor_sync(kWholeWarp, largest[r], offset);
        const float next = fmaxf(largest[r], other);
        const float mine = shifted_exp(largest[r], next), theirs = shifted_exp(other, next);
        largest[r] = next;
        sum[r] = sum[r] * mine + __shfl_xor_sync(kWholeWarp, sum[r], offset) * theirs;
#pragma unroll
        for (int i = 0; i < kDecodeChunk; ++i)
          acc[r][i] = acc[r][i] * mine + __shfl_xor_sync(kWholeWarp, acc[r][i], offset) * theirs;
      }
    }
  }
};

// Rows [first_row, first_row + rows) of a pair against a run of its keys: one partial result into `slot`.
// Row r of a pair is query head r % group of its kv head, new token r / group.
template <typename T, int LANES, int ROWS, int BYTES>
__device__ __forceinline__ void attend_rows(const DecodeAttentionParams& p, const DecodePlan& plan,
                                            int64_t sample, int64_t kv_head, const DecodeKeys<T>& keys,
                                            int first_row, int rows, int64_t slot) {
  constexpr int kPadded = LANES * kDecodeChunk;
  using Step = DecodeStep<T, LANES, kDecodeUnroll<T, ROWS, BYTES>, BYTES>;
  const int head_dim = static_cast<int>(p.head_dim);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int channel = lane % LANES * kDecodeChunk;
  float* query = plan.phase;                                 // [ROWS, kPadded]
  float* merged = query + ROWS * kPadded;                    // [warps, ROWS, kPadded]
  float* extremes = merged + kDecodeWarps * ROWS * kPadded;  // [warps, ROWS, 2]

  for (int i = threadIdx.x; i < ROWS * kPadded; i += kDecodeThreads) {
    const int row = first_row + i / kPadded, d = i % kPadded;
    float element = 0.0f;
    if (i / kPadded < rows && d < head_dim) {
      element = to_float(__ldg(static_cast<const T*>(p.query) + sample * p.query_stride_sample +
                               row / plan.group * p.query_stride_row +
                               (kv_head * plan.group + row % plan.group) * p.query_stride_head + d));
    }
    query[i] = element;
  }
  __syncthreads();

  DecodeState<ROWS> state;
  constexpr int kBlockKeys = kDecodeWarps * Step::kKeys;
  // Every lane of a warp takes part in its shuffles, so the warp's first key decides for all.
  int warp_first = warp * Step::kKeys;
  const int group = lane / LANES;
  Step step;
  step.load(p, keys, warp_first + group, channel);
  for (; warp_first < keys.count; warp_first += kBlockKeys) {
    Step next;
    next.load(p, keys, warp_first + kBlockKeys + group, channel);
    state.add(step, query + channel, p.softmax_scale, warp_first + group, keys.count);
    step = next;
  }

  state.template merge_groups<LANES>();
  if (lane < LANES) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      store_floats(merged + (warp * ROWS + r) * kPadded + channel, state.acc[r]);
      if (lane == 0) {
        extremes[(warp * ROWS + r) * 2] = state.largest[r];
        extremes[(warp * ROWS + r) * 2 + 1] = state.sum[r];
      }
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < rows * kPadded; i += kDecodeThreads) {
    const int r = i / kPadded, d = i % kPadded;
    if (d >= head_dim) continue;
    float largest = kNegativeInfinity, sum = 0.0f, acc = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) largest = fmaxf(largest, extremes[(w * ROWS + r) * 2]);
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = shifted_exp(extremes[(w * ROWS + r) * 2], largest);
      sum += weight * extremes[(w * ROWS + r) * 2 + 1];
      acc += weight * merged[(w * ROWS + r) * kPadded + d];
    }
    const int64_t row = slot * plan.slot_rows + first_row + r;
    plan.partials[row * head_dim + d] = acc;
    if (d == 0) {
      plan.statistics[row * 2] = largest;
      plan.statistics[row * 2 + 1] = sum;
    }
  }
}

// The block's share of all keys.
template <typename T, int LANES, int ROWS, int BYTES>
__device__ __forceinline__ void attend(const DecodeAttentionParams& p, const DecodePlan& plan) {
  if (blockIdx.x >= plan.active_blocks) return;
  const int64_t share_end = plan.share_begin(blockIdx.x + 1);
  for (int64_t at = plan.share_begin(blockIdx.x); at < share_end;) {
    int64_t sample = 0, above = p.batch;  // the last sample that starts at `at` or before has keys
    while (above - sample > 1) {
      const int64_t middle = (sample + above) / 2;
      (plan.starts[middle] * p.num_kv_heads <= at ? sample : above) = middle;
    }
    const int64_t num_keys = plan.num_keys(sample);
    const int64_t in_sample = at - plan.starts[sample] * p.num_kv_heads;
    const int64_t kv_head = in_sample / num_keys, begin = in_sample % num_keys;
    const int64_t left = share_end - at, count = num_keys - begin < left ? num_keys - begin : left;
    const int64_t token = plan.first_keys[sample] + begin;
    DecodeKeys<T> keys;
    keys.key = static_cast<const T*>(p.key) + kv_head * p.key_stride_head + token * p.key_stride_token;
    keys.value =
        static_cast<const T*>(p.value) + kv_head * p.value_stride_head + token * p.value_stride_token;
    keys.count = static_cast<int>(count);
    // From one (block, pair) to the next the block or the pair grows by at least one: no slot is used twice.
    const int64_t slot = blockIdx.x + sample * p.num_kv_heads + kv_head;
    for (int row = 0; row < plan.slot_rows; row += ROWS) {
      const int rows = plan.slot_rows - row < ROWS ? plan.slot_rows - row : ROWS;
      attend_rows<T, LANES, ROWS, BYTES>(p, plan, sample, kv_head, keys, row, rows, slot);
    }
    at += count;
  }
}

}  // namespace infimm
