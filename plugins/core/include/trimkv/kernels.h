// The two operators as kernels take them: raw pointers, sizes, and what they may use while they run.
//
// All pointers are to one memory space, the host's for the CPU kernels and the device's for CUDA. Tensors are dense and
// row-major. The state is updated in place. Nothing is allocated: `workspace` is the caller's, of at least the bytes
// that the matching *WorkspaceBytes returns, 256-byte aligned, and carries nothing from one call to the next.
#pragma once

#include "trimkv/types.h"

namespace trimkv {

struct PoolAttentionArgs {
  CacheShape shape;
  DataType type;  // of query, key, value, attended and the cached keys and values
  int32_t layer;
  int32_t group;  // G, query heads for each KV head
  int32_t steps;  // S, tokens of this step, right-padded
  float scale;    // on query · key

  const void* query;            // [B, S, H·G, D], RoPE applied
  const void* key;              // [B, S, H, D], RoPE applied
  const void* value;            // [B, S, H, D]
  const void* pool_key;         // [B, N, D]
  const void* pool_value;       // [B, N, D]
  const int32_t* slot_index;    // [B, N]: pool slots grouped by stream
  const int32_t* stream_start;  // [B, L·H + 1]: where each stream's group starts in slot_index
  const void* recent_key;       // [B, L, H, b, D]
  const void* recent_value;     // [B, L, H, b, D]
  const int32_t* counters;      // [B, 4]
  const int32_t* step_tokens;   // [B]: valid tokens of this step; 0 leaves a row alone
  void* attended;               // [B, S, H·G, D]; zeros behind the valid tokens

  void* workspace;
};

struct PoolUpdateArgs {
  CacheShape shape;
  DataType type;  // of the keys and values
  Policy policy;
  int32_t min_tokens_per_head;
  int32_t lookahead_steps;
  int32_t steps;  // S

  // State, updated in place.
  void* pool_key;          // [B, N, D]
  void* pool_value;        // [B, N, D]
  float* pool_log_beta;    // [B, N]
  int32_t* pool_position;  // [B, N]
  int32_t* slot_index;     // [B, N]
  int32_t* stream_start;   // [B, L·H + 1]
  void* recent_key;        // [B, L, H, b, D]
  void* recent_value;      // [B, L, H, b, D]
  float* recent_log_beta;  // [B, L, H, b]
  int32_t* counters;       // [B, 4]

  const int32_t* step_tokens;         // [B]
  const int32_t* budget;              // [B]: entries per stream on average, at most M
  const void* key[kMaxLayers];        // per layer [B, S, H, D]
  const void* value[kMaxLayers];      // per layer [B, S, H, D]
  const float* log_beta[kMaxLayers];  // per layer [B, S, H]

  void* workspace;
};

// Null if the arguments can be used, else what is wrong with them (a literal). Looks at sizes, never at device memory.
const char* Check(const PoolAttentionArgs& args);
const char* Check(const PoolUpdateArgs& args);

// The same for what decides which memory a kernel touches: the counters and indices of the state, and the step's own
// counts, of every row that takes part. A state that no update made, such as one out of a forged file, is told here and
// not by a crash. Reads host memory; kernels on a device clamp the same values instead.
const char* CheckState(const PoolAttentionArgs& args);
const char* CheckState(const PoolUpdateArgs& args);

}  // namespace trimkv
