// PoolUpdate (docs/design.md, section 5) for TensorRT.
#pragma once

#include "operator_plugin.h"
#include "trimkv/kernels.h"

namespace trimkv::trt {

class PoolUpdatePlugin : public OperatorPlugin {
 public:
  static constexpr const char* kName = "PoolUpdate";
  static void DeclareFields(FieldWriter& writer);

  PoolUpdatePlugin(const FieldReader& fields, nv::TensorRTPhase phase);

 protected:
  int32_t NumInputs() const noexcept override;
  int32_t NumOutputs() const noexcept override;
  Tensor Input(int32_t input) const noexcept override;
  int32_t Like(int32_t output) const noexcept override { return output; }
  bool DeclaresAlias() const noexcept override { return declare_alias_ != 0; }
  void CheckShapes(const Shapes& shapes, DataType type) const override { Arguments(shapes, type); }
  size_t WorkspaceBytes(const Bounds& bounds, DataType type) const override;
  void Launch(const Call& call, DataType type) const override;
  std::unique_ptr<OperatorPlugin> Copy() const override { return std::make_unique<PoolUpdatePlugin>(*this); }
  void WriteFields(FieldWriter& writer) const override;
  std::string Describe() const override;

 private:
  // All but the pointers.
  PoolUpdateArgs Arguments(const Shapes& shapes, DataType type) const;

  int32_t num_layers_, num_kv_heads_, evict_every_, min_tokens_per_head_, lookahead_steps_, declare_alias_;
  std::string policy_name_;
  Policy policy_;
};

}  // namespace trimkv::trt
