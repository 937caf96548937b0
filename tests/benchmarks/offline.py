"""What ActionFormer costs in full context, Onset's against the original's (see `peer`): the same weights, the
same inputs, and the same answers, which is checked before anything is timed.

- the floor of a forward pass: one `torch.mm` of as many operations as its matrix products have;
- without a peer, nothing else is measured.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.suppression import suppress
from tests.benchmarks.pairs import Row, Work, paired
from tests.benchmarks.peer import Peer
from trainer.annotations import read_annotations
from trainer.blocks import Conv, DropPath
from trainer.features import Clip
from trainer.official import fill, renamed
from trainer.offline import OfflineDetector
from trainer.offline_training import OfflineTask
from trainer.predictions import Detection, Predictions, Start
from trainer.recipe import Recipe, read_recipe
from trainer.scoring import Scores, parse_tious, score
from trainer.train import Loop

ROOT = Path(__file__).resolve().parents[2]
RELEASED = ROOT / "tests" / "golden" / "thumos14_actionformer"  # the original's published detections
FRAMES = (2304, 300)
BATCHES = ((2304, 2304), (1200, 800))
ORIGINAL = "the original's"
# EPIC-KITCHENS' verbs, the same as short as on THUMOS14, and ActivityNet's proposals.
NMS: dict[str, dict[str, Any]] = {
    "97 classes, best 2000": {"per_class": True, "sigma": 0.4, "max_segments": 2000},
    "97 classes, best 200": {"per_class": True, "sigma": 0.4, "max_segments": 200},
    "any class, voting, best 100": {
        "per_class": False, "sigma": 0.75, "max_segments": 100, "voting_threshold": 0.9,
    },
}  # fmt: skip


def measure(peer: Peer | None) -> tuple[list[Row], dict[str, float]]:
    """The rows, and the largest difference of the answers of each pair."""
    torch.manual_seed(0)
    recipe = read_recipe(ROOT / "configs" / "thumos14_i3d.yaml")
    rows: list[Row] = []
    differ: dict[str, float] = {}
    model = None if peer is None else peer.model().eval()
    detector = OfflineDetector(recipe).eval()
    if model is not None:
        fill(detector, renamed(model.state_dict()), Path("the original's model"))
    width = _operations(detector) // (2 * 2048)
    for frames in FRAMES:
        clip, what = torch.randn(frames, 2048), f"forward, {frames} frames"
        mine = _forward(detector, clip)
        left, right = torch.randn(frames, 2048), torch.randn(2048, width)
        rows.append(paired(what, mine, "its products as one torch.mm", _product(left, right), 10))
        if peer is not None:
            theirs = _original_forward(peer, model, clip)
            differ[what] = _difference(what, _flat(mine()), _flat(theirs()), 1e-3)
            rows.append(paired(f"{ORIGINAL} {what}", theirs, "Onset's", mine, 10))
    if peer is not None:
        for measured in (_training(peer, model, recipe), _suppression(peer), _evaluation(peer)):
            rows += measured[0]
            differ |= measured[1]
    return rows, differ


def _operations(detector: OfflineDetector) -> int:
    """Operations a frame of all matrix products, without the attention's own, which are a few thousandths."""
    count = 0

    def add(module: nn.Module, _: object, y: Tensor) -> None:
        nonlocal count
        count += 2 * y.numel() * module.weight.numel() // y.shape[-1]  # type: ignore[operator]

    hooks = [m.register_forward_hook(add) for m in detector.modules() if isinstance(m, Conv | nn.Linear)]
    frames = detector.recipe.dataset.max_seq_len
    with torch.no_grad():
        detector(torch.zeros(1, frames, 2048))
    for hook in hooks:
        hook.remove()
    return count // frames


def _forward(detector: OfflineDetector, clip: Tensor) -> Any:
    def forward() -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return [(level.cls_logits, level.offsets) for level in detector(clip[None])]

    return forward


def _original_forward(peer: Peer, model: Any, clip: Tensor) -> Any:
    features = clip.T.contiguous()

    def forward() -> list[tuple[Tensor, Tensor]]:
        levels = peer.levels(model, features)
        return [(logits.transpose(1, 2), offsets.transpose(1, 2)) for logits, offsets in levels]

    return forward


def _product(left: Tensor, right: Tensor) -> Work:
    return lambda: torch.mm(left, right)


def _flat(levels: list[tuple[Tensor, Tensor]]) -> list[NDArray[np.float32]]:
    return [part.numpy() for level in levels for part in level]


def _difference(what: str, mine: Sequence[Any], theirs: Sequence[Any], tolerance: float) -> float:
    """The largest difference; ends the benchmark where it is above the tolerance."""
    largest = 0.0
    for a, b in zip(map(np.asarray, mine), map(np.asarray, theirs), strict=True):
        if a.shape != b.shape:
            raise SystemExit(f"{what}: the original's answer has the shape {b.shape}, Onset's {a.shape}")
        largest = max(largest, float(np.abs(a - b).max()))
    if not largest <= tolerance:
        raise SystemExit(f"{what}: the answers differ by {largest:.1e}, more than {tolerance:g}")
    return largest


class _Clips:
    """A feature set of clips in memory."""

    def __init__(self, clips: list[Clip], classes: int) -> None:
        self.clips, self.classes = clips, tuple(f"c{label}" for label in range(classes))
        self.empty: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> Clip:
        return self.clips[index]


class _Task(OfflineTask):
    """Learns the same clips at every step."""

    clips: list[Clip]

    def losses(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.losses_of(model, self.clips)


def _clip(frames: int, random: np.random.Generator) -> Clip:
    """Noise, and one action of 4 to 64 frames for every 100."""
    start = random.uniform(0, frames - 64, frames // 100)
    segments = np.stack([start, start + random.uniform(4, 64, len(start))], axis=1).astype(np.float32)
    features = random.standard_normal((frames, 2048), dtype=np.float32)
    labels = random.integers(0, 20, len(start))
    return Clip("", features, segments, labels, fps=30.0, duration=1e8, stride=4.0, num_frames=16.0)


def _training(peer: Peer, model: Any, recipe: Recipe) -> tuple[list[Row], dict[str, float]]:
    """A step of two clips: forward, backward, clipping, AdamW, averaged weights."""
    random = np.random.default_rng(0)
    batches: dict[str, list[Clip]] = {}
    for lengths in BATCHES:
        what = f"training step, {' + '.join(map(str, lengths))} frames"
        batches[what] = [_clip(frames, random) for frames in lengths]
    clips = [clip for batch in batches.values() for clip in batch]
    task = _Task(recipe, _Clips(clips, recipe.dataset.num_classes))  # type: ignore[arg-type]
    fill(task.model, renamed(model.state_dict()), Path("the original's model"))
    differ: dict[str, float] = {}
    for what, task.clips in batches.items():
        for network in (model, task.model):
            _train_without_drops(network)
        parts, theirs = task.losses(task.model, 0)[1], model(_videos(task.clips))
        mine, other = ([float(losses[name].detach()) for name in parts] for losses in (parts, theirs))
        differ[f"losses, {what}"] = _difference(what, mine, other, 1e-3)
    loop = Loop(task, Path())
    rows: list[Row] = []
    for what, task.clips in batches.items():
        step = peer.trained(model, _videos(task.clips))
        rows.append(paired(f"{ORIGINAL} {what}", step, "Onset's", loop.advance, 3))
    return rows, differ


def _videos(clips: list[Clip]) -> list[dict[str, Tensor]]:
    """Clips as the original has them."""
    return [
        {
            "feats": torch.from_numpy(clip.features).T.contiguous(),
            "segments": torch.from_numpy(clip.segments),
            "labels": torch.from_numpy(clip.labels),
        }
        for clip in clips
    ]


def _train_without_drops(network: nn.Module) -> None:
    """Training mode, except for what drops branches at random."""
    network.train()
    for module in network.modules():
        if type(module).__name__ in ("AffineDropPath", DropPath.__name__):
            module.eval()


def _candidates(
    number: int, classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Segments, scores and labels in 700 frames. Scores are 0.001 + 0.999 Beta(0.4, 3), most of them low:
    their median is 0.05 and their 95 % quantile 0.46, as of the original's published detections. Lengths are
    log-normal with a median of 18 frames, and so are the frequencies of the classes, spread by 1.1."""
    random = np.random.default_rng(0)
    share = np.exp(random.normal(0, 1.1, classes))
    labels = random.choice(classes, number, p=share / share.sum())
    centre, half = random.uniform(0, 700, number), 9 * np.exp(random.normal(0, 1, number))
    segments = np.stack([centre - half, centre + half], axis=1).astype(np.float32)
    return segments, (0.001 + 0.999 * random.beta(0.4, 3, number)).astype(np.float32), labels


def _suppression(peer: Peer) -> tuple[list[Row], dict[str, float]]:
    rows: list[Row] = []
    differ: dict[str, float] = {}
    found = _candidates(5000, 97)
    tensors = [torch.from_numpy(part) for part in found]
    for name, settings in NMS.items():
        what = f"soft NMS, 5000 candidates, {name}"

        def mine(settings: dict[str, Any] = settings) -> list[Any]:
            return list(suppress(*found, **settings))

        def theirs(settings: dict[str, Any] = settings) -> list[Any]:
            kept = peer.suppress(
                *tensors,
                iou_threshold=0.1,
                min_score=0.001,
                max_seg_num=settings["max_segments"],
                multiclass=settings["per_class"],
                sigma=settings["sigma"],
                voting_thresh=settings.get("voting_threshold", 0.0),
            )
            return [part.numpy() for part in kept]

        differ[what] = _difference(what, mine(), theirs(), 1e-3)
        rows.append(paired(f"{ORIGINAL} {what}", theirs, "Onset's", mine, 50))
    return rows, differ


def _evaluation(peer: Peer) -> tuple[list[Row], dict[str, float]]:
    """mAP and recall of the released detections, the reading of the annotations included."""
    tious = parse_tious("0.3:0.7:0.1")
    with tempfile.TemporaryDirectory() as folder, np.load(RELEASED / "predictions.npz") as arrays:
        truth = Path(folder) / "truth.json"
        truth.write_bytes(gzip.decompress((RELEASED / "ground_truth.json.gz").read_bytes()))
        keys = {"t-start": "t_start", "t-end": "t_end", "label": "label", "score": "score"}
        said: dict[str, Any] = {theirs: arrays[mine] for theirs, mine in keys.items()}
        said["video-id"] = arrays["video_ids"][arrays["video_index"]].tolist()
        predictions = _predictions(said, read_annotations(truth).classes)

        def mine() -> Scores:
            return score(predictions, read_annotations(truth), "test", tious)

        def theirs() -> tuple[Any, Any]:
            return peer.evaluate(truth, said, tious)

        scores, (mean_ap, recall), what = mine(), theirs(), "evaluation of 42,400 detections"
        for value in (scores.average_mean_ap, float(np.mean(mean_ap))):
            if round(100 * value, 2) != 66.83:
                raise SystemExit(f"{what}: an average mAP of {100 * value:.2f}, and 66.83 was published")
        values = (scores.mean_ap, np.stack([scores.recall_1x, scores.recall_5x], axis=1))
        differ = _difference(what, values, (mean_ap, recall), 1e-9)
        return [paired(f"{ORIGINAL} {what}", theirs, "Onset's", mine, 1)], {what: differ}


def _predictions(said: dict[str, Any], classes: tuple[str, ...]) -> Predictions:
    segments: dict[str, list[Detection]] = {}
    columns = (said["video-id"], *(said[key].tolist() for key in ("t-start", "t-end", "label", "score")))
    for name, start, end, label, value in zip(*columns, strict=True):
        segments.setdefault(name, []).append(Detection(start, end, classes[label], value))
    starts = {
        name: tuple(Start(item.start, item.label, item.score) for item in items)
        for name, items in segments.items()
    }
    return Predictions({name: tuple(items) for name, items in segments.items()}, starts)
