"""From ActionFormer's layout to both contexts, as a user goes: import, evaluate, train the causal sibling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from engine.errors import ConfigError, DataError
from engine.manifest import read_bundle
from tests.trainer.synthetic import official_checkpoint, sibling, write_feature_set
from trainer.config import read_config
from trainer.data import load_corpus
from trainer.features import FeatureSet
from trainer.offline import OfflineDetector
from trainer.offline_evaluation import detect_all
from trainer.predictions import read_predictions, write_results
from trainer.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]


def onset(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onset", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_who_comes_from_the_official_code_imports_and_evaluates(tmp_path: Path) -> None:
    recipe = write_feature_set(tmp_path, missing=("video_11",))
    official_checkpoint(recipe, tmp_path / "epoch_001.pth.tar")
    done = onset("import", recipe, tmp_path / "epoch_001.pth.tar", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    done = onset("evaluate", tmp_path / "run", "--predictions", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "recall@5x" in done.stdout
    assert all(f"0.{digit}0" in done.stdout for digit in (3, 4, 5, 6, 7))
    assert "video_11" in done.stderr  # its features are missing, which is said
    saved = read_predictions(tmp_path / "found.json")
    assert set(saved.segments) == {"video_8", "video_9", "video_10"}
    assert any(saved.segments.values())
    scored = onset("score", tmp_path / "found.json", tmp_path / "annotations.json", "--json")
    evaluated = onset("evaluate", tmp_path / "run", "--json")
    (mine,) = json.loads(evaluated.stdout).values()
    assert json.loads(scored.stdout)["mean_ap"] == pytest.approx(mine["mean_ap"], abs=1e-9)
    again = onset("import", recipe, tmp_path / "epoch_001.pth.tar", "--output", tmp_path / "run")
    assert again.returncode == 2
    assert "another --output" in again.stderr
    resumed = onset("train", recipe, "--output", tmp_path / "run", "--resume")
    assert resumed.returncode == 2
    tuned = onset("train", recipe, "--output", tmp_path / "tuned", "--init", tmp_path / "run")
    assert tuned.returncode == 0, tuned.stderr
    exported = onset("export", tmp_path / "run", "--output", tmp_path / "bundle")
    assert exported.returncode == 2
    assert "_causal.yaml" in exported.stderr


def test_the_causal_sibling_learns_from_the_same_features(tmp_path: Path) -> None:
    write_feature_set(tmp_path, videos=24)
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    done = onset("train", sibling(tmp_path, steps=250), "--output", run)
    assert done.returncode == 0, done.stderr
    done = onset("evaluate", run, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["default thresholds"]
    assert scores["mean_ap"][0] > 0.6  # at tIoU 0.3
    done = onset("export", run, "--output", bundle)
    assert done.returncode == 0, done.stderr
    frame = read_bundle(bundle)[0].frame
    assert (frame.rate, frame.channels) == (3.75, 12)
    events = tmp_path / "events.jsonl"
    assert onset("detect", bundle, tmp_path / "features" / "video_20.npy", "-o", events).returncode == 0
    assert "action.ended" in events.read_text()


def test_features_that_do_not_fit_say_so_before_anything_is_written(tmp_path: Path) -> None:
    path = write_feature_set(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["dataset"]["input_dim"], values["loader"]["num_workers"] = 13, 2
    path.write_text(yaml.safe_dump(values))
    done = onset("train", path, "--output", tmp_path / "run")
    assert done.returncode == 2
    assert "12 wide" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    values["dataset"]["input_dim"] = 12
    path.write_text(yaml.safe_dump(values))
    np.save(tmp_path / "features" / "video_5.npy", np.zeros((100, 11), np.float32))
    done = onset("train", path, "--output", tmp_path / "run")
    assert done.returncode == 2
    assert "11 wide" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_lie_where_the_features_show_them(tmp_path: Path) -> None:
    write_feature_set(tmp_path)
    config = read_config(sibling(tmp_path))
    agree = []
    for track in load_corpus(config.data, "train").tracks:
        centre = np.arange(len(track.samples)) + 0.5
        for (start, end), label in zip(track.segments, track.labels, strict=True):
            shown = track.samples[:, 4 * label : 4 * label + 4].mean(axis=1) > 1.5
            near = (centre > start - 4) & (centre < end + 4)
            agree.append((shown == ((centre >= start) & (centre < end)))[near].mean())
    assert np.mean(agree) > 0.97


def test_a_videos_own_frame_rate_places_its_labels_and_the_nominal_one_is_asked_for(tmp_path: Path) -> None:
    write_feature_set(tmp_path)
    document = json.loads((tmp_path / "annotations.json").read_text())
    document["database"]["video_0"]["fps"] = 25.0
    (tmp_path / "annotations.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"data\.sample_rate"):
        load_corpus(read_config(sibling(tmp_path)).data, "train")
    data = read_config(sibling(tmp_path, sample_rate=3.75)).data
    corpus = load_corpus(data, "train")
    assert corpus.sample_rate == 3.75
    start = document["database"]["video_0"]["annotations"][0]["segment"][0]
    assert corpus.tracks[0].segments[0, 0] == pytest.approx(start * 25 / 8 - 0.5)


def test_folders_are_joined_and_missing_recordings_left_out_where_asked(tmp_path: Path) -> None:
    write_feature_set(tmp_path, missing=("video_1",))
    other = tmp_path / "other"
    other.mkdir()
    for path in (tmp_path / "features").glob("*.npy"):
        np.save(other / path.name, np.load(path)[:, :5])
    with pytest.raises(DataError, match="video_1"):
        load_corpus(read_config(sibling(tmp_path)).data, "train")
    data = read_config(sibling(tmp_path, recordings=["features", "other"], skip_missing=True)).data
    corpus = load_corpus(data, "train")
    assert corpus.channels == 17
    assert "video_1" not in [track.name for track in corpus.tracks]


def test_one_class_needs_scores_that_name_the_others(tmp_path: Path) -> None:
    path = write_feature_set(tmp_path, kind="anet")
    values = yaml.safe_load(path.read_text())
    values["dataset"]["num_classes"] = 1
    values["test_cfg"]["multiclass_nms"] = False
    path.write_text(yaml.safe_dump(values))
    recipe = read_recipe(path)
    detector = OfflineDetector(recipe).eval()
    data = FeatureSet(recipe, recipe.val_split, training=False)
    with pytest.raises(ConfigError, match="ext_score_file"):
        detect_all(detector, data)
    scores = {video.name: [0.1, 0.7, 0.2] for video in data.videos}
    (tmp_path / "scores.json").write_text(json.dumps({"results": scores}))
    test = recipe.test_cfg.model_copy(update={"ext_score_file": tmp_path / "scores.json"})
    detector.recipe = recipe.model_copy(update={"test_cfg": test})
    found = detect_all(detector, data)
    assert {item.label for items in found.segments.values() for item in items} == {"bbb", "ccc"}
    write_results(tmp_path / "out.json", found)
    assert read_predictions(tmp_path / "out.json").segments == found.segments
