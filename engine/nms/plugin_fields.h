// What both adapters share: the attributes of a node and the tensors of a call, in TensorRT's words.
#pragma once

#include <NvInfer.h>
#include <string.h>

#include "bounds.h"

namespace onset {

constexpr char const* kName = "OnsetNMS";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "";
constexpr int32_t kInputs = 3, kOutputs = 5;

// The attributes of a node, as fields that point into settings, so that each plugin has its own.
class Fields {
public:
    explicit Fields(OnsetNmsSettings& settings) {
        using nvinfer1::PluginField;
        auto const whole = nvinfer1::PluginFieldType::kINT32, real = nvinfer1::PluginFieldType::kFLOAT32;
        PluginField const fields[] = {
            PluginField("hop", &settings.hop, whole, 1),
            PluginField("top_k", &settings.top_k, whole, 1),
            PluginField("max_segments", &settings.max_segments, whole, 1),
            PluginField("soft", &settings.soft, whole, 1),
            PluginField("score_threshold", &settings.score_threshold, real, 1),
            PluginField("min_score", &settings.min_score, real, 1),
            PluginField("min_length", &settings.min_length, real, 1),
            PluginField("iou_threshold", &settings.iou_threshold, real, 1),
            PluginField("sigma", &settings.sigma, real, 1),
        };
        static_assert(sizeof fields == sizeof fields_, "a field for each attribute");
        memcpy(fields_, fields, sizeof fields);
        collection_ = {kFields, fields_};
    }
    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;

    nvinfer1::PluginFieldCollection const* collection() const { return &collection_; }

    // Fills settings from a node's attributes. False where one is missing, of another type or out of bounds.
    static bool read(nvinfer1::PluginFieldCollection const& given, OnsetNmsSettings& settings) {
        Fields const wanted(settings);
        for (nvinfer1::PluginField const& field : wanted.fields_) {
            nvinfer1::PluginField const* found = nullptr;
            for (int32_t i = 0; i < given.nbFields; ++i) {
                if (strcmp(given.fields[i].name, field.name) == 0) found = &given.fields[i];
            }
            if (!found || !found->data || found->type != field.type || found->length != 1) return false;
            memcpy(const_cast<void*>(field.data), found->data, 4);
        }
        return is_valid(settings);
    }

private:
    static constexpr int32_t kFields = 9;
    nvinfer1::PluginField fields_[kFields];
    nvinfer1::PluginFieldCollection collection_;
};

// Inputs: scores, offsets, memory. Outputs: segments, scores, labels, number, next memory.
inline nvinfer1::DataType type_of_output(int32_t index) {
    return index == 2 || index == 3 ? nvinfer1::DataType::kINT32 : nvinfer1::DataType::kFLOAT;
}

// Scores and offsets are of one type, float32 or float16; all else has one that is fixed. `at`: tensor i's.
template <typename At>
bool is_supported(int32_t position, At at) {
    nvinfer1::PluginTensorDesc const& tensor = at(position);
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == 0) {
        return tensor.type == nvinfer1::DataType::kFLOAT || tensor.type == nvinfer1::DataType::kHALF;
    }
    if (position == 1) return tensor.type == at(0).type;
    return tensor.type == (position == 2 ? nvinfer1::DataType::kFLOAT : type_of_output(position - kInputs));
}

inline nvinfer1::DimsExprs dims_of_output(
    int32_t index, nvinfer1::DimsExprs const* inputs, int32_t max_segments, nvinfer1::IExprBuilder& build) {
    if (index == 4) return inputs[2];
    nvinfer1::DimsExprs dims{};
    dims.nbDims = index == 0 ? 3 : index == 3 ? 1 : 2;
    dims.d[0] = inputs[0].d[0];
    if (dims.nbDims > 1) dims.d[1] = build.constant(max_segments);
    if (dims.nbDims > 2) dims.d[2] = build.constant(2);
    return dims;
}

// The sizes of a call, by its inputs. A batch of -1, which is out of bounds, where they do not fit.
inline OnsetNmsShape shape_of(nvinfer1::Dims const& scores, nvinfer1::Dims const& offsets,
    nvinfer1::Dims const& memory, nvinfer1::DataType type) {
    bool const fits = scores.nbDims == 3 && offsets.nbDims == 3 && memory.nbDims == 2 &&
                      offsets.d[0] == scores.d[0] && memory.d[0] == scores.d[0] &&
                      offsets.d[1] == scores.d[1] && offsets.d[2] == 2 && memory.d[1] % 3 == 1;
    if (!fits) return {-1, 0, 0, 0, 0};
    return {static_cast<int32_t>(scores.d[0]), static_cast<int32_t>(scores.d[1]),
        static_cast<int32_t>(scores.d[2]), static_cast<int32_t>(memory.d[1] / 3),
        type == nvinfer1::DataType::kHALF};
}

inline int32_t enqueue(OnsetNmsSettings const& settings, nvinfer1::PluginTensorDesc const* in,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) {
    OnsetNmsShape const shape = shape_of(in[0].dims, in[1].dims, in[2].dims, in[0].type);
    OnsetNmsTensors const tensors{inputs[0], inputs[1], static_cast<float const*>(inputs[2]),
        static_cast<float*>(outputs[0]), static_cast<float*>(outputs[1]), static_cast<int32_t*>(outputs[2]),
        static_cast<int32_t*>(outputs[3]), static_cast<float*>(outputs[4])};
    return onset_nms_launch(&shape, &settings, &tensors, workspace, stream);
}

}  // namespace onset
