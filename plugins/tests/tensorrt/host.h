// A stand-in for TensorRT, from its headers alone: loads a plugin library as TensorRT would, hands it fields, shapes
// and a logger, and needs no libnvinfer.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace trimkv::test {

namespace nv = nvinfer1;

// Keeps what is logged.
class LineLogger : public nv::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) errors.emplace_back(message);
  }
  // The errors so far, which are forgotten.
  std::string Take() {
    std::string all;
    for (const std::string& line : errors) all += line + "\n";
    errors.clear();
    return all;
  }

  std::vector<std::string> errors;
};

class LineLoggerFinder : public nv::ILoggerFinder {
 public:
  explicit LineLoggerFinder(LineLogger* logger) : logger_(logger) {}
  nv::ILogger* findLogger() override { return logger_; }

 private:
  LineLogger* logger_;
};

// A plugin library and the logger that it was given.
class PluginLibrary {
 public:
  explicit PluginLibrary(const char* path) : finder_(&logger) {
    handle_ = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) Fail(dlerror());
    using GetCreators = nv::IPluginCreatorInterface* const*(int32_t&);
    using SetLoggerFinder = void(nv::ILoggerFinder*);
    const auto get = reinterpret_cast<GetCreators*>(dlsym(handle_, "getCreators"));
    const auto set = reinterpret_cast<SetLoggerFinder*>(dlsym(handle_, "setLoggerFinder"));
    if (get == nullptr || set == nullptr) Fail("getCreators or setLoggerFinder is not exported");
    set(&finder_);
    int32_t count = -1;
    nv::IPluginCreatorInterface* const* list = get(count);
    for (int32_t i = 0; i < count; ++i) {
      if (std::strcmp(list[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) Fail("not a V3 creator");
      creators.push_back(static_cast<nv::IPluginCreatorV3One*>(list[i]));
    }
  }
  PluginLibrary(const PluginLibrary&) = delete;

  // As the registry looks for it; null if there is none.
  nv::IPluginCreatorV3One* Find(const std::string& name, const std::string& version, const std::string& space) const {
    for (nv::IPluginCreatorV3One* creator : creators) {
      if (name == creator->getPluginName() && version == creator->getPluginVersion() &&
          space == creator->getPluginNamespace()) {
        return creator;
      }
    }
    return nullptr;
  }

  LineLogger logger;
  std::vector<nv::IPluginCreatorV3One*> creators;

 private:
  [[noreturn]] static void Fail(const char* what) {
    std::fprintf(stderr, "plugin library: %s\n", what);
    std::exit(1);
  }

  LineLoggerFinder finder_;
  void* handle_ = nullptr;
};

// Fields with storage of their own.
class FieldList {
 public:
  FieldList() = default;
  FieldList(const FieldList&) = delete;

  template <class T>
  FieldList& Set(const char* name, nv::PluginFieldType type, const std::vector<T>& values) {
    const char* bytes = reinterpret_cast<const char*>(values.data());
    return SetBytes(name, type, std::string(bytes, bytes + values.size() * sizeof(T)),
                    static_cast<int32_t>(values.size()));
  }
  FieldList& Int(const char* name, int32_t value) { return Set<int32_t>(name, nv::PluginFieldType::kINT32, {value}); }
  FieldList& Float(const char* name, float value) { return Set<float>(name, nv::PluginFieldType::kFLOAT32, {value}); }
  FieldList& Text(const char* name, const std::string& value) {  // as the ONNX parser passes it
    return SetBytes(name, nv::PluginFieldType::kCHAR, value + '\0', static_cast<int32_t>(value.size()) + 1);
  }
  FieldList& SetBytes(const char* name, nv::PluginFieldType type, const std::string& bytes, int32_t length) {
    Remove(name);
    storage_.push_back({name, bytes});
    fields_.emplace_back(storage_.back().name.c_str(), storage_.back().bytes.data(), type, length);
    return *this;
  }
  FieldList& Remove(const char* name) {
    for (size_t i = 0; i < fields_.size(); ++i) {
      if (std::strcmp(fields_[i].name, name) == 0) fields_.erase(fields_.begin() + static_cast<std::ptrdiff_t>(i--));
    }
    return *this;
  }
  const nv::PluginFieldCollection* Collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  struct Field {
    std::string name, bytes;
  };
  std::deque<Field> storage_;  // which does not move
  std::vector<nv::PluginField> fields_;
  nv::PluginFieldCollection collection_{};
};

using PluginPointer = std::unique_ptr<nv::IPluginV3>;

inline nv::IPluginV3OneCore* Core(const PluginPointer& plugin) {
  return static_cast<nv::IPluginV3OneCore*>(plugin->getCapabilityInterface(nv::PluginCapabilityType::kCORE));
}
inline nv::IPluginV3OneBuildV2* Build(const PluginPointer& plugin) {
  return static_cast<nv::IPluginV3OneBuildV2*>(plugin->getCapabilityInterface(nv::PluginCapabilityType::kBUILD));
}
inline nv::IPluginV3OneRuntime* Runtime(const PluginPointer& plugin) {
  return static_cast<nv::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(nv::PluginCapabilityType::kRUNTIME));
}

// What an engine file keeps of the fields that a plugin serialises: copies without a relation to the plugin.
class StoredFields {
 public:
  explicit StoredFields(const nv::PluginFieldCollection* fields) {
    for (int32_t i = 0; i < fields->nbFields; ++i) {
      const nv::PluginField& field = fields->fields[i];
      const size_t item = field.type == nv::PluginFieldType::kCHAR ? 1 : 4;
      list_.SetBytes(field.name, field.type,
                     std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length) * item),
                     field.length);
    }
  }
  const nv::PluginFieldCollection* Collection() { return list_.Collection(); }

 private:
  FieldList list_;
};

// --- Symbolic dimensions --------------------------------------------------------------------------------------------

class Dimension : public nv::IDimensionExpr {
 public:
  // A constant, or with -1 one that is known only at run time.
  explicit Dimension(int64_t value) : implementation_(value) { mImpl = &implementation_; }
  ~Dimension() noexcept override = default;

 private:
  class Implementation : public nv::apiv::VDimensionExpr {
   public:
    explicit Implementation(int64_t value) : value_(value) {}
    bool isConstant() const override { return value_ >= 0; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

   private:
    int64_t value_;
  };
  Implementation implementation_;
};

class DimensionBuilder : public nv::IExprBuilder {
 public:
  DimensionBuilder() : implementation_(this) { mImpl = &implementation_; }
  ~DimensionBuilder() noexcept override = default;

  const Dimension* Make(int64_t value) {
    made_.push_back(std::make_unique<Dimension>(value));
    return made_.back().get();
  }

 private:
  class Implementation : public nv::apiv::VExprBuilder {
   public:
    explicit Implementation(DimensionBuilder* builder) : builder_(builder) {}
    const nv::IDimensionExpr* constant(int64_t value) override { return builder_->Make(value); }
    const nv::IDimensionExpr* operation(nv::DimensionOperation, const nv::IDimensionExpr&,
                                        const nv::IDimensionExpr&) override {
      return builder_->Make(-1);
    }
    const nv::IDimensionExpr* declareSizeTensor(int32_t, const nv::IDimensionExpr&,
                                                const nv::IDimensionExpr&) override {
      return builder_->Make(-1);
    }

   private:
    DimensionBuilder* builder_;
  };
  Implementation implementation_;
  std::vector<std::unique_ptr<Dimension>> made_;
};

}  // namespace trimkv::test
