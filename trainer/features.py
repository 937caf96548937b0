"""Pre-extracted video features and the actions on their grid, in the layouts of ActionFormer's data sets.

A vector of features covers `num_frames` video frames and comes `stride` frames after the one before, so that
a time of t seconds lies at t * fps / stride - 0.5 * num_frames / stride on the grid of the vectors. All times
are mapped in float32, as the official code does, whose numbers these are. Knows NumPy only: what a model
makes of a clip is not its business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, DataError
from engine.recording import read_recording
from engine.schema import nearest
from trainer.annotations import Annotations, Recording, read_annotations, unique_segments
from trainer.recipe import DatasetRecipe, Recipe

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# The length of a video of which the file states none: longer than every video, so that nothing is clamped.
UNKNOWN_DURATION = 1e8
# More than any taxonomy of actions has: a larger id is a mistake, and names are kept for all ids below it.
MAX_CLASSES = 100_000
# Data sets of which the official code leaves out videos without features, and those where it fails.
_LENIENT = ("thumos", "ego4d")
_SHOWN = 20
_SHOWN_IN_LOG = 10
_TRIALS = 200

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """A video and what happens in it: `segments` [n, 2] in seconds, `labels` [n] label ids.

    `fps` in Hz; `duration` in seconds, 1e8 where the file states none. Where the recipe has one class
    (proposals on ActivityNet), every label is 0.
    """

    name: str
    fps: float
    duration: float
    segments: FloatArray
    labels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """The features of a video, or of a cut of it: `features` [T, D]; `segments` [n, 2] on their grid.

    `stride` is the video frames from one vector to the next, after downsampling or stretching, `num_frames`
    those that one vector covers. `labels` [n], `fps` and `duration` are those of the video.
    """

    name: str
    features: FloatArray
    segments: FloatArray
    labels: IntArray
    fps: float
    duration: float
    stride: float
    num_frames: float

    @property
    def offset(self) -> float:
        """Half of what one vector covers, on the grid: segments may lie outside the features by so much."""
        return 0.5 * self.num_frames / self.stride


class FeatureSet:
    """The videos of some subsets with their features, which are read from disk when asked for.

    - `classes`: the names of the label ids; `class 17` for an id that no label has. At least `num_classes`;
      more where the recipe has a single class and external scores decide among those of the file.
    - `empty`: the label ids without any annotation in the whole file. EPIC-KITCHENS has such, the others
      must not.
    - `videos`: in the order of the file. In training, those without an action are left out: the official
      model cannot take them.
    - `missing`: the names of the videos that were left out because their features are not there.

    As in the official readers, `force_upsampling` and `feat_stride: 0` mean something for `anet` only.
    """

    def __init__(self, recipe: Recipe, split: Sequence[str], training: bool) -> None:
        """Read `json_file`, choose the videos of the subsets in `split` (in any case) and find their files.

        Raises ConfigError where `json_file` or `feat_folder` is not set, is not there or is of another kind;
        DataError where the annotations do not fit the recipe or features are missing.
        """
        self._data = recipe.dataset
        self._kind = recipe.dataset_name
        self._training = training
        self._path = _annotation_file(self._data)
        _check_folders(self._data)
        if self._kind != "anet" and self._data.feat_stride == 0:
            raise ConfigError(
                "`dataset.feat_stride` is 0, which stands for features of a fixed length and belongs to "
                f"`dataset_name: anet`; found `{self._kind}`: set the video frames between two vectors"
            )
        annotations = read_annotations(self._path)
        # One class on ActivityNet stands for "any action": the file's own labels remain, as names only.
        self._proposals = self._kind == "anet" and self._data.num_classes == 1
        self._check_labels(annotations)
        names = {number: label for label, number in annotations.ids.items()}
        width = max(self._data.num_classes, 1 + max(names, default=0))
        self.classes: tuple[str, ...] = tuple(names.get(i, f"class {i}") for i in range(width))
        seen = {annotations.ids[item.label] for video in annotations.recordings for item in video.segments}
        self.empty: tuple[int, ...] = ()
        if self._kind == "epic":
            self.empty = tuple(i for i in range(self._data.num_classes) if i not in seen)
        self.missing: tuple[str, ...] = ()
        chosen = self._find(self._choose(annotations, split))
        self.videos: tuple[Video, ...] = self._videos(chosen, annotations)

    def __len__(self) -> int:
        """The number of videos."""
        return len(self.videos)

    def read(self, index: int) -> Clip:
        """Read the features of `videos[index]` and map its actions onto their grid.

        Nothing is cut (see `cut`). In training, actions of ActivityNet that begin after the last vector or
        lie mostly behind it are dropped, which may leave none. Raises DataError naming the file.
        """
        data, video = self._data, self.videos[index]
        features = read_features(
            data.feat_folder, video.name, data.file_prefix, data.file_ext, width=sum(data.inputs)
        )
        stride, num_frames = float(data.feat_stride * data.downsample_rate), float(data.num_frames)
        if self._kind == "anet" and (data.feat_stride == 0 or data.force_upsampling):
            stride = num_frames = self._fitted_stride(len(features), video)
            if data.force_upsampling:
                features = stretch(features, data.max_seq_len)
        else:
            features = np.ascontiguousarray(features[:: data.downsample_rate])
        clip = Clip(
            name=video.name,
            features=features,
            segments=video.segments,
            labels=video.labels,
            fps=video.fps,
            duration=video.duration,
            stride=stride,
            num_frames=num_frames,
        )
        seconds_to_grid = video.segments * np.float32(video.fps) / np.float32(stride)
        clip = replace(clip, segments=seconds_to_grid - np.float32(clip.offset))
        return _inside(clip, data.trunc_thresh) if self._kind == "anet" and self._training else clip

    def _fitted_stride(self, frames: int, video: Video) -> float:
        """The stride at which `max_seq_len` (or `frames`) vectors cover a video of `anet` evenly."""
        data = self._data
        if data.feat_stride > 0:
            return float((frames - 1) * data.feat_stride + data.num_frames) / data.max_seq_len
        if frames > data.max_seq_len:
            path = _files(data.feat_folder, video.name, data.file_prefix, data.file_ext)[0]
            raise DataError(
                f"{path}: {frames} vectors, expected at most `dataset.max_seq_len` {data.max_seq_len}, as "
                "`dataset.feat_stride: 0` says that features are of a fixed length"
            )
        if video.duration == UNKNOWN_DURATION:
            raise DataError(
                f"{self._path}: recording `{video.name}` has no `duration`, which `dataset.feat_stride: 0` "
                "needs; add it in seconds"
            )
        return video.duration * video.fps / (data.max_seq_len if data.force_upsampling else frames)

    def _check_labels(self, annotations: Annotations) -> None:
        found, expected = len(annotations.ids), self._data.num_classes
        limit = MAX_CLASSES if self._proposals else expected
        fits = found <= expected if self._kind == "epic" else found == expected
        if not fits and not self._proposals:
            most = "at most " if self._kind == "epic" else ""
            raise DataError(
                f"{self._path}: found {found} labels, expected {most}`dataset.num_classes` {expected}; "
                "correct `dataset.num_classes`, or take the annotation file that belongs to it"
            )
        outside = {label: i for label, i in annotations.ids.items() if not 0 <= i < limit}
        if outside:
            shown = _listed([f"`{label}` ({number})" for label, number in outside.items()])
            raise DataError(
                f"{self._path}: found label ids outside 0..{limit - 1}: {shown}; "
                "number the labels from 0, or correct `dataset.num_classes`"
            )

    def _choose(self, annotations: Annotations, split: Sequence[str]) -> list[Recording]:
        """The recordings of the subsets, without those that training cannot use."""
        if not split:
            raise ConfigError(f"{self._path}: no subset was asked for; set `train_split` and `val_split`")
        wanted = {name.lower() for name in split}
        known = {name.lower() for name in annotations.subsets}
        for name in split:
            if name.lower() not in known:
                raise DataError(
                    f"{self._path}: no recording has the subset `{name}`{nearest(name, annotations.subsets)}"
                )
        chosen = [video for video in annotations.recordings if video.subset.lower() in wanted]
        if self._kind == "anet":
            chosen = [replace(video, segments=unique_segments(video.segments)) for video in chosen]
        if not self._training:
            return chosen
        used = [video for video in chosen if video.segments]
        if not used:
            subsets = _listed([f"`{name}`" for name in split])
            raise DataError(
                f"{self._path}: none of the {len(chosen)} recordings of {subsets} has an annotation; "
                "expected at least one for training: check the subsets"
            )
        if len(used) < len(chosen):
            left_out = len(chosen) - len(used)
            log.info("%s: %d recordings without annotations are left out of training", self._path, left_out)
        return used

    def _find(self, chosen: Sequence[Recording]) -> list[Recording]:
        """The recordings whose features are there; sets `missing`."""
        data = self._data
        found: list[Recording] = []
        missing: list[str] = []
        paths: list[str] = []
        for video in chosen:
            files = _files(data.feat_folder, video.name, data.file_prefix, data.file_ext)
            absent = [str(path) for path in files if not path.is_file()]
            paths.extend(absent)
            if absent:
                missing.append(video.name)
            else:
                found.append(video)
        if missing and (not found or self._kind not in _LENIENT):
            raise DataError(
                f"{self._path}: {len(missing)} of {len(chosen)} recordings have no features; expected "
                f"{_listed(paths)}; check `dataset.feat_folder`, `dataset.file_prefix` and `dataset.file_ext`"
            )
        if missing:
            log.warning(
                "%s: %d of %d recordings have no features in %s and are left out: %s",
                self._path,
                len(missing),
                len(chosen),
                ", ".join(str(folder) for folder in data.feat_folder),
                _listed(missing, _SHOWN_IN_LOG),
            )
        self.missing = tuple(missing)
        return found

    def _videos(self, chosen: Sequence[Recording], annotations: Annotations) -> tuple[Video, ...]:
        rates = [self._data.default_fps or video.fps or 0.0 for video in chosen]
        unknown = [f"`{video.name}`" for video, rate in zip(chosen, rates, strict=True) if not rate]
        if unknown:
            raise DataError(
                f"{self._path}: no `fps` for {len(unknown)} recordings: {_listed(unknown)}; add it to each, "
                "or set `dataset.default_fps`"
            )
        videos: list[Video] = []
        for video, rate in zip(chosen, rates, strict=True):
            labels = [0 if self._proposals else annotations.ids[item.label] for item in video.segments]
            segments = np.array([(item.start, item.end) for item in video.segments], np.float32)
            videos.append(
                Video(
                    name=video.name,
                    fps=rate,
                    duration=UNKNOWN_DURATION if video.duration is None else video.duration,
                    segments=segments.reshape(-1, 2),
                    labels=np.array(labels, np.int64),
                )
            )
        return tuple(videos)


def read_features(
    folders: Sequence[Path], name: str, prefix: str | None, extension: str, *, width: int | None = None
) -> FloatArray:
    """Read the features of a video, float32 [T, D]: those of every folder, joined side by side.

    `prefix` and `extension` stand before and after `name` in the files' names. Raises DataError where a file
    is missing, damaged or holds NaN or Inf, where lengths differ, and where D is not `width`.
    """
    return joined(name, _files(folders, name, prefix, extension), width=width)


def joined(name: str, files: Sequence[Path], *, width: int | None = None, finite: bool = True) -> FloatArray:
    """The recordings `files` of one stream side by side, float32 [T, D]; raises as `read_features`.

    `finite` False: NaN and Inf, which a sensor's recording may have, are let through.
    """
    parts = [read_recording(path) for path in files]
    for path, part in zip(files, parts, strict=True):
        if finite and not np.isfinite(part).all():
            raise DataError(f"{path}: holds NaN or Inf, expected finite features; extract them again")
    if len({len(part) for part in parts}) > 1:
        lengths = ", ".join(f"{path} has {len(part)}" for path, part in zip(files, parts, strict=True))
        raise DataError(
            f"features of `{name}` differ in length: {lengths} vectors; expected the same number in every "
            "folder: extract them at the same stride, or cut them to the shortest"
        )
    found = sum(part.shape[1] for part in parts)
    if width is not None and found != width:
        widths = ", ".join(f"{path} has {part.shape[1]}" for path, part in zip(files, parts, strict=True))
        turned = "; its rows should be vectors: transpose it" if len(parts[0]) == width else ""
        raise DataError(
            f"features of `{name}` are {found} wide ({widths}), expected `dataset.input_dim` {width}{turned}"
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def stretch(features: FloatArray, length: int) -> FloatArray:
    """Stretch or shrink [T, D] to [length, D] by linear interpolation between the centres of the vectors.

    The numbers are those of torch.nn.functional.interpolate(mode="linear", align_corners=False), with which
    the official code trained: positions are float32, rounded once after scaling and shifting, as there.
    """
    frames = len(features)
    if frames == length:
        return features
    scale = np.float64(np.float32(frames) / np.float32(length))
    position = (scale * (np.arange(length) + 0.5) - 0.5).astype(np.float32).clip(min=0)
    left = np.minimum(position.astype(np.int64), frames - 1)
    right = np.minimum(left + 1, frames - 1)
    weight = (position - left.astype(np.float32)).clip(0, 1)[:, None]
    return np.asarray((1 - weight) * features[left] + weight * features[right], np.float32)


def cut(
    clip: Clip,
    max_length: int,
    trunc_thresh: float,
    crop_ratio: tuple[float, float] | None,
    generator: np.random.Generator,
) -> Clip:
    """A random piece of `max_length` vectors, or of a random share in `crop_ratio` of a clip not longer.

    Of 200 places the first with an action is taken, else the last, with no segments. An action stays where
    at least `trunc_thresh` of its length lies inside the piece, which reaches `clip.offset` beyond its first
    and its last vector; what is outside is cut off. The features of the result are a view of those of the
    clip; where there is nothing to do, the clip itself is returned.
    """
    frames, length = len(clip.features), max_length
    if frames <= max_length:
        if crop_ratio is None:
            return clip
        least = max(round(crop_ratio[0] * frames), 1)
        most = min(round(crop_ratio[1] * frames), frames)
        length = int(generator.integers(least, max(least, most), endpoint=True))
        if length == frames:
            return clip
    starts, ends = clip.segments[:, 0], clip.segments[:, 1]
    extent = np.abs(ends - starts)
    offset = np.float32(clip.offset)
    for _ in range(_TRIALS):
        first = int(generator.integers(0, frames - length, endpoint=True))
        left = np.maximum(np.float32(first) - offset, starts)
        right = np.minimum(np.float32(first + length) + offset, ends)
        inside = (right - left).clip(min=0)
        with np.errstate(invalid="ignore"):  # 0 / 0, a segment without length: NaN, which is never enough
            share = inside / extent
        # What does not touch the piece stays out even where no share at all is asked for.
        kept = (share >= np.float32(trunc_thresh)) & (inside > 0)
        if kept.any():
            break
    return replace(
        clip,
        features=clip.features[first : first + length],
        segments=np.stack((left[kept], right[kept]), axis=1) - np.float32(first),
        labels=clip.labels[kept],
    )


def _inside(clip: Clip, trunc_thresh: float) -> Clip:
    """The clip with its actions clamped at the end of the features; some videos lack their last frames."""
    end = len(clip.features) + clip.offset
    # In float64, as the official code judges by Python's numbers; it stores and compares starts in float32.
    starts, ends = clip.segments.astype(np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (np.minimum(ends, end) - starts) / (ends - starts)
    kept = (clip.segments[:, 0] < np.float32(end)) & (share >= trunc_thresh)
    return replace(clip, segments=np.minimum(clip.segments[kept], np.float32(end)), labels=clip.labels[kept])


def _annotation_file(data: DatasetRecipe) -> Path:
    if data.json_file is None:
        raise ConfigError("`dataset.json_file` is not set, expected the path of the annotation file")
    if not data.json_file.is_file():
        raise ConfigError(
            f"`dataset.json_file` is {data.json_file}, which is no file; set it to the annotation file "
            "(relative to the working directory)"
        )
    return data.json_file


def _check_folders(data: DatasetRecipe) -> None:
    if not data.feat_folder:
        raise ConfigError("`dataset.feat_folder` is not set, expected the folder of the feature files")
    for folder in data.feat_folder:
        if ".hdf5" in str(folder):
            raise ConfigError(
                f"`dataset.feat_folder` is {folder}: features in HDF5 are not read; convert them to .npy, "
                f'and set `dataset.feat_folder` to their folder: python -c "import h5py, numpy; '
                f"[numpy.save(name, data[()]) for name, data in h5py.File('{folder}').items()]\""
            )
        if not folder.is_dir():
            raise ConfigError(
                f"`dataset.feat_folder` is {folder}, which is no folder; set it to that of the feature "
                "files (relative to the working directory)"
            )


def _files(folders: Sequence[Path], name: str, prefix: str | None, extension: str) -> list[Path]:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise DataError(f"recording `{name}`: found a path that leaves the folder, expected a plain name")
    return [folder / f"{prefix or ''}{name}{extension}" for folder in folders]


def _listed(items: Sequence[str], most: int = _SHOWN) -> str:
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
