"""OnsetNMS as a library, and through the adapter of whatever TensorRT's headers TENSORRT_INCLUDE points to.

The headers cannot come with the project: without them the adapter is not tested. Several folders, one after
another as in PATH, are tested each. What loading it does is tested on a stand-in for TensorRT's registry, and
on a real libnvinfer.so where TENSORRT_LIBRARY, folders likewise, has one of the headers' version. No GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

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


class Built(NamedTuple):
    """The plugin for one version of TensorRT, and what tests need beside it."""

    headers: Path
    plugin: Path
    tensorrt: dict[str, Path]  # `stand-in`, and `real` where there is one
    known: Path  # native/known.cpp

    def run(self, tensorrt: str, code: str) -> str:
        """What a fresh process prints; `load`, as dlopen does, one of `trt`, `plugin`, `known`, or a path."""
        names = {"trt": self.tensorrt[tensorrt], "plugin": self.plugin, "known": self.known}
        start = (
            f"import ctypes, _ctypes; paths = { {n: str(p) for n, p in names.items()}!r}\n"
            "load = lambda name: ctypes.CDLL(paths.get(name, name))\n"
        )
        command = [sys.executable, "-c", start + code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module", params=HEADERS, ids=str)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    headers, folder = request.param, tmp_path_factory.mktemp("plugin")
    make_plugin(folder, headers)
    version = (headers / "NvInferVersion.h").read_text()
    major = re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", version)
    assert major is not None
    name = f"libnvinfer.so.{major[1]}"
    includes = [f"-isystem{place}" for place in (headers, Path(nvcc()).parents[1] / "include")]
    tensorrt = {"stand-in": compiled("registry", folder, *includes, f"-Wl,-soname,{name}")}
    for place in filter(None, os.environ.get("TENSORRT_LIBRARY", "").split(os.pathsep)):
        if Path(place, name).is_file():
            tensorrt["real"] = Path(place, name)
    return Built(headers, folder / "libonset_nms.so", tensorrt, compiled("known", folder, *includes))


@needs_headers
def test_make_plugin_adds_the_adapter_that_the_headers_call_for(built: Built) -> None:
    found = built.run("stand-in", "print(hasattr(load('plugin'), 'getCreators'))")
    assert found == str("IPluginV3" in (built.headers / "NvInferRuntime.h").read_text())


@needs_headers
@pytest.mark.parametrize("tensorrt", ["stand-in", "real"])
def test_loading_the_plugin_is_enough_to_make_it_known(built: Built, tensorrt: str) -> None:
    """As `trtexec --plugins` loads it; `onset_nms_register` then says what is so; unloading is no harm."""
    if tensorrt not in built.tensorrt:
        pytest.skip("needs a real TensorRT of the headers' version: set TENSORRT_LIBRARY")
    code = """
trt, known = load('trt'), load('known').known
print(known(), end=' ')
plugin = load('plugin')
print(known(), plugin.onset_nms_register(), plugin.onset_nms_register(), known(), end=' ')
_ctypes.dlclose(plugin._handle)
print(known())
"""
    assert built.run(tensorrt, code) == "0 1 0 0 1 1"
    if tensorrt == "stand-in":
        count = "print(trt.creators_known(), trt.creators_told_twice())"
        assert built.run(tensorrt, f"{code}\n{count}").endswith("1 0"), (
            "TensorRT logs an error when told twice"
        )


@needs_headers
@pytest.mark.parametrize("tensorrt", ["stand-in", "real"])
def test_a_tensorrt_that_is_loaded_after_the_plugin_takes_a_call(built: Built, tensorrt: str) -> None:
    if tensorrt not in built.tensorrt:
        pytest.skip("needs a real TensorRT of the headers' version: set TENSORRT_LIBRARY")
    code = """
plugin, known = load('plugin'), load('known').known
print(known(), plugin.onset_nms_register(), end=' ')
load('trt')
print(known(), load('plugin').onset_nms_register(), known())
"""
    assert built.run(tensorrt, code) == "-1 1 0 0 1"


@needs_headers
def test_a_second_copy_of_the_library_does_not_say_that_it_is_the_one(built: Built, tmp_path: Path) -> None:
    other = shutil.copy(built.plugin, tmp_path / "other.so")
    code = f"""
trt, plugin, other = load('trt'), load('plugin'), load({str(other)!r})
print(plugin.onset_nms_register(), other.onset_nms_register(), trt.creators_told_twice())
"""
    assert built.run("stand-in", code) == "0 2 0"


@needs_headers
@pytest.mark.parametrize("first", ["trt", "plugin"])
def test_loadlibrary_of_tensorrt_10_takes_it_in_either_order(built: Built, first: str) -> None:
    """It fails where a creator that it is given is known already; so does `trtexec --dynamicPlugins`."""
    if built.run("stand-in", "print(hasattr(load('plugin'), 'getCreators'))") == "False":
        pytest.skip("not before TensorRT 10")
    code = f"""
load({first!r})
trt, known = load('trt'), load('known')
loaded = known.load_library(paths['plugin'].encode())
print(loaded, known.known(), trt.creators_known(), trt.creators_told_twice())
"""
    assert built.run("stand-in", code) == "1 1 1 0"


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
