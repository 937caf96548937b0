"""What a teacher with a longer look-ahead adds to the truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from tests.trainer.synthetic import write_data_set
from trainer.build import load_run
from trainer.config import Config, read_config
from trainer.data import load_corpus
from trainer.distillation import Teacher
from trainer.online_training import OnlineTask, train_online


@pytest.fixture
def taught(tmp_path: Path) -> Config:
    """A configuration, and beside it the run of a teacher that looks four frames ahead."""
    path = write_data_set(tmp_path, steps=2)
    text = path.read_text()
    path.write_text(text.replace("stem: 1", "stem: 1, lookahead: 4"))
    train_online(read_config(path), tmp_path / "teacher")
    path.write_text(text.replace("train: {", "train: {teacher: teacher, "))
    return read_config(path)


def test_a_teacher_answers_the_same_question_later(taught: Config) -> None:
    corpus = load_corpus(taught.data, "train")
    assert taught.train.teacher is not None
    teacher = Teacher(taught.train.teacher, taught, corpus, 5, torch.device("cpu"))
    _, detector, _ = load_run(taught.train.teacher)
    samples, mask = torch.randn(2, 5 * 32, 3), torch.ones(2, 32)
    mask[0, 10] = 0.0
    truth = {name: torch.zeros(2, 32, 2) for name in ("ongoing", "start", "end")}
    kept = {name: value.clone() for name, value in truth.items()}
    mixed = teacher.mix(samples, mask, truth, 0.25)
    with torch.no_grad():
        said = detector(samples, mask)
    for name in truth:
        expected = 0.25 * torch.sigmoid(said[name])[:, 4:] * mask[:, 4:, None]
        torch.testing.assert_close(mixed[name][:, :28], expected)
        assert not mixed[name][:, 28:].any(), "what the teacher would answer after the crop stays the truth"
        assert torch.equal(truth[name], kept[name]), "the truth itself is left alone"


def test_a_student_is_trained_with_its_teacher(taught: Config, tmp_path: Path) -> None:
    task = OnlineTask(taught, load_corpus(taught.data, "train"))
    alone = OnlineTask(
        taught.model_copy(update={"train": taught.train.model_copy(update={"teacher": None})}),
        load_corpus(taught.data, "train"),
    )
    task.model.eval(), alone.model.eval()
    with_teacher, without = task.losses(task.model, 0)[1], alone.losses(alone.model, 0)[1]
    assert with_teacher["ongoing"] != without["ongoing"]
    assert torch.equal(with_teacher["start_offset"], without["start_offset"])
    train_online(taught, tmp_path / "student")
    assert str(taught.train.teacher) in (tmp_path / "student" / "config.yaml").read_text()


def test_a_teacher_that_answers_something_else_is_refused(taught: Config, tmp_path: Path) -> None:
    corpus = load_corpus(taught.data, "train")

    def refused(config: Config, hop: int, reason: str) -> None:
        assert taught.train.teacher is not None
        with pytest.raises(ConfigError, match=reason):
            Teacher(taught.train.teacher, config, corpus, hop, torch.device("cpu"))

    refused(taught, 10, "hop")
    ahead = taught.model_copy(update={"model": taught.model.model_copy(update={"lookahead": 5})})
    refused(ahead, 5, "longer `model.lookahead`")
    other = taught.model_copy(update={"train": taught.train.model_copy(update={"reach": 1.0})})
    refused(other, 5, "`train.reach`")
