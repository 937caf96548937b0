"""Files with a flipped bit, or cut: each ends in an error by name or in what was written. Nothing else."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from engine import BundleError, OnnxSession
from engine.errors import DataError
from engine.manifest import read_bundle, with_nms
from engine.recording import read_arrays, read_recording

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = np.random.default_rng(15).normal(size=(40, 3)).astype(np.float32)


def damaged(data: bytes, times: int, first: int, seed: int = 15) -> Iterator[bytes]:
    """`data` with one bit flipped, every second time one of the `first` bytes; and cut, now and then."""
    draw = random.Random(seed)
    for number in range(times):
        changed = bytearray(data)
        if number % 10 == 9:
            yield bytes(changed[: draw.randrange(len(data))])
            continue
        changed[draw.randrange(first if number % 2 else len(data))] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def written(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The same samples in every form, with the length of what is not samples in front."""
    np.save(folder / "a.npy", SAMPLES)
    np.save(folder / "b.npy", np.asfortranarray(SAMPLES))
    np.savez(folder / "c.npz", samples=SAMPLES, stride=np.array(4))
    np.savez_compressed(folder / "d.npz", samples=SAMPLES, names=np.array(["ä", "b"]))
    rows = [",".join("" if value > 1 else f"{value:.4f}" for value in row) for row in SAMPLES]
    (folder / "e.csv").write_text("time,x,y,z\n" + "\n".join(f"{n},{row}" for n, row in enumerate(rows)))
    return {
        name: ((folder / name).read_bytes(), first)
        for name, first in (("a.npy", 128), ("b.npy", 128), ("c.npz", 200), ("d.npz", 250), ("e.csv", 20))
    }


@pytest.mark.parametrize("name", ["a.npy", "b.npy", "c.npz", "d.npz", "e.csv"])
def test_a_damaged_recording_is_refused_or_read_as_it_says(name: str, tmp_path: Path) -> None:
    data, first = written(tmp_path)[name]
    path = tmp_path / f"damaged{Path(name).suffix}"
    said: list[str] = []
    # An archive ends with its table of contents.
    both = [*damaged(data, 200, first), *(text[::-1] for text in damaged(data[::-1], 100, first, 16))]
    for number, content in enumerate(both):
        path.write_bytes(content)
        try:
            read = read_recording(path)
        except DataError as problem:
            said.append(str(problem))
            continue
        assert read.dtype == np.float32, number
        assert read.shape[1] in range(1, 5), number
        if name.endswith(".npy"):
            assert read.size * 4 in (SAMPLES.nbytes, SAMPLES.nbytes * 2, SAMPLES.nbytes // 2), number
        if name.endswith(".npz"):  # with its checksums
            np.testing.assert_array_equal(read, SAMPLES)
    assert len(said) > 30
    assert all(path.name in sentence and len(sentence) < 600 for sentence in said)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    """Of an `.npy` file."""
    words = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}".encode().ljust(117) + b"\n"
    return npy.magic(1, 0) + len(words).to_bytes(2, "little") + words


CLAIMS = [
    header((1 << 40, 1 << 20)),
    header((1 << 62, 1 << 62)),
    header((-1, 3)),
    header((0, -1)),
    header((1 << 40,), "|V0"),
    header((1 << 40,), "<U0"),
    header((1,) * 40),
    header((3, 2), "|O"),
    header((1 << 28, 1)),
    npy.magic(2, 0) + (1 << 31).to_bytes(4, "little") + b"{'descr'",
    npy.magic(2, 0) + (12_000).to_bytes(4, "little") + b"(" * 12_000,
    npy.magic(1, 0) + (9_000).to_bytes(2, "little") + b"[" * 9_000,
    npy.magic(3, 0) + b"\x02\x00{}",
    npy.magic(1, 0) + b"\x04\x00(1,)",
    npy.magic(1, 0) + b"\x0a\x00'\\d' + 'a'",
]


def test_what_a_header_claims_is_not_allocated_before_the_file_bears_it_out(tmp_path: Path) -> None:
    tracemalloc.start()
    for claim in CLAIMS:
        (tmp_path / "a.npy").write_bytes(claim + bytes(24))
        with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("samples.npy", claim + bytes(24))
        for path in (tmp_path / "a.npy", tmp_path / "b.npz"):
            with pytest.raises(DataError):
                read_recording(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1024 * 1024


def test_an_archive_that_claims_more_than_deflate_can_make_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, samples=np.zeros((1000, 3), np.float32))
    data = path.read_bytes()
    size = (12_128).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (1 << 31).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"damaged, 'samples\.npy' claims 2147483648 bytes"):
        read_recording(path)


def test_keys_that_are_no_arrays_are_left_out_and_what_is_packed_otherwise_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", samples=SAMPLES)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("read.me", "words")
    assert list(read_arrays(tmp_path / "a.npz")) == ["samples"]
    with zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"")
    with pytest.raises(DataError, match="packed in another way"):
        read_arrays(tmp_path / "a.npz")


def table(path: Path, rows: int, cell: str) -> None:
    """A table of six columns; a third of the rows have such a cell, the others a number there."""
    full = "0.12345,1.12345,-2.12345,3.12345,{},5.12345\n"
    block = full.format("4.12345") * 2 + full.format(cell)
    path.write_text("t,a,b,c,d,e\n" + block * (rows // 3))


@pytest.mark.parametrize("cell", ["", "  "])
def test_empty_cells_cost_little_more_memory_than_numbers(cell: str, tmp_path: Path) -> None:
    """In their own process, for its peak: a list of floats takes 40 bytes a cell."""
    code = """
import resource, sys, numpy
from pathlib import Path
from engine.recording import read_recording
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
samples = read_recording(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *samples.shape, numpy.isnan(samples).sum())
"""
    peaks = []
    for name, content in (("full.csv", "4.5"), ("gaps.csv", cell)):
        table(tmp_path / name, 90_000, content)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=120,
        )
        peak, rows, columns, missing = map(int, done.stdout.split())
        assert (rows, columns, missing) == (90_000, 5, 0 if name == "full.csv" else 30_000)
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 8 * 1024


def test_empty_cells_are_read_where_they_stand_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.recording._BLOCK_CHARS", 37)
    draw = np.random.default_rng(3)
    values = draw.normal(size=(200, 4)).astype(np.float32)
    values[draw.random((200, 4)) < 0.4] = np.nan
    for delimiter, blank in ((",", ""), (";", " "), ("\t", "")):
        lines = [delimiter.join(blank if np.isnan(x) else repr(float(x)) for x in row) for row in values]
        (tmp_path / "a.csv").write_text(delimiter.join("wxyz") + "\r\n" + "\r\n\r\n".join(lines))
        np.testing.assert_array_equal(read_recording(tmp_path / "a.csv"), values)
    lines[150] = lines[150] + "\t7"
    (tmp_path / "a.csv").write_text("w\tx\ty\tz\n" + "\n".join(lines))
    with pytest.raises(DataError, match=r"a\.csv:152: found 5 columns, expected 4"):
        read_recording(tmp_path / "a.csv")
    lines[150] = "1\t2\t3\t1_000"
    (tmp_path / "a.csv").write_text("w\tx\ty\tz\n" + "\n".join(lines))
    with pytest.raises(DataError, match=r"a\.csv:152: found '1_000', expected a number"):
        read_recording(tmp_path / "a.csv")


def test_a_line_without_end_is_refused(tmp_path: Path) -> None:
    for text in ("1," * 600_000, "1,2\n" + "1" * 3_000_000):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match="a line of more than"):
            read_recording(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "nms.onnx"])
def test_a_damaged_bundle_is_refused_or_says_the_same(name: str, tmp_path: Path) -> None:
    source = ROOT / "deploy" / "demo" / "bundle"
    shutil.copytree(source, tmp_path / "bundle")
    data = (source / name).read_bytes()
    said: list[str] = []
    for content in damaged(data, 60 if name == "bundle.json" else 20, min(len(data), 3000)):
        (tmp_path / "bundle" / name).write_bytes(content)
        try:
            manifest, graph = read_bundle(tmp_path / "bundle")
            with_nms(tmp_path / "bundle", manifest, graph)
            assert name == "bundle.json"
        except BundleError as problem:
            said.append(str(problem))
    assert len(said) > 15
    assert all(str(tmp_path) in sentence and len(sentence) < 2000 for sentence in said)


@pytest.mark.parametrize(
    "text", ['{"version": ' + "9" * 4000 + "}", '{"version": 1e999}', "[" * 100_000, "7"]
)
def test_a_manifest_with_numbers_beyond_measure_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text(text)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        OnnxSession(tmp_path, 1)
