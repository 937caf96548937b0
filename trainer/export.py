"""From a trained run to a bundle: the step as an ONNX graph, and its manifest.

The step is traced to opset 16, the newest that TensorRT 8.5 reads whole: norms come out decomposed, and ONNX
Runtime fuses them again. States are flattened and joined into one tensor, so that a session gathers and
scatters a single array. Behind it, in a file of its own, comes an OnsetNMS node (`trainer.ending`).
"""

from __future__ import annotations

import hashlib
import io
import math
import platform
import warnings
from pathlib import Path

import onnx
import torch
import yaml
from torch import Tensor, nn

from engine.errors import BundleError, ConfigError
from engine.manifest import Decoding, Frame, Manifest, Training, write_bundle
from engine.manifest import Tensor as TensorSpec
from trainer.beats import BeatFront
from trainer.build import load_run
from trainer.config import Config
from trainer.detector import OUTPUTS, Detector
from trainer.ending import ending

OPSET = 16


class FlatStep(nn.Module):
    """`Detector.step` with its state as one tensor [B, S]; `parts` lists what S is made of."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.parts = {name: tuple(value.shape[1:]) for name, value in detector.zero_state(1).items()}

    @property
    def size(self) -> int:
        """S, the numbers in one stream's state."""
        return sum(math.prod(shape) for shape in self.parts.values())

    def forward(self, samples: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        """-> each of OUTPUTS [B, chunk, ...], then the next state [B, S]."""
        pieces = torch.split(state, [math.prod(shape) for shape in self.parts.values()], dim=1)
        old = {
            name: piece.reshape(-1, *shape)
            for (name, shape), piece in zip(self.parts.items(), pieces, strict=True)
        }
        outputs, new = self.detector.step(samples, mask, old)
        joined = torch.cat(
            [new[name].reshape(-1, math.prod(shape)) for name, shape in self.parts.items()], dim=1
        )
        return (*(outputs[name] for name in OUTPUTS), joined)


def receptive_field(detector: Detector) -> int:
    """Frames after which nothing of the past is left in the state, rounded up to whole periods.

    Each layer adds the context that it keeps, in frames of its level: what memory there is, added up.
    """
    shape = detector.shape.pyramid
    total = 1 + 2 * shape.embed + 2  # the front's last stage reaches one frame back, the heads two
    if isinstance(detector.front, BeatFront):
        total += -(-detector.front.reach // detector.hop)
    for level in range(shape.levels):
        blocks = shape.stem if level == 0 else 1
        total += blocks * (shape.window + 2 + 2) << level
        total += 1 << level  # the newest token of a level holds until the next one
    return -(-total // detector.period) * detector.period


def step_graph(detector: Detector) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """The serialised step graph (float32) and the states that its `state` is made of."""
    step = FlatStep(detector.float().eval())
    chunk = detector.chunk
    example = (
        torch.zeros(2, chunk * detector.hop, detector.shape.channels),
        torch.ones(2, chunk),
        torch.zeros(2, step.size),
    )
    names_in, names_out = ["samples", "mask", "state"], [*OUTPUTS, "next_state"]
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            step,
            example,
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=names_in,
            output_names=names_out,
            dynamic_axes={name: {0: "B"} for name in (*names_in, *names_out)},
        )
    graph = onnx.load_from_string(buffer.getvalue())
    with torch.no_grad():
        shapes = {name: value.shape[1:] for name, value in zip(names_out, step(*example), strict=True)}
    for output in graph.graph.output:
        # The tracer loses some dimensions that it knew; a session compares all of them with the manifest.
        for axis, size in enumerate(shapes[output.name], start=1):
            output.type.tensor_type.shape.dim[axis].dim_value = size
    states = tuple(TensorSpec(name=name, shape=shape) for name, shape in step.parts.items())
    return graph.SerializeToString(), states


def manifest_of(
    detector: Detector,
    graph: bytes,
    states: tuple[TensorSpec, ...],
    *,
    name: str,
    classes: tuple[str, ...],
    frame: Frame,
    decoding: Decoding,
    training: Training,
    lookahead: int = 0,
) -> tuple[Manifest, bytes]:
    """The manifest of a detector's step graph, and its ending, `nms.onnx`; empty if it can have none."""
    chunk, count = detector.chunk, detector.shape.classes
    nms, end = ending(decoding, frame, chunk, count) or (None, b"")
    manifest = Manifest(
        name=name,
        graph_sha256=hashlib.sha256(graph).hexdigest(),
        classes=classes,
        frame=frame,
        chunk=chunk,
        lookahead=lookahead,
        levels=detector.shape.pyramid.levels,
        window=detector.shape.pyramid.window,
        receptive_field=receptive_field(detector),
        inputs=(
            TensorSpec(name="samples", shape=(chunk * detector.hop, detector.shape.channels)),
            TensorSpec(name="mask", shape=(chunk,)),
        ),
        states=states,
        outputs=(
            TensorSpec(name="ongoing", shape=(chunk, count)),
            TensorSpec(name="start", shape=(chunk, count)),
            TensorSpec(name="start_offset", shape=(chunk, 1)),
            TensorSpec(name="end", shape=(chunk, count)),
            TensorSpec(name="end_offsets", shape=(chunk, 2)),
        ),
        decoding=decoding,
        nms=nms,
        training=training,
    )
    return manifest, end


def export(
    run: Path, output: Path, scores: dict[str, float] | None = None, chunk: int | None = None
) -> Manifest:
    """Export a run's averaged weights; `chunk`: frames a step, where they were trained with several.

    Raises BundleError when `output` holds something else, ConfigError for a chunk that was not trained with.
    """
    if output.exists() and (
        not output.is_dir() or (any(output.iterdir()) and not (output / "bundle.json").exists())
    ):
        raise BundleError(f"{output}: exists and is not a bundle; give another --output")
    config, detector, content = load_run(run)
    facts = content["data"]
    if chunk is not None:
        trained = sorted({config.model.chunk, *config.train.chunks})
        if chunk not in trained:
            raise ConfigError(
                f"{run}: was trained with chunks of {', '.join(map(str, trained))} frames, not of {chunk}; "
                "to choose when exporting, train with several (`train.chunks: [1, 2, 4]`)"
            )
        detector.chunk = chunk
    graph, states = step_graph(detector)
    manifest, end = manifest_of(
        detector,
        graph,
        states,
        name=config.name,
        classes=tuple(facts["classes"]),
        frame=Frame(
            sample_rate=facts["sample_rate"],
            hop=detector.hop,
            channels=facts["channels"],
            names=config.data.channels,
            units=config.data.units,
        ),
        decoding=config.decoding,
        training=Training(
            config=_portable(config),
            seed=config.seed,
            steps=content["step"],
            scores=scores or {},
            made_with={"python": platform.python_version(), "torch": torch.__version__},
            notice=config.data.notice,
        ),
        lookahead=config.model.lookahead,
    )
    write_bundle(output, manifest, graph, end)
    return manifest


def _portable(config: Config) -> str:
    """The configuration without the paths of the machine that trained it."""
    values = config.model_dump(mode="json", exclude={"data": {"annotations", "recordings"}})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
