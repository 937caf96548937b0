// A stand-in for libnvinfer: TensorRT's registry of plugins, as its headers describe it, and nothing else.
// Compiled by `test_nms_plugin.py`, under the name that the real one has.
#include <NvInfer.h>
#include <dlfcn.h>
#include <string.h>

#include <vector>

#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

namespace {

using namespace nvinfer1;

#if NV_TENSORRT_MAJOR >= 10
using Creator = IPluginCreatorInterface;
using Named = IPluginCreatorV3One;
#else
using Creator = IPluginCreator;
using Named = IPluginCreator;
#endif

struct Registry : IPluginRegistry {
    std::vector<Creator*> creators;
    int32_t told_twice = 0;

    bool registerCreator(Creator& creator, AsciiChar const* const) noexcept override {
        Named& named = static_cast<Named&>(creator);
        if (find(named.getPluginName(), named.getPluginVersion())) {
            ++told_twice;
            return false;
        }
        creators.push_back(&creator);
        return true;
    }

    Creator* find(char const* name, char const* version) const {
        for (Creator* creator : creators) {
            Named* const named = static_cast<Named*>(creator);
            if (!strcmp(named->getPluginName(), name) && !strcmp(named->getPluginVersion(), version)) {
                return creator;
            }
        }
        return nullptr;
    }

    bool deregisterCreator(Creator const&) noexcept override { return false; }
    void setErrorRecorder(IErrorRecorder* const) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    // From 8.6 on: no `override`.
    bool isParentSearchEnabled() const { return false; }
    void setParentSearchEnabled(bool const) {}
    void deregisterLibrary(void*) noexcept {}

    // "The call will fail and return nullptr if any of the plugins are already registered."
    void* loadLibrary(AsciiChar const* path) noexcept {
        void* const library = dlopen(path, RTLD_LAZY);
        if (!library) return nullptr;
        using Function = Creator* const* (*)(int32_t&);
        auto const function = reinterpret_cast<Function>(dlsym(library, "getCreators"));
        if (!function) return nullptr;
        int32_t number = -1;
        Creator* const* const given = function(number);
        for (int32_t i = 0; i < number; ++i) {
            if (!registerCreator(*given[i], "")) return nullptr;
        }
        return library;
    }

#if NV_TENSORRT_MAJOR >= 10
    Creator* getCreator(AsciiChar const* const name, AsciiChar const* const version,
        AsciiChar const* const) noexcept override {
        return find(name, version);
    }
    Creator* const* getAllCreators(int32_t* const number) const noexcept override { return all(number); }
    Creator* const* getAllCreatorsRecursive(int32_t* const number) noexcept { return all(number); }
    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(AsciiChar const*) noexcept override { return -1; }
#endif
#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(
        AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override {
        return nullptr;
    }
#elif NV_TENSORRT_MAJOR < 10
    Creator* const* getPluginCreatorList(int32_t* const number) const noexcept override { return all(number); }
    Creator* getPluginCreator(AsciiChar const* const name, AsciiChar const* const version,
        AsciiChar const* const) noexcept override {
        return find(name, version);
    }
#endif

private:
    Creator* const* all(int32_t* number) const {
        *number = static_cast<int32_t>(creators.size());
        return creators.data();
    }
};

Registry registry;

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

// For the test: how many creators it knows, and how often it was told one that it knew.
extern "C" int32_t creators_known() { return static_cast<int32_t>(registry.creators.size()); }
extern "C" int32_t creators_told_twice() { return registry.told_twice; }
