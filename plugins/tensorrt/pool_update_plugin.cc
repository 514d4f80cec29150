#include "pool_update_plugin.h"

#include <cstdio>

#include "cuda/pool_update.h"
#include "trimkv/types.h"

namespace trimkv::trt {
namespace {

// Outputs are the state tensors, in the order of the inputs. Behind these inputs follow the keys of all layers, their
// values, their log-retentions.
enum Inputs : int32_t {
  kPoolKey,
  kPoolValue,
  kPoolLogBeta,
  kPoolPosition,
  kSlotIndex,
  kStreamStart,
  kRecentKey,
  kRecentValue,
  kRecentLogBeta,
  kCounters,
  kStateTensors,
  kStepTokens = kStateTensors,
  kBudget,
  kAttended,
  kFirstKey,
};

constexpr Tensor kInputs[kFirstKey] = {
    {"pool_key", -1, Element::kStorage, 3},      {"pool_value", -1, Element::kStorage, 3},
    {"pool_log_beta", -1, Element::kFloat, 2},   {"pool_position", -1, Element::kInt32, 2},
    {"slot_index", -1, Element::kInt32, 2},      {"stream_start", -1, Element::kInt32, 2},
    {"recent_key", -1, Element::kStorage, 5},    {"recent_value", -1, Element::kStorage, 5},
    {"recent_log_beta", -1, Element::kFloat, 4}, {"counters", -1, Element::kInt32, 2},
    {"step_tokens", -1, Element::kInt32, 1},     {"budget", -1, Element::kInt32, 1},
    {"attended", -1, Element::kStorage, 4},
};

}  // namespace

void PoolUpdatePlugin::DeclareFields(FieldWriter& writer) {
  writer.Declare("num_layers", nv::PluginFieldType::kINT32);
  writer.Declare("num_kv_heads", nv::PluginFieldType::kINT32);
  writer.Declare("evict_every", nv::PluginFieldType::kINT32);
  writer.Declare("policy", nv::PluginFieldType::kCHAR);
  writer.Declare("min_tokens_per_head", nv::PluginFieldType::kINT32);
  writer.Declare("lookahead_steps", nv::PluginFieldType::kINT32);
  writer.Declare("declare_alias", nv::PluginFieldType::kINT32);
}

PoolUpdatePlugin::PoolUpdatePlugin(const FieldReader& fields, nv::TensorRTPhase phase)
    : OperatorPlugin(kName, phase),
      num_layers_(fields.Int("num_layers")),
      num_kv_heads_(fields.Int("num_kv_heads")),
      evict_every_(fields.Int("evict_every")),
      min_tokens_per_head_(fields.Int("min_tokens_per_head")),
      lookahead_steps_(fields.Int("lookahead_steps")),
      declare_alias_(fields.Int("declare_alias", 0)),
      policy_name_(fields.Text("policy")) {
  ExpectNumLayers(num_layers_);
  ExpectAtLeast("num_kv_heads", 1, num_kv_heads_);
  ExpectAtLeast("evict_every", 1, evict_every_);
  ExpectAtLeast("min_tokens_per_head", 0, min_tokens_per_head_);
  ExpectAtLeast("lookahead_steps", 1, lookahead_steps_);
  if (declare_alias_ != 0 && declare_alias_ != 1) {
    throw Error("declare_alias must be 0 or 1, got " + std::to_string(declare_alias_));
  }
  if (policy_name_ != "global" && policy_name_ != "per_head") {
    throw Error("policy must be global or per_head, got " + policy_name_);
  }
  policy_ = policy_name_ == "global" ? Policy::kGlobal : Policy::kPerHead;
}

int32_t PoolUpdatePlugin::NumInputs() const noexcept { return kFirstKey + 3 * num_layers_; }
int32_t PoolUpdatePlugin::NumOutputs() const noexcept { return kStateTensors; }

Tensor PoolUpdatePlugin::Input(int32_t input) const noexcept {
  if (input < kFirstKey) return kInputs[input];
  const int32_t kind = (input - kFirstKey) / num_layers_, layer = (input - kFirstKey) % num_layers_;
  if (kind == 0) return {"key", layer, Element::kStorage, 4};
  if (kind == 1) return {"value", layer, Element::kStorage, 4};
  return {"log_beta", layer, Element::kFloat, 3};
}

PoolUpdateArgs PoolUpdatePlugin::Arguments(const Shapes& shapes, DataType type) const {
  const auto at = [&](int32_t input, int32_t axis) { return shapes.At(input, axis, Input(input)); };
  const auto expect = [&](int32_t input, std::initializer_list<int64_t> dims) {
    shapes.Expect(input, Input(input), dims);
  };
  const int32_t batch = at(kPoolKey, 0), slots = at(kPoolKey, 1), depth = at(kPoolKey, 2);
  const int32_t steps = at(kFirstKey, 1), query_heads = at(kAttended, 2);
  expect(kPoolValue, {batch, slots, depth});
  for (const Inputs input : {kPoolLogBeta, kPoolPosition, kSlotIndex}) expect(input, {batch, slots});
  expect(kStreamStart, {batch, static_cast<int64_t>(num_layers_) * num_kv_heads_ + 1});
  expect(kRecentKey, {batch, num_layers_, num_kv_heads_, evict_every_, depth});
  expect(kRecentValue, {batch, num_layers_, num_kv_heads_, evict_every_, depth});
  expect(kRecentLogBeta, {batch, num_layers_, num_kv_heads_, evict_every_});
  expect(kCounters, {batch, kNumCounters});
  expect(kStepTokens, {batch});
  expect(kBudget, {batch});
  expect(kAttended, {batch, steps, query_heads, depth});
  for (int32_t layer = 0; layer < num_layers_; ++layer) {
    expect(kFirstKey + layer, {batch, steps, num_kv_heads_, depth});
    expect(kFirstKey + num_layers_ + layer, {batch, steps, num_kv_heads_, depth});
    expect(kFirstKey + 2 * num_layers_ + layer, {batch, steps, num_kv_heads_});
  }
  PoolUpdateArgs args{};
  args.shape = {batch, num_layers_, num_kv_heads_, depth, slots, evict_every_};
  args.type = type;
  args.policy = policy_;
  args.min_tokens_per_head = min_tokens_per_head_;
  args.lookahead_steps = lookahead_steps_;
  args.steps = steps;
  if (const char* error = cuda::PoolUpdateUnsupported(args)) throw Error(error);
  return args;
}

// Grows with the batch and with the step.
size_t PoolUpdatePlugin::WorkspaceBytes(const Bounds& bounds, DataType type) const {
  return cuda::PoolUpdateWorkspaceBytes(Arguments(bounds.most, type));
}

void PoolUpdatePlugin::Launch(const Call& call, DataType type) const {
  for (int32_t i = 0; i < kStateTensors; ++i) {
    if (call.outputs[i] == call.inputs[i]) continue;
    char text[160];
    std::snprintf(
        text, sizeof text,
        "past.%s is bound at %p and present.%s at %p: bind both to one address, the state is updated in place",
        kInputs[i].name, call.inputs[i], kInputs[i].name, call.outputs[i]);
    throw Error(text);
  }
  PoolUpdateArgs args = Arguments(Shapes(call.descriptions), type);
  args.pool_key = call.outputs[kPoolKey];
  args.pool_value = call.outputs[kPoolValue];
  args.pool_log_beta = static_cast<float*>(call.outputs[kPoolLogBeta]);
  args.pool_position = static_cast<int32_t*>(call.outputs[kPoolPosition]);
  args.slot_index = static_cast<int32_t*>(call.outputs[kSlotIndex]);
  args.stream_start = static_cast<int32_t*>(call.outputs[kStreamStart]);
  args.recent_key = call.outputs[kRecentKey];
  args.recent_value = call.outputs[kRecentValue];
  args.recent_log_beta = static_cast<float*>(call.outputs[kRecentLogBeta]);
  args.counters = static_cast<int32_t*>(call.outputs[kCounters]);
  args.step_tokens = static_cast<const int32_t*>(call.inputs[kStepTokens]);
  args.budget = static_cast<const int32_t*>(call.inputs[kBudget]);
  const void* const* fresh = call.inputs + kFirstKey;
  for (int32_t layer = 0; layer < num_layers_; ++layer) {
    args.key[layer] = fresh[layer];
    args.value[layer] = fresh[num_layers_ + layer];
    args.log_beta[layer] = static_cast<const float*>(fresh[2 * num_layers_ + layer]);
  }
  args.workspace = call.workspace;
  if (args.workspace == nullptr) throw Error("there is no workspace");
  ThrowIfFailed(cuda::PoolUpdateCuda(args, call.stream));
}

void PoolUpdatePlugin::WriteFields(FieldWriter& writer) const {
  writer.Add("num_layers", num_layers_);
  writer.Add("num_kv_heads", num_kv_heads_);
  writer.Add("evict_every", evict_every_);
  writer.Add("policy", policy_name_);
  writer.Add("min_tokens_per_head", min_tokens_per_head_);
  writer.Add("lookahead_steps", lookahead_steps_);
  writer.Add("declare_alias", declare_alias_);
}

std::string PoolUpdatePlugin::Describe() const {
  return "num_layers=" + std::to_string(num_layers_) + " num_kv_heads=" + std::to_string(num_kv_heads_) +
         " evict_every=" + std::to_string(evict_every_) + " policy=" + policy_name_ +
         " min_tokens_per_head=" + std::to_string(min_tokens_per_head_) +
         " lookahead_steps=" + std::to_string(lookahead_steps_) + " declare_alias=" + std::to_string(declare_alias_);
}

}  // namespace trimkv::trt
