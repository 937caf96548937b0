"""What leaves the system: events, as flat JSON objects of a fixed order of keys.

All times are seconds of the stream, counted from its first sample; `captured` is the producer's wall clock
(seconds since 1970) at the moment of `time`, where the producer gave one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

VERSION = 1

EventType = Literal[
    "action.started", "action.ended", "action.aborted", "stream.started", "stream.ended", "stream.dropped"
]


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    `time` is the stream time of emission: `start <= end <= time`, and per stream `time` never decreases.
    `start`, `end` and `score` of an ended action are final; a started action's `start` is the first estimate.
    """

    type: EventType
    stream: str
    epoch: int
    bundle: str
    time: float
    captured: float | None = None
    instance_id: str | None = None
    label: str | None = None
    start: float | None = None
    end: float | None = None
    score: float | None = None
    reason: str | None = None

    def to_json(self) -> str:
        """One line of JSON, without the fields that this type does not have."""
        fields: dict[str, str | int | float] = {
            "version": VERSION,
            "type": self.type,
            "stream": self.stream,
            "epoch": self.epoch,
        }
        rest = {
            "instance_id": self.instance_id,
            "label": self.label,
            "start": self.start,
            "end": self.end,
            "score": self.score,
            "time": self.time,
            "captured": self.captured,
            "reason": self.reason,
            "bundle": self.bundle,
        }
        fields |= {key: value for key, value in rest.items() if value is not None}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def instance_id(stream: str, epoch: int, bundle: str, label: str, start_sample: int) -> str:
    """A name for one action that a replay finds again: a hash of what makes it this action.

    The fields are joined as a JSON array, so that no two tuples of them read the same.
    """
    key = json.dumps([stream, epoch, bundle, label, start_sample], ensure_ascii=False)
    return hashlib.blake2b(key.encode("utf-8"), digest_size=12).hexdigest()
