// Conformance of a plugin library: creators, fields, serialising, cloning, aliases, what enqueue refuses, and that all
// that is wrong is refused with a line in the log. Needs no GPU.
//
//   test_tensorrt_library LIBRARY [emulated]     emulated: the device's memory is the host's
#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>

#include "operators.h"

namespace trimkv::test {
namespace {

// The fields that a plugin serialises, as one comparable text.
std::string Serialised(const PluginPointer& plugin) {
  std::string all;
  const nv::PluginFieldCollection* fields = Runtime(plugin)->getFieldsToSerialize();
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const nv::PluginField& field = fields->fields[i];
    const size_t item = field.type == FieldType::kCHAR ? 1 : 4;
    all += std::string(field.name) + ":" + std::to_string(static_cast<int>(field.type)) + ":" +
           std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length) * item) + ";";
  }
  return all;
}

void Creators(PluginLibrary& library) {
  EXPECT(library.creators.size() == 2, "%zu creators", library.creators.size());
  for (const Operator& op : Operators()) {
    nv::IPluginCreatorV3One* creator = library.Find(op.name, "1", "trimkv");
    EXPECT(creator != nullptr, "%s has no creator", op.name);
    const nv::PluginFieldCollection* names = creator->getFieldNames();
    std::map<std::string, FieldType> fields;
    for (int32_t i = 0; i < names->nbFields; ++i) {
      fields[names->fields[i].name] = names->fields[i].type;
      EXPECT(names->fields[i].data == nullptr, "%s", names->fields[i].name);
    }
    EXPECT(fields == op.fields && static_cast<size_t>(names->nbFields) == fields.size(), "fields of %s", op.name);
    EXPECT(library.Find(op.name, "2", "trimkv") == nullptr && library.Find(op.name, "1", "") == nullptr, "%s", op.name);
    const PluginPointer plugin = Create(library, op, ModelConfig());
    EXPECT(std::string(Core(plugin)->getPluginName()) == op.name, "name");
    EXPECT(std::string(Core(plugin)->getPluginVersion()) == "1", "version");
    EXPECT(std::string(Core(plugin)->getPluginNamespace()) == "trimkv", "namespace");
    EXPECT(std::string(Build(plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_BUILD", "build interface");
    EXPECT(Build(plugin)->getInterfaceInfo().major == 2, "build interface");
    EXPECT(std::string(Runtime(plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_RUNTIME", "runtime interface");
    EXPECT(std::string(Core(plugin)->getInterfaceInfo().kind) == "PLUGIN_V3ONE_CORE", "core interface");
    EXPECT(Build(plugin)->getNbOutputs() == op.outputs, "%s", op.name);
    const char* metadata = Build(plugin)->getMetadataString();
    EXPECT(metadata != nullptr && std::string(metadata).find("num_kv_heads=2") != std::string::npos, "metadata");
  }
}

// Changes fields that are right; the creator must refuse and say why, with the name of the field.
void Refuse(PluginLibrary& library, const Operator& op, const char* about,
            const std::function<void(FieldList&)>& change) {
  for (const auto phase : {kBuildPhase, kRuntimePhase}) {
    FieldList fields;
    op.set_fields(fields, ModelConfig());
    change(fields);
    PluginPointer plugin(library.Find(op.name, "1", "trimkv")->createPlugin("node", fields.Collection(), phase));
    const std::string log = library.logger.Take();
    EXPECT(plugin == nullptr, "%s took wrong fields: %s", op.name, about);
    EXPECT(log.find(std::string(op.name) + ": ") == 0 && log.find(about) != std::string::npos, "%s, log: %s", about,
           log.c_str());
  }
}

void Fields(PluginLibrary& library) {
  for (const Operator& op : Operators()) {
    for (const auto& [name, type] : op.fields) {
      const char* field = name.c_str();
      if (name != "declare_alias") Refuse(library, op, field, [&](FieldList& f) { f.Remove(field); });
      Refuse(library, op, field, [&](FieldList& f) { f.Set<double>(field, FieldType::kFLOAT64, {1.0}); });
      Refuse(library, op, field, [&](FieldList& f) { f.SetBytes(field, FieldType::kUNKNOWN, "abcd", 4); });
      if (type == FieldType::kINT32) {
        Refuse(library, op, field, [&](FieldList& f) { f.Float(field, 1.0f); });
        Refuse(library, op, field, [&](FieldList& f) { f.Set<int32_t>(field, FieldType::kINT32, {1, 2}); });
        Refuse(library, op, field, [&](FieldList& f) { f.Set<int32_t>(field, FieldType::kINT32, {}); });
        Refuse(library, op, field, [&](FieldList& f) { f.Set<int64_t>(field, FieldType::kINT64, {int64_t{1} << 32}); });
        Refuse(library, op, field, [&](FieldList& f) { f.Int(field, -1); });
      }
    }
    PluginPointer none(library.Find(op.name, "1", "trimkv")->createPlugin("node", nullptr, kBuildPhase));
    EXPECT(none == nullptr && library.logger.Take().find("no fields") != std::string::npos, "%s", op.name);
    // INT64 as far as it fits, and names that nobody knows.
    FieldList fields;
    op.set_fields(fields, ModelConfig());
    fields.Set<int64_t>("num_kv_heads", FieldType::kINT64, {2}).Float("unknown", 1.0f);
    PluginPointer wide(library.Find(op.name, "1", "trimkv")->createPlugin(nullptr, fields.Collection(), kBuildPhase));
    EXPECT(wide != nullptr, "%s: %s", op.name, library.logger.Take().c_str());
    if (wide) EXPECT(Serialised(wide) == Serialised(Create(library, op, ModelConfig())), "%s", op.name);
  }
  const std::vector<Operator> ops = Operators();
  const Operator &attention = ops[0], &update = ops[1];
  Refuse(library, attention, "layer", [](FieldList& f) { f.Int("layer", 4); });
  Refuse(library, attention, "num_layers", [](FieldList& f) { f.Int("num_layers", kMaxLayers + 1); });
  Refuse(library, attention, "num_kv_heads", [](FieldList& f) { f.Int("num_kv_heads", 0); });
  Refuse(library, attention, "scale", [](FieldList& f) { f.Float("scale", NAN); });
  Refuse(library, attention, "scale", [](FieldList& f) { f.Set<float>("scale", FieldType::kFLOAT32, {1, 2}); });
  Refuse(library, update, "policy", [](FieldList& f) { f.Text("policy", "threshold"); });
  Refuse(library, update, "policy", [](FieldList& f) { f.Text("policy", ""); });
  Refuse(library, update, "policy", [](FieldList& f) { f.SetBytes("policy", FieldType::kCHAR, "", 0); });
  Refuse(library, update, "policy", [](FieldList& f) { f.Int("policy", 0); });
  Refuse(library, update, "evict_every", [](FieldList& f) { f.Int("evict_every", 0); });
  Refuse(library, update, "lookahead_steps", [](FieldList& f) { f.Int("lookahead_steps", 0); });
  Refuse(library, update, "num_layers", [](FieldList& f) { f.Int("num_layers", 0); });
  Refuse(library, update, "declare_alias", [](FieldList& f) { f.Int("declare_alias", 2); });
  FieldList fields;  // without the terminating zero
  SetUpdateFields(fields, ModelConfig());
  fields.SetBytes("policy", FieldType::kCHAR, "global", 6);
  PluginPointer plugin(library.Find("PoolUpdate", "1", "trimkv")->createPlugin("n", fields.Collection(), kBuildPhase));
  EXPECT(plugin != nullptr, "%s", library.logger.Take().c_str());
}

void CopiesAndEngines(PluginLibrary& library) {
  Config config = ModelConfig();
  for (const Policy policy : {Policy::kGlobal, Policy::kPerHead}) {
    config.policy = policy;
    for (const Operator& op : Operators()) {
      PluginPointer original = Create(library, op, config);
      const std::string text = Serialised(original);
      StoredFields stored(Runtime(original)->getFieldsToSerialize());
      PluginPointer copy(original->clone());
      PluginPointer attached(Runtime(original)->attachToContext(nullptr));
      EXPECT(copy != nullptr && attached != nullptr && copy != original && attached != original, "%s", op.name);
      original.reset();
      PluginPointer again(copy->clone());
      PluginPointer loaded(
          library.Find(op.name, "1", "trimkv")->createPlugin("node", stored.Collection(), kRuntimePhase));
      EXPECT(loaded != nullptr, "%s: %s", op.name, library.logger.Take().c_str());
      PluginPointer running(Runtime(loaded)->attachToContext(nullptr));
      for (const PluginPointer* plugin : {&copy, &attached, &again, &loaded, &running}) {
        EXPECT(Serialised(*plugin) == text, "%s", op.name);
        EXPECT(Serialised(*plugin) == text, "%s, the second time", op.name);
        EXPECT(Build(*plugin)->getNbOutputs() == op.outputs, "%s", op.name);
      }
    }
  }
}

void Aliases(PluginLibrary& library) {
  const Config config = ModelConfig();
  for (const int32_t declared : {0, 1}) {
    FieldList fields;
    SetUpdateFields(fields, config);
    fields.Int("declare_alias", declared);
    PluginPointer plugin(
        library.Find("PoolUpdate", "1", "trimkv")->createPlugin("node", fields.Collection(), kBuildPhase));
    PluginPointer copy(plugin->clone());
    for (int32_t output = 0; output < 10; ++output) {
      EXPECT(Build(copy)->getAliasedInput(output) == (declared ? output : -1), "output %d", output);
    }
    EXPECT(Build(copy)->getAliasedInput(10) == -1 && Build(copy)->getAliasedInput(-1) == -1, "no such output");
  }
  const PluginPointer attention = Create(library, Operators()[0], config);
  EXPECT(Build(attention)->getAliasedInput(0) == -1, "PoolAttention");
}

// A call with memory of its own for every tensor.
class Memory {
 public:
  explicit Memory(const std::vector<nv::PluginTensorDesc>& tensors) {
    for (const nv::PluginTensorDesc& tensor : tensors) {
      size_t bytes = tensor.type == nv::DataType::kHALF ? 2 : 4;
      for (int32_t i = 0; i < tensor.dims.nbDims; ++i) bytes *= static_cast<size_t>(tensor.dims.d[i]);
      memory_.emplace_back(bytes, uint8_t{0x5a});
      pointers.push_back(memory_.back().data());
    }
  }
  bool All(uint8_t value) const {
    return std::all_of(memory_.begin(), memory_.end(), [=](const Bytes& bytes) {
      return std::all_of(bytes.begin(), bytes.end(), [=](uint8_t byte) { return byte == value; });
    });
  }

  std::vector<void*> pointers;

 private:
  std::deque<Bytes> memory_;
};

// What must be refused before any kernel is launched; nothing here reads the memory.
void Enqueues(PluginLibrary& library, bool emulated) {
  const Config config = ModelConfig();
  for (const Operator& op : Operators()) {
    const auto descriptions = Describe(op.specs(config, 2), DataType::kFloat16);
    const std::vector<nv::PluginTensorDesc> results(descriptions.begin(), descriptions.begin() + op.outputs);
    Memory in(descriptions), out(results);
    std::vector<void*> same =
        op.outputs == 1 ? out.pointers : std::vector<void*>(in.pointers.begin(), in.pointers.begin() + 10);
    const auto enqueue = [&](const PluginPointer& plugin, const std::vector<nv::PluginTensorDesc>& tensors,
                             const std::vector<void*>& inputs, const std::vector<void*>& outputs, void* workspace) {
      return Runtime(plugin)->enqueue(tensors.data(), results.data(), inputs.data(), outputs.data(), workspace,
                                      nullptr);
    };
    const PluginPointer running = Create(library, op, config, kRuntimePhase);
    const auto refused = [&](const char* about, int32_t code) {
      const std::string log = library.logger.Take();
      EXPECT(code != 0 && log.find(about) != std::string::npos, "%s: %s", about, log.c_str());
    };
    if (op.outputs == 10) {
      for (size_t i = 0; i < 10; ++i) {  // one tensor is not in place
        std::vector<void*> outputs = same;
        outputs[i] = out.pointers[i];
        refused(("past." + StateSpecs(config)[i].name + " is bound").c_str(),
                enqueue(running, descriptions, in.pointers, outputs, in.pointers[0]));
      }
    }
    refused("workspace", enqueue(running, descriptions, in.pointers, same, nullptr));
    for (size_t i = 0; i < descriptions.size(); ++i) {
      std::vector<nv::PluginTensorDesc> tensors = descriptions;
      tensors[i].type = nv::DataType::kINT8;
      refused("data type", enqueue(running, tensors, in.pointers, same, in.pointers[0]));
      tensors = descriptions;
      tensors[i].format = nv::TensorFormat::kCHW32;
      refused("linear", enqueue(running, tensors, in.pointers, same, in.pointers[0]));
      tensors = descriptions;
      ++tensors[i].dims.d[0];
      refused("shape", enqueue(running, tensors, in.pointers, same, in.pointers[0]));
      std::vector<void*> inputs = in.pointers, outputs = same;
      inputs[i] = nullptr;
      refused("no memory", enqueue(running, descriptions, inputs, outputs, in.pointers[0]));
    }
    EXPECT(in.All(0x5a) && out.All(0x5a), "%s: a refused call wrote", op.name);
    if (!emulated) continue;
    // The builder's timing: garbage in, zeros out, the inputs untouched.
    const PluginPointer building = Create(library, op, config);
    const PluginPointer timed(Runtime(building)->attachToContext(nullptr));
    EXPECT(enqueue(timed, descriptions, in.pointers, out.pointers, nullptr) == 0, "%s", library.logger.Take().c_str());
    EXPECT(in.All(0x5a) && out.All(0), "%s: timing", op.name);
    if (op.outputs == 10) {
      EXPECT(enqueue(timed, descriptions, in.pointers, same, nullptr) == 0, "in place");
      EXPECT(in.All(0x5a), "timing in place");
    }
  }
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  if (argc < 2) return std::fprintf(stderr, "usage: test_tensorrt_library LIBRARY [emulated]\n"), 2;
  PluginLibrary library(argv[1]);
  Creators(library);
  Fields(library);
  CopiesAndEngines(library);
  Aliases(library);
  Enqueues(library, argc > 2);
  EXPECT(library.logger.errors.empty(), "left in the log: %s", library.logger.Take().c_str());
  std::printf("TensorRT %d.%d, plugin library: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, g_checks,
              g_failed);
  return g_failed != 0;
}
