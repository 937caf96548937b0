"""Who connects, and connects again: ever more slowly while nobody answers, soon after it went well."""

from __future__ import annotations

import errno
import socket
import threading
from collections import deque
from collections.abc import Sequence

from stream.zmq_endpoint import Endpoint, Target, resolve

_FIRST_SECONDS, _MAX_SECONDS = 0.1, 5.0
# A peer that was refused may be repaired and start again.
_REFUSED_SECONDS = 2.0
_CONNECT_SECONDS = 10.0


class Dialer:
    """The way to one endpoint: `step` until it returns a socket; `lost`, once that is lost."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._pause = _FIRST_SECONDS
        self._next = 0.0
        self._resolving: deque[Sequence[Target]] | None = None
        self._targets: list[Target] = []
        self._socket: socket.socket | None = None
        self._deadline = 0.0

    def step(self, now: float) -> socket.socket | None:
        """Go on, without waiting; a socket that is connected, once there is one."""
        if self._socket is not None:
            return self._look(now)
        if self._targets:
            self._connect(now)
        elif self._resolving:
            self._targets = list(self._resolving.popleft())
            self._resolving = None
            if not self._targets:
                self._rest(now)
        elif self._resolving is None and now >= self._next:
            self._resolve()
        return None

    def lost(self, now: float, went_well: bool, refused: bool = False) -> None:
        """The connection is over; `went_well`: the handshake was done."""
        if went_well:
            self._pause = _FIRST_SECONDS
        self._rest(now)
        if refused:
            self._next = now + _REFUSED_SECONDS

    def close(self) -> None:
        """Give up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _resolve(self) -> None:
        # In a thread: a name service that is away takes many seconds to say so.
        box: deque[Sequence[Target]] = deque()
        endpoint = self.endpoint

        def ask() -> None:
            try:
                box.append(resolve(endpoint))
            except OSError:
                box.append(())

        self._resolving = box
        threading.Thread(target=ask, name="resolve", daemon=True).start()

    def _connect(self, now: float) -> None:
        family, address = self._targets.pop(0)
        try:
            attempt = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no descriptors
            self._rest(now)
            return
        attempt.setblocking(False)
        if attempt.connect_ex(address) in (0, errno.EINPROGRESS):  # type: ignore[arg-type]
            self._socket, self._deadline = attempt, now + _CONNECT_SECONDS
            return
        attempt.close()
        if not self._targets:
            self._rest(now)

    def _look(self, now: float) -> socket.socket | None:
        attempt = self._socket
        assert attempt is not None
        try:
            failed = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not failed:
                # A port that nobody listens on may be the very one that the kernel gave to this attempt.
                if attempt.getpeername() == attempt.getsockname() != "":
                    raise ConnectionRefusedError
                self._socket, self._targets = None, []
                return attempt
        except OSError as problem:
            failed = 0 if problem.errno == errno.ENOTCONN and now < self._deadline else 1
        if failed:
            self.close()
            if not self._targets:
                self._rest(now)
        return None

    def _rest(self, now: float) -> None:
        self._targets = []
        self._next = now + self._pause
        self._pause = min(_MAX_SECONDS, 2 * self._pause)
