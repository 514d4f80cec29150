// Conformance of a plugin library, all but enqueue's results: creators, fields, shapes, formats, serialising, cloning,
// aliases, workspaces, and that whatever is wrong is refused with a line in the log. Needs no GPU.
//
//   test_tensorrt_library LIBRARY
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>

#include "expect.h"
#include "pool_attention.h"
#include "pool_update.h"
#include "signatures.h"

namespace trimkv::test {
namespace {

using FieldType = nv::PluginFieldType;
constexpr auto kBuildPhase = nv::TensorRTPhase::kBUILD;
constexpr auto kRuntimePhase = nv::TensorRTPhase::kRUNTIME;

// Everything that the tests need of one operator.
struct Operator {
  const char* name;
  int32_t outputs;
  std::vector<TensorSpec> (*specs)(const Config&, int64_t steps);
  int32_t (*like)(int32_t output);  // the input that an output is like
  void (*set_fields)(FieldList&, const Config&);
  std::map<std::string, FieldType> fields;
};

std::vector<Operator> Operators() {
  return {{"PoolAttention",
           1,
           AttentionSpecs,
           [](int32_t) { return 0; },
           [](FieldList& fields, const Config& config) { SetAttentionFields(fields, config, 1); },
           {{"layer", FieldType::kINT32},
            {"num_layers", FieldType::kINT32},
            {"num_kv_heads", FieldType::kINT32},
            {"scale", FieldType::kFLOAT32}}},
          {"PoolUpdate",
           10,
           UpdateSpecs,
           [](int32_t output) { return output; },
           SetUpdateFields,
           {{"num_layers", FieldType::kINT32},
            {"num_kv_heads", FieldType::kINT32},
            {"evict_every", FieldType::kINT32},
            {"policy", FieldType::kCHAR},
            {"min_tokens_per_head", FieldType::kINT32},
            {"lookahead_steps", FieldType::kINT32},
            {"declare_alias", FieldType::kINT32}}}};
}

Config ModelConfig() {
  Config config;
  config.shape = {3, 4, 2, 64, 8 * 16, 5};
  config.group = 4;
  config.min_tokens_per_head = 2;
  config.lookahead_steps = 3;
  return config;
}

PluginPointer Create(PluginLibrary& library, const Operator& op, const Config& config,
                     nv::TensorRTPhase phase = kBuildPhase) {
  FieldList fields;
  op.set_fields(fields, config);
  PluginPointer plugin(library.Find(op.name, "1", "trimkv")->createPlugin("node", fields.Collection(), phase));
  EXPECT(plugin != nullptr, "%s: %s", op.name, library.logger.Take().c_str());
  return plugin;
}

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

void TypesAndShapes(PluginLibrary& library) {
  const Config config = ModelConfig();
  for (const Operator& op : Operators()) {
    const PluginPointer plugin = Create(library, op, config);
    const std::vector<TensorSpec> specs = op.specs(config, 7);
    const int32_t inputs = static_cast<int32_t>(specs.size());
    for (const DataType storage : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      std::vector<nv::DataType> in, out(static_cast<size_t>(op.outputs), nv::DataType::kBOOL);
      for (const TensorSpec& spec : specs) in.push_back(ToTensorRt(spec.element, storage));
      EXPECT(Build(plugin)->getOutputDataTypes(out.data(), op.outputs, in.data(), inputs) == 0, "%s", op.name);
      for (int32_t i = 0; i < op.outputs; ++i) EXPECT(out[i] == in[op.like(i)], "%s, output %d", op.name, i);
    }
    DimensionBuilder builder;
    std::vector<nv::DimsExprs> in(specs.size()), out(static_cast<size_t>(op.outputs));
    for (size_t i = 0; i < specs.size(); ++i) {
      in[i].nbDims = static_cast<int32_t>(specs[i].dims.size());
      for (size_t axis = 0; axis < specs[i].dims.size(); ++axis) {
        in[i].d[axis] = builder.Make(axis == 0 ? -1 : specs[i].dims[axis]);  // the batch is dynamic
      }
    }
    const auto shapes = [&](int32_t given) {
      return Build(plugin)->getOutputShapes(in.data(), given, nullptr, 0, out.data(), op.outputs, builder);
    };
    EXPECT(shapes(inputs) == 0, "%s: %s", op.name, library.logger.Take().c_str());
    for (int32_t i = 0; i < op.outputs; ++i) {
      EXPECT(out[i].nbDims == in[op.like(i)].nbDims, "%s, output %d", op.name, i);
      for (int32_t axis = 0; axis < out[i].nbDims; ++axis) {
        EXPECT(out[i].d[axis] == in[op.like(i)].d[axis], "%s, output %d, axis %d", op.name, i, axis);
      }
    }
    EXPECT(shapes(inputs - 1) != 0 && library.logger.Take().find("inputs") != std::string::npos, "%s", op.name);
    for (int32_t i = 0; i < inputs; ++i) {
      ++in[i].nbDims;
      EXPECT(shapes(inputs) != 0, "%s takes input %d with another rank", op.name, i);
      EXPECT(library.logger.Take().find(specs[i].name) != std::string::npos, "%s", specs[i].name.c_str());
      --in[i].nbDims;
    }
    EXPECT(Build(plugin)->getOutputShapes(in.data(), inputs, in.data(), 1, out.data(), op.outputs, builder) != 0,
           "%s takes shape inputs", op.name);
    library.logger.Take();
  }
}

// All types and layouts at every position, the positions before it being right: as TensorRT asks.
void Formats(PluginLibrary& library) {
  const Config config = ModelConfig();
  const int32_t types = nv::EnumMax<nv::DataType>(), formats = nv::EnumMax<nv::TensorFormat>();
  int accepted = 0, asked = 0;
  for (const Operator& op : Operators()) {
    const PluginPointer plugin = Create(library, op, config);
    std::vector<TensorSpec> specs = op.specs(config, 7);
    const int32_t inputs = static_cast<int32_t>(specs.size());
    for (int32_t i = 0; i < op.outputs; ++i) specs.push_back(specs[static_cast<size_t>(op.like(i))]);
    for (const DataType storage : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
      const std::vector<nv::DynamicPluginTensorDesc> right = DescribeRange(specs, specs, storage);
      for (int32_t position = 0; position < static_cast<int32_t>(specs.size()); ++position) {
        std::vector<nv::DynamicPluginTensorDesc> tensors = right;
        for (size_t i = static_cast<size_t>(position) + 1; i < tensors.size(); ++i) {
          tensors[i] = {};  // not decided yet
          tensors[i].desc.type = nv::DataType::kINT8;
          tensors[i].desc.format = nv::TensorFormat::kCHW32;
        }
        for (int32_t type = 0; type < types; ++type) {
          for (int32_t format = 0; format < formats; ++format) {
            nv::PluginTensorDesc& tensor = tensors[static_cast<size_t>(position)].desc;
            tensor.type = static_cast<nv::DataType>(type);
            tensor.format = static_cast<nv::TensorFormat>(format);
            const char element = specs[static_cast<size_t>(position)].element;
            const bool any =
                position == 0 && (tensor.type == nv::DataType::kFLOAT || tensor.type == nv::DataType::kHALF ||
                                  tensor.type == nv::DataType::kBF16);
            const bool expected =
                tensor.format == nv::TensorFormat::kLINEAR && (any || tensor.type == ToTensorRt(element, storage));
            const bool actual = Build(plugin)->supportsFormatCombination(position, tensors.data(), inputs, op.outputs);
            EXPECT(actual == expected, "%s, position %d, type %d, format %d: %d", op.name, position, type, format,
                   actual);
            accepted += actual;
            ++asked;
          }
        }
      }
      EXPECT(!Build(plugin)->supportsFormatCombination(-1, right.data(), inputs, op.outputs), "%s", op.name);
      EXPECT(!Build(plugin)->supportsFormatCombination(inputs + op.outputs, right.data(), inputs, op.outputs), "%s",
             op.name);
    }
    EXPECT(Build(plugin)->getFormatCombinationLimit() >= 3, "%s", op.name);
    EXPECT(library.logger.errors.empty(), "%s", library.logger.Take().c_str());
  }
  std::printf("format combinations: %d asked, %d accepted\n", asked, accepted);
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

// Profiles of prefill and decode: what is declared must be enough for every shape within, and no more than the most
// that any of them needs and alignment.
void Workspaces(PluginLibrary& library) {
  for (const Operator& op : Operators()) {
    for (const auto& [least_batch, most_batch, least_steps, most_steps] :
         {std::array{1, 5, 1, 1}, {3, 3, 1, 40}, {1, 3, 9, 64}, {2, 9, 1, 3}, {1, 1700, 1, 2}}) {
      for (const DataType storage : {DataType::kFloat32, DataType::kFloat16, DataType::kBFloat16}) {
        Config least = ModelConfig(), most = least;
        least.shape.batch = least_batch;
        most.shape.batch = most_batch;
        PluginPointer plugin = Create(library, op, most);
        const auto inputs = DescribeRange(op.specs(least, least_steps), op.specs(most, most_steps), storage);
        std::vector<nv::DynamicPluginTensorDesc> outputs;
        for (int32_t i = 0; i < op.outputs; ++i) outputs.push_back(inputs[static_cast<size_t>(op.like(i))]);
        const int32_t count = static_cast<int32_t>(inputs.size());
        EXPECT(Build(plugin)->configurePlugin(inputs.data(), count, outputs.data(), op.outputs) == 0, "%s: %s", op.name,
               library.logger.Take().c_str());
        const size_t declared = Build(plugin)->getWorkspaceSize(inputs.data(), count, outputs.data(), op.outputs);
        size_t needed = 0;
        for (int32_t batch = least_batch; batch <= most_batch; ++batch) {
          for (int32_t steps = least_steps; steps <= most_steps; ++steps) {
            PoolAttentionArgs attention{};
            attention.shape = most.shape;
            attention.shape.batch = batch;
            attention.type = storage;
            attention.group = most.group;
            attention.steps = steps;
            PoolUpdateArgs update{};
            update.shape = attention.shape;
            update.type = storage;
            update.steps = steps;
            needed = std::max(needed, op.outputs == 1 ? cuda::PoolAttentionWorkspaceBytes(attention)
                                                      : cuda::PoolUpdateWorkspaceBytes(update));
          }
        }
        EXPECT(declared == (needed ? needed + 255 : 0), "%s, batch %d to %d, %d to %d tokens: %zu declared, %zu needed",
               op.name, least_batch, most_batch, least_steps, most_steps, declared, needed);
      }
    }
  }
}

// One dimension at a time is wrong, in the profile and at run time.
void WrongShapes(PluginLibrary& library) {
  const Config config = ModelConfig();
  int tried = 0;
  for (const Operator& op : Operators()) {
    const PluginPointer plugin = Create(library, op, config);
    const std::vector<TensorSpec> right = op.specs(config, 6);
    const int32_t inputs = static_cast<int32_t>(right.size());
    const auto accepted = [&](const std::vector<TensorSpec>& specs) {
      const auto range = DescribeRange(specs, specs, DataType::kFloat16);
      const auto now = Describe(specs, DataType::kFloat16);
      const std::vector<nv::DynamicPluginTensorDesc> out_range(range.begin(), range.begin() + op.outputs);
      const std::vector<nv::PluginTensorDesc> out(now.begin(), now.begin() + op.outputs);
      const bool profile = Build(plugin)->configurePlugin(range.data(), inputs, out_range.data(), op.outputs) == 0;
      const bool running = Runtime(plugin)->onShapeChange(now.data(), inputs, out.data(), op.outputs) == 0;
      EXPECT(profile == running, "%s", op.name);
      return profile;
    };
    EXPECT(accepted(right), "%s: %s", op.name, library.logger.Take().c_str());
    for (size_t i = 0; i < right.size(); ++i) {
      for (size_t axis = 0; axis < right[i].dims.size(); ++axis) {
        for (const int64_t wrong : {right[i].dims[axis] + 1, int64_t{0}, int64_t{1} << 40}) {
          // What one tensor alone decides has no wrong value but those that no kernel takes.
          const bool alone = op.outputs == 1 ? i == 0 && axis == 2 : right[i].name == "attended" && axis == 2;
          if (alone && wrong != 0 && wrong < 100) continue;
          std::vector<TensorSpec> specs = right;
          specs[i].dims[axis] = wrong;
          EXPECT(!accepted(specs), "%s takes %s with axis %zu = %lld", op.name, right[i].name.c_str(), axis,
                 static_cast<long long>(wrong));
          EXPECT(!library.logger.Take().empty(), "%s says nothing", op.name);
          ++tried;
        }
      }
    }
    // The profile of a network whose shapes are still unknown is not judged.
    std::vector<TensorSpec> unknown = right;
    unknown[0].dims[0] = -1;
    EXPECT(accepted(unknown), "%s", library.logger.Take().c_str());
  }
  std::printf("wrong shapes: %d tried\n", tried);
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
  const bool emulated = argc > 2;  // memory of the device is the host's
  PluginLibrary library(argv[1]);
  Creators(library);
  Fields(library);
  TypesAndShapes(library);
  Formats(library);
  CopiesAndEngines(library);
  Aliases(library);
  Workspaces(library);
  WrongShapes(library);
  Enqueues(library, emulated);
  EXPECT(library.logger.errors.empty(), "left in the log: %s", library.logger.Take().c_str());
  std::printf("TensorRT %d.%d, plugin library: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, g_checks,
              g_failed);
  return g_failed != 0;
}
