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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, EngineError
from engine.manifest import Decoding
from engine.session import Session, Slot
from stream.config import RuntimeSettings
from stream.counters import Counters
from stream.events import Event, EventType
from stream.ring import Chunk, End, Gap, Ring
from stream.throttle import Throttle
from stream.tracker import TIME_DIGITS, Tracker
from stream.wire import Message

log = logging.getLogger(__name__)

END_OF_STREAM = "end of stream"
RESTARTED = "restarted by its producer"
IDLE = "idle"
STOPPED = "service stopped"
NOT_FINITE = "outputs are not finite"

EventSink = Callable[[Sequence[Event]], None]

# Streams that ended are remembered, so that a late message does not open them again; the oldest are dropped.
_REMEMBERED_PER_STREAM = 16


@dataclass
class _Stream:
    """All that the runtime holds of one stream in one epoch of its producer."""

    id: str
    epoch: int
    number: int  # streams are served in order of opening
    ring: Ring
    slot: Slot
    seen: float  # when new samples came last, on the runtime's clock
    floor: int = 0  # samples before this one were in an earlier life of the same epoch
    reach: int = 0  # one past the newest sample
    tracker: Tracker | None = None  # None: no segment is under way
    pending: Message | None = None  # the message of which `ring` did not take all
    offset: int = 0  # samples of it that were taken
    closing: bool = False  # flush the ring once it has taken `pending`
    item: Chunk | Gap | End | None = None  # what the next round does with this stream
    now: float = 0.0  # stream time of the last event, seconds
    captured: float | None = None  # the producer's clock then
    reason: str = END_OF_STREAM
    orderly: bool = True  # open actions end with the stream


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
        if session.capacity < settings.max_streams:
            raise EngineError(
                f"the session has {session.capacity} slots for up to {settings.max_streams} streams; "
                "open it with as many slots as `max_streams`"
            )
        self._session, self._sink, self._settings, self._clock = session, sink, settings, clock
        self.counters = counters or Counters()
        self._manifest = session.manifest
        self._decoding = decoding or session.manifest.decoding
        if misfit := self._decoding.misfit(len(session.manifest.classes)):
            raise ConfigError(misfit)
        self._rate = session.manifest.frame.sample_rate
        self._streams: dict[str, _Stream] = {}
        self._ready: dict[str, _Stream] = {}
        self._ended: OrderedDict[str, tuple[int, int]] = (
            OrderedDict()
        )  # id -> epoch, one past its last sample
        self._refused: OrderedDict[str, None] = OrderedDict()
        self._opened = 0
        self._throttle = Throttle(log, clock=clock)

    @property
    def streams(self) -> Sequence[str]:
        """The open streams, oldest first."""
        return list(self._streams)

    @property
    def has_ready(self) -> bool:
        """Whether `run_ready` has something to do."""
        return bool(self._ready)

    def ready(self, stream: str) -> bool:
        """Whether `run_ready` has something to do for this stream."""
        return stream in self._ready

    def offer(self, message: Message) -> None:
        """Take one message, whose rate and channels are the bundle's (`wire.decode` sees to that).

        Steps first, as often as needed, where the stream has not yet digested its message before this one.
        """
        self.counters.messages.inc()
        self.counters.samples.inc(len(message.samples))
        while (stream := self._streams.get(message.stream)) is not None and stream.pending is not None:
            self.run_ready()
        if stream is not None and message.epoch > stream.epoch:
            self._run_out(stream, RESTARTED, orderly=False)
            stream = None
        if stream is None:
            stream = self._open(message)
            if stream is None:
                return
        n = len(message.samples)
        if message.epoch < stream.epoch or self._beyond_end(stream, message):
            self._count_late(message, n)
            return
        skip = min(n, max(0, stream.floor - message.seq))
        if skip:
            self._count_late(message, skip)
        stream.pending, stream.offset = message, skip
        self._fill(stream)

    def run_ready(self) -> int:
        """One round: every ready stream, oldest first, by one item. Returns how many streams there were."""
        ready = sorted(self._ready.values(), key=lambda stream: stream.number)
        self._round(ready)
        return len(ready)

    def drain(self) -> None:
        """Run until nothing is ready."""
        while self.run_ready():
            pass

    def end(self, stream: str) -> None:
        """Nothing more will come of this stream: what is missing is given up. `run_ready` does the rest."""
        found = self._streams.get(stream)
        if found is not None:
            found.closing = True
            self._fill(found)

    def tick(self) -> None:
        """Look at the clock: lose the streams that fell silent, stop waiting for what does not come."""
        now = self._clock()
        for stream in list(self._streams.values()):
            quiet = now - stream.seen
            if stream.item is not None or stream.pending is not None:
                continue  # the engine is behind, not the producer
            if stream.ring.finishing and quiet > self._settings.reorder:
                self.end(stream.id)
            elif quiet > self._settings.idle_timeout:
                self.counters.streams_evicted.inc()
                self._throttle.warning("stream lost", f"{stream.id!r} sent nothing for {quiet:.1f} s")
                self._run_out(stream, IDLE, orderly=False)

    def stop(self, reason: str = STOPPED) -> None:
        """Process all that was offered, then end every stream in order; open actions end with it."""
        self.drain()
        for stream in list(self._streams.values()):
            self._run_out(stream, reason, orderly=True)

    def _open(self, message: Message) -> _Stream | None:
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
        frame = self._manifest.frame
        ring = Ring(
            frame.hop,
            self._manifest.chunk,
            frame.channels,
            self._rate,
            self._settings.reorder,
            self._settings.max_gap,
        )
        self._opened += 1
        stream = _Stream(
            message.stream, message.epoch, self._opened, ring, self._session.open(), self._clock(), floor
        )
        self._streams[stream.id] = stream
        self._refused.pop(stream.id, None)
        self.counters.open_streams.set(len(self._streams))
        return stream

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

    def _beyond_end(self, stream: _Stream, message: Message) -> bool:
        end = stream.ring.end
        return stream.ring.flushing or (end is not None and message.seq + len(message.samples) > end)

    def _count_late(self, message: Message, samples: int) -> None:
        self.counters.late.inc(samples)
        self._throttle.warning(
            "late",
            f"{message.stream!r}, epoch {message.epoch}: {samples} samples from {message.seq} on come after "
            "they were given up; a producer that starts again must send a higher epoch",
        )

    def _fill(self, stream: _Stream) -> None:
        """Move what is pending into the ring, and what is ready in the ring to where a round finds it."""
        ring = stream.ring
        if stream.item is None:
            stream.item = ring.pop()
        while (message := stream.pending) is not None:
            rest = message.samples[stream.offset :]
            if len(rest):
                anchor = None if message.time is None else (message.seq, message.time)
                pushed = ring.push(message.seq + stream.offset, rest, anchor)
                stream.offset += pushed.taken
                if pushed.new:
                    stream.seen = self._clock()
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

    def _run_out(self, stream: _Stream, reason: str, orderly: bool) -> None:
        """Process all that came of this stream, then end it."""
        if stream.ring.end is None:  # else its producer ended it, and what happens to it now is no reason
            stream.reason, stream.orderly = reason, orderly
        stream.closing = True
        while self._streams.get(stream.id) is stream:
            self._fill(stream)
            self._round([stream])

    def _round(self, streams: Iterable[_Stream]) -> None:
        events: list[Event] = []
        steps: list[tuple[_Stream, Chunk]] = []
        for stream in streams:
            item, stream.item = stream.item, None
            if isinstance(item, Chunk):
                steps.append((stream, item))
            elif isinstance(item, Gap):
                self.counters.gaps_too_long.inc()
                seconds = round((item.end - item.start) / self._rate, 3)
                self._end_segment(stream, f"gap of {seconds:g} s", False, events)
                self._renew_slot(stream)
                self._fill(stream)
            elif isinstance(item, End):
                self._close(stream, events)
        self._emit(events)
        for first in range(0, len(steps), self._settings.max_batch):
            self._step(steps[first : first + self._settings.max_batch])

    def _step(self, batch: Sequence[tuple[_Stream, Chunk]]) -> None:
        mask = np.stack([chunk.mask for _, chunk in batch])
        outputs = self._session.step(
            [stream.slot for stream, _ in batch], np.stack([chunk.samples for _, chunk in batch]), mask
        )
        self.counters.steps.inc()
        self.counters.frames.inc(mask.size)
        self.counters.masked_frames.inc(mask.size - int(np.count_nonzero(mask)))
        finite = np.ones(len(batch), dtype=np.bool_)
        for values in outputs.values():
            finite &= np.isfinite(values).reshape(len(batch), -1).all(axis=1)
        events: list[Event] = []
        for row, (stream, chunk) in enumerate(batch):
            moments = {name: values[row] for name, values in outputs.items()}
            self._track(stream, chunk, moments, bool(finite[row]), events)
            self._fill(stream)
        self._emit(events)

    def _track(
        self,
        stream: _Stream,
        chunk: Chunk,
        moments: Mapping[str, NDArray[np.float32]],
        finite: bool,
        events: list[Event],
    ) -> None:
        self.counters.gaps_filled.inc(chunk.filled_gaps)
        if stream.tracker is None:
            if not chunk.frames:
                return  # a segment without one whole frame is no time at all: it begins and ends unheard
            stream.tracker = Tracker(self._manifest, stream.id, stream.epoch, chunk.origin, self._decoding)
            stream.now, stream.captured = chunk.first_sample / self._rate, chunk.captured_start
            self.counters.epochs.inc()
            events.append(self._event("stream.started", stream, None))
        # Padding is no time of the stream: what the network says about it is not heard, so that no event lies
        # behind the last sample, nor reaches into the segment that follows.
        hop = self._manifest.frame.hop
        stream.now = (chunk.first_sample + chunk.frames * hop) / self._rate
        stream.captured = chunk.captured_end
        if not finite:
            # Values that overflow the network would stay in the state for good, so the state is given up.
            self.counters.nonfinite.inc()
            self._throttle.warning(
                NOT_FINITE, f"{stream.id!r} at {stream.now:.2f} s: are its units those of the training data?"
            )
            self._end_segment(stream, NOT_FINITE, False, events)
            self._renew_slot(stream)
            stream.ring.cut()
            return
        if chunk.frames:
            reached = {name: values[: chunk.frames] for name, values in moments.items()}
            first_frame = (chunk.first_sample - chunk.origin) // hop
            events.extend(
                stream.tracker.update(
                    reached, chunk.mask[: chunk.frames], first_frame, stream.now, stream.captured
                )
            )

    def _end_segment(self, stream: _Stream, reason: str, orderly: bool, events: list[Event]) -> None:
        if stream.tracker is None:
            return
        if orderly:
            events.extend(stream.tracker.finish(stream.now, stream.captured))
        else:
            events.extend(stream.tracker.abort(reason, stream.now, stream.captured))
        stream.tracker = None
        events.append(self._event("stream.ended", stream, reason))

    def _renew_slot(self, stream: _Stream) -> None:
        self._session.close(stream.slot)
        stream.slot = self._session.open()

    def _close(self, stream: _Stream, events: list[Event]) -> None:
        self._end_segment(stream, stream.reason, stream.orderly, events)
        self._session.close(stream.slot)
        del self._streams[stream.id]
        self._ready.pop(stream.id, None)
        self._ended[stream.id] = stream.epoch, max(stream.reach, stream.ring.end or 0)
        self._ended.move_to_end(stream.id)
        if len(self._ended) > _REMEMBERED_PER_STREAM * self._settings.max_streams:
            self._ended.popitem(last=False)
        self.counters.open_streams.set(len(self._streams))

    def _event(self, kind: EventType, stream: _Stream, reason: str | None) -> Event:
        return Event(
            type=kind,
            stream=stream.id,
            epoch=stream.epoch,
            bundle=self._manifest.id,
            time=round(stream.now, TIME_DIGITS),
            captured=None if stream.captured is None else round(stream.captured, TIME_DIGITS),
            reason=reason,
        )

    def _emit(self, events: Sequence[Event]) -> None:
        if not events:
            return
        for event in events:
            self.counters.events.labels(event.type).inc()
        self._sink(events)
