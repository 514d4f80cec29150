// Types that every kernel shares. No framework header is included here or by any kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define TRIMKV_HOST_DEVICE __host__ __device__
#else
#define TRIMKV_HOST_DEVICE
#endif

namespace trimkv {

// Storage type of keys, values and activations. Arithmetic is always float.
enum class DataType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

TRIMKV_HOST_DEVICE inline constexpr size_t ItemSize(DataType type) { return type == DataType::kFloat32 ? 4 : 2; }

// Which entries compete with each other (docs/design.md, section 3).
enum class Policy : int32_t { kGlobal = 0, kPerHead = 1 };

// Layers of a model at most; pointers of every layer travel in the arguments of one kernel.
inline constexpr int32_t kMaxLayers = 128;

// Largest head dimension; kernels keep a tile of rows in registers and on the stack.
inline constexpr int32_t kMaxHeadDim = 256;

// Sizes of one package's cache. Dimensions are those of docs/design.md, section 2.
struct CacheShape {
  int32_t batch;         // B, rows
  int32_t num_layers;    // L
  int32_t num_kv_heads;  // H
  int32_t head_dim;      // D
  int32_t num_slots;     // N, slots of one row's pool
  int32_t evict_every;   // b, tokens that `recent` holds

  TRIMKV_HOST_DEVICE int32_t num_streams() const { return num_layers * num_kv_heads; }
};

// Fields of a row of `counters`.
enum Counter : int32_t { kTokensSeen = 0, kPoolEntries = 1, kRecentTokens = 2, kEvictions = 3, kNumCounters = 4 };

}  // namespace trimkv
