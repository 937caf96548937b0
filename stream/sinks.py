"""Where events go: Kafka; or JSON lines, to a file or standard output, flushed once per batch of events."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.errors import ConfigError, OnsetError
from stream.config import Sink
from stream.counters import Counters
from stream.events import Event
from stream.kafka_sink import KafkaSink
from stream.private_files import open_private


class EventWriter(Protocol):
    """Takes events until it is closed."""

    def write(self, events: Sequence[Event]) -> None:
        """Hand over one batch, in order; it has left the process when this returns."""
        ...

    def close(self) -> None:
        """Nothing more comes, and all went well."""
        ...


class LineWriter:
    """JSON lines into an open binary stream, which stays the caller's; `name` is for complaints."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, events: Sequence[Event]) -> None:
        """See `EventWriter.write`. Raises OnsetError when the machine refuses (a full disk)."""
        try:
            self._stream.write("".join(event.to_json() + "\n" for event in events).encode("utf-8"))
            self._stream.flush()
        except BrokenPipeError:
            raise  # the reader of a pipe has had enough: the command line ends quietly
        except OSError as problem:
            raise OnsetError(
                f"{self._name}: an event cannot be written: {problem.strerror}; events end here"
            ) from None

    def close(self) -> None:
        """See `EventWriter.close`."""
        self._stream.flush()


def standard_output() -> LineWriter:
    """Events on standard output, where nothing else is ever printed."""
    return LineWriter(sys.stdout.buffer, "standard output")


class AppendingFile(LineWriter):
    """A file that grows: what a service writes. Raises ConfigError when it cannot be opened.

    A new file is its owner's alone (mode 0600), since events say who did what and when; the mode of one
    that is there is left to whoever set it.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path, "a+b", private=True)
        super().__init__(self._file, str(path))
        # A process that was killed may have left half a line; the next event must not become a part of it.
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


class WholeFile(LineWriter):
    """A file that appears under its name once it is whole: what a finite run writes.

    Until `close` it is `NAME.partial` beside it. Devices and pipes are written directly.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._direct = path.exists() and not path.is_file()
        self._partial = path if self._direct else path.with_name(path.name + ".partial")
        self._file = _opened(self._partial, "wb")
        super().__init__(self._file, str(path))

    def close(self) -> None:
        """Close, and take the name. Raises ConfigError when that is not possible."""
        self._file.close()
        if not self._direct:
            try:
                self._partial.replace(self._path)
            except OSError as problem:
                raise ConfigError(f"{self._path}: cannot be replaced: {problem.strerror}") from None


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Iterable[EventWriter]) -> None:
        self._writers = list(writers)

    def write(self, events: Sequence[Event]) -> None:
        """See `EventWriter.write`."""
        for writer in self._writers:
            writer.write(events)

    def close(self) -> None:
        """See `EventWriter.close`."""
        for writer in self._writers:
            writer.close()


def open_sinks(sinks: Sequence[Sink], counters: Counters, patience: Callable[[], bool]) -> Writers:
    """The writers of a service's configuration; `patience`: see `KafkaSink`. Raises ConfigError."""
    return Writers(_open_sink(sink, counters, patience) for sink in sinks)


def _open_sink(sink: Sink, counters: Counters, patience: Callable[[], bool]) -> EventWriter:
    if sink.kafka is not None:
        return KafkaSink(sink.kafka, counters, patience)
    return standard_output() if sink.file is None else AppendingFile(sink.file)


def _opened(path: Path, mode: str, private: bool = False) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opener = (lambda name, flags: open_private(Path(name), flags)) if private else None
        return open(path, mode, opener=opener)  # type: ignore[return-value]
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written: {problem.strerror or problem}") from None
