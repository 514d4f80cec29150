// Errors as exceptions inside the plugins, and as a line in TensorRT's log and a return code at the border.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <stdexcept>

namespace trimkv::trt {

namespace nv = nvinfer1;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where to ask for the logger from now on; what TensorRT tells a library that it loads.
void SetLoggerFinder(nv::ILoggerFinder* finder) noexcept;

// A line in the log of TensorRT: of the finder, else the one that libnvinfer has; without either on stderr. `who` is
// the plugin.
void Log(nv::ILogger::Severity severity, const char* who, const char* message) noexcept;

// The value of `body`; an exception is logged and becomes `failed`.
template <class Result, class Body>
Result Guarded(const char* who, Result failed, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    Log(nv::ILogger::Severity::kERROR, who, error.what());
  } catch (...) {
    Log(nv::ILogger::Severity::kERROR, who, "unknown exception");
  }
  return failed;
}

}  // namespace trimkv::trt
