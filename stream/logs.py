"""How the service logs: one entry a line, as text or as JSON, without secrets (`engine.redaction`).

Messages hold names that come from outside, so whatever could end a line or move a terminal's cursor is
escaped: no message can pass for another entry. A log that nobody reads (a pipe that is full) holds up nobody:
what it cannot take waits in a bounded queue, and what that cannot hold is lost, and counted in the log.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections import deque
from datetime import datetime, timezone
from typing import Literal, TextIO

from engine.redaction import redacted

LogFormat = Literal["text", "json"]

# Of lines that wait for a reader; and seconds that an entry waits to be written, once: a log that is read is
# written before the program goes on.
_WAITING_LINES = 1000
_PATIENCE_SECONDS = 1.0


def setup(format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Log from INFO on to `stream` (default: standard error), in place of whatever was set up before."""
    handler = _Handler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines() if format == "json" else _TextLines("%(asctime)s %(levelname)s "))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _Handler(logging.Handler):
    """Writes in a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._changed = threading.Condition()
        self._waiting: deque[logging.LogRecord] = deque()
        self._lost = 0
        self._is_stuck = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        with self._changed:
            if len(self._waiting) >= _WAITING_LINES:
                self._lost += 1
                return
            self._waiting.append(record)
            self._changed.notify_all()
            if not self._is_stuck and threading.current_thread() is not self._thread:
                self._is_stuck = not self._changed.wait_for(lambda: not self._waiting, _PATIENCE_SECONDS)

    def close(self) -> None:
        """See `logging.Handler.close`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, _PATIENCE_SECONDS)
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                record = self._waiting[0]  # it waits until it is written
            self._write(record)
            with self._changed:
                self._waiting.popleft()
                if not self._waiting and self._lost:
                    self._waiting.append(_told(self._lost))
                    self._lost = 0
                self._is_stuck = bool(self._waiting)
                self._changed.notify_all()

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return  # closed: there is nobody to be told
        except Exception:
            self.handleError(record)


def _told(lost: int) -> logging.LogRecord:
    words = "%d lines of this log were lost: nobody read it"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, words, (lost,), None)


class _TextLines(logging.Formatter):
    """`TIME LEVEL MESSAGE`; the lines of an exception follow, indented, so that none looks like an entry."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        record.asctime = self.formatTime(record)
        lines = [self.formatMessage(record) + _printable(redacted(record.getMessage()))]
        lines += ["    " + _printable(line) for line in _trace(self, record).splitlines()]
        return "\n".join(lines)


class _JsonLines(logging.Formatter):
    """`{"ts": UTC, "level", "logger", "message"}` and, where there is one, `"exception"`: a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        fields = {
            "ts": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        trace = _trace(self, record)
        return json.dumps(fields | ({"exception": trace} if trace else {}))


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    parts += [formatter.formatStack(record.stack_info)] if record.stack_info else []
    return redacted("\n".join(parts))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
