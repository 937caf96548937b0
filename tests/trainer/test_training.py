"""Training on small real arrays: it learns, it resumes bit for bit, it says what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import DataError, OnnxSession
from engine.errors import ConfigError
from tests.trainer.synthetic import write_data_set
from trainer.build import load_checkpoint, load_run
from trainer.config import Config, read_config
from trainer.data import Sampler, load_corpus
from trainer.export import export
from trainer.losses import diou, focal
from trainer.offline_signals import train_offline_signals
from trainer.online_training import OnlineTask, fitted, learning_rate
from trainer.online_training import train_online as train
from trainer.targets import assign
from trainer.train import Loop


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return read_config(write_data_set(tmp_path, steps=6))


def test_targets_look_back(tmp_path: Path) -> None:
    targets = assign(np.array([[2.0, 6.5], [-3.0, 1.0]]), np.array([1, 0]), 12, 2, reach=3.0)
    assert targets.ongoing[:, 1].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert targets.ongoing[:, 0].tolist() == [1] + [0] * 11
    # Frame t knows what happened until t + 1: the start at 2 is news for the frames that end at 2, 3 and 4.
    assert np.flatnonzero(targets.start[:, 1]).tolist() == [1, 2, 3]
    assert targets.start_offset[1:4].tolist() == [0, 1, 2]
    assert np.flatnonzero(targets.end[:, 1]).tolist() == [6, 7, 8]
    assert targets.end_offsets[6].tolist() == [5.0, 0.5]
    # The other one began before the crop: its end is news, its length is not asked for.
    assert np.flatnonzero(targets.end[:, 0]).tolist() == [0, 1, 2]
    assert targets.end_mask.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_with_a_look_ahead_a_frame_is_asked_about_an_earlier_one() -> None:
    segments, labels = np.array([[2.0, 6.5], [-3.0, 1.0]]), np.array([1, 0])
    at_once, later = (assign(segments, labels, 16, 2, reach=3.0, lookahead=wait) for wait in (0, 4))
    for name in ("ongoing", "start", "start_mask", "end", "end_mask"):
        np.testing.assert_array_equal(getattr(later, name)[4:], getattr(at_once, name)[:12], err_msg=name)
    # The distances are still those from the frame that answers.
    assert later.start_offset[5:8].tolist() == [4, 5, 6]
    assert later.end_offsets[10].tolist() == [9.0, 4.5]


def test_losses_have_the_values_of_their_formulas() -> None:
    logits, target = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    p = torch.sigmoid(logits)
    expected = torch.stack([-0.25 * (1 - p[0]) ** 2 * p[0].log(), -0.75 * p[1] ** 2 * (1 - p[1]).log()])
    torch.testing.assert_close(focal(logits, target), expected)
    same = torch.tensor([[5.0, 1.0]])
    torch.testing.assert_close(diou(same, same), torch.zeros(1))
    apart = diou(torch.tensor([[2.0, 0.0]]), torch.tensor([[6.0, 4.0]]))
    torch.testing.assert_close(apart, torch.tensor([1 + (4 / 6) ** 2]))


def test_crops_repeat_with_the_generator_and_keep_labels_on_the_signal(config: Config) -> None:
    corpus = load_corpus(config.data, "train")
    sampler = Sampler(corpus, config, hop=5, frames=64)
    a, b = (sampler.draw(np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(a.samples, b.samples)
    # In the synthetic recordings an action of class k raises channel k by 3, whatever was spliced.
    agree = []
    for seed in range(20):
        crop = sampler.draw(np.random.default_rng(seed))
        level = crop.samples.reshape(64, 5, -1).mean(axis=1)
        there = crop.mask > 0
        agree.append(((level[there, :2] > 1.5) == (crop.targets.ongoing[there] > 0.5)).mean())
    assert np.mean(agree) > 0.95


def test_resuming_continues_bit_for_bit(config: Config, tmp_path: Path) -> None:
    config = config.model_copy(update={"train": config.train.model_copy(update={"chunks": (1, 2)})})
    torch.set_num_threads(1)
    train(config, tmp_path / "whole")
    corpus = load_corpus(config.data, "train")
    half = Loop(OnlineTask(config, corpus), tmp_path / "halves")
    half.run.mkdir()
    for _ in range(3):
        half.advance()
    half.save()
    train(config, tmp_path / "halves", resume=True)
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "halves"))
    assert a["step"] == b["step"] == 6
    for part in ("model", "ema"):
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), name


def test_a_signal_saves_and_stops_and_resuming_goes_on(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, steps=4000)
    command = [sys.executable, "-m", "onset", "train", str(path), "--output", str(tmp_path / "run")]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "config.yaml").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume goes on" in said
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert 0 < step < 4000
    path.write_text(path.read_text().replace("steps: 4000", f"steps: {step + 2}"))
    train(read_config(path), tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == step + 2


def test_a_finished_run_is_not_overwritten(config: Config, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        train(config, tmp_path / "run")


def test_the_learning_rate_rises_and_falls(config: Config) -> None:
    settings = config.train.model_copy(update={"warmup": 10, "steps": 100, "learning_rate": 1.0})
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.01)


def test_it_learns_and_the_bundle_says_the_same(tmp_path: Path) -> None:
    """A minute of training at most: the exported step knows the classes of unseen recordings."""
    run = tmp_path / "run"
    train(read_config(write_data_set(tmp_path, steps=150)), run)
    manifest = export(run, tmp_path / "bundle")
    assert manifest.training.config
    assert str(tmp_path) not in (tmp_path / "bundle" / "bundle.json").read_text()
    config, detector, _ = load_run(run)
    corpus = load_corpus(config.data, "test")
    session = OnnxSession(tmp_path / "bundle", slots=1, threads=1)
    track = corpus.tracks[0]
    frames = len(track.samples) // detector.hop // manifest.chunk * manifest.chunk
    with torch.no_grad():
        whole = detector(
            torch.from_numpy(track.samples[None, : frames * detector.hop]), torch.ones(1, frames)
        )
    slot, parts = session.open(), []
    for k in range(0, frames, manifest.chunk):
        samples = track.samples[None, k * detector.hop : (k + manifest.chunk) * detector.hop]
        parts.append(session.step([slot], samples, np.ones((1, manifest.chunk), bool))["ongoing"][0])
    ongoing = np.concatenate(parts)
    np.testing.assert_allclose(ongoing, whole["ongoing"][0].numpy(), rtol=0, atol=2e-4)
    truth = assign(track.segments / detector.hop, track.labels, frames, 2, 1.0).ongoing
    right = ((ongoing > 0) == (truth > 0)).all(axis=1).mean()
    assert right > 0.9, right


def test_one_training_serves_several_chunks(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, steps=3)
    path.write_text(
        path.read_text().replace("chunk: 2", "chunk: 4").replace("{steps", "{chunks: [1, 4], steps")
    )
    train(read_config(path), tmp_path / "run")
    for chunk in (1, 4, None):
        manifest = export(tmp_path / "run", tmp_path / "bundle", chunk=chunk)
        assert (
            manifest.chunk
            == OnnxSession(tmp_path / "bundle", slots=1, threads=1).manifest.chunk
            == (chunk or 4)
        )
    _, detector, _ = load_run(tmp_path / "run")
    samples = np.random.default_rng(0).normal(size=(1, 5 * 24, 3)).astype(np.float32)
    for chunk in (1, 4):
        export(tmp_path / "run", tmp_path / "bundle", chunk=chunk)
        session = OnnxSession(tmp_path / "bundle", slots=1, threads=1)
        slot, detector.chunk, there = session.open(), chunk, np.ones((1, chunk), bool)
        said = [
            session.step([slot], samples[:, 5 * k : 5 * (k + chunk)], there)["start"][0]
            for k in range(0, 24, chunk)
        ]
        with torch.no_grad():
            whole = detector(torch.from_numpy(samples), torch.ones(1, 24))["start"][0].numpy()
        np.testing.assert_allclose(np.concatenate(said), whole, rtol=0, atol=2e-4)
    with pytest.raises(ConfigError, match="chunks of 1, 4 frames, not of 2"):
        export(tmp_path / "run", tmp_path / "bundle", chunk=2)
    path.write_text(
        path.read_text().replace("chunk: 4", "chunk: 2")
    )  # would be exported, and was not trained
    with pytest.raises(ConfigError, match="is 4, and `model"):
        read_config(path)


def test_an_action_may_last_twice_as_long_as_the_longest_known(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, steps=1)
    corpus = load_corpus(read_config(path).data, "train")
    assert fitted(read_config(path), corpus).decoding.max_duration == 120.0
    tracks = (replace(corpus.tracks[0], segments=np.array([[0.0, 25 * 100.2]]), labels=np.array([0])),)
    assert fitted(read_config(path), replace(corpus, tracks=tracks)).decoding.max_duration == 201.0
    assert fitted(read_config(path), replace(corpus, tracks=tracks)).decoding.usual == (100.2, 100.2)
    usual = fitted(read_config(path), corpus).decoding.usual
    assert usual is not None
    assert all(2 < seconds < 6 for seconds in usual)
    plain = path.read_text()
    path.write_text(plain + "decoding: {usual: [1, 2, 3]}\n")
    with pytest.raises(ConfigError, match="3 durations, expected one for each of 2 classes"):
        fitted(read_config(path), corpus)
    path.write_text(plain)
    odd = (
        replace(
            corpus.tracks[0], segments=np.array([[5.0, 5.0], [0, 25 * 90000.0]]), labels=np.array([0, 1])
        ),
    )
    extreme = fitted(read_config(path), replace(corpus, tracks=odd)).decoding
    assert extreme.usual == (0.001, 86400.0)
    assert extreme.max_duration == 3600.0, "what is remembered of a stream is as long as that"
    path.write_text(plain + "decoding: {max_duration: 30}\n")
    assert fitted(read_config(path), replace(corpus, tracks=tracks)).decoding.max_duration == 30.0


def test_everything_wrong_with_the_data_is_said_at_once(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, steps=1)
    (tmp_path / "data" / "r0.npy").unlink()
    np.save(tmp_path / "data" / "r1.npy", np.full((100, 3), np.nan, np.float32))
    with pytest.raises(DataError) as problem:
        load_corpus(read_config(path).data, "train")
    assert "r0" in str(problem.value)
    assert "NaN" in str(problem.value)


def test_a_wrong_key_names_the_right_one(tmp_path: Path) -> None:
    path = write_data_set(tmp_path, steps=1)
    path.write_text(path.read_text() + "\nmodle: {}\n")
    with pytest.raises(ConfigError, match=r"`modle` is not a key here \(did you mean `model`\?\)"):
        read_config(path)
    bad = tmp_path / "bad.yaml"
    bad.write_text(path.read_text().replace("modle: {}", "").replace("chunk: 2", "chunk: 3"))
    with pytest.raises(ConfigError, match="power of two"):
        read_config(bad)


def test_full_context_is_refused_with_the_way_out(config: Config, tmp_path: Path) -> None:
    full = config.model_copy(update={"model": config.model.model_copy(update={"context": "full"})})
    with pytest.raises(ConfigError, match="context: causal"):
        train(full, tmp_path / "run")


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"ema": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="not readable"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_the_shipped_configuration_can_be_read() -> None:
    root = Path(__file__).resolve().parents[2]
    config = read_config(root / "configs" / "hapt.yaml")
    recorded = json.loads((root / "deploy" / "demo" / "bundle" / "bundle.json").read_text())["training"]
    assert recorded["steps"] == config.train.steps


def test_the_same_pyramid_in_full_context_learns_and_is_evaluated(tmp_path: Path) -> None:
    """Offline on raw signals: what the same model finds when it sees a recording whole."""
    config = write_data_set(tmp_path, steps=150)
    config.write_text(config.read_text().replace("model: {", "model: {context: full, "))
    settings = read_config(config)
    train_offline_signals(settings, tmp_path / "run")
    with pytest.raises(ConfigError, match="_causal"):
        export(tmp_path / "run", tmp_path / "bundle")
    for shuffle in ([], ["--shuffle", "1"]):
        done = subprocess.run(
            [sys.executable, "-m", "onset", "evaluate", str(tmp_path / "run"), "--json", *shuffle],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (scores,) = json.loads(done.stdout).values()
        assert scores["average_mean_ap"] > 0.5, shuffle
