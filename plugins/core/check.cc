// Checks of kernel arguments, the same for every device.
#include <cstdint>

#include "trimkv/kernels.h"

namespace trimkv {
namespace {

const char* CheckShape(const CacheShape& shape) {
  if (shape.batch < 1) return "the batch must be at least 1";
  if (shape.num_layers < 1 || shape.num_layers > kMaxLayers) return "the number of layers must be 1 to 128";
  if (shape.num_kv_heads < 1) return "the number of KV heads must be at least 1";
  if (shape.head_dim < 1 || shape.head_dim > kMaxHeadDim) return "the head dimension must be 1 to 256";
  if (shape.num_slots < shape.num_streams() || shape.num_slots % shape.num_streams() != 0) {
    return "the pool must have a whole number of slots for each stream, at least one";
  }
  if (shape.evict_every < 1) return "evict_every must be at least 1";
  return nullptr;
}

// Streams [first, last) of one row: groups of slot_index one after the other, of slots that exist.
const char* CheckGroups(const CacheShape& shape, const int32_t* start, const int32_t* slot_index, int32_t first,
                        int32_t last) {
  if (start[first] < 0 || start[last] > shape.num_slots) return "the cache state is damaged: stream_start out of range";
  for (int32_t stream = first; stream < last; ++stream) {
    if (start[stream] > start[stream + 1]) return "the cache state is damaged: stream_start falls";
  }
  uint32_t highest = 0;
  for (int32_t i = start[first]; i < start[last]; ++i) {
    const uint32_t slot = static_cast<uint32_t>(slot_index[i]);  // a negative one is very large
    highest = slot > highest ? slot : highest;
  }
  if (highest >= static_cast<uint32_t>(shape.num_slots)) return "the cache state is damaged: slot_index out of range";
  return nullptr;
}

const char* CheckRecent(const CacheShape& shape, const int32_t* counters) {
  const int32_t recent = counters[kRecentTokens];
  if (recent < 0 || recent > shape.evict_every) return "the cache state is damaged: recent tokens out of range";
  return nullptr;
}

}  // namespace

const char* Check(const PoolAttentionArgs& args) {
  if (const char* error = CheckShape(args.shape)) return error;
  if (args.layer < 0 || args.layer >= args.shape.num_layers) return "layer is not one of the model's";
  if (args.group < 1) return "the query heads must be a multiple of the KV heads, at least one each";
  if (args.steps < 1) return "a step takes at least one token";
  return nullptr;
}

const char* Check(const PoolUpdateArgs& args) {
  if (const char* error = CheckShape(args.shape)) return error;
  if (args.steps < 1) return "a step takes at least one token";
  if (args.lookahead_steps < 1) return "lookahead_steps must be at least 1";
  if (args.min_tokens_per_head < 0) return "min_tokens_per_head must not be negative";
  if (args.min_tokens_per_head > args.shape.num_slots / args.shape.num_streams()) {
    return "min_tokens_per_head must not exceed the budget";
  }
  return nullptr;
}

const char* CheckState(const PoolAttentionArgs& args) {
  const CacheShape& shape = args.shape;
  const int32_t first = args.layer * shape.num_kv_heads;
  for (int32_t row = 0; row < shape.batch; ++row) {
    if (args.step_tokens[row] < 0 || args.step_tokens[row] > args.steps) return "step_tokens is out of range";
    if (args.step_tokens[row] == 0) continue;
    if (const char* error = CheckRecent(shape, args.counters + row * kNumCounters)) return error;
    const int32_t* start = args.stream_start + static_cast<size_t>(row) * (shape.num_streams() + 1);
    const int32_t* slot_index = args.slot_index + static_cast<size_t>(row) * shape.num_slots;
    if (const char* error = CheckGroups(shape, start, slot_index, first, first + shape.num_kv_heads)) return error;
  }
  return nullptr;
}

const char* CheckState(const PoolUpdateArgs& args) {
  const CacheShape& shape = args.shape;
  const int32_t streams = shape.num_streams(), most = shape.num_slots / streams;
  for (int32_t row = 0; row < shape.batch; ++row) {
    if (args.step_tokens[row] < 0 || args.step_tokens[row] > args.steps) return "step_tokens is out of range";
    if (args.step_tokens[row] == 0) continue;
    const int32_t lowest = args.min_tokens_per_head > 1 ? args.min_tokens_per_head : 1;
    if (args.budget[row] < lowest || args.budget[row] > most) return "budget is out of range";
    const int32_t* counters = args.counters + row * kNumCounters;
    const int32_t seen = counters[kTokensSeen], recent = counters[kRecentTokens];
    if (const char* error = CheckRecent(shape, counters)) return error;
    if (seen < recent) return "the cache state is damaged: fewer tokens seen than are recent";
    if (counters[kEvictions] < 0 || counters[kEvictions] == INT32_MAX) {
      return "the cache state is damaged: evictions out of range";
    }
    if (seen > INT32_MAX - args.steps) return "the cache is at the end of its positions";
    const int32_t* start = args.stream_start + static_cast<size_t>(row) * (streams + 1);
    const int32_t* slot_index = args.slot_index + static_cast<size_t>(row) * shape.num_slots;
    if (start[0] != 0 || start[streams] != counters[kPoolEntries]) {
      return "the cache state is damaged: stream_start and the pool's entries disagree";
    }
    if (const char* error = CheckGroups(shape, start, slot_index, 0, streams)) return error;
    // Tokens stay outside the pool only while it has no room for a whole one.
    if (recent > 0 && shape.num_slots - start[streams] >= streams) {
      return "the cache state is damaged: recent tokens beside a pool that has room for them";
    }
  }
  return nullptr;
}

}  // namespace trimkv
