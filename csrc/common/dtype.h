#pragma once

namespace infimm {

// The codes Python passes; bindings.cpp publishes them as `_C.DTYPES`.
enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
  }
  return "unknown dtype";
}

}  // namespace infimm
