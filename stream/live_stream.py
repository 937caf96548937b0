"""All that the runtime holds of one stream, and how it is saved and brought back.

A stream is brought back in two strides, since the state of the network is never saved. What was saved first
(`LiveStream.save`: the ring, and what came of the stream) is put in place before the message at which it was
saved; from there on the messages are given again, and the stream is `asleep`: its samples go through the
network and nothing is decided. Once the network has forgotten what came before (the bundle's receptive
field), it is in the very state it was in, bit for bit, and the tracker that was saved there is put in place.
No I/O here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.manifest import Manifest
from engine.session import Slot
from stream.ring import Chunk, End, Gap, Ring
from stream.tracker import OpenAction, Tracker
from stream.wire import Message

END_OF_STREAM = "end of stream"
# What comes of a saved stream that is none, or another bundle's.
MISFITS = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)

_SAVED = ("epoch", "floor", "reach", "seen", "chunks", "now", "captured")


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a stream stands: what is to be known of it even if nothing else is left."""

    is_open: bool
    epoch: int
    reach: int  # one past its newest sample
    life: int = 0  # another number whenever it opens again
    floor: int = 0  # samples before this one were in an earlier life
    chunks: int = 0
    actions: Sequence[OpenAction] = ()
    now: float = 0.0
    captured: float | None = None


def blank(ring: Ring, epoch: int, floor: int, seen: float) -> dict[str, Any]:
    """What `LiveStream.save` returns of a stream that has just opened, with a new ring."""
    values = dict.fromkeys(_SAVED, 0) | {"epoch": epoch, "floor": floor, "seen": seen, "captured": None}
    return values | {"ring": ring.save()}


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What a stream goes on with under another bundle; `samples` and `mask`, the newest that its old ring has
    given, are there to warm a state with."""

    ring: Ring
    adopted: Sequence[OpenAction] | None  # None: no segment is under way
    samples: NDArray[np.float32]  # [n, chunk * hop, C]
    mask: NDArray[np.bool_]  # [n, chunk]


@dataclass
class LiveStream:
    """One stream in one epoch of its producer."""

    id: str
    epoch: int
    number: int  # streams are served in order of opening
    ring: Ring
    slot: Slot
    seen: float  # when new samples came last, on the clock of whoever offers them
    floor: int = 0  # samples before this one were in an earlier life of the same epoch
    reach: int = 0  # one past the newest sample
    chunks: int = 0  # how many the ring has given
    tracker: Tracker | None = None  # None: no segment is under way
    adopted: Sequence[OpenAction] | None = None  # what the next tracker goes on with, without a new start
    asleep: bool = False  # nothing is decided: see above
    is_aligned: bool = True  # asleep, and still waiting for a frame at which a state can begin
    pending: Message | None = None  # the message of which `ring` did not take all
    offset: int = 0  # samples of it that were taken
    arrived: float = 0.0  # when it came
    dropped: int = 0  # samples that were given up unread, of which no event has told yet
    closing: bool = False  # flush the ring once it has taken `pending`
    item: Chunk | Gap | End | None = None  # what the next round does with this stream
    now: float = 0.0  # stream time of the last event, seconds
    captured: float | None = None  # the producer's clock then
    reason: str = END_OF_STREAM
    orderly: bool = True  # open actions end with the stream

    @property
    def is_settled(self) -> bool:
        """All that was offered has been digested, so that it can be saved."""
        return self.pending is None and self.item is None

    @property
    def standing(self) -> Standing:
        """What a successor has to know of it."""
        actions: Sequence[OpenAction] = () if self.tracker is None else self.tracker.open_actions
        actions = actions if self.adopted is None else self.adopted
        return Standing(
            True,
            self.epoch,
            self.reach,
            self.number,
            self.floor,
            self.chunks,
            actions,
            self.now,
            self.captured,
        )

    def save(self) -> dict[str, Any]:
        """What `restore` needs, in plain values and bytes; without tracker and network."""
        return {name: getattr(self, name) for name in _SAVED} | {"ring": self.ring.save()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become the stream that was saved, asleep. Raises ValueError, KeyError or TypeError on a misfit."""
        self.ring.restore(saved["ring"])
        for name in _SAVED:
            value = saved[name]
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number and not (name == "captured" and value is None):
                raise TypeError(f"`{name}` is no number")
            setattr(self, name, value)
        self.asleep, self.is_aligned = True, False

    def handed_over(self, ring: Ring, manifest: Manifest) -> HandedOver:
        """How it goes on with another bundle and a `ring` that is new; nothing changes before `go_on`.

        What is settled only (`is_settled`). Raises ValueError when the new ring has no room for what waits.
        """
        start, samples, present = self.ring.history()
        saved = self.ring.save()
        size, hop = manifest.chunk_samples, manifest.frame.hop
        count = len(samples) // size if start + len(samples) == saved["next"] else 0
        if saved["origin"] is not None:  # the new state's grid begins where it is warmed from
            saved["origin"] = saved["next"] - count * size
        ring.restore(saved)
        begin = len(samples) - count * size
        return HandedOver(
            ring,
            self.standing.actions if self.tracker is not None or self.adopted is not None else None,
            samples[begin:].reshape(count, size, samples.shape[1]),
            np.asarray(present[begin:].reshape(count, manifest.chunk, hop).all(axis=2)),
        )

    def go_on(self, slot: Slot, handed: HandedOver) -> None:
        """Take what was handed over, and `slot`, whose state was warmed with it."""
        self.slot, self.ring, self.adopted, self.tracker = slot, handed.ring, handed.adopted, None
        self.is_aligned = True  # its grid begins with its state
