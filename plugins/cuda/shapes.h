// What the host half of the kernels decides from shapes and addresses alone; launches and host tests share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "pool_attention_body.h"
#include "pool_update_body.h"

namespace trimkv::cuda {

// --- PoolAttention --------------------------------------------------------------------------------------------------

// Which kernels run.
enum class Path { kSimple, kDecode, kPrefill };

inline bool HasMatrixShape(const PoolAttentionArgs& args) {
  return args.type != DataType::kFloat32 && args.shape.head_dim % kVector == 0;
}

inline bool FewRows(const PoolAttentionArgs& args) {
  return static_cast<int64_t>(args.steps) * args.group <= kTileRows;
}

inline Path ChoosePath(const PoolAttentionArgs& args) {
  uintptr_t bits = 0;
  for (const void* base : {args.query, args.key, args.value, args.pool_key, args.pool_value, args.recent_key,
                           args.recent_value, static_cast<const void*>(args.attended)}) {
    bits |= reinterpret_cast<uintptr_t>(base);
  }
  if (!HasMatrixShape(args) || bits % 16 != 0) return Path::kSimple;
  return FewRows(args) ? Path::kDecode : Path::kPrefill;
}

// --- PoolUpdate -----------------------------------------------------------------------------------------------------

inline int64_t RowBytes(const PoolUpdateArgs& args) {
  return static_cast<int64_t>(args.shape.head_dim) * static_cast<int64_t>(ItemSize(args.type));
}

// Entries outside the pool at most.
inline int64_t MostOutside(const PoolUpdateArgs& args) {
  return (static_cast<int64_t>(args.shape.evict_every) + args.steps) * args.shape.num_streams();
}

// Vectors that a batch row copies at most.
inline int64_t MostItems(const PoolUpdateArgs& args, int64_t vector_bytes) {
  return MostOutside(args) * (RowBytes(args) / vector_bytes);
}

// Whether every row of keys and values starts at a multiple of `bytes`.
inline bool RowsAligned(const PoolUpdateArgs& args, size_t bytes) {
  uintptr_t bits = static_cast<uintptr_t>(RowBytes(args));
  for (const void* base : {args.pool_key, args.pool_value, args.recent_key, args.recent_value}) {
    bits |= reinterpret_cast<uintptr_t>(base);
  }
  for (int32_t layer = 0; layer < args.shape.num_layers; ++layer) {
    bits |= reinterpret_cast<uintptr_t>(args.key[layer]) | reinterpret_cast<uintptr_t>(args.value[layer]);
  }
  return bits % bytes == 0;
}

}  // namespace trimkv::cuda
