"""A session on TensorRT: the states of all slots stay on the GPU, and a step is one CUDA graph.

For each batch in `streams` there is a plan. A step of n streams takes the smallest that holds n; rows to
spare work on a slot of nobody. More streams than the largest batch are stepped in several runs. A run is, on
one CUDA stream:

1. slot indices, samples and mask from pinned memory to the GPU, one copy;
2. gather: those rows of the table of states [slots + 1, S] to a dense `state` [n, S];
3. the plan, from `state` to `next_state`;
4. scatter: `next_state` back to its rows of the table;
5. outputs to pinned memory, one copy.

With a `plugin` the plan ends in it, our NMS, and what a stream emitted is a second table, moved alike.
Rows are moved by two kernels of twenty instructions (`rows.ptx`) rather than inside of the graph: ONNX has a
Gather, but its scatter returns a new table, so each step would copy the states of all slots to change a few.
As states are gathered, a plan reads and writes the same two buffers at every step. So there is no parity of
ping-pong buffers, and one CUDA graph for each batch is all that it takes.

Mind the last bits: plans of other batches sum in other orders. Where events must be the same byte for byte
whatever streams run beside, give ONE batch (`streams: [64]`), so that every step has one shape.
Not thread-safe; it may be used in another thread than it was made in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import compiler
from engine.errors import BundleError, EngineError
from engine.gpu import Bytes, Gpu
from engine.manifest import Manifest, read_bundle, with_nms
from engine.plans import PlanCache
from engine.session import (
    SEGMENTS,
    Array,
    FloatArray,
    Slot,
    Slots,
    check_step,
    compare,
    state_size,
    tensors_of,
    tensors_of_ending,
)
from engine.tensorrt_api import Plan, Precision, load_plugin

_ALIGNMENT = 256  # TensorRT's, of tensors

log = logging.getLogger(__name__)


class TensorRtSession:
    """The step graph on TensorRT, with the states of `slots` streams. See `engine.session.Session`."""

    def __init__(
        self,
        bundle: Path,
        slots: int = 16,
        *,
        precision: Precision = "fp32",
        streams: Sequence[int] = (),
        cuda_graphs: bool = True,
        workspace: int = compiler.WORKSPACE_MIB,
        gpu: int = 0,
        plugin: Path | None = None,
    ) -> None:
        """Open a bundle: build the plans that the cache lacks (minutes), and run each twice.

        `streams`: batches to have plans for, default: powers of two; `workspace`: MiB to build in;
        `plugin`: the path of the library that `make plugin` builds; with it, steps give segments, too.
        Raises BundleError when the bundle is damaged or TensorRT refuses it, ConfigError where this machine
        has no GPU, or no TensorRT, that can be used.
        """
        self._slots = Slots(slots)
        self._manifest, graph = read_bundle(bundle)
        self._gpu = Gpu(gpu)
        numbers = compiler.batches(streams or compiler.default_streams(slots))
        expected = tensors_of(self._manifest)
        self._outputs = {tensor.name: tensor.shape for tensor in self._manifest.outputs}
        sizes = {"state": state_size(self._manifest)}
        if plugin is not None:
            graph = with_nms(bundle, self._manifest, graph)
            load_plugin(plugin)
            assert self._manifest.nms is not None
            expected |= (ending := tensors_of_ending(self._manifest.nms))
            self._outputs |= {name: tuple(ending[name][0]) for name in SEGMENTS}
            sizes["memory"] = self._manifest.nms.memory_size
        self._states = [_State.on(self._gpu, name, size, slots, numbers[-1]) for name, size in sizes.items()]
        self._batches = []
        for number in numbers:
            plan = self._plan(bundle, graph, number, precision, workspace)
            found = {name: (list(t.shape[1:]), t.dtype) for name, t in plan.tensors.items()}
            compare(bundle, expected, found)
            inputs = {tensor.name: tensor.shape for tensor in self._manifest.inputs}
            batch = _Batch(number, plan, self._gpu, inputs, self._outputs, self._states, slots)
            batch.prepare(bundle, cuda_graphs)
            self._batches.append(batch)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return len(self._slots)

    @property
    def state_bytes(self) -> int:
        """Bytes of one stream's state: the same however long the stream runs."""
        return 4 * sum(state.size for state in self._states)

    def open(self) -> Slot:
        """See `Session.open`."""
        slot = self._slots.open()
        self._gpu.activate()
        for state in self._states:
            state.clear(self._gpu, slot.index)
        return slot

    def close(self, slot: Slot) -> None:
        """See `Session.close`."""
        self._slots.close(slot)

    def step(
        self, slots: Sequence[Slot], samples: FloatArray, mask: NDArray[np.bool_]
    ) -> Mapping[str, Array]:
        """See `Session.step`."""
        index = self._slots.indices(slots)
        check_step(self._manifest, len(index), samples, mask)
        self._gpu.activate()
        kinds = self._batches[0].kinds
        outputs: dict[str, Array] = {
            name: np.empty((len(index), *shape), kinds[name]) for name, shape in self._outputs.items()
        }
        largest = self._batches[-1].rows
        for first in range(0, len(index), largest):
            part = slice(first, first + largest)
            rows = len(index[part])
            batch = next(batch for batch in self._batches if batch.rows >= rows)
            batch.run(index[part], samples[part], mask[part], {n: o[part] for n, o in outputs.items()})
        return outputs

    def _plan(self, bundle: Path, graph: bytes, batch: int, precision: Precision, workspace: int) -> Plan:
        """From the cache, or built: also where TensorRT refuses what the cache has."""
        cache = PlanCache(bundle)
        key = compiler.key_of(graph, self._gpu, precision, batch)
        content = cache.read(key)
        if content is not None:
            try:
                return Plan(content, batch)
            except BundleError as problem:
                log.warning("%s: %s; it is built anew", cache.folder / key.file, problem)
        log.info("building the %s plan for %d streams, which takes minutes; `onset compile` does it ahead",
                 precision, batch)  # fmt: skip
        content, timing = compiler.build(
            cache, key, self._gpu, graph, precision, workspace, lambda doing, done: None
        )
        if hindrance := compiler.kept(cache, key, content, timing):
            log.warning("%s: each start will build them", hindrance)
        return Plan(content, batch)


class _State(NamedTuple):
    """Addresses of what streams keep: the table [slots + 1, size], and what a plan reads and writes of it.

    The table has one row more than slots: what the rows to spare of a batch read and write.
    """

    name: str
    size: int
    table: int
    old: int
    new: int

    @classmethod
    def on(cls, gpu: Gpu, name: str, size: int, slots: int, rows: int) -> _State:
        """`rows`: those of the largest batch."""
        return cls(name, size, *(gpu.allocate(4 * count * size) for count in (slots + 1, rows, rows)))

    def clear(self, gpu: Gpu, row: int) -> None:
        """Enqueue: zeros for a row of the table."""
        gpu.zero(self.table + 4 * row * self.size, 4 * self.size)


class _Batch:
    """One plan with its buffers: a run of at most `rows` streams."""

    def __init__(
        self,
        rows: int,
        plan: Plan,
        gpu: Gpu,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        states: Sequence[_State],
        nobody: int,
    ) -> None:
        """`inputs` and `outputs`: shapes without the batch axis; `nobody`: the spare slot."""
        self.rows, self.kinds = rows, {name: np.dtype(tensor.dtype) for name, tensor in plan.tensors.items()}
        self._plan, self._gpu, self._states, self._nobody = plan, gpu, states, nobody
        self._fed, self._feed, where = _block(
            gpu, {"index": (rows,)} | {name: (rows, *shape) for name, shape in inputs.items()}
        )
        self._fed_at = self._index = where.pop("index")
        self._heard, hear, heard = _block(gpu, {n: (rows, *shape) for n, shape in outputs.items()})
        self._hear: dict[str, Array] = {name: hear[name].view(self.kinds[name]) for name in outputs}
        self._heard_at = min(heard.values())
        kept = {state.name: state.old for state in states}
        kept |= {f"next_{state.name}": state.new for state in states}
        for name, address in (where | heard | kept).items():
            plan.bind(name, address)
        # No bound method of our own: in a cycle, the GPU's memory would wait for the garbage collector.
        self._graph: Callable[[], None] | None = None

    def prepare(self, bundle: Path, cuda_graph: bool) -> None:
        """Run once, from zeros to finite numbers, which CUDA graphs need before; then capture, and run that.

        Where the driver refuses the CUDA graph, steps are launched one by one, with a warning. Raises
        BundleError when the graph answers silence with NaN or Inf, EngineError where it does not run at all.
        """
        self._try_out()
        if cuda_graph:
            try:
                self._graph = self._gpu.captured(self._enqueue)
                self._try_out()
            except EngineError as problem:
                # As text: a record that somebody keeps would keep, through the traceback, the GPU's memory.
                why = str(problem)
                log.warning("%d streams: no CUDA graph: %s; steps are launched one by one", self.rows, why)
                self._graph = None
                self._try_out()
        if not all(np.isfinite(values).all() for values in self._hear.values()):
            raise BundleError(
                f"{bundle}: the graph answers NaN or Inf to silence; in fp16 its activations may be too "
                "large: use fp32 or bf16, or else its training has diverged"
            )

    def _try_out(self) -> None:
        """A step of nobody."""
        self._feed["index"].view(np.int32)[:] = self._nobody
        self._run()
        for state in self._states:
            state.clear(self._gpu, self._nobody)

    def run(
        self,
        index: list[int],
        samples: FloatArray,
        mask: NDArray[np.bool_],
        outputs: Mapping[str, Array],
    ) -> None:
        """One step of the slots at `index`; `outputs` are written."""
        count = len(index)
        slots = self._feed["index"].view(np.int32)
        slots[:count], slots[count:] = index, self._nobody
        for name, values in (("samples", samples), ("mask", mask)):
            self._feed[name][:count], self._feed[name][count:] = values, 0.0
        self._run()
        for name, values in outputs.items():
            values[:] = self._hear[name][:count]

    def _run(self) -> None:
        (self._graph or self._enqueue)()
        self._gpu.wait()

    def _enqueue(self) -> None:
        gpu = self._gpu
        gpu.upload(self._fed_at, self._fed)
        for state in self._states:
            gpu.gather(state.old, state.table, self._index, self.rows, state.size)
        self._plan.enqueue(gpu.stream)
        for state in self._states:
            gpu.scatter(state.new, state.table, self._index, self.rows, state.size)
        gpu.download(self._heard, self._heard_at)


def _block(
    gpu: Gpu, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Bytes, dict[str, FloatArray], dict[str, int]]:
    """Pinned memory for several arrays of 32-bit numbers, and as much on the GPU.

    Returns the pinned bytes, each array in them, and each one's address on the GPU.
    """
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    padded = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
    pinned = gpu.pin(sum(padded.values()))
    address = gpu.allocate(pinned.nbytes)
    pinned[:] = 0
    arrays, where, place = {}, {}, 0
    for name, shape in shapes.items():
        arrays[name] = pinned[place : place + sizes[name]].view(np.float32).reshape(shape)
        where[name] = address + place
        place += padded[name]
    return pinned, arrays, where
