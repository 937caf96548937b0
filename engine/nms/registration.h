// How a plugin finds the registry of the TensorRT that the process has loaded already, whoever loaded it:
// libraries are linked to none, so that the kernel can be used, and tested, without TensorRT.
#pragma once

#include <NvInfer.h>
#include <dlfcn.h>

namespace onset {

#define ONSET_TEXT_OF(x) #x
#define ONSET_TEXT(x) ONSET_TEXT_OF(x)

// The registry; null where no TensorRT of the version that this was compiled for is loaded.
inline nvinfer1::IPluginRegistry* registry() {
    void* const library = dlopen("libnvinfer.so." ONSET_TEXT(NV_TENSORRT_MAJOR), RTLD_NOW | RTLD_NOLOAD);
    if (!library) return nullptr;
    using Function = nvinfer1::IPluginRegistry* (*)();
    auto const function = reinterpret_cast<Function>(dlsym(library, "getPluginRegistry"));
    return function ? function() : nullptr;
}

}  // namespace onset

// Makes `OnsetNMS` known to TensorRT: 0; 1 where none is loaded; 2 where it refuses, knowing one already.
extern "C" int onset_nms_register();
