"""The runtime: messages of many streams in, events out.

Each stream has a ring (puts samples in order), a slot (the model's state) and a tracker (decides on events).
`offer` takes a message, `run_ready` advances every stream that has something ready by one item: a chunk, a
long gap, or its end. A stream's events depend on its own samples alone: not on how they were cut into
messages, not on the other streams, not on when `run_ready` is called.

A stream holds at most its ring and one message that did not fit; whoever offers more first waits for steps.
Nothing is dropped because the engine is slow. Not thread-safe: one thread owns a runtime. No I/O here.

What ends an epoch, and what becomes of its open actions:
- "end of stream" (the producer said so, or `end`) and "service stopped": they end with the stream;
- "gap of 12.3 s", "idle", "restarted by its producer", "outputs are not finite": they are aborted.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleError, ConfigError, EngineError
from engine.manifest import Decoding, Manifest
from engine.session import Session, Slot
from stream.config import RuntimeSettings
from stream.counters import Counters
from stream.events import Event
from stream.live_stream import MISFITS, HandedOver, LiveStream, Standing, blank
from stream.ring import Chunk, End, Gap, Ring
from stream.segments import Segments
from stream.throttle import Throttle
from stream.tracker import OpenAction
from stream.wire import Message

log = logging.getLogger(__name__)

RESTARTED = "restarted by its producer"
IDLE = "idle"
STOPPED = "service stopped"
NOT_FINITE = "outputs are not finite"

EventSink = Callable[[Sequence[Event]], None]

# Streams that ended are remembered, so that a late message does not open them again; the oldest are dropped.
_REMEMBERED_PER_STREAM = 16


class Runtime:
    """Streams, scheduled over one session. `sink` is called with the events of a step, in order."""

    def __init__(
        self,
        session: Session,
        sink: EventSink,
        settings: RuntimeSettings,
        counters: Counters | None = None,
        decoding: Decoding | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`decoding` replaces the bundle's. Raises ConfigError if that does not fit its classes, EngineError
        if the session has fewer slots than `settings.max_streams`."""
        self._sink, self._settings, self._clock = sink, settings, clock
        self.counters = counters or Counters()
        self._session, self._segments = session, self._segments_of(session, decoding)
        self._rate = session.manifest.frame.sample_rate  # of whatever bundle: see `check_swap`
        self._streams: dict[str, LiveStream] = {}
        self._ready: dict[str, LiveStream] = {}
        self._ended: OrderedDict[str, tuple[int, int]] = (
            OrderedDict()
        )  # id -> epoch, one past its last sample
        self._refused: OrderedDict[str, None] = OrderedDict()
        self._opened = 0
        self._is_settling = False  # rings are emptied, and nothing is put into them
        self._throttle = Throttle(log)

    @property
    def streams(self) -> Sequence[str]:
        """The open streams, oldest first."""
        return list(self._streams)

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is used."""
        return self._session.manifest

    @property
    def rate(self) -> float:
        """Samples a second of every stream."""
        return self._rate

    def life(self, stream: str) -> int | None:
        """A number that is another whenever the stream opens again; None: it is not open."""
        found = self._streams.get(stream)
        return None if found is None else found.number

    @property
    def has_ready(self) -> bool:
        """Whether `run_ready` has something to do."""
        return bool(self._ready)

    def ready(self, stream: str) -> bool:
        """Whether `run_ready` has something to do for this stream."""
        return stream in self._ready

    def offer(self, message: Message, at: float | None = None) -> None:
        """Take one message, whose rate and channels are the bundle's (`wire.decode` sees to that).

        Steps first, as often as needed, where the stream has not yet digested its message before this one.
        `at` is when it came, where that is known better than by the clock: what a silence before it means is
        then decided here, so that a log of messages always means the same.
        """
        self.counters.messages.inc()
        self.counters.samples.inc(len(message.samples))
        while (stream := self._streams.get(message.stream)) is not None and stream.pending is not None:
            self.run_ready()
        now = self._clock() if at is None else at
        if stream is not None and at is not None:
            self._look_at(stream, at)
            stream = self._streams.get(message.stream)
        if stream is not None and message.epoch > stream.epoch:
            self._run_out(stream, RESTARTED, orderly=False)
            stream = None
        if stream is None:
            stream = self._open(message, now)
            if stream is None:
                return
        n = len(message.samples)
        if message.epoch < stream.epoch or self._beyond_end(stream, message):
            self._count_late(message, n)
            return
        skip = min(n, max(0, stream.floor - message.seq))
        if skip:
            self._count_late(message, skip)
        stream.pending, stream.offset, stream.arrived = message, skip, now
        self._fill(stream)

    def dropped(self, stream: str, samples: int) -> None:
        """Samples of a stream were given up before they were offered: its next events say so."""
        found = self._streams.get(stream)
        if found is not None:
            found.dropped += samples

    def run_ready(self) -> int:
        """One round: every ready stream, oldest first, by one item. Returns how many streams there were."""
        ready = sorted(self._ready.values(), key=lambda stream: stream.number)
        self._round(ready)
        return len(ready)

    def drain(self) -> None:
        """Run until nothing is ready."""
        while self.run_ready():
            pass

    def settle(self) -> None:
        """Run what the rings hold: some chunks a stream. What they had no room for waits until `swap`."""
        self._is_settling = True
        try:
            self.drain()
        finally:
            self._is_settling = False

    def end(self, stream: str) -> None:
        """Nothing more will come of this stream: what is missing is given up. `run_ready` does the rest."""
        found = self._streams.get(stream)
        if found is not None:
            found.closing = True
            self._fill(found)

    def tick(self, now: float | None = None, streams: Iterable[str] | None = None) -> None:
        """Look at the clock (or at `now`), for all streams or some: lose those that fell silent, stop waiting
        for what does not come."""
        now = self._clock() if now is None else now
        for name in list(self._streams if streams is None else streams):
            stream = self._streams.get(name)
            if stream is not None and stream.is_settled:  # else the engine is behind, not the producer
                self._look_at(stream, now)

    def excuse(self, stream: str, now: float) -> None:
        """Up to `now` (on the clock of `tick`) this stream was not silent, whatever had come of it."""
        found = self._streams.get(stream)
        if found is not None:
            found.seen = max(found.seen, now)

    def is_silent(self, now: float, streams: Iterable[str]) -> bool:
        """Whether `tick` has something to do with any of these."""
        found = (self._streams.get(name) for name in streams)
        return any(stream is not None and now - stream.seen > self._patience(stream) for stream in found)

    def _patience(self, stream: LiveStream) -> float:
        return self._settings.reorder if stream.ring.finishing else self._settings.idle_timeout

    def _look_at(self, stream: LiveStream, now: float) -> None:
        quiet = now - stream.seen
        if quiet <= self._patience(stream):
            return
        if stream.ring.finishing:
            stream.closing = True
            while self._streams.get(stream.id) is stream:
                self._fill(stream)
                self._round([stream])
        else:
            self.counters.streams_evicted.inc()
            self._throttle.warning("stream lost", f"{stream.id!r} sent nothing for {quiet:.1f} s")
            self._run_out(stream, IDLE, orderly=False)

    def stop(self, reason: str = STOPPED, may_go_on: Callable[[], bool] = lambda: True) -> bool:
        """Process all that was offered, then end every stream in order; open actions end with it.

        `may_go_on` is asked before each round; False: it said no, and streams are left as they are.
        """
        if not self._run_while(may_go_on):
            return False
        for stream in list(self._streams.values()):
            if stream.ring.end is None:
                stream.reason, stream.orderly = reason, True
            stream.closing = True
            self._fill(stream)
        return self._run_while(may_go_on)

    def _run_while(self, may_go_on: Callable[[], bool]) -> bool:
        while self._ready:
            if not may_go_on():
                return False
            self.run_ready()
        return True

    def standing(self, stream: str) -> Standing | None:
        """What a successor has to know of a stream; None: nothing is known of it."""
        found, ended = self._streams.get(stream), self._ended.get(stream)
        if found is not None:
            return found.standing
        return None if ended is None else Standing(False, *ended)

    def save(self, stream: str) -> dict[str, Any]:
        """What `restore` takes; all that was offered must have been digested (`drain`)."""
        return self._streams[stream].save()

    def save_tracker(self, stream: str) -> dict[str, Any] | None:
        """What `wake` takes."""
        tracker = self._streams[stream].tracker
        return None if tracker is None else tracker.save()

    def blank(self, epoch: int, floor: int, seen: float) -> dict[str, Any]:
        """What `save` returns of a stream that has just opened, and `restore` takes."""
        return blank(self._new_ring(self._session.manifest), epoch, floor, seen)

    def restore(self, stream: str, saved: Mapping[str, Any]) -> bool:
        """Put a saved stream in place, asleep: no event comes of it until `wake`. False: it found no place.

        Raises ValueError, KeyError or TypeError when what was saved does not fit this bundle.
        """
        if stream in self._streams:
            return False
        if len(self._streams) >= self._settings.max_streams:
            self._refuse(stream)
            return False
        found = self._admit(stream, saved["epoch"], saved["seen"], saved["floor"])
        try:
            found.restore(saved)
        except MISFITS:
            self.forget([stream])
            raise
        return True

    def wake(
        self, stream: str, tracker: Mapping[str, Any] | None, adopted: Sequence[OpenAction] | None = None
    ) -> None:
        """From here on events come of a restored stream: as its saved tracker would have it, or (`tracker`
        None) a new one, which goes on with the actions `adopted`, if any are given."""
        found = self._streams[stream]
        if tracker is not None:
            found.tracker = self._segments.restored(found, tracker)
        found.asleep, found.adopted = False, adopted

    def forget(self, streams: Iterable[str]) -> None:
        """Know nothing of these streams any more, without an event: somebody else goes on with them."""
        for name in streams:
            found = self._streams.pop(name, None)
            if found is not None:
                self._ready.pop(name, None)
                self._session.close(found.slot)
        self.counters.open_streams.set(len(self._streams))

    def forget_ended(self, streams: Iterable[str]) -> None:
        """The same of streams that have ended."""
        for name in streams:
            self._ended.pop(name, None)

    def remember_ended(self, stream: str, epoch: int, reach: int) -> None:
        """A stream ended there: what comes late of it does not open it again."""
        self._ended[stream] = epoch, reach
        self._ended.move_to_end(stream)
        if len(self._ended) > _REMEMBERED_PER_STREAM * self._settings.max_streams:
            self._ended.popitem(last=False)

    def swap(
        self, session: Session, decoding: Decoding | None = None, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Go on with another bundle: open actions go on as far as it knows their classes, no sample is lost.

        What the rings hold is digested first (`settle`). The new states are warmed with the newest samples,
        as far back as the rings reach; `beat` is called between two streams, since that takes its time. All
        or nothing: whatever is raised then (BundleError when it was made for other streams, what the
        constructor raises, anything that `session` raises), the streams go on with the old bundle as if
        nothing had been tried, and hold no slot of `session`.
        """
        self.settle()
        try:
            self._swap(session, decoding, beat)
        finally:
            for stream in list(self._streams.values()):
                self._fill(stream)  # what waited; and of a smaller chunk some may be complete by now
        self.counters.bundle_swaps.inc()

    def _swap(self, session: Session, decoding: Decoding | None, beat: Callable[[], None]) -> None:
        self.check_swap(session)
        segments = self._segments_of(session, decoding)
        slots: list[Slot] = []
        handed: list[HandedOver] = []
        try:
            for stream in self._streams.values():
                beat()
                slots.append(session.open())
                handed.append(stream.handed_over(self._new_ring(session.manifest), session.manifest))
                for samples, mask in zip(handed[-1].samples, handed[-1].mask, strict=True):
                    session.step([slots[-1]], samples[None], mask[None])
        except BaseException:
            for slot in slots:
                with suppress(Exception):  # what failed may fail again
                    session.close(slot)
            raise
        previous, self._session, self._segments = self._session, session, segments
        for stream, slot, found in zip(list(self._streams.values()), slots, handed, strict=True):
            with suppress(Exception):  # nobody uses it any more
                previous.close(stream.slot)
            stream.go_on(slot, found)

    def check_swap(self, session: Session) -> None:
        """Raises BundleError when the streams that are open are not those that its bundle was made for."""
        old, new = self._session.manifest, session.manifest
        fits = (new.frame.sample_rate, new.frame.channels) == (old.frame.sample_rate, old.frame.channels)
        if not fits or old.chunk_samples > 2 * new.chunk_samples:
            raise BundleError(
                f"{new.id} takes {new.chunk_samples} samples of {new.frame.channels} channels a step, at "
                f"{new.frame.sample_rate:g} Hz; the open streams come in {old.chunk_samples} of "
                f"{old.frame.channels} at {old.frame.sample_rate:g} Hz: start another service for it"
            )

    def _segments_of(self, session: Session, decoding: Decoding | None) -> Segments:
        """What `session` says of streams. Raises what the constructor does."""
        if session.capacity < self._settings.max_streams:
            raise EngineError(
                f"the session has {session.capacity} slots for up to {self._settings.max_streams} streams; "
                "open it with as many slots as `max_streams`"
            )
        manifest = session.manifest
        decoding = decoding or manifest.decoding
        if misfit := decoding.misfit(len(manifest.classes)):
            raise ConfigError(misfit)
        return Segments(manifest, decoding)

    def _open(self, message: Message, now: float) -> LiveStream | None:
        """A place for the stream of this message; None where it has none or needs none."""
        floor = 0
        ended = self._ended.get(message.stream)
        if ended is not None:
            epoch, reach = ended
            if message.epoch < epoch or (
                message.epoch == epoch and message.seq + len(message.samples) <= reach
            ):
                self._count_late(message, len(message.samples))
                return None
            floor = reach if message.epoch == epoch else 0
        if not len(message.samples):
            return None  # the end of a stream of which nothing is open
        if len(self._streams) >= self._settings.max_streams:
            self._refuse(message.stream)
            return None
        return self._admit(message.stream, message.epoch, now, floor)

    def _admit(self, name: str, epoch: int, now: float, floor: int) -> LiveStream:
        self._opened += 1
        ring = self._new_ring(self._session.manifest)
        stream = LiveStream(name, epoch, self._opened, ring, self._session.open(), now, floor)
        self._streams[name] = stream
        self._refused.pop(name, None)
        self.counters.open_streams.set(len(self._streams))
        return stream

    def _new_ring(self, manifest: Manifest) -> Ring:
        frame, settings = manifest.frame, self._settings
        return Ring(frame.hop, manifest.chunk, frame.channels, self._rate, settings.reorder, settings.max_gap)

    def _refuse(self, stream: str) -> None:
        self.counters.refused.labels("max_streams").inc()
        if stream not in self._refused:
            self.counters.streams_refused.inc()
            self._refused[stream] = None
            if len(self._refused) > self._settings.max_streams:
                self._refused.popitem(last=False)
        self._throttle.warning(
            "max_streams",
            f"{stream!r} is refused, {self._settings.max_streams} streams are open; raise `max_streams`",
        )

    def _beyond_end(self, stream: LiveStream, message: Message) -> bool:
        end = stream.ring.end
        return stream.ring.flushing or (end is not None and message.seq + len(message.samples) > end)

    def _count_late(self, message: Message, samples: int) -> None:
        self.counters.late.inc(samples)
        self._throttle.warning(
            "late",
            f"{message.stream!r}, epoch {message.epoch}: {samples} samples from {message.seq} on come after "
            "they were given up; a producer that starts again must send a higher epoch",
        )

    def _fill(self, stream: LiveStream) -> None:
        """Move what is pending into the ring, and what is ready in the ring to where a round finds it."""
        ring = stream.ring
        if stream.item is None:
            stream.item = ring.pop()
        while (message := stream.pending) is not None and not self._is_settling:
            rest = message.samples[stream.offset :]
            if len(rest):
                anchor = None if message.time is None else (message.seq, message.time)
                pushed = ring.push(message.seq + stream.offset, rest, anchor)
                stream.offset += pushed.taken
                if pushed.new:
                    stream.seen = stream.arrived
                    stream.reach = max(stream.reach, message.seq + stream.offset)
                self.counters.repeated.inc(pushed.repeated)
                if pushed.late:
                    self._count_late(message, pushed.late)
                if pushed.reordered:
                    self.counters.reordered.inc()
            if stream.offset >= len(message.samples):
                stream.pending = None
                if message.end:
                    ring.finish(message.seq + len(message.samples))
            elif stream.item is not None:
                break  # the ring is full: a step makes room
            if stream.item is None:
                stream.item = ring.pop()
        if stream.closing and stream.pending is None:
            ring.flush()
        if stream.item is None:
            stream.item = ring.pop()
        if stream.item is not None:
            self._ready[stream.id] = stream
        else:
            self._ready.pop(stream.id, None)

    def _run_out(self, stream: LiveStream, reason: str, orderly: bool) -> None:
        """Process all that came of this stream, then end it."""
        if stream.ring.end is None:  # else its producer ended it, and what happens to it now is no reason
            stream.reason, stream.orderly = reason, orderly
        stream.closing = True
        while self._streams.get(stream.id) is stream:
            self._fill(stream)
            self._round([stream])

    def _round(self, streams: Iterable[LiveStream]) -> None:
        events: list[Event] = []
        steps: list[tuple[LiveStream, Chunk]] = []
        for stream in streams:
            item, stream.item = stream.item, None
            if isinstance(item, Chunk):
                stream.chunks += 1
                if self._can_begin(stream, item):
                    steps.append((stream, item))
                else:
                    self._fill(stream)
            elif isinstance(item, Gap):
                self.counters.gaps_too_long.inc()
                seconds = round((item.end - item.start) / self._rate, 3)
                events += self._segments.end(stream, f"gap of {seconds:g} s", orderly=False)
                self._renew_slot(stream)
                self._fill(stream)
            elif isinstance(item, End):
                events += self._close(stream)
        self._emit(events)
        for first in range(0, len(steps), self._settings.max_batch):
            self._step(steps[first : first + self._settings.max_batch])

    def _can_begin(self, stream: LiveStream, chunk: Chunk) -> bool:
        """The grids of all levels meet in it: a state of zeros, as a slot is given, is right there."""
        if not stream.is_aligned:
            manifest = self._session.manifest
            frame = (chunk.first_sample - chunk.origin) // manifest.frame.hop
            stream.is_aligned = frame % manifest.period == 0
        return stream.is_aligned

    def _step(self, batch: Sequence[tuple[LiveStream, Chunk]]) -> None:
        mask = np.stack([chunk.mask for _, chunk in batch])
        started = time.perf_counter()
        outputs = self._session.step(
            [stream.slot for stream, _ in batch], np.stack([chunk.samples for _, chunk in batch]), mask
        )
        self.counters.step_seconds.observe(time.perf_counter() - started)
        self.counters.batch_streams.observe(len(batch))
        self.counters.steps.inc()
        self.counters.frames.inc(mask.size)
        self.counters.masked_frames.inc(mask.size - int(np.count_nonzero(mask)))
        finite = np.ones(len(batch), dtype=np.bool_)
        for values in outputs.values():
            finite &= np.isfinite(values).reshape(len(batch), -1).all(axis=1)
        events: list[Event] = []
        for row, (stream, chunk) in enumerate(batch):
            moments = {name: values[row] for name, values in outputs.items()}
            events += self._track(stream, chunk, moments, bool(finite[row]))
            self._fill(stream)
        self._emit(events)

    def _track(
        self, stream: LiveStream, chunk: Chunk, moments: Mapping[str, NDArray[np.float32]], finite: bool
    ) -> list[Event]:
        self.counters.gaps_filled.inc(chunk.filled_gaps)
        events = self._segments.advance(stream, chunk)
        if finite:
            return events + self._segments.hear(stream, chunk, moments)
        # Values that overflow the network would stay in the state for good, so the state is given up.
        self.counters.nonfinite.inc()
        self._throttle.warning(
            NOT_FINITE, f"{stream.id!r} at {stream.now:.2f} s: are its units those of the training data?"
        )
        self._renew_slot(stream)
        stream.ring.cut()
        return events + self._segments.end(stream, NOT_FINITE, orderly=False)

    def _renew_slot(self, stream: LiveStream) -> None:
        self._session.close(stream.slot)
        stream.slot = self._session.open()

    def _close(self, stream: LiveStream) -> list[Event]:
        events = self._segments.end(stream, stream.reason, stream.orderly)
        self._session.close(stream.slot)
        del self._streams[stream.id]
        self._ready.pop(stream.id, None)
        self.remember_ended(stream.id, stream.epoch, max(stream.reach, stream.ring.end or 0))
        self.counters.open_streams.set(len(self._streams))
        return events

    def _emit(self, events: Sequence[Event]) -> None:
        if not events:
            return
        for event in events:
            self.counters.events.labels(event.type).inc()
            if event.type == "stream.started":
                self.counters.epochs.inc()
            if event.label is not None:
                self.counters.actions.labels(event.type, event.label).inc()
        self._sink(events)
