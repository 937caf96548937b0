"""A training step in full context is the official one: targets, losses, normaliser, gradient, schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.errors import ConfigError
from tests.trainer.synthetic import write_feature_set
from trainer.annotations import read_annotations
from trainer.build import load_checkpoint, load_offline_run
from trainer.features import Clip, FeatureSet
from trainer.moments import assign, places
from trainer.official import fill, read_official, renamed
from trainer.offline_evaluation import detect_all
from trainer.offline_training import EMA, OfflineTask, learning_rate, train_offline
from trainer.recipe import OptRecipe, read_recipe
from trainer.scoring import score
from trainer.train import Loop

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TRAINED = sorted(
    path.stem
    for path in GOLDEN.glob("*.npz")
    if path.with_suffix(".yaml").exists() and "loss_grad_l2" in np.load(path)
)


def clips_of(golden: dict[str, np.ndarray]) -> list[Clip]:
    return [
        Clip(
            name=f"clip {b}",
            features=np.ascontiguousarray(golden[f"train_feats_{b}"].T),
            segments=golden[f"train_segments_{b}"],
            labels=golden[f"train_labels_{b}"],
            fps=30.0,
            duration=1e8,
            stride=4.0,
            num_frames=16.0,
        )
        for b in range(sum(key.startswith("train_feats_") for key in golden))
    ]


class _Clips:
    """A feature set of clips in memory."""

    def __init__(self, clips: list[Clip], classes: int) -> None:
        self.clips, self.classes = clips, tuple(f"c{i}" for i in range(classes))
        self.empty: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> Clip:
        return self.clips[index]


def task_of(name: str) -> tuple[OfflineTask, dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = dict(arrays)
    recipe = read_recipe(GOLDEN / f"{name}.yaml")
    recipe = recipe.model_copy(
        update={"loader": recipe.loader.model_copy(update={"batch_size": 2, "num_workers": 0})}
    )
    task = OfflineTask(recipe, _Clips(clips_of(golden), recipe.dataset.num_classes))  # type: ignore[arg-type]
    path = GOLDEN / f"{name}.pth.tar"
    fill(task.model, renamed(read_official(path)["state_dict"]), path)
    return task, golden


@pytest.mark.parametrize("name", TRAINED)
def test_the_training_step_is_the_official_one(name: str) -> None:
    task, golden = task_of(name)
    task.model.train()
    loss, parts = task.losses_of(task.model, clips_of(golden))
    for key in ("cls_loss", "reg_loss", "final_loss"):
        assert float(parts[key].detach()) == pytest.approx(float(golden[f"loss_{key}"]), rel=1e-5)
    loss.backward()
    squares = [float((p.grad.double() ** 2).sum()) for p in task.model.parameters() if p.grad is not None]
    assert np.sqrt(sum(squares)) == pytest.approx(float(golden["loss_grad_l2"]), rel=1e-4)
    assert task.normaliser == pytest.approx(float(golden["loss_normalizer_after"]), rel=1e-9)


@pytest.mark.parametrize("name", TRAINED)
def test_targets_are_the_official_ones(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = dict(arrays)
    recipe = read_recipe(GOLDEN / f"{name}.yaml")
    strides, train = recipe.model.strides, recipe.train_cfg
    at = places([recipe.dataset.max_seq_len // s for s in strides], strides, recipe.model.regression_range)
    wanted, distances = assign(
        at,
        torch.from_numpy(golden["train_segments_0"]),
        torch.from_numpy(golden["train_labels_0"]),
        recipe.dataset.num_classes,
        train.center_sample_radius if train.center_sample == "radius" else None,
    )
    np.testing.assert_array_equal(wanted.numpy(), golden["label_cls_0"])
    np.testing.assert_array_equal(distances.numpy(), golden["label_offsets_0"])


def test_a_whole_step_of_the_optimiser_is_the_official_one(tmp_path: Path) -> None:
    """AdamW after clipping at 1, and the average of the weights: the lengths of the two moves."""
    golden = json.loads((GOLDEN / "grad.json").read_text())
    task, _ = task_of("thumos_short")
    opt = OptRecipe(weight_decay=0.05, learning_rate=1e-3, warmup=False, epochs=1000)
    task.recipe = task.recipe.model_copy(update={"opt": opt})
    task.clip = 1.0
    loop = Loop(task, tmp_path)
    before = {name: p.detach().double().clone() for name, p in task.model.named_parameters()}
    order = task._keys(0)[0]
    assert sorted(index for _, _, index in order) == [0, 1]
    task.losses = lambda model, step: task.losses_of(model, [task.data.read(i) for i in (0, 1)])  # type: ignore[method-assign]
    loop.advance()

    def length(values: dict[str, torch.Tensor]) -> float:
        return float(torch.sqrt(sum(((values[n].double() - before[n]) ** 2).sum() for n in before)))

    after = {name: p.detach() for name, p in task.model.named_parameters()}
    assert length(after) == pytest.approx(golden["step_l2"], rel=1e-5)
    assert length(loop.average) == pytest.approx(golden["ema_step_l2"], rel=1e-3)
    assert EMA == 0.999


def test_schedules_are_the_official_ones() -> None:
    cases = json.loads((GOLDEN / "schedule.json").read_text())
    assert set(cases) == {"warmup_cosine", "warmup_multistep", "cosine"}
    for case in cases.values():
        opt = OptRecipe.model_validate(case["opt"])
        mine = [learning_rate(step, opt, 5) for step in range(len(case["lr_used_by_iteration"]))]
        assert mine == pytest.approx(case["lr_used_by_iteration"], rel=1e-9, abs=1e-15)


def test_resuming_continues_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = read_recipe(write_feature_set(tmp_path))
    recipe = recipe.model_copy(
        update={"train_cfg": recipe.train_cfg.model_copy(update={"dropout": 0.1, "droppath": 0.1})}
    )
    train_offline(recipe, tmp_path / "whole")
    half = Loop(OfflineTask(recipe, FeatureSet(recipe, recipe.train_split, training=True)), tmp_path / "half")
    half.run.mkdir()
    for _ in range(5):
        half.advance()
    half.save()
    train_offline(recipe, tmp_path / "half", resume=True)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "half"))
    assert a["step"] == b["step"] == 12
    for part in ("model", "ema"):
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name


@pytest.mark.parametrize("balance", [1.0, -1.0])
def test_two_processes_take_the_step_of_one(tmp_path: Path, balance: float) -> None:
    """torchrun on two processes over gloo: the same weights as one process with the whole batch."""
    path = write_feature_set(tmp_path)
    values = yaml.safe_load(path.read_text())
    values["train_cfg"]["loss_weight"] = balance
    values["opt"]["type"] = "SGD"  # Adam's division would blow up the last bits of tiny gradients
    path.write_text(yaml.safe_dump(values))
    train_offline(read_recipe(path), tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "onset", "train", str(path), "--output", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    assert one["step"] == two["step"] == 12
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert one["random"][0]["task"]["normaliser"] == pytest.approx(two["random"][0]["task"]["normaliser"])


def test_it_learns_what_is_there(tmp_path: Path) -> None:
    """Half a minute of training at most: the actions of unseen recordings are found."""
    recipe = read_recipe(write_feature_set(tmp_path, videos=24, epochs=24))
    run = tmp_path / "run"
    train_offline(recipe, run)
    _, detector, content = load_offline_run(run)
    detector.load_state_dict(content["model"])  # the average is still young after so few steps
    found = detect_all(detector, FeatureSet(recipe, recipe.val_split, training=False))
    truth = read_annotations(tmp_path / "annotations.json")
    scores = score(found, truth, "test", (0.3, 0.5))
    assert scores.average_mean_ap > 0.8


def test_weights_to_begin_with_must_fit(tmp_path: Path) -> None:
    recipe = read_recipe(write_feature_set(tmp_path))
    train_offline(recipe, tmp_path / "first")
    begun = Loop(OfflineTask(recipe, FeatureSet(recipe, recipe.train_split, training=True)), tmp_path / "x")
    begun._begin_with(tmp_path / "first")
    expected = load_checkpoint(tmp_path / "first" / "checkpoint.pt")["ema"]
    assert all(torch.equal(begun.average[name], expected[name]) for name in expected)
    wider = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"embd_dim": 64, "fpn_dim": 64})}
    )
    with pytest.raises(ConfigError, match="do not fit"):
        train_offline(wider, tmp_path / "second", init=tmp_path / "first")
