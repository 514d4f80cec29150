// The operators' device for ONNX Runtime's CPU provider.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/pool_attention.h"
#include "cpu/pool_update.h"
#include "ort.h"

namespace trimkv::ort {

class CpuDevice {
 public:
  // Grows to the largest call and stays there.
  class Workspace {
   public:
    void* Reserve(size_t bytes) {
      constexpr size_t kAlignment = 256;
      if (bytes > size_) {
        size_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        memory_.reset(std::aligned_alloc(kAlignment, size_));
        if (!memory_) throw std::bad_alloc();
      }
      return memory_.get();
    }

   private:
    struct Free {
      void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
  };

  explicit CpuDevice(OrtKernelContext* context) : parallel_{Run, context, 0} {}

  size_t AttendBytes(const PoolAttentionArgs& args) const { return cpu::PoolAttentionWorkspaceBytes(args); }
  void Attend(const PoolAttentionArgs& args) const {
    if (const char* error = CheckState(args)) throw Error(error);
    cpu::PoolAttention(args, parallel_);
  }
  size_t UpdateBytes(const PoolUpdateArgs& args) const { return cpu::PoolUpdateWorkspaceBytes(args); }
  void Update(const PoolUpdateArgs& args) const {
    if (const char* error = CheckState(args)) throw Error(error);
    cpu::PoolUpdate(args, parallel_);
  }
  void Copy(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }
  const cpu::Parallel& parallel() const { return parallel_; }

 private:
  // ONNX Runtime's own threads.
  static void Run(void* context, size_t count, void (*task)(void*, size_t), void* user) {
    if (count == 1) return task(user, 0);
    ThrowIfFailed(
        g_api->KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(context), task, count, 0, user));
  }

  cpu::Parallel parallel_;
};

}  // namespace trimkv::ort
