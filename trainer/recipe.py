"""A training recipe in full context, in ActionFormer's own words: the official YAML files load unchanged.

Keys, defaults and meaning are those of the official repository's configuration (Zhang, Wu, Li: ActionFormer,
ECCV 2022), so that whoever uses it moves over with the files that they have. A file with the key
`dataset_name` is a recipe; any other is `trainer.config.Config`, the causal detector's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from engine.errors import ConfigError
from engine.manifest import Positive
from engine.schema import Strict, as_tuple, load_config

# A stream's way out of what only whole recordings have.
SIBLING = "a live stream needs the causal sibling: see the recipes that end in _causal.yaml"


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
# No network of the field comes near these; beyond them lies a typing error, or somebody's memory.
Width = Annotated[int, Field(gt=0, le=65536)]
Length = Annotated[int, Field(gt=0, le=2**20)]
Label = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dropped = Annotated[float, Field(ge=0.0, lt=1.0)]

# What each data set is scored at: the thresholds of its own challenge.
TIOUS = {
    "thumos": "0.3:0.7:0.1",
    "anet": "0.5:0.95:0.05",
    "epic": "0.1:0.5:0.1",
    "ego4d": "0.1:0.5:0.1",
}


class DatasetRecipe(Strict):
    """Where the features are and what they are: one vector for every `feat_stride` frames of video."""

    json_file: Path | None = None
    feat_folder: Annotated[tuple[Path, ...], BeforeValidator(as_tuple)] = ()
    file_prefix: str | None = None
    file_ext: str = ".npy"
    num_classes: Width = 97
    input_dim: Width | tuple[Width, ...] = Field(
        2304, description="one number, or a list: a projection for each of its parts (Ego4D)"
    )
    feat_stride: int = Field(16, ge=0, description="video frames; 0: features of a fixed length")
    num_frames: int = Field(32, ge=0, description="video frames that one vector covers")
    default_fps: float | None = Field(None, gt=0, description="null: each video's own, from json_file")
    downsample_rate: Positive = 1
    max_seq_len: Length = 2304
    trunc_thresh: Fraction = 0.5
    crop_ratio: tuple[Fraction, Fraction] | None = None
    force_upsampling: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """The widths of the parts of a feature vector."""
        return (self.input_dim,) if isinstance(self.input_dim, int) else self.input_dim

    @field_validator("crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("expected the smaller ratio first")
        return value


class LoaderRecipe(Strict):
    """Batches."""

    batch_size: Positive = 8
    num_workers: int = Field(4, ge=0)


class ModelRecipe(Strict):
    """The pyramid, its neck and its heads."""

    backbone_type: Literal["convTransformer", "conv"] = "convTransformer"
    fpn_type: Literal["identity", "fpn"] = "identity"
    backbone_arch: tuple[int, int, int] = Field((2, 2, 5), description="embedding, stem and branch layers")
    scale_factor: Positive = 2
    regression_range: tuple[tuple[float, float], ...] = (
        (0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000),
    )  # fmt: skip
    n_head: Positive = 4
    n_mha_win_size: int | tuple[int, ...] = Field(-1, description="one, or one for each level; -1: global")
    embd_kernel_size: Positive = 3
    embd_dim: Width | tuple[Width, ...] = 512
    embd_with_ln: bool = True
    fpn_dim: Width = 512
    fpn_with_ln: bool = True
    fpn_start_level: int = Field(0, ge=0)
    head_dim: Width = 512
    head_kernel_size: Positive = 3
    head_num_layers: Positive = 3
    head_with_ln: bool = True
    max_buffer_len_factor: float = Field(6.0, gt=0, description="not used: no length is too long here")
    use_abs_pe: bool = False
    use_rel_pe: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """The embedding widths of the parts of a feature vector."""
        return (self.embd_dim,) if isinstance(self.embd_dim, int) else self.embd_dim

    @property
    def width(self) -> int:
        """The width of the backbone."""
        return sum(self.widths)

    @property
    def levels(self) -> int:
        """Levels of the backbone; the neck may leave out the first `fpn_start_level`."""
        return 1 + self.backbone_arch[2]

    @property
    def windows(self) -> tuple[int, ...]:
        """The attention window of each level of the backbone; at most 1 stands for global attention."""
        if isinstance(self.n_mha_win_size, int):
            return (self.n_mha_win_size,) * self.levels
        return self.n_mha_win_size

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each level that the heads see, in feature frames."""
        return tuple(self.scale_factor**level for level in range(self.fpn_start_level, self.levels))

    @model_validator(mode="after")
    def _possible(self) -> ModelRecipe:
        width = self.width
        if min(self.backbone_arch) < 0:
            raise ValueError(f"`backbone_arch` {self.backbone_arch}: expected no negative number")
        if self.fpn_start_level >= self.levels:
            raise ValueError(f"`fpn_start_level` {self.fpn_start_level}: there are {self.levels} levels")
        if len(self.windows) != self.levels:
            raise ValueError(
                f"`n_mha_win_size` has {len(self.windows)} windows for {self.levels} levels of the backbone"
            )
        if len(self.regression_range) != len(self.strides):
            raise ValueError(
                f"`regression_range` has {len(self.regression_range)} ranges for {len(self.strides)} levels"
            )
        if self.scale_factor > 1 and self.scale_factor % 2:
            raise ValueError(f"`scale_factor` {self.scale_factor}: expected 1 or an even number")
        for key in ("embd_kernel_size", "head_kernel_size"):
            if getattr(self, key) % 2 == 0:
                raise ValueError(f"`{key}` {getattr(self, key)}: expected an odd number")
        if self.backbone_type == "convTransformer" and width % self.n_head:
            raise ValueError(f"`embd_dim` {width} is not a multiple of `n_head` {self.n_head}")
        if self.use_rel_pe and any(window > 1 and window % 2 == 0 for window in self.windows):
            raise ValueError("`use_rel_pe` needs odd windows")
        if self.head_num_layers == 1 and self.head_dim != self.fpn_dim:
            raise ValueError(
                f"`head_num_layers: 1` needs `head_dim` {self.head_dim} = `fpn_dim` {self.fpn_dim}"
            )
        if self.fpn_type == "identity" and width != self.fpn_dim:
            raise ValueError(f"`fpn_type: identity` needs `fpn_dim` {self.fpn_dim} = `embd_dim` {width}")
        return self


class TrainRecipe(Strict):
    """Label assignment, losses and regularisation."""

    center_sample: Literal["radius", "none"] = "radius"
    center_sample_radius: float = Field(1.5, gt=0, description="in strides of a level")
    loss_weight: float = Field(1.0, description="of the regression; at most 0: balanced automatically")
    cls_prior_prob: float = Field(0.01, lt=1)
    init_loss_norm: float = Field(2000, gt=0)
    clip_grad_l2norm: float = Field(-1, description="at most 0: no clipping")
    head_empty_cls: tuple[Label, ...] = Field((), description="classes without data; found in json_file too")
    dropout: Dropped = 0.0
    droppath: Dropped = 0.1
    label_smoothing: Dropped = 0.0


class TestRecipe(Strict):
    """From moments to detections."""

    pre_nms_thresh: float = Field(0.001, ge=0)
    pre_nms_topk: Positive = 5000
    iou_threshold: float = Field(0.1, ge=0)
    min_score: float = Field(0.01, ge=0)
    max_seg_num: Positive = 1000
    nms_method: Literal["soft", "linear", "hard", "none"] = Field(
        "soft", description="`soft` decays scores by a Gaussian of the overlap, `linear` by the overlap"
    )
    nms_sigma: float = Field(0.5, gt=0)
    duration_thresh: float = Field(0.05, description="feature frames")
    multiclass_nms: bool = True
    ext_score_file: Path | None = Field(None, description="video-level class scores, .json or .npz")
    voting_thresh: float = 0.75


class OptRecipe(Strict):
    """The optimiser and the schedule; epochs do not count those of the warm-up."""

    type: Literal["AdamW", "SGD"] = "AdamW"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    epochs: Positive = 30
    warmup: bool = True
    warmup_epochs: int = Field(5, ge=0)
    early_stop_epochs: Positive | None = None
    schedule_type: Literal["cosine", "multistep"] = "cosine"
    schedule_steps: tuple[int, ...] = ()
    schedule_gamma: float = Field(0.1, gt=0)


class Recipe(Strict):
    """A whole recipe."""

    dataset_name: Literal["thumos", "anet", "epic", "ego4d"] = "epic"
    context: Literal["full"] = "full"
    init_rand_seed: int = Field(1234567891, ge=0)
    devices: tuple[str | int, ...] = Field(
        ("cuda:0",), description="only their number counts: the learning rate is multiplied by it"
    )
    train_split: Names = ("training",)
    val_split: Names = ("validation",)
    model_name: Literal["LocPointTransformer"] = "LocPointTransformer"
    dataset: DatasetRecipe = DatasetRecipe()
    loader: LoaderRecipe = LoaderRecipe()
    model: ModelRecipe = ModelRecipe()
    train_cfg: TrainRecipe = TrainRecipe()
    test_cfg: TestRecipe = TestRecipe()
    opt: OptRecipe = OptRecipe()
    output_folder: Path = Path("./ckpt/")

    @field_validator("context", mode="before")
    @classmethod
    def _not_causal(cls, value: Any) -> Any:
        if value == "causal":
            raise ValueError(
                "absolute positions, global windows, stretching to a fixed length and external scores "
                f"belong to whole recordings; {SIBLING}"
            )
        return value

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        dims, widths = self.dataset.input_dim, self.model.embd_dim
        if isinstance(dims, int) != isinstance(widths, int):
            raise ValueError("`dataset.input_dim` and `model.embd_dim`: expected two numbers, or two lists")
        if not isinstance(dims, int) and not isinstance(widths, int) and len(dims) != len(widths):
            raise ValueError(
                f"`dataset.input_dim` joins {len(dims)} features, `model.embd_dim` has {len(widths)} widths"
            )
        outside = [label for label in self.train_cfg.head_empty_cls if label >= self.dataset.num_classes]
        if outside:
            raise ValueError(
                f"`train_cfg.head_empty_cls` {outside[0]}: `num_classes` {self.dataset.num_classes}"
            )
        for stride, window in zip(self.model.strides, self.model.windows, strict=False):
            whole = _whole(stride, window)
            if self.dataset.max_seq_len % whole:
                raise ValueError(
                    f"`dataset.max_seq_len` {self.dataset.max_seq_len} is not a multiple of {whole}, which "
                    f"stride {stride} and window {window} need"
                )
        return self

    @property
    def divisor(self) -> int:
        """What the length of an input longer than `max_seq_len` is rounded up to a multiple of."""
        pairs = zip(self.model.strides, self.model.windows, strict=False)
        return max(1, *(_whole(stride, window) for stride, window in pairs))

    def padded(self, frames: int) -> int:
        """The length to which the official code pads a clip of `frames` when it tests."""
        longest = self.dataset.max_seq_len
        return longest if frames <= longest else -(-frames // self.divisor) * self.divisor


def _whole(stride: int, window: int) -> int:
    return stride * (window // 2) * 2 if window > 1 else stride


def is_recipe(values: object) -> bool:
    """Whether a YAML document is a recipe in full context, or a configuration of the causal detector."""
    return isinstance(values, dict) and "dataset_name" in values


def read_recipe(path: Path) -> Recipe:
    """Read an official configuration. Its paths stay as written: relative to the working directory."""
    recipe = load_config(Recipe, path)
    if recipe.dataset.file_ext not in (".npy", ".npz"):
        raise ConfigError(f"{path}: `dataset.file_ext` is {recipe.dataset.file_ext!r}, expected .npy or .npz")
    return recipe


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML that can be read from anywhere: its paths absolute."""
    values = recipe.model_dump(mode="json")
    data, test = values["dataset"], values["test_cfg"]
    data["feat_folder"] = [str(Path(folder).resolve()) for folder in data["feat_folder"]]
    for section, key in ((data, "json_file"), (test, "ext_score_file")):
        if section[key] is not None:
            section[key] = str(Path(section[key]).resolve())
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
