"""The ring buffer of one stream: samples in any order in, whole chunks on the stream's grid out.

A sample is known by `seq`, its index since the epoch's first sample. The ring puts reordered samples in
order, drops repeats, fills short gaps with masked frames and cuts the stream in two at long ones. What comes
out depends on which samples came and in what order they did, never on how they were cut into messages nor on
when they were popped; within the reorder window it does not depend on the order either.

The rules, with R = reorder window, G = largest gap to fill, head = one past the newest sample:
- a missing sample is given up once head is more than R beyond it (`seq < head - R`), or on `flush`;
- a run of missing samples that has been given up is masked if it is at most G long; a longer one ends the
  segment, and the next segment, with a grid of its own, begins at the first sample behind it;
- a segment begins at the first sample before which nothing can come any more: at `seq` 0 at once, in the
  middle of a stream once R has passed.

Pure: no clock, no I/O, memory fixed at construction.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


# Anchors that a ring holds at most, or one or two more. They tell when a sample was captured; some are
# enough: of a cell of so many samples, the first message's counts.
_ANCHORS = 4096

# No stream comes so far (`wire.decode`), and sums of such numbers fit into 64 bits.
_FURTHEST = 2**60

# The fields of a ring that are plain values, and make up its state together with samples and anchors.
_SAVED = (
    "head",
    "next",
    "given_up",
    "origin",
    "history_start",
    "broken",
    "after_gap",
    "end",
    "flushing",
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step takes. `first_sample` is the `seq` of its first sample, `origin` its segment's."""

    samples: FloatArray
    """[chunk * hop, C]; zero where `mask` is False"""
    mask: BoolArray
    """[chunk]; a frame counts only if all of its samples are there"""
    first_sample: int
    origin: int
    frames: int
    """frames that the stream reached in full; those behind are padding at the end of a segment"""
    filled_gaps: int
    """gaps that begin in this chunk and were filled; padding at the end is none"""
    captured_start: float | None
    """the producer's wall clock at the chunk's first sample, seconds since 1970; None if it never told"""
    captured_end: float | None
    """the same at the end of `frames`, one sample's time after the last sample"""


@dataclass(frozen=True, slots=True)
class Gap:
    """A run of missing samples [start, end) too long to fill: one segment is over, another begins."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class End:
    """After `flush` or `finish`: nothing is left."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of a push; all but `reordered` are numbers of samples."""

    taken: int
    """samples dealt with, counted from the front; the rest did not fit: pop, then push them again, also when
    there was nothing to pop (a segment that ends in a gap leaves the ring free to move on)"""
    new: int
    repeated: int
    late: int
    reordered: bool
    """something new went in front of something older"""


class Ring:
    """The ring buffer of one stream in one epoch of its producer."""

    def __init__(
        self, hop: int, chunk: int, channels: int, rate: float, reorder: float, max_gap: float
    ) -> None:
        """`hop` samples a frame, `chunk` frames a step, `rate` in Hz, `reorder` and `max_gap` in seconds."""
        self._hop = hop
        self._frames = chunk
        self._chunk = chunk * hop
        self._rate = rate
        self._reorder = round(reorder * rate)
        self._max_gap = round(max_gap * rate)
        self.capacity = capacity(self._chunk, rate, reorder, max_gap)
        self._cell = -(-self.capacity // _ANCHORS)
        self._samples: FloatArray = np.zeros((self.capacity, channels), dtype=np.float32)
        self._present: BoolArray = np.zeros(self.capacity, dtype=np.bool_)
        self._offsets = np.arange(self._chunk)
        self._head: int | None = None  # one past the newest sample, None before the first
        self._next = 0  # where the next chunk begins; without an origin, the earliest sample to be kept
        self._given_up = 0  # what is missing below is missing for good
        self._origin: int | None = None  # of the segment under way
        self._history_start = 0
        self._broken: int | None = None  # where a segment ended in a gap whose end is not settled yet
        self._after_gap = False  # the sample before `_next` was missing
        self._end: int | None = None  # where the producer says the stream ends
        self._flushing = False
        self._anchors: list[tuple[int, float]] = []  # (seq, capture time) of messages, in order of seq

    def push(self, seq: int, samples: FloatArray, anchor: tuple[int, float] | None = None) -> Pushed:
        """Take `samples` [n, C], the first of which is number `seq`; their memory is not kept.

        `anchor` is the (seq, capture time) of the message that they are a part of.
        """
        n = len(samples)
        if self._head is None:
            self._head = seq
            self._next = max(0, seq - self._reorder)
        elif self._origin is None and self._head <= self._next:
            self._next = max(self._next, seq - self._reorder)  # nothing is held: the window is free to move
        elif self._origin is None:
            # Behind a cut, what is held may begin far off; what is given up before it takes no room.
            self._next = max(self._next, min(self._first_present(self._next, self._head), self._given_up))
        stop = min(seq + n, self._next + self.capacity)
        if stop <= seq:
            if n:
                self._given_up = max(self._given_up, seq + 1 - max(1, self._reorder))
            return Pushed(taken=0, new=0, repeated=0, late=0, reordered=False)
        floor = max(self._next, self._given_up)
        start = min(max(seq, floor), stop)
        repeated = self._count_present(seq, start)
        late = start - seq - repeated
        head = self._head
        if stop > head:
            self._forget(max(head, stop - self.capacity), stop)
        slots = self._slots(start, stop)
        fresh = ~self._present[slots]
        new = int(np.count_nonzero(fresh))
        repeated += stop - start - new
        if new:
            rows = samples[start - seq : stop - seq]
            self._samples[slots[fresh]] = rows[fresh]
            self._present[slots] = True
            self._head = max(head, stop)
            self._given_up = max(self._given_up, self._head - self._reorder)
            if anchor is not None:
                self._anchor(anchor)
        reordered = new > 0 and start + int(np.argmax(fresh)) < head
        return Pushed(stop - seq, new, repeated, late, reordered)

    def pop(self) -> Chunk | Gap | End | None:
        """The next chunk, or the long gap that comes before it, or the end; None: wait for more."""
        if self._end is not None and not self._flushing and self._complete(self._end):
            self._flushing = True
        if self._origin is None:
            if not self._settle():
                return End() if self._flushing else None
            if self._broken is not None:
                gap = Gap(self._broken, self._next)
                self._broken = None
                return gap
        return self._pop_chunk()

    def flush(self) -> None:
        """Nothing more will come: give up what is missing, pad the last chunk with masked frames."""
        self._flushing = True

    def finish(self, end: int) -> None:
        """The producer says that the stream ends before sample `end`: flush once all before it is there."""
        self._end = end

    @property
    def end(self) -> int | None:
        """Where the producer said that the stream ends, or None."""
        return self._end

    @property
    def flushing(self) -> bool:
        """Nothing more is expected."""
        return self._flushing

    @property
    def finishing(self) -> bool:
        """`finish` was called, and something before the end may still come."""
        return self._end is not None and not self._flushing

    def save(self) -> dict[str, Any]:
        """All that the ring holds and what it still waits for, in plain values and bytes.

        Popped samples are left out: nothing asks for them again but `history`, and counting repeats.
        """
        values = {name: getattr(self, f"_{name}") for name in _SAVED}
        stop = self._next if self._head is None else max(self._next, self._head)
        slots = self._slots(self._next, min(stop, self._next + self.capacity))
        present = self._present[slots]
        return values | {
            "anchors": [list(anchor) for anchor in self._anchors],
            "present": present.tobytes(),
            "samples": self._samples[slots[present]].astype("<f4").tobytes(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become the ring that was saved. Raises ValueError when it was one of another shape."""
        present = np.frombuffer(saved["present"], np.bool_)
        samples = np.frombuffer(saved["samples"], "<f4")
        channels = self._samples.shape[1]
        if len(present) > self.capacity or len(samples) != np.count_nonzero(present) * channels:
            raise ValueError(f"a ring of other channels or capacity than {channels} and {self.capacity}")
        for name in _SAVED:
            if not isinstance(saved[name], (bool, type(None))):
                sample_of(saved[name])
            setattr(self, f"_{name}", saved[name])
        self._anchors = [(sample_of(seq), float(time)) for seq, time in saved["anchors"]]
        if not np.isfinite([time for _, time in self._anchors]).all():
            raise ValueError("a time that is none")
        slots = self._slots(self._next, self._next + len(present))
        self._present[slots] = present
        self._samples[slots[present]] = samples.reshape(-1, channels)
        self._history_start = max(self._history_start, self._next)

    def cut(self) -> None:
        """End the segment behind the last popped chunk; another begins at the next sample."""
        self._origin = None
        self._broken = None

    def history(self) -> tuple[int, FloatArray, BoolArray]:
        """The newest popped samples of this segment, as far as the capacity reaches.

        Returns (seq of the first, samples [n, C], which of them are there [n]): copies.
        """
        if self._head is None or self._origin is None:
            return self._next, self._samples[:0].copy(), self._present[:0].copy()
        start = max(self._history_start, self._head - self.capacity)
        stop = max(start, min(self._next, self._head))
        slots = self._slots(start, stop)
        present = self._present[slots]
        return start, np.where(present[:, None], self._samples[slots], np.float32(0)), present

    def _pop_chunk(self) -> Chunk | End | Gap | None:
        assert self._head is not None
        assert self._origin is not None
        origin = self._origin
        start, stop = self._next, self._next + self._chunk
        head = self._head
        slots = (start % self.capacity + self._offsets) % self.capacity
        # Rows at or beyond head hold samples of a round before, or none.
        present = self._present[slots] & (self._offsets < head - start)
        gaps = 0
        frames = self._frames
        after_gap = False
        cut = False
        if not present.all():
            given_up = head if self._flushing else self._given_up
            after_gap = self._after_gap
            at = start  # all before `at` is decided
            while at < stop and not cut:
                rest = present[at - start :]
                if rest.all():
                    after_gap = False
                    break
                missing = at + int(np.argmin(rest))
                if missing > at:
                    after_gap = False
                if missing >= head and self._flushing:
                    if missing == start:
                        self._origin = None
                        return End()
                    frames = (head - start) // self._hop
                    break
                # Nothing there behind `missing`, yet given up: what comes next is beyond the ring (see push).
                if missing >= max(head, given_up):
                    return None
                found = self._first_present(missing, head)
                if min(given_up, found) - missing > self._max_gap:
                    cut = True  # too long: the segment ends at `missing`
                    self._broken = missing
                    self._next = min(given_up, found)
                    present[missing - start :] = False
                    frames = (missing - start) // self._hop
                    break
                if found - missing > self._max_gap or given_up < min(found, stop):
                    return None  # some of it may still come
                gaps += not after_gap
                after_gap = True
                at = found
            if cut and self._broken == start:
                self._origin = None
                return self.pop()
        mask: BoolArray = np.all(present.reshape(self._frames, self._hop), axis=1)
        samples = self._samples[slots]
        samples[~np.repeat(mask, self._hop)] = 0
        # The end is told from the last sample: the message behind it may or may not have come by now.
        captured_start = captured_end = self._captured(start)
        if frames:
            last = self._captured(start + frames * self._hop - 1)
            captured_end = None if last is None else last + 1 / self._rate
        chunk = Chunk(samples, mask, start, origin, frames, gaps, captured_start, captured_end)
        if cut:
            self._origin = None
        else:
            self._next = stop
            self._after_gap = after_gap
        passed = bisect_right(self._anchors, (min(self._next, stop) - 1, float("inf")))
        if passed > 1:
            del self._anchors[: passed - 1]
        return chunk

    def _anchor(self, anchor: tuple[int, float]) -> None:
        """Remember when a message was captured, unless its cell has an earlier one."""
        cell = anchor[0] // self._cell
        at = bisect_left(self._anchors, (cell * self._cell,))
        if at == len(self._anchors) or self._anchors[at][0] // self._cell != cell:
            self._anchors.insert(at, anchor)
        else:
            # Of one sample's the latest, as of two messages that both begin there.
            self._anchors[at] = min(self._anchors[at], anchor, key=lambda known: (known[0], -known[1]))

    def _captured(self, seq: int) -> float | None:
        """Linear, at the nominal rate, from the latest message that begins at or before `seq`."""
        found = bisect_right(self._anchors, (seq, float("inf")))
        if not found:
            return None
        start, time = self._anchors[found - 1]
        return time + (seq - start) / self._rate

    def _settle(self) -> bool:
        """Begin a segment at the first sample that is there, once nothing can come before it."""
        if self._head is None or self._head <= self._next:
            return False
        first = self._first_present(self._next, self._head)
        if first >= self._head:
            return False
        if not (self._flushing or first == self._next or self._given_up >= first):
            return False
        self._origin = self._next = self._history_start = first
        self._after_gap = False
        return True

    def _complete(self, end: int) -> bool:
        """Whether everything from the next sample to `end` is there."""
        if self._head is None:
            return True
        if self._head < end:
            return False
        if self._next >= self._head:
            return True
        return bool(self._present[self._slots(self._next, self._head)].all())

    def _first_present(self, start: int, stop: int) -> int:
        """The first sample of [start, stop) that is there; a seq beyond the ring when there is none."""
        stop = min(stop, self._next + self.capacity)
        present = self._present[self._slots(start, stop)]
        return start + int(np.argmax(present)) if present.any() else self._next + self.capacity

    def _count_present(self, start: int, stop: int) -> int:
        """How many of the samples [start, stop) are still remembered to have come."""
        assert self._head is not None
        start, stop = max(start, self._head - self.capacity), min(stop, self._head)
        return int(np.count_nonzero(self._present[self._slots(start, stop)])) if start < stop else 0

    def _forget(self, start: int, stop: int) -> None:
        self._present[self._slots(start, stop)] = False

    def _slots(self, start: int, stop: int) -> NDArray[np.intp]:
        # seq may be beyond int64, so it is reduced before numpy sees it
        return (start % self.capacity + np.arange(max(0, stop - start))) % self.capacity


def sample_of(value: Any) -> int:
    """A number of a sample that was saved. Raises TypeError or ValueError when it is none."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r:.40} is no whole number")
    if abs(value) > _FURTHEST:
        raise ValueError(f"{value} is no number of a sample")
    return value


def capacity(chunk: int, rate: float, reorder: float, max_gap: float) -> int:
    """Samples that a ring has room for; `chunk` in samples, `rate` in Hz, the others in seconds.

    Whatever is pushed, a ring that takes no more has something to pop: a chunk in which everything is there
    or given up (chunk + reorder), also when a gap runs through it (+ max_gap). The second reorder is for a
    segment that waits for its origin, the second chunk for arrivals during a step.
    """
    return 2 * chunk + 2 * round(reorder * rate) + round(max_gap * rate) + 1


def largest_save(capacity: int, channels: int) -> int:
    """Bytes that `Ring.save` takes as msgpack, at most."""
    return 1024 + capacity * (1 + 4 * channels) + (min(capacity, _ANCHORS) + 2) * (5 + 2 * 9)
