// PoolAttention on CUDA (docs/design.md, section 5).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "trimkv/kernels.h"

namespace trimkv::cuda {

// Null if this kernel takes the arguments, else what is wrong with them (a literal). Looks at no device memory.
const char* PoolAttentionUnsupported(const PoolAttentionArgs& args);

// 0 where the arguments' shapes need none.
size_t PoolAttentionWorkspaceBytes(const PoolAttentionArgs& args);

// One or two launches, none of which the host waits for; safe in a CUDA graph. cudaErrorInvalidValue if unsupported.
cudaError_t PoolAttentionCuda(const PoolAttentionArgs& args, cudaStream_t stream);

}  // namespace trimkv::cuda
