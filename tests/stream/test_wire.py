"""The wire: what is well formed reads back the same, everything else is a WireError with its own reason."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine.errors import WireError
from stream.wire import REASONS, DtypeName, Limits, Message, decode, encode

LIMITS = Limits(rate=50.0, channels=3, max_bytes=4096)
SAMPLES = np.arange(12, dtype=np.float32).reshape(4, 3) / 4


def fields(**changes: Any) -> dict[str, Any]:
    """A good message as a map, with some fields changed; `...` leaves one out."""
    good: dict[str, Any] = {
        "v": 1,
        "stream": "a",
        "epoch": 7,
        "seq": 100,
        "time": 1.7e9,
        "rate": 50.0,
        "dtype": "float32",
        "shape": [4, 3],
        "data": SAMPLES.astype("<f4").tobytes(),
    }
    return {key: value for key, value in (good | changes).items() if value is not ...}


def refused(data: bytes) -> WireError:
    with pytest.raises(WireError) as problem:
        decode(data, LIMITS)
    assert problem.value.reason in REASONS
    assert len(str(problem.value)) < 400
    return problem.value


def read_or_reason(data: bytes) -> Message | str:
    try:
        return decode(data, LIMITS)
    except WireError as problem:
        return problem.reason


@settings(deadline=None)
@given(
    stream=st.text(st.characters(codec="utf-8"), min_size=1, max_size=128).filter(str.isprintable),
    samples=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.just(3)),
        elements=st.floats(-6e4, 6e4, width=32),
    ),
    seq=st.integers(0, 2**47),
    epoch=st.integers(0, 2**64 - 1),
    time=st.none() | st.floats(0, 4e9),
    end=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "int16"]),
)
def test_round_trip(
    stream: str,
    samples: np.ndarray,
    seq: int,
    epoch: int,
    time: float | None,
    end: bool,
    dtype: DtypeName,
) -> None:
    read = decode(encode(Message(stream, seq, samples, 50.0, epoch, time, end), dtype), LIMITS)
    assert (read.stream, read.seq, read.epoch, read.time, read.end) == (stream, seq, epoch, time, end)
    assert read.samples.dtype == np.float32
    scale = float(np.abs(samples).max())
    tolerance = {"float32": 0.0, "float16": scale * 2**-10 + 1e-7, "int16": scale / 32767}[dtype]
    np.testing.assert_allclose(read.samples, samples, atol=tolerance, rtol=0)


def test_a_producer_needs_no_onset() -> None:
    data = msgpack.packb(
        {
            "v": 1,
            "stream": "a",
            "seq": 0,
            "rate": 50,
            "dtype": "i2",
            "scale": 0.5,
            "shape": [1, 3],
            "data": b"\x01\x00\xff\xff\x00\x80",
        }
    )
    read = decode(data, LIMITS)
    assert read.samples.tolist() == [[0.5, -0.5, -16384.0]]
    assert (read.epoch, read.time, read.end) == (0, None, False)


def test_the_end_may_hold_no_samples() -> None:
    read = decode(msgpack.packb(fields(end=True, shape=[0, 3], data=b"")), LIMITS)
    assert read.end
    assert read.samples.shape == (0, 3)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("unknown_version", {"v": 2}),
        ("unknown_version", {"v": "1"}),
        ("unknown_version", {"v": True}),
        ("unknown_version", {"v": ...}),
        ("missing_field", {"seq": ...}),
        ("missing_field", {"data": ...}),
        ("missing_field", {"dtype": "int16", "data": b"\0" * 24}),
        ("unknown_field", {"sqe": 1}),
        ("bad_field", {"stream": ""}),
        ("bad_field", {"stream": "a\n"}),
        ("bad_field", {"stream": "x" * 129}),
        ("bad_field", {"stream": 7}),
        ("bad_field", {"stream": b"a"}),
        ("bad_field", {"seq": -1}),
        ("bad_field", {"seq": 1.0}),
        ("bad_field", {"seq": True}),
        ("bad_field", {"seq": 2**48}),
        ("bad_field", {"epoch": -1}),
        ("bad_field", {"epoch": None}),
        ("bad_field", {"time": float("nan")}),
        ("bad_field", {"time": -1.0}),
        ("bad_field", {"time": 1e300}),
        ("bad_field", {"time": "now"}),
        ("bad_field", {"end": 1}),
        ("bad_field", {"data": "text"}),
        ("bad_field", {"scale": 1.0}),
        ("bad_field", {"dtype": "int16", "data": b"\0" * 24, "scale": float("inf")}),
        ("rate", {"rate": 50.06}),
        ("rate", {"rate": -50.0}),
        ("bad_field", {"rate": float("inf")}),
        ("dtype", {"dtype": "float64"}),
        ("dtype", {"dtype": ["float32"]}),
        ("dtype", {"dtype": ">f4"}),
        ("shape", {"shape": [12]}),
        ("shape", {"shape": [4, 3, 1]}),
        ("shape", {"shape": [0, 3], "data": b""}),
        ("shape", {"shape": [-4, 3]}),
        ("shape", {"shape": [4.0, 3.0]}),
        ("shape", {"shape": "4x3"}),
        ("channels", {"shape": [6, 2]}),
        ("payload", {"shape": [5, 3]}),
        ("payload", {"data": SAMPLES.tobytes()[:-1]}),
        ("payload", {"data": SAMPLES.tobytes() + b"\0"}),
        ("payload", {"shape": [2**40, 3]}),
        ("nan", {"data": np.full((4, 3), np.nan, "<f4").tobytes()}),
        ("nan", {"data": np.full((4, 3), -np.inf, "<f4").tobytes()}),
        ("nan", {"dtype": "int16", "data": b"\x01" * 24, "scale": 1e300}),
    ],
)
def test_each_fault_has_its_reason(reason: str, changes: dict[str, Any]) -> None:
    assert refused(msgpack.packb(fields(**changes))).reason == reason


def test_the_limits_of_rate_are_inclusive_of_small_errors() -> None:
    assert decode(msgpack.packb(fields(rate=50.04)), LIMITS).rate == 50.04


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("not_msgpack", b""),
        ("not_msgpack", b"\xc1"),
        ("not_msgpack", encode(Message("a", 0, SAMPLES, 50.0))[:-1]),
        ("not_msgpack", encode(Message("a", 0, SAMPLES, 50.0)) + b"\0"),
        ("not_msgpack", b"\x81\xa1v" + b"\x91" * 3000),
        ("not_msgpack", b"\xdd\xff\xff\xff\xff"),
        ("not_msgpack", b"\x81\x01\x01"),
        ("not_msgpack", b"\x81\xa1\xff\x01"),
        ("not_msgpack", b"\xc7\x01\x05\x00"),
        ("not_a_map", b"\x01"),
        ("not_a_map", b"\x90"),
        ("too_large", b"\0" * 4097),
    ],
)
def test_what_is_no_message_at_all(reason: str, data: bytes) -> None:
    assert refused(data).reason == reason


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=5000))
def test_random_bytes_are_refused(data: bytes) -> None:
    refused(data)


@settings(deadline=None, max_examples=1000)
@given(data=st.data())
def test_mutated_messages_are_read_or_refused(data: st.DataObject) -> None:
    message = bytearray(encode(Message("a", 5, SAMPLES, 50.0, 1, 1.7e9)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message) - 1))
        how = data.draw(st.sampled_from(["flip", "delete", "insert"]))
        if how == "flip":
            message[at] ^= data.draw(st.integers(1, 255))
        elif how == "delete":
            del message[at : at + data.draw(st.integers(1, 8))]
            message = message or bytearray(b"\0")
        else:
            message[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    read = read_or_reason(bytes(message))
    if isinstance(read, str):
        assert read in REASONS
    else:
        assert np.isfinite(read.samples).all()
        assert read.samples.shape[1] == 3


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=140)
    | st.binary(max_size=60),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=1000)
@given(changes=st.dictionaries(st.sampled_from([*fields(), "scale", "end"]), values, min_size=1, max_size=3))
def test_any_value_in_any_field_is_read_or_refused(changes: dict[str, Any]) -> None:
    read = read_or_reason(msgpack.packb(fields(**changes)))
    if isinstance(read, str):
        assert read in REASONS
    else:
        assert 0 <= read.seq < 2**48
        assert read.stream.isprintable()


@pytest.mark.parametrize("field", fields())
@pytest.mark.parametrize("unit", [b"\x91", b"\x81\xa1a"])
def test_a_field_may_nest_as_deeply_as_msgpack_reads(field: str, unit: bytes) -> None:
    for depth in (10, 500, 1000, 1022, 1023, 1024):
        packed = [
            msgpack.packb(key) + (unit * depth + b"\xc0" if key == field else msgpack.packb(value))
            for key, value in fields().items()
        ]
        refused(bytes([0x80 + len(packed)]) + b"".join(packed))


@pytest.mark.parametrize(
    "data",
    [
        lambda n: b"\x91" * 900 + b"\xc1",
        lambda n: b"\x82\xa1v\x01\xa1w" + b"\x91" * 900 + b"\xc1",
        lambda n: b"\x82\xa1v\x01\x07\xc5\x0e\x00" + bytes(3584),
        lambda n: msgpack.packb(fields() | {f"key {n}" + 500 * "x": 1}),
        lambda n: msgpack.packb(fields(epoch={f"key {n}" + 500 * "x": 1})),
    ],
    ids=["nested", "nested in a field", "a key that is none", "a key nobody knows", "a map in a field"],
)
def test_what_is_refused_leaves_nothing_behind(data: Callable[[int], bytes]) -> None:
    def refuse(numbers: range) -> int:
        for number in numbers:
            refused(data(number))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = refuse(range(1000))
        assert refuse(range(1000, 2000)) < before + 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("dtype", "scale"), [("float16", None), ("int16", 0.5)])
def test_what_a_type_cannot_hold_is_not_sent(dtype: DtypeName, scale: float | None) -> None:
    message = Message("a", 0, np.full((1, 3), 1e6, np.float32), 50.0)
    with pytest.raises(WireError) as problem:
        encode(message, dtype, scale)
    assert problem.value.reason == "dtype"
