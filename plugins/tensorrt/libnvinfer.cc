#include "libnvinfer.h"

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>

namespace trimkv::trt {
namespace {

// The full runtime and the two that only run engines; each has the plugin registry.
constexpr const char* kNames[] = {"libnvinfer", "libnvinfer_lean", "libnvinfer_dispatch"};
constexpr int kFirstMajor = 8;
constexpr int kLastMajor = 20;

// A handle of a TensorRT library that is already loaded; null if there is none. The reference keeps it loaded.
void* Loaded(int major) noexcept {
  for (const char* name : kNames) {
    char file[64];
    std::snprintf(file, sizeof file, "%s.so.%d", name, major);
    if (void* handle = dlopen(file, RTLD_LAZY | RTLD_NOLOAD)) return handle;
  }
  return nullptr;
}

}  // namespace

int LoadedMajor() noexcept {
  if (Loaded(NV_TENSORRT_MAJOR) != nullptr) return NV_TENSORRT_MAJOR;
  for (int major = kFirstMajor; major <= kLastMajor; ++major) {
    if (Loaded(major) != nullptr) return major;
  }
  return 0;
}

void* FindInLibnvinfer(const char* symbol) noexcept {
  void* handle = Loaded(NV_TENSORRT_MAJOR);
  return handle != nullptr ? dlsym(handle, symbol) : nullptr;
}

}  // namespace trimkv::trt
