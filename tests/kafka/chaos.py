"""Eight streams, three workers, and all that goes wrong: are the committed events those of a quiet run?

    python -m tests.kafka.chaos --seconds 600 --brokers 3

While messages come in, at random moments a worker is killed and another started, a broker is killed or
stopped and started again, a worker joins or leaves the group, the network to a broker is cut. It ends with
one line of counts, and fails unless nothing was lost or told twice, byte for byte and in order.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stream.wire import Message
from tests.kafka.broker import Cluster
from tests.kafka.flow import Feed, WorkerProcess, await_ends, expected_events, messages_of, worker_config

STREAMS, WORKERS = 8, 3
# Samples of a stream in a second of chaos: ten times real time.
_SAMPLES_A_SECOND = 500


@dataclass
class Outcome:
    """What was done, and what came of it."""

    kills: int = 0
    restarts: int = 0
    rebalances: int = 0
    cuts: int = 0
    events: int = 0
    lost: int = 0
    duplicated: int = 0
    disordered: int = 0

    def __str__(self) -> str:
        return (
            f"kills {self.kills} restarts {self.restarts} rebalances {self.rebalances} cuts {self.cuts} "
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
        self._config = worker_config(folder, bundle, cluster, topics)
        self._workers = [self._new_worker() for _ in range(WORKERS)]
        self.outcome = Outcome()

    def run(self, messages: Sequence[Message], seconds: float) -> dict[str, list[bytes]]:
        """Feed `messages` over so many seconds of trouble; the committed events after the last has ended."""
        feeding = threading.Thread(target=self._feed, args=(messages, seconds))
        feeding.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._rng.uniform(0.5, 5.0))
            kinds = (self._kill, self._kill, self._restart, self._come_and_go, self._cut)
            self._rng.choice(kinds)()
        feeding.join()
        streams = [f"s{i}" for i in range(STREAMS)]
        try:
            return await_ends(self._cluster, "events", streams, 180)
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
    with Cluster(folder / "kafka", brokers=brokers, advertised_through_proxy=True) as cluster:
        chaos = Chaos(bundle, folder, cluster, brokers, seed)
        found = chaos.run(messages, seconds)
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
