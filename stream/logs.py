"""How the service logs: one entry a line, as text or as JSON, without secrets (`engine.redaction`).

Messages hold names that come from outside, so whatever could end a line or move a terminal's cursor is
escaped: no message can pass for another entry.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Literal, TextIO

from engine.redaction import redacted

LogFormat = Literal["text", "json"]


def setup(format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Log from INFO on to `stream` (default: standard error), in place of whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines() if format == "json" else _TextLines("%(asctime)s %(levelname)s "))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


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
