"""A swap takes over whole, or changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import OnnxSession
from engine.session import Slot
from tests.stream.test_runtime import Bench, wave


class Failing(OnnxSession):
    """A session of which one call fails, with what nobody foresees: `calls` counts down to it."""

    def __init__(self, *arguments: Any, calls: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._calls = calls

    def _count(self) -> None:
        self._calls -= 1
        if self._calls == 0:
            raise RuntimeError("out of memory")

    def open(self) -> Slot:
        self._count()
        return super().open()

    def step(self, *arguments: Any) -> Any:
        self._count()
        return super().step(*arguments)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._slots._free)


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


@pytest.mark.parametrize("calls", [1, 2, 3, 5, 14])
def test_a_swap_that_fails_under_way_changes_no_event(tiny_bundle: Path, calls: int) -> None:
    def run(swapping: bool) -> Bench:
        bench = Bench(tiny_bundle)
        for start in range(0, 400, 40):
            for number, name in enumerate("abc"):
                bench.send(name, start, wave(number, 800)[start : start + 40])
        if swapping:
            session = Failing(tiny_bundle, slots=4, threads=1, calls=calls)
            with pytest.raises(RuntimeError, match="out of memory"):
                bench.runtime.swap(session)
            assert session.free == 4
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
