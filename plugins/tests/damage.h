// A cache state that no update made, such as one out of a forged session file: kernels must not touch memory outside
// the cache for it.
#pragma once

#include <array>
#include <climits>
#include <random>

#include "state.h"

namespace trimkv::test {

// Changes one to four of the numbers that decide which memory a kernel touches.
inline void Damage(const Config& config, State& state, std::mt19937& random) {
  const int32_t slots = config.shape.num_slots, streams = config.shape.num_streams();
  const std::array<int32_t, 12> values = {INT_MIN, -1000000,  -1,        0,       1,           streams,
                                          slots,   slots + 1, 2 * slots, 1 << 20, INT_MAX - 1, INT_MAX};
  for (int n = 1 + static_cast<int>(random() % 4); n > 0; --n) {
    std::vector<int32_t>* const tensors[] = {&state.counters, &state.stream_start, &state.slot_index};
    std::vector<int32_t>& tensor = *tensors[random() % 3];
    int32_t& number = tensor[random() % tensor.size()];
    switch (random() % 3) {
      case 0:
        number = values[random() % values.size()];
        break;
      case 1:
        number = static_cast<int32_t>(static_cast<uint32_t>(number) ^ (1u << random() % 32));
        break;
      default:
        number = tensor[random() % tensor.size()];
    }
  }
}

}  // namespace trimkv::test
