// The kernel: a block for each stream, in it a warp for each class in turn.
#include <cuda_runtime_api.h>

#include "algorithm.h"
#include "gpu_team.h"

namespace onset {
namespace {

constexpr int kFew = 4096;  // pairs of moment and class for which more threads would wait more than work
constexpr int kThreads = 256, kMostThreads = 1024;

template <typename Number>
__global__ void __launch_bounds__(kMostThreads)
    nms(OnsetNmsShape const shape, OnsetNmsSettings const settings, OnsetNmsTensors const tensors,
        char* const workspace, size_t const bytes, int const most) {
    __shared__ Table table;
    Stream<Number>(shape, settings, tensors, workspace + blockIdx.x * bytes, most, blockIdx.x)
        .run(Block{}, table);
}

}  // namespace
}  // namespace onset

extern "C" size_t onset_nms_workspace(OnsetNmsShape const* shape, OnsetNmsSettings const* settings) {
    return onset::workspace_bytes(*shape, *settings);
}

extern "C" int onset_nms_launch(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* tensors, void* workspace, void* stream) {
    if (!onset::is_valid(*shape, *settings)) return -1;
    if (shape->batch == 0) return 0;
    int const threads =
        shape->moments * shape->classes <= onset::kFew ? onset::kThreads : onset::kMostThreads;
    auto const kernel = shape->half ? onset::nms<uint16_t> : onset::nms<float>;
    kernel<<<static_cast<unsigned>(shape->batch), threads, 0, static_cast<cudaStream_t>(stream)>>>(*shape,
        *settings, *tensors, static_cast<char*>(workspace), onset::scratch_bytes(*shape, *settings),
        static_cast<int>(onset::capacity(*shape, *settings)));
    return static_cast<int>(cudaGetLastError());
}
