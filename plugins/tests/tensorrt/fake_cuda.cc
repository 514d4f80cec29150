// A stand-in for the CUDA runtime and for the launches of the CUDA kernels: memory is the host's, streams run at once,
// kernels run on emulated threads, and what is launched while a stream is captured is kept as a graph. Only what the
// plugins and their tests call; anything else does not link.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "emulated_launch.h"
#include "pool_attention.h"
#include "pool_update.h"

// The test's; told before and after emulated threads run, which allocate.
extern "C" __attribute__((weak)) void TrimkvEmulating(bool running);

struct CUgraph_st {
  std::vector<std::function<void()>> launches;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> launches;
};
struct CUstream_st {
  CUgraph_st* captured = nullptr;
};

namespace {

constexpr size_t kTotal = size_t{1} << 40;
size_t g_allocations = 0;
int g_capturing = 0;
uint32_t g_seed = 1;

cudaError_t Launch(cudaStream_t stream, std::function<void()> work) {
  if (stream != nullptr && stream->captured != nullptr) {
    stream->captured->launches.push_back(std::move(work));
  } else {
    work();
  }
  return cudaSuccess;
}

// What kernels.h asks of a workspace.
bool Aligned(const void* workspace) { return reinterpret_cast<uintptr_t>(workspace) % 256 == 0; }

// While this lives, allocations are the emulation's.
class Emulating {
 public:
  Emulating() { Tell(true); }
  ~Emulating() { Tell(false); }

 private:
  static void Tell(bool running) {
    if (TrimkvEmulating != nullptr) TrimkvEmulating(running);
  }
};

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the stand-in for CUDA";
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  if (g_capturing > 0) return cudaErrorStreamCaptureUnsupported;
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  ++g_allocations;
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = kTotal;
  *free = kTotal - g_allocations;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (g_capturing > 0) return cudaErrorStreamCaptureUnsupported;
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return Launch(stream, [=] { std::memset(memory, value, bytes); });
}
cudaError_t cudaDeviceSynchronize() { return g_capturing > 0 ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream->captured = new CUgraph_st;
  ++g_capturing;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->captured != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = stream->captured;
  stream->captured = nullptr;
  --g_capturing;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = new CUgraphExec_st{graph->launches};
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (const std::function<void()>& launch : executable->launches) launch();
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}

}  // extern "C"

namespace trimkv::cuda {

cudaError_t PoolAttentionCuda(const PoolAttentionArgs& args, cudaStream_t stream) {
  if (PoolAttentionUnsupported(args) != nullptr) return cudaErrorInvalidValue;
  if (!Aligned(args.workspace)) return cudaErrorMisalignedAddress;
  const Emulating emulating;
  return Launch(stream, [args] {
    const Emulating emulating;
    const int depth = args.shape.head_dim <= 64 ? 64 : args.shape.head_dim <= 128 ? 128 : 256;
    EmulateAttention(args, ChoosePath(args), depth, 0, g_seed++);
  });
}

cudaError_t PoolUpdateCuda(const PoolUpdateArgs& args, cudaStream_t stream) {
  if (PoolUpdateUnsupported(args) != nullptr) return cudaErrorInvalidValue;
  if (!Aligned(args.workspace)) return cudaErrorMisalignedAddress;
  const Emulating emulating;
  return Launch(stream, [args] {
    const Emulating emulating;
    EmulateUpdate(args, 64, 0, g_seed++);
  });
}

}  // namespace trimkv::cuda
