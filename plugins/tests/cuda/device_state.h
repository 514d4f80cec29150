// Device memory for tests: one model's state and one step's inputs, and launches recorded as a graph. Only the CUDA
// runtime is used, so a stand-in for it will do.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <vector>

#include "state.h"

#define CUDA_OK(call)                                                                                 \
  do {                                                                                                \
    const cudaError_t status = (call);                                                                \
    if (status != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (false)

namespace trimkv::test {

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
      CUDA_OK(cudaMalloc(&memory, std::max<size_t>(vector.size() * sizeof(T), 1)));  // no more, for the sanitizer
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
    CUDA_OK(cudaMalloc(&memory, std::max<size_t>(bytes, 1)));
    CUDA_OK(cudaMemset(memory, 0xff, bytes));
    memory_[memory] = memory;
    return memory;
  }

 private:
  std::map<const void*, void*> memory_;
};

// A model's cache on the device, with fixed addresses for the inputs of a step, whatever its length.
class DeviceState {
 protected:
  auto OnDevice() {
    return [this](auto& vector) { return mirror.At(vector); };
  }

 public:
  // Memory for steps as long as `longest`, which becomes the current one.
  DeviceState(const Config& config, const Step& longest) : state(config), step(longest), config_(config) {
    CUDA_OK(cudaStreamCreate(&stream));
    for (const Bytes& query : step.query) attended.emplace_back(query.size(), 0xff);
    // Everything is allocated here: nothing may be while a graph is captured.
    AttentionArgs(config_, state, step, 0, nullptr, nullptr, OnDevice());
    UpdateArgs(config_, state, step, nullptr, OnDevice());
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) {
      mirror.At(step.query[layer]);
      mirror.At(attended[layer]);
    }
  }
  DeviceState(const DeviceState&) = delete;
  ~DeviceState() { cudaStreamDestroy(stream); }

  void UploadState() {
    state.Each([this](const auto& tensor) { mirror.Upload(tensor); });
  }
  void UploadStep(const Step& from) {
    step.steps = from.steps;
    const auto upload = [this](auto& to, const auto& values) {
      to = values;
      mirror.Upload(to);
    };
    upload(step.step_tokens, from.step_tokens);
    upload(step.budget, from.budget);
    for (int32_t layer = 0; layer < config_.shape.num_layers; ++layer) {
      upload(step.query[layer], from.query[layer]);
      upload(step.key[layer], from.key[layer]);
      upload(step.value[layer], from.value[layer]);
      upload(step.log_beta[layer], from.log_beta[layer]);
      attended[layer].assign(step.query[layer].size(), 0xff);
      mirror.Upload(attended[layer]);
    }
  }
  void DownloadResults() {
    state.Each([this](auto& tensor) { mirror.Download(tensor); });
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
  std::vector<Bytes> attended;  // per layer
  Mirror mirror;
  cudaStream_t stream = nullptr;

 protected:
  Config config_;
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

}  // namespace trimkv::test
