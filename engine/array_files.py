"""NumPy's files, `.npy` and `.npz`, whose headers are believed only as far as the file's size bears them out.

Nothing is unpickled, and nothing of the size that a header claims is allocated before the file is known to
have as much. Knows nothing of recordings.
"""

from __future__ import annotations

import io
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from engine.errors import DataError

# NumPy itself reads headers of 10,000 bytes at most.
_HEAD_BYTES = 16 * 1024
_BLOCK_BYTES = 1024 * 1024
# What deflate can make of a byte at most; a header that says more is damaged.
_MAX_RATIO = 1032
_MAX_ENTRIES = 100_000
_PACKED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _MAX_RATIO}
_ENCRYPTED = 0x1
_MAX_DIMENSIONS = 32
# What the readers of headers and archives raise at what they do not expect.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, IndexError, SyntaxError, OverflowError),
    *(RuntimeError, MemoryError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile),
)


@dataclass(frozen=True, slots=True)
class _Header:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]
    length: int

    @property
    def size(self) -> int:
        """Bytes of the samples."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_array(path: Path) -> NDArray[Any]:
    """The array of an `.npy` file, mapped: nothing of it is read yet. Raises DataError."""
    complaint = f"{path}: not readable as an .npy file of one plain array"
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD_BYTES)
    except OSError as problem:
        raise DataError(f"{path}: cannot be opened: {problem.strerror or problem}") from None
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: holds an .npz archive, expected one array; rename it to .npz")
    header = _header(head, size, complaint)
    if not header.size:
        return np.empty(header.shape, header.dtype)
    try:
        return np.memmap(path, header.dtype, "r", header.length, header.shape, header.order)
    except _DAMAGED as problem:
        raise DataError(f"{complaint}: {_short(problem)}") from None


def unpack_arrays(path: Path, max_bytes: int) -> dict[str, NDArray[Any]]:
    """Every array of an `.npz` file, by key. Raises DataError, also where they have more than `max_bytes`."""
    complaint = f"{path}: not readable as an .npz file of plain arrays"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = os.stat(path).st_size
            if len(entries) > _MAX_ENTRIES:
                raise DataError(f"{path}: {len(entries)} arrays, expected at most {_MAX_ENTRIES}")
            size = sum(entry.file_size for entry in entries)
            if size > max_bytes:
                raise DataError(f"{path}: unpacks to {size} bytes, expected at most {max_bytes}")
            for entry in entries:
                if entry.compress_type not in _PACKED or entry.flag_bits & _ENCRYPTED:
                    raise DataError(f"{complaint}: {entry.filename!r} is packed in another way than NumPy's")
                fits = min(entry.compress_size, total) * _PACKED[entry.compress_type]
                if entry.compress_size > total or entry.file_size > fits:
                    raise DataError(
                        f"{complaint}: it is damaged, {entry.filename!r} claims {entry.file_size} bytes"
                    )
            return {
                entry.filename.removesuffix(".npy"): _unpack(archive, entry, complaint)
                for entry in entries
                if entry.filename.endswith(".npy")
            }
    except DataError:
        raise
    except _DAMAGED as problem:
        raise DataError(f"{complaint}: {_short(problem)}") from None


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, complaint: str) -> NDArray[Any]:
    with archive.open(entry) as file:
        head = _exactly(file, min(_HEAD_BYTES, entry.file_size))
        header = _header(head, entry.file_size, f"{complaint}: {entry.filename!r}")
        samples = np.empty(header.size, np.uint8)
        begin = head[header.length :]
        samples[: len(begin)] = np.frombuffer(begin, np.uint8)
        done = len(begin)
        while block := file.read(_BLOCK_BYTES):  # to the end, where its checksum is looked at
            samples[done : done + len(block)] = np.frombuffer(block, np.uint8)
            done += len(block)
    if done != header.size:
        raise DataError(f"{complaint}: {entry.filename!r} ends after {done} of {header.size} bytes")
    array: NDArray[Any] = np.ndarray(header.shape, header.dtype, samples, order=header.order)
    return array


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = b""
    while len(data) < size and (block := file.read(size - len(data))):
        data += block
    return data


def _header(head: bytes, size: int, complaint: str) -> _Header:
    """The header of an array in a file that has `size` bytes and begins with `head`."""
    stream = io.BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a literal that is none
            version = npy.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version[0]}.{version[1]} of the format, expected 1.0 or 2.0")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream)
    except _DAMAGED as problem:
        raise DataError(f"{complaint}: {_short(problem)}") from None
    header = _Header(shape, dtype, "F" if fortran else "C", stream.tell())
    if dtype.hasobject:
        raise DataError(f"{complaint}: it holds Python objects, which are not unpacked")
    if len(shape) > _MAX_DIMENSIONS or any(extent < 0 for extent in shape) or not dtype.itemsize:
        raise DataError(f"{complaint}: its header is damaged: {dtype} {list(shape)[:_MAX_DIMENSIONS]}")
    if header.length + header.size != size:
        raise DataError(
            f"{complaint}: its header claims {header.size} bytes of samples, {dtype} {list(shape)}, and "
            f"there are {size - header.length}: it is damaged, or was cut"
        )
    return header


def _short(problem: Exception) -> str:
    words = " ".join(str(problem).split())
    return words[:200] or type(problem).__name__
