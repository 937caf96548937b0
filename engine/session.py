"""Sessions: a step graph, and the states of many streams in slots.

A session owns the states; a caller holds `Slot`s, which are (index, generation) pairs: a slot that was closed
and given to another stream can never be used by its former owner. `Session` is the protocol that the runtime
knows; `OnnxSession` runs it on ONNX Runtime. Not thread-safe: one thread owns a session.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleError, EngineError
from engine.manifest import Manifest, Nms, read_bundle, with_nms
from engine.nms_reference import Kept, keep, logits_there

FloatArray = NDArray[np.float32]
Array = NDArray[Any]  # float32; the labels and numbers of segments are int32
SEGMENTS = Kept._fields[:-1]


@dataclass(frozen=True)
class Slot:
    """The place of one stream's state; `generation` tells its owners apart."""

    index: int
    generation: int


class Slots:
    """Which of `count` slots are taken, and by whom."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise EngineError(f"a session needs at least one slot, {count} were asked for")
        self._generations = [0] * count
        self._is_open = [False] * count
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._is_open)

    def open(self) -> Slot:
        """A slot that nobody holds. Raises EngineError when there is none."""
        if not self._free:
            raise EngineError(f"all {len(self)} slots are taken; close one, or open the session with more")
        index = self._free.pop()
        self._generations[index] += 1
        self._is_open[index] = True
        return Slot(index, self._generations[index])

    def close(self, slot: Slot) -> None:
        """Take a slot back. Raises EngineError when it is not the caller's any more."""
        self._check(slot)
        self._is_open[slot.index] = False
        self._free.append(slot.index)

    def indices(self, slots: Sequence[Slot]) -> list[int]:
        """The places of slots that step together. Raises EngineError for a stale one, or one given twice."""
        for slot in slots:
            self._check(slot)
        index = [slot.index for slot in slots]
        if len(set(index)) != len(index):
            raise EngineError("a stream takes part twice in one step; give each slot once")
        return index

    def _check(self, slot: Slot) -> None:
        if not (0 <= slot.index < len(self)) or (
            not self._is_open[slot.index] or self._generations[slot.index] != slot.generation
        ):
            raise EngineError(
                f"slot {slot.index} (generation {slot.generation}) is not open; its stream has ended"
            )


class Session(Protocol):
    """What the runtime needs of an engine."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def capacity(self) -> int:
        """Slots in all."""
        ...

    def open(self) -> Slot:
        """A free slot with a zero state. Raises EngineError when there is none."""
        ...

    def close(self, slot: Slot) -> None:
        """Give a slot back. Raises EngineError when it is not the caller's any more."""
        ...

    def step(
        self, slots: Sequence[Slot], samples: FloatArray, mask: NDArray[np.bool_]
    ) -> Mapping[str, Array]:
        """Advance distinct slots by one chunk.

        `samples` [B, chunk * hop, C], `mask` [B, chunk] (False: the frame is missing, its samples are
        ignored). Returns each output of the manifest as [B, ...]; from a session that was opened for
        segments also those of `SEGMENTS`, see `engine.nms_reference`: their times are samples from the
        chunk's end. Raises EngineError on any misfit.
        """
        ...


class OnnxSession:
    """The step graph on ONNX Runtime (CPU), with the states of `slots` streams.

    The states of all slots lie in one array [slots, S], as the graph takes them: one gather and one scatter a
    step. A step runs at least `MIN_ROWS` rows, see there.
    """

    # ONNX Runtime multiplies a single row with another kernel (matrix by vector) than several, and sums in
    # another order. With two rows or more every row's arithmetic is the same whatever its companions and its
    # place, which tests/engine/test_session.py proves bit for bit; so a lonely stream gets an idle companion.
    MIN_ROWS = 2

    def __init__(
        self, bundle: Path, slots: int = 16, threads: int | None = None, segments: bool = False
    ) -> None:
        """Open a bundle. `threads`: those of one step; default: all cores. `segments`: steps give them, too.

        Raises BundleError when the bundle is damaged or its graph is not what its manifest says.
        """
        try:
            import onnxruntime
        except ImportError:
            raise BundleError(
                "onnxruntime is not installed, and nothing else here can run a bundle; "
                "install it with `pip install '.[cpu]'`"
            ) from None
        self._slots = Slots(slots)
        self._manifest, graph = read_bundle(bundle)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin between steps of a fraction of a millisecond would burn the cores for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A graph may name other files as its weights, for which no hash vouches; to one given as bytes,
        # ONNX Runtime would bring them from where the process happens to stand.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self._run = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as problem:
            raise BundleError(f"{bundle}: ONNX Runtime refuses the graph: {problem}") from None
        compare(bundle, tensors_of(self._manifest), _declared(self._run))
        _try(bundle, self._manifest, self._run)
        self._outputs = [tensor.name for tensor in self._manifest.outputs]
        self._nms: Nms | None = None
        if segments:
            with_nms(bundle, self._manifest, graph)  # refuses settings that are not the file's
            self._nms = self._manifest.nms
        self._memories: FloatArray = np.zeros((slots, self._nms.memory_size if self._nms else 0), np.float32)
        self._states: FloatArray = np.zeros((slots, state_size(self._manifest)), np.float32)

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
        return int(self._states[0].nbytes + self._memories[0].nbytes)

    def open(self) -> Slot:
        """See `Session.open`."""
        slot = self._slots.open()
        self._states[slot.index] = self._memories[slot.index] = 0.0
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
        rows = len(index)
        spare = max(0, self.MIN_ROWS - rows)
        feed = {
            "samples": np.ascontiguousarray(samples, dtype=np.float32),
            "mask": mask.astype(np.float32),
            "state": self._states[index],
        }
        if spare:
            feed = {name: np.pad(a, [(0, spare)] + [(0, 0)] * (a.ndim - 1)) for name, a in feed.items()}
        *outputs, state = self._run.run([*self._outputs, "next_state"], feed)
        self._states[index] = state[:rows]
        moments: dict[str, Array] = {n: v[:rows] for n, v in zip(self._outputs, outputs, strict=True)}
        if self._nms is None:
            return moments
        scores = logits_there(moments["end"], mask)
        kept = keep(scores, moments["end_offsets"], self._memories[index], self._nms.settings)
        self._memories[index] = kept.memory
        return moments | dict(zip(SEGMENTS, kept, strict=False))


def state_size(manifest: Manifest) -> int:
    """S, the numbers in one stream's state."""
    return sum(math.prod(tensor.shape) for tensor in manifest.states)


def check_step(manifest: Manifest, rows: int, samples: FloatArray, mask: NDArray[np.bool_]) -> None:
    """Raise EngineError unless `samples` and `mask` have the shapes that a step of `rows` slots takes."""
    expected = (rows, manifest.chunk_samples, manifest.frame.channels)
    if rows == 0 or samples.shape != expected or mask.shape != (rows, manifest.chunk):
        raise EngineError(
            f"a step of {rows} slots got samples {list(samples.shape)} and mask {list(mask.shape)}, "
            f"expected {list(expected)} and {[rows, manifest.chunk]} with at least one slot"
        )


def tensors_of(manifest: Manifest) -> dict[str, tuple[list[int], str]]:
    """Every tensor of the step graph without its ending: its shape without the batch axis, and its type."""
    size = state_size(manifest)
    tensors = {t.name: (list(t.shape), str(t.dtype)) for t in (*manifest.inputs, *manifest.outputs)}
    return tensors | {name: ([size], "float32") for name in ("state", "next_state")}


def tensors_of_ending(nms: Nms) -> dict[str, tuple[list[int], str]]:
    """As `tensors_of`: what the ending adds."""
    most, memory = nms.settings.max_segments, ([nms.memory_size], "float32")
    return {
        "memory": memory,
        "segments": ([most, 2], "float32"),
        "scores": ([most], "float32"),
        "labels": ([most], "int32"),
        "number": ([], "int32"),
        "next_memory": memory,
    }


def compare(
    bundle: Path, expected: Mapping[str, tuple[list[int], str]], found: Mapping[str, tuple[list[int], str]]
) -> None:
    """Raise BundleError unless the graph's inputs and outputs are those of the manifest, the `expected`."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise BundleError(
                f"{bundle}: tensor `{name}` is {found.get(name, 'missing')} in the graph and "
                f"{expected.get(name, 'missing')} in the manifest; export the bundle again"
            )


def _declared(run: Any) -> dict[str, tuple[list[int], str]]:
    types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    return {
        node.name: (list(node.shape[1:]), types.get(node.type, node.type))
        for node in (*run.get_inputs(), *run.get_outputs())
    }


def _try(bundle: Path, manifest: Manifest, run: Any) -> None:
    """Raise BundleError unless the graph steps, at two batch sizes, from a zero state to finite numbers."""
    names = [tensor.name for tensor in manifest.outputs]
    size = state_size(manifest)
    for rows in (2, 3):
        feed = {tensor.name: np.zeros((rows, *tensor.shape), np.float32) for tensor in manifest.inputs}
        feed["state"] = np.zeros((rows, size), np.float32)
        try:
            results = run.run([*names, "next_state"], feed)
        except Exception as problem:
            raise BundleError(f"{bundle}: the graph fails with {rows} streams: {problem}") from None
        shapes = [(rows, *tensor.shape) for tensor in manifest.outputs]
        if [result.shape for result in results] != [*shapes, (rows, size)]:
            raise BundleError(
                f"{bundle}: the graph answers in other shapes than it declares; export it again"
            )
        if not all(np.isfinite(result).all() for result in results):
            raise BundleError(f"{bundle}: the graph answers NaN or Inf to silence; its training has diverged")
