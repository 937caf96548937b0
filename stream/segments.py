"""The segments of a stream, as events: they begin, actions start and end in them, they end.

Between the runtime, which runs the network, and the trackers, which decide. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Decoding, Manifest
from stream.events import Event, EventType
from stream.live_stream import LiveStream
from stream.ring import Chunk
from stream.tracker import TIME_DIGITS, Tracker


class Segments:
    """What one bundle says of streams."""

    def __init__(self, manifest: Manifest, decoding: Decoding) -> None:
        self._manifest, self._decoding = manifest, decoding
        self._rate = manifest.frame.sample_rate

    def restored(self, stream: LiveStream, saved: Mapping[str, Any]) -> Tracker:
        """A stream's tracker as it was saved. Raises ValueError, KeyError or TypeError on a misfit."""
        return Tracker.restored(saved, self._manifest, stream.id, stream.epoch, self._decoding)

    def advance(self, stream: LiveStream, chunk: Chunk) -> list[Event]:
        """The stream has reached the end of `chunk`; its segment begins, if none is under way."""
        events: list[Event] = []
        if stream.tracker is None and not stream.asleep:
            if not chunk.frames:
                return events  # a segment without one whole frame is no time: it begins and ends unheard
            stream.now, stream.captured = chunk.first_sample / self._rate, chunk.captured_start
            if stream.adopted is None:
                # Where an earlier life of the epoch ended, it may have announced a start.
                stream.tracker = self._new_tracker(stream, chunk.origin, stream.floor or -1)
                events.append(self._event("stream.started", stream, None))
            else:
                events += self._adopt(stream, chunk.first_sample)
        # Padding is no time of the stream: what the network says about it is not heard, so that no event lies
        # behind the last sample, nor reaches into the segment that follows.
        stream.now = (chunk.first_sample + chunk.frames * self._manifest.frame.hop) / self._rate
        stream.captured = chunk.captured_end
        return events

    def hear(
        self, stream: LiveStream, chunk: Chunk, moments: Mapping[str, NDArray[np.float32]]
    ) -> list[Event]:
        """What the network says of `chunk`: each output [chunk, ...]."""
        if not chunk.frames or stream.tracker is None:
            return []
        reached = {name: values[: chunk.frames] for name, values in moments.items()}
        first_frame = (chunk.first_sample - stream.tracker.origin) // self._manifest.frame.hop
        mask = chunk.mask[: chunk.frames]
        events = stream.tracker.update(reached, mask, first_frame, stream.now, stream.captured)
        if stream.dropped:
            reason = f"{stream.dropped} samples were dropped: the engine cannot keep up"
            events.append(self._event("stream.dropped", stream, reason))
            stream.dropped = 0
        return events

    def end(self, stream: LiveStream, reason: str, orderly: bool) -> list[Event]:
        """Its segment is over, if one is under way: open actions end with it, or are aborted."""
        events = [] if stream.adopted is None else self._adopt(stream, round(stream.now * self._rate))
        if stream.tracker is None:
            return events
        if orderly:
            events += stream.tracker.finish(stream.now, stream.captured)
        else:
            events += stream.tracker.abort(reason, stream.now, stream.captured)
        stream.tracker = None
        return [*events, self._event("stream.ended", stream, reason)]

    def _adopt(self, stream: LiveStream, first_sample: int) -> list[Event]:
        """Go on with actions that another tracker announced; to the world the stream has not begun anew."""
        stream.tracker = self._new_tracker(stream, first_sample, first_sample)
        actions, stream.adopted = stream.adopted or (), None
        return stream.tracker.adopt(actions, (stream.now, stream.captured))

    def _new_tracker(self, stream: LiveStream, first_sample: int, said: int) -> Tracker:
        return Tracker(self._manifest, stream.id, stream.epoch, first_sample, self._decoding, said)

    def _event(self, kind: EventType, stream: LiveStream, reason: str | None) -> Event:
        return Event(
            type=kind,
            stream=stream.id,
            epoch=stream.epoch,
            bundle=self._manifest.id,
            time=round(stream.now, TIME_DIGITS),
            captured=None if stream.captured is None else round(stream.captured, TIME_DIGITS),
            reason=reason,
        )
