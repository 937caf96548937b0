"""Recordings on disk: `.npy`, `.npz` and `.csv` files read as float32 arrays [T, C].

One reader for training, checking and serving, so that a file means the same everywhere. Knows nothing of
sampling rates, labels or models. Nothing is ever unpickled, and a file's size is known before it is read.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError

SUFFIXES = (".npy", ".npz", ".csv")

# 4 GiB of float32 is 124 days of a 6-channel sensor at 50 Hz, or 6 days of 2048-d features at 1 Hz: what is
# larger is either damaged or belongs in several recordings.
MAX_RECORDING_BYTES = 4 * 1024**3
ARRAY_KEYS = ("samples", "feats")
_SNIFF_BYTES = 1024 * 1024
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
    return _checked(_read_npy(path), path)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read every array of an `.npz` file, by key. Raises DataError; never unpickles."""
    _check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_RECORDING_BYTES:
            raise DataError(f"{path}: unpacks to {size} bytes, expected at most {MAX_RECORDING_BYTES}")
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError) as problem:
        raise DataError(f"{path}: not readable as an .npz file of plain arrays: {problem}") from None


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise DataError(f"{path}: cannot be opened: {problem.strerror or problem}") from None
    if not path.is_file():
        raise DataError(f"{path}: found a folder, expected a file")
    if size > MAX_RECORDING_BYTES:
        raise DataError(
            f"{path}: {size} bytes, expected at most {MAX_RECORDING_BYTES}; cut it into several recordings"
        )


def _read_npy(path: Path) -> NDArray[Any]:
    # Memory-mapped, so that shape and type are judged before any of the samples is read.
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, SyntaxError) as problem:
        raise DataError(f"{path}: not readable as an .npy file of one plain array: {problem}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: holds an .npz archive, expected one array; rename it to .npz")
    return array


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
    skip = 1 if names else 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "no data": told as an error by the caller
            rows = np.loadtxt(
                path,
                dtype=np.float32,
                delimiter=delimiter,
                skiprows=skip,
                ndmin=2,
                comments=None,
                encoding="utf-8-sig",
            )
        return rows[:, first:]
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not readable as text in UTF-8: {problem}") from None
    except ValueError as problem:
        # loadtxt knows neither empty cells nor dates in the time column; both are rare, so a slower reader is
        # kept for them. What is neither empty nor a number stays an error (genfromtxt would make it NaN).
        return _read_csv_slowly(path, delimiter, skip, range(first, width), str(problem))


def _read_csv_slowly(
    path: Path, delimiter: str, skip: int, columns: range, complaint: str
) -> NDArray[np.float32]:
    rows: list[list[float]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if number <= skip or not line.strip():
                continue
            cells = line.rstrip("\r\n").split(delimiter)
            if len(cells) != columns.stop:
                raise DataError(f"{path}:{number}: found {len(cells)} columns, expected {columns.stop}")
            try:
                rows.append([float(cell) if cell.strip() else np.nan for cell in cells[columns.start :]])
            except ValueError:
                raise DataError(f"{path}:{number}: {complaint}; expected numbers or empty cells") from None
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(columns))


def _sniff(path: Path) -> tuple[str, list[str], int]:
    """The delimiter, the header's names ([] without a header) and the number of columns."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            line = file.readline(_SNIFF_BYTES)
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: not readable as text in UTF-8: {problem}") from None
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
