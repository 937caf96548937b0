// OnsetNMS on a processor, with the GPU's own teams: each thread of a block is a fiber that runs until it has
// to wait for others, and which one runs next is drawn by chance. So a barrier that is missing shows as a
// wrong result, and one that not all come to as a standstill. Compiled and run by `test_nms_kernel.py`.
#include <stdint.h>
#include <ucontext.h>

#include <functional>
#include <random>
#include <vector>

#define __device__

namespace {

enum class State { ready, in_warp, in_block, done };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    State state = State::ready;
};

constexpr unsigned kLanes = 32;

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<unsigned long long> exchange;  // what the lanes of a warp show each other
    std::function<void()> program;
    ucontext_t outside;
    unsigned current = 0;
};

Machine* machine;

struct Index {
    unsigned x;
};
Index threadIdx, blockDim;

void wait(State why) {
    Fiber& fiber = machine->fibers[machine->current];
    fiber.state = why;
    swapcontext(&fiber.context, &machine->outside);
}

void begin() {
    machine->program();
    wait(State::done);
}

// Those of a group go on once all of it wait for each other.
void release(unsigned first, unsigned number, State why) {
    for (unsigned i = first; i < first + number; ++i) {
        if (machine->fibers[i].state != why) return;
    }
    for (unsigned i = first; i < first + number; ++i) machine->fibers[i].state = State::ready;
}

// Runs a block of threads; false if they stood still before all were done.
bool run_block(unsigned threads, uint32_t seed, std::function<void()> program) {
    Machine all;
    all.fibers.resize(threads);
    all.exchange.resize(threads);
    all.program = std::move(program);
    machine = &all;
    blockDim.x = threads;
    for (Fiber& fiber : all.fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, begin, 0);
    }
    std::mt19937 random(seed);
    std::vector<unsigned> ready;
    for (;;) {
        ready.clear();
        for (unsigned i = 0; i < threads; ++i) {
            if (all.fibers[i].state == State::ready) ready.push_back(i);
        }
        if (ready.empty()) break;
        // All that are ready get their turn, from a random one on and in one of two directions.
        unsigned const offset = random() % ready.size();
        bool const backwards = random() % 2;
        for (unsigned i = 0; i < ready.size(); ++i) {
            unsigned const at = (offset + (backwards ? ready.size() - i : i)) % ready.size();
            threadIdx.x = all.current = ready[at];
            swapcontext(&all.outside, &all.fibers[all.current].context);
            release(all.current / kLanes * kLanes, kLanes, State::in_warp);
        }
        release(0, threads, State::in_block);
    }
    for (Fiber const& fiber : all.fibers) {
        if (fiber.state != State::done) return false;
    }
    return true;
}

}  // namespace

void __syncthreads() {
    wait(State::in_block);
}
void __syncwarp() {
    wait(State::in_warp);
}

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
    unsigned const me = machine->current;
    machine->exchange[me] = value;
    __syncwarp();
    Value const other = machine->exchange[me ^ mask];
    __syncwarp();
    return other;
}

unsigned __ballot_sync(unsigned, bool mine) {
    unsigned const me = machine->current, warp = me / kLanes * kLanes;
    machine->exchange[me] = mine;
    __syncwarp();
    unsigned result = 0;
    for (unsigned lane = 0; lane < kLanes; ++lane)
        result |= static_cast<unsigned>(machine->exchange[warp + lane]) << lane;
    __syncwarp();
    return result;
}

int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
void atomicAdd(int* number, int more) {
    *number += more;
}

#include "../../../engine/nms/algorithm.h"
#include "../../../engine/nms/gpu_team.h"

extern "C" size_t onset_nms_workspace(OnsetNmsShape const* shape, OnsetNmsSettings const* settings) {
    return onset::workspace_bytes(*shape, *settings);
}

// As `onset_nms_launch`, with one, two or three warps a block, as `order`, which seeds the draws, says.
// Returns -2 where the threads of a block stood still.
extern "C" int onset_nms_emulate(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* tensors, void* workspace, int32_t order) {
    if (!onset::is_valid(*shape, *settings)) return -1;
    int const most = static_cast<int>(onset::capacity(*shape, *settings));
    for (int row = 0; row < shape->batch; ++row) {
        onset::Table table;
        char* const scratch = static_cast<char*>(workspace) + row * onset::scratch_bytes(*shape, *settings);
        bool const ended = run_block(kLanes * (1 + order % 3), order, [&] {
            if (shape->half) {
                onset::Stream<uint16_t>(*shape, *settings, *tensors, scratch, most, row)
                    .run(onset::Block{}, table);
            } else {
                onset::Stream<float>(*shape, *settings, *tensors, scratch, most, row)
                    .run(onset::Block{}, table);
            }
        });
        if (!ended) return -2;
    }
    return 0;
}
