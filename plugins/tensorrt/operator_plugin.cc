#include "operator_plugin.h"

namespace trimkv::trt {
namespace {

constexpr size_t kAlignment = 256;  // what the kernels ask of their workspace

void* AlignUp(void* memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace

void OperatorPlugin::ExpectCounts(int32_t num_inputs, int32_t num_outputs) const {
  if (num_inputs != NumInputs()) {
    throw Error("there are " + std::to_string(num_inputs) + " inputs, expected " + std::to_string(NumInputs()));
  }
  if (num_outputs != NumOutputs()) {
    throw Error("there are " + std::to_string(num_outputs) + " outputs, expected " + std::to_string(NumOutputs()));
  }
}

void OperatorPlugin::ExpectTypes(const nv::PluginTensorDesc* inputs) const {
  for (int32_t input = 0; input < NumInputs(); ++input) {
    const Tensor tensor = Input(input);
    if (!Matches(tensor.element, inputs[input].type, inputs[0].type)) {
      throw Error(tensor.Name() + " has TensorRT's data type " + std::to_string(static_cast<int>(inputs[input].type)) +
                  ", which this input does not take");
    }
    if (inputs[input].format != nv::TensorFormat::kLINEAR) throw Error(tensor.Name() + " must have the linear format");
  }
}

nv::IPluginCapability* OperatorPlugin::getCapabilityInterface(nv::PluginCapabilityType type) noexcept {
  switch (type) {
    case nv::PluginCapabilityType::kCORE:
      return static_cast<nv::IPluginV3OneCore*>(this);
    case nv::PluginCapabilityType::kBUILD:
      return static_cast<nv::IPluginV3OneBuildV2*>(this);
    case nv::PluginCapabilityType::kRUNTIME:
      return static_cast<nv::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nv::IPluginV3* OperatorPlugin::clone() noexcept {
  return Guarded<nv::IPluginV3*>(name_, nullptr, [this] { return Copy().release(); });
}

nv::IPluginV3* OperatorPlugin::attachToContext(nv::IPluginResourceContext*) noexcept { return clone(); }

int32_t OperatorPlugin::getOutputDataTypes(nv::DataType* outputs, int32_t num_outputs, const nv::DataType* inputs,
                                           int32_t num_inputs) const noexcept {
  return Guarded(name_, -1, [&] {
    ExpectCounts(num_inputs, num_outputs);
    for (int32_t output = 0; output < num_outputs; ++output) outputs[output] = inputs[Like(output)];
    return 0;
  });
}

int32_t OperatorPlugin::getOutputShapes(const nv::DimsExprs* inputs, int32_t num_inputs, const nv::DimsExprs*,
                                        int32_t num_shape_inputs, nv::DimsExprs* outputs, int32_t num_outputs,
                                        nv::IExprBuilder&) noexcept {
  return Guarded(name_, -1, [&] {
    ExpectCounts(num_inputs, num_outputs);
    if (num_shape_inputs != 0) throw Error("there are shape inputs, expected none");
    for (int32_t input = 0; input < num_inputs; ++input) {
      const Tensor tensor = Input(input);
      if (inputs[input].nbDims != tensor.rank) {
        throw Error(tensor.Name() + " has " + std::to_string(inputs[input].nbDims) + " dimensions, expected " +
                    std::to_string(tensor.rank));
      }
    }
    for (int32_t output = 0; output < num_outputs; ++output) outputs[output] = inputs[Like(output)];
    return 0;
  });
}

bool OperatorPlugin::supportsFormatCombination(int32_t position, const nv::DynamicPluginTensorDesc* tensors,
                                               int32_t num_inputs, int32_t num_outputs) noexcept {
  return Guarded(name_, false, [&] {
    ExpectCounts(num_inputs, num_outputs);
    if (position < 0 || position >= num_inputs + num_outputs) return false;
    const nv::PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nv::TensorFormat::kLINEAR) return false;
    // The first input has the storage type; all others follow it.
    const int32_t input = position < num_inputs ? position : Like(position - num_inputs);
    return Matches(Input(input).element, tensor.type, tensors[0].desc.type);
  });
}

int32_t OperatorPlugin::configurePlugin(const nv::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const nv::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
  return Guarded(name_, -1, [&] {
    ExpectCounts(num_inputs, num_outputs);
    for (const auto which : {&nv::DynamicPluginTensorDesc::min, &nv::DynamicPluginTensorDesc::max}) {
      const Shapes shapes(inputs, which);
      if (shapes.AllKnown(num_inputs)) CheckShapes(shapes, ToDataType(inputs[0].desc.type));
    }
    return 0;
  });
}

size_t OperatorPlugin::getWorkspaceSize(const nv::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const nv::DynamicPluginTensorDesc*, int32_t num_outputs) const noexcept {
  return Guarded(name_, size_t{0}, [&] {
    ExpectCounts(num_inputs, num_outputs);
    const Shapes most(inputs, &nv::DynamicPluginTensorDesc::max);
    const Shapes least(inputs, &nv::DynamicPluginTensorDesc::min);
    const size_t bytes = WorkspaceBytes({least, most}, ToDataType(inputs[0].desc.type));
    // TensorRT does not say how it aligns what it gives.
    return bytes > 0 ? bytes + kAlignment - 1 : 0;
  });
}

int32_t OperatorPlugin::getAliasedInput(int32_t output) noexcept {
  return DeclaresAlias() && output >= 0 && output < NumOutputs() ? Like(output) : -1;
}

const char* OperatorPlugin::getMetadataString() noexcept {
  return Guarded<const char*>(name_, nullptr, [this] {
    metadata_ = Describe();
    return metadata_.c_str();
  });
}

int32_t OperatorPlugin::onShapeChange(const nv::PluginTensorDesc* inputs, int32_t num_inputs,
                                      const nv::PluginTensorDesc*, int32_t num_outputs) noexcept {
  return Guarded(name_, -1, [&] {
    ExpectCounts(num_inputs, num_outputs);
    const Shapes shapes(inputs);
    if (shapes.AllKnown(num_inputs)) CheckShapes(shapes, ToDataType(inputs[0].type));
    return 0;
  });
}

int32_t OperatorPlugin::enqueue(const nv::PluginTensorDesc* input_descriptions,
                                const nv::PluginTensorDesc* output_descriptions, const void* const* inputs,
                                void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return Guarded(name_, -1, [&] {
    if (phase_ == nv::TensorRTPhase::kBUILD) {
      // The builder times layers on memory of its own with whatever is in it. As slots and counters that would send the
      // kernels anywhere, and there is nothing to choose from: one kernel, one format.
      for (int32_t output = 0; output < NumOutputs(); ++output) {
        if (outputs[output] == inputs[Like(output)]) continue;
        ThrowIfFailed(cudaMemsetAsync(outputs[output], 0, NumBytes(output_descriptions[output]), stream));
      }
      return 0;
    }
    ExpectTypes(input_descriptions);
    for (int32_t input = 0; input < NumInputs(); ++input) {
      if (inputs[input] == nullptr) throw Error(Input(input).Name() + " has no memory");
    }
    Launch({input_descriptions, inputs, outputs, AlignUp(workspace), stream}, ToDataType(input_descriptions[0].type));
    return 0;
  });
}

const nv::PluginFieldCollection* OperatorPlugin::getFieldsToSerialize() noexcept {
  return Guarded<const nv::PluginFieldCollection*>(name_, nullptr, [this] {
    fields_.Clear();
    WriteFields(fields_);
    return fields_.Collection();
  });
}

}  // namespace trimkv::trt
