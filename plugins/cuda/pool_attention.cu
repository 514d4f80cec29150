#include "pool_attention.h"
#include "pool_attention_body.h"

namespace trimkv::cuda {
namespace {

// Which kernels run.
enum class Path { kSimple, kDecode, kPrefill };

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

bool UsesTensorCores(const PoolAttentionArgs& args) {
  if (args.type == DataType::kFloat32 || args.shape.head_dim % kVector != 0) return false;
  uintptr_t bits = 0;
  for (const void* base : {args.query, args.key, args.value, args.pool_key, args.pool_value, args.recent_key,
                           args.recent_value, static_cast<const void*>(args.attended)}) {
    bits |= reinterpret_cast<uintptr_t>(base);
  }
  return bits % 16 == 0;
}

bool FewRows(const PoolAttentionArgs& args) { return static_cast<int64_t>(args.steps) * args.group <= kTileRows; }

Path ChoosePath(const PoolAttentionArgs& args) {
  if (!UsesTensorCores(args)) return Path::kSimple;
  return FewRows(args) ? Path::kDecode : Path::kPrefill;
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

static_assert(kMaxHeadDim <= 256, "the widest kernel, and what a lane of the others holds");

const char* PoolAttentionUnsupported(const PoolAttentionArgs& args) {
  if (const char* error = Check(args)) return error;
  if (args.shape.batch > 65535) return "the batch must be at most 65535";
  if (args.shape.num_kv_heads > 65535) return "the KV heads must be at most 65535";
  return nullptr;
}

// By shapes alone, so that a plan made before there are addresses holds.
size_t PoolAttentionWorkspaceBytes(const PoolAttentionArgs& args) {
  const bool splits = args.type != DataType::kFloat32 && args.shape.head_dim % kVector == 0 && FewRows(args);
  return splits ? PlanDecode(args).bytes : 0;
}

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
