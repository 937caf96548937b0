"""JSON lines to a file, a pipe or standard output, whole and in order, for as long as a service runs.

A descriptor may take a part of a line and refuse the rest (a full disk, a full pipe): the next attempt goes
on there. A file that was removed or renamed is made anew under its name, so that logrotate needs no signal.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import ConfigError, OnsetError
from stream.events import Event
from stream.outlet import SinkGone
from stream.private_files import open_private

# What a pipe takes without blocking once it says that it takes something.
_AT_ONCE = select.PIPE_BUF
_LOOK_SECONDS = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class LineSink:
    """Writes to one descriptor. Belongs to one thread."""

    trouble: str | None = None

    def __init__(self, name: str, descriptor: int, patience: Callable[[], bool] = lambda: True) -> None:
        """`name` is for complaints; `patience` is asked whether to go on waiting for a reader."""
        self._name, self._file, self._patience = name, descriptor, patience
        self._data, self._done = b"", 0

    def write(self, events: Sequence[Event]) -> None:
        """All of `events`; a batch that failed has to be given again, and is gone on with.

        Raises OnsetError, SinkGone when nothing will ever be taken.
        """
        if self._done == len(self._data):
            self._data, self._done = "".join(event.to_json() + "\n" for event in events).encode("utf-8"), 0
        try:
            self._prepare()
            while self._done < len(self._data):
                self._done += self._put()
        except OSError as problem:
            raise self._failure(problem) from None

    @property
    def unwritten(self) -> int:
        """Lines of the last batch that were not written whole."""
        return self._data.count(b"\n", self._done)

    def close(self, timeout: float = 0.0) -> None:
        """Nothing more comes."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _prepare(self) -> None:
        """See to it that there is a descriptor. Raises OSError."""

    def _failure(self, problem: OSError) -> OnsetError:
        if problem.errno == errno.EPIPE:
            return SinkGone(f"{self._name}: its reader has gone away")
        return OnsetError(f"{self._name}: an event cannot be written: {problem.strerror or problem}")

    def _put(self) -> int:
        poller = select.poll()
        poller.register(self._file, select.POLLOUT)
        while not poller.poll(1000 * _LOOK_SECONDS):
            if not self._patience():
                raise OnsetError(f"{self._name}: nobody reads it")
        try:
            return os.write(self._file, self._data[self._done : self._done + _AT_ONCE])
        except BlockingIOError:  # somebody else filled it
            time.sleep(_LOOK_SECONDS)
            return 0


class FileSink(LineSink):
    """A file that grows, or a named pipe."""

    def __init__(self, path: Path, patience: Callable[[], bool] = lambda: True) -> None:
        """Raises ConfigError when it cannot be opened; the reader of a pipe may come later."""
        super().__init__(str(path), -1, patience)
        self._path = path
        self._identity = (0, 0)
        try:
            self._open()
        except OSError as problem:
            if problem.errno != errno.ENXIO:
                raise ConfigError(f"{path}: cannot be written: {problem.strerror or problem}") from None

    def _prepare(self) -> None:
        if self._file >= 0 and not self._is_in_place():
            self.close()
        if self._file < 0:
            self._open()

    def _is_in_place(self) -> bool:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        is_pipe = self._path.exists() and stat.S_ISFIFO(self._path.stat().st_mode)
        # Not to block: a pipe without a reader is refused (ENXIO), not waited for.
        flags = (os.O_WRONLY if is_pipe else os.O_RDWR | os.O_APPEND | os.O_CREAT) | os.O_NONBLOCK
        # A new file is its owner's alone, since events say who did what and when; whoever made one that is
        # there has set its mode.
        self._file = open_private(self._path, flags)
        found = os.fstat(self._file)
        identity = (found.st_dev, found.st_ino)
        if identity == self._identity and not is_pipe:
            return  # it goes on where it stopped
        # Who was killed may have left half a line; the next event must not become a part of it.
        is_torn = stat.S_ISREG(found.st_mode) and found.st_size > 0
        if is_torn and os.pread(self._file, 1, found.st_size - 1) != b"\n":
            os.write(self._file, b"\n")
        self._identity = identity
        self._done = self._data.rfind(b"\n", 0, self._done) + 1

    def _failure(self, problem: OSError) -> OnsetError:
        if problem.errno not in _FULL:
            self.close()  # another attempt opens it anew
        if problem.errno in (errno.EPIPE, errno.ENXIO):
            return OnsetError(f"{self._name}: nobody reads it")
        return super()._failure(problem)


def standard_output(patience: Callable[[], bool] = lambda: True) -> LineSink:
    """Standard output, where nothing else is ever printed. Raises ConfigError when it is closed."""
    try:
        return LineSink("standard output", os.dup(sys.stdout.fileno()), patience)
    except (OSError, AttributeError):
        raise ConfigError("`stdout: true`, but standard output is closed") from None
