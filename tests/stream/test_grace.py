"""From SIGTERM to the end there is a grace, whatever there is still to do and whoever does not answer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import choice
from tests.stream.test_service import ROOT, Running, config_of, wave
from tests.stream.test_zmq_worker import SlowSession, message

STUCK = """
import logging, time
from pathlib import Path
from stream import service
from stream.reload import Reload
logging.basicConfig()
service._MARGIN_SECONDS = 0.5
with service.stopped_by_signals(Reload(Path("none"), watch=False), 0.5) as stop:
    print("ready", flush=True)
    while True:
        time.sleep(1)
"""


def test_what_has_arrived_is_processed_for_half_the_grace_and_the_rest_is_counted(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "OnnxSession", SlowSession)
    monkeypatch.setattr(SlowSession, "seconds", 0.2)
    service = Running(config_of(tiny_bundle, tmp_path / "events.jsonl", grace=2.0))
    send, samples = service.producer(), wave(1, 30_000)
    for start in range(0, len(samples), 100):  # minutes of work
        send(message("one", samples, start, start + 100))
    counters, _ = service.stop()  # which waits for 30 s
    assert counters["dropped_messages{stopped}"] > 50
    assert "messages had arrived and were not processed in time; raise `grace`" in caplog.text


def test_a_process_that_does_not_come_to_an_end_is_ended() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "not over 1 s after the signal, `grace` is 0.5; ended at once" in log
