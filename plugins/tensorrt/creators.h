// The creators of both plugins, for whoever registers them.
#pragma once

#include "logging.h"

namespace trimkv::trt {

// `count` creators that live as long as the library.
nv::IPluginCreatorInterface* const* Creators(int32_t& count) noexcept;

}  // namespace trimkv::trt
