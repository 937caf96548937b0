// OnsetNMS on a processor, its kernel's steps one after another. Compiled and run by `test_nms_kernel.py`.
#include "../../../engine/nms/algorithm.h"

namespace onset {
namespace {

struct Team {
    int32_t order;

    // The i-th of `number` indices, in an order that a GPU might as well have taken.
    int at(int i, int number) const {
        if (order == 0) return i;
        if (order == 1) return number - 1 - i;
        int64_t const stride = number % 7919 ? 7919 : 1;  // a prime: it meets every index once
        return static_cast<int>(i * stride % number);
    }

    void count(int* number) const { ++*number; }

    template <typename Work>
    void each(int number, Work work) const {
        for (int i = 0; i < number; ++i) work(at(i, number));
    }

    template <typename Work>
    void once(Work work) const {
        work();
    }

    template <typename Work>
    Key best(int number, Work work) const {
        Key result = 0;
        each(number, [&](int i) {
            Key const key = work(i);
            if (key > result) result = key;
        });
        return result;
    }

    template <typename Test, typename Work>
    void filter(int number, Test test, Work work) const {
        int place = 0;
        for (int i = 0; i < number; ++i) {
            if (test(i)) work(i, place++);
        }
    }

    template <typename Work>
    void split(int number, Work work) const {
        each(number, [&](int i) { work(*this, i); });
    }
};

template <typename Number>
void run(OnsetNmsShape const& shape, OnsetNmsSettings const& settings, OnsetNmsTensors const& tensors,
    char* workspace, int32_t order) {
    int const most = static_cast<int>(capacity(shape, settings));
    for (int row = 0; row < shape.batch; ++row) {
        Table table;
        char* const scratch = workspace + row * scratch_bytes(shape, settings);
        Stream<Number>(shape, settings, tensors, scratch, most, row).run(Team{order}, table);
    }
}

}  // namespace
}  // namespace onset

extern "C" size_t onset_nms_workspace(OnsetNmsShape const* shape, OnsetNmsSettings const* settings) {
    return onset::workspace_bytes(*shape, *settings);
}

// As `onset_nms_launch`. What a GPU does at once is done forwards (`order` 0), backwards (1) or mixed up (2).
extern "C" int onset_nms_emulate(OnsetNmsShape const* shape, OnsetNmsSettings const* settings,
    OnsetNmsTensors const* tensors, void* workspace, int32_t order) {
    if (!onset::is_valid(*shape, *settings)) return -1;
    (shape->half ? onset::run<uint16_t> : onset::run<float>)(*shape, *settings, *tensors,
        static_cast<char*>(workspace), order);
    return 0;
}
