#include "pool_update.h"
#include "pool_update_body.h"

namespace trimkv::cuda {
namespace {

constexpr int kMoveThreads = 256;
constexpr int kMoveItems = 4;      // vectors that a thread copies when the most possible moves
constexpr int kMoveBlocks = 2048;  // of all rows together, about

static_assert(kPlanSharedBytes <= 48 * 1024, "more would have to be asked for with cudaFuncSetAttribute");
static_assert(sizeof(PoolUpdateArgs) <= 4096, "what a kernel takes as arguments on every device");

__global__ void __launch_bounds__(kPlanThreads) PlanKernel(const __grid_constant__ PoolUpdateArgs args) {
  extern __shared__ int32_t shared[];
  DeviceBlock block;
  PlanRow(block, args, static_cast<int32_t>(blockIdx.x), shared);
}

template <class Vector>
__global__ void __launch_bounds__(kMoveThreads) MoveKernel(const __grid_constant__ PoolUpdateArgs args) {
  MoveRow<Vector>(args, static_cast<int32_t>(blockIdx.y), blockIdx.x * kMoveThreads + threadIdx.x,
                  gridDim.x * kMoveThreads);
}

int64_t RowBytes(const PoolUpdateArgs& args) {
  return static_cast<int64_t>(args.shape.head_dim) * static_cast<int64_t>(ItemSize(args.type));
}

// Entries outside the pool at most.
int64_t MostOutside(const PoolUpdateArgs& args) {
  return (static_cast<int64_t>(args.shape.evict_every) + args.steps) * args.shape.num_streams();
}

int64_t MostItems(const PoolUpdateArgs& args, int64_t vector_bytes) {
  return MostOutside(args) * (RowBytes(args) / vector_bytes);
}

template <class Vector>
void LaunchMoves(const PoolUpdateArgs& args, cudaStream_t stream) {
  const int64_t wanted = CeilDiv<int64_t>(MostItems(args, sizeof(Vector)), kMoveThreads * kMoveItems);
  const int64_t most = CeilDiv<int64_t>(kMoveBlocks, args.shape.batch);
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most), static_cast<unsigned>(args.shape.batch));
  MoveKernel<Vector><<<grid, kMoveThreads, 0, stream>>>(args);
}

bool RowsAligned(const PoolUpdateArgs& args, size_t bytes) {
  uintptr_t bits = static_cast<uintptr_t>(RowBytes(args));
  for (const void* base : {args.pool_key, args.pool_value, args.recent_key, args.recent_value}) {
    bits |= reinterpret_cast<uintptr_t>(base);
  }
  for (int32_t layer = 0; layer < args.shape.num_layers; ++layer) {
    bits |= reinterpret_cast<uintptr_t>(args.key[layer]) | reinterpret_cast<uintptr_t>(args.value[layer]);
  }
  return bits % bytes == 0;
}

}  // namespace

const char* PoolUpdateUnsupported(const PoolUpdateArgs& args) {
  if (const char* error = Check(args)) return error;
  if (args.shape.batch > 65535) return "the batch must be at most 65535";
  if (args.shape.num_streams() + 1 > kPlanTableInts) return "layers times KV heads must be at most 10239";
  if (MostItems(args, 2) >= 0x7fffffff || args.shape.num_slots + MostOutside(args) >= 0x7fffffff) {
    return "the entries of one step are too many: shorten prefill_chunk";
  }
  return nullptr;
}

size_t PoolUpdateWorkspaceBytes(const PoolUpdateArgs& args) {
  return LayOutPlan(args.shape, args.steps).bytes * static_cast<size_t>(args.shape.batch);
}

cudaError_t PoolUpdateCuda(const PoolUpdateArgs& args, cudaStream_t stream) {
  if (PoolUpdateUnsupported(args) != nullptr) return cudaErrorInvalidValue;
  PlanKernel<<<args.shape.batch, kPlanThreads, kPlanSharedBytes, stream>>>(args);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;  // there is no plan to follow
  if (RowsAligned(args, sizeof(uint4))) {
    LaunchMoves<uint4>(args, stream);
  } else if (RowsAligned(args, sizeof(uint32_t))) {
    LaunchMoves<uint32_t>(args, stream);
  } else {
    LaunchMoves<uint16_t>(args, stream);
  }
  return cudaGetLastError();
}

}  // namespace trimkv::cuda
