// The launches of a model's steps on a device.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device_state.h"
#include "pool_attention.h"
#include "pool_update.h"

namespace trimkv::test {

class DeviceModel : public DeviceState {
 public:
  DeviceModel(const Config& config, const Step& longest) : DeviceState(config, longest) {
    size_t attention_bytes = 0;
    for (int32_t steps = 1; steps <= longest.steps; ++steps) {  // short steps may need more than long ones
      step.steps = steps;
      attention_bytes = std::max(attention_bytes, cuda::PoolAttentionWorkspaceBytes(Attention(0)));
    }
    attention_workspace_ = mirror.Scratch(attention_bytes);
    update_workspace_ = mirror.Scratch(cuda::PoolUpdateWorkspaceBytes(Update()));
  }

  void LaunchAttention(int32_t layer) { CUDA_OK(cuda::PoolAttentionCuda(Attention(layer), stream)); }
  void LaunchUpdate() { CUDA_OK(cuda::PoolUpdateCuda(Update(), stream)); }
  void LaunchStep() {
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) LaunchAttention(layer);
    LaunchUpdate();
  }

 private:
  PoolAttentionArgs Attention(int32_t layer) {
    return AttentionArgs(config_, state, step, layer, mirror.At(attended[layer]), attention_workspace_, OnDevice());
  }
  PoolUpdateArgs Update() { return UpdateArgs(config_, state, step, update_workspace_, OnDevice()); }

  void* attention_workspace_ = nullptr;
  void* update_workspace_ = nullptr;
};

}  // namespace trimkv::test
