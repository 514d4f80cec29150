// Does for nodes of an ONNX graph what TensorRT's ONNX parser does with a plugin: looks for the creator, takes those
// attributes that it names, creates a plugin and asks for its outputs. For tests in other languages.
//
//   trimkv_plugin_probe LIBRARY < NODES
//
// A line for each node, separated by tabs:  operator  namespace  version  inputs  outputs  attribute...
// where an attribute is name=i:3, name=f:0.5 or name=s:text, and `inputs` and `outputs` are their numbers. Prints a
// line for each node, `ok` or what is wrong, and exits with 1 if anything was.
#include <iostream>
#include <sstream>

#include "host.h"

namespace trimkv::test {
namespace {

std::vector<std::string> Split(const std::string& line) {
  std::vector<std::string> parts;
  std::istringstream stream(line);
  for (std::string part; std::getline(stream, part, '\t');) parts.push_back(part);
  return parts;
}

std::string Check(PluginLibrary& library, const std::string& line) {
  const std::vector<std::string> parts = Split(line);
  if (parts.size() < 5) return "the line has too few parts";
  nv::IPluginCreatorV3One* creator = library.Find(parts[0], parts[2], parts[1]);
  if (creator == nullptr) return "no creator " + parts[0] + ", version " + parts[2] + ", namespace " + parts[1];
  const nv::PluginFieldCollection* names = creator->getFieldNames();
  FieldList fields;
  for (size_t i = 5; i < parts.size(); ++i) {
    const size_t equals = parts[i].find('='), colon = parts[i].find(':', equals);
    if (equals == std::string::npos || colon != equals + 2) return "cannot read " + parts[i];
    const std::string name = parts[i].substr(0, equals), value = parts[i].substr(colon + 1);
    const char type = parts[i][equals + 1];
    bool known = false;
    for (int32_t f = 0; f < names->nbFields; ++f) known = known || name == names->fields[f].name;
    if (!known) return "the creator has no field for attribute " + name;
    if (type == 'i') {
      fields.Int(name.c_str(), std::stoi(value));
    } else if (type == 'f') {
      fields.Float(name.c_str(), std::stof(value));
    } else if (type == 's') {
      fields.Text(name.c_str(), value);
    } else {
      return "cannot read " + parts[i];
    }
  }
  PluginPointer plugin(creator->createPlugin("node", fields.Collection(), nv::TensorRTPhase::kBUILD));
  if (plugin == nullptr) return library.logger.Take();
  const int32_t inputs = std::stoi(parts[3]), outputs = std::stoi(parts[4]);
  const std::vector<nv::DataType> in(static_cast<size_t>(inputs), nv::DataType::kHALF);
  std::vector<nv::DataType> out(static_cast<size_t>(outputs));
  if (Build(plugin)->getOutputDataTypes(out.data(), outputs, in.data(), inputs) != 0) return library.logger.Take();
  return "ok";
}

}  // namespace
}  // namespace trimkv::test

int main(int argc, char** argv) {
  using namespace trimkv::test;
  if (argc != 2) return std::cerr << "usage: trimkv_plugin_probe LIBRARY < NODES\n", 2;
  PluginLibrary library(argv[1]);
  bool good = true;
  for (std::string line; std::getline(std::cin, line);) {
    std::string result = Check(library, line);
    while (!result.empty() && result.back() == '\n') result.pop_back();
    good = good && result == "ok";
    std::cout << result << "\n";
  }
  return good ? 0 : 1;
}
