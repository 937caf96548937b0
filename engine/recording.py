"""Recordings on disk: `.npy`, `.npz` and `.csv` files read as float32 arrays [T, C].

One reader for training, checking and serving, so that a file means the same everywhere. Knows nothing of
sampling rates, labels or models. What a file may cost is known before it is read.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.array_files import map_array, unpack_arrays
from engine.errors import DataError

SUFFIXES = (".npy", ".npz", ".csv")

# 4 GiB of float32 is 124 days of a 6-channel sensor at 50 Hz, or 6 days of 2048-d features at 1 Hz: what is
# larger is either damaged or belongs in several recordings.
MAX_RECORDING_BYTES = 4 * 1024**3
ARRAY_KEYS = ("samples", "feats")
_LINE_CHARS = 1024 * 1024
_BLOCK_CHARS = 1024 * 1024
_TIME_COLUMN = re.compile(r"(time|timestamp|t)\s*([\[(].*[\])])?", re.IGNORECASE)


def read_recording(path: Path) -> NDArray[np.float32]:
    """Read one recording: float32 [T, C], T samples (or frames) of C channels.

    - `.npy`: one array [T, C], or [T] for a single channel, of integers or floats.
    - `.npz`: the same, under the key `samples` or `feats`, or as the file's only array.
    - `.csv`: one row a sample; comma, semicolon or tab; a header row is optional; a first column named
      `time`, `timestamp` or `t` (also `time [s]`) is left out. An empty cell reads as NaN.

    NaN and Inf pass through: what a gap means is the caller's to say.
    Raises DataError when the file is missing, too large, damaged, empty or of any other form.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: found the suffix `{path.suffix}`, expected one of {', '.join(SUFFIXES)}")
    _check_file(path)
    if suffix == ".csv":
        return _checked(_read_csv(path), path)
    if suffix == ".npz":
        return _checked(_pick_array(read_arrays(path), path), path)
    return _checked(map_array(path), path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of an `.npz` file, by key. Raises DataError; never unpickles."""
    _check_file(path)
    return unpack_arrays(path, MAX_RECORDING_BYTES)


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"{path}: cannot be opened: {problem.strerror or problem}") from None
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise DataError(f"{path}: found {kind}, expected a file")
    if size > MAX_RECORDING_BYTES:
        raise DataError(
            f"{path}: {size} bytes, expected at most {MAX_RECORDING_BYTES}; cut it into several recordings"
        )


def _pick_array(arrays: dict[str, NDArray[Any]], path: Path) -> NDArray[Any]:
    for key in ARRAY_KEYS:
        if key in arrays:
            return arrays[key]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    found = ", ".join(f"`{key}`" for key in list(arrays)[:8]) or "no array"
    raise DataError(f"{path}: found {found}; expected one array, or one named `samples` or `feats` [T, C]")


def _checked(array: NDArray[Any], path: Path) -> NDArray[np.float32]:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path}: found values of type {array.dtype}, expected integers or floats")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise DataError(f"{path}: found an array of shape {list(array.shape)}, expected [T, C] or [T]")
    if array.shape[0] == 0 or array.shape[1] == 0:
        raise DataError(f"{path}: holds no samples: its shape is {list(array.shape)}, expected [T, C]")
    if array.size * 4 > MAX_RECORDING_BYTES:
        raise DataError(
            f"{path}: {array.shape[0]} samples of {array.shape[1]} channels, more than {MAX_RECORDING_BYTES} "
            "bytes as float32; cut it into several recordings"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which the caller looks for
        return np.array(array, dtype=np.float32, order="C")


def _read_csv(path: Path) -> NDArray[np.float32]:
    delimiter, names, width = _sniff(path)
    first = 1 if names and _TIME_COLUMN.fullmatch(names[0]) else 0
    if first == width:
        raise DataError(f"{path}: found only the column `{names[0]}`, expected a channel beside it")
    table = _Table(path, delimiter, width, first)
    blocks: list[NDArray[np.float32]] = []
    rows = 0
    for number, text in _blocks(path, skip=1 if names else 0):
        blocks.append(table.read(text, number))
        rows += len(blocks[-1])
        if rows * width * 4 > MAX_RECORDING_BYTES:
            raise DataError(f"{path}: more than {MAX_RECORDING_BYTES} bytes as float32; cut it into several")
    return np.concatenate(blocks) if blocks else np.empty((0, width - first), np.float32)


def _blocks(path: Path, skip: int) -> Iterator[tuple[int, str]]:
    """Whole lines, some MiB of them at once, each block with the number of its first line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            number = 1 + skip
            for _ in range(skip):
                file.readline(_LINE_CHARS)
            while text := file.read(_BLOCK_CHARS):
                ending = "" if text.endswith("\n") else file.readline(_LINE_CHARS)
                if len(ending) == _LINE_CHARS:
                    raise DataError(f"{path}: a line of more than {_LINE_CHARS} characters; is this a table?")
                text += ending
                yield number, text
                number += text.count("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not readable as text in UTF-8: {problem}") from None


class _Table:
    """Reads lines as numbers. What it met in the lines before, it expects in the next."""

    def __init__(self, path: Path, delimiter: str, width: int, first: int) -> None:
        """`width` columns, those before `first` are left out."""
        self._path, self._delimiter, self._width, self._first = path, delimiter, width, first
        self._ways = [self._plain, self._filled, self._without_blanks]
        rest = f"[\\n{delimiter}]"
        self._blank = re.compile(rf"(?<={rest})[^\S\n{delimiter}]+(?={rest})")

    def read(self, text: str, number: int) -> NDArray[np.float32]:
        """[lines, columns]; `number` is that of the first line. Raises DataError."""
        if text.isspace():
            return np.empty((0, self._width - self._first), np.float32)
        for way in tuple(self._ways):
            with suppress(ValueError):
                return self._numbers(way(text).split("\n"))
            if len(self._ways) > 1:
                del self._ways[0]
        return self._cell_by_cell(text, number)

    def _numbers(self, lines: list[str]) -> NDArray[np.float32]:
        """Raises ValueError for lines that are not all numbers, as many in each."""
        columns = None
        if self._first and not _is_number(lines[0].partition(self._delimiter)[0]):  # times as dates
            columns = range(self._first, self._width)
            lines = [line for line in lines if line]
            if any(line.count(self._delimiter) != self._width - 1 for line in lines):
                raise ValueError
        rows = np.loadtxt(
            lines, np.float32, comments=None, delimiter=self._delimiter, usecols=columns, ndmin=2
        )
        if columns is None and rows.shape[1] != self._width:
            raise ValueError
        return rows if columns is not None else rows[:, self._first :]

    def _plain(self, text: str) -> str:
        return text

    def _filled(self, text: str) -> str:
        """With `nan` in the empty cells of lines that have more than one cell."""
        mark, text = self._delimiter, f"\n{text}\n"
        for _ in range(2):  # the second of two empty cells begins where the first one ended
            text = text.replace(mark * 2, f"{mark}nan{mark}")
        return text.replace(f"\n{mark}", f"\nnan{mark}").replace(f"{mark}\n", f"{mark}nan\n").strip("\n")

    def _without_blanks(self, text: str) -> str:
        """The same where a cell of blanks is empty, too."""
        return self._filled(self._blank.sub("", f"\n{text}\n"))

    def _cell_by_cell(self, text: str, first: int) -> NDArray[np.float32]:
        """For forms that are rare, and to say where it is that something is wrong."""
        values = array("f")
        for number, line in enumerate(text.split("\n"), start=first):
            if not line or line.isspace():
                continue
            cells = line.split(self._delimiter)
            if len(cells) != self._width:
                raise DataError(f"{self._path}:{number}: found {len(cells)} columns, expected {self._width}")
            values.extend(_number(cell, f"{self._path}:{number}") for cell in cells[self._first :])
        return np.array(values, np.float32).reshape(-1, self._width - self._first)


def _number(cell: str, where: str) -> float:
    if not cell or cell.isspace():
        return math.nan
    with suppress(ValueError):
        if "_" not in cell:  # Python's own way to write a number
            return float(cell)
    shown = cell if len(cell) <= 40 else cell[:37] + "..."
    raise DataError(f"{where}: found {shown!r}, expected a number or an empty cell")


def _sniff(path: Path) -> tuple[str, list[str], int]:
    """The delimiter, the header's names ([] without a header) and the number of columns."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline(_LINE_CHARS)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not readable as text in UTF-8: {problem}") from None
    if len(line) == _LINE_CHARS:
        raise DataError(f"{path}: a line of more than {_LINE_CHARS} characters; is this a table?")
    if not line.strip():
        raise DataError(f"{path}: the first line is empty, expected a header or the first sample")
    # A comma may stand inside a number or a unit, a tab or a semicolon does not: those are believed first.
    delimiter = next((mark for mark in ("\t", ";") if mark in line), ",")
    cells = [cell.strip().strip("\"'").strip() for cell in line.split(delimiter)]
    if delimiter != "," and any(re.fullmatch(r"[-+]?\d+,\d+", cell) for cell in cells):
        raise DataError(f"{path}: numbers with a decimal comma; save it with a decimal point")
    names = cells if any(not _is_number(cell) for cell in cells) else []
    return delimiter, names, len(cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True
