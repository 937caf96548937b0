"""The partitions of a worker: each stream has one home, which a successor knows before it has read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from engine import OnnxSession, WireError
from stream.assignment import Assignment
from stream.checkpoint import Committed
from stream.counters import Counters
from stream.events import Event
from stream.kafka_source import Resumption
from stream.wire import Message
from tests.stream.test_service import GOOD, RATE, config_of

NOTHING = Resumption(0, None, {}, 0, 0)


def taken_up(bundle: Path, folder: Path, found: Mapping[int, Resumption]) -> tuple[Assignment, list[Event]]:
    told: list[Event] = []
    session = OnnxSession(bundle, slots=8, threads=1)
    assignment = Assignment(session, config_of(bundle, folder / "none"), "frames", Counters(), told.extend)
    for number, resumption in found.items():
        assignment.take_up(number, resumption)
    return assignment, told


def read(assignment: Assignment, number: int, offset: int, stream: str, at: int) -> bool:
    """A message of 50 samples; whether its stream has its home there."""
    message = Message(stream, at, GOOD[at : at + 50], RATE)
    try:
        assignment.claim(stream, number)
    except WireError:
        assignment.partitions[number].take(offset, None, None)
        return False
    assignment.partitions[number].take(offset, None, message)
    while assignment.runtime.has_ready:
        assignment.runtime.run_ready()
    return True


@pytest.mark.parametrize("first", [0, 1])
def test_a_stream_s_home_is_the_same_for_a_successor_whichever_partition_it_reads_first(
    first: int, tiny_bundle: Path, tmp_path: Path
) -> None:
    before, told = taken_up(tiny_bundle, tmp_path, {0: NOTHING, 1: NOTHING})
    assert read(before, 0, 0, "zero", 0)
    assert read(before, 1, 0, "one", 0)
    assert not read(before, 1, 1, "zero", 50), "its home is partition 0"
    assert read(before, 0, 1, "zero", 50)
    records, offsets = before.checkpoint()
    before.committed(offsets)
    assert before.checkpoint() == ([], {}), "nothing is new"

    found = {
        number: Resumption(
            offset,
            Committed.from_text(text),
            {key: value for n, key, value in records if n == number and value is not None},
            0,
            offset,
        )
        for number, (offset, text) in offsets.items()
    }
    after, more = taken_up(tiny_bundle, tmp_path, found)
    assert sorted(after.replaying) == [0, 1]
    for number in (first, 1 - first):
        for offset, (stream, at) in enumerate(
            [[("zero", 0), ("zero", 50)], [("one", 0), ("zero", 50)]][number]
        ):
            assert read(after, number, offset, stream, at) == ((stream, number) != ("zero", 1))
        after.partitions[number].reach(2)
    assert not after.replaying
    assert not more, "it was told before"
    assert len(told) > 1
    assert read(after, 0, 2, "zero", 100)
    assert not read(after, 1, 2, "zero", 150)
