// libtrimkv_plugin.so: what TensorRT asks of a plugin library that it loads itself (IPluginRegistry::loadLibrary,
// trtexec --dynamicPlugins, TensorRT-LLM). It registers nothing.
#include "creators.h"

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) noexcept {
  return trimkv::trt::Creators(count);
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  trimkv::trt::SetLoggerFinder(finder);
}
