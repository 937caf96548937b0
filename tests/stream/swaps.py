"""Bundles that take over under way, at any moment, and some that cannot: does every event keep its promise?

    python -m tests.stream.swaps --runs 500

A run is a random course of streams (cut anywhere, with gaps, repeats, restarts, ends, silences and values
that overflow the network) and of swaps: to bundles of other chunks, levels, classes and thresholds, to ones
that do not fit, and to sessions that fail at some call. It is run twice: the second time without the swaps
that failed, which must not have changed one byte (what was offered before them is digested in both).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import BundleError, Decoding, Manifest, OnnxSession
from engine.session import Slot
from stream.config import RuntimeSettings
from stream.events import Event
from stream.nms import overlap
from stream.runtime import Runtime
from stream.wire import Message
from tests.leaky import write_leaky_bundle

RATE, CHANNELS = 50.0, 3
STREAMS = 4
_LARGEST_TIOU = 0.5
_SHAPES = tuple(
    {"channels": channels, "classes": classes, "hop": hop, "levels": levels, "chunk": chunk}
    for channels, classes, hop, levels, chunk in (
        (CHANNELS, 3, 4, 4, 2),
        (4, 3, 4, 4, 2),  # which no stream of the others has
        (CHANNELS, 2, 4, 1, 1),
        (CHANNELS, 3, 2, 3, 4),
        (CHANNELS, 3, 8, 2, 8),  # from which none of the smaller ones can take over
        (CHANNELS, 5, 1, 2, 2),
    )
)


class Faulty:
    """A real session of which some call fails with `problem`, and all later ones if `for_good`."""

    def __init__(self, session: OnnxSession, calls: int, problem: Exception, for_good: bool) -> None:
        self.session, self._calls, self._problem, self._for_good = session, calls, problem, for_good
        self.is_armed = True

    @property
    def manifest(self) -> Manifest:
        return self.session.manifest

    @property
    def capacity(self) -> int:
        return self.session.capacity

    def open(self) -> Slot:
        self._count()
        return self.session.open()

    def close(self, slot: Slot) -> None:
        self.session.close(slot)
        self._count()

    def step(self, slots: Sequence[Slot], samples: Any, mask: Any) -> Mapping[str, Any]:
        self._count()
        return self.session.step(slots, samples, mask)

    def _count(self) -> None:
        self._calls -= 1
        if self.is_armed and (self._calls == 0 or (self._calls < 0 and self._for_good)):
            raise self._problem


class Sessions:
    """Sessions that nobody uses, since opening one takes longer than a run."""

    def __init__(self, folder: Path) -> None:
        self._bundles = [
            write_leaky_bundle(folder / f"bundle{number}", rate=RATE, seed=number, **shape)
            for number, shape in enumerate(_SHAPES)
        ]
        self._idle: dict[int, list[OnnxSession]] = defaultdict(list)
        self._numbers: dict[int, int] = {}

    def take(self, bundle: int) -> OnnxSession:
        if self._idle[bundle]:
            return self._idle[bundle].pop()
        session = OnnxSession(self._bundles[bundle], slots=STREAMS, threads=1)
        self._numbers[id(session)] = bundle
        return session

    def give_back(self, session: OnnxSession) -> None:
        """Fails unless all of its slots are free."""
        slots = [session.open() for _ in range(STREAMS)]
        for slot in slots:
            session.close(slot)
        self._idle[self._numbers[id(session)]].append(session)


@dataclass(frozen=True)
class Swap:
    """To a bundle; `problem`: what its session raises at call `calls`, if it comes so far."""

    bundle: int
    decoding: Mapping[str, float]
    calls: int = 0
    problem: Exception | None = None
    for_good: bool = False


Step = Message | Swap | Callable[[Runtime], object] | float  # a float: seconds that pass


class Producer:
    """One stream's producer: `next` gives messages such as they come."""

    def __init__(self, name: str, random: np.random.Generator) -> None:
        self._name, self._random = name, random
        self._epoch = self._seq = 0
        self._level = np.zeros(CHANNELS)

    def next(self) -> Iterator[Message]:
        random = self._random
        fate = random.random()
        if fate < 0.08:  # a gap, short or long
            self._seq += int(random.choice([1, 3, 15, 40, 300]))
        elif fate < 0.11:  # it starts again
            self._epoch, self._seq = self._epoch + 1, int(random.choice([0, 0, 7]))
        elif fate < 0.13:
            yield self._message(0, end=True)
        elif fate < 0.16 and self._seq > 9:  # a repeat, or what is late
            back = int(random.integers(1, 9))
            self._seq -= back
            yield self._message(back)
        sizes = [1, 2, 5, 10, 40, 130]
        message = self._message(int(random.choice(sizes)), end=random.random() < 0.03)
        if random.random() < 0.1:
            yield self._message(int(random.choice(sizes)))  # which is newer
        yield message

    def _message(self, size: int, end: bool = False) -> Message:
        steps = self._random.normal(0, 0.3, (size, CHANNELS))
        samples = self._level + np.cumsum(steps, axis=0)
        if size:
            self._level = 0.98 * samples[-1]
        if self._random.random() < 0.02:
            samples = (samples * 1e38).clip(-3e38, 3e38)
        found = Message(
            self._name, self._seq, samples.astype(np.float32), RATE, self._epoch, self._seq / RATE, end
        )
        self._seq += size
        return found


def course_of(random: np.random.Generator) -> list[Step]:
    """A random course of five streams, of which four find a place."""
    producers = [Producer(name, random) for name in "abcde"[: random.integers(1, 6)]]
    steps: list[Step] = []
    for _ in range(int(random.integers(5, 90))):
        fate = random.random()
        if fate < 0.7:
            steps += producers[random.integers(len(producers))].next()
        elif fate < 0.8:
            steps.append(Runtime.run_ready if random.random() < 0.5 else Runtime.drain)
        elif fate < 0.84:
            name = producers[random.integers(len(producers))]._name
            steps.append(lambda runtime, name=name: runtime.end(name))
        elif fate < 0.88:
            steps.append(float(random.choice([0.1, 1.0, 20.0])))
        else:
            steps.append(_swap(random))
    return steps


def _swap(random: np.random.Generator) -> Swap:
    bundle, decoding = int(random.integers(len(_SHAPES))), _decoding(random)
    if random.random() < 0.5:
        return Swap(bundle, decoding)
    kinds = (RuntimeError, MemoryError, ValueError, BundleError, OSError, KeyError)
    problem = kinds[random.integers(len(kinds))]("at some call")
    return Swap(bundle, decoding, int(random.integers(1, 30)), problem, random.random() < 0.3)


def _decoding(random: np.random.Generator) -> Mapping[str, float]:
    choices = {
        "start_threshold": (0.0, 0.1, 0.3),
        "end_threshold": (0.0, 0.1),
        "gate": (0.0, 0.1),
        "confident": (0.0, 0.3, 0.9),
        "hold": (0.0, 0.1, 1.0),
        "nms_tiou": (0.0, 0.1, _LARGEST_TIOU),
        "max_duration": (0.05, 0.3, 2.0, 120.0),
        "evidence": (0.01, 0.1),
    }
    return {name: float(random.choice(values)) for name, values in choices.items()}


@dataclass
class Outcome:
    """What left a run, and which of its steps were swaps that failed."""

    events: list[Event]
    failed: set[int]
    swaps: int


def play(
    sessions: Sessions,
    steps: Sequence[Step],
    settings: RuntimeSettings,
    decoding: Mapping[str, float],
    left_out: set[int],
) -> Outcome:
    """Go the course but for the swaps `left_out`. Fails when anything is raised but a swap's refusal."""
    now = 0.0
    session = sessions.take(0)
    outcome = Outcome([], set(), 0)
    runtime = Runtime(
        session,
        outcome.events.extend,
        settings,
        decoding=_of(session.manifest, decoding),
        clock=lambda: now,
    )
    for number, step in enumerate(steps):
        if number in left_out:
            runtime.drain()
        elif isinstance(step, Message):
            runtime.offer(step)
        elif isinstance(step, float):
            now += step
            runtime.tick()
        elif isinstance(step, Swap):
            if (other := _swapped(runtime, sessions, step)) is None:
                outcome.failed.add(number)
            else:
                sessions.give_back(session)
                session = other
                outcome.swaps += 1
        else:
            step(runtime)
    runtime.stop()
    sessions.give_back(session)
    return outcome


def _swapped(runtime: Runtime, sessions: Sessions, swap: Swap) -> OnnxSession | None:
    """The session that has taken over; None when it could not."""
    session = sessions.take(swap.bundle)
    decoding = _of(session.manifest, swap.decoding)
    if swap.problem is None:
        try:
            runtime.swap(session, decoding)
        except BundleError:  # its chunk or its channels
            sessions.give_back(session)
            return None
        return session
    faulty = Faulty(session, swap.calls, swap.problem, swap.for_good)
    try:
        runtime.swap(faulty, decoding)
    except (type(swap.problem), BundleError):
        sessions.give_back(session)
        return None
    faulty.is_armed = False
    return session


def _of(manifest: Manifest, values: Mapping[str, float]) -> Decoding:
    return manifest.decoding.model_copy(update=values)


def check(events: Sequence[Event]) -> None:
    """The promises of events, over all epochs and bundles of each stream."""
    live: set[str] = set()
    seen: set[tuple[str, str]] = set()
    is_open: dict[tuple[str, str], Event] = {}
    times: dict[tuple[str, int], float] = defaultdict(float)
    segments: dict[tuple[str, int, str], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        event.to_json()
        assert event.time >= times[event.stream, event.epoch], event
        times[event.stream, event.epoch] = event.time
        if event.type == "stream.started":
            assert event.stream not in live, event
            live.add(event.stream)
            continue
        assert event.stream in live, event
        if event.type == "stream.ended":
            assert event.stream not in {stream for stream, _ in is_open}, event
            live.remove(event.stream)
            continue
        assert event.instance_id is not None
        assert event.label is not None
        assert event.start is not None
        assert event.start <= event.time, event
        action = event.stream, event.instance_id
        if event.type == "action.started":
            assert action not in seen, event
            seen.add(action)
            is_open[action] = event
            continue
        assert is_open.pop(action).label == event.label, event
        if event.type == "action.ended":
            assert event.end is not None
            assert event.start <= event.end <= event.time, event
            segment = round(event.start * RATE), round(event.end * RATE)
            others = segments[event.stream, event.epoch, event.label]
            assert all(overlap(segment, other) <= _LARGEST_TIOU for other in others), event
            others.append(segment)
    assert not live
    assert not is_open


def run(sessions: Sessions, seed: int) -> Counter[str]:
    """One run; returns what happened in it. Fails with AssertionError, which names the seed."""
    try:
        return _run(sessions, seed)
    except Exception as problem:
        raise AssertionError(f"seed {seed}: {problem!r}") from problem


def _run(sessions: Sessions, seed: int) -> Counter[str]:
    random = np.random.default_rng(seed)
    settings = RuntimeSettings(
        max_streams=STREAMS,
        max_batch=int(random.choice([1, 2, 64])),
        reorder=float(random.choice([0.0, 0.04, 0.2])),
        max_gap=float(random.choice([0.0, 0.4])),
        idle_timeout=5.0,
    )
    decoding, steps = _decoding(random), course_of(random)
    disturbed = play(sessions, steps, settings, decoding, set())
    check(disturbed.events)
    undisturbed = play(sessions, steps, settings, decoding, disturbed.failed)
    assert not undisturbed.failed
    for stream in "abcde":
        found, expected = (
            [event.to_json() for event in outcome.events if event.stream == stream]
            for outcome in (disturbed, undisturbed)
        )
        assert found == expected, f"a swap that failed changed the events of {stream!r}"
    return Counter(runs=1, swaps=disturbed.swaps, failed=len(disturbed.failed), events=len(disturbed.events))


def main() -> None:
    """The command line."""
    logging.disable()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sessions = Sessions(Path(folder))
        for seed in range(options.seed, options.seed + options.runs):
            total += run(sessions, seed)
    print(", ".join(f"{name} {count}" for name, count in total.items()))  # noqa: T201


if __name__ == "__main__":
    main()
