"""A fake of TensorRT of a given release: what `engine.tensorrt_api` calls, with the step on ONNX Runtime.

Its enums, and what each class has at all, are those of the real bindings (`bindings/`), so that a name that a
release lacks is lacking here. `test_fakes` holds the rest against the same lists. A plan is the graph with a
line before it. What an OnsetNMS node does, its oracle does.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from engine.nms_reference import NmsSettings, keep
from tests.engine.fake_driver import FakeDriver, listing

RELEASES = ("8.5.3.1", "10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
CUDA = "cuda-12.9.10"
_NUMBERS = {
    "FLOAT": onnx.TensorProto.FLOAT,
    "HALF": onnx.TensorProto.FLOAT16,
    "INT32": onnx.TensorProto.INT64,
}


class FakeTensorRt(types.ModuleType):
    """Stands in for the module `tensorrt`; what it built and refused is there to be looked at."""

    def __init__(self, driver: FakeDriver, release: str) -> None:
        super().__init__("tensorrt")
        self.driver, self.__version__ = driver, release
        self.built: list[Any] = []  # configurations
        self.ran: list[int] = []  # rows of each run
        self.break_build = ""
        self.logger: Any = None
        names = listing(f"tensorrt-{release}")
        for name, values in names["enums"].items():
            setattr(self, name, enum.IntEnum(name, values))
        for kind in KINDS:
            if kind.__name__ in names["classes"]:
                known = names["classes"][kind.__name__]
                body = {k: v for k, v in vars(kind).items() if k.startswith("_") or k in known}
                body = {k: v for k, v in body.items() if k not in ("__dict__", "__weakref__")}
                setattr(self, kind.__name__, type(kind.__name__, kind.__bases__, {**body, "_trt": self}))
        self.ILogger.Severity = enum.IntEnum("Severity", names["severity"])

    def take(self, logger: Any) -> None:
        """As the real one: the first of the process is kept, no other hears a word."""
        if self.logger is None:
            self.logger = logger
        elif logger is not self.logger:
            self.logger.log(self.ILogger.Severity.WARNING, "The logger differs from one already provided")

    def say(self, error: str) -> None:
        self.logger.log(self.ILogger.Severity.ERROR, error)


def install(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver, release: str = RELEASES[-1]) -> FakeTensorRt:
    """Both fakes in the place of the real modules, for one test."""
    trt = FakeTensorRt(driver, release)
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    modules = {
        "tensorrt": trt,
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": bindings,
        "cuda.bindings.driver": driver,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return trt


class ILogger:
    _trt: Any

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    _trt: Any

    def __init__(self) -> None:
        pass


class Builder:
    _trt: Any

    def __init__(self, logger: Any) -> None:
        if not self._trt.driver.devices:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._trt.take(logger)

    def create_network(self, flags: int) -> Any:
        wanted = "EXPLICIT_BATCH" if int(self._trt.__version__.split(".")[0]) < 10 else "STRONGLY_TYPED"
        assert flags == 1 << int(self._trt.NetworkDefinitionCreationFlag[wanted])
        return self._trt.INetworkDefinition()

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        if b"!" in config._cache._content:
            self._trt.say("a timing that no tactic has")
            return None
        if self._trt.break_build:
            self._trt.say(self._trt.break_build)
            return None
        assert len(config._shapes) == network.num_inputs, "an input without a profile"
        if (monitor := getattr(config, "progress_monitor", None)) is not None:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactics", "Building Engine", 1)
            assert monitor.step_complete("Tactics", 0)
            monitor.phase_finish("Tactics")
            assert monitor.step_complete("Building Engine", 1)
            monitor.phase_finish("Building Engine")
        config._network = network
        self._trt.built.append(config)
        config._cache._content += b"."
        head = {"release": self._trt.__version__, "shapes": config._shapes}
        return self._trt.IHostMemory(json.dumps(head).encode() + b"\n" + network._graph)


class IHostMemory(bytes):
    _trt: Any


class INetworkDefinition:
    _trt: Any
    _graph: bytes

    num_inputs = property(lambda self: len(self._model.graph.input))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index: int) -> Any:
        return self._trt.ITensor(self._model.graph.input[index])

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


class ITensor:
    _trt: Any

    def __init__(self, value: Any) -> None:
        self._value = value

    name = property(lambda self: self._value.name)
    shape = property(lambda self: [d.dim_value or -1 for d in self._value.type.tensor_type.shape.dim])

    @property
    def dtype(self) -> Any:
        number = self._value.type.tensor_type.elem_type
        names = [name for name, known in _NUMBERS.items() if known == number]
        return self._trt.DataType[names[0] if names else "BOOL"]


class ILayer:
    _trt: Any
    precision: Any = None
    type: Any = None

    def __init__(self, kind: str, outputs: list[Any]) -> None:
        names = {
            "MatMul": "MATRIX_MULTIPLY",
            "Conv": "CONVOLUTION",
            "Softmax": "SOFTMAX",
            "ReduceMean": "REDUCE",
        }
        self.kind, self._outputs = kind, outputs
        self.type = self._trt.LayerType[names.get(kind, "SHUFFLE")]

    num_outputs = property(lambda self: len(self._outputs))

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class OnnxParser:
    _trt: Any

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._problem = network, ""

    num_errors = property(lambda self: 1)

    def get_error(self, index: int) -> Any:
        return self._trt.ParserError(self._problem)

    def parse(self, model: bytes) -> bool:
        try:
            loaded = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model))
        except Exception as problem:
            self._problem = str(problem)
            return False
        values = {v.name: v for v in (*loaded.graph.value_info, *loaded.graph.output)}
        self._network._graph, self._network._model = model, loaded
        self._network._layers = [
            self._trt.ILayer(node.op_type, [self._trt.ITensor(values[n]) for n in node.output if n in values])
            for node in loaded.graph.node
        ]
        return True


class ParserError:
    _trt: Any

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class IBuilderConfig:
    _trt: Any
    progress_monitor: Any = None

    def __init__(self) -> None:
        self._flags = {self._trt.BuilderFlag.TF32}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sources: int | None = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        self._sources = tactic_sources
        return True

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool == self._trt.MemoryPoolType.WORKSPACE
        self._workspace = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self._shapes = profile._shapes
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        """One `.` for each build; with `?` it cannot be read, with a `!` builds fail, else another GPU's."""
        if b"?" in serialized_timing_cache:
            self._trt.say("Could not read timing cache")
            return None
        return self._trt.ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        fits = not cache._content.strip(b".!") and not ignore_mismatch
        if fits:
            self._cache = cache
        return fits

    def get_timing_cache(self) -> Any:
        return self._cache


class IOptimizationProfile:
    _trt: Any

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        assert min == opt == max
        self._shapes[input] = min


class ITimingCache:
    _trt: Any

    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> Any:
        return self._trt.IHostMemory(self._content)


class Runtime:
    _trt: Any

    def __init__(self, logger: Any) -> None:
        self._trt.take(logger)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        head, _, graph = serialized_engine.partition(b"\n")
        facts = json.loads(head)
        if facts["release"] != self._trt.__version__:
            self._trt.say("Version tag does not match")
            return None
        return self._trt.ICudaEngine(graph, {name: tuple(shape) for name, shape in facts["shapes"].items()})


def _split_off(model: onnx.ModelProto, node: onnx.NodeProto) -> tuple[list[str], list[str], NmsSettings]:
    """Take an OnsetNMS node and what only it reads or gives out of the model; returns what it was."""
    graph = model.graph
    inputs, outputs = list(node.input), list(node.output)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    method = "soft" if attributes.pop("soft") else "hard"
    for ended in [value for value in graph.output if value.name in outputs]:
        graph.output.remove(ended)
    for read in [value for value in graph.input if value.name == inputs[2]]:
        graph.input.remove(read)
    known = {value.name for value in graph.output}
    graph.output.extend(value for value in graph.value_info if value.name in set(inputs) - known)
    graph.node.remove(node)
    return inputs, outputs, NmsSettings(**attributes, method=method)


class ICudaEngine:
    _trt: Any

    def __init__(self, graph: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        model = onnx.load_model_from_string(graph)
        declared = {
            value.name: (
                [size.dim_value for size in value.type.tensor_type.shape.dim[1:]],
                onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
            )
            for value in (*model.graph.input, *model.graph.output)
        }
        self._inputs = [value.name for value in model.graph.input]
        self._nodes = declared
        self._nms = [_split_off(model, node) for node in model.graph.node if node.domain == "onset"]
        self._run = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._shapes = shapes

    num_io_tensors = property(lambda self: len(self._nodes))

    def get_tensor_name(self, index: int) -> str:
        return list(self._nodes)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode["INPUT" if name in self._inputs else "OUTPUT"]

    def get_tensor_shape(self, name: str) -> Any:
        return [-1, *self._nodes[name][0]]

    def get_tensor_dtype(self, name: str) -> Any:
        kinds = {"float32": "FLOAT", "int32": "INT32"}
        return self._trt.DataType[kinds.get(self._nodes[name][1].name, "BOOL")]

    def create_execution_context(self) -> Any:
        return self._trt.IExecutionContext(self)


class IExecutionContext:
    _trt: Any

    def __init__(self, engine: Any) -> None:
        self._engine, self._addresses = engine, {}
        self._batch, self._was_run = 0, False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._batch = shape[0]
        return self._engine._shapes[name] == shape

    def get_tensor_shape(self, name: str) -> Any:
        return [self._batch, *self._engine._nodes[name][0]]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, "TensorRT wants addresses aligned"
        self._addresses[name] = memory
        return name in self._engine._nodes

    def execute_async_v3(self, stream_handle: int) -> bool:
        driver = self._trt.driver
        assert stream_handle == 7
        if driver.capture is not None and not self._was_run:
            return False  # what it sets up at its first run cannot be captured
        self._was_run = True
        driver.enqueue(self._compute)
        return True

    def _compute(self) -> None:
        engine = self._engine
        self._trt.ran.append(self._batch)
        arrays = {
            name: self._trt.driver.array(
                self._addresses[name], self._batch * int(np.prod(shape)), dtype
            ).reshape(self._batch, *shape)
            for name, (shape, dtype) in engine._nodes.items()
        }
        fed = {node.name: arrays[node.name] for node in engine._run.get_inputs()}
        names = [node.name for node in engine._run.get_outputs()]
        values = arrays | (results := dict(zip(names, engine._run.run(names, fed), strict=True)))
        for inputs, outputs, settings in engine._nms:
            kept = keep(*(values[name] for name in inputs), settings)
            results |= dict(zip(outputs, kept, strict=True))
        for name in engine._nodes.keys() - set(engine._inputs):
            arrays[name][:] = results[name]


KINDS = (
    Builder, IBuilderConfig, ICudaEngine, IExecutionContext, IHostMemory, ILayer, ILogger, INetworkDefinition,
    IOptimizationProfile, IProgressMonitor, ITensor, ITimingCache, OnnxParser, ParserError, Runtime,
)  # fmt: skip
