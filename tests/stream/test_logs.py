"""The log of a service: one entry a line, whatever a message holds, and no secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import redaction
from stream import logs
from stream.logs import LogFormat

log = logging.getLogger("stream.somewhere")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(redaction, "_hidden", redaction.Hidden())
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # pytest's own, which `setup` would close
    yield
    root.handlers[:], root.level = handlers, level


def written(format: LogFormat, message: str, *values: object, fault: Exception | None = None) -> str:
    """What one entry becomes."""
    stream = io.StringIO()
    logs.setup(format, stream)
    log.warning(message, *values, exc_info=fault)
    return stream.getvalue()


def raised(words: str) -> Exception:
    try:
        raise ValueError(words)
    except ValueError as fault:
        return fault


def test_text_is_time_level_and_message() -> None:
    line = written("text", "ready: listening on %s", "tcp://127.0.0.1:5555")
    stamp, _, rest = line.partition(" WARNING ")
    datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f")
    assert rest == "ready: listening on tcp://127.0.0.1:5555\n"


def test_json_is_one_object_a_line_with_its_time_in_utc() -> None:
    entry = json.loads(written("json", "%d streams", 3))
    assert list(entry) == ["ts", "level", "logger", "message"]
    assert (entry["level"], entry["logger"], entry["message"]) == ("WARNING", "stream.somewhere", "3 streams")
    time = datetime.fromisoformat(entry["ts"])
    assert time.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - time) < timedelta(minutes=1)


def test_an_exception_comes_with_its_traceback() -> None:
    entry = json.loads(written("json", "it failed", fault=raised("a reason")))
    assert entry["message"] == "it failed"
    assert entry["exception"].startswith("Traceback")
    assert entry["exception"].endswith("ValueError: a reason")
    text = written("text", "it failed", fault=raised("a reason"))
    assert text.endswith("\n    ValueError: a reason\n")


@given(st.text())
def test_no_message_can_pass_for_two(words: str) -> None:
    line = written("json", "stream %s", words)
    assert line.count("\n") == 1
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == f"stream {words}"
    text = written("text", "stream %s", words)
    assert len(text.splitlines()) == 1
    assert text[:-1].isprintable()


def test_what_moves_a_cursor_is_shown_and_not_done() -> None:
    forged = "a\r\n2026-01-01 00:00:00,000 INFO ready\x1b[2J\u202e\x85"
    expected = "a\\r\\n2026-01-01 00:00:00,000 INFO ready\\x1b[2J\\u202e\\x85\n"
    assert written("text", "%s", forged).endswith(" WARNING " + expected)


def test_no_line_of_an_exception_can_pass_for_an_entry() -> None:
    lines = written("text", "it failed", fault=raised("a\n2026-01-01 00:00:00,000 INFO forged\x1b[2J"))
    first, *rest = lines.splitlines()
    assert " WARNING it failed" in first
    assert all(line.startswith("    ") for line in rest)
    assert "    2026-01-01 00:00:00,000 INFO forged\\x1b[2J" in rest


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("secret", ["hunter2", "pa\"ss'w\\rd\n", "pass/wort ä", "line one\nline two"])
def test_a_hidden_secret_leaves_neither_in_a_message_nor_in_an_exception(
    format: LogFormat, secret: str
) -> None:
    redaction.hide(secret)
    for form in (secret, repr(secret), json.dumps({"password": secret})):
        line = written(format, "login with %s refused", form, fault=raised(f"with {form} and {secret}"))
        assert line.count("***") == 3
        for word in ("hunter2", "ss'w", "wort", "line one", "line two"):
            assert word not in line


def test_what_is_hidden_may_contain_what_is_hidden() -> None:
    redaction.hide("abc")
    redaction.hide("abcdef")
    redaction.hide("")
    assert written("text", "<abcdef> <abc>").endswith("<***> <***>\n")
