#pragma once

#include "add_position_2d.h"
#include "common/vector.cuh"

namespace infimm {

constexpr int kAddPosition2dThreads = 256;

// What the launcher derives from the shapes.
struct AddPosition2dPlan {
  int chunk_groups;     // blockDim.x chunks of channels each
  int tokens_per_run;   // consecutive steps of one thread
  int64_t token_slabs;  // blockDim.y runs each
  // log of the ratio of two neighbouring frequencies, -4 log(10000) / hidden, as a sum of two floats.
  float log_step_high;
  float log_step_low;
};

// 10000^(-4k / hidden) to a relative 2^-22: what the float exponent loses is added back to first order.
// (CUDA's expf errs by 1 ulp, its exp2f and powf by more.)
__device__ __forceinline__ float position_frequency(int k, const AddPosition2dPlan& plan) {
  const float exponent = static_cast<float>(k) * plan.log_step_high;
  const float product_error = fmaf(static_cast<float>(k), plan.log_step_high, -exponent);
  const float rest = fmaf(static_cast<float>(k), plan.log_step_low, product_error);
  const float power = expf(exponent);
  return fmaf(power, rest, power);
}

__device__ __forceinline__ int64_t window_position(const AddPosition2dParams& p, int64_t window, int axis) {
  const int64_t offset = window * p.positions_stride_window + axis * p.positions_stride_axis;
  return p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[offset]
                               : static_cast<const int32_t*>(p.positions)[offset];
}

// The encoding of SIZE channels, recomputed only for the axis whose coordinate has changed.
template <int SIZE>
struct PositionEncoding {
  float frequency[SIZE / 2];
  float values[SIZE];
  int columns;  // pairs that encode x (the first half of the channels); the rest encode y
  int64_t x = -1;
  int64_t y = -1;

  __device__ __forceinline__ PositionEncoding(int first_channel, int hidden, const AddPosition2dPlan& plan) {
    const int first_pair = first_channel / 2;
    const int half_pairs = hidden / 4;
    columns = half_pairs - first_pair;
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
      const int pair = first_pair + i;
      frequency[i] = position_frequency(pair < half_pairs ? pair : pair - half_pairs, plan);
    }
  }

  __device__ __forceinline__ void move_to(int64_t new_x, int64_t new_y) {
#pragma unroll
    for (int i = 0; i < SIZE / 2; ++i) {
      const bool is_column = i < columns;
      const int64_t coordinate = is_column ? new_x : new_y;
      if (coordinate == (is_column ? x : y)) continue;
      sincosf(static_cast<float>(coordinate) * frequency[i], &values[2 * i], &values[2 * i + 1]);
    }
    x = new_x;
    y = new_y;
  }
};

// Where the n-th step of a window goes. Channels that encode x walk down the columns and channels that encode
// y along the rows, so that a thread's encoding stays the same for many steps.
struct TokenStep {
  int64_t token;
  int64_t x;
  int64_t y;
  bool encoded;
};

__device__ __forceinline__ TokenStep token_step(const AddPosition2dParams& p, int64_t step, int64_t row,
                                                int64_t column, bool down_columns) {
  if (row < 0 || column < 0) return {step, 0, 0, false};
  if (!p.per_token) return {step, column, row, true};
  if (step < p.num_prefix_tokens) return {step, 0, 0, false};
  const unsigned patch = static_cast<unsigned>(step - p.num_prefix_tokens);
  const unsigned height = static_cast<unsigned>(p.window_height);
  const unsigned width = static_cast<unsigned>(p.window_width);
  const unsigned i = down_columns ? patch % height : patch / width;
  const unsigned j = down_columns ? patch / height : patch % width;
  return {p.num_prefix_tokens + static_cast<int64_t>(i) * width + j, column * width + j, row * height + i,
          true};
}

// Block (channel chunks, token runs); the grid strides over (window, token slab, chunk group).
template <typename T, int SIZE, int BYTES>
__global__ void __launch_bounds__(kAddPosition2dThreads)
    add_position_2d_kernel(AddPosition2dParams p, AddPosition2dPlan plan) {
  const int hidden = static_cast<int>(p.hidden);
  const int64_t num_items = p.num_windows * plan.token_slabs * plan.chunk_groups;
  for (int64_t item = blockIdx.x; item < num_items; item += gridDim.x) {
    const int group = static_cast<int>(item % plan.chunk_groups);
    const int64_t slab = item / plan.chunk_groups % plan.token_slabs;
    const int64_t window = item / plan.chunk_groups / plan.token_slabs;
    const int channel = (group * blockDim.x + threadIdx.x) * SIZE;
    const int64_t begin = (slab * blockDim.y + threadIdx.y) * plan.tokens_per_run;
    const int64_t end = begin + plan.tokens_per_run < p.seqlen ? begin + plan.tokens_per_run : p.seqlen;
    if (channel >= hidden || begin >= end) continue;

    const int64_t row = window_position(p, window, 0);
    const int64_t column = window_position(p, window, 1);
    const bool down_columns = channel + SIZE <= hidden / 2;
    const T* x = static_cast<const T*>(p.x) + window * p.x_stride_window + channel;
    T* out = static_cast<T*>(p.out) + window * p.out_stride_window + channel;

    PositionEncoding<SIZE> encoding(channel, hidden, plan);
    TokenStep step = token_step(p, begin, row, column, down_columns);
    Chunk<T, SIZE, BYTES> chunk;
    chunk.load(x + step.token * p.x_stride_token);
    for (int64_t n = begin; n < end; ++n) {
      // The next load is issued before this token's arithmetic, to hide its latency.
      TokenStep next_step = step;
      Chunk<T, SIZE, BYTES> next_chunk = chunk;
      if (n + 1 < end) {
        next_step = token_step(p, n + 1, row, column, down_columns);
        next_chunk.load(x + next_step.token * p.x_stride_token);
      }
      if (step.encoded) {
        encoding.move_to(step.x, step.y);
        chunk.add(encoding.values);
      }
      chunk.store(out + step.token * p.out_stride_token);
      step = next_step;
      chunk = next_chunk;
    }
  }
}

}  // namespace infimm
