// The operators' device for ONNX Runtime's CUDA provider.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/pool_attention.h"
#include "cuda/pool_update.h"
#include "ort.h"

namespace trimkv::ort {

inline void ThrowIfFailed(cudaError_t error) {
  if (error != cudaSuccess) throw Error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class CudaDevice {
 public:
  // Grows to the largest call and stays there. A CUDA graph must be captured after a first run, as ONNX Runtime does,
  // and goes on using the memory that it was captured with: what a larger call outgrows is kept. Growing at least
  // doubles, so all that is kept is less than what is in use.
  class Workspace {
   public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() {
      for (void* memory : memory_) cudaFree(memory);
    }

    void* Reserve(size_t bytes) {
      if (bytes > size_) {
        const size_t size = std::max(bytes, 2 * size_);
        void* memory = nullptr;
        ThrowIfFailed(cudaMalloc(&memory, size));
        memory_.push_back(memory);
        size_ = size;
      }
      return memory_.empty() ? nullptr : memory_.back();
    }

   private:
    std::vector<void*> memory_;  // the last is in use
    size_t size_ = 0;
  };

  explicit CudaDevice(OrtKernelContext* context) {
    void* stream = nullptr;
    ThrowIfFailed(g_api->KernelContext_GetGPUComputeStream(context, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  size_t AttendBytes(const PoolAttentionArgs& args) const { return cuda::PoolAttentionWorkspaceBytes(args); }
  void Attend(const PoolAttentionArgs& args) const {
    if (const char* error = cuda::PoolAttentionUnsupported(args)) throw Error(error);
    ThrowIfFailed(cuda::PoolAttentionCuda(args, stream_));
  }
  size_t UpdateBytes(const PoolUpdateArgs& args) const { return cuda::PoolUpdateWorkspaceBytes(args); }
  void Update(const PoolUpdateArgs& args) const {
    if (const char* error = cuda::PoolUpdateUnsupported(args)) throw Error(error);
    ThrowIfFailed(cuda::PoolUpdateCuda(args, stream_));
  }
  void Copy(void* to, const void* from, size_t bytes) const {
    ThrowIfFailed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
  }

 private:
  cudaStream_t stream_;
};

}  // namespace trimkv::ort
