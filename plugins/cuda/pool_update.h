// PoolUpdate on CUDA (docs/design.md, section 5).
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "trimkv/kernels.h"

namespace trimkv::cuda {

// Null if this kernel takes the arguments, else what is wrong with them (a literal). Looks at no device memory.
const char* PoolUpdateUnsupported(const PoolUpdateArgs& args);

size_t PoolUpdateWorkspaceBytes(const PoolUpdateArgs& args);

// Two launches, none of which the host waits for; safe in a CUDA graph. cudaErrorInvalidValue if unsupported.
cudaError_t PoolUpdateCuda(const PoolUpdateArgs& args, cudaStream_t stream);

}  // namespace trimkv::cuda
