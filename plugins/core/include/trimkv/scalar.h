// 16-bit storage types. Arithmetic is always float; on the host the conversions are written out, for the tests.
#pragma once

#include <cstdint>
#include <cstring>

#include "trimkv/types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace trimkv {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

TRIMKV_HOST_DEVICE inline float ToFloat(float value) { return value; }

TRIMKV_HOST_DEVICE inline float ToFloat(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

TRIMKV_HOST_DEVICE inline float ToFloat(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
TRIMKV_HOST_DEVICE T FromFloat(float value);

template <>
TRIMKV_HOST_DEVICE inline float FromFloat<float>(float value) {
  return value;
}

template <>
TRIMKV_HOST_DEVICE inline Half FromFloat<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return Half{static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return Half{static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // subnormal: let float addition do the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return Half{static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return Half{static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
#endif
}

template <>
TRIMKV_HOST_DEVICE inline BFloat16 FromFloat<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// Two values in one register, the first in the low half.
template <class T>
TRIMKV_HOST_DEVICE inline uint32_t Pack(float low, float high) {
  return FromFloat<T>(low).bits | static_cast<uint32_t>(FromFloat<T>(high).bits) << 16;
}

}  // namespace trimkv
