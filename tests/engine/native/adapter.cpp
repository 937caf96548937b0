// OnsetNMS through the adapter of the TensorRT whose headers are included, as TensorRT would call it, with
// the kernel on a processor. Compiled and run by `test_nms_plugin.py`.
#include "sequential.cpp"

#include <NvInfer.h>

#if NV_TENSORRT_MAJOR >= 10
#include "../../../engine/nms/plugin_v3.cpp"
#else
#include "../../../engine/nms/plugin_v2.cpp"
#endif

#include <vector>

extern "C" int onset_nms_launch(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* tensors, void* workspace, void* stream) {
    return onset_nms_emulate(
        shape, settings, tensors, workspace, static_cast<int32_t>(reinterpret_cast<intptr_t>(stream)));
}

namespace {

using namespace nvinfer1;

using Integer = decltype(std::declval<IDimensionExpr>().getConstantValue());

struct Dimension : IDimensionExpr {
    explicit Dimension(Integer size) : size(size) {}
    Integer size;
};

struct Sizes : apiv::VExprBuilder {
    IDimensionExpr const* constant(Integer value) override { return new Dimension(value); }
    IDimensionExpr const* operation(
        DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
#if NV_TENSORRT_MAJOR >= 10
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
#endif
};

struct Builder : IExprBuilder {
    Builder() { mImpl = &sizes; }
    Sizes sizes;
};

DimsExprs expressed(Dims const& dims) {
    DimsExprs result{};
    result.nbDims = dims.nbDims;
    for (int32_t i = 0; i < dims.nbDims; ++i) result.d[i] = new Dimension(dims.d[i]);
    return result;
}

bool same(DimsExprs const& found, Dims const& expected) {
    bool result = found.nbDims == expected.nbDims;
    for (int32_t i = 0; result && i < found.nbDims; ++i) {
        result = static_cast<Dimension const*>(found.d[i])->size == expected.d[i];
    }
    return result;
}

// What TensorRT knows of the tensors of a call, inputs first.
std::vector<PluginTensorDesc> described(OnsetNmsShape const& s, OnsetNmsSettings const& settings) {
    DataType const given = s.half ? DataType::kHALF : DataType::kFLOAT;
    int32_t const most = settings.max_segments, memory = 1 + 3 * s.remembered;
    std::vector<PluginTensorDesc> result;
    auto add = [&](DataType type, Dims dims) { result.push_back({dims, type, TensorFormat::kLINEAR, 1.0f}); };
    add(given, {3, {s.batch, s.moments, s.classes}});
    add(given, {3, {s.batch, s.moments, 2}});
    add(DataType::kFLOAT, {2, {s.batch, memory}});
    add(DataType::kFLOAT, {3, {s.batch, most, 2}});
    add(DataType::kFLOAT, {2, {s.batch, most}});
    add(DataType::kINT32, {2, {s.batch, most}});
    add(DataType::kINT32, {1, {s.batch}});
    add(DataType::kFLOAT, {2, {s.batch, memory}});
    return result;
}

// Settings to a plugin, through the fields of a node.
template <typename Create>
auto made(OnsetNmsSettings settings, Create create) {
    onset::Fields const fields(settings);
    return create(fields.collection());
}

}  // namespace

// As `onset_nms_launch`. Returns the line of what TensorRT would not have accepted, negative.
#define EXPECT(what)                   \
    do {                               \
        if (!(what)) return -__LINE__; \
    } while (false)

extern "C" int onset_nms_through_plugin(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* t, void* workspace, void* stream) {
    std::vector<PluginTensorDesc> tensors = described(*shape, *settings);
    int32_t const number = static_cast<int32_t>(tensors.size());
    std::vector<DimsExprs> in, out(onset::kOutputs);
    for (int32_t i = 0; i < onset::kInputs; ++i) in.push_back(expressed(tensors[i].dims));
    void const* const inputs[] = {t->scores, t->offsets, t->memory};
    void* const outputs[] = {t->segments, t->kept, t->labels, t->number, t->next_memory};
    std::vector<DataType> types(onset::kOutputs);
    Builder builder;
    onset::Creator creator;
#if NV_TENSORRT_MAJOR >= 10
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (PluginTensorDesc const& tensor : tensors)
        dynamic.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    auto create = [&](PluginFieldCollection const* fields) {
        return creator.createPlugin("", fields, TensorRTPhase::kBUILD);
    };
    IPluginV3* const first = made(*settings, create);
    EXPECT(first);
    IPluginV3* const plugin = first->clone();
    delete first;
    auto* const build =
        static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    EXPECT(build->getNbOutputs() == onset::kOutputs);
    auto supports = [&](int32_t i) {
        return build->supportsFormatCombination(i, dynamic.data(), onset::kInputs, onset::kOutputs);
    };
    auto retype = [&](int32_t i, DataType type) { dynamic[i].desc.type = type; };
    EXPECT(build->getOutputShapes(
               in.data(), onset::kInputs, nullptr, 0, out.data(), onset::kOutputs, builder) == 0);
    EXPECT(build->getOutputDataTypes(types.data(), onset::kOutputs, nullptr, onset::kInputs) == 0);
    EXPECT(build->configurePlugin(
               dynamic.data(), onset::kInputs, &dynamic[onset::kInputs], onset::kOutputs) == 0);
    EXPECT(build->getWorkspaceSize(dynamic.data(), onset::kInputs, &dynamic[onset::kInputs],
               onset::kOutputs) == onset_nms_workspace(shape, settings));
#else
    auto create = [&](PluginFieldCollection const* fields) { return creator.createPlugin("", fields); };
    IPluginV2* const first = made(*settings, create);
    EXPECT(first);
    auto* const plugin = static_cast<IPluginV2DynamicExt*>(first)->clone();
    first->destroy();
    EXPECT(plugin->getNbOutputs() == onset::kOutputs);
    auto supports = [&](int32_t i) {
        return plugin->supportsFormatCombination(i, tensors.data(), onset::kInputs, onset::kOutputs);
    };
    auto retype = [&](int32_t i, DataType type) { tensors[i].type = type; };
    for (int32_t i = 0; i < onset::kOutputs; ++i) {
        out[i] = plugin->getOutputDimensions(i, in.data(), onset::kInputs, builder);
        types[i] = plugin->getOutputDataType(i, nullptr, onset::kInputs);
    }
    EXPECT(plugin->getWorkspaceSize(tensors.data(), onset::kInputs, &tensors[onset::kInputs],
               onset::kOutputs) == onset_nms_workspace(shape, settings));
#endif
    for (int32_t i = 0; i < number; ++i) {
        EXPECT(supports(i));
        DataType const right = tensors[i].type;
        for (DataType wrong :
            {DataType::kINT8, right == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF}) {
            retype(i, wrong);
            EXPECT(supports(i) == (i == 0 && wrong != DataType::kINT8));
        }
        retype(i, right);
        if (i >= onset::kInputs) {
            EXPECT(same(out[i - onset::kInputs], tensors[i].dims));
            EXPECT(types[i - onset::kInputs] == right);
        }
    }
#if NV_TENSORRT_MAJOR >= 10
    auto* const built =
        static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const loaded =
        creator.createPlugin("", built->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    delete plugin;
    EXPECT(loaded);
    auto* const runtime =
        static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const attached = runtime->attachToContext(nullptr);
    delete loaded;
    auto* const running =
        static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    EXPECT(running->onShapeChange(
               tensors.data(), onset::kInputs, &tensors[onset::kInputs], onset::kOutputs) == 0);
    std::vector<PluginTensorDesc> other = tensors;
    other[1].dims.d[1] += 1;
    EXPECT(
        running->onShapeChange(other.data(), onset::kInputs, &other[onset::kInputs], onset::kOutputs) != 0);
#else
    std::vector<char> plan(plugin->getSerializationSize());
    plugin->serialize(plan.data());
    plugin->destroy();
    EXPECT(!creator.deserializePlugin("", plan.data(), plan.size() - 1));
    auto* const running =
        static_cast<IPluginV2DynamicExt*>(creator.deserializePlugin("", plan.data(), plan.size()));
    EXPECT(running);
#endif
    int const status = running->enqueue(tensors.data(), &tensors[onset::kInputs], inputs, outputs, workspace,
        static_cast<cudaStream_t>(stream));
#if NV_TENSORRT_MAJOR >= 10
    delete attached;
#else
    running->destroy();
#endif
    return status;
}
