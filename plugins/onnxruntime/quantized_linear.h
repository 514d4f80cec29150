// QuantizedLinear as an ONNX Runtime kernel for the CPU (graph/functions/quantized.py).
#pragma once

#include "cpu/quantized_linear.h"
#include "cpu_device.h"
#include "operators.h"
#include "ort.h"

namespace trimkv::ort {

constexpr auto kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

class QuantizedLinearKernel {
 public:
  static constexpr const char* kName = "QuantizedLinear";

  explicit QuantizedLinearKernel(const OrtKernelInfo* info)
      : rows_(IntAttribute(info, "N")),
        columns_(IntAttribute(info, "K")),
        bits_(IntAttribute(info, "bits")),
        block_size_(IntAttribute(info, "block_size")) {
    ThrowIfFailed(g_api->KernelInfo_GetInputCount(info, &inputs_));
    if (inputs_ != 3 && inputs_ != 4) throw Error("QuantizedLinear takes x, numbers, scales and perhaps zero points");
    ThrowIfFailed(g_api->KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
  }
  QuantizedLinearKernel(const QuantizedLinearKernel&) = delete;
  QuantizedLinearKernel& operator=(const QuantizedLinearKernel&) = delete;
  ~QuantizedLinearKernel() { g_api->ReleaseAllocator(allocator_); }

  void Compute(OrtKernelContext* context) const {
    const Tensor x = Input(context, 0), numbers = Input(context, 1), scales = Input(context, 2);
    cpu::QuantizedLinearArgs args{};
    args.matrix = {static_cast<const uint8_t*>(numbers.data), scales.data, nullptr, rows_,
                   static_cast<int32_t>(columns_), static_cast<int32_t>(bits_), static_cast<int32_t>(block_size_)};
    if (const char* error = cpu::Check(args)) throw Error(error);
    const int64_t blocks = args.matrix.blocks();
    Expect("x", x, kFloat, MakeDims(x.dims.at[0], columns_));
    Expect("numbers", numbers, kUint8, MakeDims(rows_, blocks, block_size_ * bits_ / 8));
    Expect("scales", scales, kFloat, MakeDims(rows_, blocks));
    if (inputs_ == 4) {
      const Tensor zeros = Input(context, 3);
      Expect("zero points", zeros, kUint8, MakeDims(rows_, (blocks * bits_ + 7) / 8));
      args.matrix.zeros = static_cast<const uint8_t*>(zeros.data);
    }
    args.x = static_cast<const float*>(x.data);
    args.inputs = x.dims.at[0];
    args.y = static_cast<float*>(Output(context, 0, MakeDims(args.inputs, rows_)));
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
      OrtTensorTypeAndShapeInfo *x = nullptr, *numbers = nullptr;
      ThrowIfFailed(g_api->ShapeInferContext_GetInputTypeShape(context, 0, &x));
      ThrowIfFailed(g_api->ShapeInferContext_GetInputTypeShape(context, 1, &numbers));
      Dims rows, matrix;
      ThrowIfFailed(g_api->GetDimensionsCount(x, &rows.count));
      ThrowIfFailed(g_api->GetDimensionsCount(numbers, &matrix.count));
      if (rows.count != 2 || matrix.count != 3) throw Error("x must be [inputs, K], numbers [N, blocks, bytes]");
      ThrowIfFailed(g_api->GetDimensions(x, rows.at.data(), rows.count));
      ThrowIfFailed(g_api->GetDimensions(numbers, matrix.at.data(), matrix.count));
      rows.at[1] = matrix.at[0];
      ThrowIfFailed(g_api->SetDimensions(x, rows.at.data(), rows.count));
      ThrowIfFailed(g_api->ShapeInferContext_SetOutputTypeShape(context, 0, x));
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

  const int64_t rows_, columns_, bits_, block_size_;
  size_t inputs_ = 0;
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace trimkv::ort
