"""Training data: recordings in memory, random crops of them, augmentation.

Crops begin at any sample, so that every phase of the hop is seen, and may be spliced from pieces of several
recordings: where activities were recorded in a fixed order, a detector that learned the order would be of no
use on a live stream.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import DataError
from trainer.annotations import Annotations, Recording, find_recording, read_annotations
from trainer.config import AugmentConfig, Config, DataConfig
from trainer.features import joined
from trainer.targets import Targets, assign

FloatArray = NDArray[np.float32]
SPEEDS = (0.7, 1.4)  # what `augment.warp` keeps to: beyond, one activity may pass for another

log = logging.getLogger(__name__)

# An axis in a channel's name: a letter by itself (acc_x_g, "gyro x"), or the last one (gyrX).
_AXIS = re.compile(r"(?<![A-Za-z])[xyzXYZ](?![A-Za-z])|[xyzXYZ]$")


@dataclass(frozen=True)
class Grid:
    """Where a time of a recording lies among its samples: seconds * rate - shift.

    A feature vector stands at the centre of the clip that it is computed from, a sample at that of its
    period: so the grid of a recording of features begins later than its video.
    """

    rate: float
    shift: float = 0.0

    def samples(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times in samples."""
        return seconds * self.rate - self.shift

    def seconds(self, samples: float) -> float:
        """The way back."""
        return (samples + self.shift) / self.rate


def grid_of(recording: Recording, data: DataConfig) -> Grid | None:
    """The grid of a recording; None where neither its annotations nor the configuration tell a rate."""
    if data.features is None:
        rate = data.sample_rate or recording.fps
        return Grid(rate) if rate else None
    fps, stride = data.features.fps or recording.fps, data.features.stride
    return Grid(fps / stride, 0.5 * data.features.covers / stride - 0.5) if fps else None


def read_samples(recording: Recording, data: DataConfig) -> FloatArray:
    """The samples of a recording, [T, C]: those of every folder side by side. Raises DataError."""
    files = [find_recording(folder, data.prefix + recording.name) for folder in data.recordings]
    return joined(recording.name, files, finite=False)


def present(chosen: list[Recording], data: DataConfig) -> list[Recording]:
    """Those of `chosen` that have a file in every folder, where the configuration leaves the others out."""
    if not data.skip_missing:
        return chosen
    found = [recording for recording in chosen if _has_files(recording, data)]
    if not found:
        folders = ", ".join(map(str, data.recordings))
        raise DataError(f"none of {len(chosen)} recordings has a file in {folders}; is it the right folder?")
    missing = [recording.name for recording in chosen if recording not in found]
    if missing:
        shown = ", ".join(missing[:10])
        log.warning("%d of %d recordings have no file and are left out: %s", len(missing), len(chosen), shown)
    return found


def _has_files(recording: Recording, data: DataConfig) -> bool:
    try:
        for folder in data.recordings:
            find_recording(folder, data.prefix + recording.name)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Track:
    """One recording in memory: `samples` [T, C]; `segments` [n, 2] in samples; `labels` [n]."""

    name: str
    samples: FloatArray
    segments: NDArray[np.float64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """The recordings of some subsets, with the classes of the whole annotation file."""

    tracks: tuple[Track, ...]
    classes: tuple[str, ...]
    sample_rate: float
    names: tuple[str, ...] = ()  # of the channels, where known

    @property
    def channels(self) -> int:
        """Numbers in a sample."""
        return int(self.tracks[0].samples.shape[1])

    @property
    def seconds(self) -> float:
        """Length of all recordings together."""
        return sum(len(track.samples) for track in self.tracks) / self.sample_rate


def choose(annotations: Annotations, data: DataConfig, subset: str) -> list[Recording]:
    """The recordings of `train`, `test`, `holdout` or a subset's own name, in the file's order."""
    held = set(data.holdout)

    def is_held(recording: Recording) -> bool:
        return recording.name in held or (recording.subject is not None and recording.subject in held)

    names = {"train": data.train, "test": data.test}.get(subset, (subset,))
    if subset == "holdout":
        chosen = [r for r in annotations.recordings if is_held(r)]
    else:
        wanted = {name.lower() for name in names}
        chosen = [r for r in annotations.recordings if r.subset.lower() in wanted and not is_held(r)]
    if not chosen:
        known = sorted({r.subset for r in annotations.recordings})
        raise DataError(
            f"{data.annotations}: no recording belongs to `{subset}` ({', '.join(names)}); its subsets are "
            f"{', '.join(known)}"
        )
    return chosen


def load_corpus(data: DataConfig, subset: str) -> Corpus:
    """Read the recordings of a subset. Raises DataError that lists everything that is wrong."""
    annotations = read_annotations(data.annotations)
    chosen = present(choose(annotations, data, subset), data)
    index = {label: i for i, label in enumerate(annotations.classes)}
    grids = [grid_of(recording, data) for recording in chosen]
    rates = {data.sample_rate or (grid.rate if grid else None) for grid in grids}
    if len(rates) != 1 or None in rates or None in grids:
        raise DataError(
            f"{data.annotations}: sampling rates {sorted(map(str, rates))}; expected one for all recordings: "
            f"set `data.sample_rate`{' and `data.features.fps`' if data.features else ''}"
        )
    rate = float(next(iter(rates)) or 0.0)
    tracks: list[Track] = []
    problems: list[str] = []
    for recording, grid in zip(chosen, grids, strict=True):
        try:
            samples = read_samples(recording, data)
        except DataError as problem:
            problems.append(str(problem))
            continue
        if not np.isfinite(samples).all():
            problems.append(f"recording `{recording.name}`: holds NaN or Inf")
        unknown = {segment.label for segment in recording.segments} - index.keys()
        if unknown:
            problems.append(f"{recording.name}: labels {sorted(unknown)} are not among the classes")
            continue
        segments = np.array([(s.start, s.end) for s in recording.segments], np.float64).reshape(-1, 2)
        labels = np.array([index[s.label] for s in recording.segments], np.int64)
        assert grid is not None
        tracks.append(Track(recording.name, samples, grid.samples(segments), labels))
    widths = {track.samples.shape[1] for track in tracks}
    if len(widths) > 1:
        problems.append(f"recordings have {sorted(widths)} channels; expected one number for all")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise DataError(
            f"{len(problems)} problems with the recordings of `{subset}` (`onset data check` tells more):\n"
            f"  {shown}"
        )
    return Corpus(tuple(tracks), annotations.classes, rate, data.channels or annotations.channels)


def statistics(corpus: Corpus) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean and standard deviation of the samples, and standard deviation of first differences, each [C]."""
    total = sum(len(track.samples) for track in corpus.tracks)
    mean = np.sum([track.samples.sum(axis=0, dtype=np.float64) for track in corpus.tracks], axis=0) / total
    square = sum(((track.samples - mean) ** 2).sum(axis=0) for track in corpus.tracks) / total
    steps = sum(
        (np.diff(track.samples, axis=0).astype(np.float64) ** 2).sum(axis=0) for track in corpus.tracks
    )
    return (
        np.asarray(mean, np.float32),
        np.asarray(np.sqrt(square), np.float32),
        np.asarray(np.sqrt(steps / total), np.float32),
    )


@dataclass(frozen=True)
class Crop:
    """A training example: `samples` [N * hop, C], `mask` [N], and what to answer."""

    samples: FloatArray
    mask: FloatArray
    targets: Targets


class Sampler:
    """Draws random crops of `frames` frames; the same generator state gives the same crops."""

    def __init__(self, corpus: Corpus, config: Config, hop: int, frames: int) -> None:
        self.corpus, self.hop, self.frames = corpus, hop, frames
        self.augment, self.lookahead = config.augment, config.model.lookahead
        if config.augment.triads == "auto":
            self.augment = config.augment.model_copy(update={"triads": triads_of(corpus.names)})
        self.reach = config.train.reach * corpus.sample_rate / hop
        self._mean, self._std, _ = statistics(corpus)
        self._weights = np.array([len(track.samples) for track in corpus.tracks], np.float64)
        self._weights /= self._weights.sum()
        # The actions of each class that occurs: the number of the recording, start and end in samples.
        actions: dict[int, list[tuple[int, float, float]]] = {}
        for number, track in enumerate(corpus.tracks):
            for (start, end), label in zip(track.segments.tolist(), track.labels.tolist(), strict=True):
                actions.setdefault(label, []).append((number, start, end))
        self._actions = [actions[label] for label in sorted(actions)]

    def draw(self, generator: np.random.Generator) -> Crop:
        """One crop, and what the causal detector should answer."""
        samples, mask, segments, labels = self.cut(generator)
        targets = assign(segments, labels, self.frames, len(self.corpus.classes), self.reach, self.lookahead)
        return Crop(samples, mask, targets)

    def cut(
        self, generator: np.random.Generator
    ) -> tuple[FloatArray, FloatArray, NDArray[np.float64], NDArray[np.int64]]:
        """One crop: samples [N * hop, C], mask [N], and the segments there [n, 2] in frames with their
        labels [n]; segments may stick out of it."""
        length = self.frames * self.hop
        pieces = 1
        if generator.random() < self.augment.splice:
            pieces = min(int(generator.integers(2, 5)), self.frames)
        cuts = np.sort(generator.choice(np.arange(1, self.frames), pieces - 1, replace=False)) * self.hop
        sizes = np.diff([0, *cuts.tolist(), length])
        samples = np.zeros((length, self.corpus.channels), np.float32)
        mask = np.ones(self.frames, np.float32)
        segments, labels, position = [], [], 0
        for number, size in enumerate(sizes.tolist()):
            taken, found, classes = self._piece(size, generator)
            # Where pieces meet, the cut is where the action ends and the next one starts; at the crop's own
            # borders a segment keeps sticking out, as what the stream did before it was joined.
            found = found.clip(0 if number else -np.inf, size if number < pieces - 1 else np.inf)
            samples[position : position + len(taken)] = taken
            mask[(position + len(taken)) // self.hop : (position + size) // self.hop] = 0.0
            segments.append(found + position)
            labels.append(classes)
            position += size
        if self.augment.drop and generator.random() < self.augment.drop:
            size = int(generator.integers(1, max(2, self.frames // 8)))
            first = int(generator.integers(0, self.frames - size + 1))
            mask[first : first + size] = 0.0
        samples = augment(samples, self._mean, self._std, self.augment, generator)
        return samples, mask, np.concatenate(segments) / self.hop, np.concatenate(labels)

    def _piece(
        self, size: int, generator: np.random.Generator
    ) -> tuple[FloatArray, NDArray[np.float64], NDArray[np.int64]]:
        """At most `size` samples from a random place, and the segments there, in samples of the piece.

        Fewer where the recording ends first. With `warp`, a piece passes at a speed of its own.
        """
        chosen: tuple[int, float, float] | None = None
        if self._actions and self.augment.balance and generator.random() < self.augment.balance:
            group = self._actions[int(generator.integers(len(self._actions)))]
            chosen = group[int(generator.integers(len(group)))]
        number = (
            int(generator.choice(len(self.corpus.tracks), p=self._weights)) if chosen is None else chosen[0]
        )
        track = self.corpus.tracks[number]
        speed = 1.0
        if self.augment.warp:
            speed = float(np.clip(np.exp(generator.normal(0, self.augment.warp)), *SPEEDS))
        span = math.ceil(size * speed)
        if chosen is None:
            begin = int(generator.integers(0, max(1, len(track.samples) - span + 1)))
        else:  # some moment of the action lies anywhere in the piece
            moment = generator.uniform(chosen[1], chosen[2]) - generator.uniform(0, span)
            begin = int(np.clip(moment, 0, max(0, len(track.samples) - span)))
        taken = size if begin + span <= len(track.samples) else int((len(track.samples) - begin) / speed)
        near = (track.segments[:, 1] > begin) & (track.segments[:, 0] < begin + taken * speed)
        inside = (track.segments[near] - begin) / speed
        return resampled(track.samples, begin, speed, taken), inside, track.labels[near]


def resampled(samples: FloatArray, begin: int, speed: float, size: int) -> FloatArray:
    """`size` samples [size, C] of a recording [T, C] from its sample `begin` on, at `speed` times its pace.

    Between samples the signal is linear. Sample i stands for its period's centre, i + 0.5, as in the
    recording; what falls outside the centres of the first and the last sample repeats these.
    """
    if speed == 1.0:
        return samples[begin : begin + size]
    places = (begin + (np.arange(size) + 0.5) * speed - 0.5).clip(0, len(samples) - 1)
    before = places.astype(np.int64)
    after = np.minimum(before + 1, len(samples) - 1)
    weight = (places - before).astype(np.float32)[:, None]
    return samples[before] * (1 - weight) + samples[after] * weight


def augment(
    samples: FloatArray,
    mean: FloatArray,
    std: FloatArray,
    config: AugmentConfig,
    generator: np.random.Generator,
) -> FloatArray:
    """Disturb a crop [T, C] as another person or placement would; `mean` and `std` [C] set the units.

    A triad of the configuration that the crop has no channels for raises IndexError.
    """
    if config.rotate:
        for triad in () if config.triads == "auto" else config.triads:
            axes = list(triad)
            samples[:, axes] = samples[:, axes] @ rotation(config.rotate, generator).astype(np.float32)
    if config.scale:
        gain = np.exp(generator.normal(0, config.scale, samples.shape[1])).astype(np.float32)
        samples = (samples - mean) * gain + mean
    if config.shift:
        samples = samples + np.asarray(generator.normal(0, config.shift, samples.shape[1]), np.float32) * std
    if config.noise:
        spread = config.noise * generator.random()
        samples = samples + spread * std * generator.standard_normal(samples.shape, dtype=np.float32)
    if config.channel_drop and generator.random() < config.channel_drop:
        triads = () if config.triads == "auto" else config.triads
        groups = channel_groups(samples.shape[1], triads)
        if groups:
            # Last, so that nothing of the above disturbs the mean: the detector then sees exact zeros.
            group = groups[int(generator.integers(len(groups)))]
            samples[:, group] = mean[group]
    return samples.astype(np.float32, copy=False)


def triads_of(names: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    """Channels whose names say that they are x, y and z of one sensor: acc_x, acc_y, acc_z, or gyroX, ...

    What stands around the axis, as a unit does (acc_x_g), must be the same for the three, which must follow
    one another.
    """
    found: list[tuple[int, int, int]] = []
    place = 0
    while place + 2 < len(names):
        three = [_AXIS.sub("*", name.strip(), count=1) for name in names[place : place + 3]]
        axes = [
            match[0].lower() for name in names[place : place + 3] if (match := _AXIS.search(name.strip()))
        ]
        if axes == ["x", "y", "z"] and len(set(three)) == 1:
            found.append((place, place + 1, place + 2))
            place += 3
        else:
            place += 1
    return tuple(found)


def channel_groups(channels: int, triads: tuple[tuple[int, int, int], ...]) -> list[NDArray[np.int64]]:
    """What may fail together: the triads, and each channel of no triad; never all channels at once.

    Raises IndexError for a triad of channels that are not there.
    """
    every = np.arange(channels)
    groups = [np.unique(every[list(triad)]) for triad in triads]
    alone = np.setdiff1d(every, np.concatenate(groups)) if groups else every
    groups += list(alone[:, None])
    return [group for group in groups if len(group) < channels]


def rotation(degrees: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """A rotation [3, 3] by a normal angle of that standard deviation about a random axis (Rodrigues)."""
    axis = generator.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.deg2rad(generator.normal(0, degrees))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
