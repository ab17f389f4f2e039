#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

namespace infimm {

template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// SIZE floats from or to shared memory, 16 bytes at a time: single ones, lanes SIZE apart, would meet in few
// banks.
template <int SIZE>
__device__ __forceinline__ void load_floats(const float* address, float (&values)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE / 4; ++i) {
    const float4 part = reinterpret_cast<const float4*>(address)[i];
    values[4 * i] = part.x;
    values[4 * i + 1] = part.y;
    values[4 * i + 2] = part.z;
    values[4 * i + 3] = part.w;
  }
}

template <int SIZE>
__device__ __forceinline__ void store_floats(float* address, const float (&values)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE / 4; ++i) {
    reinterpret_cast<float4*>(address)[i] =
        make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
}

// SIZE consecutive elements, moved by accesses of BYTES bytes; the address must be a multiple of BYTES.
// The raw words are kept, so that load + store without arithmetic is a bit-exact copy.
template <typename T, int SIZE, int BYTES>
struct Chunk {
  static_assert(SIZE * sizeof(T) % BYTES == 0, "a chunk is a whole number of accesses");
  using Word = typename WordOf<BYTES>::type;
  static constexpr int kWords = SIZE * sizeof(T) / BYTES;

  Word words[kWords];

  __device__ __forceinline__ void load(const T* address) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(address) + i);
  }

  __device__ __forceinline__ void store(T* address) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(address)[i] = words[i];
  }

  __device__ __forceinline__ void clear() { memset(words, 0, sizeof(words)); }

  __device__ __forceinline__ void to_floats(float (&floats)[SIZE]) const {
    T values[SIZE];
    memcpy(values, words, sizeof(values));
#pragma unroll
    for (int i = 0; i < SIZE; ++i) floats[i] = to_float(values[i]);
  }

  // Adds in float32 and rounds once.
  __device__ __forceinline__ void add(const float (&addend)[SIZE]) {
    T values[SIZE];
    memcpy(values, words, sizeof(values));
#pragma unroll
    for (int i = 0; i < SIZE; ++i) values[i] = from_float<T>(to_float(values[i]) + addend[i]);
    memcpy(words, values, sizeof(values));
  }
};

}  // namespace infimm
