// What both plugins share: an operator that says what its tensors are, and the four interfaces of IPluginV3 over it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "fields.h"
#include "tensors.h"

namespace trimkv::trt {

inline constexpr const char* kNamespace = "trimkv";
inline constexpr const char* kVersion = "1";

inline void ThrowIfFailed(cudaError_t error) {
  if (error != cudaSuccess) throw Error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Pointers of one call, in the order of the operator's inputs and outputs.
struct Call {
  const nv::PluginTensorDesc* descriptions;  // of the inputs
  const void* const* inputs;
  void* const* outputs;
  void* workspace;  // 256-byte aligned, of WorkspaceBytes
  cudaStream_t stream;
};

// Smallest and largest dimensions that a profile allows.
struct Bounds {
  Shapes least, most;
};

class OperatorPlugin : public nv::IPluginV3,
                       public nv::IPluginV3OneCore,
                       public nv::IPluginV3OneBuildV2,
                       public nv::IPluginV3OneRuntime {
 public:
  // --- IPluginV3 and the capabilities; none throws, none lets an exception through -------------------------------
  nv::IPluginCapability* getCapabilityInterface(nv::PluginCapabilityType type) noexcept override;
  nv::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return NumOutputs(); }
  int32_t getOutputDataTypes(nv::DataType* outputs, int32_t num_outputs, const nv::DataType* inputs,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nv::DimsExprs* inputs, int32_t num_inputs, const nv::DimsExprs* shape_inputs,
                          int32_t num_shape_inputs, nv::DimsExprs* outputs, int32_t num_outputs,
                          nv::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nv::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nv::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nv::DynamicPluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nv::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nv::DynamicPluginTensorDesc* outputs, int32_t num_outputs) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  const char* getMetadataString() noexcept override;

  int32_t onShapeChange(const nv::PluginTensorDesc* inputs, int32_t num_inputs, const nv::PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nv::PluginTensorDesc* input_descriptions, const nv::PluginTensorDesc* output_descriptions,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nv::IPluginV3* attachToContext(nv::IPluginResourceContext* context) noexcept override;
  const nv::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
  OperatorPlugin(const char* name, nv::TensorRTPhase phase) : name_(name), phase_(phase) {}
  // The fields that were last asked for point into the original, so they are not copied.
  OperatorPlugin(const OperatorPlugin& other)
      : nv::IPluginV3(other),
        nv::IPluginV3OneCore(other),
        nv::IPluginV3OneBuildV2(other),
        nv::IPluginV3OneRuntime(other),
        name_(other.name_),
        phase_(other.phase_) {}
  OperatorPlugin& operator=(const OperatorPlugin&) = delete;

  // --- The operator ------------------------------------------------------------------------------------------------
  virtual int32_t NumInputs() const noexcept = 0;
  virtual int32_t NumOutputs() const noexcept = 0;
  virtual Tensor Input(int32_t input) const noexcept = 0;
  // The input that has the type and the shape of an output.
  virtual int32_t Like(int32_t output) const noexcept = 0;
  // Whether that input and the output are declared to be one memory.
  virtual bool DeclaresAlias() const noexcept { return false; }
  // Throws an Error unless the operator takes inputs of these shapes.
  virtual void CheckShapes(const Shapes& shapes, DataType type) const = 0;
  virtual size_t WorkspaceBytes(const Bounds& bounds, DataType type) const = 0;
  // Launches the kernels; allocates nothing.
  virtual void Launch(const Call& call, DataType type) const = 0;
  virtual std::unique_ptr<OperatorPlugin> Copy() const = 0;
  virtual void WriteFields(FieldWriter& writer) const = 0;
  virtual std::string Describe() const = 0;

 private:
  void ExpectCounts(int32_t num_inputs, int32_t num_outputs) const;
  void ExpectTypes(const nv::PluginTensorDesc* inputs) const;

  const char* name_;
  nv::TensorRTPhase phase_;
  FieldWriter fields_;
  std::string metadata_;
};

}  // namespace trimkv::trt
