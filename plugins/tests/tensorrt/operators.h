// Both operators for tests that treat them alike, and one model's configuration.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "expect.h"
#include "signatures.h"

namespace trimkv::test {

using FieldType = nv::PluginFieldType;
inline constexpr auto kBuildPhase = nv::TensorRTPhase::kBUILD;
inline constexpr auto kRuntimePhase = nv::TensorRTPhase::kRUNTIME;

// Everything that the tests need of one operator.
struct Operator {
  const char* name;
  int32_t outputs;
  std::vector<TensorSpec> (*specs)(const Config&, int64_t steps);
  int32_t (*like)(int32_t output);  // the input that an output is like
  void (*set_fields)(FieldList&, const Config&);
  std::map<std::string, FieldType> fields;
};

inline std::vector<Operator> Operators() {
  return {{"PoolAttention",
           1,
           AttentionSpecs,
           [](int32_t) { return 0; },
           [](FieldList& fields, const Config& config) { SetAttentionFields(fields, config, 1); },
           {{"layer", FieldType::kINT32},
            {"num_layers", FieldType::kINT32},
            {"num_kv_heads", FieldType::kINT32},
            {"scale", FieldType::kFLOAT32}}},
          {"PoolUpdate",
           10,
           UpdateSpecs,
           [](int32_t output) { return output; },
           SetUpdateFields,
           {{"num_layers", FieldType::kINT32},
            {"num_kv_heads", FieldType::kINT32},
            {"evict_every", FieldType::kINT32},
            {"policy", FieldType::kCHAR},
            {"min_tokens_per_head", FieldType::kINT32},
            {"lookahead_steps", FieldType::kINT32},
            {"declare_alias", FieldType::kINT32}}}};
}

inline Config ModelConfig() {
  Config config;
  config.shape = {3, 4, 2, 64, 8 * 16, 5};
  config.group = 4;
  config.min_tokens_per_head = 2;
  config.lookahead_steps = 3;
  return config;
}

inline PluginPointer Create(PluginLibrary& library, const Operator& op, const Config& config,
                            nv::TensorRTPhase phase = kBuildPhase) {
  FieldList fields;
  op.set_fields(fields, config);
  PluginPointer plugin(library.Find(op.name, "1", "trimkv")->createPlugin("node", fields.Collection(), phase));
  EXPECT(plugin != nullptr, "%s: %s", op.name, library.logger.Take().c_str());
  return plugin;
}

}  // namespace trimkv::test
