"""A compiled OnsetNMS, called through ctypes, and cases to call it on.

Tensors are laid into memory that was poisoned before, with guards around each, which `Arena.read` checks.
Knows neither whether it runs on a GPU nor how it came to be.
"""

from __future__ import annotations

import ctypes
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.nms_reference import Kept, NmsSettings

GUARD, POISON = 256, 0xA5  # bytes; as a float32 -2.9e-16, as a count a huge negative one
Array = NDArray[np.generic]


class Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("hop", "top_k", "max_segments", "soft")),
        *((name, ctypes.c_float) for name in ("score_threshold", "min_score", "min_length")),
        *((name, ctypes.c_float) for name in ("iou_threshold", "sigma")),
    ]

    @classmethod
    def of(cls, settings: NmsSettings) -> Settings:
        return cls(**settings.attributes())


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("batch", "moments", "classes", "remembered", "half")]


class Tensors(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "scores", "offsets", "memory", "segments", "kept", "labels", "number", "next_memory"
        )
    ]  # fmt: skip


class Library:
    """The library at `path`; `entry` is called, a function of the signature of `onset_nms_launch`."""

    def __init__(self, path: Path, entry: str) -> None:
        library = ctypes.CDLL(str(path))
        pointers = [ctypes.POINTER(kind) for kind in (Shape, Settings)]
        self._workspace, self._call = library.onset_nms_workspace, library[entry]
        self._workspace.argtypes, self._workspace.restype = pointers, ctypes.c_size_t
        self._call.argtypes = [*pointers, ctypes.POINTER(Tensors), ctypes.c_void_p, ctypes.c_void_p]

    def workspace(self, shape: Shape, settings: Settings) -> int:
        """Bytes, or 0."""
        return int(self._workspace(shape, settings))

    def call(self, case: Case, tensors: Tensors, workspace: int, last: int) -> int:
        """What `entry` returns; `last`: its last argument."""
        return int(self._call(case.shape, Settings.of(case.settings), tensors, workspace, last))

    def arena(self, case: Case) -> Arena:
        """The case, laid out; AssertionError where it is refused."""
        workspace = self.workspace(case.shape, Settings.of(case.settings))
        assert workspace > 0
        return Arena(case, workspace)


class Case(NamedTuple):
    """One call: scores [B, N, K], offsets [B, N, 2], memory [B, 1 + 3 R]."""

    scores: NDArray[np.floating]
    offsets: NDArray[np.floating]
    memory: NDArray[np.float32]
    settings: NmsSettings

    @property
    def shape(self) -> Shape:
        remembered = (self.memory.shape[1] - 1) // 3
        return Shape(*self.scores.shape, remembered, int(self.scores.dtype == np.float16))

    @property
    def outputs(self) -> Kept:
        """Zeros of the outputs' shapes."""
        batch, most = len(self.scores), self.settings.max_segments
        return Kept(
            np.zeros((batch, most, 2), np.float32),
            np.zeros((batch, most), np.float32),
            np.zeros((batch, most), np.int32),
            np.zeros(batch, np.int32),
            np.zeros_like(self.memory),
        )


class Arena:
    """Where the tensors of a case and its workspace lie in one poisoned block of memory, at any address."""

    def __init__(self, case: Case, workspace: int) -> None:
        self._arrays = [*case[:3], *case.outputs]
        self._offsets, end = [], GUARD
        for size in (*(array.nbytes for array in self._arrays), workspace):
            self._offsets.append(end)
            end = -(-(end + size) // GUARD) * GUARD + GUARD
        self._workspace = workspace
        self.bytes = np.full(end, POISON, np.uint8)
        for array, offset in zip(self._arrays[:3], self._offsets, strict=False):
            self.bytes[offset : offset + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def tensors(self, base: int) -> tuple[Tensors, int]:
        """The addresses of the tensors and of the workspace, where the block begins at `base`."""
        *tensors, workspace = (base + offset for offset in self._offsets)
        return Tensors(*tensors), workspace

    def read(self, after: NDArray[np.uint8]) -> Kept:
        """The outputs in the block as it is after the call; nothing else may have changed in it."""
        expected, found = self.bytes.copy(), []
        for array, offset in zip(self._arrays[3:], self._offsets[3:], strict=False):
            part = slice(offset, offset + array.nbytes)
            expected[part] = after[part]
            found.append(after[part].copy().view(array.dtype).reshape(array.shape))
        scratch = slice(self._offsets[-1], self._offsets[-1] + self._workspace)
        expected[scratch] = after[scratch]
        assert np.array_equal(expected, after), "something outside of the outputs was written"
        return Kept(*found)


def cuda_tool(name: str) -> str | None:
    """A program of CUDA's toolkit: one on the PATH, or else pip's."""
    places = Path(sysconfig.get_path("purelib")).glob(f"nvidia/cu*/bin/{name}")
    return shutil.which(name) or next(map(str, places), None)


def nvcc() -> str:
    """CUDA's compiler; AssertionError where there is none."""
    found = cuda_tool("nvcc")
    assert found is not None, "put an nvcc on the PATH, or install pip's with `pip install '.[plugin]'`"
    return found


def assert_equal(found: Kept, expected: Kept) -> None:
    """To the last bit."""
    for name, one, other in zip(Kept._fields, found, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def random_cases(seed: int, number: int) -> Iterator[Case]:
    """Small cases of all kinds: few and many candidates, ties, overflowing bounds, memories in use."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        yield _online(rng) if rng.random() < 0.6 else _offline(rng)


def offline_case(seed: int, number: int, classes: int) -> Case:
    """As evaluation has them: so many candidates, each of one class, with scores as published ones have."""
    rng = np.random.default_rng(seed)
    scores = np.zeros((1, number, classes), np.float32)
    labels = rng.choice(classes, number, p=rng.dirichlet(np.ones(classes)))
    scores[0, np.arange(number), labels] = 0.001 + 0.999 * rng.beta(0.4, 3, number)
    centre, half = rng.uniform(0, 700, number), 9 * rng.lognormal(0, 1, number)
    segments = np.stack([centre - half, centre + half], axis=1)[None].astype(np.float32)
    most = NmsSettings(hop=0, score_threshold=0.001, top_k=number, max_segments=2000, sigma=0.4)
    return Case(scores, segments, np.zeros((1, 1), np.float32), most)


def stream_cases(seed: int, batch: int, classes: int) -> Iterator[Case]:
    """Chunks of 4 frames of the same streams, without end; who runs them puts the memory in."""
    rng = np.random.default_rng(seed)
    settings = NmsSettings(hop=25, max_segments=8, score_threshold=0.2, method="soft")
    while True:
        scores = rng.normal(-1, 2, (batch, 4, classes)).astype(np.float16)
        offsets = rng.normal(0, 2, (batch, 4, 2)).astype(np.float16)
        yield Case(scores, offsets, np.zeros((batch, 1 + 3 * 16), np.float32), settings)


def _settings(rng: np.random.Generator, hop: int) -> NmsSettings:
    return NmsSettings(
        hop=hop,
        score_threshold=rng.choice([0.0, 0.05, 0.3]),
        min_score=rng.choice([0.0, 0.001, 0.2]),
        min_length=rng.choice([0.0, 1.0, 5.0]),
        method=rng.choice(["soft", "hard"]),
        iou_threshold=rng.choice([0.1, 0.5, 1.0]),
        sigma=rng.choice([0.05, 0.5, 2.0]),
        top_k=int(rng.choice([1, 7, 40, 512])),
        max_segments=int(rng.choice([1, 5, 30, 100])),
    )


def _sizes(rng: np.random.Generator, moments: int) -> tuple[int, int, int, int]:
    return int(rng.integers(1, 4)), moments, int(rng.choice([1, 2, 5, 12, 40])), int(rng.choice([0, 3, 20]))


def _online(rng: np.random.Generator) -> Case:
    """Logits and look-back offsets, in whole numbers here and there, so that much is equal."""
    batch, moments, classes, remembered = _sizes(rng, int(rng.integers(1, 17)))
    hop = int(rng.choice([1, 4, 25, 1000]))
    scores = rng.normal(-2, 3, (batch, moments, classes))
    offsets = rng.normal(0, 3, (batch, moments, 2))
    if rng.random() < 0.5:
        scores, offsets = scores.round(), offsets.round()
    if rng.random() < 0.2:
        odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 6e4, -6e4, 1e-7])
        for values in (scores, offsets):
            where = rng.random(values.shape) < 0.2
            values[where] = rng.choice(odd, values.shape)[where]
    memory = np.zeros((batch, 1 + 3 * remembered))
    memory[:, 0] = rng.choice([0, 10, 1000, 2.0**24], batch)
    _fill(rng, memory, classes, 4 * moments * hop)
    return _case(rng, scores, offsets, memory, _settings(rng, hop))


def _offline(rng: np.random.Generator) -> Case:
    """Scores and segments, some of which are none."""
    batch, moments, classes, remembered = _sizes(rng, int(rng.choice([1, 3, 50, 200])))
    scores = rng.beta(0.4, 3, (batch, moments, classes))
    start, length = rng.uniform(0, 300, (batch, moments)), rng.lognormal(4, 1, (batch, moments))
    if rng.random() < 0.5:
        scores, start, length = scores.round(1), start.round(-2), length.round(-2)
    if rng.random() < 0.2:
        odd = np.array([np.nan, np.inf, -1.0, 0.0, 1.0, 65504.0])
        scores[rng.random(scores.shape) < 0.1] = rng.choice(odd)
        length[rng.random(length.shape) < 0.1] = rng.choice(odd)
    memory = np.zeros((batch, 1 + 3 * remembered))
    _fill(rng, memory, classes, 100)
    return _case(rng, scores, np.stack([start, start + length], axis=2), memory, _settings(rng, 0))


def _fill(rng: np.random.Generator, memory: NDArray[np.float64], classes: int, reach: int) -> None:
    """Remembered segments, with empty places between."""
    places = memory[:, 1:].reshape(len(memory), -1, 3)
    places[..., 0] = -rng.integers(0, reach + 1, places.shape[:2])
    places[..., 0][rng.random(places.shape[:2]) < 0.1] -= 2**24
    places[..., 1] = places[..., 0] + rng.integers(0, reach + 1, places.shape[:2])
    places[..., 2] = rng.integers(0, classes + 1, places.shape[:2])
    places[places[..., 2] == 0] = 0


def _case(
    rng: np.random.Generator,
    scores: NDArray[np.float64],
    offsets: NDArray[np.float64],
    memory: NDArray[np.float64],
    settings: NmsSettings,
) -> Case:
    kind = np.float16 if rng.random() < 0.5 else np.float32
    with np.errstate(over="ignore"):
        return Case(scores.astype(kind), offsets.astype(kind), memory.astype(np.float32), settings)
