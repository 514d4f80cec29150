// Types and shapes of an operator's tensors, as TensorRT describes them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "logging.h"
#include "trimkv/types.h"

namespace trimkv::trt {

// What a tensor holds.
enum class Element {
  kStorage,  // float32, float16 or bfloat16: the one type of keys, values and activations
  kFloat,
  kInt32,
};

// One input of an operator.
struct Tensor {
  const char* name;
  int32_t layer;  // -1 where there is one for all layers
  Element element;
  int32_t rank;

  std::string Name() const { return layer < 0 ? name : std::string(name) + "_" + std::to_string(layer); }
};

inline bool IsStorage(nv::DataType type) {
  return type == nv::DataType::kFLOAT || type == nv::DataType::kHALF || type == nv::DataType::kBF16;
}

inline bool Matches(Element element, nv::DataType type, nv::DataType storage) {
  switch (element) {
    case Element::kStorage:
      return type == storage && IsStorage(storage);
    case Element::kFloat:
      return type == nv::DataType::kFLOAT;
    case Element::kInt32:
      return type == nv::DataType::kINT32;
  }
  return false;
}

inline DataType ToDataType(nv::DataType type) {
  switch (type) {
    case nv::DataType::kFLOAT:
      return DataType::kFloat32;
    case nv::DataType::kHALF:
      return DataType::kFloat16;
    case nv::DataType::kBF16:
      return DataType::kBFloat16;
    default:
      throw Error("keys and values must be float32, float16 or bfloat16, got TensorRT's data type " +
                  std::to_string(static_cast<int>(type)));
  }
}

inline std::string Text(const int64_t* dims, size_t count) {
  std::string out = "[";
  for (size_t i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

inline size_t ItemBytes(nv::DataType type) {
  return type == nv::DataType::kHALF || type == nv::DataType::kBF16 ? 2 : 4;
}

inline size_t NumBytes(const nv::PluginTensorDesc& tensor) {
  size_t bytes = ItemBytes(tensor.type);
  for (int32_t i = 0; i < tensor.dims.nbDims; ++i) bytes *= static_cast<size_t>(tensor.dims.d[i]);
  return bytes;
}

// The dimensions of all inputs, out of whichever description TensorRT gives. Nothing here allocates unless a shape is
// wrong.
class Shapes {
 public:
  explicit Shapes(const nv::PluginTensorDesc* inputs) : first_(&inputs->dims), stride_(sizeof *inputs) {}
  Shapes(const nv::DynamicPluginTensorDesc* inputs, nv::Dims nv::DynamicPluginTensorDesc::* which)
      : first_(&(inputs->*which)), stride_(sizeof *inputs) {}

  const nv::Dims& operator[](int32_t input) const {
    const char* at = reinterpret_cast<const char*>(first_) + static_cast<size_t>(input) * stride_;
    return *reinterpret_cast<const nv::Dims*>(at);
  }
  // A dimension that exists and that the kernels can hold.
  int32_t At(int32_t input, int32_t axis, const Tensor& tensor) const {
    const nv::Dims& dims = (*this)[input];
    if (dims.nbDims != tensor.rank) Wrong(input, tensor, std::to_string(tensor.rank) + " dimensions");
    if (dims.d[axis] < 1 || dims.d[axis] > 0x7fffffff) Wrong(input, tensor, "positive dimensions below 2^31");
    return static_cast<int32_t>(dims.d[axis]);
  }
  void Expect(int32_t input, const Tensor& tensor, std::initializer_list<int64_t> expected) const {
    const nv::Dims& dims = (*this)[input];
    bool same = dims.nbDims == static_cast<int32_t>(expected.size());
    for (int32_t i = 0; same && i < dims.nbDims; ++i) same = dims.d[i] == expected.begin()[i];
    if (!same) Wrong(input, tensor, Text(expected.begin(), expected.size()));
  }
  bool AllKnown(int32_t inputs) const {
    for (int32_t input = 0; input < inputs; ++input) {
      const nv::Dims& dims = (*this)[input];
      for (int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] < 0) return false;
      }
    }
    return true;
  }

 private:
  [[noreturn]] void Wrong(int32_t input, const Tensor& tensor, const std::string& expected) const {
    const nv::Dims& dims = (*this)[input];
    const int32_t count = dims.nbDims < 0 ? 0 : dims.nbDims < nv::Dims::MAX_DIMS ? dims.nbDims : nv::Dims::MAX_DIMS;
    int64_t got[nv::Dims::MAX_DIMS] = {};
    for (int32_t i = 0; i < count; ++i) got[i] = dims.d[i];
    throw Error(tensor.Name() + " has shape " + Text(got, static_cast<size_t>(count)) + ", expected " + expected);
  }

  const nv::Dims* first_;
  size_t stride_;
};

}  // namespace trimkv::trt
