// What the binding functions share: checks that raise ValueError, CUDA errors that raise RuntimeError.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace infimm {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw pybind11::value_error(message);
}

inline DType dtype_from_code(int code) {
  require(code >= 0 && code <= static_cast<int>(DType::kBFloat16),
          "dtype must be a code of DTYPES, got " + std::to_string(code));
  return static_cast<DType>(code);
}

inline void require_pointer(uintptr_t address, const char* name) {
  require(address != 0, std::string(name) + " must be a device address, got 0");
}

inline void require_at_least(int64_t value, int64_t low, const char* name) {
  require(value >= low,
          std::string(name) + " must be at least " + std::to_string(low) + ", got " + std::to_string(value));
}

inline void require_within(int64_t value, int64_t low, int64_t high, const char* name) {
  require(value >= low && value <= high, std::string(name) + " must be from " + std::to_string(low) + " to " +
                                             std::to_string(high) + ", got " + std::to_string(value));
}

inline void throw_on_error(cudaError_t error, const std::string& op, const std::string& arguments) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(op + ": CUDA error " + std::to_string(error) + " (" + cudaGetErrorString(error) +
                           ")" + arguments);
}

// Adds `window_attention` to the module; linked where sm_90a is built for.
void bind_window_attention(pybind11::module_& module);

}  // namespace infimm
