"""The wire message: samples of one stream, as one msgpack map. WIRE.md says the same to producers.

| key    | type              | meaning                                                                      |
|--------|-------------------|------------------------------------------------------------------------------|
| v      | 1                 | version of this format                                                       |
| stream | str               | which stream: 1 to 128 printable characters                                  |
| epoch  | uint64, default 0 | chosen by the producer whenever it starts; higher is newer                   |
| seq    | uint, below 2^48  | index of the message's first sample since the epoch's first sample           |
| time   | float or nil      | seconds since 1970 at the capture of the first sample                        |
| rate   | float             | samples a second, Hz; must be the bundle's within 0.1 %                      |
| dtype  | str               | "float32"/"f4", "float16"/"f2" or "int16"/"i2", little endian                |
| scale  | float             | int16 only, and required there: value = integer * scale                      |
| shape  | [n, C]            | samples and channels                                                         |
| data   | bin               | n * C values, sample after sample                                            |
| end    | bool, optional    | the stream's last message; `n` may then be 0, `seq` is where it ends         |

What cannot be read raises WireError, whose `reason` is one of REASONS and labels a counter. The message is
then refused as a whole: its samples are missing, as if it had never been sent. Knows nothing of sockets.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray

from engine.errors import WireError
from engine.manifest import Frame

VERSION = 1
MAX_MESSAGE_BYTES = 1024 * 1024
MAX_STREAM_CHARACTERS = 128
RATE_TOLERANCE = 1e-3

REASONS = (
    "too_large",  # more bytes than the limit, told before anything is parsed
    "multipart",  # a ZeroMQ message of several parts
    "not_msgpack",  # not one msgpack value, or with something behind it, nested too deeply, or a map in a map
    "not_a_map",
    "unknown_version",
    "missing_field",
    "unknown_field",
    "bad_field",  # a field of the wrong type or range
    "dtype",
    "shape",
    "channels",
    "rate",
    "payload",  # `data` is shorter or longer than `shape` says
    "nan",  # NaN or Inf among the values
    "partition",  # from Kafka: the stream comes in two partitions
)

DtypeName = Literal["float32", "float16", "int16"]
_DTYPES: dict[str, tuple[DtypeName, np.dtype[Any]]] = {
    "float32": ("float32", np.dtype("<f4")),
    "f4": ("float32", np.dtype("<f4")),
    "float16": ("float16", np.dtype("<f2")),
    "f2": ("float16", np.dtype("<f2")),
    "int16": ("int16", np.dtype("<i2")),
    "i2": ("int16", np.dtype("<i2")),
}
_REQUIRED = ("v", "stream", "seq", "rate", "dtype", "shape", "data")
_KNOWN = frozenset((*_REQUIRED, "epoch", "time", "scale", "end"))
_MAX_FIELDS = 64
_MAP_HEADS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))  # bytes with which msgpack begins a map
_MAX_UINT64 = 2**64 - 1
_MAX_SEQ = 2**48  # 178,000 years at 50 Hz; times in float64 seconds stay exact to a sample
_MAX_TIME = 1e11  # the year 5138: what lies beyond is not seconds
# msgpack nests up to 1024 deep, which is more than `repr` can walk on Python's stack.
_REPR = reprlib.Repr()
_REPR.maxlevel = 2


@dataclass(frozen=True, slots=True)
class Message:
    """Samples of one stream; the fields are the wire's. `samples` is float32 [n, C] and finite."""

    stream: str
    seq: int
    samples: NDArray[np.float32]
    rate: float
    epoch: int = 0
    time: float | None = None
    end: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver accepts: its bundle's rate (Hz) and channels, and a size in bytes."""

    rate: float
    channels: int
    max_bytes: int = MAX_MESSAGE_BYTES

    @classmethod
    def of(cls, frame: Frame, max_bytes: int = MAX_MESSAGE_BYTES) -> Limits:
        """The limits that follow from a bundle's frame."""
        return cls(rate=frame.sample_rate, channels=frame.channels, max_bytes=max_bytes)


def encode(message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> bytes:
    """The bytes of `message`; int16 takes `scale`, or the one at which the largest value just fits.

    Raises WireError (`dtype`) when `dtype` cannot hold the values.
    """
    fields: dict[str, Any] = {
        "v": VERSION,
        "stream": message.stream,
        "epoch": message.epoch,
        "seq": message.seq,
        "time": message.time,
        "rate": message.rate,
        "dtype": dtype,
        "shape": list(message.samples.shape),
    }
    values: NDArray[Any] = message.samples
    if dtype == "int16":
        largest = float(np.abs(values).max(initial=0.0))
        fields["scale"] = scale = scale or largest / 32767 or 1.0
        values = np.rint(values.astype(np.float64) / scale)
        if np.abs(values).max(initial=0.0) > 32767:
            raise WireError("dtype", f"{message.stream}: {largest:g} does not fit int16 at scale {scale:g}")
    with np.errstate(over="ignore"):
        packed = values.astype(_DTYPES[dtype][1])
    if dtype == "float16" and np.isinf(packed).any() and np.isfinite(values).all():
        raise WireError("dtype", f"{message.stream}: a value is beyond float16's 65504; send float32")
    fields["data"] = packed.tobytes()
    if message.end:
        fields["end"] = True
    return bytes(msgpack.packb(fields))


def decode(data: bytes | memoryview, limits: Limits) -> Message:
    """Read one message. Raises WireError for everything that is not one, and nothing else."""
    if len(data) > limits.max_bytes:
        raise WireError("too_large", f"found {len(data)} bytes, expected at most {limits.max_bytes}")
    fields = _unpack(data, limits)
    stream = _stream(fields)
    try:
        return _message(stream, fields, limits)
    except WireError as problem:
        raise WireError(problem.reason, f"stream {stream!r}: {problem}") from None


def _unpack(data: bytes | memoryview, limits: Limits) -> dict[str, Any]:
    # Field by field, for msgpack interns the keys of the maps that it makes, and Python 3.12 keeps what is
    # interned for good. So no field may be a map.
    unpacker = msgpack.Unpacker(
        raw=False,
        max_buffer_size=limits.max_bytes,
        read_size=1,
        max_str_len=1024,
        max_bin_len=limits.max_bytes,
        max_array_len=64,
        max_map_len=0,
        max_ext_len=0,
    )
    try:
        unpacker.feed(data)
        if data and data[0] not in _MAP_HEADS:
            found = type(unpacker.unpack()).__name__
            raise WireError("not_a_map", f"found {found}, expected a map of fields")
        size = unpacker.read_map_header()
        if size > _MAX_FIELDS:
            raise WireError("unknown_field", f"found {size} fields, expected {_MAX_FIELDS} at most")
        fields = {unpacker.unpack(): unpacker.unpack() for _ in range(size)}
        if not all(isinstance(key, str) for key in fields):
            raise ValueError("a key is no text")
        if unpacker.tell() < len(data):
            raise ValueError("something behind the map")
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as problem:
        # msgpack's own words hold no more than a type and an offset, but they may hold the input as well
        raise WireError(
            "not_msgpack", f"expected one msgpack map, found {type(problem).__name__}: {str(problem)[:80]}"
        ) from None
    version = fields.get("v")
    if isinstance(version, bool) or version != VERSION:
        raise WireError("unknown_version", f"found version {_shown(version)}, this Onset reads {VERSION}")
    missing = [key for key in _REQUIRED if key not in fields]
    if missing:
        raise WireError("missing_field", f"without {', '.join(missing)}; WIRE.md lists the fields")
    unknown = [key for key in fields if key not in _KNOWN]
    if unknown:
        raise WireError("unknown_field", f"{_shown(unknown[0])} is no field of version {VERSION}")
    return fields


def _stream(fields: dict[str, Any]) -> str:
    stream = fields["stream"]
    if (
        not isinstance(stream, str)
        or not 1 <= len(stream) <= MAX_STREAM_CHARACTERS
        or not stream.isprintable()
    ):
        raise WireError(
            "bad_field",
            f"`stream` is {_shown(stream)}, expected 1 to {MAX_STREAM_CHARACTERS} printable characters",
        )
    return stream


def _message(stream: str, fields: dict[str, Any], limits: Limits) -> Message:
    seq = _uint(fields, "seq")
    epoch = _uint(fields, "epoch") if "epoch" in fields else 0
    time = _number(fields, "time") if fields.get("time") is not None else None
    if time is not None and not 0 <= time < _MAX_TIME:
        raise WireError("bad_field", f"`time` is {time:g}, expected seconds since 1970")
    end = fields.get("end", False)
    if not isinstance(end, bool):
        raise WireError("bad_field", f"`end` is {_shown(end)}, expected true or false")
    rate = _number(fields, "rate")
    if not abs(rate - limits.rate) <= RATE_TOLERANCE * limits.rate:
        raise WireError("rate", f"samples at {rate:g} Hz, the bundle expects {limits.rate:g} Hz: resample")
    name, dtype = _dtype(fields)
    n, channels = _shape(fields, end)
    if channels != limits.channels:
        raise WireError("channels", f"{channels} channels, the bundle expects {limits.channels}")
    if seq + n > _MAX_SEQ:
        raise WireError("bad_field", f"`seq` {seq} and {n} samples reach beyond 2^48 = {_MAX_SEQ}")
    samples = _samples(fields, name, dtype, n, channels)
    return Message(stream, seq, samples, rate, epoch, time, end)


def _samples(
    fields: dict[str, Any], name: DtypeName, dtype: np.dtype[Any], n: int, channels: int
) -> NDArray[np.float32]:
    data = fields["data"]
    if not isinstance(data, bytes):
        raise WireError("bad_field", f"`data` is {type(data).__name__}, expected bytes (msgpack bin)")
    expected = n * channels * dtype.itemsize
    if len(data) != expected:
        raise WireError(
            "payload", f"{len(data)} bytes of data, {expected} expected for [{n}, {channels}] {name}"
        )
    values: NDArray[Any] = np.frombuffer(data, dtype).reshape(n, channels)
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "int16":
            if "scale" not in fields:
                raise WireError("missing_field", "int16 without `scale`: value = integer * scale")
            scale = _number(fields, "scale")
            values = values * np.float64(scale)
        elif "scale" in fields:
            raise WireError("bad_field", f"`scale` belongs to int16, found {name}")
        samples = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(samples).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise WireError("nan", f"NaN or Inf in sample {bad} of {n}; leave out what was not measured")
    return samples


def _dtype(fields: dict[str, Any]) -> tuple[DtypeName, np.dtype[Any]]:
    name = fields["dtype"]
    found = _DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise WireError("dtype", f"`dtype` is {_shown(name)}, expected float32, float16 or int16")
    return found


def _shape(fields: dict[str, Any], end: bool) -> tuple[int, int]:
    shape = fields["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) for size in shape)
        or not (0 if end else 1) <= shape[0] <= _MAX_UINT64
        or shape[1] < 1
    ):
        raise WireError("shape", f"`shape` is {_shown(shape)}, expected [samples, channels], both positive")
    return shape[0], shape[1]


def _uint(fields: dict[str, Any], key: str) -> int:
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise WireError("bad_field", f"`{key}` is {_shown(value)}, expected an unsigned integer")
    return value


def _number(fields: dict[str, Any], key: str) -> float:
    value = fields[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise WireError("bad_field", f"`{key}` is {_shown(value)}, expected a finite number")
    return float(value)


def _shown(value: object) -> str:
    """What was found, cut short: it comes from outside and ends in a log."""
    if isinstance(value, (bytes, list, dict, str)) and len(value) > 40:
        return f"{type(value).__name__} of length {len(value)}"
    shown = _REPR.repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
