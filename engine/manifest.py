"""The bundle: a folder with `bundle.json` (this schema), `model.onnx` (the step) and `nms.onnx`, its ending.

Reading a bundle checks everything that can be checked without running it: the version, the schema, the
graph's sha256. Nothing is ever unpickled. What the graph itself declares is compared with the manifest when
a session opens it.

The ending is an OnsetNMS node (`engine.nms_reference`), for those who want segments rather than moments. It
is a file of its own, since only TensorRT with our plugin can read it, while `model.onnx` runs anywhere. One
after the other they are one graph, since two protocol buffers in a row are their merger by definition:
`cat model.onnx nms.onnx > whole.onnx` is one for a parser in C++, and what `with_nms` returns.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.errors import BundleError
from engine.nms_reference import NmsSettings
from engine.schema import Strict, parse

VERSION = 1
MANIFEST = "bundle.json"
GRAPH = "model.onnx"
NMS = "nms.onnx"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_GRAPH_BYTES = 4 * 1024**3
MAX_NMS_BYTES = 64 * 1024
# What one stream may cost: its state and one step. A THUMOS14-sized pyramid takes a few MiB.
MAX_STREAM_BYTES = 256 * 1024**2

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Frame(Strict):
    """What one time step of the model is. Frame rate = sample_rate / hop."""

    sample_rate: float = Field(ge=1e-3, le=1e6, description="samples (or feature vectors) a second, Hz")
    hop: Positive = Field(description="samples a frame; 1 for feature streams")
    channels: Positive = Field(description="numbers in one sample")
    names: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop


class Tensor(Strict):
    """One input or output of the graph; `shape` leaves out the leading batch axis."""

    name: str
    shape: tuple[Positive, ...]
    dtype: Literal["float32", "int64"] = "float32"


class Decoding(Strict):
    """How moments become events. Scores are probabilities, times are seconds of the stream."""

    start_threshold: Probability = Field(0.2, description="a start is announced from this score on")
    end_threshold: Probability = Field(0.2, description="an ended action is announced from this score on")
    gate: Probability = Field(
        0.1,
        description="below this nothing is a candidate, whatever the thresholds: what is announced is never "
        "taken back, so a guess that were announced would stand in the way of the truth that follows it",
    )
    confident: Probability = Field(0.3, description="a candidate of this score is committed at once")
    hold: float = Field(
        0.8, ge=0, le=600, description="seconds that a lesser candidate waits for a better one"
    )
    usual: tuple[Annotated[float, Field(gt=0, le=86400)], ...] | None = Field(
        None, description="seconds that an action of each class lasts on average; training fills it in"
    )
    evidence: float = Field(
        0.03,
        gt=0,
        le=10,
        description="evidence that an action is over, as a share of what its class usually lasts",
    )
    nms_tiou: Probability = Field(0.1, description="largest overlap of two ended segments of one class")
    min_duration: float = Field(0.0, ge=0, le=86400, description="seconds; shorter segments are dropped")
    max_duration: float = Field(
        120.0,
        gt=0,
        le=86400,
        description="seconds; longer is ended. Training raises it to twice its longest, an hour at most",
    )

    def misfit(self, classes: int) -> str | None:
        """What of this does not fit a detector of so many classes, as a sentence; None if all does."""
        if self.usual is None or len(self.usual) == classes:
            return None
        return (
            f"`decoding.usual` has {len(self.usual)} durations, expected one for each of {classes} classes; "
            "leave the key out, and what the training data say is used"
        )


class Nms(Strict):
    """The OnsetNMS node that `nms.onnx` puts behind the step.

    Its scores are the logits `end` [B, chunk, K], less 10^4 where the frame is missing, its offsets
    `end_offsets`, its memory `memory` [B, 1 + 3 * remembered]; it gives `Kept._fields`, the last of them as
    `next_memory`. `settings` are the node's attributes, for the oracle: after a change of `decoding` the run
    has to be exported again.
    """

    settings: NmsSettings
    remembered: int = Field(ge=1, le=4096, description="emitted segments that a stream remembers")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="see `digest`")

    @staticmethod
    def digest(settings: NmsSettings, remembered: int, file: bytes) -> str:
        """What `sha256` has to be: of all three, so that none is changed alone."""
        return hashlib.sha256(file + f"{remembered} {settings.model_dump_json()}".encode()).hexdigest()

    @property
    def memory_size(self) -> int:
        """Numbers in one stream's memory."""
        return 1 + 3 * self.remembered


class Training(Strict):
    """How the bundle was made and what it scored: a record for people, read by nothing."""

    config: str = Field("", description="the training configuration, as YAML text")
    seed: int | None = None
    steps: int | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    made_with: dict[str, str] = Field(default_factory=dict)
    notice: str = Field("", description="origin, licence and citation of the training data")


class Manifest(Strict):
    """`bundle.json`."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    graph_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    classes: tuple[str, ...] = Field(min_length=1)
    frame: Frame
    chunk: Positive = Field(description="frames that one step takes; a power of two")
    lookahead: int = Field(
        0, ge=0, le=1024, description="frames by which `ongoing` is later than what it tells of"
    )
    levels: int = Field(gt=0, le=32)
    window: Positive = Field(description="tokens back that attention reaches, on each level")
    receptive_field: Positive = Field(description="frames; a fresh state fed these equals the old one")
    inputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...] = Field(
        description="what a stream's state is made of; the graph takes them flattened and joined so "
        "as `state` [B, S] and gives `next_state`"
    )
    outputs: tuple[Tensor, ...]
    decoding: Decoding = Decoding()
    nms: Nms | None = Field(None, description="the ending, where there is one")
    training: Training = Training()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"`chunk` is {self.chunk}, expected a power of two")
        if not all(name.isprintable() and 0 < len(name) <= 256 for name in self.classes):
            raise ValueError("`classes` has a name that is empty, too long or not printable")
        tensors = (*self.inputs, *self.states, *self.outputs)
        if any(tensor.dtype != "float32" for tensor in tensors):
            raise ValueError("a tensor is not float32, which is what sessions feed and read")
        if 4 * sum(math.prod(tensor.shape) for tensor in tensors) > MAX_STREAM_BYTES:
            raise ValueError(f"one stream would take more than {MAX_STREAM_BYTES} bytes")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("`classes` names a class twice")
        expected = {
            "samples": (self.chunk * self.frame.hop, self.frame.channels),
            "mask": (self.chunk,),
        }
        found = {tensor.name: tensor.shape for tensor in self.inputs}
        if found != expected:
            raise ValueError(f"`inputs` are {found}, expected {expected} for this frame and chunk")
        names = [tensor.name for tensor in (*self.inputs, *self.states, *self.outputs)]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is named twice")
        classes = len(self.classes)
        if misfit := self.decoding.misfit(classes):
            raise ValueError(misfit)
        wanted = {
            "ongoing": (self.chunk, classes),
            "start": (self.chunk, classes),
            "start_offset": (self.chunk, 1),
            "end": (self.chunk, classes),
            "end_offsets": (self.chunk, 2),
        }
        given = {tensor.name: tensor.shape for tensor in self.outputs}
        if given != wanted:
            raise ValueError(f"`outputs` are {given}, expected {wanted}")
        return self

    @property
    def id(self) -> str:
        """Which bundle spoke: its name and the first twelve digits of its graph's hash."""
        return f"{self.name}@{self.graph_sha256[:12]}"

    @property
    def period(self) -> int:
        """Frames after which the grids of all levels meet again; a state of zeros is right only there."""
        return max(self.chunk, 1 << (self.levels - 1))

    @property
    def chunk_samples(self) -> int:
        """Samples that one step takes."""
        return self.chunk * self.frame.hop


def read_bundle(folder: Path) -> tuple[Manifest, bytes]:
    """Read and verify a bundle; returns its manifest and the serialised graph.

    Raises BundleError when something is missing, damaged, or of a version that this Onset does not know.
    """
    path = folder / MANIFEST
    missing = f"{folder}: not a bundle, there is no {MANIFEST}; `onset export` makes one"
    try:
        values = json.loads(_read(path, MAX_MANIFEST_BYTES, missing))
    except (ValueError, RecursionError) as problem:
        raise BundleError(f"{path}: not readable as JSON: {problem}") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path}: found {type(values).__name__}, expected a JSON object")
    if values.get("version") != VERSION:
        raise BundleError(
            f"{path}: bundle version {values.get('version')!r:.40}, this Onset reads version {VERSION}; "
            "export the run again, or install the Onset that wrote it"
        )
    manifest = parse(Manifest, values, str(path), BundleError)
    graph_path = folder / GRAPH
    graph = _read(graph_path, MAX_GRAPH_BYTES)
    digest = hashlib.sha256(graph).hexdigest()
    if digest != manifest.graph_sha256:
        raise BundleError(
            f"{graph_path}: sha256 is {digest[:12]}…, the manifest says {manifest.graph_sha256[:12]}…; "
            "the graph was changed or damaged after export: export or copy the bundle again"
        )
    return manifest, graph


def with_nms(folder: Path, manifest: Manifest, graph: bytes) -> bytes:
    """The bundle's graph with its ending, see the module.

    Raises BundleError when there is none, or when it is not the one that the manifest tells of.
    """
    path = folder / NMS
    if manifest.nms is None:
        raise BundleError(f"{folder}: has no {NMS}, which gives segments; export the run again")
    ending = _read(path, MAX_NMS_BYTES)
    if Nms.digest(manifest.nms.settings, manifest.nms.remembered, ending) != manifest.nms.sha256:
        raise BundleError(
            f"{path}: is not the file that {MANIFEST} tells of, or what it says there was changed; "
            "export or copy the bundle again"
        )
    return graph + ending


def _read(path: Path, most: int, missing: str = "") -> bytes:
    """A file of a bundle, of up to `most` bytes. `missing`: what to say if there is none.

    Raises BundleError, whatever is in the way: the file may be on its way here or away.
    """
    try:
        # Without waiting for whoever writes into a pipe; a file is read the same.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(f"{path}: not readable: it is no file; export or copy the bundle again")
            if found.st_size > most:
                raise BundleError(f"{path}: larger than {most} bytes; this is no file of a bundle")
            return file.read(found.st_size)
    except (FileNotFoundError, NotADirectoryError) as problem:
        raise BundleError(missing or f"{path}: not readable: {problem.strerror}") from None
    except (OSError, MemoryError) as problem:
        why = (problem.strerror if isinstance(problem, OSError) else None) or type(problem).__name__
        raise BundleError(f"{path}: not readable: {why}") from None


def write_bundle(folder: Path, manifest: Manifest, graph: bytes, nms: bytes = b"") -> None:
    """Write a bundle; the manifest comes last, so that a folder with one is whole. `nms`: see `Nms`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / GRAPH).write_bytes(graph)
    (folder / NMS).write_bytes(nms) if nms else (folder / NMS).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
