"""Configurations in ActionFormer's layout: what loads, what is refused, and the recipes that are shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from engine.errors import ConfigError
from trainer.build import build_detector, read_settings
from trainer.config import Config
from trainer.offline import OfflineDetector
from trainer.recipe import Recipe, read_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if "dataset_name" in yaml.safe_load(path.read_text())
)


def written(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_the_defaults_are_the_official_ones(tmp_path: Path) -> None:
    recipe = read_recipe(written(tmp_path, "dataset_name: epic\n"))
    assert (recipe.dataset.input_dim, recipe.dataset.num_classes) == (2304, 97)
    assert (recipe.train_cfg.droppath, recipe.train_cfg.init_loss_norm) == (0.1, 2000)
    assert (recipe.test_cfg.min_score, recipe.test_cfg.voting_thresh) == (0.01, 0.75)
    assert (recipe.opt.epochs, recipe.opt.warmup_epochs, recipe.opt.weight_decay) == (30, 5, 0.0)
    assert recipe.init_rand_seed == 1234567891


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {n_heads: 8}", "did you mean `n_head`"),
        ("datasets: {}", "did you mean `dataset`"),
        ("test_cfg: {nms_methods: soft}", "did you mean `nms_method`"),
        ("model: {backbone_type: resnet}", "convTransformer"),
        ("model: {backbone_arch: [2, 2, 4]}", "6 ranges for 5 levels"),
        ("model: {n_mha_win_size: [7, 7]}", "2 windows for 6 levels"),
        ("model: {n_mha_win_size: 19}\ndataset: {max_seq_len: 2000}", "not a multiple of"),
        ("model: {embd_dim: 256}", "needs `fpn_dim`"),
        ("dataset: {input_dim: [4, 4]}", "two numbers, or two lists"),
        ("dataset: {input_dim: [4, 4]}\nmodel: {embd_dim: [512]}", "joins 2 features"),
        ("model: {head_num_layers: 1, head_dim: 8}", "needs `head_dim`"),
        ("train_cfg: {head_empty_cls: [97]}", "head_empty_cls"),
        ("dataset: {max_seq_len: 17179869184}", "max_seq_len"),
        ("dataset: {file_ext: .pkl}", "expected .npy or .npz"),
        ("context: causal", "_causal.yaml"),
    ],
)
def test_what_cannot_be_is_said_with_its_key(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_recipe(written(tmp_path, f"dataset_name: epic\n{text}\n"))


def test_every_data_set_of_actionformer_has_a_recipe() -> None:
    ego4d = [
        "slowfast",
        "omnivore",
        "egovlp",
        "slowfast_egovlp",
        "omnivore_egovlp",
        "slowfast_omnivore_egovlp",
    ]
    others = ["thumos14_i3d", "anet13_tsp", "anet13_i3d", "epic100_verb", "epic100_noun"]
    assert sorted([*others, *(f"ego4d_{name}" for name in ego4d)]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_and_its_causal_sibling_fit_together(name: str) -> None:
    recipe, sibling = (read_settings(CONFIGS / f"{stem}.yaml") for stem in (name, f"{name}_causal"))
    assert isinstance(recipe, Recipe)
    assert isinstance(sibling, Config)
    data, features = recipe.dataset, sibling.data.features
    assert features is not None
    assert (features.stride, features.covers, features.fps) == (
        data.feat_stride, data.num_frames, data.default_fps,
    )  # fmt: skip
    assert sibling.data.sample_rate == (data.default_fps or 30) / data.feat_stride
    assert data.json_file is not None
    assert sibling.data.annotations.resolve() == (CONFIGS.parent / data.json_file).resolve()
    folders = [(CONFIGS.parent / folder).resolve() for folder in data.feat_folder]
    assert [folder.resolve() for folder in sibling.data.recordings] == folders
    assert sibling.data.prefix == (data.file_prefix or "")
    assert (sibling.data.train, sibling.data.test) == (recipe.train_split, recipe.val_split)
    assert (sibling.model.width, sibling.model.levels) == (recipe.model.width, recipe.model.levels)
    with torch.device("meta"):
        detector = build_detector(sibling, sum(data.inputs), data.num_classes, sibling.data.sample_rate)
    assert sum(p.numel() for p in detector.parameters()) > 1e6


def test_the_thumos_model_has_the_published_size() -> None:
    recipe = read_recipe(CONFIGS / "thumos14_i3d.yaml")
    size = sum(p.numel() for p in OfflineDetector(recipe).parameters())
    assert size == pytest.approx(29.3e6, rel=0.01)
