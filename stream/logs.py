"""How the service logs: one entry a line, as text or as JSON, with the secrets it knows replaced.

Messages hold names that come from outside, so whatever could end a line or move a terminal's cursor is
escaped: no message can pass for another entry. Secrets are not logged on purpose anywhere; should one slip
into a message or an exception nevertheless, `hide` has told this module, and it leaves as `***`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Literal, TextIO
from urllib.parse import quote

LogFormat = Literal["text", "json"]

_hidden: set[str] = set()


def setup(format: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Log from INFO on to `stream` (default: standard error), in place of whatever was set up before."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JsonLines() if format == "json" else _TextLines("%(asctime)s %(levelname)s "))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def hide(secret: str) -> None:
    """Replace `secret` in all that is logged from now on, also where it is quoted as Python, JSON or URL."""
    forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="")}
    _hidden.update(forms - {""})


class _TextLines(logging.Formatter):
    """`TIME LEVEL MESSAGE`; the lines of an exception follow, indented, so that none looks like an entry."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        record.asctime = self.formatTime(record)
        lines = [self.formatMessage(record) + _printable(_redacted(record.getMessage()))]
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
            "message": _redacted(record.getMessage()),
        }
        trace = _trace(self, record)
        return json.dumps(fields | ({"exception": trace} if trace else {}))


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    parts += [formatter.formatStack(record.stack_info)] if record.stack_info else []
    return _redacted("\n".join(parts))


def _redacted(text: str) -> str:
    # The longest first: one secret may be a part of another.
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
