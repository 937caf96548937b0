"""A bundle that takes its time to open: the service lives meanwhile, and goes on with the one it has."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.choice import open_session
from stream import service
from stream.counters import Counters
from stream.health import HttpSettings
from stream.reload import Reload
from tests.kafka.flow import readiness
from tests.kafka.ports import free_port
from tests.stream.test_outlet import until
from tests.stream.test_service import await_event, config_of, wave
from tests.stream.test_zmq_worker import message, running

STALLED_SECONDS = 1.5


class Gate:
    """Opens sessions when it is told to."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.asked.set()
        assert self.open.wait(60)
        return open_session(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(service, "open_session", gate)
    yield gate
    gate.open.set()


def is_alive(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def test_a_start_that_builds_for_long_is_alive_and_not_ready(
    gate: Gate, tiny_bundle: Path, tmp_path: Path
) -> None:
    port = free_port()
    http = HttpSettings(address=f"127.0.0.1:{port}", stalled_after=STALLED_SECONDS)
    stop, ready = threading.Event(), threading.Event()
    config = config_of(tiny_bundle, tmp_path / "events.jsonl", http=http)
    result: list[Counters] = []
    thread = threading.Thread(
        target=lambda: result.append(service.serve(config, stop, lambda _: ready.set()))
    )
    thread.start()
    try:
        assert gate.asked.wait(30)
        time.sleep(2 * STALLED_SECONDS)
        until(lambda: is_alive(port))  # a beat may be late on a busy machine, not for ever
        status, missing = readiness(port)
        assert status == 503
        assert missing["engine"].startswith("starting: the bundle is opened, for ")
        gate.open.set()
        assert ready.wait(30)
        assert readiness(port)[0] == 200
    finally:
        gate.open.set()
        stop.set()
        thread.join(60)
    assert result


def test_a_start_that_builds_for_long_stops_when_it_is_told_to(
    gate: Gate, tiny_bundle: Path, tmp_path: Path
) -> None:
    stop = threading.Event()
    config = config_of(tiny_bundle, tmp_path / "events.jsonl", grace=1.0)
    result: list[Counters] = []
    thread = threading.Thread(target=lambda: result.append(service.serve(config, stop)))
    thread.start()
    assert gate.asked.wait(30)
    stop.set()
    thread.join(30)
    assert result, "it waits for what takes for ever"


def test_a_swap_that_builds_for_long_holds_up_no_stream(
    gate: Gate,
    tiny_bundle: Path,
    other_bundle: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    bundle, path = tmp_path / "bundle", tmp_path / "events.jsonl"
    shutil.copytree(tiny_bundle, bundle)
    reload = Reload(bundle, watch=False)
    gate.open.set()
    samples = wave(3, 1000)
    with running(config_of(bundle, path), reload) as send:
        gate.asked.clear()
        gate.open.clear()
        shutil.copytree(other_bundle, bundle, dirs_exist_ok=True)
        reload.request()
        assert gate.asked.wait(30)
        send(message("during", samples, 0, 1000))
        await_event(path, "during", "stream.ended")
        gate.open.set()
        until(lambda: "takes over from" in caplog.text)
        send(message("after", samples, 0, 1000))
        await_event(path, "after", "stream.ended")
    spoke = {event["stream"]: event["bundle"] for event in map(json.loads, path.read_text().splitlines())}
    assert spoke["during"] != spoke["after"]
