// OnsetNMS for TensorRT 8, as an IPluginV2DynamicExt. A plan holds the settings as they lie in memory.
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // what 8 deprecates has no successor before 10

#include "registration.h"

namespace onset {
namespace {

using namespace nvinfer1;

class Plugin : public IPluginV2DynamicExt {
public:
    explicit Plugin(OnsetNmsSettings const& settings) : settings_(settings) {}

    IPluginV2DynamicExt* clone() const noexcept override { return new Plugin(settings_); }
    void destroy() noexcept override { delete this; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    char const* getPluginType() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    void setPluginNamespace(char const*) noexcept override {}
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    DataType getOutputDataType(int32_t index, DataType const*, int32_t) const noexcept override {
        return type_of_output(index);
    }

    DimsExprs getOutputDimensions(
        int32_t index, DimsExprs const* inputs, int32_t, IExprBuilder& build) noexcept override {
        return dims_of_output(index, inputs, settings_.max_segments, build);
    }

    bool supportsFormatCombination(
        int32_t position, PluginTensorDesc const* tensors, int32_t, int32_t) noexcept override {
        return is_supported(position, [&](int32_t i) -> PluginTensorDesc const& { return tensors[i]; });
    }

    void configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {}

    size_t getWorkspaceSize(
        PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) const noexcept override {
        OnsetNmsShape const shape = shape_of(in[0].dims, in[1].dims, in[2].dims, in[0].type);
        return onset_nms_workspace(&shape, &settings_);
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return onset::enqueue(settings_, in, inputs, outputs, workspace, stream);
    }

    size_t getSerializationSize() const noexcept override { return sizeof settings_; }
    void serialize(void* buffer) const noexcept override { memcpy(buffer, &settings_, sizeof settings_); }

private:
    OnsetNmsSettings settings_;
};

class Creator : public IPluginCreator {
public:
    IPluginV2* createPlugin(char const*, PluginFieldCollection const* given) noexcept override {
        OnsetNmsSettings settings{};
        return given && Fields::read(*given, settings) ? new Plugin(settings) : nullptr;
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t length) noexcept override {
        OnsetNmsSettings settings{};
        if (length != sizeof settings) return nullptr;
        memcpy(&settings, data, length);
        return is_valid(settings) ? new Plugin(settings) : nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    void setPluginNamespace(char const*) noexcept override {}

private:
    OnsetNmsSettings unset_{};
    Fields fields_{unset_};
};

Creator creator;

}  // namespace
}  // namespace onset

extern "C" int onset_nms_register() { return onset::enter(onset::creator); }

namespace {

// So that `trtexec --plugins=` and a plain dlopen are enough. The creator above exists by now.
[[maybe_unused]] int const registered_when_loaded = onset_nms_register();

}  // namespace
