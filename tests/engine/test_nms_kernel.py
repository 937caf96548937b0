"""The kernel of OnsetNMS where there is no GPU: its steps agree with the oracle to the last bit."""

from __future__ import annotations

import os
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from engine.nms_reference import Kept, NmsSettings, keep
from tests.engine.nms_library import (
    Case,
    Library,
    Settings,
    Shape,
    assert_equal,
    nvcc,
    offline_case,
    random_cases,
    stream_cases,
)

NATIVE = Path(__file__).parent / "native"
SOURCES = Path(__file__).parents[2] / "engine" / "nms"


def compiled(name: str, folder: Path, *more: str) -> Path:
    """`native/NAME.cpp`, as a library in `folder`; `more`: options."""
    compiler = os.environ.get("CXX", "c++")
    library = folder / f"{name}.so"
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, *more, "-o", library, NATIVE / f"{name}.cpp"], check=True)
    return library


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(compiled("sequential", tmp_path_factory.mktemp("native")), "onset_nms_emulate")


@pytest.fixture(scope="module")
def fibers(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(compiled("fibers", tmp_path_factory.mktemp("native")), "onset_nms_emulate")


def run(library: Library, case: Case, order: int) -> Kept:
    arena = library.arena(case)
    after = arena.bytes.copy()
    assert library.call(case, *arena.tensors(after.ctypes.data), order) == 0
    return arena.read(after)


# ------------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_oracle_in_whatever_order_work_is_done(sequential: Library, seed: int) -> None:
    for case in random_cases(seed, 750):
        expected = keep(*case[:3], case.settings)
        for order in range(3):
            assert_equal(run(sequential, case, order), expected)


def test_agrees_with_the_oracle_when_threads_run_as_they_please_between_barriers(fibers: Library) -> None:
    for order, case in enumerate(random_cases(10, 120)):
        assert_equal(run(fibers, case, order), keep(*case[:3], case.settings))


@pytest.mark.parametrize("top_k", [5000, 700])
def test_agrees_with_the_oracle_on_what_evaluation_gives_it(sequential: Library, top_k: int) -> None:
    case = offline_case(0, 5000, 97)
    case = case._replace(settings=case.settings.model_copy(update={"top_k": top_k}))
    expected = keep(*case[:3], case.settings)
    assert expected.number[0] > 500
    assert_equal(run(sequential, case, 2), expected)


def test_agrees_with_the_oracle_all_along_a_stream(sequential: Library, fibers: Library) -> None:
    memory = np.zeros((2, 1 + 3 * 16), np.float32)
    emitted = 0
    for step, case in enumerate(islice(stream_cases(1, 2, 5), 40)):
        case = case._replace(memory=memory)
        expected = keep(*case[:3], case.settings)
        assert_equal(run(sequential, case, step % 3), expected)
        if step % 8 == 0:
            assert_equal(run(fibers, case, step), expected)
        memory, emitted = expected.memory, emitted + int(expected.number.sum())
    assert memory[:, 0].tolist() == [4000, 4000]
    assert emitted > 40


# ------------------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize(
    "change",
    [
        {"batch": -1}, {"moments": 0}, {"classes": 0}, {"classes": 65537}, {"remembered": -1},
        {"remembered": 4097}, {"moments": 2**24 + 1}, {"moments": 2**20, "classes": 2**11},
        {"moments": 700_000, "hop": 25}, {"hop": -1}, {"hop": 65537}, {"top_k": 0}, {"top_k": 65537},
        {"max_segments": 0}, {"max_segments": 65537}, {"soft": 2}, {"score_threshold": float("nan")},
        {"min_score": -0.1}, {"min_length": -1.0}, {"iou_threshold": 0.0}, {"sigma": 0.0},
        {"sigma": float("inf")},
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_refused(sequential: Library, change: dict[str, float]) -> None:
    shape, settings = Shape(1, 4, 3, 2, 0), Settings.of(NmsSettings(hop=25))
    assert sequential.workspace(shape, settings) > 0
    for name, value in change.items():
        setattr(shape if hasattr(shape, name) else settings, name, value)
    assert sequential.workspace(shape, settings) == 0


def test_a_batch_of_no_streams_is_nothing_to_do(sequential: Library) -> None:
    case = next(stream_cases(0, 0, 3))
    assert run(sequential, case, 0).number.shape == (0,)


# ----------------------------------------------------------------------------------------------- the compiler


def test_the_kernel_compiles_and_nothing_in_it_is_fused_or_approximate(tmp_path: Path) -> None:
    ptx = tmp_path / "gpu.ptx"
    options = ["-std=c++17", "-O3", "-fmad=false", "-arch=compute_90", "--ptx"]
    subprocess.run([nvcc(), *options, "-o", ptx, SOURCES / "gpu.cu"], check=True)
    text = ptx.read_text()
    assert "div.rn.f32" in text
    for inexact in ("fma.rn.f32", "div.full", "div.approx", "ex2.approx", "rcp.approx", ".ftz"):
        assert inexact not in text
    assert "-fmad=false" in (SOURCES / "CMakeLists.txt").read_text()
