"""A million hostile messages among those of four streams: does the service stay up, small, and right?

    python -m tests.stream.fuzz --messages 1000000

It ends with one line of counts, and fails unless every message is accounted for by its reason, the events of
the four streams are those of an undisturbed run, byte for byte, and the service has not grown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import yaml
import zmq
from prometheus_client.parser import text_string_to_metric_families

from stream.wire import Limits, encode
from tests.kafka.flow import DECODING, RATE, RUN, WorkerProcess, expected_events, messages_of
from tests.stream.fuzzer import Fuzzer

LIMITS = Limits(RATE, 3, 65536)
STREAMS = 4
# One message in so many is a protected stream's.
_SHARE = 10
# After this part of the messages what a flood fills (queues, buffers, streams that are remembered) is full.
_WARM = 0.2


@dataclass
class Outcome:
    """What was sent, and what came of it. `refused`: by reason, (as it was to be, as it was)."""

    messages: int = 0
    refused: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rss: tuple[int, int] = 0, 0
    events: int = 0
    different: int = 0
    status: int = 0
    crashed: bool = False

    @property
    def is_well(self) -> bool:
        """All but the growth."""
        counted = all(wanted == found for wanted, found in self.refused.values())
        return counted and self.events > 0 and not (self.different or self.status or self.crashed)

    def __str__(self) -> str:
        refused = " ".join(
            f"{reason} {found}" if wanted == found else f"{reason} {found}!={wanted}"
            for reason, (wanted, found) in sorted(self.refused.items())
        )
        start, end = (size / 2**20 for size in self.rss)
        return (
            f"messages {self.messages} refused: {refused}; RSS {start:.1f} MiB at {_WARM:.0%}, {end:.1f} MiB "
            f"at the end ({end / start - 1:+.2%}); events compared {self.events}, different {self.different}"
        )


def run(bundle: Path, folder: Path, messages: int, seed: int) -> Outcome:
    """So many messages into a service of its own, over two connections."""
    valid = messages_of(STREAMS, 25 * (messages // _SHARE // STREAMS))
    expected = expected_events(bundle, valid)
    hostile = iter(Fuzzer(seed, LIMITS, expected.keys(), epoch=1))
    service = _Service(_config(folder, bundle), folder)
    outcome = Outcome()
    wanted: Counter[str] = Counter()

    def fuzz(count: int) -> Iterator[list[bytes]]:
        for shot in islice(hostile, count):
            parts = [shot.data] if wanted.total() % 200 else [shot.data, b"", shot.data]
            wanted[shot.reason or "taken"] += len(parts) == 1
            wanted["multipart"] += len(parts) > 1
            yield parts

    with zmq.Context() as context, context.socket(zmq.PUSH) as ours, context.socket(zmq.PUSH) as theirs:
        try:
            for socket in (ours, theirs):
                socket.sndhwm, socket.linger = 64, 0
                socket.sndtimeo = 30_000
                socket.connect(service.address)
            for number, message in enumerate(valid):
                wanted["taken"] += 1
                ours.send(encode(message))
                if number == 3 * STREAMS:
                    service.await_messages(wanted.total())  # they are open: what is older cannot harm them
                if number >= 3 * STREAMS:
                    for parts in fuzz(_SHARE - 1):
                        (ours if len(parts[0]) % 2 else theirs).send_multipart(parts)
                if number == round(_WARM * len(valid)):
                    service.await_messages(wanted.total())
                    start = service.rss()
            for parts in fuzz(messages - wanted.total()):
                theirs.send_multipart(parts)
            service.await_messages(wanted.total())
            outcome.rss = start, service.rss()
            found = service.counted()
        finally:
            outcome.status = service.stop()
    outcome.messages = wanted.total()
    outcome.refused = {
        reason: (wanted[reason], found[reason])
        for reason in sorted((wanted | found).keys() - {"max_streams"})
    }
    outcome.crashed = "Traceback" in service.log()
    told: dict[str, list[bytes]] = {}
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        told.setdefault(json.loads(line)["stream"], []).append(line)
    for stream, events in expected.items():
        outcome.events += len(events)
        outcome.different += told.get(stream) != events
    return outcome


def _config(folder: Path, bundle: Path) -> Path:
    path = folder / "service.yaml"
    values = {
        "bundle": str(bundle),
        "source": {"zmq": {"endpoint": "pull+bind:tcp://127.0.0.1:*", "max_message_bytes": LIMITS.max_bytes}},
        "sinks": [{"file": "events.jsonl"}],
        "dead_letters": {"file": "letters.jsonl", "max_bytes": 2**20},
        "http": {"address": "127.0.0.1:0"},
        "queue_bytes": 2**20,
        "threads": 1,
        "decoding": DECODING,
        **RUN,
        "max_streams": 64,
    }
    path.write_text(yaml.safe_dump(values))
    return path


class _Service:
    """`onset run` as a process, asked over HTTP what it counted."""

    def __init__(self, config: Path, folder: Path) -> None:
        self._path = folder / "log"
        self._worker = WorkerProcess(config, self._path)
        self.address = self._said(r"ready: listening on (\S+) for")
        self._metrics = self._said(r"metrics at (http://\S+)") + "/metrics"

    def log(self) -> str:
        return self._path.read_text(errors="replace")

    def stop(self) -> int:
        return self._worker.stop()

    def rss(self) -> int:
        """Bytes of memory that are its own or shared."""
        pages = int(Path(f"/proc/{self._worker.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def counted(self) -> Counter[str]:
        """Messages by what became of them: `taken`, or refused for a reason."""
        with urllib.request.urlopen(self._metrics, timeout=30) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "onset_messages_total":
                    found["taken"] = round(sample.value)
                elif sample.name == "onset_refused_total":
                    found[sample.labels["reason"]] = round(sample.value)
        return found

    def await_messages(self, count: int, seconds: float = 60.0) -> None:
        """Until so many are taken or refused. Fails when nothing more has become of any for so long."""
        last, deadline = -1, 0.0
        while (settled := self._settled()) < count:
            assert self._worker.process.poll() is None, f"the service is gone: {self.log()[-4000:]}"
            if settled > last:
                last, deadline = settled, time.monotonic() + seconds
            assert time.monotonic() < deadline, f"{settled} of {count} messages: {self.log()[-4000:]}"
            time.sleep(0.05)

    def _settled(self) -> int:
        found = self.counted()
        return found.total() - found["max_streams"]  # what finds no place was taken before

    def _said(self, pattern: str, seconds: float = 30.0) -> str:
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.log())) is None:
            assert time.monotonic() < deadline, f"not ready: {self.log()}"
            time.sleep(0.05)
        return match[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tests.tiny import write_tiny_bundle

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcome = run(write_tiny_bundle(folder / "bundle"), folder, options.messages, options.seed)
        print(outcome)  # noqa: T201
        if not outcome.is_well or outcome.rss[1] > 1.01 * outcome.rss[0]:
            sys.exit((folder / "log").read_text(errors="replace")[-8000:])


if __name__ == "__main__":
    main()
