"""The service's main loop: floods, a slow engine, bundles that change, letters nobody can read, health."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from engine import OnnxSession, Slot, choice
from stream import service
from stream.config import ServiceConfig
from stream.counters import Counters
from stream.dead_letters import DeadLetterSettings
from stream.events import Event
from stream.health import HttpSettings
from stream.reload import Reload
from stream.runtime import Runtime
from stream.wire import Message, encode
from tests.stream.test_service import DECODING, RATE, await_event, config_of, of, read, wave


@contextmanager
def running(config: ServiceConfig, reload: Reload | None = None) -> Iterator[Callable[[bytes], None]]:
    """A service in a thread; yields what sends to it. Leaving stops it in order."""
    stop, ready = threading.Event(), threading.Event()
    where: list[str] = []
    result: list[Counters] = []

    def on_ready(address: str) -> None:
        where.append(address)
        ready.set()

    thread = threading.Thread(target=lambda: result.append(service.serve(config, stop, on_ready, reload)))
    thread.start()
    context = zmq.Context()
    try:
        assert ready.wait(30)
        socket = context.socket(zmq.PUSH)
        socket.connect(where[0])
        yield socket.send
    finally:
        context.destroy(linger=10_000)
        stop.set()
        thread.join(60)
    assert result, "the service crashed"


def message(stream: str, samples: np.ndarray, start: int, stop: int) -> bytes:
    return encode(Message(stream, start, samples[start:stop], RATE, end=stop == len(samples)))


def undisturbed(bundle: Path, stream: str, samples: np.ndarray) -> list[dict[str, Any]]:
    events: list[Event] = []
    session = OnnxSession(bundle, slots=8, threads=1)
    decoding = session.manifest.decoding.model_copy(update=DECODING)
    runtime = Runtime(session, events.extend, config_of(bundle, Path("none")), None, decoding)
    runtime.offer(Message(stream, 0, samples, RATE, end=True))
    runtime.drain()
    return [json.loads(event.to_json()) for event in events]


class SlowSession(OnnxSession):
    """An engine that takes its time."""

    seconds = 0.01

    def step(self, slots: Sequence[Slot], samples: Any, mask: Any) -> Any:
        time.sleep(self.seconds)
        return super().step(slots, samples, mask)


def test_one_stream_that_floods_does_not_starve_another(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    path = tmp_path / "events.jsonl"
    flood, quiet = wave(1, 20_000), wave(2, 400)
    with running(config_of(tiny_bundle, path)) as send:
        for start in range(0, 20_000, 100):
            send(message("flood", flood, start, start + 100))
        for start in range(0, 400, 100):
            send(message("quiet", quiet, start, start + 100))
        await_event(path, "quiet", "stream.ended")
        ended = [e["stream"] for e in read(path) if e["type"] == "stream.ended"]
        assert ended == ["quiet"], "the flood, sent first and fifty times as long, was over before"
        monkeypatch.setattr(SlowSession, "seconds", 0.0)
    assert of(read(path), "quiet") == undisturbed(tiny_bundle, "quiet", quiet)
    assert of(read(path), "flood") == undisturbed(tiny_bundle, "flood", flood)


def test_with_drop_oldest_a_slow_engine_loses_samples_and_says_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    path = tmp_path / "events.jsonl"
    monkeypatch.setattr(SlowSession, "seconds", 0.0)
    samples = wave(1, 40_000)
    config = config_of(tiny_bundle, path, overload="drop-oldest", queue_bytes=64 * 1024, max_gap=0.0)
    with running(config) as send:
        for start in range(0, len(samples), 400):
            send(message("flood", samples, start, start + 400))
            if start == 0:
                await_event(path, "flood", "stream.started")
                monkeypatch.setattr(SlowSession, "seconds", 0.05)
        await_event(path, "flood", "stream.dropped", 60)
        monkeypatch.setattr(SlowSession, "seconds", 0.0)
    told = [event for event in read(path) if event["type"] == "stream.dropped"]
    assert all("samples were dropped: the engine cannot keep up" in event["reason"] for event in told)
    gaps = [e for e in read(path) if e["type"] == "stream.ended" and e["reason"].startswith("gap of")]
    assert gaps, "what was dropped is missing"


def test_a_bundle_that_changes_takes_over_without_losing_a_sample(
    tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    path = tmp_path / "events.jsonl"
    samples = wave(3, 4000)
    config = config_of(bundle, path)
    reload = Reload(bundle, watch=False)
    with running(config, reload) as send:
        for start in range(0, 2000, 50):
            send(message("one", samples, start, start + 50))
        await_event(path, "one", "action.started")
        # What comes before the swap is digested before it, or by the new bundle: either way it is not lost.
        shutil.copytree(other_bundle, bundle, dirs_exist_ok=True)
        reload.request()
        for start in range(2000, 4000, 50):
            send(message("one", samples, start, start + 50))
        await_event(path, "one", "stream.ended")
    events = read(path)
    spoke = list(dict.fromkeys(event["bundle"] for event in events))
    assert len(spoke) == 2, "each event says which bundle spoke"
    assert [event["type"] for event in events].count("stream.started") == 1
    assert events[-1]["time"] == 4000 / RATE
    assert events[-1]["reason"] == "end of stream"
    started = [e["instance_id"] for e in events if e["type"] == "action.started"]
    over = [e["instance_id"] for e in events if e["type"] in ("action.ended", "action.aborted")]
    assert sorted(started) == sorted(over)


def test_a_bundle_that_cannot_be_used_changes_nothing(
    tiny_bundle: Path, hapt_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    path = tmp_path / "events.jsonl"
    samples = wave(3, 1000)
    reload = Reload(bundle, watch=False)
    with running(config_of(bundle, path), reload) as send:
        send(message("one", samples, 0, 500))
        await_event(path, "one", "stream.started")
        for change in ("other channels", "damaged"):
            if change == "damaged":
                (bundle / "model.onnx").write_bytes(b"junk")
            else:
                shutil.copytree(hapt_bundle, bundle, dirs_exist_ok=True)
            reload.request()
            deadline = time.monotonic() + 30
            while caplog.text.count("the bundle stays tiny@") < (2 if change == "damaged" else 1):
                assert time.monotonic() < deadline, caplog.text
                time.sleep(0.02)
        send(message("one", samples, 500, 1000))
        await_event(path, "one", "stream.ended")
    assert read(path) == undisturbed(tiny_bundle, "one", samples)
    assert "start another service for it" in caplog.text
    assert "sha256" in caplog.text


def test_a_change_of_the_files_is_noticed_once(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    now = 0.0
    reload = Reload(bundle, watch=True, clock=lambda: now)
    assert not reload.is_due()
    manifest = bundle / "bundle.json"
    text = manifest.read_text()
    manifest.unlink()
    now = 2.0
    assert not reload.is_due(), "it is just being written"
    manifest.write_text(text + "\n")
    now = 2.5
    assert not reload.is_due(), "it is looked at once a second"
    now = 4.0
    assert reload.is_due()
    assert not reload.is_due()
    reload.request()
    assert reload.is_due()


def test_what_cannot_be_read_is_kept_with_its_reason(tiny_bundle: Path, tmp_path: Path) -> None:
    letters = tmp_path / "letters.jsonl"
    config = config_of(tiny_bundle, tmp_path / "events.jsonl", dead_letters=DeadLetterSettings(file=letters))
    with running(config) as send:
        send(b"\xc1 what is this?")
        send(message("one", wave(1, 100), 0, 100))
        await_event(tmp_path / "events.jsonl", "one", "stream.ended")
    (letter,) = [json.loads(line) for line in letters.read_text().splitlines()]
    assert letter["reason"] == "not_msgpack"
    assert base64.b64decode(letter["data"]) == b"\xc1 what is this?"


def test_health_and_metrics_tell_what_the_service_does(tiny_bundle: Path, tmp_path: Path) -> None:
    port = _free_port()
    config = config_of(tiny_bundle, tmp_path / "events.jsonl", http=HttpSettings(address=f"127.0.0.1:{port}"))

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    with running(config) as send:
        assert get("/live")
        assert get("/ready")
        send(message("one", wave(1, 1000), 0, 1000))
        await_event(tmp_path / "events.jsonl", "one", "stream.ended")
        metrics = get("/metrics")
    for line in ("onset_step_seconds_count", "onset_batch_streams_bucket", 'onset_actions_total{label="'):
        assert line in metrics
    assert "onset_messages_total 1.0" in metrics
    with pytest.raises(urllib.error.URLError):
        get("/live")


def _free_port() -> int:
    from tests.kafka.ports import free_port

    return free_port()


def test_a_kafka_source_takes_no_sinks_and_zmq_needs_some(tiny_bundle: Path) -> None:
    kafka = {"connection": {"bootstrap": "127.0.0.1:9"}, "topic": "a", "events": "b"}
    for source, sinks, why in (
        ({"kafka": kafka}, [{"stdout": True}], "does not go with a Kafka source"),
        ({"zmq": {}}, [], "where do events go"),
        ({"zmq": {}, "kafka": kafka}, [], "expected either `zmq` or `kafka`"),
        ({"kafka": kafka | {"events": "a"}}, [], "two of them have one name"),
    ):
        with pytest.raises(ValueError, match=why):
            ServiceConfig.model_validate({"bundle": str(tiny_bundle), "source": source, "sinks": sinks})


class Unforeseen(OnnxSession):
    """An engine that fails in a way nobody foresaw: when it is opened, or when it is used."""

    failing = ""

    def __init__(self, *arguments: Any) -> None:
        if self.failing == "opened":
            raise PermissionError(13, "Permission denied", "plans")
        super().__init__(*arguments)
        self._is_failing = self.failing == "used"

    def step(self, slots: Sequence[Slot], samples: Any, mask: Any) -> Any:
        if self._is_failing:
            raise RuntimeError("out of memory")
        return super().step(slots, samples, mask)


def test_whatever_a_swap_raises_the_old_bundle_goes_on_and_the_log_says_why(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", Unforeseen)
    path = tmp_path / "events.jsonl"
    samples, short = wave(3, 1000), wave(4, 10)
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    reload = Reload(bundle, watch=False)
    with running(config_of(bundle, path), reload) as send:
        send(message("one", samples, 0, 500))
        send(encode(Message("short", 0, short, RATE)))
        await_event(path, "short", "stream.started")
        await_event(path, "one", "stream.started")
        for number, failing in enumerate(("opened", "used"), 1):
            monkeypatch.setattr(Unforeseen, "failing", failing)
            manifest = json.loads((bundle / "bundle.json").read_text())
            manifest["training"]["steps"] = number  # else it is what it was, and takes over nothing
            (bundle / "bundle.json").write_text(json.dumps(manifest))
            reload.request()
            deadline = time.monotonic() + 30
            while caplog.text.count("the bundle stays tiny@") < number:
                assert time.monotonic() < deadline, caplog.text
                time.sleep(0.02)
        send(message("one", samples, 500, 1000))
        await_event(path, "one", "stream.ended")
    assert of(read(path), "one") == undisturbed(tiny_bundle, "one", samples)
    for why in ("PermissionError: [Errno 13] Permission denied: 'plans'", "RuntimeError: out of memory"):
        assert why in caplog.text
