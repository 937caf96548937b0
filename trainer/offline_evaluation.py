"""A detector in full context on a feature data set: what it detects in each recording of a subset."""

from __future__ import annotations

import logging

import numpy as np
from rich.console import Console
from rich.progress import track

from engine.errors import ConfigError, DataError
from trainer import fusion
from trainer.features import FeatureSet
from trainer.offline import OfflineDetector
from trainer.predictions import Detection, Predictions, detections, of_segments

log = logging.getLogger(__name__)


def detect_all(detector: OfflineDetector, data: FeatureSet) -> Predictions:
    """Detect in every recording of `data`; classes come from external scores where the recipe names them.

    Raises ConfigError where the recipe has one class and nothing names the classes, DataError for features or
    scores that cannot be used.
    """
    recipe = detector.recipe
    scores = None
    if recipe.test_cfg.ext_score_file is not None:
        scores = fusion.read_scores(recipe.test_cfg.ext_score_file)
        fusion.check_covered(scores, [video.name for video in data.videos])
    elif recipe.dataset.num_classes < len(data.classes):
        raise ConfigError(
            f"`dataset.num_classes` is {recipe.dataset.num_classes} and the annotations have "
            f"{len(data.classes)} classes; set `test_cfg.ext_score_file` to the scores that name them"
        )
    found: dict[str, tuple[Detection, ...]] = {}
    for index in track(range(len(data)), "detecting", console=Console(stderr=True)):
        clip = data.read(index)
        segments, values, labels = (
            part.cpu().numpy()
            for part in detector.detect(
                clip.features,
                fps=clip.fps,
                feat_stride=clip.stride,
                num_frames=clip.num_frames,
                duration=clip.duration,
            )
        )
        if scores is not None:
            fused = fusion.fuse(segments, values, scores[clip.name])
            segments, values, labels = (np.asarray(part) for part in fused)
        if len(labels) and int(labels.max()) >= len(data.classes):
            raise DataError(
                f"`{clip.name}`: class {int(labels.max())} has no name, the annotations have "
                f"{len(data.classes)}; do the external scores belong to them?"
            )
        found[clip.name] = detections(segments, values, labels, data.classes)
    return of_segments(found)
