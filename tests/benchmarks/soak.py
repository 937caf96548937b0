"""A day of 200 streams, sped up: does what they take, in memory and in time, stay what it was?

    python -m tests.benchmarks.soak

What a Kafka worker does, without Kafka: messages are decoded, taken by a partition, run through a runtime,
and saved every minute. All that is held of a stream is held there. One frame is ten seconds, so that a day
is little work, and most of that bookkeeping. Streams end and others begin, restart, fall silent, lose
messages, and have gaps. It prints one line, and fails if memory grew by more than 1 % after the first tenth,
by which time all that is allocated once has been.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.manifest import Decoding
from engine.session import OnnxSession
from stream.config import RuntimeSettings
from stream.events import Event
from stream.partition import Partition, warm_chunks
from stream.runtime import Runtime
from stream.wire import Limits, Message, decode, encode

RATE, ARRIVAL = 0.4, 8  # Hz; samples of a message
SECONDS = ARRIVAL / RATE  # from a message to the next
SETTINGS = RuntimeSettings(max_streams=512, idle_timeout=1800.0, reorder=60.0, max_gap=300.0)
DECODING = Decoding(
    start_threshold=0.2, end_threshold=0.1, confident=0.3, hold=30.0, min_duration=20.0, max_duration=1800.0
)
MOST_GROWTH = 0.01
_HOUR = 3600.0
_NOISE = np.cumsum(np.random.default_rng(0).normal(scale=0.3, size=(4096, 3)), axis=0).astype(np.float32)


@dataclass
class Outcome:
    """What was seen. `rss`: bytes, after the first tenth and at the end; `cost`: CPU seconds a frame, in the
    first tenth and in the last."""

    rss: tuple[int, int]
    cost: tuple[float, float]
    frames: int
    events: int
    epochs: int

    @property
    def growth(self) -> float:
        """Of memory, as a part of what it was."""
        return self.rss[1] / self.rss[0] - 1

    def __str__(self) -> str:
        (before, after), (first, last) = self.rss, self.cost
        return (
            f"frames {self.frames} events {self.events} epochs {self.epochs}; "
            f"RSS {before / 2**20:.2f} MiB after the first tenth, {after / 2**20:.2f} MiB at the end "
            f"({self.growth:+.2%}); CPU per frame {1e6 * first:.1f} us in the first tenth, "
            f"{1e6 * last:.1f} us in the last (x {last / first:.3f})"
        )


class _Place:
    """A stream at a time, and what befalls it."""

    def __init__(self, number: int) -> None:
        self._rng = random.Random(number)
        self._number, self._life, self._epoch = number, 0, 0
        self._seq, self._silent = 0, 0
        self._held: Message | None = None
        self._left = self._lifetime()

    def messages(self, now: float) -> list[Message]:
        """What arrives at `now`."""
        if self._silent:
            self._silent -= 1
            return []
        self._left -= 1
        fate = "" if self._left else self._rng.choice(("end", "restart", "silence", "gap"))
        start = (self._seq * 3) % (len(_NOISE) - ARRIVAL)
        name = f"place {self._number} life {self._life}"
        samples = _NOISE[start : start + ARRIVAL]
        message = Message(name, self._seq, samples, RATE, self._epoch, now, fate == "end")
        self._seq += ARRIVAL
        if fate:
            self._begin(fate)
        elif self._rng.random() < 0.01:
            return []  # lost
        elif self._held is None and self._rng.random() < 0.01:
            self._held = message
            return []
        held, self._held = self._held, None
        return [message] if held is None else [message, held]

    def _begin(self, fate: str) -> None:
        self._left = self._lifetime()
        if fate == "gap":
            self._seq += 1000
            return
        self._seq = 0
        if fate == "end":
            self._life += 1
        else:
            self._epoch += 1
        if fate == "silence":
            self._silent = round(2 * SETTINGS.idle_timeout / SECONDS)

    def _lifetime(self) -> int:
        return round(self._rng.uniform(0.5, 8.0) * _HOUR / SECONDS)


def soak(bundle: Path, streams: int, hours: float) -> Outcome:
    """So many streams, so long, in this process."""
    logging.getLogger("stream").setLevel(logging.ERROR)  # gaps and losses are what is wanted here
    session = OnnxSession(bundle, slots=SETTINGS.max_streams, threads=1)
    events = 0

    def hear(heard: Sequence[Event]) -> None:
        nonlocal events
        for event in heard:
            partition.is_news(event.stream)
            events += bool(event.to_json())

    runtime = Runtime(session, hear, SETTINGS, None, DECODING)
    manifest = session.manifest
    partition = Partition(runtime, "soak", hear, "soak", warm_chunks(manifest, SETTINGS.max_gap), committed=0)
    limits = Limits.of(manifest.frame)
    places = [_Place(number) for number in range(streams)]
    rounds = round(hours * _HOUR / SECONDS)
    costs: list[tuple[float, int]] = []  # of each tenth: CPU seconds, frames
    frames, offset, spent, before = 0, 0, 0.0, 0
    for number in range(rounds):
        now = number * SECONDS
        arrived = [encode(message) for place in places for message in place.messages(now)]
        started = time.process_time()
        for data in arrived:
            partition.take(offset, now, decode(data, limits))
            offset += 1
        runtime.drain()
        partition.tick()
        if number % 3 == 0:
            partition.checkpoint()
        spent += time.process_time() - started
        if (number + 1) % (rounds // 10) == 0:
            done = round(runtime.counters.snapshot()["frames"])
            costs.append((spent, done - frames))
            spent, frames = 0.0, done
            before = before or resident_bytes()
    counted = runtime.counters.snapshot()
    assert not counted["streams_refused"], counted
    return Outcome(
        (before, resident_bytes()),
        (costs[0][0] / costs[0][1], costs[9][0] / costs[9][1]),
        frames,
        events,
        round(counted["epochs"]),
    )


def resident_bytes() -> int:
    """Memory of this process, garbage aside."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_bundle(folder: Path) -> Path:
    """A small random network of a low rate."""
    from tests.tiny import random_detector, write_bundle_of
    from trainer.detector import DetectorShape
    from trainer.pyramid import PyramidShape

    shape = DetectorShape(
        3, 3, PyramidShape(16, 2, 5, 4, chunk=2, relative=True, expansion=2), hop=4, prior=0.3
    )
    return write_bundle_of(random_detector(shape), folder, sample_rate=RATE)


def alone(bundle: Path, streams: int, hours: float) -> subprocess.CompletedProcess[str]:
    """The same in a process that has never loaded what makes bundles, nor anything else."""
    command = [sys.executable, "-m", "tests.benchmarks.soak", "--bundle", str(bundle)]
    return subprocess.run(
        [*command, "--streams", str(streams), "--hours", str(hours)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    if options.bundle is None:
        with tempfile.TemporaryDirectory() as name:
            done = alone(write_bundle(Path(name) / "bundle"), options.streams, options.hours)
        sys.stderr.write(done.stderr)
        sys.stdout.write(done.stdout)
        sys.exit(done.returncode)
    outcome = soak(options.bundle, options.streams, options.hours)
    print(outcome)  # noqa: T201
    sys.exit(outcome.growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
