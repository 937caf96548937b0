// OnsetNMS for TensorRT 10 and later, as an IPluginV3.
#include "registration.h"

namespace onset {
namespace {

using namespace nvinfer1;

class Plugin : public IPluginV3,
               public IPluginV3OneCore,
               public IPluginV3OneBuild,
               public IPluginV3OneRuntime {
public:
    explicit Plugin(OnsetNmsSettings const& settings) : settings_(settings), fields_(settings_) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new Plugin(settings_); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
        int32_t) noexcept override {
        return is_valid(shape_at_most(in), settings_) ? 0 : 1;
    }

    int32_t getOutputDataTypes(
        DataType* outputs, int32_t number, DataType const*, int32_t) const noexcept override {
        for (int32_t i = 0; i < number; ++i) outputs[i] = type_of_output(i);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t number, IExprBuilder& build) noexcept override {
        for (int32_t i = 0; i < number; ++i)
            outputs[i] = dims_of_output(i, inputs, settings_.max_segments, build);
        return 0;
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t, int32_t) noexcept override {
        return is_supported(position, [&](int32_t i) -> PluginTensorDesc const& { return tensors[i].desc; });
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override {
        OnsetNmsShape const shape = shape_at_most(in);
        return onset_nms_workspace(&shape, &settings_);
    }

    int32_t onShapeChange(
        PluginTensorDesc const* in, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return is_valid(shape_of(in[0].dims, in[1].dims, in[2].dims, in[0].type), settings_) ? 0 : 1;
    }

    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return onset::enqueue(settings_, in, inputs, outputs, workspace, stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return fields_.collection(); }

private:
    OnsetNmsShape shape_at_most(DynamicPluginTensorDesc const* in) const {
        return shape_of(in[0].max, in[1].max, in[2].max, in[0].desc.type);
    }

    OnsetNmsSettings settings_;
    Fields fields_;
};

class Creator : public IPluginCreatorV3One {
public:
    IPluginV3* createPlugin(
        char const*, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
        OnsetNmsSettings settings{};
        return given && Fields::read(*given, settings) ? new Plugin(settings) : nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

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

// What `trtexec --dynamicPlugins` and `IPluginRegistry::loadLibrary` ask for: creators that are yet to be
// registered. Where loading has registered ours, none: loadLibrary fails for one that is known already.
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& number) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&onset::creator};
    nvinfer1::IPluginRegistry* const registry = onset::registry();
    number = registry && onset::known(*registry) == &onset::creator ? 0 : 1;
    return creators;
}

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
