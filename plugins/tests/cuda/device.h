// Device memory for tests: one model's state, one step's inputs and the launches of a whole decode step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "pool_attention.h"
#include "pool_update.h"
#include "reference.h"

#define CUDA_OK(call)                                                                                 \
  do {                                                                                                \
    const cudaError_t status = (call);                                                                \
    if (status != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (false)

namespace trimkv::cuda {

// Device copies of host vectors, by the address of the vector.
class Mirror {
 public:
  Mirror() = default;
  Mirror(const Mirror&) = delete;
  ~Mirror() {
    for (auto& [vector, memory] : memory_) cudaFree(memory);
  }

  // The device copy of a vector; allocated and uploaded the first time.
  template <class T>
  T* At(const std::vector<T>& vector) {
    void*& memory = memory_[&vector];
    if (memory == nullptr) {
      CUDA_OK(cudaMalloc(&memory, vector.size() * sizeof(T) + 256));
      Upload(vector);
    }
    return static_cast<T*>(memory);
  }
  template <class T>
  void Upload(const std::vector<T>& vector) {
    CUDA_OK(cudaMemcpy(memory_.at(&vector), vector.data(), vector.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  template <class T>
  void Download(std::vector<T>& vector) {
    CUDA_OK(cudaMemcpy(vector.data(), memory_.at(&vector), vector.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }
  // Memory without a host copy, filled with 0xff: NaNs to whoever reads it before writing.
  void* Scratch(size_t bytes) {
    void* memory;
    CUDA_OK(cudaMalloc(&memory, bytes + 256));
    CUDA_OK(cudaMemset(memory, 0xff, bytes + 256));
    memory_[memory] = memory;
    return memory;
  }

 private:
  std::map<const void*, void*> memory_;
};

// A model's cache on the device, with fixed addresses for the inputs of a step.
class DeviceModel {
 public:
  DeviceModel(const Config& config, const Step& first, float scale)
      : state(config), step(first), config_(config), scale_(scale) {
    const size_t row = static_cast<size_t>(config.shape.head_dim) * ItemSize(config.type);
    const size_t rows = static_cast<size_t>(config.shape.batch) * config.max_steps * config.shape.num_kv_heads;
    attended.assign(config.shape.num_layers, std::vector<uint8_t>(rows * config.group * row, 0xff));
    CUDA_OK(cudaStreamCreate(&stream));
    for (auto& layer : attended) mirror.At(layer);
    update_ = UpdateArgs(config_, state, step, nullptr, [this](auto& vector) { return mirror.At(vector); });
    update_.workspace = mirror.Scratch(PoolUpdateWorkspaceBytes(update_));
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) {
      attention_.push_back(AttentionArgs(config_, state, step, layer, scale_, mirror.At(attended[layer]), nullptr,
                                         [this](auto& vector) { return mirror.At(vector); }));
    }
    void* workspace = mirror.Scratch(PoolAttentionWorkspaceBytes(attention_[0]));
    for (PoolAttentionArgs& args : attention_) args.workspace = workspace;
  }
  DeviceModel(const DeviceModel&) = delete;
  ~DeviceModel() { cudaStreamDestroy(stream); }

  void LaunchAttention(int32_t layer) { CUDA_OK(PoolAttentionCuda(attention_[layer], stream)); }
  void LaunchUpdate() { CUDA_OK(PoolUpdateCuda(update_, stream)); }
  void LaunchStep() {
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) LaunchAttention(layer);
    LaunchUpdate();
  }

  void UploadStep(const Step& from) {
    step.step_tokens = from.step_tokens;
    step.budget = from.budget;
    mirror.Upload(step.step_tokens);
    mirror.Upload(step.budget);
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) {
      step.query[layer] = from.query[layer];
      step.key[layer] = from.key[layer];
      step.value[layer] = from.value[layer];
      step.log_beta[layer] = from.log_beta[layer];
      mirror.Upload(step.query[layer]);
      mirror.Upload(step.key[layer]);
      mirror.Upload(step.value[layer]);
      mirror.Upload(step.log_beta[layer]);
    }
  }
  void DownloadResults() {
    mirror.Download(state.pool_key);
    mirror.Download(state.pool_value);
    mirror.Download(state.pool_log_beta);
    mirror.Download(state.pool_position);
    mirror.Download(state.slot_index);
    mirror.Download(state.stream_start);
    mirror.Download(state.recent_key);
    mirror.Download(state.recent_value);
    mirror.Download(state.recent_log_beta);
    mirror.Download(state.counters);
    for (auto& layer : attended) mirror.Download(layer);
  }
  void ResetRow(int32_t row) {
    mirror.Download(state.stream_start);
    mirror.Download(state.counters);
    state.Reset(config_, row);
    mirror.Upload(state.stream_start);
    mirror.Upload(state.counters);
  }

  State state;
  Step step;
  std::vector<std::vector<uint8_t>> attended;  // per layer
  Mirror mirror;
  cudaStream_t stream = nullptr;

 private:
  Config config_;
  float scale_;
  PoolUpdateArgs update_;
  std::vector<PoolAttentionArgs> attention_;
};

// Launches recorded once, to be replayed.
class Graph {
 public:
  template <class Launch>
  Graph(cudaStream_t stream, const Launch& launch) : stream_(stream) {
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch();
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&graph_, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  Graph(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(graph_); }
  void Replay() { CUDA_OK(cudaGraphLaunch(graph_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace trimkv::cuda
