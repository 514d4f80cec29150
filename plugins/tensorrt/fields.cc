#include "fields.h"

#include <cstring>
#include <limits>

#include "trimkv/types.h"

namespace trimkv::trt {
namespace {

const nv::PluginFieldCollection& Present(const nv::PluginFieldCollection* fields) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    throw Error("there are no fields");
  }
  return *fields;
}

const char* TypeName(nv::PluginFieldType type) {
  switch (type) {
    case nv::PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case nv::PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case nv::PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case nv::PluginFieldType::kINT8:
      return "INT8";
    case nv::PluginFieldType::kINT16:
      return "INT16";
    case nv::PluginFieldType::kINT32:
      return "INT32";
    case nv::PluginFieldType::kINT64:
      return "INT64";
    case nv::PluginFieldType::kCHAR:
      return "CHAR";
    default:
      return "another";
  }
}

[[noreturn]] void WrongType(const nv::PluginField& field, const char* expected) {
  throw Error(std::string("field ") + field.name + " has type " + TypeName(field.type) + ", expected " + expected);
}

void ExpectOne(const nv::PluginField& field) {
  if (field.length == 1) return;
  throw Error(std::string("field ") + field.name + " has " + std::to_string(field.length) + " values, expected 1");
}

// The data may have any alignment.
template <class T>
T Value(const nv::PluginField& field) {
  T value;
  std::memcpy(&value, field.data, sizeof value);
  return value;
}

}  // namespace

void ExpectAtLeast(const char* name, int32_t least, int32_t value) {
  if (value >= least) return;
  throw Error(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

void ExpectNumLayers(int32_t value) {
  if (value >= 1 && value <= kMaxLayers) return;
  throw Error("num_layers must be 1 to " + std::to_string(kMaxLayers) + ", got " + std::to_string(value));
}

FieldReader::FieldReader(const nv::PluginFieldCollection* fields) : fields_(Present(fields)) {}

const nv::PluginField* FieldReader::Find(const char* name) const {
  for (int32_t i = 0; i < fields_.nbFields; ++i) {
    const nv::PluginField& field = fields_.fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (field.data == nullptr) throw Error(std::string("field ") + name + " has no data");
    return &field;
  }
  return nullptr;
}

const nv::PluginField& FieldReader::Get(const char* name) const {
  if (const nv::PluginField* field = Find(name)) return *field;
  throw Error(std::string("field ") + name + " is missing");
}

int32_t FieldReader::ReadInt(const nv::PluginField& field) const {
  int64_t value = 0;
  if (field.type == nv::PluginFieldType::kINT32) {
    ExpectOne(field);
    value = Value<int32_t>(field);
  } else if (field.type == nv::PluginFieldType::kINT64) {
    ExpectOne(field);
    value = Value<int64_t>(field);
  } else {
    WrongType(field, "INT32");
  }
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    throw Error(std::string("field ") + field.name + " is " + std::to_string(value) + ", which INT32 does not hold");
  }
  return static_cast<int32_t>(value);
}

int32_t FieldReader::Int(const char* name) const { return ReadInt(Get(name)); }

int32_t FieldReader::Int(const char* name, int32_t missing) const {
  const nv::PluginField* field = Find(name);
  return field != nullptr ? ReadInt(*field) : missing;
}

float FieldReader::Float(const char* name) const {
  const nv::PluginField& field = Get(name);
  if (field.type != nv::PluginFieldType::kFLOAT32) WrongType(field, "FLOAT32");
  ExpectOne(field);
  return Value<float>(field);
}

std::string FieldReader::Text(const char* name) const {
  const nv::PluginField& field = Get(name);
  if (field.type != nv::PluginFieldType::kCHAR) WrongType(field, "CHAR");
  if (field.length < 1) throw Error(std::string("field ") + name + " is empty");
  const char* text = static_cast<const char*>(field.data);
  return std::string(text, strnlen(text, static_cast<size_t>(field.length)));
}

}  // namespace trimkv::trt
