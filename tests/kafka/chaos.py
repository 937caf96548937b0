"""Eight streams, three workers, and all that goes wrong: are the committed events those of a quiet run?

    python -m tests.kafka.chaos --seconds 600 --brokers 3

While messages come in, at random moments a worker is killed and another started, or stands still for longer
than its group waits; a broker is killed or stopped and started again, a worker joins or leaves the group, the
network to a broker is cut; one more stream floods its partition with compressed messages of a minute each,
records come that nobody can read, and the bundle is asked for anew, whole or broken. It ends with one line of
counts, and fails unless nothing was lost or told twice, byte for byte and in order, of the flood either.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream.wire import Limits, Message
from tests.kafka.broker import Cluster
from tests.kafka.flow import (
    RATE,
    Feed,
    WorkerProcess,
    await_ends,
    expected_events,
    messages_of,
    wave,
    worker_config,
)
from tests.stream.fuzzer import Fuzzer

STREAMS, WORKERS = 8, 3
# Samples of a stream in a second of chaos: ten times real time.
_SAMPLES_A_SECOND = 500
# Of one message of the flood, 66 s; and how many of them come at once.
_FLOOD = wave(99, 3300)
_BURST = 5
# What a producer of Kafka sends at most, by default, less what it adds.
_LARGEST = 1_000_000


@dataclass
class Outcome:
    """What was done, and what came of it."""

    kills: int = 0
    restarts: int = 0
    rebalances: int = 0
    cuts: int = 0
    freezes: int = 0
    bursts: int = 0
    garbage: int = 0
    reloads: int = 0
    events: int = 0
    lost: int = 0
    duplicated: int = 0
    disordered: int = 0

    def __str__(self) -> str:
        return (
            f"kills {self.kills} restarts {self.restarts} rebalances {self.rebalances} cuts {self.cuts} "
            f"freezes {self.freezes} bursts {self.bursts} garbage {self.garbage} "
            f"reloads {self.reloads} "
            f"events {self.events} lost {self.lost} duplicated {self.duplicated}"
        )


class Chaos:
    """One run of it."""

    def __init__(self, bundle: Path, folder: Path, cluster: Cluster, brokers: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._cluster, self._brokers, self._folder = cluster, brokers, folder
        topics = {"frames": "frames", "events": "events"}
        cluster.create_topic("frames", 6)
        cluster.create_topic("events", 4)
        # The flood comes in bursts: a pause between two of them is not its end.
        self._bundle = bundle
        self._config = worker_config(folder, bundle, cluster, topics, idle_timeout=3600.0)
        self._workers = [self._new_worker() for _ in range(WORKERS)]
        self._abuse = Feed(cluster, "frames", compression="gzip")
        names = [f"s{number}" for number in range(STREAMS)]
        self._hostile = iter(Fuzzer(seed, Limits(RATE, 3, 2**20), [*names, "flood"], epoch=1))
        self.outcome = Outcome()
        self.flood: list[Message] = []
        """what was sent of the stream that floods"""

    def run(self, messages: Sequence[Message], seconds: float) -> dict[str, list[bytes]]:
        """Feed `messages` over so many seconds of trouble; the committed events after the last has ended."""
        feeding = threading.Thread(target=self._feed, args=(messages, seconds))
        feeding.start()
        kinds = (
            self._kill,
            self._kill,
            self._restart,
            self._come_and_go,
            self._cut,
            self._freeze,
            self._burst,
            self._rubbish,
            self._reload,
        )
        waiting: list[Callable[[], None]] = [self._burst]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._rng.uniform(0.5, 5.0))
            if not waiting:  # each has its turn, in a new order
                waiting = self._rng.sample(kinds, len(kinds))
            waiting.pop()()
            self._replace_ended()
        feeding.join()
        self._burst(is_last=True)
        self._abuse.close()
        streams = [f"s{i}" for i in range(STREAMS)]
        try:
            return await_ends(self._cluster, "events", [*streams, "flood"], 240)
        finally:
            for worker in self._workers:
                worker.kill()

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self._config, self._folder / "workers.log")

    def _feed(self, messages: Sequence[Message], seconds: float) -> None:
        feed = Feed(self._cluster, "frames")
        started, size = time.monotonic(), STREAMS
        for at in range(0, len(messages), size):
            time.sleep(max(0.0, started + seconds * at / len(messages) - time.monotonic()))
            feed.send(messages[at : at + size])
        feed.close()

    def _kill(self) -> None:
        place = self._rng.randrange(len(self._workers))
        self._workers[place].kill()
        self._workers[place] = self._new_worker()
        self.outcome.kills += 1

    def _freeze(self) -> None:
        """Long enough to be put out of the group, or not; it may come back to find another in its place."""
        process = self._rng.choice(self._workers).process
        process.send_signal(signal.SIGSTOP)
        time.sleep(self._rng.choice((1.0, 4.0, 7.0)))
        process.send_signal(signal.SIGCONT)
        self.outcome.freezes += 1

    def _replace_ended(self) -> None:
        """What a supervisor does: one whose place another has taken may end by itself."""
        for place, worker in enumerate(self._workers):
            if worker.process.poll() is not None:
                worker.kill()
                self._workers[place] = self._new_worker()

    def _burst(self, is_last: bool = False) -> None:
        """Minutes of one stream at once, small on the wire; the last message of all ends it."""
        for number in range(_BURST):
            seq = len(self.flood) * len(_FLOOD)
            end = is_last and number == _BURST - 1
            self.flood.append(Message("flood", seq, _FLOOD, RATE, 1, end=end))
        self._abuse.send(self.flood[-_BURST:])
        self.outcome.bursts += 1

    def _rubbish(self) -> None:
        """Records that cannot be read, in all partitions."""
        sent = 0
        while sent < 200:
            shot = next(self._hostile)
            if shot.reason is not None and len(shot.data) <= _LARGEST:
                key = self._rng.choice((b"s0", b"flood", b"", self._rng.randbytes(8)))
                self._abuse.send_bytes(key, shot.data or None)
                sent += 1
        self.outcome.garbage += sent

    def _reload(self) -> None:
        """A bundle that is what it was, or broken for a moment: nothing takes over."""
        manifest = self._bundle / "bundle.json"
        whole = manifest.read_bytes()
        if self._rng.random() < 0.5:
            manifest.write_bytes(whole[: len(whole) // 2])
            time.sleep(1.5)
        manifest.write_bytes(whole)
        self._rng.choice(self._workers).process.send_signal(signal.SIGHUP)
        self.outcome.reloads += 1

    def _restart(self) -> None:
        broker = self._rng.randrange(self._brokers)
        (self._cluster.kill if self._rng.random() < 0.5 else self._cluster.stop)(broker)
        time.sleep(self._rng.uniform(0.0, 3.0))
        self._cluster.start(broker)
        self.outcome.restarts += 1

    def _come_and_go(self) -> None:
        if len(self._workers) > WORKERS or self._rng.random() < 0.5:
            self._workers.pop(self._rng.randrange(len(self._workers))).stop()
            if len(self._workers) < WORKERS:
                self._workers.append(self._new_worker())
        else:
            self._workers.append(self._new_worker())
        self.outcome.rebalances += 1

    def _cut(self) -> None:
        proxy = self._rng.choice(self._cluster.proxies)
        proxy.cut(silently=self._rng.random() < 0.5)
        time.sleep(self._rng.uniform(0.5, 6.0))
        proxy.restore()
        self.outcome.cuts += 1


def run(bundle: Path, folder: Path, seconds: float, brokers: int, seed: int) -> Outcome:
    """Chaos for so long, and what came of it."""
    messages = messages_of(STREAMS, round(seconds * _SAMPLES_A_SECOND))
    expected = expected_events(bundle, messages)
    bundle = Path(shutil.copytree(bundle, folder / "changing"))
    with Cluster(folder / "kafka", brokers=brokers, advertised_through_proxy=True) as cluster:
        chaos = Chaos(bundle, folder, cluster, brokers, seed)
        found = chaos.run(messages, seconds)
    expected |= expected_events(bundle, chaos.flood)
    outcome = chaos.outcome
    for stream in expected.keys() | found.keys():
        wanted, got = Counter(expected.get(stream, ())), Counter(found.get(stream, ()))
        outcome.events += sum(got.values())
        outcome.lost += sum((wanted - got).values())
        outcome.duplicated += sum((got - wanted).values())
        outcome.disordered += expected.get(stream) != found.get(stream)
    return outcome


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--brokers", type=int, choices=(1, 3), default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.tiny import write_tiny_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_tiny_bundle(folder / "bundle")
        outcome = run(bundle, folder, options.seconds, options.brokers, options.seed)
        print(outcome)  # noqa: T201
        if outcome.lost or outcome.duplicated or outcome.disordered:
            sys.exit((folder / "workers.log").read_text(errors="replace")[-8000:])


if __name__ == "__main__":
    main()
