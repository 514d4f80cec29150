// Checks of kernel arguments, the same for every device.
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

}  // namespace trimkv
