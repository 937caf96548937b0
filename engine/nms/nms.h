// OnsetNMS as a C interface: what it computes stands in `engine/nms_reference.py`, whose names these are.
// The launcher knows CUDA and nothing of TensorRT.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct {
    int32_t hop, top_k, max_segments, soft;  // soft: 1, or 0 for hard
    float score_threshold, min_score, min_length, iou_threshold, sigma;
} OnsetNmsSettings;

typedef struct {
    int32_t batch, moments, classes, remembered;
    int32_t half;  // 1: scores and offsets are float16
} OnsetNmsShape;

// Contiguous, on the device; none overlaps another. Every element of the outputs is written.
typedef struct {
    void const* scores;   // [B, N, K]
    void const* offsets;  // [B, N, 2]
    float const* memory;  // [B, 1 + 3 R]
    float* segments;      // [B, M, 2]
    float* kept;          // [B, M]
    int32_t* labels;      // [B, M]
    int32_t* number;      // [B]
    float* next_memory;   // [B, 1 + 3 R]
} OnsetNmsTensors;

#ifdef __cplusplus
extern "C" {
#endif

// Bytes of workspace, or 0 where shape or settings are out of bounds. They grow with the shape.
size_t onset_nms_workspace(OnsetNmsShape const* shape, OnsetNmsSettings const* settings);

// Enqueues one kernel on a cudaStream_t, and nothing else: no allocation, no synchronisation, so that a CUDA
// graph can capture it. The workspace, aligned to 8, is scratch. Returns 0, a cudaError_t, or -1 where shape
// or settings are out of bounds.
int onset_nms_launch(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* tensors, void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
