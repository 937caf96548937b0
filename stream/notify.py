"""What systemd is told (sd_notify): ready, reloading, stopping, a status, and that the service is alive.

One datagram each to the socket that NOTIFY_SOCKET names; where systemd did not start this process, nothing.
Nothing here blocks or raises: a service does not fail because nobody listens.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

# For how long a start that goes on asks for patience, beyond what TimeoutStartSec gives.
_START_SECONDS = 60.0


class Notifier:
    """Talks to the service manager that the environment names, if any."""

    def __init__(
        self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        path = environ.get("NOTIFY_SOCKET", "")
        # "@" is how the environment spells the first byte, 0, of a name in the abstract namespace.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket: socket.socket | None = None
        if path.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        elif path:
            log.warning("NOTIFY_SOCKET is %r, expected a path or an abstract name: systemd is not told", path)
        self._interval = _watchdog_seconds(environ) / 2
        self._next_alive = self._next_starting = clock()
        self._complained = False

    def ready(self) -> None:
        """The service has started, or has been reloaded."""
        self._send("READY=1")

    def starting(self) -> None:
        """The start goes on, and takes its time; told twice in the time that this asks for."""
        now = self._clock()
        if now >= self._next_starting and self._send(f"EXTEND_TIMEOUT_USEC={round(1e6 * _START_SECONDS)}"):
            self._next_starting = now + _START_SECONDS / 2

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        # The clock that systemd compares with: CLOCK_MONOTONIC, which `time.monotonic` is on Linux.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service is on its way out."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        # A line's end would begin another assignment.
        self._send(f"STATUS={' '.join(text.split())}")

    def alive(self) -> None:
        """The main loop has gone round; told twice in a watchdog's interval, whatever calls there are."""
        now = self._clock()
        if self._interval and now >= self._next_alive and self._send("WATCHDOG=1"):
            self._next_alive = now + self._interval

    def close(self) -> None:
        """Say nothing more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> bool:
        if self._socket is None:
            return False
        try:
            self._socket.sendto(text.encode("utf-8", "replace"), self._address)
        except (OSError, ValueError) as problem:
            if not self._complained:
                log.warning("systemd cannot be told at %r: %s", self._address, problem)
            self._complained = True
            return False
        return True


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """The watchdog's interval; 0 when there is none, or when it waits for another process."""
    interval, process = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not (interval.isascii() and interval.isdigit()) or process not in ("", str(os.getpid())):
        return 0.0
    return int(interval) / 1e6
