"""What of this machine can run a bundle, and what is missing: the findings of `onset doctor`.

Each finding says what is there, or what is not and what to do about it on a machine of this kind. It looks
rather than to believe what is written somewhere: the driver is asked for a GPU, TensorRT is imported, plans
are read. Nothing is installed, built or changed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from engine import compiler, native, tensorrt_api
from engine.errors import BundleError, ConfigError, OnsetError
from engine.gpu import Gpu
from engine.manifest import read_bundle, with_nms
from engine.plans import PlanCache

_RELEASE = Path("/etc/nv_tegra_release")
# Jetson Linux, by its first number: the JetPack that brings it.
_JETPACKS = {35: "5.1", 36: "6", 38: "7"}


@dataclass(frozen=True)
class Finding:
    """`good`: None where it is not needed by everybody, and not there."""

    what: str
    good: bool | None
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and which engines can run a bundle here."""

    findings: tuple[Finding, ...]
    engines: tuple[str, ...]


def machine(release: Path = _RELEASE) -> str:
    """`JetPack 6`, for a Jetson; else the processor, `x86_64`. `release`: the file that Jetson Linux has."""
    try:
        found = re.match(r"# R(\d+)", release.read_text(encoding="utf-8", errors="replace")[:1000])
    except OSError:
        return platform.machine()
    number = int(found[1]) if found else 0
    return f"JetPack {_JETPACKS[number]}" if number in _JETPACKS else f"Jetson Linux {number or 'unknown'}"


def diagnose(bundle: Path | None, plugin: Path | None = None) -> Diagnosis:
    """Look at this machine, at a bundle's plans and at our TensorRT `plugin` where they are given.

    Raises BundleError when there is a bundle that cannot be read.
    """
    here = machine()
    onnxruntime = _onnxruntime()
    graphs, broken = _graphs(bundle) if bundle is not None else ({}, [])
    gpu, card = _gpu(here)
    tensorrt = _tensorrt(here)
    engines = ["onnxruntime"] if onnxruntime.good else []
    if gpu.good and tensorrt.good:
        engines.append("tensorrt")
    about = Finding("machine", True, f"{here}, Python {platform.python_version()}")
    findings = [about, *_search_paths(), onnxruntime, gpu, tensorrt, _plugin(plugin, tensorrt), *broken]
    if bundle is not None:
        findings.append(_plans(bundle, graphs, card if tensorrt.good else None))
    return Diagnosis(tuple(findings), tuple(engines))


def _onnxruntime() -> Finding:
    try:
        import onnxruntime
    except Exception as problem:  # a broken installation may raise anything
        return Finding("onnxruntime", None, str(problem), "to run on the CPU: pip install '.[cpu]'")
    return Finding("onnxruntime", True, str(onnxruntime.__version__))


def _gpu(here: str) -> tuple[Finding, Gpu | None]:
    try:
        gpu = Gpu()
        found = f"{gpu.name} ({gpu.architecture}), driver for CUDA {gpu.driver_version}"
        is_old = gpu.capability < (7, 5)
    except OnsetError as problem:
        return Finding("GPU", None, str(problem).split(";")[0], _gpu_advice(here)), None
    if is_old:
        return Finding("GPU", None, found, "too old: sm_75 (Turing) or newer is needed; run on the CPU"), None
    return Finding("GPU", True, found), gpu


def _gpu_advice(here: str) -> str:
    bindings = "" if _has("cuda-bindings") else "pip install cuda-bindings; "
    if here.startswith("Jet"):
        return (
            f"{bindings}the driver is part of JetPack: in a container, start it with `--runtime nvidia`; "
            "on the board itself, flash JetPack anew"
        )
    if _has_driver():
        return (
            f"{bindings}there is a driver, so see that `nvidia-smi` lists the GPU, and that it is of the "
            "same version as the kernel's module (after an update: restart)"
        )
    return (
        f"{bindings}to use an NVIDIA GPU: install its driver (Debian and Ubuntu: `apt install "
        "nvidia-driver`, or nvidia.com/drivers); in a container, install the NVIDIA Container Toolkit and "
        "start it with `--gpus all`"
    )


def _tensorrt(here: str) -> Finding:
    try:
        return Finding("TensorRT", True, tensorrt_api.version())
    except OnsetError as problem:
        return Finding("TensorRT", None, str(problem).split(";")[0], _tensorrt_advice(here))


def _tensorrt_advice(here: str) -> str:
    if here == "JetPack 5.1":
        return (
            "JetPack 5.1 has TensorRT 8.5 for Python 3.8 only, which Onset does not run on: move to "
            "JetPack 6 or 7, or run on the CPU"
        )
    if here.startswith("Jet"):
        return (
            "it comes with JetPack: `sudo apt install tensorrt python3-libnvinfer`, then a virtual "
            "environment that sees it: `python3 -m venv --system-site-packages .venv`. pip's TensorRT is not "
            "for Jetsons"
        )
    if here != "x86_64":
        return f"on {here}, install NVIDIA's TensorRT packages for your distribution (nvidia.com/tensorrt)"
    return "pip install '.[tensorrt]' (some GiB), or NVIDIA's container nvcr.io/nvidia/tensorrt"


def _plugin(path: Path | None, tensorrt: Finding) -> Finding:
    """Nothing is loaded but what was named, and that is looked at before."""
    if path is None:
        advice = (
            "optional: TENSORRT_INCLUDE=FOLDER_OF_NvInfer.h make plugin, then --plugin build/libonset_nms.so"
        )
        return Finding("NMS plugin", None, "no --plugin was given", advice)
    try:
        if tensorrt.good:
            tensorrt_api.load_plugin(path)
        else:
            native.load(path)
    except ConfigError as problem:
        found, _, advice = str(problem).partition("; ")
        return Finding("NMS plugin", False, found, advice)
    return Finding("NMS plugin", True, f"{path}" if tensorrt.good else f"{path}, with no TensorRT to enter")


def _search_paths() -> list[Finding]:
    """Whether libraries and modules are looked for where one happens to stand."""
    findings = []
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        value = os.environ.get(name, "")
        if value and any(not os.path.isabs(place) for place in value.split(os.pathsep)):
            found = f"{value!r} has an empty or relative part: code is loaded from the working directory"
            findings.append(Finding(name, False, found, f"give {name} absolute paths, and no `:` at an end"))
    return findings


def _graphs(bundle: Path) -> tuple[dict[str, bytes], list[Finding]]:
    """What plans of a bundle may be of, by a word or two to tell them apart; and how its ending is broken."""
    manifest, graph = read_bundle(bundle)
    if manifest.nms is None:
        return {"": graph}, []
    try:
        return {"": graph, " with segments": with_nms(bundle, manifest, graph)}, []
    except BundleError as problem:  # it runs all the same, but gives no segments
        found, _, advice = str(problem).partition("; ")
        return {"": graph}, [Finding("segments", False, found, advice)]


def _plans(bundle: Path, graphs: dict[str, bytes], gpu: Gpu | None) -> Finding:
    cache = PlanCache(bundle)
    files = cache.files()
    there = f"{len(files)} in {cache.folder}"
    if gpu is None:
        return Finding("plans", None, there, "they need a GPU and TensorRT, see above")
    keys = {kind: compiler.key_of(graph, gpu, "fp32", 1) for kind, graph in graphs.items()}
    fitting = [
        f"{precision} for {batch} streams{kind}"
        for kind, key in keys.items()
        for precision in compiler.PRECISIONS
        for batch in range(1, compiler.MAX_BATCH + 1)
        if (that := replace(key, precision=precision, batch=batch)).file in files
        and cache.read(that) is not None
    ]
    if not fitting:
        advice = f"onset compile {bundle}; else the first start builds them"
        return Finding("plans", None, f"{there}, none for this machine and this graph", advice)
    return Finding("plans", True, ", ".join(fitting))


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
