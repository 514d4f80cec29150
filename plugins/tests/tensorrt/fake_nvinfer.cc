// A stand-in for libnvinfer: a registry that keeps what is registered, and a logger.
#include <NvInferRuntime.h>

#include <string>
#include <vector>

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // what TensorRT 10 still has in the registry

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

class Logger : public ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) errors += std::string(message) + "\n";
  }
  std::string errors;
};

class Registry : public IPluginRegistry {
 public:
  ~Registry() noexcept override = default;
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char* const) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char* const, const char* const, const char* const) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 10
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const count) noexcept override {
    return getAllCreators(count);
  }
#endif
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool const) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface& creator, const char* const space) noexcept override {
    if (std::string(space) != "trimkv") return false;
    creators_.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  IPluginCreatorInterface* getCreator(const char* const, const char* const, const char* const) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return -1; }

 private:
  std::vector<IPluginCreatorInterface*> creators_;
};

// Ready when this library has been initialised, not when it is first called: as a static of libnvinfer may be.
Logger g_logger;
Registry g_registry;

}  // namespace

EXPORT IPluginRegistry* getPluginRegistry() noexcept { return &g_registry; }
EXPORT ILogger* getLogger() noexcept { return &g_logger; }
EXPORT const char* FakeErrors() noexcept { return g_logger.errors.c_str(); }
