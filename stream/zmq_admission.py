"""Who may send, by CURVE key: the answers to ZeroMQ's questions (ZAP, RFC 27), and their count."""

from __future__ import annotations

from collections.abc import Iterable

import zmq
from zmq.utils import z85

from stream.counters import Counters
from stream.throttle import Throttle

ZAP_DOMAIN = b"onset"
# Where ZeroMQ asks, within this process and context only.
_ZAP_ADDRESS = "inproc://zeromq.zap.01"


class Admission:
    """A list of client keys behind a socket that the owner polls: no thread, no state that is shared."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        clients: Iterable[bytes],
        counters: Counters,
        throttle: Throttle,
    ) -> None:
        """`clients`: public keys as Z85. Comes before the first socket of `context` binds or connects."""
        self._clients = frozenset(z85.decode(key) for key in clients)
        self._counters, self._throttle = counters, throttle
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ZAP_ADDRESS)

    def answer(self) -> None:
        """Answer what was asked since the last call: who is not on the list is refused, counted and named."""
        while self.socket.poll(0):
            version, request, domain, address, _, mechanism, *credentials = self.socket.recv_multipart()
            known = mechanism == b"CURVE" and domain == ZAP_DOMAIN and credentials[0] in self._clients
            verdict = (b"200", b"OK") if known else (b"400", b"not on the list of clients")
            self.socket.send_multipart([version, request, *verdict, b"", b""])
            if not known:
                self._counters.zmq_refused.labels("stranger").inc()
                key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else "none"
                self._throttle.warning(
                    "ZeroMQ client refused (stranger)",
                    f"public key {key} from {address.decode(errors='replace')} is not among `curve.clients`; "
                    "if it may send, put its .public file there and restart",
                )
