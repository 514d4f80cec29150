// The inner loops of attention, compiled once for each instruction set; see attention_tile.cc.
#pragma once

#include "trimkv/types.h"

namespace trimkv::cpu {

inline constexpr int kMaxRows = 16;  // query rows of one block
inline constexpr int kTile = 64;     // entries of one tile

// Softmax of one block of query rows over the entries seen so far, not yet divided by `sum`.
struct RunningSoftmax {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* acc;  // [rows, D]
};

// Entries of one stream, side by side or gathered.
struct Entries {
  const char* key;       // of entry 0
  const char* value;     // of entry 0
  const int32_t* index;  // [count]: entry i is row index[i]; null: row i
  size_t stride;         // bytes from row to row
  size_t bytes;          // of a row
  int count;
  int following;  // entries behind these in `index`, probably read next
};

struct TileKernels {
  // Takes `entries` (at most kTile) into the softmax of `rows` query rows [rows, D], scaled floats. Row r sees the
  // first visible[r] entries.
  void (*attend)(const float* query, int rows, int dim, DataType type, const Entries& entries, const int* visible,
                 const RunningSoftmax& state);
  // exp of values up to 0.
  float (*exp)(float x);
  // `count` elements of `type` <-> floats.
  void (*to_float)(const void* from, DataType type, int count, float* to);
  void (*from_float)(const float* from, DataType type, int count, void* to);
};

// The kernels for the best instruction set of this processor.
const TileKernels& GetTileKernels();

}  // namespace trimkv::cpu
