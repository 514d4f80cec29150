#include "logging.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "libnvinfer.h"

namespace trimkv::trt {
namespace {

std::atomic<nv::ILoggerFinder*> g_finder{nullptr};

nv::ILogger* FindLogger() {
  if (nv::ILoggerFinder* finder = g_finder) {
    if (nv::ILogger* logger = finder->findLogger()) return logger;
  }
  using GetLogger = nv::ILogger*();
  GetLogger* get = reinterpret_cast<GetLogger*>(FindInLibnvinfer("getLogger"));
  return get != nullptr ? get() : nullptr;
}

}  // namespace

void SetLoggerFinder(nv::ILoggerFinder* finder) noexcept {
  // TensorRT 11 gave the logger and its finder other virtual tables: a call through the wrong one would crash.
  const int loaded = LoadedMajor();
  if (loaded != 0 && loaded != NV_TENSORRT_MAJOR) {
    std::fprintf(
        stderr,
        "trimkv: this plugin library was compiled for TensorRT %d and loaded by TensorRT %d; it logs to stderr\n",
        NV_TENSORRT_MAJOR, loaded);
    return;
  }
  g_finder = finder;
}

void Log(nv::ILogger::Severity severity, const char* who, const char* message) noexcept {
  try {
    const std::string line = std::string(who) + ": " + message;
    if (nv::ILogger* logger = FindLogger()) {
      logger->log(severity, line.c_str());
    } else if (severity <= nv::ILogger::Severity::kWARNING) {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {
    std::fprintf(stderr, "%s: %s\n", who, message);
  }
}

}  // namespace trimkv::trt
