// PoolAttention (docs/design.md, section 5) for TensorRT.
#pragma once

#include "operator_plugin.h"
#include "trimkv/kernels.h"

namespace trimkv::trt {

class PoolAttentionPlugin : public OperatorPlugin {
 public:
  static constexpr const char* kName = "PoolAttention";
  static void DeclareFields(FieldWriter& writer);

  PoolAttentionPlugin(const FieldReader& fields, nv::TensorRTPhase phase);

 protected:
  int32_t NumInputs() const noexcept override;
  int32_t NumOutputs() const noexcept override { return 1; }
  Tensor Input(int32_t input) const noexcept override;
  int32_t Like(int32_t output) const noexcept override;
  void CheckShapes(const Shapes& shapes, DataType type) const override { Arguments(shapes, type); }
  size_t WorkspaceBytes(const Bounds& bounds, DataType type) const override;
  void Launch(const Call& call, DataType type) const override;
  std::unique_ptr<OperatorPlugin> Copy() const override { return std::make_unique<PoolAttentionPlugin>(*this); }
  void WriteFields(FieldWriter& writer) const override;
  std::string Describe() const override;

 private:
  // All but the pointers.
  PoolAttentionArgs Arguments(const Shapes& shapes, DataType type) const;

  int32_t layer_, num_layers_, num_kv_heads_;
  float scale_;
};

}  // namespace trimkv::trt
