#include "pool_attention_plugin.h"

#include <algorithm>
#include <cmath>

#include "cuda/pool_attention.h"
#include "trimkv/types.h"

namespace trimkv::trt {
namespace {

enum Inputs : int32_t {
  kQuery,
  kKey,
  kValue,
  kPoolKey,
  kPoolValue,
  kSlotIndex,
  kStreamStart,
  kRecentKey,
  kRecentValue,
  kCounters,
  kStepTokens,
  kNumInputs,
};

constexpr Tensor kInputs[kNumInputs] = {
    {"query", -1, Element::kStorage, 4},        {"key", -1, Element::kStorage, 4},
    {"value", -1, Element::kStorage, 4},        {"pool_key", -1, Element::kStorage, 3},
    {"pool_value", -1, Element::kStorage, 3},   {"slot_index", -1, Element::kInt32, 2},
    {"stream_start", -1, Element::kInt32, 2},   {"recent_key", -1, Element::kStorage, 5},
    {"recent_value", -1, Element::kStorage, 5}, {"counters", -1, Element::kInt32, 2},
    {"step_tokens", -1, Element::kInt32, 1},
};

}  // namespace

void PoolAttentionPlugin::DeclareFields(FieldWriter& writer) {
  writer.Declare("layer", nv::PluginFieldType::kINT32);
  writer.Declare("num_layers", nv::PluginFieldType::kINT32);
  writer.Declare("num_kv_heads", nv::PluginFieldType::kINT32);
  writer.Declare("scale", nv::PluginFieldType::kFLOAT32);
}

PoolAttentionPlugin::PoolAttentionPlugin(const FieldReader& fields, nv::TensorRTPhase phase)
    : OperatorPlugin(kName, phase),
      layer_(fields.Int("layer")),
      num_layers_(fields.Int("num_layers")),
      num_kv_heads_(fields.Int("num_kv_heads")),
      scale_(fields.Float("scale")) {
  ExpectNumLayers(num_layers_);
  if (layer_ < 0 || layer_ >= num_layers_) {
    throw Error("layer must be 0 to num_layers - 1 = " + std::to_string(num_layers_ - 1) + ", got " +
                std::to_string(layer_));
  }
  ExpectAtLeast("num_kv_heads", 1, num_kv_heads_);
  if (!std::isfinite(scale_)) throw Error("scale must be finite, got " + std::to_string(scale_));
}

int32_t PoolAttentionPlugin::NumInputs() const noexcept { return kNumInputs; }
Tensor PoolAttentionPlugin::Input(int32_t input) const noexcept { return kInputs[input]; }
int32_t PoolAttentionPlugin::Like(int32_t) const noexcept { return kQuery; }

PoolAttentionArgs PoolAttentionPlugin::Arguments(const Shapes& shapes, DataType type) const {
  const auto at = [&](Inputs input, int32_t axis) { return shapes.At(input, axis, kInputs[input]); };
  const auto expect = [&](Inputs input, std::initializer_list<int64_t> dims) {
    shapes.Expect(input, kInputs[input], dims);
  };
  const int32_t batch = at(kQuery, 0), steps = at(kQuery, 1), query_heads = at(kQuery, 2), depth = at(kQuery, 3);
  const int32_t slots = at(kPoolKey, 1), recent = at(kRecentKey, 3);
  expect(kKey, {batch, steps, num_kv_heads_, depth});
  expect(kValue, {batch, steps, num_kv_heads_, depth});
  expect(kPoolKey, {batch, slots, depth});
  expect(kPoolValue, {batch, slots, depth});
  expect(kSlotIndex, {batch, slots});
  expect(kStreamStart, {batch, static_cast<int64_t>(num_layers_) * num_kv_heads_ + 1});
  expect(kRecentKey, {batch, num_layers_, num_kv_heads_, recent, depth});
  expect(kRecentValue, {batch, num_layers_, num_kv_heads_, recent, depth});
  expect(kCounters, {batch, kNumCounters});
  expect(kStepTokens, {batch});
  if (query_heads % num_kv_heads_ != 0) {
    throw Error("query has " + std::to_string(query_heads) + " heads, not a multiple of num_kv_heads " +
                std::to_string(num_kv_heads_));
  }
  PoolAttentionArgs args{};
  args.shape = {batch, num_layers_, num_kv_heads_, depth, slots, recent};
  args.type = type;
  args.layer = layer_;
  args.group = query_heads / num_kv_heads_;
  args.steps = steps;
  args.scale = scale_;
  if (const char* error = cuda::PoolAttentionUnsupported(args)) throw Error(error);
  return args;
}

// Not the bytes of the largest shapes: short steps are split over the device, and long ones need no workspace at all.
size_t PoolAttentionPlugin::WorkspaceBytes(const Bounds& bounds, DataType type) const {
  PoolAttentionArgs args = Arguments(bounds.most, type);
  const auto least = [&](int32_t axis) {
    return static_cast<int32_t>(std::max<int64_t>(bounds.least[kQuery].d[axis], 1));
  };
  const int32_t most_batch = args.shape.batch, most_steps = args.steps;
  size_t bytes = 0;
  for (args.steps = least(1); args.steps <= most_steps; ++args.steps) {
    args.shape.batch = most_batch;
    if (cuda::PoolAttentionWorkspaceBytes(args) == 0) break;  // so it is for all longer steps
    for (args.shape.batch = least(0); args.shape.batch <= most_batch; ++args.shape.batch) {
      bytes = std::max(bytes, cuda::PoolAttentionWorkspaceBytes(args));
    }
  }
  return bytes;
}

void PoolAttentionPlugin::Launch(const Call& call, DataType type) const {
  PoolAttentionArgs args = Arguments(Shapes(call.descriptions), type);
  args.query = call.inputs[kQuery];
  args.key = call.inputs[kKey];
  args.value = call.inputs[kValue];
  args.pool_key = call.inputs[kPoolKey];
  args.pool_value = call.inputs[kPoolValue];
  args.slot_index = static_cast<const int32_t*>(call.inputs[kSlotIndex]);
  args.stream_start = static_cast<const int32_t*>(call.inputs[kStreamStart]);
  args.recent_key = call.inputs[kRecentKey];
  args.recent_value = call.inputs[kRecentValue];
  args.counters = static_cast<const int32_t*>(call.inputs[kCounters]);
  args.step_tokens = static_cast<const int32_t*>(call.inputs[kStepTokens]);
  args.attended = call.outputs[0];
  args.workspace = call.workspace;
  if (args.workspace == nullptr && cuda::PoolAttentionWorkspaceBytes(args) > 0) throw Error("there is no workspace");
  ThrowIfFailed(cuda::PoolAttentionCuda(args, call.stream));
}

void PoolAttentionPlugin::WriteFields(FieldWriter& writer) const {
  writer.Add("layer", layer_);
  writer.Add("num_layers", num_layers_);
  writer.Add("num_kv_heads", num_kv_heads_);
  writer.Add("scale", scale_);
}

std::string PoolAttentionPlugin::Describe() const {
  return "layer=" + std::to_string(layer_) + " num_layers=" + std::to_string(num_layers_) +
         " num_kv_heads=" + std::to_string(num_kv_heads_) + " scale=" + std::to_string(scale_);
}

}  // namespace trimkv::trt
