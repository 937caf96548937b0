// The functions of `engine/nms_reference.py`, operation for operation: nothing may be fused or reordered
// here, so compilers are told not to (-fmad=false, -ffp-contract=off).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define ONSET_FN __device__ inline
#else
#define ONSET_FN inline
#endif

namespace onset {

constexpr float kFarthest = 16777216.0f;  // 2^24: up to here single precision counts whole samples
constexpr float kLargest = 3.402823466e38f;

ONSET_FN uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ONSET_FN float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ONSET_FN float widened(float value) {
    return value;
}

// float16, by its bits. Scaling by 2^112 makes up for the other bias of the exponent, subnormals included.
ONSET_FN float widened(uint16_t half) {
    float value = float_of((half & 0x7fffu) << 13) * 5192296858534827628530496329220096.0f;
    if ((half & 0x7c00u) == 0x7c00u) value = float_of(0x7f800000u | (half & 0x3ffu) << 13);
    return half & 0x8000u ? -value : value;
}

ONSET_FN bool is_finite(float value) {
    return fabsf(value) <= kLargest;
}
ONSET_FN float lesser(float a, float b) {
    return a < b ? a : b;
}
ONSET_FN float greater(float a, float b) {
    return a > b ? a : b;
}

ONSET_FN float exponential(float x) {
    x = greater(x, -87.0f);
    float const n = rintf(x * 1.44269504f);
    float const r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float value = 1.0f / 5040.0f;
    value = value * r + 1.0f / 720.0f;
    value = value * r + 1.0f / 120.0f;
    value = value * r + 1.0f / 24.0f;
    value = value * r + 1.0f / 6.0f;
    value = value * r + 1.0f / 2.0f;
    value = value * r + 1.0f;
    value = value * r + 1.0f;
    return value * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

ONSET_FN float log1p_of(float y) {
    float const s = y / (2.0f + y), z = s * s;
    float value = 1.0f / 15.0f;
    for (int odd = 13; odd > 0; odd -= 2) value = value * z + 1.0f / static_cast<float>(odd);
    return 2.0f * s * value;
}

ONSET_FN float softplus(float x) {
    return greater(x, 0.0f) + log1p_of(exponential(-fabsf(x)));
}

ONSET_FN float probability(float logit) {
    if (!(logit > -10.0f)) return 0.0f;
    float const e = exponential(-lesser(fabsf(logit), 60.0f));
    float const sigmoid = (logit >= 0.0f ? 1.0f : e) / (1.0f + e);
    return rintf(sigmoid * 10000.0f) / 10000.0f;
}

struct Segment {
    float start, end;
};

// What a kept segment leaves of the score of another.
ONSET_FN float factor(Segment kept, Segment other, bool soft, float threshold, float sigma) {
    float const inter = lesser(kept.end, other.end) - greater(kept.start, other.start);
    if (!(inter > 0.0f)) return 1.0f;
    float const length = (kept.end - kept.start) + 1e-6f, another = (other.end - other.start) + 1e-6f;
    float const iou = inter / ((length + another) - inter);
    return soft ? exponential(-((iou * iou) / sigma)) : iou >= threshold ? 0.0f : 1.0f;
}

}  // namespace onset
