// Attention of a few new tokens to the keys of their image, output projection, gate and residual in one
// launch. Three phases with a grid barrier between them:
//   1. attend   The keys of all (sample, kv head) pairs, laid end to end, are cut into one equal share per
//               block. A block leaves one unnormalised partial result for each pair that its share touches.
//   2. combine  A block per (row, head) adds up the partial results and normalises.
//   3. project  A warp per 4 output columns; then tanh(gate) and the residual.
// To combine in phase 3 instead would save a barrier, but there every block needs every row: with 264 blocks,
// 12 heads of 64 and 8 new tokens, partial results of 0.5 MB would be read 264 times.
#pragma once

#include <cooperative_groups.h>

#include <utility>

#include "decode_attention_keys.cuh"

namespace infimm {

// --- phase 2 ------------------------------------------------------------

// Partial results come from other blocks: they are read from L2, never through the read-only cache.
template <int LANES>
__device__ __forceinline__ void combine(const DecodeAttentionParams& p, const DecodePlan& plan) {
  constexpr int kPadded = LANES * kDecodeChunk;
  constexpr int kPerLane = kPadded / kWarpSize > 0 ? kPadded / kWarpSize : 1;
  const int head_dim = static_cast<int>(p.head_dim);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* merged = plan.phase;                     // [warps, kPadded]
  float* sums = merged + kDecodeWarps * kPadded;  // [warps]
  const int64_t units = p.batch * p.text_len * p.num_heads;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t head = unit % p.num_heads, row = unit / p.num_heads, sample = row / p.text_len;
    const int64_t num_keys = plan.num_keys(sample);
    if (num_keys == 0) continue;
    const int64_t kv_head = head / plan.group, pair = sample * p.num_kv_heads + kv_head;
    const int64_t begin = plan.starts[sample] * p.num_kv_heads + kv_head * num_keys;
    const int64_t first_slot = plan.owner(begin) + pair, last_slot = plan.owner(begin + num_keys - 1) + pair;
    const int64_t slot_row = row % p.text_len * plan.group + head % plan.group;

    float largest = kNegativeInfinity;
    for (int64_t slot = first_slot + lane; slot <= last_slot; slot += kWarpSize)
      largest = fmaxf(largest, __ldcg(plan.statistics + (slot * plan.slot_rows + slot_row) * 2));
    largest = warp_max(largest);

    float sum = 0.0f, acc[kPerLane] = {};
#pragma unroll 4
    for (int64_t slot = first_slot + warp; slot <= last_slot; slot += kDecodeWarps) {
      const int64_t from = slot * plan.slot_rows + slot_row;
      const float weight = shifted_exp(__ldcg(plan.statistics + from * 2), largest);
      sum = fmaf(weight, __ldcg(plan.statistics + from * 2 + 1), sum);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int d = lane + i * kWarpSize;
        if (d < head_dim) acc[i] = fmaf(weight, __ldcg(plan.partials + from * head_dim + d), acc[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) merged[warp * kPadded + lane + i * kWarpSize] = acc[i];
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    for (int d = threadIdx.x; d < head_dim; d += kDecodeThreads) {
      float total = 0.0f, total_sum = 0.0f;
      for (int w = 0; w < kDecodeWarps; ++w) {
        total += merged[w * kPadded + d];
        total_sum += sums[w];
      }
      plan.attention[row * plan.inner + head * head_dim + d] = total / total_sum;
    }
    __syncthreads();
  }
}

// --- phase 3 ------------------------------------------------------------

__device__ __forceinline__ float load_float(const void* base, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(__ldg(static_cast<const __half*>(base) + index));
    case DType::kBFloat16:
      return to_float(__ldg(static_cast<const __nv_bfloat16*>(base) + index));
    default:
      return __ldg(static_cast<const float*>(base) + index);
  }
}

// out = x + update, rounded once; x bit for bit where there is no update.
template <typename T>
__device__ __forceinline__ void store_sum(void* out, int64_t out_index, const void* x, int64_t x_index,
                                          float update) {
  const T residual = __ldg(static_cast<const T*>(x) + x_index);
  static_cast<T*>(out)[out_index] = update == 0.0f ? residual : from_float<T>(to_float(residual) + update);
}

// Neighbouring column groups go to neighbouring blocks, so that all SMs have their part of the weight.
__device__ __forceinline__ int64_t column_group(int64_t round) {
  return (round * kDecodeWarps + threadIdx.x / kWarpSize) * gridDim.x + blockIdx.x;
}

template <typename T>
__device__ __forceinline__ void prefetch_weight(const DecodeAttentionParams& p, const DecodePlan& plan) {
  constexpr int kLine = 128 / sizeof(T);
  const int64_t groups = (p.hidden + kDecodeColumns - 1) / kDecodeColumns;
  for (int64_t round = 0; column_group(round) < groups; ++round) {
    for (int c = 0; c < kDecodeColumns; ++c) {
      const int64_t column = column_group(round) * kDecodeColumns + c;
      if (column >= p.hidden) break;
      const T* row = static_cast<const T*>(p.out_weight) + column * p.out_weight_stride_row;
      for (int k = threadIdx.x % kWarpSize * kLine; k < plan.inner; k += kWarpSize * kLine)
        prefetch_l2(row + k);
    }
  }
}

// [rows, kDecodeInnerChunk] of the attention rows into shared memory. Of a sample without keys nobody wrote
// them: `finish` does not look at what comes of it.
__device__ __forceinline__ void load_attention(const DecodePlan& plan, int64_t first_row, int rows,
                                               int first_inner) {
  const int left = plan.inner - first_inner, width = left < kDecodeInnerChunk ? left : kDecodeInnerChunk;
  for (int r = 0; r < rows; ++r) {
    const float* row = plan.attention + (first_row + r) * plan.inner + first_inner;
    for (int k = threadIdx.x; k < width; k += kDecodeThreads)
      plan.phase[r * kDecodeInnerChunk + k] = __ldcg(row + k);
  }
}

// sums[row * kDecodeColumns + c] += this lane's share of attention row `row` times weight row `column` + c.
template <typename T, int BYTES>
__device__ __forceinline__ void add_products(const DecodeAttentionParams& p, const DecodePlan& plan,
                                             int64_t column, int rows, int first_inner,
                                             float (&sums)[kWarpSize]) {
  const int left = plan.inner - first_inner, width = left < kDecodeInnerChunk ? left : kDecodeInnerChunk;
  const T* weight = static_cast<const T*>(p.out_weight) + column * p.out_weight_stride_row + first_inner;
  for (int k = threadIdx.x % kWarpSize * kDecodeChunk; k < width; k += kWarpSize * kDecodeChunk) {
    Chunk<T, kDecodeChunk, BYTES> raw[kDecodeColumns];
#pragma unroll
    for (int c = 0; c < kDecodeColumns; ++c) {
      if (column + c < p.hidden)
        raw[c].load(weight + c * p.out_weight_stride_row + k);
      else
        raw[c].clear();
    }
    float weights[kDecodeColumns][kDecodeChunk];
#pragma unroll
    for (int c = 0; c < kDecodeColumns; ++c) raw[c].to_floats(weights[c]);
#pragma unroll
    for (int r = 0; r < kDecodeProjectedRows; ++r) {
      if (r < rows) {
        float channels[kDecodeChunk];
        load_floats(plan.phase + r * kDecodeInnerChunk + k, channels);
#pragma unroll
        for (int i = 0; i < kDecodeChunk; ++i) {
#pragma unroll
          for (int c = 0; c < kDecodeColumns; ++c)
            sums[r * kDecodeColumns + c] = fmaf(channels[i], weights[c][i], sums[r * kDecodeColumns + c]);
        }
      }
    }
  }
}

// One output element.
__device__ __forceinline__ void finish(const DecodeAttentionParams& p, const DecodePlan& plan, int64_t row,
                                       int64_t column, float product) {
  const int64_t sample = row / p.text_len;
  const int64_t x_index = sample * p.x_stride_sample + row % p.text_len * p.x_stride_row + column;
  const int64_t out_index = row * p.hidden + column;
  float update = 0.0f;
  if (plan.num_keys(sample) > 0) update = tanhf(load_float(p.attn_gate, column, p.gate_dtype)) * product;
  switch (p.x_dtype) {
    case DType::kFloat32:
      return store_sum<float>(p.out, out_index, p.x, x_index, update);
    case DType::kFloat16:
      return store_sum<__half>(p.out, out_index, p.x, x_index, update);
    case DType::kBFloat16:
      return store_sum<__nv_bfloat16>(p.out, out_index, p.x, x_index, update);
  }
}

template <typename T, int BYTES>
__device__ __forceinline__ void project(const DecodeAttentionParams& p, const DecodePlan& plan) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_rows = p.batch * p.text_len;
  const int64_t block_columns = static_cast<int64_t>(gridDim.x) * kDecodeWarps * kDecodeColumns;
  const int64_t rounds = (p.hidden + block_columns - 1) / block_columns;
  const bool one_chunk = num_rows <= kDecodeProjectedRows && plan.inner <= kDecodeInnerChunk;
  if (one_chunk) load_attention(plan, 0, static_cast<int>(num_rows), 0);
  __syncthreads();
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t column = column_group(round) * kDecodeColumns;
    for (int64_t first_row = 0; first_row < num_rows; first_row += kDecodeProjectedRows) {
      const int64_t left = num_rows - first_row;
      const int rows = left < kDecodeProjectedRows ? static_cast<int>(left) : kDecodeProjectedRows;
      float sums[kWarpSize] = {};
      for (int inner = 0; inner < plan.inner; inner += kDecodeInnerChunk) {
        if (!one_chunk) {
          __syncthreads();
          load_attention(plan, first_row, rows, inner);
          __syncthreads();
        }
        if (column < p.hidden) add_products<T, BYTES>(p, plan, column, rows, inner, sums);
      }
      const float product = warp_transposed_sum(sums, lane);
      const int row = lane / kDecodeColumns;
      if (row < rows && column + lane % kDecodeColumns < p.hidden)
        finish(p, plan, first_row + row, column + lane % kDecodeColumns, product);
    }
  }
}

// LANES lanes share a key: LANES * kDecodeChunk >= head_dim. ROWS query rows share every load of a key.
// BYTES: of one access to keys, values and weight.
template <typename T, int LANES, int ROWS, int BYTES>
__global__ void __launch_bounds__(kDecodeThreads, ROWS == 1 ? 2 : 1)
    decode_attention_kernel(DecodeAttentionParams p) {
  static_assert(kDecodeColumns * kDecodeProjectedRows == kWarpSize, "a lane finishes one element");
  const auto grid = cooperative_groups::this_grid();
  const DecodePlan plan = make_plan<LANES, ROWS>(p);
  attend<T, LANES, ROWS, BYTES>(p, plan);
  auto attended = grid.barrier_arrive();
  prefetch_weight<T>(p, plan);  // what depends on no other block is done while waiting for them
  grid.barrier_wait(std::move(attended));
  combine<LANES>(p, plan);
  grid.sync();
  project<T, BYTES>(p, plan);
}

}  // namespace infimm
