"""TensorRT: from an ONNX graph to a plan, and from a plan to something that runs.

The one module that imports `tensorrt`. It uses what 8.5 to 11.x share: tensors by name
(`set_tensor_address`, `execute_async_v3`), networks with an explicit batch. Knows nothing of bundles, slots
or the CUDA driver: it is given addresses and a stream.

What differs between the versions is in `_network` and `_set_precision`. Before 10, precision is a choice of
the builder, which is told layer by layer what must not be in half precision. From 10 on networks are strongly
typed: precision lies in the graph (`engine.precision`), and from 11 on there is no other way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine import native
from engine.errors import BundleError, ConfigError, EngineError, OnsetError

Precision = Literal["fp32", "fp16", "bf16"]
# What is being done, and how much of it is done, 0 to 1, where that is known.
Progress = Callable[[str, float | None], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a plan; `shape` with the batch axis, as it is run."""

    shape: tuple[int, ...]
    dtype: str


def version() -> str:
    """Of TensorRT. Raises ConfigError when there is none that can be used, and says what to install."""
    return str(_tensorrt().__version__)


def is_strongly_typed() -> bool:
    """Whether this TensorRT takes the precision from the graph."""
    return _major() >= 10


def load_plugin(library: Path) -> None:
    """Enter our NMS plugin into TensorRT's registry, for this process; again is no harm.

    Raises ConfigError when `library` is missing, may not be loaded (see `engine.native`), or was built for
    another TensorRT.
    """
    _tensorrt()  # loads the TensorRT whose registry it is to enter
    try:
        register = native.load(library).onset_nms_register
    except AttributeError:
        raise ConfigError(
            f"{library}: has the kernel alone, no plugin; build it with "
            "`TENSORRT_INCLUDE=FOLDER_OF_NvInfer.h make plugin`"
        ) from None
    if status := register():
        raise ConfigError(
            f"{library}: TensorRT {version()} does not take the plugin ({status}); build it with "
            "TENSORRT_INCLUDE naming the headers of that TensorRT, and load it from one file only"
        )


def build(
    graph: bytes, batch: int, precision: Precision, workspace: int, timing: bytes, report: Progress
) -> tuple[bytes, bytes]:
    """The plan of a serialised ONNX graph for `batch` rows, and the timing cache, grown.

    `graph` has a leading batch axis on every input and, where `is_strongly_typed`, the precision in it;
    `workspace` bytes at most are scratch memory; `timing` is what an earlier build returned, or empty. Where
    TensorRT refuses it, or the build fails with it, the build goes without, and a new one begins.
    Raises BundleError when TensorRT cannot read or build the graph.
    """
    trt = _tensorrt()
    logger = _logger(trt)
    with _in_our_words("the plan cannot be built"):
        builder = _made(trt.Builder, logger)
        report("reading the graph", None)
        network = _parsed(trt, builder, graph)
        for start in (timing, b""):
            before = logger.count
            config = _configured(trt, builder, network, batch, precision, workspace)
            times = config.create_timing_cache(start)
            if times is None or not config.set_timing_cache(times, False):
                log.warning("TensorRT refuses the timing cache, one of another GPU perhaps; a new one begins")
                config.set_timing_cache(config.create_timing_cache(b""), False)
                start = b""
            if hasattr(trt, "IProgressMonitor"):
                config.progress_monitor = _monitor(trt, report)
            report("building", None)
            plan = builder.build_serialized_network(network, config)
            if plan is not None:
                return bytes(plan), bytes(config.get_timing_cache().serialize())
            if not start:
                break
            log.warning("the build failed: %s; it is tried without the timing cache", logger.since(before))
    why = logger.since(before)
    raise BundleError(
        f"TensorRT {trt.__version__} cannot build the graph for {batch} streams: {why}; if it ran out of "
        "memory, give --workspace more or --streams less, and see that the GPU is free"
    )


class Plan:
    """A plan, ready to be run. Its addresses are bound once; each `enqueue` reads and writes there."""

    def __init__(self, content: bytes, batch: int) -> None:
        """Raises BundleError when the plan is of another TensorRT, GPU or batch, or damaged."""
        trt = _tensorrt()
        self._logger = _logger(trt)
        before = self._logger.count
        with _in_our_words("the plan cannot be opened"):
            # The engine needs the runtime that it came from for as long as it lives.
            self._runtime = _made(trt.Runtime, self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                why = self._logger.since(before)
                raise BundleError(f"TensorRT {trt.__version__} refuses the plan: {why}")
            self._context = self._engine.create_execution_context()
            if self._context is None:
                why = self._logger.since(before)
                raise EngineError(f"there is no memory on the GPU to run the plan in: {why}")
            self.tensors = self._tensors(trt, batch)

    def _tensors(self, trt: Any, batch: int) -> dict[str, Tensor]:
        before = self._logger.count
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        for name in names:
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = (batch, *tuple(self._engine.get_tensor_shape(name))[1:])
                if not self._context.set_input_shape(name, shape):
                    why = self._logger.since(before)
                    raise BundleError(f"the plan does not take {batch} streams: {why}")
        kinds = {trt.DataType.FLOAT: "float32", trt.DataType.INT32: "int32"}
        return {
            name: Tensor(
                tuple(self._context.get_tensor_shape(name)),
                kinds.get(kind := self._engine.get_tensor_dtype(name), str(kind)),
            )
            for name in names
        }

    def bind(self, name: str, address: int) -> None:
        """Where the tensor lies on the GPU, a multiple of 256."""
        before = self._logger.count
        with _in_our_words(f"`{name}` cannot be bound", EngineError):
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses an address for `{name}`: {self._logger.since(before)}")

    def enqueue(self, stream: int) -> None:
        """Run once, on a cudaStream_t. Raises EngineError when TensorRT refuses."""
        before = self._logger.count
        with _in_our_words("the step cannot be run", EngineError):
            if not self._context.execute_async_v3(stream):
                raise EngineError(f"TensorRT could not run the step: {self._logger.since(before)}")


def _tensorrt() -> Any:
    try:
        import tensorrt
    except Exception as problem:  # its own modules raise what they like where libraries are missing
        raise ConfigError(
            f"TensorRT cannot be used ({problem}); `onset doctor` says what to install on this machine"
        ) from None
    if not hasattr(tensorrt.IExecutionContext, "execute_async_v3"):
        raise ConfigError(f"TensorRT is {tensorrt.__version__}, expected 8.5 or newer")
    return tensorrt


def _major() -> int:
    return int(version().split(".")[0])


def _made(kind: Any, logger: Any) -> Any:
    """A Builder or Runtime. Where CUDA does not work, the bindings raise TypeError of a null pointer."""
    try:
        return kind(logger)
    except TypeError:
        raise ConfigError(
            "TensorRT finds no GPU that it can use; `onset doctor` says what is missing on this machine"
        ) from None


def _network(trt: Any) -> int:
    """The flags of a new network."""
    kinds = trt.NetworkDefinitionCreationFlag
    if _major() < 10:
        return 1 << int(kinds.EXPLICIT_BATCH)
    return 1 << int(kinds.STRONGLY_TYPED)


def _parsed(trt: Any, builder: Any, graph: bytes) -> Any:
    """The network of a graph. Raises BundleError where TensorRT cannot read it."""
    logger = _logger(trt)
    before = logger.count
    network = builder.create_network(_network(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        problems = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        why = "; ".join(problems) or logger.since(before)
        raise BundleError(
            f"TensorRT {trt.__version__} cannot read the graph: {why}; run this bundle on ONNX Runtime, or "
            "install a newer TensorRT"
        )
    return network


def _configured(
    trt: Any, builder: Any, network: Any, batch: int, precision: Precision, workspace: int
) -> Any:
    """How the network is to be built: for `batch` rows, in `workspace` bytes."""
    config = builder.create_builder_config()
    _set_precision(trt, network, config, precision)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    profile = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = (batch, *tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    return config


def _set_precision(trt: Any, network: Any, config: Any, precision: Precision) -> None:
    # fp32 is to mean that: TF32, which is on unless told otherwise, has ten bits where fp32 has 23.
    config.clear_flag(trt.BuilderFlag.TF32)
    if is_strongly_typed():
        return
    # Libraries of hundreds of MiB that 10 does without, too; TensorRT's own kernels are what is left.
    sources = trt.TacticSource
    off = (sources.CUBLAS, sources.CUBLAS_LT, sources.CUDNN)
    every = sum(1 << int(kind) for kind in sources.__members__.values())
    config.set_tactic_sources(every & ~sum(1 << int(kind) for kind in off))
    if precision == "fp32":
        return
    if precision == "bf16":
        raise ConfigError(f"TensorRT {trt.__version__} does not know bf16; use fp16, or TensorRT 10 or newer")
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    # The rule of `engine.precision`: products in half precision, all else in single.
    products = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION)
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if layer.type not in products and any(tensor.dtype == trt.DataType.FLOAT for tensor in outputs):
            layer.precision = trt.DataType.FLOAT


@contextmanager
def _in_our_words(what: str, kind: type[OnsetError] = BundleError) -> Iterator[None]:
    """Whatever the bindings raise becomes an error of `kind`, which a service that swaps bundles survives."""
    try:
        yield
    except OnsetError:
        raise
    except Exception as problem:
        name = type(problem).__name__
        raise kind(f"TensorRT {version()}: {what}: {name}: {problem}") from problem


@lru_cache(maxsize=1)
def _logger(trt: Any) -> Any:
    """TensorRT's messages go to `logging`; the newest error is kept for our own sentences.

    One for the process: TensorRT keeps the first that it is given, and no other ever hears a word.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.count, self.newest = 0, ""  # errors so far, and the last of them

        def since(self, count: int) -> str:
            """The newest error, if one came after so many."""
            return self.newest if self.count > count else "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.count, self.newest = self.count + 1, message
                log.error("TensorRT: %s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                log.warning("TensorRT: %s", message)
            else:
                log.debug("TensorRT: %s", message)

    return Logger()


def _monitor(trt: Any, report: Progress) -> Any:
    """Tells `report` how far the outermost phase of a build is. TensorRT calls it from threads of its own."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.steps = "", 1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phase, self.steps = phase_name, max(1, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.phase:
                try:
                    report("building", (step + 1) / self.steps)
                except Exception as problem:  # which in a thread of TensorRT's would end the process
                    log.warning("progress of the build cannot be told: %r", problem)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            return

    return Monitor()
