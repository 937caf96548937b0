"""The verbs score, plot and data, run as a person runs them: output, exit status, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from engine.errors import ConfigError, DataError
from trainer import data_cli, score_cli

RUNNER = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(score_cli.score)
    app.command()(score_cli.plot)
    app.add_typer(data_cli.app)
    return app


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "labels.csv").write_text(
        "recording,start,end,label,subset\nr1,1,4,wave,test\nr1,5,9,rest,test\nr2,1,2,wave,train\n"
    )
    results = {"r1": [{"segment": [1, 4], "label": "wave", "score": 0.5}]}
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    for name, seed in (("r1", 1), ("r2", 2)):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(seed).normal(size=(100, 2)))
    scores = np.zeros((100, 2), np.float32)
    scores[10:40, 1] = scores[50:90, 0] = 1
    np.savez(tmp_path / "frames.npz", r1=scores, frame_rate=10.0, classes=np.array(["rest", "wave"]))
    return tmp_path


def test_score_prints_a_table(app: typer.Typer, files: Path) -> None:
    result = RUNNER.invoke(app, ["score", str(files / "results.json"), str(files / "labels.csv")])
    assert result.exit_code == 0, result.output
    assert "50.00" in result.output
    assert "recall@5x" in result.output


def test_score_prints_json_and_nothing_else(app: typer.Typer, files: Path) -> None:
    arguments = ["score", str(files / "results.json"), str(files / "labels.csv"), "--json", "--tiou", "0.5"]
    result = RUNNER.invoke(app, [*arguments, "--frames", str(files / "frames.npz")])
    scores = json.loads(result.stdout)
    assert (scores["mean_ap"], scores["frame_mean_ap"], scores["counts"]["f1"]) == ([0.5], 1.0, 2 / 3)


def test_what_goes_wrong_comes_out_as_one_of_our_errors(app: typer.Typer, files: Path) -> None:
    paths = [str(files / "results.json"), str(files / "labels.csv")]
    assert isinstance(RUNNER.invoke(app, ["score", *paths, "--tiou", "x"]).exception, ConfigError)
    assert isinstance(RUNNER.invoke(app, ["score", *paths, "--subset", "x"]).exception, DataError)
    result = RUNNER.invoke(app, ["plot", paths[0], "--window", "3", "-o", str(files / "t.png")])
    assert isinstance(result.exception, ConfigError)
    result = RUNNER.invoke(app, ["data", "check", paths[1], str(files), "--rate", "0"])
    assert isinstance(result.exception, ConfigError)


def test_plot_writes_the_picture(app: typer.Typer, files: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'onset[plot]'")
    output = files / "t.png"
    arguments = ["plot", str(files / "results.json"), "--truth", str(files / "labels.csv"), "-o", str(output)]
    result = RUNNER.invoke(app, [*arguments, "--window", "0:5", "--streams", "r1"])
    assert result.exit_code == 0, result.output
    assert result.output.strip().endswith("t.png: 1 stream")
    assert output.read_bytes().startswith(b"\x89PNG")


def test_data_check_says_in_its_status_whether_there_are_errors(app: typer.Typer, files: Path) -> None:
    arguments = ["data", "check", str(files / "labels.csv"), str(files)]
    fine = RUNNER.invoke(app, [*arguments, "--rate", "10"])
    assert fine.exit_code == 0, fine.output
    assert "Ready to train." in fine.output
    assert "class `rest`: occurs only in the subset `test`" in fine.output
    wrong = RUNNER.invoke(app, arguments)
    assert wrong.exit_code == 1
    assert "no rate for `r1` and 1 more" in wrong.output


def test_data_hapt_shows_the_terms(app: typer.Typer, tmp_path: Path) -> None:
    raw = tmp_path / "RawData"
    raw.mkdir()
    for kind in ("acc", "gyro"):
        (raw / f"{kind}_exp01_user01.txt").write_text("1 2 3\n4 5 6\n")
    (raw / "labels.txt").write_text("1 1 5 1 2\n")
    result = RUNNER.invoke(app, ["data", "hapt", str(raw), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "1 segments" in result.output
    assert "forbids commercial use" in result.output


@pytest.mark.parametrize("verb", [["score"], ["plot"], ["data"], ["data", "check"], ["data", "hapt"]])
def test_every_verb_has_help_with_an_example(app: typer.Typer, verb: list[str]) -> None:
    result = RUNNER.invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert "Example" in result.output or verb == ["data"]
    assert "[T, " in result.output or verb not in (["score"], ["data", "check"])  # not eaten as markup
