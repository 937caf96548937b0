"""Where events go: JSON lines of a finite run, to a file or standard output; and all the sinks of a service.

One sink's end is one sink's end: each has an `Outlet`, a queue and a thread of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from engine.errors import ConfigError, OnsetError
from stream import line_sink
from stream.config import Sink
from stream.counters import Counters
from stream.events import Event
from stream.kafka_sink import KafkaSink
from stream.line_sink import FileSink
from stream.outlet import Outlet

# Events that wait for a file or a reader, some kilobytes each at most; and for a disk, in front of a spool.
_WAITING_EVENTS = 16_384
_BEFORE_A_SPOOL = 256
_PATIENCE_SECONDS = 1.0


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


class Sinks:
    """All sinks of a service. Belongs to one thread."""

    def __init__(self, outlets: Iterable[Outlet], patience: Callable[[], bool]) -> None:
        """`patience` is asked, about once a second, whether to go on waiting for a sink that is full."""
        self._outlets, self._patience = list(outlets), patience

    def write(self, events: Sequence[Event]) -> None:
        """Give one batch to every sink, in order."""
        for outlet in self._outlets:
            while not outlet.put(events, _PATIENCE_SECONDS):
                if not self._patience():
                    outlet.lose(events)
                    break

    def check(self) -> None:
        """Raises OnsetError when a sink failed whose errors are to end the service, or when none is left."""
        for outlet in self._outlets:
            if outlet.failure is not None:
                raise OnsetError(f"{outlet.failure}; the service ends (`on_error: stop`)")
        if all(outlet.is_gone for outlet in self._outlets):
            raise OnsetError(f"{self.trouble()}; no sink is left, the service ends")

    def trouble(self) -> str:
        """What is wrong with sinks, in a sentence; empty where all is well."""
        return "; ".join(outlet.trouble for outlet in self._outlets if outlet.trouble is not None)

    def close(self, deadline: float) -> None:
        """Nothing more comes; the rest has to have left at `deadline` (of `time.monotonic`)."""
        for outlet in self._outlets:
            outlet.finish(deadline)
        for outlet in self._outlets:
            outlet.join()


def open_sinks(sinks: Sequence[Sink], counters: Counters, patience: Callable[[], bool]) -> Sinks:
    """The sinks of a service's configuration; `patience`: see `Sinks`. Raises ConfigError."""
    outlets: list[Outlet] = []
    try:
        outlets.extend(_open_sink(sink, counters) for sink in sinks)
    except ConfigError:
        Sinks(outlets, patience).close(time.monotonic() + _PATIENCE_SECONDS)
        raise
    return Sinks(outlets, patience)


def _open_sink(sink: Sink, counters: Counters) -> Outlet:
    stops = sink.on_error == "stop"
    if sink.kafka is not None:
        settings = sink.kafka
        # The spool drops what it cannot hold, or makes this wait.
        return Outlet(
            f"kafka:{settings.topic}",
            lambda patience: KafkaSink(settings, counters, patience),
            counters,
            _BEFORE_A_SPOOL,
            False,
            stops,
        )
    drop = sink.when_full == "drop-oldest"
    if (path := sink.file) is None:
        return Outlet("stdout", line_sink.standard_output, counters, _WAITING_EVENTS, drop, stops)
    return Outlet(
        f"file:{path}", lambda patience: FileSink(path, patience), counters, _WAITING_EVENTS, drop, stops
    )


def _opened(path: Path, mode: str) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open(mode)  # type: ignore[return-value]
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written: {problem.strerror or problem}") from None
