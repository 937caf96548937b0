"""Messages of a hostile world, from a seed: valid, mutated, and never meant to be read.

None of them speaks for a protected stream, in whose name only its own producer may do so: what happens to
read as a message of one is dropped, unless it is of an epoch before that stream's, which is nothing to it.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from engine.errors import WireError
from stream.wire import Limits, decode

WORDS = (
    "",
    "x",
    "ü",
    "日本",
    "a\nb",
    "\0",
    "\u202e",
    "\ufeff",
    "a" * 128,
    "é" * 129,
    "𝔘" * 128,
    "%s{0}$(id)",
)
# Texts that are no UTF-8: half a surrogate pair, an overlong slash, a byte that begins nothing.
NO_WORDS = (b"\xed\xa0\x80", b"\xc0\xaf", b"\xff")
NUMBERS = (0, 1, -1, 2, 2**31, 2**32, 2**48, 2**48 - 1, 2**53, 2**63, 2**64 - 1, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 50.0, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"))


@dataclass(frozen=True)
class Shot:
    """One message, and what is to become of it."""

    data: bytes
    reason: str | None
    """for which it will be refused; None: it can be read"""
    stream: str
    """in whose name it speaks, if it can be read"""


class Fuzzer:
    """Hostile messages. `limits` are the service's; `protected` the streams that are not to be touched."""

    def __init__(self, seed: int, limits: Limits, protected: Collection[str], epoch: int) -> None:
        """The protected streams' epoch is `epoch` or higher."""
        self._rng = random.Random(seed)
        self._limits, self._protected, self._epoch = limits, sorted(protected), epoch
        self._kinds: tuple[Callable[[], bytes], ...] = (
            self._mutated,
            self._mutated,
            self._wrong_field,
            self._wrong_field,
            self._wrong_data,
            self._structure,
            self._deep,
            self._noise,
            self._stranger,
            self._impostor,
        )

    def __iter__(self) -> Iterator[Shot]:
        """Messages without end."""
        while True:
            # What is large is rare, or it would be all that there is time for.
            data = self._large() if self._rng.random() < 0.001 else self._rng.choice(self._kinds)()
            try:
                message = decode(data, self._limits)
            except WireError as problem:
                yield Shot(data, problem.reason, "")
                continue
            if message.stream not in self._protected or message.epoch < self._epoch:
                yield Shot(data, None, message.stream)

    def _fields(self) -> dict[str, bytes]:
        """The fields of a message that can be read, each packed."""
        rng, channels = self._rng, self._limits.channels
        name, size = rng.choice((("f4", 4), ("float16", 2), ("i2", 2)))
        n = rng.randrange(1, 12)
        values = np.frombuffer(rng.randbytes(n * channels), np.int8)
        values = values.astype("<i2" if name == "i2" else f"<f{size}")
        fields: dict[str, Any] = {
            "v": 1,
            "stream": f"stranger {rng.randrange(1000)}",
            "epoch": rng.choice((0, 0, 1, rng.getrandbits(64))),
            "seq": rng.choice((0, n, rng.randrange(100), rng.randrange(2**44))),
            "time": rng.choice((None, 0, 1.7e9, 9.9e10)),
            "rate": self._limits.rate,
            "dtype": name,
            "shape": [n, channels],
            "data": values.tobytes(),
        }
        if name == "i2":
            fields["scale"] = rng.choice((0.01, 1e-300, 0))
        if rng.random() < 0.3:
            fields["end"] = True
        return {key: msgpack.packb(value) for key, value in fields.items()}

    def _stranger(self) -> bytes:
        fields = self._fields()
        if self._rng.random() < 0.1:
            fields["stream"] = msgpack.packb(self._rng.choice(WORDS))
        return packed(fields)

    def _impostor(self) -> bytes:
        """In the name of a protected stream, with a place or a time that cannot be, or long over."""
        fields = self._fields() | {"stream": msgpack.packb(self._rng.choice(self._protected))}
        wrong = {
            "epoch": msgpack.packb(self._rng.choice((-1, 1.0, None, "1", True, [1]))),
            "seq": msgpack.packb(self._rng.choice((-1, 2**48, 2**64 - 1, 0.0, float("nan"), None))),
            "time": msgpack.packb(self._rng.choice((-1, 1e11, float("nan"), float("inf"), "now"))),
            "rate": msgpack.packb(self._rng.choice((0, -50.0, 49.0, float("nan"), 2**64 - 1))),
        }
        key = self._rng.choice((*wrong, "old"))
        return packed(fields | ({"epoch": msgpack.packb(0)} if key == "old" else {key: wrong[key]}))

    def _mutated(self) -> bytes:
        """Bytes of a message that can be read, and something done to them."""
        rng = self._rng
        data = bytearray(packed(self._fields()))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(6):
                case 0:
                    if at < len(data):
                        data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data = data[:at]
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 3:
                    data = data[:at] + packed(self._fields())[rng.randrange(99) :]
                case 4:
                    data += data[at:]
                case _:
                    del data[at : at + rng.randrange(1, 9)]
        return bytes(data)

    def _wrong_field(self) -> bytes:
        """One field or two replaced, left out or added, and in another order; keys may come twice."""
        rng = self._rng
        pairs = [(msgpack.packb(key), value) for key, value in self._fields().items()]
        for _ in range(rng.randrange(1, 3)):
            at = rng.randrange(len(pairs))
            match rng.randrange(8):
                case 0:
                    del pairs[at]
                case 1:
                    pairs.append((self._value(0), self._value(2)))
                case 2:
                    pairs.append((pairs[at][0], self._value(2)))
                case _:
                    pairs[at] = pairs[at][0], self._value(3)
        if rng.random() < 0.2:
            rng.shuffle(pairs)
        return map_of(pairs)

    def _wrong_data(self) -> bytes:
        """Values that are none, or too many, or large enough to overflow a network."""
        rng, channels = self._rng, self._limits.channels
        n = rng.randrange(1, 40)
        value = rng.choice((float("nan"), float("inf"), 3e38, -3e38, 1e-45, 1e20))
        values = np.zeros((n, channels), "<f4")
        values[rng.randrange(n), rng.randrange(channels)] = value
        data = values.tobytes()[: rng.choice((None, None, -1, 0))]
        shape = rng.choice(
            ([n, channels], [n, channels], [channels, n], [n + 1, channels], [2**64 - 1, channels])
        )
        changes = {"dtype": "f4", "shape": shape, "data": data}
        fields = self._fields() | {key: msgpack.packb(value) for key, value in changes.items()}
        if rng.random() < 0.9:
            fields.pop("scale", None)
        return packed(fields)

    def _structure(self) -> bytes:
        """msgpack, and nothing that anybody would send."""
        return self._value(5)

    def _deep(self) -> bytes:
        """Lists and maps within each other, alone or in a field."""
        rng = self._rng
        depth = rng.choice((3, 100, 300, 500, 511, 900, 1000, 1022, 1023, 1024, 3000, 20_000))
        deep = rng.choice((b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\xdc\x00\x01")) * depth + b"\xc0"
        if rng.random() < 0.3:
            return deep
        return packed(self._fields() | {rng.choice((*self._fields(), "deep")): deep})

    def _noise(self) -> bytes:
        return self._rng.randbytes(self._rng.choice((0, 1, 2, 5, 50, 500)))

    def _large(self) -> bytes:
        """Up to twice the limit: beyond that, ZeroMQ hangs up. Noise, or a message of a stranger."""
        size = self._rng.randrange(self._limits.max_bytes // 2, 2 * self._limits.max_bytes)
        if self._rng.random() < 0.8:
            return self._rng.randbytes(size)
        n = size // (4 * self._limits.channels)
        data = self._rng.randbytes(4 * n * self._limits.channels)
        changes = {"dtype": "f4", "shape": [n, self._limits.channels], "data": data}
        return packed(self._fields() | {key: msgpack.packb(value) for key, value in changes.items()})

    def _value(self, depth: int) -> bytes:
        """Any value, packed, nested so deep at most."""
        rng = self._rng
        match rng.randrange(12 if depth else 8):
            case 0:
                return bytes(msgpack.packb(rng.choice((None, True, False))))
            case 1:
                return bytes(msgpack.packb(rng.choice((*NUMBERS, rng.getrandbits(64)))))
            case 2:
                number = rng.choice((*FLOATS, rng.random()))
                single = abs(number) < 1e38 and rng.random() < 0.3
                return bytes(msgpack.packb(number, use_single_float=single))
            case 3:
                return bytes(msgpack.packb(rng.choice((*WORDS, *self._protected, "float32", "i2"))))
            case 4:
                word = rng.choice(NO_WORDS)
                return bytes([0xA0 + len(word)]) + word
            case 5:
                return bytes(msgpack.packb(rng.randbytes(rng.choice((0, 1, 40, 2000)))))
            case 6:  # a length that is a lie
                head = rng.choice((b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9"))
                return head + struct.pack(">I", rng.choice((0, 1, 2**16, 2**31, 2**32 - 1)))
            case 7:  # of a type that is nobody's, or a point in time
                data = rng.randbytes(rng.choice((0, 1, 4, 8, 12)))
                return bytes([0xC7, len(data), rng.choice((0, 5, 0x7F, 0x80, 0xFF))]) + data
            case 8 | 9:
                n = rng.choice((0, 1, 2, 3, 15))
                return bytes([0x90 + n]) + b"".join(self._value(depth - 1) for _ in range(n))
            case _:
                n = rng.choice((0, 1, 2, 9))
                return map_of([(self._value(0), self._value(depth - 1)) for _ in range(n)])


def packed(fields: dict[str, bytes]) -> bytes:
    """One msgpack map of values that are packed already."""
    return map_of([(msgpack.packb(key), value) for key, value in fields.items()])


def map_of(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """The same, and the keys may be anything, also twice the same."""
    return b"\xde" + struct.pack(">H", len(pairs)) + b"".join(key + value for key, value in pairs)
