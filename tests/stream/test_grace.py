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
from stream import signals
from stream.reload import Reload
logging.basicConfig()
signals._MARGIN_SECONDS = 0.5
with signals.stopped_by_signals(Reload(Path("none"), watch=False), 0.5) as stop:
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


def test_a_bundle_asked_for_at_the_end_is_no_reason_to_die(tiny_bundle: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, threading\n"
        "from pathlib import Path\n"
        "from stream.reload import Reload\n"
        "from stream.signals import stopped_by_signals\n"
        "reload = Reload(Path('none'), watch=False)\n"
        "with stopped_by_signals(reload, 30.0) as stop:\n"
        "    for _ in range(2000):\n"  # also while something holds a lock
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        reload.is_due()\n"
        "        stop.wait(0.0)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.wait(30)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_log_that_nobody_reads_holds_up_nothing() -> None:
    script = (
        "import logging, sys, time\n"
        "from stream import logs\n"
        "logs.setup('text')\n"
        "for number in range(5000):\n"
        "    logging.getLogger('x').warning('%05d %s', number, 'x' * 100)\n"
        "print('through', flush=True)\n"
        "sys.stdin.readline()\n"
        "logging.getLogger('x').warning('the last')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "through\n"
        _, log = process.communicate("go\n", timeout=60)
    lines = log.splitlines()
    numbers = [int(line.split()[3]) for line in lines if line.endswith("xxx")]
    assert numbers == list(range(len(numbers)))
    assert 0 < len(numbers) < 5000
    lost = 5001 - len(numbers) - ("the last" in log)  # which comes while it is being read, or before
    assert lines[-1].endswith(f"{lost} lines of this log were lost: nobody read it")
