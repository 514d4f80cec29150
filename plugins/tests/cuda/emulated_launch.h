// The launches of the CUDA kernels on emulated threads, over host memory.
#pragma once

#include <vector>

#include "emulated_block.h"
#include "shapes.h"
#include "state.h"

namespace trimkv::cuda {

// Rows `first_row`… of the batch.
template <class T, int kDepth>
void EmulateAttentionOf(const PoolAttentionArgs& args, Path path, int32_t first_row, uint32_t seed) {
  using test::Garbage;
  const int32_t rows = args.steps * args.group;
  Emulator warp(kWarpSize, seed);
  Emulator pair(kDecodeWarps * kWarpSize, seed);
  Emulator four(kPrefillWarps * kWarpSize, seed);
  for (int32_t b = first_row; b < args.shape.batch; ++b) {
    if constexpr (sizeof(T) == 2) {
      using DecodeTile = Tile<T, kDepth, kDecodeEntries>;
      using PrefillTile = Tile<T, kDepth, kPrefillEntries>;
      if (path == Path::kDecode) {
        const DecodePlan plan = PlanDecode(args);
        for (int32_t x = 0; x < CeilDiv<int32_t>(plan.parts, kDecodeWarps); ++x) {
          Garbage shared(kDecodeWarps * kStages * sizeof(DecodeTile));
          pair.Run([&](EmulatedBlock& block) {
            DecodePart<EmulatedBlock, T, kDepth>(block, args, b, x * kDecodeWarps + block.Warp(),
                                                 reinterpret_cast<DecodeTile*>(shared.data()) + block.Warp() * kStages);
          });
        }
      }
      for (int32_t head = 0; head < args.shape.num_kv_heads && path == Path::kPrefill; ++head) {
        for (int32_t first = 0; first < rows; first += kPrefillRows) {
          Garbage shared(kStages * sizeof(PrefillTile));
          four.Run([&](EmulatedBlock& block) {
            Prefill<EmulatedBlock, T, kDepth>(block, args, b, head, first,
                                              reinterpret_cast<PrefillTile*>(shared.data()));
          });
        }
      }
    }
    for (int32_t head = 0; head < args.shape.num_kv_heads && path != Path::kPrefill; ++head) {
      for (int32_t r = 0; r < rows; ++r) {
        warp.Run([&](EmulatedBlock& block) {
          if constexpr (sizeof(T) == 2) {
            if (path == Path::kDecode) return MergeParts<EmulatedBlock, T>(block, args, b, head, r);
          }
          SimpleRow<EmulatedBlock, T>(block, args, b, head, r);
        });
      }
    }
  }
}

// `depth` is the widest head that the kernel of this path holds: 64, 128 or 256.
inline void EmulateAttention(const PoolAttentionArgs& args, Path path, int depth, int32_t first_row, uint32_t seed) {
  switch (args.type) {
    case DataType::kFloat32:
      return EmulateAttentionOf<float, 64>(args, path, first_row, seed);
    case DataType::kFloat16:
      if (depth == 64) return EmulateAttentionOf<Half, 64>(args, path, first_row, seed);
      if (depth == 128) return EmulateAttentionOf<Half, 128>(args, path, first_row, seed);
      return EmulateAttentionOf<Half, 256>(args, path, first_row, seed);
    case DataType::kBFloat16:
      if (depth == 64) return EmulateAttentionOf<BFloat16, 64>(args, path, first_row, seed);
      if (depth == 128) return EmulateAttentionOf<BFloat16, 128>(args, path, first_row, seed);
      return EmulateAttentionOf<BFloat16, 256>(args, path, first_row, seed);
  }
}

// Rows `first_row`… of the batch, each planned by a block of `threads`.
inline void EmulateUpdate(const PoolUpdateArgs& args, int threads, int32_t first_row, uint32_t seed) {
  Emulator emulator(threads, seed);
  std::vector<int32_t> shared(kPlanSharedBytes / sizeof(int32_t), 0x5a5a5a5a);
  for (int32_t row = first_row; row < args.shape.batch; ++row) {
    emulator.Run([&](EmulatedBlock& block) { PlanRow(block, args, row, shared.data()); });
  }
  const uint32_t movers = 7;  // any number of threads gives the same
  for (int32_t row = first_row; row < args.shape.batch; ++row) {
    for (uint32_t mover = 0; mover < movers; ++mover) {
      if (RowBytes(args) % 16 == 0) {
        struct Vector {
          char bytes[16];
        };
        MoveRow<Vector>(args, row, mover, movers);
      } else {
        MoveRow<uint16_t>(args, row, mover, movers);
      }
    }
  }
}

}  // namespace trimkv::cuda
