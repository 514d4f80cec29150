// What the CUDA kernels take and need. Host code without CUDA calls, so that it can be tested without the toolkit's
// libraries.
#include "pool_attention.h"
#include "pool_update.h"
#include "shapes.h"

namespace trimkv::cuda {

static_assert(kMaxHeadDim <= 256, "the widest kernel, and what a lane of the others holds");

const char* PoolAttentionUnsupported(const PoolAttentionArgs& args) {
  if (const char* error = Check(args)) return error;
  if (args.shape.batch > 65535) return "the batch must be at most 65535";
  if (args.shape.num_kv_heads > 65535) return "the KV heads must be at most 65535";
  return nullptr;
}

// By shapes alone, so that a plan made before there are addresses holds.
size_t PoolAttentionWorkspaceBytes(const PoolAttentionArgs& args) {
  return HasMatrixShape(args) && FewRows(args) ? PlanDecode(args).bytes : 0;
}

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

}  // namespace trimkv::cuda
