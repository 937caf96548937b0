"""From candidates to events: the part that decides, and never takes back.

For each class there is at most one open action and one pending candidate for a start and for an end:

1. A start candidate is the moment's start score and time. It is announced at once when it is `confident`;
   a lesser one, above the threshold, waits up to `hold` seconds for a better one.
2. An end candidate is a segment: its end from the moment, its start from memory (the announced start of the
   open action), or from the moment's look back where no action is open. Commit rule as for starts; but before
   the class has begun to fade (`stream.course`) it is no candidate.
3. An open action that nothing ended is ended, and one that nothing announced is announced, when the course of
   its class says so: by evidence in proportion to what an action of the class usually lasts. For half of what
   it is worth, since no moment said so.
4. A segment that overlaps what was emitted is not emitted (`stream.nms`).

Invariants (tests/stream/test_tracker.py), whatever the network says and however it is decoded: every
instance is started once, then ended or aborted once, and no class starts twice at one sample of an epoch;
`start <= end <= time`; times of emission never decrease; ended segments of one class do not overlap by more
than `nms_tiou`; the state is bounded. They hold across trackers where one adopts what another left open.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Decoding, Manifest
from stream.course import GOING_ON, Course
from stream.decoder import SCORE_DIGITS, Moments, decode
from stream.events import Event, instance_id
from stream.history import History
from stream.nms import MOST, Emitted
from stream.ring import sample_of

TIME_DIGITS = 6
SWAPPED = "another bundle took over, which does not know this action"
# Of the evidence that ends an open action, the share that an end candidate needs beside its own; and how many
# times as much it takes to announce an action whose start was missed. Measured: see `trainer/README.md`.
FADING, MISSED = 0.05, 4.0
# What an action lasts where the bundle does not tell, in times of `hold`.
USUAL = 10.0
_ID_BYTES = 24  # see `instance_id`
# The least evidence that ends an action, however short it usually is, in seconds of missing probability.
LEAST = 0.1


@dataclass
class _Candidate:
    """What waits to be committed: `score`, the segment, and when it was seen, in samples."""

    score: float
    start: int
    end: int
    seen: int


@dataclass
class _Open:
    """An action that was announced and has not ended; times in samples."""

    id: str
    start: int
    score: float


class OpenAction(NamedTuple):
    """An action under way, as others may know it; `start` in samples."""

    id: str
    label: str
    start: int
    score: float


class Tracker:
    """The events of one epoch of one stream."""

    def __init__(
        self,
        manifest: Manifest,
        stream: str,
        epoch: int,
        first_sample: int,
        decoding: Decoding | None = None,
        said: int = -1,
    ) -> None:
        """`said`: up to this sample another tracker of the same epoch may have announced starts."""
        self._manifest, self._stream, self._epoch, self._origin = manifest, stream, epoch, first_sample
        self._decoding = decoding or manifest.decoding
        self._rate, self._hop = manifest.frame.sample_rate, manifest.frame.hop
        self._ahead = manifest.lookahead * self._hop
        self._start_threshold = max(self._decoding.start_threshold, self._decoding.gate)
        self._end_threshold = max(self._decoding.end_threshold, self._decoding.gate)
        self._hold = round(self._decoding.hold * self._rate)
        self._longest = max(self._hop, round(self._decoding.max_duration * self._rate))
        classes = range(len(manifest.classes))
        self._open: dict[int, _Open] = {}
        self._starts: dict[int, _Candidate] = {}
        self._ends: dict[int, _Candidate] = {}
        # What a frame says reaches back over `max_duration`, from `lookahead` before it; events are stamped
        # with the end of the chunk.
        reach = self._longest + self._ahead + manifest.chunk_samples
        self._emitted = [Emitted(reach + self._longest + 4 * self._hold + self._hop, said) for _ in classes]
        self._border = [max(first_sample - 1, said) for _ in classes]  # a start up to here is no news
        # What is said of a frame comes `lookahead` frames after it: the first answers are about frames before
        # the stream's first.
        self._history = History(
            (self._longest + self._ahead) // self._hop + 1,
            len(manifest.classes),
            first_sample - self._ahead,
            self._hop,
        )
        self._course = Course(len(manifest.classes), first_sample - self._ahead)
        usual = self._decoding.usual or tuple(USUAL * self._decoding.hold for _ in classes)
        evidence = np.maximum(LEAST, self._decoding.evidence * np.asarray(usual, np.float64))
        self._evidence = evidence * self._rate / self._hop  # in frames
        self._told: NDArray[np.float64] = np.zeros(len(manifest.classes))  # the newest frame that was there
        self._heard = first_sample - self._ahead  # up to when it is known what was going on
        self._endless: set[int] = set()  # ended by `max_duration`, and not seen to be over since

    def update(
        self,
        moments: Mapping[str, NDArray[np.float32]],
        mask: NDArray[np.bool_],
        first_frame: int,
        now: float,
        captured: float | None,
    ) -> list[Event]:
        """One step's outputs [chunk, ...] of this stream; `first_frame` counts from the epoch's first sample.

        `mask` [chunk]: which frames were there; the others say nothing, so that what goes on goes on. `now`:
        stream time of the chunk's end in seconds; `captured`: the producer's clock then.
        """
        first = self._origin + first_frame * self._hop
        decoded = decode(moments, first, self._origin, self._hop)
        for frame, is_there in enumerate(mask.tolist()):
            if is_there:
                self._told = decoded.ongoing[frame]
            else:
                decoded.ongoing[frame] = self._told
                decoded.start[frame] = decoded.end[frame] = 0.0
        self._history.add(decoded.ongoing)
        floor = min(self._start_threshold, self._end_threshold)
        spoken = np.maximum(decoded.start, decoded.end) >= floor
        events: list[Event] = []
        stamp = _Stamp(now, captured)
        for frame in range(len(decoded.now)):
            self._heard = int(decoded.now[frame]) - self._ahead
            if mask[frame] and self._heard > self._origin:  # what was before the stream is not evidence
                self._course.add(decoded.ongoing[frame], self._heard)
                # What went on unannounced, or after its forced end, is over: the next one begins anew.
                over = [label for label in self._endless if self._over(label) >= 1.0]
                for label in (*over, *np.flatnonzero(self._course.passed(self._evidence)).tolist()):
                    self._course.closed(label, self._heard)
                    self._endless.discard(label)
            goes_on = self._course.risen >= MISSED * self._evidence
            busy = np.flatnonzero(spoken[frame] | goes_on).tolist()
            for label in sorted({*busy, *self._open, *self._starts, *self._ends}):
                self._advance(label, frame, decoded, bool(goes_on[label]), stamp, events)
        return events

    def finish(self, now: float, captured: float | None) -> list[Event]:
        """An orderly end of the stream: what waits is committed, what is open ends with the stream."""
        events: list[Event] = []
        stamp = _Stamp(now, captured)
        last = round(now * self._rate)
        for label in sorted({*self._open, *self._starts, *self._ends}):
            self._commit_start(label, stamp, events)
            self._commit_end(label, stamp, events)
            if label in self._open:
                self._close(label, last, None, stamp, events)
        return events

    def abort(self, reason: str, now: float, captured: float | None) -> list[Event]:
        """The stream was lost: open actions are aborted, what waits is dropped."""
        events = []
        for label, action in sorted(self._open.items()):
            events.append(
                self._event(
                    "action.aborted",
                    label,
                    action.id,
                    _Stamp(now, captured),
                    start=action.start,
                    reason=reason,
                )
            )
        self._open.clear()
        self._starts.clear()
        self._ends.clear()
        return events

    @property
    def origin(self) -> int:
        """The first sample that it was told of."""
        return self._origin

    @property
    def open_actions(self) -> list[OpenAction]:
        """What was announced and has not ended, as far as it lies behind what has ended in its class: whoever
        goes on with it does not know that."""
        return [
            OpenAction(
                action.id,
                self._manifest.classes[label],
                max(action.start, self._emitted[label].reach),
                action.score,
            )
            for label, action in sorted(self._open.items())
        ]

    def adopt(self, actions: Iterable[OpenAction], stamp: tuple[float, float | None]) -> list[Event]:
        """Go on with what another tracker of this stream announced: another bundle's, perhaps.

        What has no class here is aborted, at `stamp` (stream time in seconds, the producer's clock).
        """
        events = []
        for action in actions:
            if action.label not in self._manifest.classes:
                event = self._event(
                    "action.aborted", 0, action.id, _Stamp(*stamp), action.start, reason=SWAPPED
                )
                events.append(replace(event, label=action.label))
                continue
            label = self._manifest.classes.index(action.label)
            self._open[label] = _Open(action.id, action.start, action.score)
            self._border[label] = max(self._border[label], action.start)
            self._course.opened(label, action.start, self._heard)
        return events

    def save(self) -> dict[str, Any]:
        """All that decides on what comes, in plain values and bytes; `max_duration` bounds its size."""
        return {
            "origin": self._origin,
            "heard": self._heard,
            "told": self._told.astype("<f8").tobytes(),
            "border": self._border,
            "endless": sorted(self._endless),
            "open": [[label, *astuple(action)] for label, action in sorted(self._open.items())],
            "starts": [[label, *astuple(found)] for label, found in sorted(self._starts.items())],
            "ends": [[label, *astuple(found)] for label, found in sorted(self._ends.items())],
            "emitted": [emitted.save() for emitted in self._emitted],
            "history": self._history.save(),
            "course": self._course.save(),
        }

    @staticmethod
    def largest_save(manifest: Manifest, decoding: Decoding) -> int:
        """Bytes that `save` takes as msgpack, at most: 9 for a number, 5 for a list beside what it holds."""
        longest = max(manifest.frame.hop, decoding.max_duration * manifest.frame.sample_rate + 1)
        frames = math.ceil(longest / manifest.frame.hop) + manifest.lookahead + 1
        emitted = 5 + (5 + 2 * 9) + MOST * (5 + 3 * 9)
        action, candidates = 5 + 3 * 9 + 5 + _ID_BYTES, 2 * (5 + 5 * 9)
        others = 8 + 9 + 9 + 6 * 9  # what is told, borders, what is endless, the course
        return 1024 + len(manifest.classes) * (2 * frames + emitted + action + candidates + others)

    @classmethod
    def restored(
        cls,
        saved: Mapping[str, Any],
        manifest: Manifest,
        stream: str,
        epoch: int,
        decoding: Decoding | None = None,
    ) -> Tracker:
        """The tracker that was saved. Raises ValueError, KeyError or TypeError when it does not fit."""
        tracker = cls(manifest, stream, epoch, sample_of(saved["origin"]), decoding)
        tracker._heard = sample_of(saved["heard"])
        tracker._told = np.frombuffer(saved["told"], "<f8").reshape(tracker._told.shape)
        if not ((tracker._told >= 0) & (tracker._told <= 1)).all():
            raise ValueError("probabilities that are none")
        tracker._endless = set(saved["endless"])
        tracker._open = {
            label: _Open(str(name), sample_of(start), float(score))
            for label, name, start, score in saved["open"]
        }
        for waiting, name in ((tracker._starts, "starts"), (tracker._ends, "ends")):
            for label, score, start, end, seen in saved[name]:
                waiting[label] = _Candidate(_score(score), sample_of(start), sample_of(end), sample_of(seen))
        for border, emitted, label in zip(
            saved["border"], saved["emitted"], range(len(tracker._border)), strict=True
        ):
            tracker._border[label] = sample_of(border)
            tracker._emitted[label].restore(emitted)
        labels = {*tracker._open, *tracker._starts, *tracker._ends, *tracker._endless}
        if not labels <= set(range(len(manifest.classes))):
            raise ValueError("a class that is none of the bundle's")
        tracker._history.restore(saved["history"])
        tracker._course.restore(saved["course"])
        return tracker

    def _advance(
        self,
        label: int,
        frame: int,
        moments: Moments,
        goes_on: bool,
        stamp: _Stamp,
        events: list[Event],
    ) -> None:
        """One frame of a class, which `goes_on` by its course."""
        now, ongoing = int(moments.now[frame]), float(moments.ongoing[frame, label])
        action = self._open.get(label)

        # An end is believed as far as the class is not going on now and was going on in between.
        at = int(moments.end_at[frame])
        score = float(moments.end[frame, label]) * (1.0 - ongoing)
        if score >= self._end_threshold and self._over(label) >= FADING:
            begin = action.start if action is not None else int(moments.end_from[frame])
            begin = max(begin, now - self._longest) if action is None else begin
            score *= self._history.mean(label, begin, at)
            if score >= self._end_threshold and self._is_new(label, begin, at):
                self._offer(self._ends, label, score, begin, at, now)
        if self._is_due(self._ends.get(label), now):
            self._commit_end(label, stamp, events)

        # A start is believed as far as the class is going on.
        at = int(moments.start_at[frame])
        score = float(moments.start[frame, label]) * ongoing
        action = self._open.get(label)
        # A much surer start takes the place of an open action that was hardly believed.
        is_free = action is None or (score >= 2.0 * action.score and at > action.start + self._hold)
        if score >= self._start_threshold and at > self._border[label] and is_free:
            self._offer(self._starts, label, score, at, at, now)
        if self._is_due(self._starts.get(label), now):
            self._commit_start(label, stamp, events)

        if label in self._starts or label in self._ends:
            return
        action = self._open.get(label)
        if action is not None:
            is_too_long = now - action.start >= self._longest
            if is_too_long or self._over(label) >= 1.0:
                end = self._course.ended(label)
                self._close(label, min(max(end, action.start + 1), now), None, stamp, events)
            if is_too_long:
                self._endless.add(label)
                self._course.opened(label, now, self._heard)
        elif goes_on and ongoing >= GOING_ON and label not in self._endless:
            self._announce_missed(label, stamp, events)

    def _over(self, label: int) -> float:
        """Evidence that what a class did is over; 1 is enough."""
        return float(self._course.fallen[label] / self._evidence[label])

    def _announce_missed(self, label: int, stamp: _Stamp, events: list[Event]) -> None:
        """Announce an action that goes on although nothing said that it started."""
        since = max(self._course.began(label), self._border[label] + 1)
        if not 0 < self._heard - since < self._longest:
            return
        score = round(0.5 * self._history.mean(label, since, self._heard), SCORE_DIGITS)
        if score >= self._start_threshold:
            self._announce(label, since, score, stamp, events)

    def _is_due(self, waiting: _Candidate | None, now: int) -> bool:
        """Is a candidate sure enough, or has it waited long enough for a better one?"""
        if waiting is None:
            return False
        return waiting.score >= self._decoding.confident or now - waiting.seen >= self._hold

    def _is_new(self, label: int, begin: int, end: int) -> bool:
        """May a segment be emitted beside those that were?"""
        long_enough = end - begin >= max(1, round(self._decoding.min_duration * self._rate))
        return long_enough and not self._emitted[label].suppresses((begin, end), self._decoding.nms_tiou)

    @staticmethod
    def _offer(
        waiting: dict[int, _Candidate], label: int, score: float, start: int, end: int, now: int
    ) -> None:
        known = waiting.get(label)
        if known is None or score > known.score:
            waiting[label] = _Candidate(score, start, end, now)

    def _commit_start(self, label: int, stamp: _Stamp, events: list[Event]) -> None:
        found = self._starts.pop(label, None)
        if found is None or found.start <= self._border[label]:
            return
        action = self._open.get(label)
        if action is not None:
            end = min(max(self._course.ended(label), action.start), found.start)
            self._close(label, end, None, stamp, events)
        self._announce(label, found.start, found.score, stamp, events)

    def _announce(self, label: int, start: int, score: float, stamp: _Stamp, events: list[Event]) -> None:
        name = self._manifest.classes[label]
        identity = instance_id(self._stream, self._epoch, self._manifest.id, name, start)
        self._open[label] = _Open(identity, start, score)
        self._endless.discard(label)
        self._course.opened(label, start, self._heard)
        self._starts.pop(label, None)
        events.append(self._event("action.started", label, identity, stamp, start=start, score=score))

    def _commit_end(self, label: int, stamp: _Stamp, events: list[Event]) -> None:
        found = self._ends.pop(label, None)
        if found is None:
            return
        action = self._open.get(label)
        if action is None or action.start != found.start:
            if action is not None or not self._is_new(label, found.start, found.end):
                return
            if self._emitted[label].announced(found.start):
                return
            self._announce(label, found.start, found.score, stamp, events)
        self._close(label, found.end, found.score, stamp, events)

    def _close(self, label: int, end: int, score: float | None, stamp: _Stamp, events: list[Event]) -> None:
        """End the open action of a class. Without an end candidate (`score` None) the score is what its start
        and its course were worth, halved, since nothing said that it ended."""
        action = self._open.pop(label)
        self._ends.pop(label, None)
        # Where it overlaps what had ended already, only what lies beyond is new.
        start, end = self._emitted[label].beyond(
            (action.start, max(end, action.start)), self._decoding.nms_tiou
        )
        if score is None:
            score = 0.5 * action.score * self._history.mean(label, start, end)
        self._border[label] = max(self._border[label], action.start, end - self._hold)
        self._emitted[label].add(action.start, (start, end), stamp.sample(self._rate))
        self._course.closed(label, self._heard)
        events.append(self._event("action.ended", label, action.id, stamp, start=start, end=end, score=score))

    def _event(
        self,
        kind: str,
        label: int,
        identity: str,
        stamp: _Stamp,
        start: int | None = None,
        end: int | None = None,
        score: float | None = None,
        reason: str | None = None,
    ) -> Event:
        def seconds(sample: int | None) -> float | None:
            return None if sample is None else round(sample / self._rate, TIME_DIGITS)

        return Event(
            type=kind,  # type: ignore[arg-type]
            stream=self._stream,
            epoch=self._epoch,
            bundle=self._manifest.id,
            time=round(stamp.now, TIME_DIGITS),
            captured=None if stamp.captured is None else round(stamp.captured, TIME_DIGITS),
            instance_id=identity,
            label=self._manifest.classes[label],
            start=seconds(start),
            end=seconds(end),
            score=None if score is None else round(score, SCORE_DIGITS),
            reason=reason,
        )


def _score(value: Any) -> float:
    """A saved probability. Raises ValueError or TypeError when it is none."""
    if not 0.0 <= (found := float(value)) <= 1.0:
        raise ValueError(f"{found} is no probability")
    return found


@dataclass(frozen=True)
class _Stamp:
    """When events are emitted."""

    now: float
    captured: float | None

    def sample(self, rate: float) -> int:
        return round(self.now * rate)
