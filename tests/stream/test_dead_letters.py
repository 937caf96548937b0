"""Dead letters, in real files: what cannot be read is kept with its reason, and what is not kept is told."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from engine import ConfigError
from engine.schema import parse
from stream.counters import Counters
from stream.dead_letters import (
    MAX_FILE_LETTER_BYTES,
    MAX_KAFKA_LETTER_BYTES,
    DeadLetterSettings,
    FileDeadLetters,
    Headers,
    KafkaDeadLetters,
    NoDeadLetters,
    open_dead_letters,
)


class Clock:
    """Time that goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Topic:
    """What was sent, as a producer's `send` takes it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes | None, bytes, Headers]] = []

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        self.sent.append((topic, key, value, headers))


@pytest.fixture
def counters() -> Counters:
    return Counters()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes meanwhile: a write that reaches it is cut short, then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_a_letter_is_kept_with_its_time_reason_and_origin(tmp_path: Path, counters: Counters) -> None:
    path = tmp_path / "below" / "letters.jsonl"
    letters = FileDeadLetters(path, counters)
    data = bytes(range(256))
    letters.put(data, "not_msgpack", 'expected a map,\nfound "x\udcff"', {"topic": "samples", "offset": 7})
    letters.put(b"", "shape", "", {})
    letters.close()
    first, second = read(path)
    assert datetime.fromisoformat(first.pop("time")).utcoffset() == timedelta(0)
    assert base64.b64decode(first.pop("data")) == data
    assert first == {
        "reason": "not_msgpack",
        "why": 'expected a map,\nfound "x\udcff"',
        "origin": {"topic": "samples", "offset": 7},
        "size": 256,
    }
    assert second["data"] == ""
    assert counters.summary() == "dead_letters{not_msgpack} 1, dead_letters{shape} 1"


def test_a_large_letter_is_cut_and_its_size_and_digest_are_told(tmp_path: Path, counters: Counters) -> None:
    path = tmp_path / "letters.jsonl"
    letters = FileDeadLetters(path, counters)
    data = os.urandom(MAX_FILE_LETTER_BYTES + 1)
    letters.put(data[:-1], "too_large", "", {})
    letters.put(data, "too_large", "w" * 100_000, {"topic": "t" * 100_000})
    letters.close()
    whole, cut = read(path)
    assert base64.b64decode(whole["data"]) == base64.b64decode(cut["data"]) == data[:-1]
    assert "sha256" not in whole
    assert (cut["size"], cut["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(cut["why"]) == len(cut["origin"]["topic"]) == 1024


def test_the_file_and_the_one_before_stay_bounded_and_hold_the_newest(
    tmp_path: Path, counters: Counters
) -> None:
    path, before = tmp_path / "letters.jsonl", tmp_path / "letters.jsonl.1"
    letters = FileDeadLetters(path, counters, max_bytes=10_000)
    for number in range(90):
        letters.put(b"x" * 500, "shape", "", {"number": number})
        assert path.stat().st_size <= 10_000
    letters.close()
    assert before.stat().st_size <= 10_000
    numbers = [letter["origin"]["number"] for letter in read(before) + read(path)]
    assert numbers == list(range(numbers[0], 90))
    assert 10 < len(numbers) < 40
    assert sorted(tmp_path.iterdir()) == [path, before]


def test_a_new_process_goes_on_where_the_last_one_was_cut_off(tmp_path: Path, counters: Counters) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_bytes(b'{"whole": 1}\n{"half of a li')
    letters = FileDeadLetters(path, counters, max_bytes=400)
    letters.put(b"a", "shape", "", {})
    letters.close()
    whole, half, letter = path.read_bytes().splitlines()
    assert (whole, half) == (b'{"whole": 1}', b'{"half of a li')
    assert json.loads(letter)["reason"] == "shape"
    letters = FileDeadLetters(path, counters, max_bytes=200)  # what is there counts
    letters.put(b"b", "shape", "", {})
    letters.close()
    assert len(read(path)) == 1


def test_a_flood_is_not_kept_and_the_file_says_so_when_there_is_room_again(
    tmp_path: Path, counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "letters.jsonl", Clock()
    letters = FileDeadLetters(path, counters, per_second=3, clock=clock)
    for number in range(10):
        letters.put(b"a", "shape", "", {"number": number})
    assert [letter["origin"]["number"] for letter in read(path)] == [0, 1, 2]
    clock.now = 1.0
    letters.put(b"a", "shape", "", {"number": 10})
    *_, told, last = read(path)
    assert (told["reason"], told["why"]) == ("lost", "letters not kept before this line: 7 (rate)")
    assert last["origin"]["number"] == 10
    for number in range(11, 15):
        letters.put(b"a", "shape", "", {"number": number})
    letters.close()  # the last chance to say it
    assert read(path)[-1]["why"] == "letters not kept before this line: 2 (rate)"
    assert counters.summary() == "dead_letters{shape} 15, dead_letters_lost{rate} 9"
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_letters_and_nothing_else(
    counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    letters = FileDeadLetters(Path("/dev/full"), counters, max_bytes=100)
    for _ in range(50):
        letters.put(b"a" * 100, "shape", "", {})
    letters.close()
    assert counters.summary() == "dead_letters{shape} 50, dead_letters_lost{disk} 50"
    first, last = (record.getMessage() for record in caplog.records)
    assert "/dev/full: No space left on device" in first
    assert "50 (disk)" in last  # what could not be told in the file is told in the log


def test_a_disk_that_has_room_again_is_told_what_was_lost(tmp_path: Path, counters: Counters) -> None:
    path = tmp_path / "letters.jsonl"
    letters = FileDeadLetters(path, counters)
    letters.put(b"a", "shape", "", {})
    whole = path.stat().st_size
    with room_for(whole + 50):
        letters.put(b"b", "shape", "", {})
        letters.put(b"c", "shape", "", {})
    assert path.stat().st_size == whole + 50
    letters.put(b"d", "shape", "", {})
    letters.close()
    first, cut, told, last, end = path.read_bytes().split(b"\n")
    assert base64.b64decode(json.loads(first)["data"]) == b"a"
    assert len(cut) == 50
    assert json.loads(told)["why"] == "letters not kept before this line: 2 (disk)"
    assert base64.b64decode(json.loads(last)["data"]) == b"d"
    assert end == b""
    assert counters.summary() == "dead_letters{shape} 4, dead_letters_lost{disk} 2"


def test_a_file_that_cannot_make_way_stays_bounded(tmp_path: Path, counters: Counters) -> None:
    path = tmp_path / "letters.jsonl"
    (tmp_path / "letters.jsonl.1" / "in the way").mkdir(parents=True)
    letters = FileDeadLetters(path, counters, max_bytes=1000)
    for _ in range(20):
        letters.put(b"a" * 300, "shape", "", {})
    assert path.stat().st_size <= 1000
    assert counters.snapshot()["dead_letters_lost{disk}"] == 19
    (tmp_path / "letters.jsonl.1" / "in the way").rmdir()
    (tmp_path / "letters.jsonl.1").rmdir()
    letters.put(b"b", "shape", "", {})
    letters.close()
    assert [letter["reason"] for letter in read(path)] == ["lost", "shape"]


def test_a_file_that_cannot_be_opened_is_refused_with_a_sentence(tmp_path: Path, counters: Counters) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}: cannot be written: Is a directory")):
        FileDeadLetters(tmp_path, counters)


def test_a_topic_gets_the_raw_bytes_and_the_reason_in_headers(counters: Counters) -> None:
    topic = Topic()
    letters = KafkaDeadLetters("dead", topic.send, counters)
    letters.put(b"\x00raw", "shape", "found ä", {"topic": "samples", "partition": 3, "offset": 17})
    letters.close()
    assert topic.sent == [
        (
            "dead",
            None,
            b"\x00raw",
            [
                ("onset-reason", b"shape"),
                ("onset-why", "found ä".encode()),
                ("onset-origin-topic", b"samples"),
                ("onset-origin-partition", b"3"),
                ("onset-origin-offset", b"17"),
            ],
        )
    ]


def test_a_topic_is_spared_large_letters_and_floods_and_told_so(counters: Counters) -> None:
    topic, clock = Topic(), Clock()
    letters = KafkaDeadLetters("dead", topic.send, counters, per_second=2, clock=clock)
    data = os.urandom(2_000_000)
    for _ in range(5):
        letters.put(data, "too_large", "", {})
    assert len(topic.sent) == 2
    assert topic.sent[0][2] == data[:MAX_KAFKA_LETTER_BYTES]
    headers = dict(topic.sent[0][3])
    assert headers["onset-size"] == b"2000000"
    assert headers["onset-sha256"] == hashlib.sha256(data).hexdigest().encode()
    clock.now = 1.5
    letters.put(b"a", "shape", "", {})
    told = dict(topic.sent[2][3])
    assert (topic.sent[2][2], told["onset-reason"]) == (b"", b"lost")
    assert told["onset-why"] == b"letters not kept before this line: 3 (rate)"
    assert topic.sent[3][2] == b"a"
    letters.close()
    assert len(topic.sent) == 4


def test_what_the_producer_raises_reaches_the_transaction(counters: Counters) -> None:
    def fenced(topic: str, key: bytes | None, value: bytes, headers: Headers) -> None:
        raise RuntimeError("fenced")

    with pytest.raises(RuntimeError, match="fenced"):
        KafkaDeadLetters("dead", fenced, counters).put(b"a", "shape", "", {})


def test_the_settings_name_the_place(tmp_path: Path, counters: Counters) -> None:
    nowhere = open_dead_letters(DeadLetterSettings(), counters)
    assert isinstance(nowhere, NoDeadLetters)
    nowhere.put(b"a", "shape", "", {})
    assert counters.summary() == "dead_letters{shape} 1"
    file = open_dead_letters(DeadLetterSettings(file=tmp_path / "letters.jsonl"), counters)
    assert isinstance(file, FileDeadLetters)
    file.close()
    settings = DeadLetterSettings(kafka_topic="dead")
    assert isinstance(open_dead_letters(settings, counters, Topic().send), KafkaDeadLetters)
    with pytest.raises(ConfigError, match="nothing here talks to Kafka"):
        open_dead_letters(settings, counters)
    with pytest.raises(ConfigError, match="found both"):
        parse(DeadLetterSettings, {"file": "a", "kafka_topic": "b"}, "service.yaml")
