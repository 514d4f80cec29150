// QuantizedLinear as an ONNX Runtime kernel for the CPU (graph/functions/quantized.py).
#pragma once

#include "cpu/quantized_linear.h"
#include "cpu_device.h"
#include "operators.h"
#include "ort.h"

namespace trimkv::ort {

constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;

// Inputs: x [inputs, K]; of each matrix its numbers [N, blocks, bytes], scales [N, blocks] and perhaps zero points.
template <int kMatrices>
class QuantizedLinearKernel {
  static_assert(kMatrices >= 1 && kMatrices <= cpu::kMaxMatrices);

 public:
  static constexpr const char* kNames[] = {"QuantizedLinear", "QuantizedLinear2", "QuantizedLinear3"};
  static constexpr const char* kName = kNames[kMatrices - 1];

  explicit QuantizedLinearKernel(const OrtKernelInfo* info)
      : bits_(IntAttribute(info, "bits")), block_size_(IntAttribute(info, "block_size")) {
    ThrowIfFailed(g_api->KernelInfo_GetInputCount(info, &inputs_));
    if (inputs_ != 1 + 2 * kMatrices && inputs_ != 1 + 3 * kMatrices) {
      throw Error(std::string(kName) + " has " + std::to_string(inputs_) + " inputs");
    }
    if (block_size_ < 1) throw Error("block_size must be at least 1");
    ThrowIfFailed(g_api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
  }
  QuantizedLinearKernel(const QuantizedLinearKernel&) = delete;
  QuantizedLinearKernel& operator=(const QuantizedLinearKernel&) = delete;
  ~QuantizedLinearKernel() { g_api->ReleaseAllocator(allocator_); }

  void Compute(OrtKernelContext* context) const {
    const Tensor x = Input(context, 0);
    if (x.type != kFloat || x.dims.count != 2) throw Error("x must be float32 [inputs, K]");
    const int64_t columns = x.dims.at[1], blocks = columns / block_size_;
    cpu::QuantizedLinearArgs args{};
    args.matrices = kMatrices;
    const size_t each = (inputs_ - 1) / kMatrices;
    for (int m = 0; m < kMatrices; ++m) {
      const Tensor numbers = Input(context, 1 + m * each), scales = Input(context, 2 + m * each);
      const int64_t rows = numbers.dims.at[0];
      Expect("numbers", numbers, kUint8, MakeDims(rows, blocks, block_size_ * bits_ / 8));
      const bool half = scales.type == kHalf;
      Expect("scales", scales, half ? kHalf : kFloat, MakeDims(rows, blocks));
      args.matrix[m] = {static_cast<const uint8_t*>(numbers.data),
                        scales.data,
                        nullptr,
                        half,
                        rows,
                        static_cast<int32_t>(columns),
                        static_cast<int32_t>(bits_),
                        static_cast<int32_t>(block_size_)};
      if (each == 3) {
        const Tensor zeros = Input(context, 3 + m * each);
        Expect("zero points", zeros, kUint8, MakeDims(rows, (blocks * bits_ + 7) / 8));
        args.matrix[m].zeros = static_cast<const uint8_t*>(zeros.data);
      }
      args.y[m] = static_cast<float*>(Output(context, m, MakeDims(x.dims.at[0], rows)));
    }
    args.inputs = x.dims.at[0];
    if (const char* error = cpu::Check(args)) throw Error(error);
    args.x = static_cast<const float*>(x.data);
    // One row's workspace lies on the stack, and that of more comes from ONNX Runtime, as its own kernels' does: it is
    // back when the call ends, so that the nodes of all layers share it.
    alignas(64) char few[kStackBytes];
    const size_t bytes = cpu::QuantizedLinearWorkspaceBytes(args);
    const Scratch scratch(bytes > kStackBytes ? allocator_ : nullptr, bytes);
    args.workspace = bytes > kStackBytes ? scratch.memory() : few;
    cpu::QuantizedLinear(args, CpuDevice(context).parallel());
  }

  static OrtStatus* InferShapes(const OrtCustomOp*, OrtShapeInferContext* context) {
    return Guard([&] {
      size_t inputs = 0;
      ThrowIfFailed(g_api->ShapeInferContext_GetInputCount(context, &inputs));
      for (int m = 0; m < kMatrices; ++m) {
        OrtTensorTypeAndShapeInfo *out = nullptr, *numbers = nullptr;
        ThrowIfFailed(g_api->ShapeInferContext_GetInputTypeShape(context, 0, &out));
        ThrowIfFailed(
            g_api->ShapeInferContext_GetInputTypeShape(context, 1 + m * ((inputs - 1) / kMatrices), &numbers));
        Dims to, of;
        ThrowIfFailed(g_api->GetDimensionsCount(out, &to.count));
        ThrowIfFailed(g_api->GetDimensionsCount(numbers, &of.count));
        if (to.count != 2 || of.count != 3) throw Error("x must be [inputs, K], numbers [N, blocks, bytes]");
        ThrowIfFailed(g_api->GetDimensions(out, to.at.data(), to.count));
        ThrowIfFailed(g_api->GetDimensions(numbers, of.at.data(), of.count));
        to.at[1] = of.at[0];
        ThrowIfFailed(g_api->SetDimensions(out, to.at.data(), to.count));
        ThrowIfFailed(g_api->ShapeInferContext_SetOutputTypeShape(context, m, out));
      }
    });
  }

 private:
  static constexpr size_t kStackBytes = 32 << 10;

  // Memory of an allocator, where there is one, given back at the end.
  class Scratch {
   public:
    Scratch(OrtAllocator* allocator, size_t bytes)
        : allocator_(allocator), memory_(allocator ? allocator->Alloc(allocator, bytes + kAlignment) : nullptr) {
      if (allocator && !memory_) throw std::bad_alloc();
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
      if (memory_) allocator_->Free(allocator_, memory_);
    }
    void* memory() const {
      const auto address = reinterpret_cast<uintptr_t>(memory_);
      return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }

   private:
    static constexpr size_t kAlignment = 64;
    OrtAllocator* const allocator_;
    void* const memory_;
  };

  const int64_t bits_, block_size_;
  size_t inputs_ = 0;
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace trimkv::ort
