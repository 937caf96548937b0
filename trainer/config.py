"""The training configuration: one YAML file, every key of which has a default that is meant to work.

Paths are relative to the file's folder. Times are in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.manifest import Decoding, Positive
from engine.schema import Strict, as_tuple, load_config

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class FeatureGrid(Strict):
    """Feature vectors of a video: when they come, and what each stands for (ActionFormer's data sets)."""

    stride: float = Field(gt=0, description="video frames from one vector to the next")
    covers: float = Field(gt=0, description="video frames that one vector is computed from")
    fps: float | None = Field(None, gt=0, description="of the videos, Hz; default: each one's own")


class DataConfig(Strict):
    """Where the recordings are, and which of them train."""

    annotations: Path
    recordings: Annotated[tuple[Path, ...], BeforeValidator(as_tuple)] = Field(
        min_length=1,
        description="the folder of NAME.npy, NAME.npz or NAME.csv; of several, channels are joined",
    )
    prefix: str = Field("", description="what the files have before NAME")
    features: FeatureGrid | None = None
    skip_missing: bool = Field(
        False, description="leave out recordings without a file; they count as missed where scored"
    )
    train: tuple[str, ...] = ("train",)
    test: tuple[str, ...] = ("test",)
    holdout: tuple[str, ...] = Field(
        (), description="subjects or recordings kept out of training, to choose with"
    )
    sample_rate: float | None = Field(
        None, gt=0, description="Hz; default: the annotations' fps. Of features: vectors a second in a stream"
    )
    units: tuple[str, ...] | None = None
    channels: tuple[str, ...] | None = None
    notice: str = Field("", description="origin, licence and citation, carried into the bundle")


class ModelConfig(Strict):
    """The detector. `window` in tokens of a level, `chunk` in frames."""

    context: Literal["causal", "full"] = Field(
        "causal",
        description="full: the same pyramid, which sees each recording whole, with ActionFormer's heads",
    )
    front: Literal["signal", "features", "beats"] = Field(
        "signal", description="beats: intervals of a nearly periodic signal (ECG, pulse), for its rhythm"
    )
    frame_rate: float = Field(5.0, gt=0, description="frames a second aimed at; decides the hop of a signal")
    hop: Positive | None = Field(None, description="samples a frame; default: sample_rate / frame_rate")
    chunk: Positive = 2
    lookahead: int = Field(
        0,
        ge=0,
        le=1024,
        description="frames to wait for before a frame is answered: later, and surer by what they show",
    )
    width: Positive = 96
    stem_width: Positive = 48
    beats: int = Field(
        16, ge=1, le=64, description="`front: beats`: how many of the last each frame is told of"
    )
    heads: Positive = 4
    levels: Positive = 6
    window: Positive = 16
    embed: int = Field(2, ge=0)
    stem: int = Field(2, ge=0)
    expansion: Positive = 2
    relative: bool = True
    dropout: Rate = 0.1
    drop_path: Rate = 0.1

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.chunk & (self.chunk - 1):
            raise ValueError(
                f"`chunk` is {self.chunk}, expected a power of two, so that strides align with it"
            )
        if self.context == "full" and self.lookahead:
            raise ValueError(
                "`lookahead` belongs to `context: causal`; in full context the future is seen whole"
            )
        if self.width % self.heads:
            raise ValueError(f"`width` {self.width} is not a multiple of `heads` {self.heads}")
        if self.front == "features" and self.hop not in (None, 1):
            raise ValueError("`hop` belongs to samples; a feature stream has one vector a frame")
        return self


class AugmentConfig(Strict):
    """What happens to a training crop of a signal, as another person or placement would; 0 turns a part off.

    The defaults are for sensors that the next person wears otherwise: see `trainer/README.md` for what they
    are worth. Features of videos want them off.
    """

    noise: float = Field(0.05, ge=0, description="standard deviation, in units of the channel's own")
    scale: float = Field(0.2, ge=0, description="standard deviation of a gain for each channel")
    shift: float = Field(
        0.2, ge=0, description="standard deviation of an offset, in units of the channel's own"
    )
    rotate: float = Field(20.0, ge=0, description="degrees; random rotation of each triad of axes")
    triads: Literal["auto"] | tuple[tuple[int, int, int], ...] = Field(
        "auto",
        description="channels that are x, y, z of one sensor; auto: by their names (acc_x, acc_y, acc_z)",
    )
    warp: float = Field(
        0.15, ge=0, description="standard deviation of the log of a piece's speed; 0.7 to 1.4 times at most"
    )
    channel_drop: Rate = Field(
        0.3,
        description="chance that a triad, or a channel of no triad, rests at its mean; never all channels",
    )
    splice: Rate = Field(0.5, description="chance that a crop is joined from pieces of several recordings")
    balance: Rate = Field(
        0.0, description="chance that a piece is laid over an action, each class as often as every other"
    )
    drop: Rate = Field(0.1, description="chance that a stretch of a crop is missing, as after a lost message")


class TrainConfig(Strict):
    """Optimisation."""

    steps: Positive = 3000
    batch: Positive = 16
    crop: float = Field(60.0, gt=0, description="seconds of a training crop")
    chunks: tuple[Positive, ...] = Field(
        (),
        description="frames a step, one drawn for each step of training, so that `onset export --chunk` can "
        "choose; default: `model.chunk` alone",
    )
    reach: float = Field(2.0, gt=0, description="seconds for which a start or an end counts as news")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: int = Field(200, ge=0, description="steps")
    clip: float = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    ema: float = Field(0.999, ge=0, lt=1)
    ongoing_weight: float = Field(1.0, ge=0)
    start_weight: float = Field(1.0, ge=0)
    end_weight: float = Field(1.0, ge=0)
    offset_weight: float = Field(0.5, ge=0)
    checkpoint_every: Positive = Field(500, description="steps")


class Config(Strict):
    """A training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    decoding: Decoding = Decoding()
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if self.model.context == "full" and self.train.chunks:
            raise ValueError("`train.chunks` belongs to `context: causal`; in full context nothing is cut")
        if self.train.chunks and max(self.train.chunks) != self.model.chunk:
            raise ValueError(
                f"the largest of `train.chunks` is {max(self.train.chunks)}, and `model.chunk`, which is "
                f"exported unless another is chosen, {self.model.chunk}; expected the same"
            )
        for chunk in self.train.chunks:
            if chunk & (chunk - 1):
                raise ValueError(f"`train.chunks` has {chunk}, expected powers of two")
        return self


def read_config(path: Path) -> Config:
    """Read a training configuration; its paths become relative to the working directory."""
    config = load_config(Config, path)
    folder = path.parent
    data = config.data.model_copy(
        update={
            "annotations": folder / config.data.annotations.expanduser(),
            "recordings": tuple(folder / place.expanduser() for place in config.data.recordings),
        }
    )
    return config.model_copy(update={"data": data})
