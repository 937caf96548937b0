"""A quiet run, then the same with all abusers around it, and what has to be true of the second."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from engine.plans import FOLDER
from stream.wire import Message, encode
from tests.stream.abuse.abuser import Abuser
from tests.stream.abuse.connections import CONNECTIONS
from tests.stream.abuse.floods import FLOODS
from tests.stream.abuse.polite import STREAMS, Polite, messages_of
from tests.stream.abuse.producers import PRODUCERS
from tests.stream.abuse.service import Service, silent_broker
from tests.stream.abuse.surroundings import SURROUNDINGS, Deaf

ABUSERS: Mapping[str, type[Abuser]] = {
    abuser.name: abuser for abuser in (*PRODUCERS, *FLOODS, *CONNECTIONS, *SURROUNDINGS)
}
# Seconds. What the polite streams have sent is worked off, `/live` answers, what was opened is closed, and
# SIGTERM has ended the service, each within its own.
_LATE, _SILENT, _CALM, _GRACE = 120.0, 30.0, 300.0, 30.0
# Everything goes on again for so long before the end.
_FINALE = 5.0
# Descriptors that may come and go by themselves: scrapes, the Kafka client, a file that is rotated.
_MORE_DESCRIPTORS = 16
# Of memory, from the second fifth of the time to the last.
MOST_GROWTH = 0.10


@dataclass
class Outcome:
    """What was done, and what came of it."""

    acts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """what should not have happened, a sentence each"""
    events: int = 0
    different: int = 0
    lost: int = 0
    rss: tuple[int, int] = 0, 0
    descriptors: tuple[int, int] = 0, 0
    silent: float = 0.0
    ending: float = 0.0

    def __str__(self) -> str:
        acts = " ".join(f"{name} {count}" for name, count in self.acts.items())
        before, after = (size / 2**20 for size in self.rss)
        return (
            f"{acts}; polite streams {STREAMS} events {self.events} different {self.different} "
            f"lost {self.lost}; /live silent for {self.silent:.1f} s at most; RSS {before:.1f} MiB, then "
            f"{after:.1f} MiB; descriptors {self.descriptors[0]}, then {self.descriptors[1]}; ended within "
            f"{self.ending:.1f} s; faults {len(self.faults)}"
        )


def quiet(bundle: Path, folder: Path, messages: Sequence[Message]) -> dict[str, list[bytes]]:
    """The events of the polite streams where there is nobody else, as fast as it goes."""
    folder.mkdir()
    streams = {message.stream for message in messages}
    with silent_broker() as broker, Service(folder, bundle, broker) as service:
        with zmq.Context() as context, context.socket(zmq.PUSH) as producer:
            producer.linger, producer.sndtimeo = 0, 60_000
            producer.connect(f"tcp://{service.address}")
            for message in messages:
                producer.send(encode(message))
            assert _until(lambda: _over(service, streams), _LATE), (
                f"quiet, and not over: {service.log()[-4000:]}"
            )
        return service.told()


def run(
    bundle: Path,
    folder: Path,
    seconds: float,
    seed: int,
    only: Collection[str] = (),
    most_growth: float = MOST_GROWTH,
) -> Outcome:
    """So many seconds of abuse by all, or by `only` some; `folder` keeps the service's log and files."""
    messages = messages_of(seconds)
    wanted = quiet(bundle, folder / "quiet", messages)
    outcome = Outcome()
    own = folder / "bundle"
    shutil.copytree(bundle, own, ignore=shutil.ignore_patterns(FOLDER))  # others may have kept plans there
    with silent_broker() as broker, Service(folder, own, broker) as service:
        kinds = [kind for name, kind in ABUSERS.items() if not only or name in only]
        polite = Polite(service.address, messages)
        try:
            _abuse(service, kinds, seconds, seed, {message.stream for message in messages}, outcome)
        finally:
            polite.close()
        outcome.silent = service.seen.silent
        if service.seen.rss:
            outcome.rss = service.seen.growth()
    _compare(wanted, service.told(), outcome)
    before, after = outcome.rss
    if after > (1 + most_growth) * before:
        outcome.faults.append(f"memory has grown by {after / before - 1:.1%}")
    if service.seen.unwell:
        outcome.faults.append(f"/live said {len(service.seen.unwell)} times {service.seen.unwell[0]}")
    if outcome.silent > _SILENT:
        outcome.faults.append(f"/live did not answer for {outcome.silent:.1f} s")
    if "Traceback" in service.log():
        outcome.faults.append("a traceback is in its log")
    return outcome


def _abuse(
    service: Service,
    kinds: Sequence[type[Abuser]],
    seconds: float,
    seed: int,
    streams: Collection[str],
    outcome: Outcome,
) -> None:
    """Until the polite streams are over, then a while of calm, then everything again, and SIGTERM into it."""
    every = min(10.0, seconds / 15)  # of the changes around it
    assert _until(lambda: len(service.told().keys() & streams) == STREAMS, 60.0), service.log()[-4000:]
    descriptors = service.descriptors()
    deadline = time.monotonic() + seconds + _LATE
    abusers = _started(kinds, service, seed, every)
    try:
        is_over = _until(lambda: not service.is_up or _over(service, streams), deadline - time.monotonic())
    finally:
        _stopped(abusers, outcome)
    if not service.is_up:
        outcome.faults.append(f"it ended by itself, with status {service.process.returncode}")
        return
    if not is_over:
        outcome.faults.append(f"polite streams are not over {_LATE:g} s after their last message")
    _until(lambda: service.descriptors() <= descriptors + _MORE_DESCRIPTORS, _CALM)
    outcome.descriptors = descriptors, service.descriptors()
    if outcome.descriptors[1] > descriptors + _MORE_DESCRIPTORS:
        outcome.faults.append("descriptors stay open")
    abusers = _started(kinds, service, seed + 1, every)
    _until(lambda: not service.is_up, _FINALE)
    if Deaf in kinds:
        service.reads.clear()  # nobody reads its output at the end, either
    began = time.monotonic()
    service.terminate()
    has_ended = service.await_end(_GRACE)
    outcome.ending = time.monotonic() - began
    _stopped(abusers, outcome)
    if not has_ended:
        outcome.faults.append(f"it has not ended {_GRACE:g} s after SIGTERM")
    elif service.process.returncode:
        outcome.faults.append(f"its status after SIGTERM is {service.process.returncode}")


def _started(kinds: Sequence[type[Abuser]], service: Service, seed: int, every: float) -> list[Abuser]:
    abusers = [kind(service, seed, every) for kind in kinds]
    for abuser in abusers:
        abuser.start()
    return abusers


def _stopped(abusers: Sequence[Abuser], outcome: Outcome) -> None:
    for abuser in abusers:
        abuser.stop.set()
    for abuser in abusers:
        abuser.close()
        outcome.acts[abuser.name] = outcome.acts.get(abuser.name, 0) + abuser.count
        if abuser.failure is not None:
            outcome.faults.append(f"the abuse itself failed: {abuser.name}: {abuser.failure!r}")


def _compare(
    wanted: Mapping[str, Sequence[bytes]], found: Mapping[str, Sequence[bytes]], outcome: Outcome
) -> None:
    for stream, events in wanted.items():
        told = found.get(stream, ())
        outcome.events += len(events)
        outcome.different += list(told) != list(events)
        ends = [json.loads(line)["reason"] for line in told if b'"type":"stream.ended"' in line]
        outcome.lost += ends != ["end of stream"]
        if list(told) != list(events) and outcome.different == 1:
            pairs = zip([*told, b"nothing"], events, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), (b"more", b"nothing"))
            outcome.faults.append(f"{stream!r} differs first in {first[0]!r}, expected {first[1]!r}")
    if outcome.different:
        outcome.faults.append(
            f"{outcome.different} polite streams have other events, {outcome.lost} were lost"
        )


def _over(service: Service, streams: Collection[str]) -> bool:
    told = service.told()
    return all(any(b'"type":"stream.ended"' in line for line in told.get(one, ())) for one in streams)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds within so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True
