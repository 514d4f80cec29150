// Conformance of a plugin library's tensors: types, shapes through the host's own expressions, every combination of
// formats, wrong shapes, and workspaces. Needs no GPU.
//
//   test_tensorrt_tensors LIBRARY
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

#include "operators.h"
#include "pool_attention.h"
#include "pool_update.h"

namespace trimkv::test {
namespace {

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

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  if (argc != 2) return std::fprintf(stderr, "usage: test_tensorrt_tensors LIBRARY\n"), 2;
  PluginLibrary library(argv[1]);
  TypesAndShapes(library);
  Formats(library);
  Workspaces(library);
  WrongShapes(library);
  EXPECT(library.logger.errors.empty(), "left in the log: %s", library.logger.Take().c_str());
  std::printf("TensorRT %d.%d, tensors: %d checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, g_checks,
              g_failed);
  return g_failed != 0;
}
