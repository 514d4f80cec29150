// The two operators' tensors as docs/design.md, section 5, lists them, written out once more for the tests, and their
// attributes as TensorRT's ONNX parser would pass them.
#pragma once

#include <string>
#include <vector>

#include "host.h"
#include "state.h"

namespace trimkv::test {

// 'T' storage type, 'f' float32, 'i' int32.
struct TensorSpec {
  std::string name;
  char element;
  std::vector<int64_t> dims;
};

inline std::vector<TensorSpec> StateSpecs(const Config& config) {
  const CacheShape& s = config.shape;
  const int64_t b = s.batch, n = s.num_slots, d = s.head_dim, l = s.num_layers, h = s.num_kv_heads, r = s.evict_every;
  return {{"pool_key", 'T', {b, n, d}},
          {"pool_value", 'T', {b, n, d}},
          {"pool_log_beta", 'f', {b, n}},
          {"pool_position", 'i', {b, n}},
          {"slot_index", 'i', {b, n}},
          {"stream_start", 'i', {b, l * h + 1}},
          {"recent_key", 'T', {b, l, h, r, d}},
          {"recent_value", 'T', {b, l, h, r, d}},
          {"recent_log_beta", 'f', {b, l, h, r}},
          {"counters", 'i', {b, 4}}};
}

// `steps` is S.
inline std::vector<TensorSpec> AttentionSpecs(const Config& config, int64_t steps) {
  const CacheShape& s = config.shape;
  const std::vector<TensorSpec> state = StateSpecs(config);
  const TensorSpec query = {"query", 'T', {s.batch, steps, s.num_kv_heads * config.group, s.head_dim}};
  const TensorSpec key = {"key", 'T', {s.batch, steps, s.num_kv_heads, s.head_dim}}, value = {"value", 'T', key.dims};
  return {query,
          key,
          value,
          state[0],
          state[1],
          state[4],
          state[5],
          state[6],
          state[7],
          state[9],
          {"step_tokens", 'i', {s.batch}}};
}

inline std::vector<TensorSpec> UpdateSpecs(const Config& config, int64_t steps) {
  const CacheShape& s = config.shape;
  std::vector<TensorSpec> specs = StateSpecs(config);
  specs.push_back({"step_tokens", 'i', {s.batch}});
  specs.push_back({"budget", 'i', {s.batch}});
  specs.push_back({"attended", 'T', {s.batch, steps, s.num_kv_heads * config.group, s.head_dim}});
  for (const char* kind : {"key", "value", "log_beta"}) {
    for (int32_t layer = 0; layer < s.num_layers; ++layer) {
      if (kind[0] == 'l') {
        specs.push_back({kind, 'f', {s.batch, steps, s.num_kv_heads}});
      } else {
        specs.push_back({kind, 'T', {s.batch, steps, s.num_kv_heads, s.head_dim}});
      }
    }
  }
  return specs;
}

inline nv::DataType ToTensorRt(DataType type) {
  return type == DataType::kFloat32   ? nv::DataType::kFLOAT
         : type == DataType::kFloat16 ? nv::DataType::kHALF
                                      : nv::DataType::kBF16;
}

inline nv::DataType ToTensorRt(char element, DataType storage) {
  return element == 'T' ? ToTensorRt(storage) : element == 'f' ? nv::DataType::kFLOAT : nv::DataType::kINT32;
}

inline nv::PluginTensorDesc Describe(const TensorSpec& spec, DataType storage) {
  nv::PluginTensorDesc description{};
  description.type = ToTensorRt(spec.element, storage);
  description.format = nv::TensorFormat::kLINEAR;
  description.dims.nbDims = static_cast<int32_t>(spec.dims.size());
  for (size_t i = 0; i < spec.dims.size(); ++i) description.dims.d[i] = spec.dims[i];
  return description;
}

inline std::vector<nv::PluginTensorDesc> Describe(const std::vector<TensorSpec>& specs, DataType storage) {
  std::vector<nv::PluginTensorDesc> descriptions;
  for (const TensorSpec& spec : specs) descriptions.push_back(Describe(spec, storage));
  return descriptions;
}

// A profile from `least` to `most`; where they differ the network says -1.
inline std::vector<nv::DynamicPluginTensorDesc> DescribeRange(const std::vector<TensorSpec>& least,
                                                              const std::vector<TensorSpec>& most, DataType storage) {
  std::vector<nv::DynamicPluginTensorDesc> descriptions;
  for (size_t i = 0; i < most.size(); ++i) {
    nv::DynamicPluginTensorDesc description{};
    description.desc = Describe(most[i], storage);
    description.min = Describe(least[i], storage).dims;
    description.max = description.opt = description.desc.dims;
    for (int32_t axis = 0; axis < description.max.nbDims; ++axis) {
      if (description.min.d[axis] != description.max.d[axis]) description.desc.dims.d[axis] = -1;
    }
    descriptions.push_back(description);
  }
  return descriptions;
}

inline void SetAttentionFields(FieldList& fields, const Config& config, int32_t layer) {
  fields.Int("layer", layer)
      .Int("num_layers", config.shape.num_layers)
      .Int("num_kv_heads", config.shape.num_kv_heads)
      .Float("scale", config.scale());
}

inline void SetUpdateFields(FieldList& fields, const Config& config) {
  fields.Int("num_layers", config.shape.num_layers)
      .Int("num_kv_heads", config.shape.num_kv_heads)
      .Int("evict_every", config.shape.evict_every)
      .Text("policy", config.policy == Policy::kGlobal ? "global" : "per_head")
      .Int("min_tokens_per_head", config.min_tokens_per_head)
      .Int("lookahead_steps", config.lookahead_steps);
}

}  // namespace trimkv::test
