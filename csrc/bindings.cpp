// Registers the launch functions as the Python module infimm_kernels._C. Tensors arrive as plain integers, so
// the module depends on no torch version; infimm_kernels/*/cuda.py are its only callers.
#include "bindings.h"

#include "add_position_2d.h"
#include "common/device_guard.h"
#include "decode_attention.h"

namespace py = pybind11;

namespace {

using infimm::AddPosition2dParams;
using infimm::DecodeAttentionParams;
using infimm::DType;
using infimm::dtype_from_code;
using infimm::require;
using infimm::require_at_least;
using infimm::require_pointer;
using infimm::require_within;
using infimm::throw_on_error;

void add_position_2d(uintptr_t x, uintptr_t out, uintptr_t positions, int dtype, bool positions_are_int64,
                     int64_t num_windows, int64_t seqlen, int64_t hidden, int64_t x_stride_window,
                     int64_t x_stride_token, int64_t out_stride_window, int64_t out_stride_token,
                     int64_t positions_stride_window, int64_t positions_stride_axis, bool per_token,
                     int64_t window_height, int64_t window_width, int64_t num_prefix_tokens, int device,
                     uintptr_t stream) {
  AddPosition2dParams params;
  params.dtype = dtype_from_code(dtype);
  require_at_least(num_windows, 0, "num_windows");
  require_at_least(seqlen, 0, "seqlen");
  require_at_least(num_prefix_tokens, 0, "num_prefix_tokens");
  require_at_least(device, 0, "device");
  require(hidden > 0 && hidden % 4 == 0,
          "hidden must be a positive multiple of 4, got " + std::to_string(hidden));
  if (num_windows == 0 || seqlen == 0) return;
  require_pointer(x, "x");
  require_pointer(out, "out");
  require_pointer(positions, "positions");
  if (per_token) {
    require_at_least(window_height, 0, "window_height");
    require_at_least(window_width, 0, "window_width");
    // Divided, not multiplied, so that no product can overflow.
    const int64_t patches = seqlen - num_prefix_tokens;
    const bool fits = patches == 0 ? window_height == 0 || window_width == 0
                                   : window_height > 0 && patches % window_height == 0 &&
                                         patches / window_height == window_width;
    require(fits,
            "window_height * window_width must be seqlen - num_prefix_tokens = " + std::to_string(patches) +
                ", got " + std::to_string(window_height) + " * " + std::to_string(window_width));
  }
  params.x = reinterpret_cast<const void*>(x);
  params.out = reinterpret_cast<void*>(out);
  params.positions = reinterpret_cast<const void*>(positions);
  params.positions_are_int64 = positions_are_int64;
  params.num_windows = num_windows;
  params.seqlen = seqlen;
  params.hidden = hidden;
  params.x_stride_window = x_stride_window;
  params.x_stride_token = x_stride_token;
  params.out_stride_window = out_stride_window;
  params.out_stride_token = out_stride_token;
  params.positions_stride_window = positions_stride_window;
  params.positions_stride_axis = positions_stride_axis;
  params.per_token = per_token;
  params.window_height = window_height;
  params.window_width = window_width;
  params.num_prefix_tokens = num_prefix_tokens;

  const infimm::DeviceGuard guard(device);
  const cudaError_t error =
      guard.error() != cudaSuccess
          ? guard.error()
          : infimm::launch_add_position_2d(params, reinterpret_cast<cudaStream_t>(stream));
  throw_on_error(error, "add_position_2d",
                 " for x [" + std::to_string(num_windows) + ", " + std::to_string(seqlen) + ", " +
                     std::to_string(hidden) + "] " + infimm::dtype_name(params.dtype) + " on device " +
                     std::to_string(device));
}

void decode_attention(uintptr_t x, uintptr_t out, uintptr_t query, uintptr_t key, uintptr_t value,
                      uintptr_t out_weight, uintptr_t attn_gate, uintptr_t key_ranges, uintptr_t workspace,
                      int64_t workspace_floats, int dtype, int x_dtype, int gate_dtype, int64_t max_blocks,
                      int64_t batch, int64_t text_len, int64_t hidden, int64_t total, int64_t num_heads,
                      int64_t num_kv_heads, int64_t head_dim, int64_t x_stride_sample, int64_t x_stride_row,
                      int64_t query_stride_sample, int64_t query_stride_row, int64_t query_stride_head,
                      int64_t key_stride_token, int64_t key_stride_head, int64_t value_stride_token,
                      int64_t value_stride_head, int64_t out_weight_stride_row,
                      int64_t key_ranges_stride_sample, int64_t key_ranges_stride_bound, double softmax_scale,
                      int device, uintptr_t stream) {
  DecodeAttentionParams params;
  params.dtype = dtype_from_code(dtype);
  params.x_dtype = dtype_from_code(x_dtype);
  params.gate_dtype = dtype_from_code(gate_dtype);
  require_within(batch, 0, infimm::kDecodeMaxBatch, "batch");
  require_within(text_len, 0, infimm::kDecodeMaxTextLen, "text_len");
  require_at_least(hidden, 0, "hidden");
  require_within(total, 0, infimm::kDecodeMaxTokens, "total");
  require_within(num_heads, 1, infimm::kDecodeMaxHeads, "num_heads");
  require(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "num_kv_heads must divide num_heads (" +
                                                                 std::to_string(num_heads) + "), got " +
                                                                 std::to_string(num_kv_heads));
  require(head_dim > 0 && head_dim % 8 == 0 && head_dim <= infimm::kDecodeMaxHeadDim,
          "head_dim must be a multiple of 8 up to " + std::to_string(infimm::kDecodeMaxHeadDim) + ", got " +
              std::to_string(head_dim));
  require_within(max_blocks, 1, infimm::kDecodeMaxBlocks, "max_blocks");
  require_at_least(device, 0, "device");
  params.max_blocks = max_blocks;
  params.batch = batch;
  params.text_len = text_len;
  params.hidden = hidden;
  params.total = total;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  require_at_least(workspace_floats, infimm::decode_workspace_floats(params), "workspace_floats");
  if (batch == 0 || text_len == 0 || hidden == 0) return;
  require_pointer(x, "x");
  require_pointer(out, "out");
  require_pointer(query, "query");
  require_pointer(out_weight, "out_weight");
  require_pointer(attn_gate, "attn_gate");
  require_pointer(key_ranges, "key_ranges");
  require_pointer(workspace, "workspace");
  if (total > 0) {
    require_pointer(key, "key");
    require_pointer(value, "value");
  }
  params.x = reinterpret_cast<const void*>(x);
  params.out = reinterpret_cast<void*>(out);
  params.query = reinterpret_cast<const void*>(query);
  params.key = reinterpret_cast<const void*>(key);
  params.value = reinterpret_cast<const void*>(value);
  params.out_weight = reinterpret_cast<const void*>(out_weight);
  params.attn_gate = reinterpret_cast<const void*>(attn_gate);
  params.key_ranges = reinterpret_cast<const int32_t*>(key_ranges);
  params.workspace = reinterpret_cast<float*>(workspace);
  params.workspace_floats = workspace_floats;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.x_stride_sample = x_stride_sample;
  params.x_stride_row = x_stride_row;
  params.query_stride_sample = query_stride_sample;
  params.query_stride_row = query_stride_row;
  params.query_stride_head = query_stride_head;
  params.key_stride_token = key_stride_token;
  params.key_stride_head = key_stride_head;
  params.value_stride_token = value_stride_token;
  params.value_stride_head = value_stride_head;
  params.out_weight_stride_row = out_weight_stride_row;
  params.key_ranges_stride_sample = key_ranges_stride_sample;
  params.key_ranges_stride_bound = key_ranges_stride_bound;

  const infimm::DeviceGuard guard(device);
  const cudaError_t error =
      guard.error() != cudaSuccess
          ? guard.error()
          : infimm::launch_decode_attention(params, reinterpret_cast<cudaStream_t>(stream));
  throw_on_error(error, "decode_attention",
                 " for x [" + std::to_string(batch) + ", " + std::to_string(text_len) + ", " +
                     std::to_string(hidden) + "] " + infimm::dtype_name(params.x_dtype) + ", key [" +
                     std::to_string(total) + ", " + std::to_string(num_kv_heads) + ", " +
                     std::to_string(head_dim) + "] " + infimm::dtype_name(params.dtype) + " on device " +
                     std::to_string(device));
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) return 0;
  throw_on_error(error, "device_count", "");
  return count;
}

py::dict build_info() {
  py::dict info;
  info["archs"] = py::str(INFIMM_CUDA_ARCHS).attr("split")(";");
  info["nvcc"] = INFIMM_NVCC_VERSION;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MICRO);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA launch functions of infimm_kernels";

  py::dict dtypes;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    dtypes[infimm::dtype_name(dtype)] = static_cast<int>(dtype);
  }
  module.attr("DTYPES") = dtypes;

  module.def("build_info", &build_info, "What the module was compiled for and with: archs, nvcc, pybind11.");
  module.def("device_count", &device_count, "Number of usable GPUs; 0 without a driver.");
  module.def(
      "add_position_2d", &add_position_2d, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("positions"),
      py::arg("dtype"), py::arg("positions_are_int64"), py::arg("num_windows"), py::arg("seqlen"),
      py::arg("hidden"), py::arg("x_stride_window"), py::arg("x_stride_token"), py::arg("out_stride_window"),
      py::arg("out_stride_token"), py::arg("positions_stride_window"), py::arg("positions_stride_axis"),
      py::arg("per_token"), py::arg("window_height"), py::arg("window_width"), py::arg("num_prefix_tokens"),
      py::arg("device"), py::arg("stream"),
      "Asynchronous on `stream`. Pointers are device addresses, strides count elements, dtype is a code of "
      "DTYPES.");
  module.def("decode_attention", &decode_attention, py::kw_only(), py::arg("x"), py::arg("out"),
             py::arg("query"), py::arg("key"), py::arg("value"), py::arg("out_weight"), py::arg("attn_gate"),
             py::arg("key_ranges"), py::arg("workspace"), py::arg("workspace_floats"), py::arg("dtype"),
             py::arg("x_dtype"), py::arg("gate_dtype"), py::arg("max_blocks"), py::arg("batch"),
             py::arg("text_len"), py::arg("hidden"), py::arg("total"), py::arg("num_heads"),
             py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("x_stride_sample"),
             py::arg("x_stride_row"), py::arg("query_stride_sample"), py::arg("query_stride_row"),
             py::arg("query_stride_head"), py::arg("key_stride_token"), py::arg("key_stride_head"),
             py::arg("value_stride_token"), py::arg("value_stride_head"), py::arg("out_weight_stride_row"),
             py::arg("key_ranges_stride_sample"), py::arg("key_ranges_stride_bound"),
             py::arg("softmax_scale"), py::arg("device"), py::arg("stream"),
             "Asynchronous on `stream`, one cooperative launch. As add_position_2d; `workspace` holds "
             "workspace_floats floats of any content, as many as decode_workspace_floats in csrc asks for.");
#ifdef INFIMM_SM90A
  infimm::bind_window_attention(module);
#endif
}
