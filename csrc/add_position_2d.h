#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace infimm {

// out[n, t, :] = x[n, t, :] + PE(column, row) of the window, or of the patch when per_token is set.
// Strides are in elements. The last stride of x and of out is 1.
struct AddPosition2dParams {
  const void* x;          // [num_windows, seqlen, hidden]
  void* out;              // same shape and dtype as x, no overlap with it
  const void* positions;  // [num_windows, 2] = (row, column); a negative one means: copy the window
  DType dtype;
  bool positions_are_int64;  // int32 otherwise
  int64_t num_windows;
  int64_t seqlen;
  int64_t hidden;  // a multiple of 4
  int64_t x_stride_window;
  int64_t x_stride_token;
  int64_t out_stride_window;
  int64_t out_stride_token;
  int64_t positions_stride_window;
  int64_t positions_stride_axis;
  bool per_token;
  int64_t window_height;  // in patches; per_token only, seqlen == num_prefix_tokens + height * width
  int64_t window_width;
  int64_t num_prefix_tokens;  // copied when per_token, encoded like every other token otherwise
};

// Asynchronous on `stream`; the caller has made the device current.
cudaError_t launch_add_position_2d(const AddPosition2dParams& params, cudaStream_t stream);

}  // namespace infimm
