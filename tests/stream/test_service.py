"""The service, on a real socket and as a real process: what one producer sends, the others do not notice."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import yaml
import zmq

from engine import ConfigError, OnnxSession, OnsetError
from stream.config import ServiceConfig, Sink, Source, ZmqSettings, load_service_config
from stream.events import Event
from stream.line_sink import FileSink
from stream.runtime import Runtime
from stream.service import serve
from stream.sinks import WholeFile
from stream.wire import Message, encode

RATE = 50.0
DECODING = {"start_threshold": 0.2, "end_threshold": 0.1, "confident": 0.3, "hold": 0.1}
COMMAND = [sys.executable, "-c", "from onset import main; main()"]
ROOT = Path(__file__).resolve().parents[2]

Send = Callable[[bytes], None]


def wave(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.3 * np.cumsum(rng.normal(size=(n, 3)), axis=0)).astype(np.float32)


GOOD = wave(0, 1003)


def config_of(bundle: Path, events: Path, **settings: Any) -> ServiceConfig:
    values: dict[str, Any] = {
        "bundle": bundle,
        "source": Source(zmq=ZmqSettings(endpoint="pull+bind:tcp://127.0.0.1:*", max_message_bytes=65536)),
        "sinks": (Sink(file=events),),
        "max_streams": 8,
        "threads": 1,
        "reorder": 0.2,
        "max_gap": 0.4,
        "grace": 120.0,  # busy machines take their time
        "decoding": DECODING,
    }
    return ServiceConfig(**(values | settings))


class Running:
    """A service in a thread, and producers for it."""

    def __init__(self, config: ServiceConfig) -> None:
        self._stop = threading.Event()
        self._ready: queue.Queue[str] = queue.Queue()
        self._result: list[Mapping[str, float]] = []
        sink = config.sinks[0].file
        assert sink is not None
        self._path = sink
        self._thread = threading.Thread(target=self._run, args=(config,))
        self._thread.start()
        self._context = zmq.Context()
        self.address = self._ready.get(timeout=30)

    def _run(self, config: ServiceConfig) -> None:
        self._result.append(serve(config, self._stop, self._ready.put).snapshot())

    def producer(self) -> Send:
        """A connection of its own."""
        socket = self._context.socket(zmq.PUSH)
        socket.linger = 10_000
        socket.connect(self.address)
        return socket.send

    def await_end_of(self, stream: str) -> None:
        """Until the stream's end is in the file."""
        await_event(self._path, stream, "stream.ended")

    def stop(self) -> tuple[Mapping[str, float], list[dict[str, Any]]]:
        """Stop in order; what was counted, and the events."""
        self._context.destroy(linger=10_000)
        self._stop.set()
        self._thread.join(30)
        assert self._result, "the service crashed"
        return self._result[0], read(self._path)


def read(path: Path) -> list[dict[str, Any]]:
    # The service may be writing: what has no line's end yet is not a line yet.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def await_event(path: Path, stream: str, kind: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and any(e["stream"] == stream and e["type"] == kind for e in read(path)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no {kind} of {stream} within {seconds} s")


def good(start: int, stop: int, stream: str = "good", **changes: Any) -> bytes:
    message = Message(stream, start, GOOD[start:stop], RATE, end=stop == len(GOOD))
    return msgpack.packb(msgpack.unpackb(encode(message)) | changes)


@pytest.fixture(scope="module")
def expected(tiny_bundle: Path) -> list[dict[str, Any]]:
    """The events of the good stream when nobody else is there."""
    events: list[Event] = []
    session = OnnxSession(tiny_bundle, slots=64, threads=1)
    decoding = session.manifest.decoding.model_copy(update=DECODING)
    runtime = Runtime(
        session, events.extend, config_of(tiny_bundle, Path("none"), max_streams=64), None, decoding
    )
    runtime.offer(Message("good", 0, GOOD, RATE, end=True))
    runtime.drain()
    assert len(events) > 6
    return [json.loads(event.to_json()) for event in events]


def of(events: list[dict[str, Any]], stream: str) -> list[dict[str, Any]]:
    return [event for event in events if event["stream"] == stream]


def bad(**changes: Any) -> bytes:
    return good(0, 20, **({"stream": "bad"} | changes))


FAULTS: dict[str, tuple[str, bytes]] = {
    "malformed msgpack": ("not_msgpack", b"\xc1\x00\xff"),
    "cut off": ("not_msgpack", good(0, 20, stream="bad")[:-7]),
    "something behind it": ("not_msgpack", bad() + b"x"),
    "deep nesting": ("not_msgpack", b"\x91" * 50_000),
    "deep nesting of a field": (
        "bad_field",
        bad(epoch="deep").replace(b"\xa4deep", b"\x91" * 1000 + b"\xc0"),
    ),
    "empty": ("not_msgpack", b""),
    "no map": ("not_a_map", msgpack.packb([1, 2, 3])),
    "unknown version": ("unknown_version", bad(v=2)),
    "missing field": ("missing_field", msgpack.packb({"v": 1, "stream": "bad"})),
    "unknown field": ("unknown_field", bad(color="red")),
    "stream with a line break": ("bad_field", bad(stream="bad\nstream")),
    "wrong dtype": ("dtype", bad(dtype="float64")),
    "wrong shape": ("shape", bad(shape=[20])),
    "wrong channels": ("channels", bad(shape=[30, 2])),
    "wrong rate": ("rate", bad(rate=100.0)),
    "NaN": ("nan", bad(data=np.full((20, 3), np.nan, "<f4").tobytes())),
    "Inf": ("nan", bad(data=np.full((20, 3), np.inf, "<f4").tobytes())),
    "shorter than it says": ("payload", bad(data=bytes(239))),
    "longer than it says": ("payload", bad(data=bytes(241))),
    "too large": ("too_large", bytes(70_000)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_message_that_cannot_be_read_is_counted_and_harms_nobody(
    fault: str, tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    reason, data = FAULTS[fault]
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    one, other = service.producer(), service.producer()
    for start in range(0, len(GOOD), 17):
        one(good(start, min(len(GOOD), start + 17)))
        if start % 5 == 0:
            one(data)  # from the good producer's own connection,
            other(data)  # and from another's
    sent = 2 * len(range(0, len(GOOD), 17 * 5))
    service.await_end_of("good")
    counters, events = service.stop()
    assert counters[f"refused{{{reason}}}"] == sent
    assert [key for key in counters if key.startswith("refused")] == [f"refused{{{reason}}}"]
    assert events == expected


def test_a_message_of_100_mb_never_gets_in(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    one, other = service.producer(), service.producer()
    other(good(0, 20, stream="other"))
    for start in range(0, len(GOOD), 17):
        one(good(start, min(len(GOOD), start + 17)))
        if start == 170:
            other(bytes(100_000_000))
            other(good(20, 40, stream="other"))
    service.await_end_of("good")
    await_event(tmp_path / "events.jsonl", "other", "stream.started")
    counters, events = service.stop()
    assert of(events, "good") == expected
    # Hung up on once; the next message of the same producer came through its new connection.
    assert counters["peers_disconnected"] >= 1
    assert counters["samples"] == len(GOOD) + 40
    assert counters["gaps_filled"] == 0


def shuffled(rng: random.Random) -> tuple[list[bytes], int, int]:
    """The good stream with neighbours exchanged and some messages twice; how many of both."""
    starts = list(range(0, len(GOOD), 4))
    exchanged = [index for index in range(0, len(starts) - 2, 2) if rng.random() < 0.5]
    for index in exchanged:
        starts[index], starts[index + 1] = starts[index + 1], starts[index]
    repeats = set(rng.sample(starts[:-1], 80))
    sent = [start for start in starts for _ in range(1 + (start in repeats))]
    return [good(start, min(len(GOOD), start + 4)) for start in sent], len(exchanged), len(repeats)


def test_repeats_and_reordering_are_undone(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    send = service.producer()
    messages, exchanged, repeats = shuffled(random.Random(0))
    for data in messages:
        send(data)
    service.await_end_of("good")
    counters, events = service.stop()
    assert events == expected
    assert counters["reordered_messages"] == exchanged > 30
    assert counters["repeated_samples"] == 4 * repeats
    assert counters["late_samples"] == 0
    assert counters["masked_frames"] == 2  # 1003 samples are 250 frames of 4, 3 over, and padding to 252


def test_gaps_are_filled_or_end_the_epoch(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    send = service.producer()
    for start in range(0, len(GOOD), 17):
        stop = min(len(GOOD), start + 17)
        send(good(start, stop))
        # 17 samples are 0.34 s, which is filled; 85 are 1.7 s, which is not
        if start != 170 and not 340 <= start < 425:
            send(good(start, stop, stream="gaps"))
    service.await_end_of("good")
    counters, events = service.stop()
    assert of(events, "good") == expected
    assert counters["gaps_filled"] == 1
    assert counters["gaps_too_long"] == 1
    endings = [event["reason"] for event in of(events, "gaps") if event["type"] == "stream.ended"]
    assert endings == ["gap of 1.7 s", "end of stream"]


def test_a_stream_that_stops_in_the_middle_is_lost(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl", idle_timeout=0.5))
    send = service.producer()
    send(good(0, 300, stream="mute"))
    send(good(0, 500))
    # The good one goes on while the mute one runs out of time.
    start = 500
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and start < 900:
        send(good(start, start + 4))
        start += 4
        if any(e["type"] == "stream.ended" for e in read(tmp_path / "events.jsonl")):
            break
        time.sleep(0.02)
    send(good(start, len(GOOD)))
    service.await_end_of("good")
    counters, events = service.stop()
    assert of(events, "good") == expected
    assert of(events, "mute")[-1]["reason"] == "idle"
    assert counters["streams_evicted"] == 1
    assert counters["open_streams"] == 0


def test_a_flood_of_streams_finds_the_door_closed(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    one, flood = service.producer(), service.producer()
    one(good(0, 100))
    await_event(tmp_path / "events.jsonl", "good", "stream.started")
    for number in range(500):
        flood(good(0, 8, stream=f"flood {number}"))
    for start in range(100, len(GOOD), 50):
        one(good(start, min(len(GOOD), start + 50)))
    service.await_end_of("good")
    counters, events = service.stop()
    assert of(events, "good") == expected
    assert counters["refused{max_streams}"] == 493
    assert counters["streams_refused"] == 493


def write_config(folder: Path, bundle: Path, **changes: Any) -> Path:
    values = {
        "bundle": os.path.relpath(bundle, folder),
        "source": {"zmq": {"endpoint": "pull+bind:tcp://127.0.0.1:*"}},
        "sinks": [{"file": "out/events.jsonl"}],
        "threads": 1,
        "max_streams": 8,
        "reorder": 0.2,
        "max_gap": 0.4,
        "grace": 120.0,  # busy machines take their time
        "decoding": DECODING,
    }
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def onset(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


class Process:
    """`onset run` as a process of its own; its log is read until it is ready."""

    def __init__(self, config: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(config)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.log = ""
        for line in self.process.stderr:
            self.log += line
            match = re.search(r"ready: listening on (\S+)", line)
            if match:
                self.address = match[1]
                return
        raise AssertionError(f"the service did not start: {self.log}")

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 30) -> tuple[int, str]:
        """Its exit status, and what it wrote to standard output."""
        self.process.send_signal(number)
        out, log = self.process.communicate(timeout=seconds)
        self.log += log
        return self.process.returncode, out


def test_the_process_survives_everything_and_ends_in_order(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Process(write_config(tmp_path, tiny_bundle))
    try:
        before = service.peak_bytes() if sys.platform == "linux" else 0
        with zmq.Context() as context:
            context.linger = 10_000
            one, other, large = (context.socket(zmq.PUSH) for _ in range(3))
            for socket in (one, other, large):
                socket.connect(service.address)
            large.send(bytes(100_000_000))
            for data in (data for _, data in FAULTS.values()):
                other.send(data)
            other.send_multipart([b"a", b"b"])
            other.send(good(0, 333, stream="open"))
            for start in range(0, len(GOOD), 17):
                one.send(good(start, min(len(GOOD), start + 17)))
            events = tmp_path / "out" / "events.jsonl"
            await_event(events, "good", "stream.ended")
            await_event(events, "open", "stream.started")
            if before:
                assert service.peak_bytes() - before < 30_000_000
            status, out = service.stop(signal.SIGTERM)
            for socket in (one, other, large):
                socket.close(linger=0)
    finally:
        service.process.kill()
    assert status == 0, service.log
    assert out == ""
    assert of(read(events), "good") == expected
    assert of(read(events), "open")[-1]["reason"] == "service stopped"
    assert "Traceback" not in service.log
    summary = service.log.splitlines()[-1]
    for reason in {reason for reason, _ in FAULTS.values()} - {"too_large"} | {"multipart", "not_msgpack"}:
        assert f"refused{{{reason}}}" in summary
    assert "peers_disconnected" in summary
    warnings = [line for line in service.log.splitlines() if "message refused (payload)" in line]
    assert len(warnings) == 1  # of two: the log is bounded, the counter is not


def test_ctrl_c_ends_it_as_well_and_events_may_go_to_standard_output(
    tiny_bundle: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    service = Process(write_config(tmp_path, tiny_bundle, sinks=[{"stdout": True}, {"file": "e.jsonl"}]))
    try:
        np.save(tmp_path / "good.npy", GOOD)
        options = ["--rate", "50", "--speed", "0", "--epoch", "0"]
        sent = onset("send", str(tmp_path / "good.npy"), "--to", service.address, *options)
        assert sent.returncode == 0, sent.stderr
        await_event(tmp_path / "e.jsonl", "good", "stream.ended")
        status, out = service.stop(signal.SIGINT)
    finally:
        service.process.kill()
    assert status == 0, service.log
    assert [json.loads(line) for line in out.splitlines()] == expected
    assert out == (tmp_path / "e.jsonl").read_text()


@pytest.mark.parametrize("dtype", ["float16", "int16"])
def test_sent_recordings_arrive_at_their_pace_with_their_clock(
    dtype: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl"))
    for name, n in (("x", 200), ("y", 150)):
        np.save(tmp_path / f"{name}.npy", GOOD[:n])
    began = time.time()
    files = [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    options = ["--rate", "50", "--speed", "4", "--dtype", dtype]
    sent = onset("send", *files, "--to", service.address, *options)
    took = time.time() - began
    assert sent.returncode == 0, sent.stderr
    assert took >= 1.0  # 4 s of signal
    service.await_end_of("x")
    service.await_end_of("y")
    counters, events = service.stop()
    assert counters["samples"] == 350
    first = next(event for event in events if event["type"] == "stream.started")
    assert began <= first["captured"] <= began + took
    assert first["epoch"] >= int(began * 1e9)


def test_the_configuration_is_strict_and_knows_where_it_lies(tiny_bundle: Path, tmp_path: Path) -> None:
    config = load_service_config(write_config(tmp_path, tiny_bundle))
    assert config.bundle.resolve() == tiny_bundle.resolve()
    assert config.sinks[0].file == tmp_path / "out" / "events.jsonl"
    for changes, message in [
        ({"max_stream": 3}, r"`max_stream` is not a key here \(did you mean `max_streams`\?\)"),
        ({"decoding": {"star_threshold": 0.1}}, r"`star_threshold` is not a key .*`start_threshold`"),
        ({"sinks": []}, "sinks"),
        ({"sinks": [{}]}, "expected one of `kafka"),
        ({"reorder": -1}, "reorder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_service_config(write_config(tmp_path, tiny_bundle, **changes))


def test_wrong_options_are_one_sentence_and_status_2(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", GOOD)
    for arguments, words in [
        (["run", str(tmp_path / "gone.yaml")], "there is no such file"),
        (["send", str(tmp_path / "a.npy"), "--to", "tcp://127.0.0.1:1"], "--rate is missing"),
        (["send", str(tmp_path / "a.npy"), "--to", "nowhere", "--rate", "50"], "expected push+bind:ADDRESS"),
    ]:
        done = onset(*arguments)
        assert done.returncode == 2
        assert words in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def event(stream: str) -> Event:
    return Event("stream.started", stream, 0, "tiny@0", 0.0)


def test_a_file_with_half_a_line_gets_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"version":1}\n{"half')
    sink = FileSink(path)
    sink.write([event("a"), event("ü")])
    sink.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ['{"version":1}', '{"half']
    assert [json.loads(line)["stream"] for line in lines[2:]] == ["a", "ü"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence() -> None:
    sink = WholeFile(Path("/dev/full"))
    with pytest.raises(OnsetError, match=r"/dev/full: an event cannot be written: No space left"):
        sink.write([event("a")])
    with pytest.raises(OSError, match="No space left"):
        sink.close()  # the event is still in the buffer


def test_a_whole_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    sink = WholeFile(path)
    sink.write([event("a")])
    assert not path.exists()
    sink.close()
    assert json.loads(path.read_text())["stream"] == "a"
    with pytest.raises(ConfigError, match="cannot be written"):
        WholeFile(path / "below")
