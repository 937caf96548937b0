"""Recordings of every accepted form read as float32 [T, C]; everything else is refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine import recording
from engine.errors import DataError
from engine.recording import read_arrays, read_recording

SAMPLES = np.array([[1.0, -2.5], [0.25, 4.0], [3.0, 1e-3]], dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16", "int64"])
def test_npy_of_any_number_type_becomes_float32(tmp_path: Path, dtype: str) -> None:
    values = np.array([[1, 2], [3, 4], [5, 6]], dtype=dtype)
    np.save(tmp_path / "a.npy", values)
    read = read_recording(tmp_path / "a.npy")
    assert read.dtype == np.float32
    assert read.flags.c_contiguous
    assert read.flags.writeable
    np.testing.assert_array_equal(read, values.astype(np.float32))


def test_one_dimension_is_one_channel_and_fortran_order_is_undone(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(5))
    assert read_recording(tmp_path / "one.npy").shape == (5, 1)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(SAMPLES))
    read = read_recording(tmp_path / "fortran.npy")
    np.testing.assert_array_equal(read, SAMPLES)
    assert read.flags.c_contiguous


def test_nan_and_inf_pass_through(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf], [1.0, 1e300]]))
    read = read_recording(tmp_path / "a.npy")
    np.testing.assert_array_equal(read, np.array([[np.nan, np.inf], [1.0, np.inf]], dtype=np.float32))


@pytest.mark.parametrize("key", ["samples", "feats", "anything"])
def test_npz_by_key_or_as_the_only_array(tmp_path: Path, key: str) -> None:
    extra = {} if key == "anything" else {"stride": np.array(4)}
    np.savez(tmp_path / "a.npz", **{key: SAMPLES}, **extra)
    np.testing.assert_array_equal(read_recording(tmp_path / "a.npz"), SAMPLES)


def test_npz_with_several_unnamed_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=SAMPLES, y=SAMPLES)
    with pytest.raises(DataError, match=r"a\.npz: found `x`, `y`; expected one array"):
        read_recording(tmp_path / "a.npz")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", [None, "acc_x,acc_y", "time,acc_x,acc_y", "Timestamp [s],acc_x,acc_y"])
def test_csv_forms(tmp_path: Path, delimiter: str, header: str | None) -> None:
    timed = header is not None and header.lower().startswith("time")
    lines = [] if header is None else [header.replace(",", delimiter)]
    for number, row in enumerate(SAMPLES):
        cells = [f"2024-01-01T00:00:0{number}"] if timed else []
        lines.append(delimiter.join(cells + [repr(float(value)) for value in row]))
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    np.testing.assert_array_equal(read_recording(tmp_path / "a.csv"), SAMPLES)


def test_csv_time_column_is_kept_when_the_name_only_starts_like_time(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("temperature,x\n20,1\n21,2\n")
    np.testing.assert_array_equal(read_recording(tmp_path / "a.csv"), [[20, 1], [21, 2]])


def test_csv_one_column_and_empty_cells(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("1\n2\n3\n")
    np.testing.assert_array_equal(read_recording(tmp_path / "one.csv"), [[1], [2], [3]])
    (tmp_path / "gaps.csv").write_text("t,x,y\n0,1,\n1,,3\n2,4,5\n")
    np.testing.assert_array_equal(
        read_recording(tmp_path / "gaps.csv"), np.array([[1, np.nan], [np.nan, 3], [4, 5]], dtype=np.float32)
    )


@settings(deadline=None, max_examples=40)
@given(
    values=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 20), st.integers(1, 5)), elements=st.floats(width=32)
    )
)
def test_every_form_reads_back_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
) -> None:
    folder = tmp_path_factory.mktemp("same")
    np.save(folder / "a.npy", values)
    np.savez_compressed(folder / "a.npz", samples=values)
    rows = [",".join(repr(float(value)) for value in row) for row in values]
    (folder / "a.csv").write_text("\n".join(rows) + "\n")
    for suffix in recording.SUFFIXES:
        np.testing.assert_array_equal(read_recording(folder / f"a{suffix}"), values)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mat", b"", "suffix `.mat`"),
        ("a.npy", b"not an array", "not readable as an .npy"),
        ("a.npy", b"", "not readable as an .npy"),
        ("a.npz", b"PK\x03\x04 not really", "not readable as an .npz"),
        ("a.csv", b"", "first line is empty"),
        ("a.csv", b"x,y\n", "holds no samples"),
        ("a.csv", b"x,y\n1,2\n1,two\n", "two"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", "3 columns, expected 2"),
        ("a.csv", b"t,y\n1,2\n1\n", "1 columns, expected 2"),
        ("a.csv", b"1,5;2,5\n", "decimal comma"),
        ("a.csv", b"time\n1\n", "only the column `time`"),
        ("a.csv", b"\xff\xfe\x00x", "UTF-8"),
    ],
)
def test_what_is_not_a_recording_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as problem:
        read_recording(tmp_path / name)
    assert message in str(problem.value)
    assert name in str(problem.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3, 4)), "[2, 3, 4]"),
        (np.zeros(()), "expected [T, C]"),
        (np.zeros((0, 3)), "holds no samples"),
        (np.zeros((3, 0)), "holds no samples"),
        (np.zeros((3, 2), dtype=complex), "complex128"),
        (np.array([["a", "b"]]), "expected integers or floats"),
        (np.zeros((3, 2), dtype=bool), "bool"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", samples=values)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError) as problem:
            read_recording(tmp_path / name)
        assert message in str(problem.value)


class _Bomb:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "exploded"
    bomb = np.array([_Bomb(mark)], dtype=object)
    np.save(tmp_path / "a.npy", bomb, allow_pickle=True)
    np.savez(tmp_path / "a.npz", samples=bomb)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(_Bomb(mark)))
    for name in ("a.npy", "a.npz", "raw.npy"):
        with pytest.raises(DataError):
            read_recording(tmp_path / name)
    assert not mark.exists()


def test_missing_files_folders_and_renamed_archives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.npy: cannot be opened"):
        read_recording(tmp_path / "gone.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(DataError, match="found a folder"):
        read_recording(tmp_path / "folder.npy")
    np.savez(tmp_path / "a.npz", samples=SAMPLES)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"rename it to \.npz"):
        read_recording(tmp_path / "a.npy")


def test_sizes_are_bounded_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", samples=np.zeros((100_000, 4), dtype=np.float32))
    np.save(tmp_path / "b.npy", np.zeros((100_000, 4), dtype=np.int8))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    monkeypatch.setattr(recording, "MAX_RECORDING_BYTES", 1_000_000)
    with pytest.raises(DataError, match="unpacks to"):
        read_arrays(tmp_path / "a.npz")
    with pytest.raises(DataError, match="as float32"):
        read_recording(tmp_path / "b.npy")
