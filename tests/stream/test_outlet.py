"""One sink's end is one sink's end: it is told and counted, and the service and the other sinks go on."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from stream.counters import Counters
from stream.events import Event
from stream.line_sink import FileSink, LineSink
from stream.outlet import Outlet
from stream.wire import encode
from tests.kafka.flow import readiness
from tests.kafka.ports import free_port
from tests.stream.test_full_spool import await_readiness, lives, undisturbed
from tests.stream.test_service import GOOD, Process, await_event, good, read, write_config

LIMIT = 1000


def events_of(numbers: Sequence[int]) -> list[Event]:
    return [Event("stream.started", f"s{number}", number, "tiny@0", 0.0) for number in numbers]


def numbers_in(path: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def outlet_to(path: Path, drop_oldest: bool = True, limit: int = LIMIT) -> Iterator[tuple[Outlet, Counters]]:
    counters = Counters()
    outlet = Outlet(str(path), lambda patience: FileSink(path, patience), counters, limit, drop_oldest)
    try:
        yield outlet, counters
    finally:
        outlet.finish(time.monotonic() + 2.0)
        outlet.join()


def lost(counters: Counters) -> float:
    return sum(value for name, value in counters.snapshot().items() if name.startswith("sink_events_lost"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_and_free_again_has_every_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    with outlet_to(path) as (outlet, counters):
        outlet.put(events_of(range(10)), 0.0)
        until(lambda: "No space left" in (outlet.trouble or ""))
        outlet.put(events_of(range(10, 20)), 0.0)
        path.unlink()
        until(lambda: path.exists() and len(numbers_in(path)) == 20)
        until(lambda: outlet.trouble is None)
    assert numbers_in(path) == list(range(20))
    assert lost(counters) == 0
    assert "takes events again; 0 were lost meanwhile" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_a_full_queue_cannot_hold_is_lost_oldest_first_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    with outlet_to(path, limit=5) as (outlet, counters):
        outlet.put(events_of([0]), 0.0)
        until(lambda: outlet.trouble is not None)
        for number in range(1, 20):
            outlet.put(events_of([number]), 0.0)
        path.unlink()
        until(lambda: path.exists() and len(numbers_in(path)) == 6)
        until(lambda: outlet.trouble is None)
    assert numbers_in(path) == [0, 15, 16, 17, 18, 19]
    assert lost(counters) == 14
    assert "takes events again; 14 were lost meanwhile" in caplog.text


def test_what_waits_for_room_in_a_sink_that_goes_is_counted() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.write(writer, bytes(4096))
    counters = Counters()
    outlet = Outlet("pipe", lambda patience: LineSink("pipe", writer, patience), counters, 1, False)
    outlet.put(events_of([0]), 0.0)
    until(lambda: outlet._in_flight == 1)
    assert outlet.put(events_of([1]), 0.0)
    late = threading.Thread(target=outlet.put, args=(events_of([2, 3]), 30.0))
    late.start()
    until(lambda: bool(outlet._lock._waiters))  # type: ignore[attr-defined]
    os.close(reader)
    late.join(30)
    outlet.finish(time.monotonic() + 5.0)
    outlet.join()
    assert outlet.is_gone
    assert lost(counters) == 4


def test_a_queue_that_may_not_drop_says_that_it_is_full(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with outlet_to(path, drop_oldest=False, limit=5) as (outlet, counters):
        outlet.put(events_of([0]), 0.0)
        until(lambda: outlet.trouble is not None)
        assert outlet.put(events_of(range(1, 6)), 0.0)
        assert not outlet.put(events_of([6]), 0.05)
        outlet.lose(events_of([6]))
    assert lost(counters) == 7, "nobody reads it until its end: what waited is lost, and counted"


def test_a_file_that_is_removed_or_rotated_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "below" / "events.jsonl"
    with outlet_to(path) as (outlet, _):
        outlet.put(events_of([0]), 0.0)
        until(lambda: path.exists() and numbers_in(path) == [0])
        path.rename(tmp_path / "events.1")
        outlet.put(events_of([1]), 0.0)
        until(lambda: path.exists() and numbers_in(path) == [1])
        path.unlink()
        path.parent.rmdir()
        outlet.put(events_of([2]), 0.0)
        until(lambda: path.exists() and numbers_in(path) == [2])
    assert numbers_in(tmp_path / "events.1") == [0]


def test_a_pipe_whose_reader_comes_late_reads_slowly_and_leaves_gets_whole_lines_in_order(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    got: list[bytes] = []

    def read_some(lines: int) -> None:
        with path.open("rb", buffering=0) as pipe:
            data = b""
            while data.count(b"\n") < lines:
                data += pipe.read(1000)
            got.append(data)

    with outlet_to(path, limit=5000) as (outlet, counters):
        outlet.put(events_of(range(3000)), 0.0)  # more than a pipe holds
        until(lambda: "nobody reads it" in (outlet.trouble or ""))
        first = threading.Thread(target=read_some, args=(3000,), daemon=True)
        first.start()
        first.join(30)
        assert [json.loads(line)["epoch"] for line in got[0].splitlines()] == list(range(3000))
        outlet.put(events_of([3000]), 0.0)
        until(lambda: "nobody reads it" in (outlet.trouble or ""))
        second = threading.Thread(target=read_some, args=(1,), daemon=True)
        second.start()
        second.join(30)
    assert json.loads(got[1])["epoch"] == 3000
    assert lost(counters) == 0


def test_a_reader_of_standard_output_that_goes_away_ends_nothing_else(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    port = free_port()
    sinks: list[dict[str, Any]] = [{"stdout": True}, {"file": "e.jsonl"}]
    service = Process(write_config(tmp_path, tiny_bundle, sinks=sinks, http={"address": f"127.0.0.1:{port}"}))
    try:
        assert service.process.stdout is not None
        service.process.stdout.close()
        service.process.stdout = None
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.linger = 10_000
            socket.connect(service.address)
            for start in range(0, len(GOOD), 17):
                socket.send(good(start, min(len(GOOD), start + 17)))
            await_event(tmp_path / "e.jsonl", "good", "stream.ended")
            assert "its reader has gone away" in await_readiness(port, 503)["sinks"]
            status, _ = service.stop()
    finally:
        service.process.kill()
    assert status == 0, service.log
    assert "standard output: its reader has gone away; the other sinks go on" in service.log
    assert "sink_events_lost{stdout}" in service.log.splitlines()[-1]
    assert len(read(tmp_path / "e.jsonl")) > 6


@pytest.mark.parametrize(
    ("sinks", "why"),
    [
        ([{"stdout": True}], "no sink is left, the service ends"),
        ([{"stdout": True, "on_error": "stop"}, {"file": "e.jsonl"}], "the service ends (`on_error: stop`)"),
    ],
    ids=["the last sink", "on_error: stop"],
)
def test_a_service_that_nobody_hears_or_that_is_to_stop_ends_with_an_error(
    sinks: list[dict[str, Any]], why: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    service = Process(write_config(tmp_path, tiny_bundle, sinks=sinks))
    try:
        assert service.process.stdout is not None
        service.process.stdout.close()
        service.process.stdout = None
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.linger = 0
            socket.connect(service.address)
            socket.send(good(0, 500))
            assert service.process.wait(30) == 2
        assert service.process.stderr is not None
        assert why in " ".join(service.process.stderr.read().split())
    finally:
        service.process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="makes a pipe small")
def test_sinks_that_are_stuck_hold_up_neither_the_others_nor_the_end(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    port, messages, grace = free_port(), lives(), 6.0
    spool = {
        "connection": {"bootstrap": f"127.0.0.1:{free_port()}"},
        "topic": "events",
        "spool": "spool.db",
        "spool_bytes": 65536,
        "when_full": "drop-oldest",
    }
    sinks: list[dict[str, Any]] = [{"stdout": True}, {"file": "pipe"}, {"kafka": spool}, {"file": "e.jsonl"}]
    http = {"address": f"127.0.0.1:{port}"}
    service = Process(write_config(tmp_path, tiny_bundle, sinks=sinks, http=http, grace=grace))
    try:
        assert service.process.stdout is not None
        fcntl.fcntl(service.process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # less than there is to say
        with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
            socket.linger = 10_000
            socket.connect(service.address)
            for message in messages:
                socket.send(encode(message))
            expected = undisturbed(tiny_bundle, messages)
            path = tmp_path / "e.jsonl"
            until(lambda: path.exists() and len(read(path)) == len(expected))
            assert path.read_bytes() == b"".join(line + b"\n" for line in expected)
            until(lambda: "stdout has taken nothing" in readiness(port)[1].get("sinks", ""))
            service.process.send_signal(signal.SIGTERM)
            # With 0: in order. Soon after its grace a process that has not ended is ended, with 1.
            assert service.process.wait(60) == 0
    finally:
        service.process.kill()
