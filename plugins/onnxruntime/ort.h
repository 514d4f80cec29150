// The few pieces of ONNX Runtime's C API that the custom operators use, with errors as exceptions inside and as
// OrtStatus at the border.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_c_api.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace trimkv::ort {

inline const OrtApi* g_api = nullptr;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void ThrowIfFailed(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = g_api->GetErrorMessage(status);
  g_api->ReleaseStatus(status);
  throw Error(message);
}

// Runs `body`; an exception becomes the status that is returned.
template <typename Body>
OrtStatus* Guard(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return g_api->CreateStatus(ORT_FAIL, error.what());
  }
}

// Dimensions without an allocation of ours.
struct Dims {
  static constexpr size_t kMax = 8;
  std::array<int64_t, kMax> at{};
  size_t count = 0;

  bool operator==(const Dims& other) const { return count == other.count && at == other.at; }
  std::string Text() const {
    std::string out = "[";
    for (size_t i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(at[i]);
    return out + "]";
  }
};

template <typename... Sizes>
Dims MakeDims(Sizes... sizes) {
  return {{static_cast<int64_t>(sizes)...}, sizeof...(sizes)};
}

struct Tensor {
  ONNXTensorElementDataType type;
  Dims dims;
  void* data;
};

inline Tensor Describe(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ThrowIfFailed(g_api->GetTensorTypeAndShape(value, &info));
  Tensor out{};
  OrtStatus* status = g_api->GetTensorElementType(info, &out.type);
  if (!status) status = g_api->GetDimensionsCount(info, &out.dims.count);
  if (!status && out.dims.count <= Dims::kMax) status = g_api->GetDimensions(info, out.dims.at.data(), out.dims.count);
  g_api->ReleaseTensorTypeAndShapeInfo(info);
  ThrowIfFailed(status);
  if (out.dims.count > Dims::kMax) throw Error("a tensor has " + std::to_string(out.dims.count) + " dimensions");
  ThrowIfFailed(g_api->GetTensorMutableData(const_cast<OrtValue*>(value), &out.data));
  return out;
}

inline Tensor Input(const OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  ThrowIfFailed(g_api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
  return Describe(value);
}

inline void* Output(OrtKernelContext* context, size_t index, const Dims& dims) {
  OrtValue* value = nullptr;
  ThrowIfFailed(g_api->KernelContext_GetOutput(context, index, dims.at.data(), dims.count, &value));
  void* data = nullptr;
  ThrowIfFailed(g_api->GetTensorMutableData(value, &data));
  return data;
}

inline int64_t IntAttribute(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  ThrowIfFailed(g_api->KernelInfoGetAttribute_int64(info, name, &value));
  return value;
}

inline float FloatAttribute(const OrtKernelInfo* info, const char* name) {
  float value = 0;
  ThrowIfFailed(g_api->KernelInfoGetAttribute_float(info, name, &value));
  return value;
}

inline std::string StringAttribute(const OrtKernelInfo* info, const char* name) {
  size_t size = 0;
  ThrowIfFailed(g_api->KernelInfoGetAttribute_string(info, name, nullptr, &size));
  std::string value(size, '\0');
  ThrowIfFailed(g_api->KernelInfoGetAttribute_string(info, name, value.data(), &size));
  value.resize(size ? size - 1 : 0);  // without the terminating zero
  return value;
}

}  // namespace trimkv::ort
