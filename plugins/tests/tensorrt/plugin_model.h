// A model whose steps are calls of plugins, as an engine makes them: created from fields, serialised, created again for
// the run time, attached to a context, and given descriptions and pointers.
#pragma once

#include <array>
#include <set>

#include "allocations.h"
#include "device_state.h"
#include "expect.h"
#include "signatures.h"

namespace trimkv::test {

inline PluginLibrary* g_library = nullptr;

// A plugin on its way from the network through an engine file to a context.
inline PluginPointer ThroughEngine(const char* name, FieldList& fields) {
  nv::IPluginCreatorV3One* creator = g_library->Find(name, "1", "trimkv");
  const PluginPointer built(creator->createPlugin("node", fields.Collection(), nv::TensorRTPhase::kBUILD));
  EXPECT(built != nullptr, "%s: %s", name, g_library->logger.Take().c_str());
  const PluginPointer copy(built->clone());
  StoredFields stored(Runtime(copy)->getFieldsToSerialize());
  const PluginPointer loaded(creator->createPlugin("node", stored.Collection(), nv::TensorRTPhase::kRUNTIME));
  EXPECT(loaded != nullptr, "%s: %s", name, g_library->logger.Take().c_str());
  return PluginPointer(Runtime(loaded)->attachToContext(nullptr));
}

class PluginModel : public DeviceState {
 public:
  PluginModel(const Config& config, const Step& longest) : DeviceState(config, longest) {
    for (int32_t layer = 0; layer < config.shape.num_layers; ++layer) {
      FieldList fields;
      SetAttentionFields(fields, config, layer);
      attention_.push_back(ThroughEngine("PoolAttention", fields));
    }
    FieldList fields;
    SetUpdateFields(fields, config);
    update_ = ThroughEngine("PoolUpdate", fields);
    attention_workspace_ =
        Workspace(attention_[0], AttentionSpecs(config, 1), AttentionSpecs(config, longest.steps), 1);
    update_workspace_ = Workspace(update_, UpdateSpecs(config, 1), UpdateSpecs(config, longest.steps), 10);
  }

  void LaunchStep() {
    Prepare();
    size_t before = 0, after = 0, total;
    const bool capturing = Capturing();
    if (!capturing) CUDA_OK(cudaMemGetInfo(&before, &total));
    for (size_t layer = 0; layer < attention_.size(); ++layer) {
      Enqueue(attention_[layer], attention_inputs_, attention_pointers_[layer], &attended_pointers_[layer],
              attention_workspace_);
    }
    Enqueue(update_, update_inputs_, update_pointers_, state_pointers_.data(), update_workspace_);
    if (!capturing) CUDA_OK(cudaMemGetInfo(&after, &total));
    // The first step of a length may load its kernels.
    if (!capturing && !lengths_.insert(step.steps).second) {
      EXPECT(before == after, "%s: enqueue took device memory", config_.name);
    }
  }

 private:
  bool Capturing() const {
    cudaStreamCaptureStatus capture;
    CUDA_OK(cudaStreamIsCapturing(stream, &capture));
    return capture != cudaStreamCaptureStatusNone;
  }

  void* Workspace(const PluginPointer& plugin, const std::vector<TensorSpec>& least,
                  const std::vector<TensorSpec>& most, int32_t outputs) {
    const auto inputs = DescribeRange(least, most, config_.type);
    const size_t bytes =
        Build(plugin)->getWorkspaceSize(inputs.data(), static_cast<int32_t>(inputs.size()), inputs.data(), outputs);
    // Not aligned, and with nothing to spare, for the sanitizers.
    return bytes > 0 ? static_cast<char*>(mirror.Scratch(bytes + 16)) + 16 : nullptr;
  }

  // Descriptions and addresses of this step, so that nothing is left to allocate.
  void Prepare() {
    const auto at = OnDevice();
    const CacheShape& s = config_.shape;
    attention_inputs_ = Describe(AttentionSpecs(config_, step.steps), config_.type);
    update_inputs_ = Describe(UpdateSpecs(config_, step.steps), config_.type);
    const auto inputs = [](auto*... pointers) { return std::vector<const void*>{pointers...}; };
    attention_pointers_.clear();
    attended_pointers_.clear();
    state_pointers_ = {at(state.pool_key),      at(state.pool_value),   at(state.pool_log_beta),
                       at(state.pool_position), at(state.slot_index),   at(state.stream_start),
                       at(state.recent_key),    at(state.recent_value), at(state.recent_log_beta),
                       at(state.counters)};
    update_pointers_.assign(state_pointers_.begin(), state_pointers_.end());
    for (const void* pointer : inputs(at(step.step_tokens), at(step.budget), at(attended.back()))) {
      update_pointers_.push_back(pointer);
    }
    for (int32_t layer = 0; layer < s.num_layers; ++layer) {
      attended_pointers_.push_back(at(attended[layer]));
      attention_pointers_.push_back(inputs(at(step.query[layer]), at(step.key[layer]), at(step.value[layer]),
                                           at(state.pool_key), at(state.pool_value), at(state.slot_index),
                                           at(state.stream_start), at(state.recent_key), at(state.recent_value),
                                           at(state.counters), at(step.step_tokens)));
    }
    for (auto& key : step.key) update_pointers_.push_back(at(key));
    for (auto& value : step.value) update_pointers_.push_back(at(value));
    for (auto& log_beta : step.log_beta) update_pointers_.push_back(at(log_beta));
  }

  void Enqueue(const PluginPointer& plugin, const std::vector<nv::PluginTensorDesc>& descriptions,
               const std::vector<const void*>& inputs, void* const* outputs, void* workspace) {
    const int32_t count = static_cast<int32_t>(descriptions.size());
    const bool is_update = &plugin == &update_;
    int32_t code = Runtime(plugin)->onShapeChange(descriptions.data(), count, descriptions.data(), is_update ? 10 : 1);
    const long before = Allocations();
    if (code == 0) {
      code =
          Runtime(plugin)->enqueue(descriptions.data(), descriptions.data(), inputs.data(), outputs, workspace, stream);
    }
    const long allocated = Allocations() - before;
    EXPECT(allocated == 0, "%s: enqueue allocated %ld times", config_.name, allocated);
    EXPECT(code == 0, "%s: %s", config_.name, g_library->logger.Take().c_str());
    if (code != 0) std::exit(1);
  }

  std::vector<PluginPointer> attention_;
  PluginPointer update_;
  std::vector<nv::PluginTensorDesc> attention_inputs_, update_inputs_;
  std::vector<std::vector<const void*>> attention_pointers_;  // per layer
  std::vector<void*> attended_pointers_;                      // per layer
  std::vector<const void*> update_pointers_;
  std::array<void*, 10> state_pointers_{};
  void* attention_workspace_ = nullptr;
  void* update_workspace_ = nullptr;
  std::set<int32_t> lengths_;  // of the steps so far
};

}  // namespace trimkv::test
