// Teams on a GPU: a warp, and a block of warps. What they promise stands in `algorithm.h`.
#pragma once

namespace onset {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

struct Warp {
    int lane = static_cast<int>(threadIdx.x) % kWarp;

    template <typename Work>
    __device__ void each(int number, Work work) const {
        for (int i = lane; i < number; i += kWarp) work(i);
        __syncwarp();
    }

    template <typename Work>
    __device__ void once(Work work) const {
        if (lane == 0) work();
        __syncwarp();
    }

    template <typename Work>
    __device__ auto best(int number, Work work) const {
        decltype(work(0)) result = 0;
        for (int i = lane; i < number; i += kWarp) {
            auto const key = work(i);
            if (key > result) result = key;
        }
        for (int step = kWarp / 2; step > 0; step /= 2) {
            auto const key = __shfl_xor_sync(kAll, result, step);
            if (key > result) result = key;
        }
        return result;
    }

    template <typename Test, typename Work>
    __device__ void filter(int number, Test test, Work work) const {
        int before = 0;
        for (int begin = 0; begin < number; begin += kWarp) {
            int const i = begin + lane;
            bool const passes = i < number && test(i);
            unsigned const who = __ballot_sync(kAll, passes);
            if (passes) work(i, before + __popc(who & ((1u << lane) - 1)));
            before += __popc(who);
        }
        __syncwarp();
    }
};

struct Block {
    __device__ void count(int* number) const { atomicAdd(number, 1); }

    template <typename Work>
    __device__ void each(int number, Work work) const {
        for (int i = static_cast<int>(threadIdx.x); i < number; i += static_cast<int>(blockDim.x)) work(i);
        __syncthreads();
    }

    template <typename Work>
    __device__ void once(Work work) const {
        if (threadIdx.x == 0) work();
        __syncthreads();
    }

    template <typename Work>
    __device__ void split(int number, Work work) const {
        for (int i = static_cast<int>(threadIdx.x) / kWarp; i < number;
            i += static_cast<int>(blockDim.x) / kWarp) {
            work(Warp{}, i);
        }
        __syncthreads();
    }
};

}  // namespace onset
