// The library that registers itself, and both libraries beside a TensorRT of another major version.
//
//   test_tensorrt_autoreg registers|preloaded|alone|other AUTOREG PLUGIN NVINFER OTHER_NVINFER
#include <cstdio>
#include <cstring>

#include "expect.h"
#include "signatures.h"

namespace trimkv::test {
namespace {

template <class Function>
Function* Symbol(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

void* Load(const char* path, int flags = 0) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags);
  EXPECT(library != nullptr, "%s", dlerror());
  return library;
}

std::vector<nv::IPluginCreatorV3One*> Registered(void* nvinfer) {
  int32_t count = 0;
  nv::IPluginCreatorInterface* const* list =
      Symbol<nv::IPluginRegistry*()>(nvinfer, "getPluginRegistry")()->getAllCreators(&count);
  std::vector<nv::IPluginCreatorV3One*> creators;
  for (int32_t i = 0; i < count; ++i) creators.push_back(static_cast<nv::IPluginCreatorV3One*>(list[i]));
  return creators;
}

void ExpectPlugins(void* nvinfer) {
  const auto creators = Registered(nvinfer);
  EXPECT(creators.size() == 2, "%zu creators", creators.size());
  if (creators.size() != 2) return;
  EXPECT(std::strcmp(creators[0]->getPluginName(), "PoolAttention") == 0, "%s", creators[0]->getPluginName());
  EXPECT(std::strcmp(creators[1]->getPluginName(), "PoolUpdate") == 0, "%s", creators[1]->getPluginName());
  // Errors go to the logger that this TensorRT has.
  FieldList none;
  PluginPointer plugin(creators[1]->createPlugin("node", none.Collection(), nv::TensorRTPhase::kBUILD));
  const std::string errors = Symbol<const char*()>(nvinfer, "FakeErrors")();
  EXPECT(plugin == nullptr && errors.find("PoolUpdate: field num_layers is missing") != std::string::npos, "%s",
         errors.c_str());
}

int Main(const std::string& mode, const char* autoreg, const char* plugin, const char* nvinfer, const char* other) {
  if (mode == "registers") {
    void* tensorrt = Load(nvinfer);
    void* library = Load(autoreg);
    EXPECT(dlsym(library, "getCreators") == nullptr, "exports more than it must");
    dlclose(library);  // the registry goes on pointing into it
    ExpectPlugins(tensorrt);
    Load(autoreg);
    EXPECT(Registered(tensorrt).size() == 2, "registered twice");
  } else if (mode == "preloaded") {
    ExpectPlugins(Load(nvinfer, RTLD_NOLOAD));
  } else if (mode == "alone") {
    Load(autoreg);
    EXPECT(Registered(Load(nvinfer)).empty(), "registered before TensorRT was there");
  } else if (mode == "other") {
    void* tensorrt = Load(other);
    Load(autoreg);
    EXPECT(Registered(tensorrt).empty(), "registered with another major version");
    PluginLibrary library(plugin);  // its logger has another virtual table, as far as the plugin can know
    FieldList none;
    PluginPointer refused(library.creators.at(0)->createPlugin("node", none.Collection(), nv::TensorRTPhase::kBUILD));
    EXPECT(refused == nullptr && library.logger.errors.empty(), "logged through another major version's logger");
  } else {
    EXPECT(false, "no such test: %s", mode.c_str());
  }
  std::printf("TensorRT %d.%d, autoreg, %s: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, mode.c_str(),
              g_checks, g_failed);
  return g_failed != 0;
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  if (argc != 6) return std::fprintf(stderr, "usage: test_tensorrt_autoreg MODE AUTOREG PLUGIN NVINFER OTHER\n"), 2;
  return trimkv::test::Main(argv[1], argv[2], argv[3], argv[4], argv[5]);
}
