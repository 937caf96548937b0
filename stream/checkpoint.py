"""What is written down of a stream, so that another process goes on with it: records of a compacted topic.

`Life` is small and always current: does the stream run, since which message, which actions are open? It is
enough to end what cannot be gone on with. `Mark` is written now and then: the stream as it was saved before
one message (`offset`), and its tracker as it was saved before a later one (`woken`); `stream.live_stream`
says why there are two. Both name what decided on the stream (the bundle and its settings): another one's
tracker is of no use.

Plain msgpack maps, read with bounds. No I/O here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgpack
from pydantic import Field

from engine.errors import DataError
from engine.schema import Strict
from stream.tracker import OpenAction

VERSION = 1
# Of a mark: with a hundred classes, an hour of memory at 5 frames a second takes 7 MiB at most. That it is
# never more, `stream.partition.check_marks` sees to.
MAX_RECORD_BYTES = 16 * 1024 * 1024

_LIFE, _MARK = b"life:", b"mark:"


Offset = Annotated[int, Field(ge=0, lt=2**63)]
Clock = Annotated[float, Field(ge=0)]


class Life(Strict):
    """A stream that runs, or has ended; offsets are those of the log of messages."""

    is_open: bool
    epoch: int = Field(ge=0)
    reach: int = Field(ge=0, description="one past its newest sample")
    floor: int = Field(0, ge=0, description="its samples before this one were in an earlier life")
    offset: Offset = Field(description="its messages before this one are of an earlier life")
    clock: Clock = Field(description="the log's clock there, seconds")
    maker: str = Field(description="what decided on it: bundle and settings")
    actions: tuple[OpenAction, ...] = ()
    now: float = Field(0.0, ge=0, description="stream time of its last event, seconds")
    captured: float | None = None


class Mark(Strict):
    """A stream that can be gone on with."""

    offset: Offset
    clock: Clock
    saved: dict[str, Any] = Field(description="see LiveStream.save")
    woken: Offset
    tracker: dict[str, Any] | None = Field(description="see Tracker.save; None: no segment was under way")
    maker: str


class Committed(Strict):
    """The text beside a committed offset: from where the log is to be read again, and its clock there."""

    rewind: Offset
    clock: Clock

    def to_text(self) -> str:
        """As JSON; a broker takes 4096 bytes."""
        return json.dumps({"v": VERSION, **self.model_dump()}, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Committed:
        """Raises DataError when it is none."""
        try:
            fields = json.loads(text)
            if fields.pop("v") != VERSION:
                raise ValueError("another version")
            return cls.model_validate(fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(
                f"beside a committed offset stands {text[:60]!r}, expected what Onset writes there; "
                "is this consumer group used by something else?"
            ) from None


RecordT = TypeVar("RecordT", Life, Mark)


def key_of(kind: type[Life] | type[Mark], stream: str) -> bytes:
    """The key of a record in the compacted topic."""
    return (_LIFE if kind is Life else _MARK) + stream.encode("utf-8")


def packed(record: Life | Mark) -> bytes:
    """The value of a record."""
    fields = {name: getattr(record, name) for name in type(record).model_fields}
    return bytes(msgpack.packb({"v": VERSION, **fields}))


def unpacked(kind: type[RecordT], value: bytes) -> RecordT:
    """Raises DataError when `value` is no record of that kind."""
    try:
        fields = msgpack.unpackb(
            value,
            max_bin_len=MAX_RECORD_BYTES,
            max_str_len=4096,
            max_array_len=1 << 20,
            max_map_len=64,
            max_ext_len=0,
        )
        if fields.pop("v") != VERSION:
            raise ValueError("another version")
        return kind.model_validate(fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, msgpack.UnpackException):
        raise DataError(f"not a {kind.__name__.lower()} that Onset {VERSION} has written") from None


def read_records(records: Mapping[bytes, bytes]) -> tuple[dict[str, Life], dict[str, Mark], list[str]]:
    """The lives and marks among the records of one partition, by stream, and complaints about the others."""
    lives: dict[str, Life] = {}
    marks: dict[str, Mark] = {}
    complaints = []
    for key, value in records.items():
        problem = _read_record(key, value, lives, marks)
        if problem is not None:
            complaints.append(f"{key[:80]!r}: {problem}")
    return lives, marks, complaints


def _read_record(key: bytes, value: bytes, lives: dict[str, Life], marks: dict[str, Mark]) -> str | None:
    try:
        name = key[len(_LIFE) :].decode("utf-8")
        if key.startswith(_LIFE):
            lives[name] = unpacked(Life, value)
        elif key.startswith(_MARK):
            marks[name] = unpacked(Mark, value)
        else:
            return "neither a life nor a mark"
    except (DataError, UnicodeDecodeError) as problem:
        return str(problem)
    return None
