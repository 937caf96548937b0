// What sizes are allowed, and the memory that they take: on the host, and without CUDA.
#pragma once

#include "nms.h"

namespace onset {

inline int64_t capacity(OnsetNmsShape const& shape, OnsetNmsSettings const& settings) {
    int64_t const pairs = static_cast<int64_t>(shape.moments) * shape.classes;
    return pairs < settings.top_k ? pairs : settings.top_k;
}

// Are all sizes within bounds, so that no index here leaves 32 bits and times are whole samples?
inline bool is_valid(OnsetNmsSettings const& s) {
    auto within = [](float value, float least, float most) { return value >= least && value <= most; };
    return s.hop >= 0 && s.hop <= 65536 && s.top_k >= 1 && s.top_k <= 65536 && s.max_segments >= 1 &&
           s.max_segments <= 65536 && (s.soft == 0 || s.soft == 1) && within(s.score_threshold, 0.0f, 1.0f) &&
           within(s.min_score, 0.0f, 1.0f) && within(s.min_length, 0.0f, 16777216.0f) &&
           within(s.iou_threshold, 1e-6f, 1.0f) && within(s.sigma, 1e-3f, 1e3f);
}

inline bool is_valid(OnsetNmsShape const& shape, OnsetNmsSettings const& settings) {
    int64_t const moments = shape.moments, classes = shape.classes;
    return is_valid(settings) && shape.batch >= 0 && moments >= 1 && classes >= 1 && moments <= 1 << 24 &&
           classes <= 65536 && moments * classes <= 1 << 30 && moments * settings.hop <= 1 << 24 &&
           shape.remembered >= 0 && shape.remembered <= 4096;
}

// Bytes of one stream's `Scratch`, a multiple of 8.
inline size_t scratch_bytes(OnsetNmsShape const& shape, OnsetNmsSettings const& settings) {
    size_t const most = static_cast<size_t>(capacity(shape, settings));
    size_t order = 1;
    while (order < most) order *= 2;
    size_t const words = 2 * order + 5 * most + 2 * static_cast<size_t>(shape.classes);
    return (words + 1) / 2 * 8;
}

inline size_t workspace_bytes(OnsetNmsShape const& shape, OnsetNmsSettings const& settings) {
    if (!is_valid(shape, settings)) return 0;
    return scratch_bytes(shape, settings) * static_cast<size_t>(shape.batch > 0 ? shape.batch : 1);
}

}  // namespace onset
