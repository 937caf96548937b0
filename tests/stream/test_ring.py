"""The ring: what comes out depends on the samples alone, whatever their cutting, order and repetition."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.ring import Chunk, End, Gap, Ring

RATE = 10.0
CHANNELS = 2


def signal(start: int, stop: int) -> np.ndarray:
    """Sample number t is (t + 1, -t - 1): never zero, and every one different."""
    t = np.arange(start, stop, dtype=np.float32) + 1
    return np.stack([t, -t], axis=1)


def make(hop: int = 2, chunk: int = 2, reorder: int = 4, max_gap: int = 6) -> Ring:
    return Ring(hop, chunk, CHANNELS, RATE, reorder / RATE, max_gap / RATE)


def key(item: Chunk | Gap | End) -> tuple[object, ...]:
    if isinstance(item, Chunk):
        return (
            "chunk",
            item.origin,
            item.first_sample,
            tuple(item.mask.tolist()),
            tuple(item.samples[:, 0].tolist()),
            item.frames,
            item.filled_gaps,
        )
    return ("gap", item.start, item.end) if isinstance(item, Gap) else ("end",)


def pop_all(ring: Ring) -> list[tuple[object, ...]]:
    items: list[tuple[object, ...]] = []
    while (item := ring.pop()) is not None:
        items.append(key(item))
        if isinstance(item, End):
            break
    return items


def run(ring: Ring, messages: Iterable[tuple[int, int]], eager: bool = True) -> list[tuple[object, ...]]:
    """Push the messages [start, stop), popping at once or only when the ring is full; then flush."""
    items: list[tuple[object, ...]] = []
    for start, stop in messages:
        at, stuck = start, False
        while at < stop:
            taken = ring.push(at, signal(at, stop)).taken
            at += taken
            assert taken or not stuck, "a full ring had nothing to pop, and nothing moved"
            stuck = False
            if at < stop:
                item = ring.pop()
                stuck = item is None
                if item is not None:
                    items.append(key(item))
        if eager:
            items += pop_all(ring)
    ring.flush()
    return items + pop_all(ring)


def oracle(present: set[int], hop: int, chunk: int, max_gap: int) -> list[tuple[object, ...]]:
    """What must come out, straight from the rules: segments first, then a grid on each."""
    order = sorted(present)
    cuts = [i for i in range(1, len(order)) if order[i] - order[i - 1] - 1 > max_gap]
    items: list[tuple[object, ...]] = []
    for begin, finish in zip([0, *cuts], [*cuts, len(order)], strict=True):
        segment = order[begin:finish]
        if begin:
            items.append(("gap", order[begin - 1] + 1, segment[0]))
        origin, last = segment[0], segment[-1]
        gap_starts = {a + 1 for a, b in itertools.pairwise(segment) if b - a > 1}
        for first in range(origin, last + 1, hop * chunk):
            frames = [range(first + f * hop, first + (f + 1) * hop) for f in range(chunk)]
            mask = [all(t in present and t <= last for t in frame) for frame in frames]
            values = [
                float(t + 1) if ok else 0.0 for frame, ok in zip(frames, mask, strict=True) for t in frame
            ]
            reached = min(chunk, (last + 1 - first) // hop)
            gaps = sum(first <= start < first + hop * chunk for start in gap_starts)
            items.append(("chunk", origin, first, tuple(mask), tuple(values), reached, gaps))
    return [*items, ("end",)]


@dataclass(frozen=True)
class Delivery:
    hop: int
    chunk: int
    reorder: int
    max_gap: int
    present: frozenset[int]
    messages: tuple[tuple[int, int], ...]


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    """A stream with holes, cut at random, delivered in any order that the window allows, with repeats."""
    hop = draw(st.integers(1, 4))
    chunk = draw(st.sampled_from([1, 2, 4]))
    reorder = draw(st.integers(0, 12))
    max_gap = draw(st.integers(0, 10))
    at = draw(st.one_of(st.just(0), st.integers(0, 40), st.just(2**63)))
    pieces: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 14))):
        n = draw(st.one_of(st.integers(1, 6), st.integers(1, 60)))
        pieces.append((at, at + n))
        at += n
        hole = draw(st.one_of(st.just(0), st.integers(0, 14), st.just(10_000)))
        at += hole
    waiting = list(pieces)
    sent: list[tuple[int, int]] = []
    head = 0
    while waiting:
        # Any piece may go next, so long as no sample of another would then be behind the window.
        allowed = [
            piece
            for piece in waiting
            if all(max(head, piece[1]) - other[0] <= reorder for other in waiting if other[0] < piece[0])
        ]
        piece = draw(st.sampled_from(allowed))
        waiting.remove(piece)
        start, stop = piece
        before = [old for old in sent if old[1] == start]
        if before and draw(st.booleans()):  # a partial repeat: it begins within what was sent
            start = draw(st.integers(before[-1][0], start))
        sent.append((start, stop))
        head = max(head, stop)
        if draw(st.booleans()):
            sent.append(draw(st.sampled_from(sent)))  # a whole repeat of anything
    present = frozenset(t for start, stop in pieces for t in range(start, stop))
    return Delivery(hop, chunk, reorder, max_gap, present, tuple(sent))


@settings(deadline=None, max_examples=400)
@given(delivery=deliveries(), eager=st.booleans())
def test_any_cutting_order_and_repetition_gives_the_chunks_of_the_rules(
    delivery: Delivery, eager: bool
) -> None:
    ring = make(delivery.hop, delivery.chunk, delivery.reorder, delivery.max_gap)
    found = run(ring, delivery.messages, eager)
    base = min(delivery.present)
    if base >= 2**24:  # float32 samples cannot count that far: compare the grid alone
        expected = oracle(set(delivery.present), delivery.hop, delivery.chunk, delivery.max_gap)
        assert [item[:4] for item in found] == [item[:4] for item in expected]
    else:
        assert found == oracle(set(delivery.present), delivery.hop, delivery.chunk, delivery.max_gap)


@settings(deadline=None, max_examples=200)
@given(
    messages=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 80)), min_size=1, max_size=20),
    eager=st.booleans(),
)
def test_whatever_comes_nothing_is_lost_count_of(messages: list[tuple[int, int]], eager: bool) -> None:
    """Any order, beyond the window too: every sample is new, repeated or late, and chunks move forward."""
    ring = make()
    sent = counted = new = 0
    last: tuple[int, int] = (-1, -1)
    for start, n in messages:
        at = start
        while at < start + n:
            pushed = ring.push(at, signal(at, start + n))
            assert pushed.taken == pushed.new + pushed.repeated + pushed.late
            counted += pushed.taken
            new += pushed.new
            at += pushed.taken
            while pushed.taken == 0 or eager:
                item = ring.pop()
                if not isinstance(item, Chunk):
                    break
                assert (item.origin, item.first_sample) > last
                last = (item.origin, item.first_sample)
                if not eager:
                    break
        sent += n
    assert counted == sent
    assert new <= len({t for start, n in messages for t in range(start, start + n)})


def test_what_was_popped_early_does_not_change_what_comes_later() -> None:
    messages = [(0, 7), (9, 12), (7, 9), (12, 30), (33, 60), (61, 62)]
    assert run(make(), messages, eager=True) == run(make(), messages, eager=False)


def test_a_whole_chunk_does_not_wait_for_the_reorder_window() -> None:
    ring = make()
    ring.push(0, signal(0, 4))
    assert isinstance(ring.pop(), Chunk)
    assert ring.pop() is None


def test_a_stream_joined_in_the_middle_waits_for_what_may_come_before() -> None:
    ring = make(reorder=4)
    ring.push(100, signal(100, 104))
    assert ring.pop() is not None  # 104 is 4 beyond 100: nothing before 100 can come
    ring = make(reorder=5)
    ring.push(100, signal(100, 104))
    assert ring.pop() is None
    assert ring.push(99, signal(99, 100)).reordered
    first = ring.pop()
    assert isinstance(first, Chunk)
    assert first.origin == 99


def test_a_gap_is_filled_only_once_it_can_no_longer_close() -> None:
    ring = make(reorder=4, max_gap=6)
    ring.push(0, signal(0, 5))
    ring.push(6, signal(6, 8))
    assert isinstance(ring.pop(), Chunk)
    assert ring.pop() is None  # sample 5 may still come
    ring.push(8, signal(8, 9))
    assert ring.pop() is None  # head is 9: 4 beyond 5
    ring.push(9, signal(9, 10))
    chunk = ring.pop()
    assert isinstance(chunk, Chunk)
    assert chunk.mask.tolist() == [False, True]
    assert chunk.filled_gaps == 1
    assert (chunk.samples[:2] == 0).all()
    late = ring.push(5, signal(5, 6))
    assert (late.late, late.new, late.repeated) == (1, 0, 0)


def test_first_arrival_wins_and_only_what_is_new_is_kept() -> None:
    ring = make()
    ring.push(0, signal(0, 3))
    pushed = ring.push(1, np.full((3, CHANNELS), 99, np.float32))
    assert (pushed.new, pushed.repeated, pushed.late, pushed.reordered) == (1, 2, 0, False)
    chunk = ring.pop()
    assert isinstance(chunk, Chunk)
    assert chunk.samples[:, 0].tolist() == [1, 2, 3, 99]
    again = ring.push(0, signal(0, 4))  # popped samples are remembered: a repeat, not late
    assert (again.repeated, again.late) == (4, 0)


def test_a_message_beyond_the_ring_waits_until_the_gap_is_popped() -> None:
    ring = make(max_gap=6)
    ring.push(0, signal(0, 5))
    assert ring.push(10**15, signal(0, 1)).taken == 0
    items = [ring.pop(), ring.pop()]
    assert [type(item) for item in items] == [Chunk, Chunk]
    assert isinstance(items[1], Chunk)
    assert items[1].mask.tolist() == [False, False]  # one sample of a hop of two
    assert ring.pop() is None  # where the gap ends is not settled yet
    assert ring.push(10**15, signal(0, 10)).taken == 10
    assert ring.pop() == Gap(5, 10**15)


def test_finish_waits_for_what_is_missing_before_the_end() -> None:
    ring = make(reorder=100)
    ring.push(0, signal(0, 2))
    ring.push(3, signal(3, 5))
    ring.finish(5)
    assert ring.pop() is None
    assert ring.finishing
    ring.push(2, signal(2, 3))
    assert [item[0] for item in pop_all(ring)] == ["chunk", "chunk", "end"]
    assert not ring.finishing


def test_capture_time_is_counted_from_the_message_that_holds_the_sample() -> None:
    ring = make(hop=1, chunk=4)
    ring.push(0, signal(0, 4), anchor=(0, 100.0))
    ring.push(4, signal(4, 6), anchor=(4, 107.0))  # the producer's clock jumped: 4 samples are 0.4 s
    ring.push(6, signal(6, 8))
    first, second = ring.pop(), ring.pop()
    assert isinstance(first, Chunk)
    assert isinstance(second, Chunk)
    assert (first.captured_start, first.captured_end) == pytest.approx((100.0, 100.4))
    assert (second.captured_start, second.captured_end) == pytest.approx((107.0, 107.4))


def test_capture_time_is_none_where_the_producer_gave_none() -> None:
    ring = make()
    ring.push(0, signal(0, 4))
    chunk = ring.pop()
    assert isinstance(chunk, Chunk)
    assert chunk.captured_end is None


def test_cut_begins_a_new_grid_at_the_next_sample() -> None:
    ring = make()
    ring.push(0, signal(0, 9))
    first = ring.pop()
    ring.cut()
    second = ring.pop()
    assert isinstance(first, Chunk)
    assert isinstance(second, Chunk)
    assert (first.origin, second.origin, second.first_sample) == (0, 4, 4)


@given(data=st.data())
def test_a_ring_that_takes_no_more_has_something_to_pop(data: st.DataObject) -> None:
    """Also behind a cut, which may come while the ring holds what follows a silence, up to its last place."""
    draw = data.draw
    ring = make(reorder=draw(st.integers(0, 6)), max_gap=draw(st.integers(0, 12)))
    at = 0
    for _ in range(draw(st.integers(1, 12))):
        at += draw(st.integers(0, 40))
        stop = at + draw(st.integers(1, 20))
        popped: Chunk | Gap | End | None = None
        idle = 0
        while at < stop:
            taken = ring.push(at, signal(at, stop)).taken
            at += taken
            if popped is not None and draw(st.booleans()):
                ring.cut()  # what it said was of no use
            popped = ring.pop()
            idle = 0 if taken or popped is not None else idle + 1
            assert idle < 3, "it takes nothing and gives nothing"


def test_history_keeps_the_newest_popped_samples_of_the_segment() -> None:
    ring = make()
    for start in range(0, 100, 4):
        ring.push(start, signal(start, start + 4))
        assert isinstance(ring.pop(), Chunk)
    start, samples, present = ring.history()
    assert start == 100 - ring.capacity
    np.testing.assert_array_equal(samples, signal(start, 100))
    assert present.all()


def test_memory_does_not_grow() -> None:
    ring = make()
    size = ring._samples.nbytes + ring._present.nbytes
    for start in range(0, 50_000, 5):
        ring.push(start, signal(start, start + 5), anchor=(start, float(start)))
        while ring.pop() is not None:
            pass
    assert ring._samples.nbytes + ring._present.nbytes == size
    assert len(ring._anchors) <= ring.capacity
