"""The kernel of OnsetNMS on a GPU, through ctypes: it agrees with the oracle to the last bit.

`make test-gpu` builds the library and names it in ONSET_NMS_LIBRARY.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from engine.native import trusted
from engine.nms_reference import Kept, keep
from tests.engine.nms_library import (
    Arena,
    Case,
    Library,
    assert_equal,
    cuda_tool,
    offline_case,
    random_cases,
    stream_cases,
)
from tests.gpu.driver import Gpu

pytestmark = pytest.mark.gpu

# The sanitizer makes a call some hundred times as slow.
CASES = int(os.environ.get("ONSET_NMS_CASES", "10000"))


@pytest.fixture(scope="module")
def library(gpu: Gpu) -> Library:
    return Library(trusted(Path(os.environ["ONSET_NMS_LIBRARY"])), "onset_nms_launch")


def launch(gpu: Gpu, library: Library, case: Case, arena: Arena) -> None:
    assert library.call(case, *arena.tensors(gpu.upload(arena.bytes)), gpu.stream) == 0


def run(gpu: Gpu, library: Library, case: Case) -> Kept:
    arena = library.arena(case)
    launch(gpu, library, case, arena)
    return arena.read(gpu.download(arena.bytes))


def test_agrees_with_the_oracle_on_random_cases(gpu: Gpu, library: Library) -> None:
    for case in random_cases(20, CASES):
        assert_equal(run(gpu, library, case), keep(*case[:3], case.settings))


@pytest.mark.parametrize("top_k", [5000, 700])
def test_agrees_with_the_oracle_on_what_evaluation_gives_it(gpu: Gpu, library: Library, top_k: int) -> None:
    case = offline_case(0, 5000, 97)
    case = case._replace(settings=case.settings.model_copy(update={"top_k": top_k}))
    assert_equal(run(gpu, library, case), keep(*case[:3], case.settings))


@pytest.mark.parametrize("streams", [1, 8, 64, 512])
def test_agrees_with_the_oracle_all_along_streams(gpu: Gpu, library: Library, streams: int) -> None:
    memory = np.zeros((streams, 1 + 3 * 16), np.float32)
    for case in islice(stream_cases(2, streams, 20), 10):
        case = case._replace(memory=memory)
        expected = keep(*case[:3], case.settings)
        assert_equal(run(gpu, library, case), expected)
        memory = expected.memory


def test_a_cuda_graph_captures_it_and_replays_it_on_what_lies_there_then(gpu: Gpu, library: Library) -> None:
    first, second = islice(stream_cases(3, 8, 20), 2)
    arenas = [library.arena(case) for case in (first, second)]
    launch(gpu, library, first, arenas[0])  # loads the kernel, which cannot be done while capturing
    base = gpu.upload(arenas[0].bytes)
    replay = gpu.captured(lambda: library.call(first, *arenas[0].tensors(base), gpu.stream))
    for case, arena in zip((first, second, first), (*arenas, arenas[0]), strict=True):
        assert gpu.upload(arena.bytes) == base
        replay()
        assert_equal(arena.read(gpu.download(arena.bytes)), keep(*case[:3], case.settings))


def test_what_is_out_of_bounds_is_refused(gpu: Gpu, library: Library) -> None:
    case = next(random_cases(0, 1))
    arena = library.arena(case)
    wrong = case._replace(settings=case.settings.model_copy(update={"top_k": 0}))
    assert library.call(wrong, *arena.tensors(gpu.upload(arena.bytes)), gpu.stream) == -1


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(gpu: Gpu, library: Library, tool: str) -> None:
    sanitizer = cuda_tool("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, of CUDA's toolkit or pip's nvidia-cuda-sanitizer-api")
    python = [sys.executable, "-m", "pytest", "-q", "--confcutdir=tests/gpu", "-k", "random", __file__]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *python]
    subprocess.run(command, check=True, env=os.environ | {"ONSET_NMS_CASES": "200"})
