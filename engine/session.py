"""Sessions: a step graph, and the states of many streams in slots.

A session owns the states; a caller holds `Slot`s, which are (index, generation) pairs: a slot that was closed
and given to another stream can never be used by its former owner. `Session` is the protocol that the runtime
knows; `OnnxSession` runs it on ONNX Runtime. Not thread-safe: one thread owns a session.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import BundleError, EngineError
from engine.manifest import Manifest, Tensor, read_bundle

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Slot:
    """The place of one stream's state; `generation` tells its owners apart."""

    index: int
    generation: int


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
    ) -> Mapping[str, FloatArray]:
        """Advance distinct slots by one chunk.

        `samples` [B, chunk * hop, C], `mask` [B, chunk] (False: the frame is missing, its samples are
        ignored). Returns each output of the manifest as [B, ...]. Raises EngineError on any misfit.
        """
        ...
