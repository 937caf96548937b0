"""OnsetNMS as a library, and through the adapter of whatever TensorRT's headers TENSORRT_INCLUDE points to.

The headers cannot come with the project: without them the adapter is not tested. Several folders, one after
another as in PATH, are tested each.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from engine.nms_reference import NmsSettings, keep
from tests.engine.nms_library import (
    Library,
    Settings,
    Shape,
    assert_equal,
    nvcc,
    random_cases,
)
from tests.engine.test_nms_kernel import compiled

ROOT = Path(__file__).parents[2]
HEADERS = [Path(folder) for folder in os.environ.get("TENSORRT_INCLUDE", "").split(os.pathsep) if folder]
needs_headers = pytest.mark.skipif(not HEADERS, reason="needs TensorRT's headers: set TENSORRT_INCLUDE")


def make_plugin(build: Path, headers: Path | None) -> ctypes.CDLL:
    cmake = shutil.which("cmake") or str(Path(sysconfig.get_path("scripts"), "cmake"))
    said = {"NVCC": nvcc(), "CMAKE": cmake, "BUILD": build, "TENSORRT_INCLUDE": headers or ""}
    command = ["make", "--silent", "plugin", "ARCHITECTURES=90", *(f"{name}={said[name]}" for name in said)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return ctypes.CDLL(str(build / "libonset_nms.so"))


def test_make_plugin_builds_the_kernel_alone_where_there_are_no_headers(tmp_path: Path) -> None:
    library = make_plugin(tmp_path, None)
    assert not hasattr(library, "onset_nms_register")
    kernel = Library(tmp_path / "libonset_nms.so", "onset_nms_launch")
    assert kernel.workspace(Shape(1, 4, 3, 2, 0), Settings.of(NmsSettings(hop=25))) > 0
    case = next(random_cases(0, 1))
    arena = kernel.arena(case)
    tensors, workspace = arena.tensors(arena.bytes.ctypes.data)
    wrong = case._replace(settings=case.settings.model_copy(update={"top_k": 0}))
    assert kernel.call(wrong, tensors, workspace, 0) == -1


@needs_headers
@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_make_plugin_adds_the_adapter_that_the_headers_call_for(tmp_path: Path, headers: Path) -> None:
    library = make_plugin(tmp_path, headers)
    assert library.onset_nms_register() == 1  # since no TensorRT is loaded
    assert hasattr(library, "getCreators") == ("IPluginV3" in (headers / "NvInferRuntime.h").read_text())


@needs_headers
@pytest.mark.parametrize("headers", HEADERS, ids=str)
def test_the_adapter_does_what_the_oracle_says(tmp_path: Path, headers: Path) -> None:
    """Called as TensorRT would: made of fields, copied, saved, read, asked for shapes and types, enqueued."""
    includes = [f"-isystem{folder}" for folder in (headers, Path(nvcc()).parents[1] / "include")]
    library = Library(compiled("adapter", tmp_path, *includes), "onset_nms_through_plugin")
    for order, case in enumerate(random_cases(30, 200)):
        arena = library.arena(case)
        after = arena.bytes.copy()
        assert library.call(case, *arena.tensors(after.ctypes.data), order % 3) == 0
        assert_equal(arena.read(after), keep(*case[:3], case.settings))
    wrong = case._replace(settings=case.settings.model_copy(update={"sigma": 0.0}))
    assert library.call(wrong, *arena.tensors(after.ctypes.data), 0) < 0
