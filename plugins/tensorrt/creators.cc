#include "creators.h"

#include <memory>

#include "pool_attention_plugin.h"
#include "pool_update_plugin.h"

namespace trimkv::trt {
namespace {

template <class Plugin>
class Creator : public nv::IPluginCreatorV3One {
 public:
  Creator() { Plugin::DeclareFields(names_); }

  nv::IPluginV3* createPlugin(const char*, const nv::PluginFieldCollection* fields,
                              nv::TensorRTPhase phase) noexcept override {
    return Guarded<nv::IPluginV3*>(Plugin::kName, nullptr, [&] { return new Plugin(FieldReader(fields), phase); });
  }
  const nv::PluginFieldCollection* getFieldNames() noexcept override { return names_.Collection(); }
  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  FieldWriter names_;
};

struct All {
  Creator<PoolAttentionPlugin> attention;
  Creator<PoolUpdatePlugin> update;
  nv::IPluginCreatorInterface* list[2] = {&attention, &update};
};

}  // namespace

nv::IPluginCreatorInterface* const* Creators(int32_t& count) noexcept {
  count = 0;
  return Guarded<nv::IPluginCreatorInterface* const*>("trimkv", nullptr, [&] {
    static All all;
    count = 2;
    return all.list;
  });
}

}  // namespace trimkv::trt
