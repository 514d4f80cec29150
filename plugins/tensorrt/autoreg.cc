// libtrimkv_plugin_autoreg.so: registers its creators with the TensorRT of this process when it is loaded, for tools
// that only load a library (trtexec --staticPlugins, polygraphy --plugins, ONNX Runtime, Triton). It is never unloaded:
// the registry goes on pointing to its creators.
#include <string>

#include "creators.h"
#include "libnvinfer.h"
#include "operator_plugin.h"

namespace trimkv::trt {
namespace {

constexpr const char* kWho = "libtrimkv_plugin_autoreg.so";

bool Register() {
  using GetRegistry = nv::IPluginRegistry*();
  const auto get = reinterpret_cast<GetRegistry*>(FindInLibnvinfer("getPluginRegistry"));
  if (get == nullptr) {
    const int loaded = LoadedMajor();
    throw Error("compiled for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", " +
                (loaded == 0 ? "but none is loaded: load TensorRT first"
                             : "but the process has TensorRT " + std::to_string(loaded)) +
                "; no plugin is registered");
  }
  nv::IPluginRegistry* registry = get();
  if (registry == nullptr) throw Error("TensorRT has no plugin registry; no plugin is registered");
  int32_t count = 0;
  nv::IPluginCreatorInterface* const* creators = Creators(count);
  for (int32_t i = 0; i < count; ++i) {
    if (!registry->registerCreator(*creators[i], kNamespace)) {
      Log(nv::ILogger::Severity::kWARNING, kWho, "TensorRT has a plugin of this name, version and namespace already");
    }
  }
  return true;
}

[[maybe_unused]] const bool g_registered = Guarded(kWho, false, Register);

}  // namespace
}  // namespace trimkv::trt
