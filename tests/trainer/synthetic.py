"""Small data sets whose truth is plain to see: an action of class k raises some channels by 3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from trainer.offline import OfflineDetector
from trainer.recipe import read_recipe


def write_data_set(folder: Path, steps: int, recordings: int = 6) -> Path:
    """Recordings of one minute at 25 Hz with 3 channels; returns the path of a training configuration."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    database = {}
    for number in range(recordings):
        samples = random.normal(0, 0.3, (1500, 3)).astype(np.float32)
        annotations, at = [], float(random.uniform(1, 3))
        while at < 54:
            length, label = float(random.uniform(2, 6)), int(random.integers(2))
            first, last = round(at * 25), round((at + length) * 25)
            samples[first:last, label] += 3.0
            annotations.append({"segment": [first / 25, last / 25], "label": "ab"[label]})
            at += length + float(random.uniform(1, 3))
        np.save(data / f"r{number}.npy", samples)
        subset = "train" if number < recordings - 2 else "test"
        database[f"r{number}"] = {"subset": subset, "duration": 60.0, "fps": 25.0, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps({"classes": ["a", "b"], "database": database}))
    path = folder / "config.yaml"
    path.write_text(
        "name: synthetic\n"
        "data: {annotations: annotations.json, recordings: data}\n"
        "model: {width: 24, stem_width: 16, heads: 2, levels: 4, window: 8, chunk: 2, stem: 1}\n"
        "augment: {scale: 0.1, shift: 0.05, rotate: 0, warp: 0, channel_drop: 0}\n"
        f"train: {{steps: {steps}, batch: 4, crop: 20, warmup: 10, learning_rate: 0.005, ema: 0.97}}\n"
    )
    return path


def write_feature_set(
    folder: Path, kind: str = "thumos", videos: int = 12, missing: tuple[str, ...] = (), epochs: int = 2
) -> Path:
    """Features of short videos in the layout of `kind`, and a small recipe of them; returns its path.

    A vector covers 16 frames of a video of 30 fps, every 8. An action of class k raises vectors 4 k to
    4 k + 3. The last third of the videos is for testing.
    """
    rng = np.random.default_rng(7)
    (folder / "features").mkdir(parents=True)
    database: dict[str, Any] = {}
    for number in range(videos):
        name, frames = f"video_{number}", int(rng.integers(90, 128))
        vectors = rng.standard_normal((frames, 12)).astype(np.float32)
        annotations, at = [], 6.0
        while at < frames - 25:
            label, length = int(rng.integers(0, 3)), float(rng.uniform(5, 20))
            centre = np.arange(frames)
            vectors[(centre >= at) & (centre < at + length), 4 * label : 4 * label + 4] += 3.0
            seconds = [(t * 8 + 8) / 30 for t in (at, at + length)]
            annotations.append({"segment": seconds, "label": "abc"[label] * 3, "label_id": label})
            at += length + float(rng.uniform(8, 20))
        database[name] = {
            "subset": "Test" if number >= videos * 2 // 3 else "Validation",
            "duration": ((frames - 1) * 8 + 16) / 30,
            "fps": 30.0,
            "annotations": annotations,
        }
        if name not in missing:
            np.save(folder / "features" / f"{name}.npy", vectors)
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    recipe = {
        "dataset_name": kind,
        "train_split": ["validation"],
        "val_split": ["test"],
        "dataset": {
            "json_file": str(folder / "annotations.json"),
            "feat_folder": str(folder / "features"),
            "num_classes": 3,
            "input_dim": 12,
            "feat_stride": 8,
            "num_frames": 16,
            "max_seq_len": 128,
            "crop_ratio": [0.9, 1.0],
        },
        "model": {
            "backbone_arch": [2, 1, 3],
            "regression_range": [[0, 4], [4, 8], [8, 16], [16, 10000]],
            "n_mha_win_size": 9,
            "embd_dim": 32,
            "fpn_dim": 32,
            "head_dim": 32,
        },
        "train_cfg": {"init_loss_norm": 20, "clip_grad_l2norm": -1, "droppath": 0.0},
        "test_cfg": {"min_score": 0.001, "max_seg_num": 100},
        "opt": {"learning_rate": 0.003, "epochs": epochs, "warmup_epochs": 1, "weight_decay": 0.05},
        "loader": {"batch_size": 2, "num_workers": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder / "recipe.yaml"


def sibling(folder: Path, steps: int = 3, **data: object) -> Path:
    """A causal configuration of `write_feature_set`'s features."""
    values = {
        "name": "sibling",
        "data": {
            "annotations": "annotations.json",
            "recordings": "features",
            "features": {"stride": 8, "covers": 16},
            "train": ["validation"],
            "test": ["test"],
            **data,
        },
        "model": {
            "front": "features", "chunk": 1, "width": 32, "heads": 2, "levels": 4, "window": 8, "stem": 1,
        },
        "augment": {"scale": 0, "shift": 0, "warp": 0, "channel_drop": 0},
        "train": {
            "steps": steps, "batch": 4, "crop": 30, "reach": 2, "learning_rate": 0.005, "warmup": 10,
            "ema": 0.97,
        },
    }  # fmt: skip
    (folder / "causal.yaml").write_text(yaml.safe_dump(values))
    return folder / "causal.yaml"


def official_checkpoint(recipe: Path, target: Path) -> None:
    """A checkpoint with the official code's names and shapes, of random weights."""
    torch.manual_seed(0)
    state = {}
    for name, value in OfflineDetector(read_recipe(recipe)).state_dict().items():
        if name == "scale":
            state |= {f"module.reg_head.scale.{i}.scale": v.clone() for i, v in enumerate(value)}
            continue
        parts = name.split(".")
        official = (
            name.replace("backbone.embed", "backbone.embd")
            .replace("attention", "attn").replace("norm1", "ln1").replace("norm2", "ln2")
            .replace("neck.norms", "neck.fpn_norms").replace("classify.out", "cls_head.cls_head")
            .replace("regress.out", "reg_head.offset_head").replace("classify.convs", "cls_head.head")
            .replace("regress.convs", "reg_head.head").replace("classify.norms", "cls_head.norm")
            .replace("regress.norms", "reg_head.norm")
        )  # fmt: skip
        dense = parts[1] == "embed" or (parts[0] in ("classify", "regress") and parts[1] in ("convs", "out"))
        if dense:
            official = official.rsplit(".", 1)[0] + ".conv." + parts[-1]
            if parts[-1] == "weight":
                value = value.reshape(3, -1, value.shape[1]).permute(2, 1, 0)
        elif parts[-2].endswith("_conv"):
            official, value = official.replace("_conv.", "_conv.conv."), value.T[:, None]
        elif "norm" in parts[-2] or "norm" in name.split(".")[-3] or "ln" in official.split(".")[-2]:
            value = value[None, :, None]
        elif parts[-1] == "weight":
            value = value[:, :, None]
        state["module." + official] = value.clone()
    torch.save({"epoch": 1, "state_dict": state, "state_dict_ema": state}, target)
