// TensorRT's own library, found in this process without linking to it: the plugins need none of its symbols to work.
#pragma once

namespace trimkv::trt {

// Major version of the TensorRT in this process, that which these sources were compiled for before any other; 0 if none
// is loaded.
int LoadedMajor() noexcept;

// A C function of the loaded TensorRT; null unless it has the major version that these sources were compiled for.
void* FindInLibnvinfer(const char* symbol) noexcept;

}  // namespace trimkv::trt
