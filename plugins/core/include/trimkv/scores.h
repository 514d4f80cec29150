// Retention scores and the total order of entries (docs/design.md, section 3), for host and device.
#pragma once

#include <cmath>
#include <cstring>

#include "trimkv/types.h"

namespace trimkv {

// Below this magnitude of log beta, (1 - beta^k) / (1 - beta) is k to within float32, and 1 - beta itself cancels.
inline constexpr double kLookaheadLimit = 1e-9;

// Score of an entry after `tokens_seen` tokens; the same roundings as policy/scores.py.
TRIMKV_HOST_DEVICE inline float RetentionScore(float log_beta, int32_t position, int32_t tokens_seen,
                                               int32_t lookahead_steps) {
  const int64_t age = static_cast<int64_t>(tokens_seen) - position;
  if (lookahead_steps == 1) return log_beta * static_cast<float>(age + 1);
  const double x = log_beta;
  const double horizon = x > -kLookaheadLimit ? std::log(static_cast<double>(lookahead_steps))
                                              : std::log(std::expm1(lookahead_steps * x) / std::expm1(x));
  // Two roundings, never one fused operation: host, device and NumPy must agree to the bit.
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(log_beta, static_cast<float>(age + 2)), static_cast<float>(horizon));
#else
  volatile float decay = log_beta * static_cast<float>(age + 2);
  return decay + static_cast<float>(horizon);
#endif
}

// A key whose unsigned order is the order of scores; higher is better. +0 and -0 are one score.
TRIMKV_HOST_DEVICE inline uint32_t OrderedKey(float score) {
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(score == 0.0f ? 0.0f : score);
#else
  const float value = score == 0.0f ? 0.0f : score;
  std::memcpy(&bits, &value, sizeof bits);
#endif
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Order of entries of equal score: newer position first, then lower stream. Unique for each entry; higher is better.
TRIMKV_HOST_DEVICE inline uint64_t TieKey(int32_t position, int32_t stream) {
  return static_cast<uint64_t>(static_cast<uint32_t>(position)) << 32 | (0xffffffffu - static_cast<uint32_t>(stream));
}

}  // namespace trimkv
