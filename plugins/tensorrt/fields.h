// Plugin fields: what TensorRT's ONNX parser makes of a node's attributes, and what an engine stores.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "logging.h"

namespace trimkv::trt {

// Reads a collection by name. Everything wrong with it is an Error that names the field. Fields that nobody asks for
// do not matter.
class FieldReader {
 public:
  explicit FieldReader(const nv::PluginFieldCollection* fields);

  int32_t Int(const char* name) const;  // stored as INT32, or as INT64 where it fits
  int32_t Int(const char* name, int32_t missing) const;
  float Float(const char* name) const;
  std::string Text(const char* name) const;  // CHAR, with or without a terminating zero

 private:
  const nv::PluginField* Find(const char* name) const;
  const nv::PluginField& Get(const char* name) const;
  int32_t ReadInt(const nv::PluginField& field) const;

  const nv::PluginFieldCollection& fields_;
};

// Throw an Error unless a field's value can be used.
void ExpectAtLeast(const char* name, int32_t least, int32_t value);
void ExpectNumLayers(int32_t value);

// Collects fields; what is given is not copied and must outlive the collection.
class FieldWriter {
 public:
  void Add(const char* name, const int32_t& value) { Add(name, &value, nv::PluginFieldType::kINT32, 1); }
  void Add(const char* name, const float& value) { Add(name, &value, nv::PluginFieldType::kFLOAT32, 1); }
  void Add(const char* name, const std::string& value) {
    Add(name, value.c_str(), nv::PluginFieldType::kCHAR, static_cast<int32_t>(value.size()) + 1);
  }
  void Declare(const char* name, nv::PluginFieldType type) { Add(name, nullptr, type, 1); }
  void Clear() {
    fields_.clear();
    collection_ = {};
  }

  const nv::PluginFieldCollection* Collection() const { return &collection_; }

 private:
  void Add(const char* name, const void* data, nv::PluginFieldType type, int32_t length) {
    fields_.emplace_back(name, data, type, length);
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  std::vector<nv::PluginField> fields_;
  nv::PluginFieldCollection collection_{};
};

}  // namespace trimkv::trt
