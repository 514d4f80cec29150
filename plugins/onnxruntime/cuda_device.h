// The operators' device for ONNX Runtime's CUDA provider.
#pragma once

#include <cuda_runtime.h>

#include "cuda/pool_attention.h"
#include "cuda/pool_update.h"
#include "ort.h"

namespace trimkv::ort {

inline void ThrowIfFailed(cudaError_t error) {
  if (error != cudaSuccess) throw Error(std::string("CUDA: ") + cudaGetErrorString(error));
}

class CudaDevice {
 public:
  // Grows to the largest call and stays there. A CUDA graph must be captured after a first run, as ONNX Runtime does.
  class Workspace {
   public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { cudaFree(memory_); }

    void* Reserve(size_t bytes) {
      if (bytes > size_) {
        ThrowIfFailed(cudaFree(memory_));  // waits for the kernels that use it
        memory_ = nullptr;
        size_ = 0;
        ThrowIfFailed(cudaMalloc(&memory_, bytes));
        size_ = bytes;
      }
      return memory_;
    }

   private:
    void* memory_ = nullptr;
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
