"""CURVE, the encryption of ZeroMQ (CurveZMQ, ZeroMQ RFC 26), for both sides of a `zmtp.Link`.

The arithmetic is libsodium's, by PyNaCl. Each side has a long-term key, which proves who it is, and a
short-term key, which lives as long as the connection and encrypts it (in the RFC: C and S, C' and S').
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from nacl import bindings as sodium
from nacl.exceptions import CryptoError
from zmq.utils import z85

from engine.errors import WireError
from stream.zmq_keys import ClientKeys, KeyPair
from stream.zmtp import Boxes, Link, Reading, expect, read_properties

_NONCE_BYTES = 8
_COOKIE_BYTES = 96
_BOX = 16  # bytes by which a box is longer than what is in it
_WRONG_KEY = "the producer holds another server key than this service's; give it the right .public file"


class CurveBoxes:
    """Parts as CURVE's MESSAGE commands."""

    # Name, nonce and box, and the flags within.
    overhead = 8 + _NONCE_BYTES + _BOX + 1

    def __init__(self, key: bytes, ours: bytes, theirs: bytes, sent: int, received: int) -> None:
        """`ours`, `theirs`: the letter at the end of a nonce's name; `sent`, `received`: the last nonces."""
        self._key = key
        self._ours, self._theirs = b"CurveZMQMESSAGE" + ours, b"CurveZMQMESSAGE" + theirs
        self._sent, self._received = sent, received

    def seal(self, flags: int, body: bytes) -> bytes:
        """See `Boxes.seal`."""
        self._sent += 1
        nonce = self._sent.to_bytes(_NONCE_BYTES, "big")
        return b"\x07MESSAGE" + nonce + _seal(bytes((flags,)) + body, self._ours + nonce, self._key)

    def open(self, body: bytes) -> tuple[int, bytes]:
        """See `Boxes.open`."""
        data = expect(body, b"MESSAGE")
        nonce = data[:_NONCE_BYTES]
        if int.from_bytes(nonce, "big") <= self._received or len(data) < _NONCE_BYTES + _BOX + 1:
            raise WireError("protocol", "an encrypted message was repeated, or is cut short")
        self._received = int.from_bytes(nonce, "big")
        plain = _open(
            data[_NONCE_BYTES:], self._theirs + nonce, self._key, "an encrypted message was changed"
        )
        return plain[0], plain[1:]


class CurveServer:
    """The side that knows a list of clients."""

    name, is_server = b"CURVE", True

    def __init__(self, own: KeyPair, is_known: Callable[[bytes], bool]) -> None:
        """`is_known` is asked about a client's public key (Z85)."""
        self._secret, self._public = z85.decode(own.secret), z85.decode(own.public)
        self._is_known = is_known

    def shake_hands(self, link: Link) -> Reading[tuple[Mapping[str, bytes], Boxes | None]]:
        """See `Mechanism.shake_hands`."""
        hello = expect((yield from link.read_command()), b"HELLO")
        if len(hello) != 194 or hello[:2] != b"\x01\x00":
            raise WireError("protocol", "the first command of CURVE is not that of version 1.0")
        client_short, nonce = hello[74:106], hello[106:114]
        key = _shared(client_short, self._secret)
        if _open(hello[114:], b"CurveZMQHELLO---" + nonce, key, _WRONG_KEY, "wrong_server_key") != bytes(64):
            raise WireError("protocol", "the first box of CURVE holds something else than zeros")

        own_short, secret_short = sodium.crypto_box_keypair()
        cookie, long_nonce = os.urandom(_COOKIE_BYTES), os.urandom(16)
        welcome = _seal(own_short + cookie, b"WELCOME-" + long_nonce, key)
        link.send_command(b"WELCOME", long_nonce + welcome)

        initiate = expect((yield from link.read_command()), b"INITIATE")
        nonce = initiate[_COOKIE_BYTES : _COOKIE_BYTES + _NONCE_BYTES]
        if initiate[:_COOKIE_BYTES] != cookie or len(nonce) < _NONCE_BYTES:
            raise WireError("protocol", "the cookie of CURVE came back changed")
        key = _shared(client_short, secret_short)
        box = initiate[_COOKIE_BYTES + _NONCE_BYTES :]
        told = _open(box, b"CurveZMQINITIATE" + nonce, key, "the client does not prove its keys")
        client, vouch_nonce, vouch, properties = told[:32], told[32:48], told[48:128], told[128:]
        if len(vouch) < 80:
            raise WireError("protocol", "the client's vouch is cut short")
        vouched = _open(
            vouch,
            b"VOUCH---" + vouch_nonce,
            _shared(client, secret_short),
            "the client does not prove its keys",
        )
        if vouched != client_short + self._public:
            raise WireError("protocol", "the client vouches for other keys")
        if not self._is_known(z85.encode(client)):
            link.send_command(b"ERROR", b"\x03400")  # which libzmq's clients read as a refusal, not a failure
            raise WireError(
                "stranger",
                f"public key {z85.encode(client).decode()} is not among `curve.clients`; if it may send, put "
                "its .public file there and restart",
            )
        first = (1).to_bytes(_NONCE_BYTES, "big")
        link.send_command(b"READY", first + _seal(link.properties(), b"CurveZMQREADY---" + first, key))
        boxes = CurveBoxes(key, b"S", b"C", sent=1, received=int.from_bytes(nonce, "big"))
        return read_properties(properties), boxes


class CurveClient:
    """The side that knows one server."""

    name, is_server = b"CURVE", False

    def __init__(self, keys: ClientKeys) -> None:
        self._server = z85.decode(keys.server)
        self._public, self._secret = z85.decode(keys.own.public), z85.decode(keys.own.secret)

    def shake_hands(self, link: Link) -> Reading[tuple[Mapping[str, bytes], Boxes | None]]:
        """See `Mechanism.shake_hands`."""
        own_short, secret_short = sodium.crypto_box_keypair()
        first, second = ((n).to_bytes(_NONCE_BYTES, "big") for n in (1, 2))
        key = _shared(self._server, secret_short)
        signature = _seal(bytes(64), b"CurveZMQHELLO---" + first, key)
        link.send_command(b"HELLO", b"\x01\x00" + bytes(72) + own_short + first + signature)

        welcome = expect((yield from link.read_command()), b"WELCOME")
        plain = _open(welcome[16:], b"WELCOME-" + welcome[:16], key, "the service does not prove its key")
        server_short, cookie = plain[:32], plain[32:]
        if len(cookie) != _COOKIE_BYTES:
            raise WireError("protocol", "the service's WELCOME has another length than CURVE's")

        vouch_nonce = os.urandom(16)
        vouch_key = _shared(server_short, self._secret)
        vouch = _seal(own_short + self._server, b"VOUCH---" + vouch_nonce, vouch_key)
        key = _shared(server_short, secret_short)
        told = self._public + vouch_nonce + vouch + link.properties()
        link.send_command(b"INITIATE", cookie + second + _seal(told, b"CurveZMQINITIATE" + second, key))

        ready = expect((yield from link.read_command()), b"READY")
        nonce = ready[:_NONCE_BYTES]
        properties = _open(
            ready[_NONCE_BYTES:], b"CurveZMQREADY---" + nonce, key, "the service does not prove its key"
        )
        boxes = CurveBoxes(key, b"C", b"S", sent=2, received=int.from_bytes(nonce, "big"))
        return read_properties(properties), boxes


def _shared(public: bytes, secret: bytes) -> bytes:
    try:
        return bytes(sodium.crypto_box_beforenm(public, secret))
    except CryptoError:  # a point of small order: nobody's key
        raise WireError("protocol", "a public key that is none") from None


def _seal(plain: bytes, nonce: bytes, key: bytes) -> bytes:
    return bytes(sodium.crypto_box_easy_afternm(plain, nonce, key))


def _open(box: bytes, nonce: bytes, key: bytes, complaint: str, reason: str = "protocol") -> bytes:
    try:
        return bytes(sodium.crypto_box_open_easy_afternm(box, nonce, key))
    except (CryptoError, ValueError, TypeError):
        raise WireError(reason, complaint) from None
