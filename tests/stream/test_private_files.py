"""What the service writes is its owner's alone, whatever the umask is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.counters import Counters
from stream.dead_letters import FileDeadLetters
from stream.line_sink import FileSink


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_mode & 0o777 for entry in folder.iterdir()}


def test_dead_letters_are_private_also_after_their_file_was_full(tmp_path: Path) -> None:
    letters = FileDeadLetters(tmp_path / "l", Counters(), max_bytes=1000)
    for _ in range(20):
        letters.put(b"x" * 100, "shape", "why", {})
    letters.close()
    assert modes(tmp_path) == {"l": 0o600, "l.1": 0o600}


def test_dead_letters_that_others_could_read_are_tightened_and_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("l", "l.1"):
        (tmp_path / name).touch(0o644)
    FileDeadLetters(tmp_path / "l", Counters()).close()
    assert modes(tmp_path) == {"l": 0o600, "l.1": 0o600}
    assert caplog.text.count("mode was 0644") == 2


def test_a_new_file_of_events_is_private_and_the_mode_of_an_old_one_its_owners_choice(tmp_path: Path) -> None:
    (tmp_path / "old").touch(0o640)
    for name in ("new", "old"):
        FileSink(tmp_path / name).close()
    assert modes(tmp_path) == {"new": 0o600, "old": 0o640}
