// The steps of `engine/nms_reference.py` for one stream, written once for the GPU (`gpu.cu`) and for tests on
// a processor (`tests/engine/native`). All that these differ in is a team, which does a thing for many indices
// and then waits until all of it is done:
//
//   team.each(n, f)             f(i) for every i < n, in any order, at once
//   team.once(f)                f(), by one
//   team.best(n, f)             the greatest of f(i), i < n; 0 of none. Each f(i) writes for its own i alone
//   team.filter(n, test, f)     f(i, place) for every i < n that passes; places follow the order of i
//   block.split(n, f)           f(team, i) for every i < n, each by a team of its own
//   block.count(&number)        adds 1, whoever else does so
#pragma once

#include "arithmetic.h"
#include "bounds.h"

namespace onset {

// A score and, so that equal ones have an order, a place: the greater key has the better score,
// or the same and an earlier place.
using Key = unsigned long long;

ONSET_FN Key key_of(float score, uint32_t place) {
    return static_cast<Key>(bits_of(score)) << 32 | ~place;
}
ONSET_FN float score_of(Key key) {
    return float_of(static_cast<uint32_t>(key >> 32));
}
ONSET_FN uint32_t place_of(Key key) {
    return ~static_cast<uint32_t>(key);
}

// What a block knows together.
struct Table {
    int histogram[256];
    Key cutoff;  // keys of candidates are not below it
    int wanted, total;
    bool found;
};

// Scratch of one stream, for up to T = min(top_k, N K) candidates, class by class, moment after moment.
struct Scratch {
    Key* order;         // [T, up to a power of two] score when kept and place; 0: not kept
    Segment* segments;  // [T]
    float* scores;      // [T]
    int32_t* labels;    // [T]
    int32_t* chosen;    // [T] the kept ones of each class, in the order in which they were
    int32_t* counts;    // [K] candidates of each class
    int32_t* first;     // [K] place of a class's first
};

ONSET_FN int power_of_two(int least) {
    int power = 1;
    while (power < least) power *= 2;
    return power;
}

template <typename Number>
class Stream {
public:
    ONSET_FN Stream(OnsetNmsShape const& shape, OnsetNmsSettings const& settings,
        OnsetNmsTensors const& tensors, char* workspace, int most, int64_t row)
        : shape_(shape), settings_(settings) {
        int64_t const kept = settings.max_segments, memory = 1 + 3 * static_cast<int64_t>(shape.remembered);
        int64_t const moments = row * shape.moments;
        scores_ = static_cast<Number const*>(tensors.scores) + moments * shape.classes;
        offsets_ = static_cast<Number const*>(tensors.offsets) + moments * 2;
        memory_ = tensors.memory + row * memory;
        out_.segments = tensors.segments + row * kept * 2;
        out_.kept = tensors.kept + row * kept;
        out_.labels = tensors.labels + row * kept;
        out_.number = tensors.number + row;
        out_.next_memory = tensors.next_memory + row * memory;
        pairs_ = shape.moments * shape.classes;
        most_ = most;
        span_ = static_cast<float>(shape.moments * settings.hop);
        age_ = lesser(memory_[0] + span_, kFarthest);
        scratch_.order = reinterpret_cast<Key*>(workspace);
        scratch_.segments = reinterpret_cast<Segment*>(scratch_.order + power_of_two(most));
        scratch_.scores = reinterpret_cast<float*>(scratch_.segments + most);
        scratch_.labels = reinterpret_cast<int32_t*>(scratch_.scores + most);
        scratch_.chosen = scratch_.labels + most;
        scratch_.counts = scratch_.chosen + most;
        scratch_.first = scratch_.counts + shape.classes;
    }

    template <typename Block>
    ONSET_FN void run(Block block, Table& table) {
        count(block, table, 1);
        if (table.total > most_) {
            find_cutoff(block, table);
            count(block, table, table.cutoff);
        }
        Key const cutoff = table.cutoff;
        block.split(shape_.classes, [&](auto team, int label) {
            if (scratch_.counts[label] == 0) return;
            gather(team, label, cutoff);
            suppress(team, label);
        });
        sort(block, table.total);
        give_out(block, table.total);
        remember(block);
    }

private:
    OnsetNmsShape const& shape_;
    OnsetNmsSettings const& settings_;
    Number const* scores_;
    Number const* offsets_;
    float const* memory_;
    OnsetNmsTensors out_;
    Scratch scratch_;
    int pairs_, most_;
    float span_, age_;

    // Step 3: the key of a pair of moment and class; 0 where it is no candidate.
    ONSET_FN Key key_at(int moment, int label) const {
        float score = widened(scores_[moment * shape_.classes + label]);
        if (settings_.hop) score = probability(score);
        bool const is_one = score >= settings_.score_threshold && score >= settings_.min_score;
        if (!is_one || !(score > 0.0f && score <= kLargest)) return 0;
        return key_of(score, static_cast<uint32_t>(label) * shape_.moments + moment);
    }

    // How many candidates each class has, from `cutoff` on, and where each class begins.
    template <typename Block>
    ONSET_FN void count(Block block, Table& table, Key cutoff) {
        block.each(shape_.classes, [&](int label) { scratch_.counts[label] = 0; });
        block.each(pairs_, [&](int pair) {
            int const label = pair % shape_.classes;
            if (key_at(pair / shape_.classes, label) >= cutoff) block.count(&scratch_.counts[label]);
        });
        block.once([&] {
            int total = 0;
            for (int label = 0; label < shape_.classes; ++label) {
                scratch_.first[label] = total;
                total += scratch_.counts[label];
            }
            table.total = total;
            table.cutoff = cutoff;
        });
    }

    // The key of the last of the best `top_k` candidates, of which there are more: eight bits at a time, from
    // the highest, by how many keys have which.
    template <typename Block>
    ONSET_FN void find_cutoff(Block block, Table& table) {
        block.once([&] {
            table.cutoff = 0;
            table.wanted = most_;
            table.found = false;
        });
        for (int shift = 56; shift >= 0 && !table.found; shift -= 8) {
            block.each(256, [&](int digit) { table.histogram[digit] = 0; });
            block.each(pairs_, [&](int pair) {
                Key const key = key_at(pair / shape_.classes, pair % shape_.classes);
                if (key && ((key ^ table.cutoff) >> shift >> 8) == 0)
                    block.count(&table.histogram[key >> shift & 255]);
            });
            block.once([&] {
                int digit = 255;
                for (; table.histogram[digit] < table.wanted; --digit) table.wanted -= table.histogram[digit];
                table.cutoff |= static_cast<Key>(digit) << shift;
                table.found = table.histogram[digit] == table.wanted;
            });
        }
    }

    // Step 4: the candidates of a class into their places; of what is none after all, with a score of 0.
    template <typename Team>
    ONSET_FN void gather(Team team, int label, Key cutoff) {
        int const first = scratch_.first[label];
        team.filter(
            shape_.moments, [&](int moment) { return key_at(moment, label) >= cutoff; },
            [&](int moment, int place) {
                Segment segment{widened(offsets_[2 * moment]), widened(offsets_[2 * moment + 1])};
                bool fits = is_finite(segment.start) && is_finite(segment.end);
                if (fits && settings_.hop) segment = look_back(segment.start, segment.end, moment);
                float const length = segment.end - segment.start;
                fits = fits && length >= settings_.min_length && length <= kLargest;
                scratch_.segments[first + place] = segment;
                scratch_.scores[first + place] = fits ? score_of(key_at(moment, label)) : 0.0f;
                scratch_.labels[first + place] = label;
            });
    }

    ONSET_FN Segment look_back(float a, float b, int moment) const {
        float const now = static_cast<float>((moment + 1 - shape_.moments) * settings_.hop);
        float const ended = softplus(a);
        float const end = back(ended, now);
        float const start = back(ended + exponential(lesser(greater(b, -4.0f), 10.0f)), now);
        return {lesser(start, end), end};
    }

    ONSET_FN float back(float frames, float now) const {
        return greater(now - lesser(rintf(frames * static_cast<float>(settings_.hop)), kFarthest), -age_);
    }

    ONSET_FN float after(float score, Segment kept, Segment other) const {
        return score * factor(kept, other, settings_.soft, settings_.iou_threshold, settings_.sigma);
    }

    ONSET_FN Segment remembered(int index) const {
        return {memory_[1 + 3 * index] - span_, memory_[2 + 3 * index] - span_};
    }

    // Steps 5 and 6.
    template <typename Team>
    ONSET_FN void suppress(Team team, int label) {
        int const first = scratch_.first[label], count = scratch_.counts[label];
        Segment const* segments = scratch_.segments + first;
        float* scores = scratch_.scores + first;
        Key* order = scratch_.order + first;
        for (int known = 0; known < shape_.remembered; ++known) {
            if (memory_[3 + 3 * known] != static_cast<float>(label + 1)) continue;
            Segment const kept = remembered(known);
            team.each(count, [&](int i) { scores[i] = after(scores[i], kept, segments[i]); });
        }
        int rounds = 0, last = -1;
        for (; rounds < count && rounds < settings_.max_segments; ++rounds) {
            Key const best = team.best(count, [&](int i) -> Key {
                float score = scores[i];
                if (!(score >= settings_.min_score && score > 0.0f)) return 0;
                if (last >= 0)
                    scores[i] = score = i == last ? 0.0f : after(score, segments[last], segments[i]);
                return score >= settings_.min_score && score > 0.0f ? key_of(score, i) : 0;
            });
            if (!best) break;
            last = static_cast<int>(place_of(best));
            team.once([&] {
                scratch_.chosen[first + rounds] = first + last;
                order[rounds] = key_of(score_of(best), first + rounds);
            });
        }
        team.each(count - rounds, [&](int i) { order[rounds + i] = 0; });
    }

    // Step 7: `order`, the greatest first, by a bitonic network (Batcher 1968).
    template <typename Block>
    ONSET_FN void sort(Block block, int total) {
        Key* order = scratch_.order;
        int const padded = power_of_two(total);
        block.each(padded - total, [&](int i) { order[total + i] = 0; });
        for (int size = 2; size <= padded; size *= 2) {
            for (int stride = size / 2; stride > 0; stride /= 2) {
                block.each(padded / 2, [&](int i) {
                    int const low = 2 * i - (i & (stride - 1)), high = low + stride;
                    Key const a = order[low], b = order[high];
                    if ((a < b) == ((low & size) == 0)) {
                        order[low] = b;
                        order[high] = a;
                    }
                });
            }
        }
    }

    template <typename Block>
    ONSET_FN void give_out(Block block, int total) {
        auto key = [&](int i) { return i < total && i < settings_.max_segments ? scratch_.order[i] : 0; };
        block.each(settings_.max_segments, [&](int i) {
            Key const kept = key(i);
            int const place = kept ? scratch_.chosen[place_of(kept)] : 0;
            Segment const segment = kept ? scratch_.segments[place] : Segment{0.0f, 0.0f};
            out_.segments[2 * i] = segment.start;
            out_.segments[2 * i + 1] = segment.end;
            out_.kept[i] = kept ? score_of(kept) : 0.0f;
            out_.labels[i] = kept ? scratch_.labels[place] : -1;
        });
        // Sorted, so that it ends where the first 0 is.
        block.each(settings_.max_segments + 1, [&](int i) {
            if (!key(i) && (i == 0 || key(i - 1))) *out_.number = i;
        });
    }

    // Step 8.
    template <typename Block>
    ONSET_FN void remember(Block block) {
        float* next = out_.next_memory;
        int const room = shape_.remembered, given = *out_.number < room ? *out_.number : room;
        auto stays = [&](int i) { return memory_[3 + 3 * i] >= 1.0f && remembered(i).start >= -kFarthest; };
        block.each(1 + 3 * room, [&](int i) { next[i] = i ? 0.0f : age_; });
        block.each(room, [&](int i) {
            if (i < given) put(next, i, {out_.segments[2 * i], out_.segments[2 * i + 1]}, out_.labels[i] + 1);
            int place = given;
            for (int known = 0; known < i; ++known) place += stays(known);
            if (stays(i) && place < room) put(next, place, remembered(i), memory_[3 + 3 * i]);
        });
    }

    ONSET_FN static void put(float* next, int place, Segment segment, float number) {
        next[1 + 3 * place] = segment.start;
        next[2 + 3 * place] = segment.end;
        next[3 + 3 * place] = number;
    }
};

}  // namespace onset
