// How a plugin finds the registry of the TensorRT that the process has loaded already, whoever loaded it, and
// enters it: libraries are linked to none, so that the kernel can be used, and tested, without TensorRT.
#pragma once

#include <NvInfer.h>
#include <dlfcn.h>

#include "plugin_fields.h"

// Makes `OnsetNMS` known to TensorRT: 0, also when it was before; 1 where no TensorRT of the version that this
// was compiled for is loaded; 2 where TensorRT refuses, or knows an OnsetNMS of another library.
// Loading the library calls it. Who loads TensorRT later than this library has to call it then.
extern "C" int onset_nms_register();

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

// The OnsetNMS that the registry knows, whosever it is; null where it knows none.
inline auto* known(nvinfer1::IPluginRegistry& registry) {
#if NV_TENSORRT_MAJOR >= 10
    return registry.getCreator(kName, kVersion, kNamespace);
#else
    return registry.getPluginCreator(kName, kVersion, kNamespace);
#endif
}

// What `onset_nms_register` does. TensorRT is asked first: it logs an error when it is told twice.
template <typename Creator>
int enter(Creator& creator) {
    nvinfer1::IPluginRegistry* const all = registry();
    if (!all) return 1;
    if (auto* const found = known(*all)) return found == &creator ? 0 : 2;
    return all->registerCreator(creator, kNamespace) ? 0 : 2;
}

}  // namespace onset
