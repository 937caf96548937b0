"""From a bundle to TensorRT plans, through the cache: `onset compile`, and what a session lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from engine import tensorrt_api
from engine.errors import ConfigError
from engine.gpu import Gpu
from engine.manifest import read_bundle, with_nms
from engine.plans import PlanCache, PlanKey
from engine.precision import in_precision
from engine.tensorrt_api import Precision, Progress

MAX_BATCH = 4096
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
WORKSPACE_MIB = 1024


def compile_bundle(
    bundle: Path,
    precision: str = "fp32",
    streams: Sequence[int] = (),
    workspace: int = WORKSPACE_MIB,
    report: Progress = lambda doing, done: None,
    plugin: Path | None = None,
) -> list[Path]:
    """Build what the cache lacks; returns the files of all plans. `workspace`: MiB of scratch memory.

    With a `plugin`, the path of the library that `make plugin` builds, plans end in it, and give segments.
    Raises BundleError when TensorRT refuses the graph, ConfigError for what this machine cannot do, and where
    plans cannot be kept.
    """
    known, numbers = known_precision(precision), batches(streams or default_streams())
    manifest, graph = read_bundle(bundle)
    gpu = Gpu()
    if plugin is not None:
        graph = with_nms(bundle, manifest, graph)
        tensorrt_api.load_plugin(plugin)
    cache = PlanCache(bundle)
    keys = [key_of(graph, gpu, known, batch) for batch in numbers]
    for key in keys:
        if cache.read(key) is None:
            built = build(cache, key, gpu, graph, known, workspace, report)
            if problem := kept(cache, key, *built):
                raise ConfigError(f"{problem}; give this user the right to write there")
    return [cache.folder / key.file for key in keys]


def build(
    cache: PlanCache,
    key: PlanKey,
    gpu: Gpu,
    graph: bytes,
    precision: Precision,
    workspace: int,
    report: Progress,
) -> tuple[bytes, bytes]:
    """A plan and what its build measured, which starts from what the cache has of earlier ones."""
    if precision == "bf16" and gpu.capability < (8, 0):
        raise ConfigError(f"{gpu.name} ({gpu.architecture}) does not know bf16, sm_80 and newer do; use fp16")
    if precision != "fp32" and tensorrt_api.is_strongly_typed():
        graph = in_precision(graph, precision)
    return tensorrt_api.build(
        graph,
        key.batch,
        precision,
        workspace * 2**20,
        cache.timing(key),
        lambda doing, done: report(f"{key.batch} streams: {doing}", done),
    )


def kept(cache: PlanCache, key: PlanKey, plan: bytes, timing: bytes) -> str:
    """Keep what `build` returned. What hinders it, as a sentence; empty where it is kept."""
    try:
        cache.write(key, plan)
        cache.keep_timing(key, timing)
    except (OSError, MemoryError) as problem:
        return f"{cache.folder}: plans cannot be kept there: {problem or 'there is no memory for it'}"
    return ""


def key_of(graph: bytes, gpu: Gpu, precision: Precision, batch: int) -> PlanKey:
    """What a plan of this graph for this machine is kept under."""
    digest = hashlib.sha256(graph).hexdigest()
    return PlanKey(digest, tensorrt_api.version(), gpu.architecture, gpu.name, precision, batch)


def known_precision(precision: str) -> Precision:
    """Raises ConfigError for what cannot be had, and says why."""
    if precision == "int8":
        raise ConfigError(
            "int8 is not to be had: it takes the range of every activation, measured on recordings "
            "(calibration), which no bundle carries, and ranges that were guessed would give wrong scores "
            "without a word; use fp16"
        )
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}, expected {', '.join(PRECISIONS)}")
    return precision


def batches(streams: Sequence[int]) -> tuple[int, ...]:
    """Rows of each plan, ascending. Raises ConfigError for numbers that no step can have."""
    if any(not 1 <= number <= MAX_BATCH for number in streams):
        raise ConfigError(
            f"streams are {', '.join(map(str, streams))}, expected numbers from 1 to {MAX_BATCH}"
        )
    return tuple(sorted(set(streams)))


def default_streams(slots: int = 64) -> tuple[int, ...]:
    """1, 2, 4, ..., up to the first that holds `slots`, or 64: padding then wastes less than half a step."""
    return tuple(1 << power for power in range(1 + min(slots - 1, 63).bit_length()))
