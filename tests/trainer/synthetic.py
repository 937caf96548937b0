"""A small data set whose truth is plain to see: an action of class k raises channel k by 3."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


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
        f"train: {{steps: {steps}, batch: 4, crop: 20, warmup: 10, learning_rate: 0.005, ema: 0.97}}\n"
    )
    return path
