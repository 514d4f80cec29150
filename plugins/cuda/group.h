// Threads that work on one thing together: a warp or a whole block. Every member must make every call.
#pragma once

#include "block.h"

namespace trimkv::cuda {

// Ints of shared memory that a BlockGroup needs: a sum for each warp.
inline constexpr int kScanInts = 32;

template <class Block>
TRIMKV_DEVICE int32_t WarpInclusiveScan(Block& block, int32_t value) {
  TRIMKV_UNROLL
  for (int by = 1; by < kWarpSize; by *= 2) {
    const int32_t lower = block.ShuffleUp(value, by);
    if (block.Lane() >= by) value += lower;
  }
  return value;
}

template <class Block>
struct WarpGroup {
  Block& block;

  TRIMKV_DEVICE int Rank() const { return block.Lane(); }
  TRIMKV_DEVICE int Size() const { return kWarpSize; }
  TRIMKV_DEVICE void Sync() const { block.SyncWarp(); }
  // Sum of the values of lower ranks.
  TRIMKV_DEVICE int32_t ExclusiveScan(int32_t value) const { return WarpInclusiveScan(block, value) - value; }
};

template <class Block>
struct BlockGroup {
  Block& block;
  int32_t* sums;  // [kScanInts], shared

  TRIMKV_DEVICE int Rank() const { return block.Thread(); }
  TRIMKV_DEVICE int Size() const { return block.Threads(); }
  TRIMKV_DEVICE void Sync() const { block.Sync(); }
  TRIMKV_DEVICE int32_t ExclusiveScan(int32_t value) const {
    const int32_t inclusive = WarpInclusiveScan(block, value);
    if (block.Lane() == kWarpSize - 1) sums[block.Warp()] = inclusive;
    block.Sync();
    int32_t before = 0;
    for (int warp = 0; warp < block.Warp(); ++warp) before += sums[warp];
    block.Sync();
    return before + inclusive - value;
  }
};

// A warp's share of 0…n−1: one contiguous range for each warp, in order, so that ranks follow indices.
struct Range {
  int32_t begin;
  int32_t end;
};

template <class Block>
TRIMKV_DEVICE Range WarpRange(const Block& block, int32_t n, int warps) {
  const int32_t share = CeilDiv(CeilDiv(n, static_cast<int32_t>(warps)), kWarpSize) * kWarpSize;
  const int64_t begin = static_cast<int64_t>(share) * block.Warp();
  const int64_t end = begin + share;
  return {static_cast<int32_t>(begin < n ? begin : n), static_cast<int32_t>(end < n ? end : n)};
}

}  // namespace trimkv::cuda
