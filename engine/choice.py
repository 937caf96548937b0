"""Which engine runs a bundle: the setting, and the session that it opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from engine.compiler import MAX_BATCH, WORKSPACE_MIB
from engine.schema import Strict
from engine.session import OnnxSession, Session
from engine.tensorrt_session import TensorRtSession


class EngineSettings(Strict):
    """ONNX Runtime on the CPU, or TensorRT on an NVIDIA GPU; all keys but `kind` are for the latter."""

    kind: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="of products; norms, softmax, sums and the state are fp32 always"
    )
    streams: tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...] = Field(
        default=(),
        description="batches to build plans for, default: 1, 2, 4, ... up to 64; with a single one, what "
        "a stream says does not depend, to the last bit, on how many run beside it",
    )
    cuda_graphs: bool = Field(default=True, description="replay a step as one graph; off: to look into it")
    workspace: int = Field(
        default=WORKSPACE_MIB, ge=16, le=1024**2, description="MiB of scratch memory where plans are built"
    )
    gpu: int = Field(default=0, ge=0, description="number of the GPU")


def open_session(bundle: Path, slots: int, threads: int | None, settings: EngineSettings) -> Session:
    """A session of the kind that `settings` names. `threads`: of ONNX Runtime.

    Raises BundleError for a bundle that cannot be run, ConfigError where this machine lacks what it takes.
    """
    if settings.kind == "onnxruntime":
        return OnnxSession(bundle, slots, threads)
    return TensorRtSession(
        bundle,
        slots,
        precision=settings.precision,
        streams=settings.streams,
        cuda_graphs=settings.cuda_graphs,
        workspace=settings.workspace,
        gpu=settings.gpu,
    )
