"""A swap takes over whole, or changes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine import BundleError, OnnxSession
from stream.config import RuntimeSettings
from stream.events import Event
from stream.runtime import Runtime
from stream.wire import Message
from tests.stream.swaps import Faulty, Sessions, run
from tests.stream.test_runtime import Bench, wave


def _ten_samples(bench: Bench) -> None:
    bench.send("one", 0, wave(1, 10))


def _none_popped(bench: Bench) -> None:
    bench.send("one", 0, wave(1, 3))


def _waits_for_its_origin(bench: Bench) -> None:
    bench.send("one", 500, wave(1, 4))


def _behind_a_gap(bench: Bench) -> None:
    bench.send("one", 0, wave(1, 43))
    bench.send("one", 200, wave(2, 15))


def _cut(bench: Bench) -> None:
    bench.send("one", 0, wave(1, 40))
    bench.send("one", 40, wave(1, 8) * 1e38)


def _finishing(bench: Bench) -> None:
    bench.send("one", 4, wave(1, 4))
    bench.send("one", 9, wave(1, 3), end=True)


@pytest.mark.parametrize(
    ("prepare", "end"),
    [
        (_ten_samples, 20.0),
        (_none_popped, 20.0),
        (_waits_for_its_origin, 20.0),
        (_behind_a_gap, 20.0),
        (_cut, 20.0),
        (_finishing, 0.24),
    ],
)
def test_a_swap_takes_streams_with_any_history(
    tiny_bundle: Path, other_bundle: Path, prepare: Callable[[Bench], None], end: float
) -> None:
    bench = Bench(tiny_bundle)
    prepare(bench)
    for bundle in (other_bundle, tiny_bundle):
        bench.runtime.swap(OnnxSession(bundle, slots=4, threads=1))
    bench.send("one", 600, wave(3, 400), end=True)
    bench.runtime.stop()
    bench.check()
    assert bench.events[-1].time == pytest.approx(end)


@pytest.mark.parametrize("calls", [1, 3, 14])
def test_a_swap_that_fails_under_way_changes_no_event(tiny_bundle: Path, calls: int) -> None:
    def run(swapping: bool) -> Bench:
        bench = Bench(tiny_bundle)
        for start in range(0, 400, 40):
            for number, name in enumerate("abc"):
                bench.send(name, start, wave(number, 800)[start : start + 40])
        if swapping:
            session = OnnxSession(tiny_bundle, slots=4, threads=1)
            with pytest.raises(RuntimeError, match="out of memory"):
                bench.runtime.swap(Faulty(session, calls, RuntimeError("out of memory"), for_good=False))
            for _ in range(4):
                session.open()  # none is lost
        for number, name in enumerate("abc"):
            bench.send(name, 400, wave(number, 800)[400:], end=True)
        bench.runtime.stop()
        bench.check()
        return bench

    undisturbed, disturbed = run(False), run(True)
    assert len(undisturbed.events) > 20
    for name in "abc":
        assert disturbed.of(name) == undisturbed.of(name)
    assert disturbed.count("bundle_swaps") == 0


def test_no_swap_at_any_moment_breaks_a_promise_and_none_that_fails_changes_an_event(tmp_path: Path) -> None:
    """Random courses; `ONSET_SWAP_RUNS` for more of them, or `python -m tests.stream.swaps`."""
    sessions, total = Sessions(tmp_path), Counter[str]()
    for seed in range(int(os.environ.get("ONSET_SWAP_RUNS", "12"))):
        total += run(sessions, seed)
    assert total["swaps"] >= total["runs"]
    assert total["failed"] >= total["runs"]
    assert total["events"] >= 30 * total["runs"]


def test_a_swap_does_not_wait_for_a_message_of_hours(tiny_bundle: Path) -> None:
    def run(swapping: bool) -> tuple[list[Event], int]:
        events: list[Event] = []
        session = OnnxSession(tiny_bundle, slots=8, threads=1)
        runtime = Runtime(session, events.extend, RuntimeSettings(max_streams=8))
        samples = np.sin(np.arange(60_000, dtype=np.float32)[:, None] * [0.01, 0.02, 0.03]).astype(np.float32)
        runtime.offer(Message("long", 0, samples, 50.0, end=True))
        runtime.run_ready()
        before = runtime.counters.snapshot()["steps"]
        if swapping:
            runtime.settle()
            with pytest.raises(BundleError):
                runtime.swap(Misfit(tiny_bundle, slots=8, threads=1))
        steps = runtime.counters.snapshot()["steps"] - before
        runtime.drain()
        return events, int(steps)

    class Misfit(OnnxSession):
        @property
        def capacity(self) -> int:
            raise BundleError("no")

    (quiet, _), (swapped, steps) = run(False), run(True)
    assert steps < 30, "the rings were emptied, and no more"
    assert swapped == quiet
    assert swapped[-1].reason == "end of stream"
