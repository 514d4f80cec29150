#include "pool_update.h"
#include "shapes.h"

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

template <class Vector>
void LaunchMoves(const PoolUpdateArgs& args, cudaStream_t stream) {
  const int64_t wanted = CeilDiv<int64_t>(MostItems(args, sizeof(Vector)), kMoveThreads * kMoveItems);
  const int64_t most = CeilDiv<int64_t>(kMoveBlocks, args.shape.batch);
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most), static_cast<unsigned>(args.shape.batch));
  MoveKernel<Vector><<<grid, kMoveThreads, 0, stream>>>(args);
}

}  // namespace

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
