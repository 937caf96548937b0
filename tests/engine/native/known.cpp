// What the registry of the TensorRT that is loaded knows. Compiled and run by `test_nms_plugin.py`.
#include "../../../engine/nms/registration.h"

// Is there an OnsetNMS? -1 where no TensorRT is loaded.
extern "C" int known() {
    nvinfer1::IPluginRegistry* const registry = onset::registry();
    return registry ? onset::known(*registry) != nullptr : -1;
}

#if NV_TENSORRT_MAJOR >= 10
extern "C" int load_library(char const* path) {
    return onset::registry()->loadLibrary(path) != nullptr;
}
#endif
