"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.notify import Notifier


class Manager:
    """The other end: a socket as systemd opens it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + name[1:] if name.startswith("@") else name)
        self._socket.settimeout(10)

    def hears(self) -> str:
        return self._socket.recv(4096).decode()

    def hears_nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self._socket.settimeout(10)
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract names are Linux's")
    opened = Manager(str(tmp_path / "notify") if request.param == "path" else f"@onset-{uuid.uuid4()}")
    yield opened
    opened.close()


def test_every_state_is_one_datagram(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.name})
    notifier.ready()
    assert manager.hears() == "READY=1"
    notifier.status("7 streams")
    assert manager.hears() == "STATUS=7 streams"
    notifier.stopping()
    assert manager.hears() == "STOPPING=1"
    notifier.close()
    notifier.ready()
    assert manager.hears_nothing()


def test_a_reload_tells_when_it_began(manager: Manager) -> None:
    before = time.monotonic_ns() // 1000
    Notifier({"NOTIFY_SOCKET": manager.name}).reloading()
    first, second = manager.hears().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_status_cannot_smuggle_in_another_assignment(manager: Manager) -> None:
    Notifier({"NOTIFY_SOCKET": manager.name}).status("stream 'a\nMAINPID=1'")
    assert manager.hears() == "STATUS=stream 'a MAINPID=1'"


def test_the_watchdog_hears_twice_an_interval_however_often_the_loop_goes_round(manager: Manager) -> None:
    now = [100.0]
    notifier = Notifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "3000000"}, lambda: now[0])
    for now[0] in (100.0, 100.1, 101.4):
        notifier.alive()
    assert manager.hears() == "WATCHDOG=1"
    assert manager.hears_nothing()
    now[0] = 101.5
    notifier.alive()
    assert manager.hears() == "WATCHDOG=1"


def test_systemd_is_asked_for_patience_while_a_start_goes_on(manager: Manager) -> None:
    now = [100.0]
    notifier = Notifier({"NOTIFY_SOCKET": manager.name}, lambda: now[0])
    for now[0] in (100.0, 110.0, 129.9):
        notifier.starting()
    assert manager.hears() == "EXTEND_TIMEOUT_USEC=60000000"
    assert manager.hears_nothing()
    now[0] = 130.0
    notifier.starting()
    assert manager.hears() == "EXTEND_TIMEOUT_USEC=60000000"


@pytest.mark.parametrize(
    "environ", [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}]
)
def test_a_watchdog_that_is_not_for_this_process_hears_nothing(
    manager: Manager, environ: dict[str, str]
) -> None:
    Notifier(environ | {"NOTIFY_SOCKET": manager.name}).alive()
    assert manager.hears_nothing()
    Notifier({"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "9", "WATCHDOG_PID": str(os.getpid())}).alive()
    assert manager.hears() == "WATCHDOG=1"


@pytest.mark.parametrize("name", [None, "", "/nowhere/notify", "vsock:2:1", "/" + "x" * 300, "relative"])
def test_where_nobody_listens_nothing_is_raised(name: str | None, caplog: pytest.LogCaptureFixture) -> None:
    notifier = Notifier({"WATCHDOG_USEC": "9"} | ({} if name is None else {"NOTIFY_SOCKET": name}))
    for _ in range(3):
        notifier.ready()
        notifier.alive()
        notifier.status("\udcff")
    notifier.close()
    # said once, where somebody was named
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == bool(name)


def test_a_manager_that_does_not_read_blocks_nothing(manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.name})
    for _ in range(10_000):
        notifier.status("more than the queue of a socket holds")
    assert manager.hears() == "STATUS=more than the queue of a socket holds"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_unit_file_is_one_that_systemd_reads_without_complaint(tmp_path: Path) -> None:
    unit = (Path(__file__).resolve().parents[2] / "deploy/onset.service").read_text()
    assert "Type=notify\n" in unit
    copy = tmp_path / "onset.service"
    copy.write_text(unit.replace("/opt/onset/.venv/bin/onset", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if "onset.service" in line] == []
