// Stable compaction and stable counting sort by one block.
#pragma once

#include <cstdint>

#include "group.h"

namespace trimkv::cuda {

// Calls `write(rank, i)` for the first `limit` of those i in 0…n−1 for which `flag(i)`, rank counting up with i.
// Returns how many i are flagged, `limit` or not. `flag` is asked twice.
template <class Block, class Flag, class Write>
TRIMKV_DEVICE int32_t Compact(Block& block, int32_t n, int32_t limit, int32_t* sums /* [kScanInts], shared */,
                              const Flag& flag, const Write& write) {
  const Range range = WarpRange(block, n, block.Warps());
  int32_t own = 0;
  for (int32_t first = range.begin; first < range.end; first += kWarpSize) {
    const int32_t i = first + block.Lane();
    own += block.PopCount(block.Ballot(i < range.end && flag(i)));
  }
  if (block.Lane() == 0) sums[block.Warp()] = own;
  block.Sync();
  int32_t before = 0;
  int32_t total = 0;
  for (int warp = 0; warp < block.Warps(); ++warp) {
    if (warp < block.Warp()) before += sums[warp];
    total += sums[warp];
  }
  block.Sync();
  const uint32_t lower = (1u << block.Lane()) - 1;
  for (int32_t first = range.begin; first < range.end && before < limit; first += kWarpSize) {
    const int32_t i = first + block.Lane();
    const bool chosen = i < range.end && flag(i);
    const uint32_t votes = block.Ballot(chosen);
    const int32_t rank = before + block.PopCount(votes & lower);
    if (chosen && rank < limit) write(rank, i);
    before += block.PopCount(votes);
  }
  return total;
}

// Warps that can count at once when their tables of `bins` ints are to fit in `table_ints`.
TRIMKV_HOST_DEVICE constexpr int SortingWarps(int warps, int bins, int table_ints) {
  return warps * bins <= table_ints ? warps : table_ints / bins;
}

// Indices 0…n−1 sorted by `bin[i]` (0…bins−1), ascending inside a bin: `order` [n], and where each bin starts [bins].
template <class Block>
TRIMKV_DEVICE void SortByBin(Block& block, const int32_t* bin, int32_t n, int32_t bins, int32_t* order, int32_t* start,
                             int32_t* table, int table_ints /* shared */, int32_t* sums /* [kScanInts], shared */) {
  const int warps = SortingWarps(block.Warps(), bins, table_ints);
  for (int32_t i = block.Thread(); i < warps * bins; i += block.Threads()) table[i] = 0;
  block.Sync();

  // How many of each bin lie in each warp's range.
  const Range range = block.Warp() < warps ? WarpRange(block, n, warps) : Range{0, 0};
  int32_t* own = table + block.Warp() * bins;
  for (int32_t i = range.begin + block.Lane(); i < range.end; i += kWarpSize) block.AtomicAdd(&own[bin[i]], 1);
  block.Sync();

  // Each count becomes the place of its first index: bin by bin, and within a bin warp by warp.
  BlockGroup<Block> group{block, sums};
  int32_t done = 0;
  for (int32_t first = 0; first < bins; first += block.Threads()) {
    const int32_t b = first + block.Thread();
    int32_t count = 0;
    for (int warp = 0; warp < warps && b < bins; ++warp) count += table[warp * bins + b];
    int32_t place = done + group.ExclusiveScan(count);
    if (block.Thread() == block.Threads() - 1) sums[0] = place + count;
    if (b < bins) {
      start[b] = place;
      for (int warp = 0; warp < warps; ++warp) {
        const int32_t here = table[warp * bins + b];
        table[warp * bins + b] = place;
        place += here;
      }
    }
    block.Sync();
    done = sums[0];
    block.Sync();
  }

  const uint32_t lower = (1u << block.Lane()) - 1;
  for (int32_t first = range.begin; first < range.end; first += kWarpSize) {
    const int32_t i = first + block.Lane();
    const int32_t b = i < range.end ? bin[i] : -1;
    const uint32_t same = block.MatchAny(b);
    const int32_t rank = block.PopCount(same & lower);
    if (b >= 0) order[own[b] + rank] = i;
    block.SyncWarp();
    if (b >= 0 && rank == 0) own[b] += block.PopCount(same);
    block.SyncWarp();
  }
}

}  // namespace trimkv::cuda
