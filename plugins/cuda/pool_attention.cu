#include "pool_attention.h"
#include "shapes.h"

namespace trimkv::cuda {
namespace {

// Shared memory of one warp (decode) or of the block (prefill).
template <class T, int kDepth, int kEntries>
constexpr int kTilesBytes = kStages * static_cast<int>(sizeof(Tile<T, kDepth, kEntries>));

// Blocks that a multiprocessor must have registers for: together the warps that kDecodeParts counts on.
template <int kDepth>
constexpr int kDecodeBlocks = kDepth <= 128 ? 6 : 4;

template <class T, int kDepth>
__global__ void __launch_bounds__(kDecodeWarps* kWarpSize, kDecodeBlocks<kDepth>)
    DecodeKernel(const __grid_constant__ PoolAttentionArgs args) {
  extern __shared__ uint4 shared[];
  DeviceBlock block;
  using DecodeTile = Tile<T, kDepth, kDecodeEntries>;
  DecodePart<DeviceBlock, T, kDepth>(block, args, static_cast<int32_t>(blockIdx.y),
                                     static_cast<int32_t>(blockIdx.x) * kDecodeWarps + block.Warp(),
                                     reinterpret_cast<DecodeTile*>(shared) + block.Warp() * kStages);
}

template <class T>
__global__ void __launch_bounds__(kMergeWarps* kWarpSize) MergeKernel(const __grid_constant__ PoolAttentionArgs args) {
  DeviceBlock block;
  const int32_t r = static_cast<int32_t>(blockIdx.x) * kMergeWarps + block.Warp();
  const int32_t rows = args.steps * args.group;
  if (r >= rows * args.shape.num_kv_heads) return;
  MergeParts<DeviceBlock, T>(block, args, static_cast<int32_t>(blockIdx.y), r / rows, r % rows);
}

template <class T, int kDepth>
__global__ void __launch_bounds__(kPrefillWarps* kWarpSize)
    PrefillKernel(const __grid_constant__ PoolAttentionArgs args) {
  extern __shared__ uint4 shared[];
  DeviceBlock block;
  Prefill<DeviceBlock, T, kDepth>(block, args, static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(blockIdx.y),
                                  static_cast<int32_t>(blockIdx.x) * kPrefillRows,
                                  reinterpret_cast<Tile<T, kDepth, kPrefillEntries>*>(shared));
}

template <class T>
__global__ void __launch_bounds__(kWarpSize) SimpleKernel(const __grid_constant__ PoolAttentionArgs args) {
  DeviceBlock block;
  SimpleRow<DeviceBlock, T>(block, args, static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(blockIdx.y),
                            static_cast<int32_t>(blockIdx.x));
}

// Blocks may use more than 48 KB of shared memory only where the kernel says so.
template <class Kernel>
cudaError_t Launch(Kernel* kernel, dim3 grid, int threads, int shared_bytes, const PoolAttentionArgs& args,
                   cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int kDepth>
cudaError_t LaunchDecode(const PoolAttentionArgs& args, cudaStream_t stream) {
  const DecodePlan plan = PlanDecode(args);
  const unsigned batch = static_cast<unsigned>(args.shape.batch);
  const dim3 parts(static_cast<unsigned>(CeilDiv<int32_t>(plan.parts, kDecodeWarps)), batch);
  const cudaError_t error = Launch(DecodeKernel<T, kDepth>, parts, kDecodeWarps * kWarpSize,
                                   kDecodeWarps * kTilesBytes<T, kDepth, kDecodeEntries>, args, stream);
  if (error != cudaSuccess) return error;
  const int32_t rows = plan.rows * args.shape.num_kv_heads;
  const dim3 merges(static_cast<unsigned>(CeilDiv<int32_t>(rows, kMergeWarps)), batch);
  return Launch(MergeKernel<T>, merges, kMergeWarps * kWarpSize, 0, args, stream);
}

template <class T, int kDepth>
cudaError_t LaunchPrefill(const PoolAttentionArgs& args, cudaStream_t stream) {
  const int32_t rows = args.steps * args.group;
  const dim3 grid(static_cast<unsigned>(CeilDiv<int32_t>(rows, kPrefillRows)),
                  static_cast<unsigned>(args.shape.num_kv_heads), static_cast<unsigned>(args.shape.batch));
  return Launch(PrefillKernel<T, kDepth>, grid, kPrefillWarps * kWarpSize, kTilesBytes<T, kDepth, kPrefillEntries>,
                args, stream);
}

template <class T>
cudaError_t LaunchSimple(const PoolAttentionArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(args.steps * args.group), static_cast<unsigned>(args.shape.num_kv_heads),
                  static_cast<unsigned>(args.shape.batch));
  return Launch(SimpleKernel<T>, grid, kWarpSize, 0, args, stream);
}

template <class T, int kDepth>
cudaError_t LaunchDepth(const PoolAttentionArgs& args, Path path, cudaStream_t stream) {
  return path == Path::kDecode ? LaunchDecode<T, kDepth>(args, stream) : LaunchPrefill<T, kDepth>(args, stream);
}

template <class T>
cudaError_t LaunchType(const PoolAttentionArgs& args, cudaStream_t stream) {
  const Path path = ChoosePath(args);
  if (path == Path::kSimple) return LaunchSimple<T>(args, stream);
  if (args.shape.head_dim <= 64) return LaunchDepth<T, 64>(args, path, stream);
  if (args.shape.head_dim <= 128) return LaunchDepth<T, 128>(args, path, stream);
  return LaunchDepth<T, 256>(args, path, stream);
}

}  // namespace

cudaError_t PoolAttentionCuda(const PoolAttentionArgs& args, cudaStream_t stream) {
  if (PoolAttentionUnsupported(args) != nullptr) return cudaErrorInvalidValue;
  switch (args.type) {
    case DataType::kFloat32:
      return LaunchSimple<float>(args, stream);
    case DataType::kFloat16:
      return LaunchType<Half>(args, stream);
    case DataType::kBFloat16:
      return LaunchType<BFloat16>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace trimkv::cuda
