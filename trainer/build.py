"""From a configuration to a model, and from a run folder back to one: causal, or in full context."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError, DataError
from engine.yaml_file import load_yaml
from trainer.beats import BeatFront
from trainer.config import Config, read_config
from trainer.data import Corpus
from trainer.detector import Detector, DetectorShape
from trainer.front import FeatureFront, SignalFront
from trainer.offline import OfflineDetector
from trainer.pyramid import PyramidShape
from trainer.recipe import SIBLING, Recipe, is_recipe, read_recipe

CONFIG = "config.yaml"
CHECKPOINT = "checkpoint.pt"


def hop_of(config: Config, sample_rate: float) -> int:
    """Samples a frame: as configured, or what comes nearest to `frame_rate`; 1 for features."""
    if config.model.front == "features":
        return 1
    return config.model.hop or max(1, round(sample_rate / config.model.frame_rate))


def build_detector(config: Config, channels: int, classes: int, sample_rate: float) -> Detector:
    """A detector with fresh weights."""
    model = config.model
    if model.context != "causal":
        raise ConfigError(
            "`model.context: full` reads whole recordings; a live stream needs `context: causal`"
        )
    pyramid = PyramidShape(
        width=model.width,
        heads=model.heads,
        window=model.window,
        levels=model.levels,
        stem=model.stem,
        embed=model.embed,
        expansion=model.expansion,
        chunk=model.chunk,
        relative=model.relative,
        dropout=model.dropout,
        drop_path=model.drop_path,
    )
    hop = 0 if model.front == "features" else hop_of(config, sample_rate)
    return Detector(
        DetectorShape(
            channels,
            classes,
            pyramid,
            hop,
            model.stem_width,
            beats=model.beats if model.front == "beats" else 0,
            sample_rate=sample_rate,
        )
    )


def recipe_of(config: Config, classes: int) -> Recipe:
    """The recipe of the same pyramid in full context: windows to both sides, ActionFormer's heads.

    Ranges of regression double from level to level, as officially; a level's own is about its stride.
    """
    model, train = config.model, config.train
    levels = model.levels
    borders = [0, *(2 ** (level + 2) for level in range(levels - 1)), 10000]
    return Recipe.model_validate(
        {
            "dataset": {
                "num_classes": classes,
                "input_dim": model.width,
                "feat_stride": 1,
                "num_frames": 1,
                "max_seq_len": 2 ** (levels - 1) * 2 * model.window,
            },
            "model": {
                "backbone_arch": [model.embed, model.stem, levels - 1],
                "regression_range": list(pairwise(borders)),
                "n_head": model.heads,
                "n_mha_win_size": 2 * model.window + 1,
                "embd_dim": model.width,
                "fpn_dim": model.width,
                "head_dim": model.width,
                "use_rel_pe": model.relative,
            },
            "train_cfg": {
                "init_loss_norm": 10 * train.batch,
                "dropout": model.dropout,
                "droppath": model.drop_path,
            },
            "test_cfg": {"pre_nms_topk": 2000, "min_score": 0.001, "max_seg_num": 1000},
        }
    )


def build_offline(config: Config, channels: int, classes: int, sample_rate: float) -> OfflineDetector:
    """A detector in full context with the front and the sizes of a configuration, fresh weights."""
    model = config.model
    front: SignalFront | FeatureFront | BeatFront
    hop = hop_of(config, sample_rate)
    if model.front == "signal":
        front = SignalFront(channels, hop, model.width, model.stem_width)
    elif model.front == "beats":
        front = BeatFront(channels, hop, model.width, model.beats, sample_rate)
    else:
        front = FeatureFront(channels, model.width)
    return OfflineDetector(recipe_of(config, classes), front, model.expansion)


def describe(corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint must remember of its data."""
    return {
        "classes": list(corpus.classes),
        "channels": corpus.channels,
        "sample_rate": corpus.sample_rate,
    }


def refuse_trained(run: Path, way_out: str = "give --resume to go on, or another --output") -> None:
    """Raise ConfigError when `run` already holds a checkpoint."""
    if (run / CHECKPOINT).exists():
        raise ConfigError(f"{run}: holds a trained run already; {way_out}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours: tensors and plain values only, no code is unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such checkpoint; `onset train CONFIG --output RUN` makes one"
        ) from None
    except Exception as problem:
        raise DataError(f"{path}: not readable as a checkpoint: {problem}") from None
    if not isinstance(content, dict) or not {"step", "data", "model", "ema"} <= content.keys():
        raise DataError(f"{path}: not a checkpoint of `onset train`")
    return content


def read_settings(path: Path) -> Config | Recipe:
    """Read a training configuration: with `dataset_name`, a recipe in full context; else a causal one."""
    return read_recipe(path) if is_recipe(load_yaml(path)) else read_config(path)


def load_run(run: Path) -> tuple[Config, Detector, dict[str, Any]]:
    """The configuration, the causal detector with its averaged weights, and the checkpoint of a run."""
    config = read_settings(_config_of(run))
    if isinstance(config, Recipe) or config.model.context == "full":
        raise ConfigError(f"{run}: holds a detector in full context, which reads whole recordings; {SIBLING}")
    content = load_checkpoint(run / CHECKPOINT)
    facts = content["data"]
    detector = build_detector(config, facts["channels"], len(facts["classes"]), facts["sample_rate"])
    _fill(detector, content, run)
    return config, detector.eval(), content


def load_offline_run(run: Path) -> tuple[Recipe, OfflineDetector, dict[str, Any]]:
    """The same of a run in full context; its recipe, where it was trained on raw signals, is `recipe_of`."""
    settings = read_settings(_config_of(run))
    content = load_checkpoint(run / CHECKPOINT)
    if isinstance(settings, Recipe):
        detector = OfflineDetector(settings)
    elif settings.model.context == "full":
        facts = content["data"]
        detector = build_offline(settings, facts["channels"], len(facts["classes"]), facts["sample_rate"])
    else:
        raise ConfigError(f"{run}: holds a causal detector, expected a run in full context")
    recipe = detector.recipe
    _fill(detector, content, run)
    return recipe, detector.eval(), content


def _config_of(run: Path) -> Path:
    if not (run / CONFIG).is_file():
        raise DataError(
            f"{run}: not a run, there is no {CONFIG}; `onset train CONFIG --output RUN` makes one"
        )
    return run / CONFIG


def _fill(detector: Detector | OfflineDetector, content: dict[str, Any], run: Path) -> None:
    try:
        detector.load_state_dict(content["ema"])
    except RuntimeError:
        raise ConfigError(
            f"{run}: its weights do not fit the `model` of its {CONFIG}; put back the one that trained it, "
            "or train again if that was another version of Onset"
        ) from None
    if not all(bool(torch.isfinite(value).all()) for value in content["ema"].values()):
        raise DataError(f"{run}: its weights are not finite; train again with a smaller learning rate")
