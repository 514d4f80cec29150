// The custom-operator library: registers PoolAttention and PoolUpdate in the domain `trimkv`, and QuantizedLinear where
// it is asked for.
#include "cpu_device.h"
#include "operators.h"
#include "quantized_linear.h"
#if defined(TRIMKV_WITH_CUDA)
#include "cuda_device.h"
#endif

namespace {

using trimkv::ort::CpuDevice;
using trimkv::ort::CustomOp;
using trimkv::ort::g_api;
using trimkv::ort::Guard;
using trimkv::ort::PoolAttentionKernel;
using trimkv::ort::PoolUpdateKernel;
using trimkv::ort::QuantizedLinearKernel;
using trimkv::ort::ThrowIfFailed;

constexpr const char* kDomain = "trimkv";

// The entry of the session's configuration that asks for QuantizedLinear. Only a session whose weights are in the
// host's memory may: with a kernel for the CPU alone, ONNX Runtime takes the operator away from its other providers.
constexpr const char* kQuantizedLinear = "trimkv.quantized_linear";

bool WantsQuantizedLinear(const OrtSessionOptions* options) {
  int asked = 0;
  ThrowIfFailed(g_api->HasSessionConfigEntry(options, kQuantizedLinear, &asked));
  return asked && trimkv::cpu::GetQuantizedKernels() != nullptr;
}

}  // namespace

// For the Python runtime: whether there are CUDA kernels in this library.
extern "C" __attribute__((visibility("default"))) int TrimkvBuiltWithCuda() {
#if defined(TRIMKV_WITH_CUDA)
  return 1;
#else
  return 0;
#endif
}

// And whether QuantizedLinear has kernels for this processor.
extern "C" __attribute__((visibility("default"))) int TrimkvHasQuantizedKernels() {
  return trimkv::cpu::GetQuantizedKernels() != nullptr;
}

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  g_api = base->GetApi(ORT_API_VERSION);
  if (g_api == nullptr) return nullptr;  // older than the headers; ONNX Runtime then reports the missing operators
  return Guard([options] {
    static const CustomOp<PoolAttentionKernel<CpuDevice>> attention(nullptr);
    static const CustomOp<PoolUpdateKernel<CpuDevice>> update(nullptr);
    OrtCustomOpDomain* domain = nullptr;
    ThrowIfFailed(g_api->CreateCustomOpDomain(kDomain, &domain));
    ThrowIfFailed(g_api->CustomOpDomain_Add(domain, &attention));
    ThrowIfFailed(g_api->CustomOpDomain_Add(domain, &update));
    if (WantsQuantizedLinear(options)) {
      static const CustomOp<QuantizedLinearKernel<1>> one(nullptr);
      static const CustomOp<QuantizedLinearKernel<2>> two(nullptr);
      static const CustomOp<QuantizedLinearKernel<3>> three(nullptr);
      const OrtCustomOp* const all[] = {&one, &two, &three};
      for (const OrtCustomOp* op : all) ThrowIfFailed(g_api->CustomOpDomain_Add(domain, op));
    }
#if defined(TRIMKV_WITH_CUDA)
    using trimkv::ort::CudaDevice;
    static const CustomOp<PoolAttentionKernel<CudaDevice>> cuda_attention("CUDAExecutionProvider");
    static const CustomOp<PoolUpdateKernel<CudaDevice>> cuda_update("CUDAExecutionProvider");
    ThrowIfFailed(g_api->CustomOpDomain_Add(domain, &cuda_attention));
    ThrowIfFailed(g_api->CustomOpDomain_Add(domain, &cuda_update));
#endif
    // The session options keep the domain; it must live as long as the process, like the operators.
    ThrowIfFailed(g_api->AddCustomOpDomain(options, domain));
  });
}
