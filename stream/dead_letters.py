"""Where messages go that could not be read: to a file or a topic, with the reason, for a person to look at.

What comes from outside must not fill a disk or a topic either: a letter's size is bounded, the letters of a
second are, and a file is. What is not kept for that is counted, logged, and told in the letters' own place as
soon as there is room again. A disk that refuses costs letters, never the service. Knows no Kafka: the topic's
variant is handed a function that sends. Belongs to one thread.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from pydantic import Field, model_validator

from engine.errors import ConfigError
from engine.schema import Strict
from stream.counters import Counters
from stream.private_files import open_private, tighten
from stream.throttle import Throttle

log = logging.getLogger(__name__)

Origin = Mapping[str, str | int]
Headers = list[tuple[str, bytes]]
Send = Callable[[str, bytes | None, bytes, Headers], None]
"""(topic, key, value, headers) -> None; what it raises passes through `put`"""

MAX_FILE_LETTER_BYTES = 64 * 1024
# A broker refuses more than 1 MiB by default, headers and all.
MAX_KAFKA_LETTER_BYTES = 900_000
_MAX_WORDS = 1024


class DeadLetterSettings(Strict):
    """What becomes of messages that cannot be read; without a place they are counted and forgotten."""

    file: Path | None = Field(default=None, description="JSON lines, mode 0600; the full file becomes NAME.1")
    kafka_topic: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,249}$",
        description="the raw bytes, with the reason in headers",
    )
    per_second: int = Field(default=100, ge=1, le=100_000, description="letters kept; the rest is counted")
    max_bytes: int = Field(
        default=64 * 1024 * 1024, ge=1024 * 1024, description="size of the file; NAME.1 may be as large"
    )

    @model_validator(mode="after")
    def _one(self) -> DeadLetterSettings:
        if self.file is not None and self.kafka_topic is not None:
            raise ValueError("expected `file` or `kafka_topic`, found both")
        return self


class DeadLetters(Protocol):
    """Takes what could not be read until it is closed."""

    def put(self, data: bytes, reason: str, why: str, origin: Origin) -> None:
        """Keep `data`, as far as there is room. `reason` is a counter's label, `why` a sentence."""
        ...

    def close(self) -> None:
        """Nothing more comes; says what could not be said yet."""
        ...


class NoDeadLetters:
    """Counts, and keeps nothing."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def put(self, data: bytes, reason: str, why: str, origin: Origin) -> None:
        """See `DeadLetters.put`."""
        self._counters.dead_letters.labels(reason).inc()

    def close(self) -> None:
        """See `DeadLetters.close`."""


class _Quota:
    """How many letters a second holds, and what was lost, by cause, since that was last told."""

    def __init__(self, counters: Counters, per_second: int, clock: Callable[[], float]) -> None:
        self._counters, self._per_second, self._clock = counters, per_second, clock
        self._throttle = Throttle(log)
        self._second = float("-inf")
        self._taken = 0
        self._lost: Counter[str] = Counter()

    def take(self, reason: str) -> bool:
        """Count a letter; whether this second has room for it."""
        self._counters.dead_letters.labels(reason).inc()
        if self._clock() - self._second >= 1.0:
            self._second, self._taken = self._clock(), 0
        self._taken += 1
        if self._taken <= self._per_second:
            return True
        self.lose("rate", f"more than {self._per_second} came in a second")
        return False

    def lose(self, cause: str, why: str) -> None:
        """Count a letter that is not kept, and log it at a bounded rate."""
        self._lost[cause] += 1
        self._counters.dead_letters_lost.labels(cause).inc()
        self._throttle.warning(f"a dead letter is not kept ({cause})", why)

    def untold(self) -> str | None:
        """A sentence about what was lost, where something was; `told` forgets it."""
        parts = [f"{count} ({cause})" for cause, count in sorted(self._lost.items())]
        return f"letters not kept before this line: {', '.join(parts)}" if parts else None

    def told(self) -> None:
        """What was lost is known now."""
        self._lost.clear()


class FileDeadLetters:
    """JSON lines of time, reason, why, origin, size and data (base64), in a file that stays bounded.

    Data above 64 KiB is cut, and its SHA-256 told. When the file would grow beyond `max_bytes` it becomes
    `NAME.1`, in place of the one before. A line without `data` says how many letters were not kept. Both
    files are their owner's alone (mode 0600): a letter holds what somebody sent, perhaps by mistake.
    """

    def __init__(
        self,
        path: Path,
        counters: Counters,
        max_bytes: int = 64 * 1024 * 1024,
        per_second: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError when the file cannot be opened."""
        self._path, self._max_bytes = path, max_bytes
        self._quota = _Quota(counters, per_second, clock)
        self._file, self._size = -1, 0
        self._regular, self._torn = True, False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            for part in (path, Path(f"{path}.1")):
                with suppress(FileNotFoundError):
                    tighten(part)
        except OSError as problem:
            raise ConfigError(f"{path}: cannot be written: {problem.strerror or problem}") from None

    def put(self, data: bytes, reason: str, why: str, origin: Origin) -> None:
        """See `DeadLetters.put`. Raises nothing: what the disk refuses is lost, counted and logged."""
        if not self._quota.take(reason):
            return
        kept = data[:MAX_FILE_LETTER_BYTES]
        fields: dict[str, object] = {
            "time": _now(),
            "reason": reason,
            "why": why[:_MAX_WORDS],
            "origin": {key: _short(value) for key, value in origin.items()},
            "size": len(data),
        }
        if len(kept) < len(data):
            fields["sha256"] = hashlib.sha256(data).hexdigest()
        fields["data"] = base64.b64encode(kept).decode("ascii")
        try:
            self._tell()
            self._write(fields)
        except OSError as problem:
            self._quota.lose("disk", f"{self._path}: {problem.strerror or problem}")

    def close(self) -> None:
        """See `DeadLetters.close`."""
        try:
            self._tell()
        except OSError as problem:
            log.warning("%s: %s; %s", self._path, self._quota.untold(), problem.strerror or problem)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _tell(self) -> None:
        untold = self._quota.untold()
        if untold is not None:
            self._write({"time": _now(), "reason": "lost", "why": untold})
            self._quota.told()

    def _write(self, fields: Mapping[str, object]) -> None:
        """Append one line, or raise OSError."""
        line = json.dumps(fields).encode("ascii") + b"\n"
        if self._file < 0:
            self._open()  # it could not be opened again when it was full
        if self._regular and self._size and self._size + len(line) > self._max_bytes:
            os.close(self._file)
            self._file = -1
            self._path.replace(f"{self._path}.1")
            self._open()
        # A line that was cut short, by a full disk or a kill, must not swallow the next.
        if self._torn:
            self._size += os.write(self._file, b"\n")
            self._torn = False
        written = os.write(self._file, line)
        self._size += written
        if written < len(line):
            self._torn = True
            raise OSError(f"{written} of {len(line)} bytes were written")

    def _open(self) -> None:
        # Not to block: a pipe that nobody empties is one more disk that is full.
        self._file = open_private(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK)
        state = os.fstat(self._file)
        self._size, self._regular = state.st_size, stat.S_ISREG(state.st_mode)
        self._torn = self._regular and self._size > 0 and os.pread(self._file, 1, self._size - 1) != b"\n"


class KafkaDeadLetters:
    """The raw bytes as a message's value; `onset-reason`, `onset-why` and `onset-origin-*` are headers.

    Data above 900,000 bytes is cut; `onset-size` and `onset-sha256` then tell what it was. A message with an
    empty value and the reason `lost` says how many letters were not kept.
    """

    def __init__(
        self,
        topic: str,
        send: Send,
        counters: Counters,
        per_second: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topic, self._send = topic, send
        self._quota = _Quota(counters, per_second, clock)

    def put(self, data: bytes, reason: str, why: str, origin: Origin) -> None:
        """See `DeadLetters.put`. Raises what `send` raises: then a transaction around it fails as a whole."""
        if not self._quota.take(reason):
            return
        kept = data[:MAX_KAFKA_LETTER_BYTES]
        headers = _headers(reason, why)
        headers += [(f"onset-origin-{key}", _bytes(_short(value))) for key, value in origin.items()]
        if len(kept) < len(data):
            headers.append(("onset-size", _bytes(len(data))))
            headers.append(("onset-sha256", _bytes(hashlib.sha256(data).hexdigest())))
        self._tell()
        self._send(self._topic, None, kept, headers)

    def close(self) -> None:
        """See `DeadLetters.close`."""
        self._tell()

    def _tell(self) -> None:
        untold = self._quota.untold()
        if untold is not None:
            self._send(self._topic, None, b"", _headers("lost", untold))
            self._quota.told()


def open_dead_letters(
    settings: DeadLetterSettings, counters: Counters, send: Send | None = None
) -> DeadLetters:
    """The place that the settings name. Raises ConfigError where it cannot be had."""
    if settings.file is not None:
        return FileDeadLetters(settings.file, counters, settings.max_bytes, settings.per_second)
    if settings.kafka_topic is not None:
        if send is None:
            raise ConfigError(
                f"dead letters for the topic {settings.kafka_topic!r}, but nothing here talks to Kafka; "
                "give a `file` instead"
            )
        return KafkaDeadLetters(settings.kafka_topic, send, counters, settings.per_second)
    return NoDeadLetters(counters)


def _headers(reason: str, why: str) -> Headers:
    return [("onset-reason", _bytes(reason)), ("onset-why", _bytes(why[:_MAX_WORDS]))]


def _bytes(value: str | int) -> bytes:
    return str(value).encode("utf-8", "replace")


def _short(value: str | int) -> str | int:
    return value[:_MAX_WORDS] if isinstance(value, str) else value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
