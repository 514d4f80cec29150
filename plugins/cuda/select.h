// Exact selection of the best k entries: radix select on the score's key, then among equals on the tie key.
#pragma once

#include <cstdint>

#include "group.h"

namespace trimkv::cuda {

// An entry stays if (key, tie) is not below this, key first.
struct Threshold {
  uint32_t key;
  uint64_t tie;

  TRIMKV_DEVICE bool Admits(uint32_t entry_key, uint64_t entry_tie) const {
    return entry_key > key || (entry_key == key && entry_tie >= tie);
  }
};

// Keys of entries lie between these; 0 marks a free slot.
inline constexpr uint32_t kLowestKey = 1;
inline constexpr uint32_t kHighestKey = 0xfffffffeu;
inline constexpr uint32_t kNoKey = 0;

inline constexpr int kBlockDigit = 11;  // bits of a radix digit when a block selects; 3 passes over the keys
inline constexpr int kWarpDigit = 8;    // when a warp does; 4 passes

// Ints of shared memory for a histogram.
TRIMKV_HOST_DEVICE constexpr int HistogramInts(int digit) { return (1 << digit) + 4; }

struct KthKey {
  uint64_t value;   // the k-th largest key
  int32_t wanted;   // of the keys equal to it, how many are among the k largest
  int32_t present;  // how many keys are equal to it
};

// The k-th largest of the keys that `source(i, &key)` gives (returns true) for 0 <= i < n; 1 <= k <= how many it gives.
template <int kBits, int kDigit, class Group, class Block, class Source>
TRIMKV_DEVICE KthKey KthLargest(Group& group, Block& block, int32_t n, int32_t k, int32_t* histogram,
                                const Source& source) {
  constexpr int kBins = 1 << kDigit;
  int32_t* found = histogram + kBins;  // digit, wanted, present
  KthKey kth = {0, k, 0};
  uint64_t fixed = 0;  // mask of the digits already known
  for (int shift = (kBits - 1) / kDigit * kDigit; shift >= 0; shift -= kDigit) {
    for (int bin = group.Rank(); bin < kBins; bin += group.Size()) histogram[bin] = 0;
    group.Sync();
    for (int32_t i = group.Rank(); i < n; i += group.Size()) {
      uint64_t key;
      if (!source(i, &key) || (key & fixed) != kth.value) continue;
      block.AtomicAdd(&histogram[static_cast<int>(key >> shift) & (kBins - 1)], 1);
    }
    group.Sync();

    // Rank 0 owns the highest digits.
    const int per_rank = CeilDiv(kBins, group.Size());
    const int top = kBins - 1 - group.Rank() * per_rank;
    int32_t own = 0;
    for (int bin = top; bin > top - per_rank && bin >= 0; --bin) own += histogram[bin];
    int32_t above = group.ExclusiveScan(own);
    if (above < kth.wanted && kth.wanted <= above + own) {
      int bin = top;
      while (above + histogram[bin] < kth.wanted) above += histogram[bin--];
      found[0] = bin;
      found[1] = kth.wanted - above;
      found[2] = histogram[bin];
    }
    group.Sync();
    kth.value |= static_cast<uint64_t>(found[0]) << shift;
    kth.wanted = found[1];
    kth.present = found[2];
    fixed |= static_cast<uint64_t>(kBins - 1) << shift;
    group.Sync();
  }
  return kth;
}

// The threshold that admits exactly the best k of `candidates` entries. `entries.Key(i)` is kNoKey where i in 0…n−1 is
// no entry; `entries.Tie(i)` is asked for only where keys are equal.
template <int kDigit, class Group, class Block, class Entries>
TRIMKV_DEVICE Threshold BestThreshold(Group& group, Block& block, int32_t n, int32_t candidates, int32_t k,
                                      int32_t* histogram, const Entries& entries) {
  if (k <= 0) return {~0u, ~0ull};
  if (k >= candidates) return {kLowestKey, 0};
  const KthKey kth = KthLargest<32, kDigit>(group, block, n, k, histogram, [&](int32_t i, uint64_t* key) {
    const uint32_t own = entries.Key(i);
    *key = own;
    return own != kNoKey;
  });
  const uint32_t key = static_cast<uint32_t>(kth.value);
  if (kth.wanted == kth.present) return {key, 0};
  const KthKey tie = KthLargest<64, kDigit>(group, block, n, kth.wanted, histogram, [&](int32_t i, uint64_t* out) {
    if (entries.Key(i) != key) return false;
    *out = entries.Tie(i);
    return true;
  });
  return {key, tie.value};
}

}  // namespace trimkv::cuda
