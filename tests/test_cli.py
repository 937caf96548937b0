"""What users type: the verbs, end to end, on the real bundle and real recordings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "deploy" / "demo"


def onset(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "onset", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["hapt_u02_e03", "hapt_u10_e19"])
def test_events_are_the_same_bytes_however_samples_arrive(tmp_path: Path, name: str) -> None:
    recording = DEMO / "recordings" / f"{name}.npy"
    found = []
    for arrival in (0, 1, 7, 64):
        target = tmp_path / f"{arrival}.jsonl"
        done = onset(
            "detect", DEMO / "bundle", recording, "--arrival", arrival, "--output", target, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found.append(target.read_bytes())
    assert len(set(found)) == 1
    assert found[0].count(b"action.ended") > 10


def test_a_streams_events_do_not_depend_on_its_companions(tmp_path: Path) -> None:
    recordings = sorted((DEMO / "recordings").glob("*.npy"))
    together = tmp_path / "together.jsonl"
    assert onset("detect", DEMO / "bundle", *recordings, "-o", together, cwd=tmp_path).returncode == 0
    for recording in recordings:
        alone = tmp_path / "alone.jsonl"
        assert onset("detect", DEMO / "bundle", recording, "-o", alone, cwd=tmp_path).returncode == 0
        mine = [
            line for line in together.read_text().splitlines() if json.loads(line)["stream"] == recording.stem
        ]
        assert mine == alone.read_text().splitlines()


def test_detect_score_and_plot_agree_on_what_was_seen(tmp_path: Path) -> None:
    recordings = sorted((DEMO / "recordings").glob("*.npy"))
    events, truth = tmp_path / "all.jsonl", DEMO / "annotations.json"
    done = onset("detect", DEMO / "bundle", *recordings, "--min-score", 0.01, "-o", events, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = onset("score", events, truth, "--subset", "test", "--tiou", "0.3:0.7:0.1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["average_mean_ap"] > 0.8
    done = onset("plot", events, "--truth", truth, "--output", "t.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_answered_with_a_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", np.zeros((100, 4), np.float32))
    for words, sentence in (
        (("detect", tmp_path, "r.npy", "-o", "e"), "not a bundle"),
        (("detect", DEMO / "bundle", "r.npy", "-o", "e"), "4 channels"),
        (("detect", DEMO / "bundle", "none.npy", "-o", "e"), "none.npy"),
        (("score", "none.jsonl", DEMO / "annotations.json", "--subset", "test"), "none.jsonl"),
        (("train", "none.yaml", "-o", "run"), "none.yaml"),
        (("export", "none", "-o", "b"), "none"),
        (("run", "none.yaml"), "none.yaml"),
    ):
        done = onset(*words, cwd=tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_what_runs_on_an_edge_box_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, onset, stream.service, stream.offline; "
        "heavy = {'torch', 'matplotlib', 'onnx'} & sys.modules.keys(); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_verb_explains_itself(tmp_path: Path) -> None:
    for verb in (
        "train",
        "calibrate",
        "evaluate",
        "export",
        "detect",
        "run",
        "send",
        "score",
        "plot",
        "data",
    ):
        done = onset(verb, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert "Usage" in done.stdout


def test_the_demo_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "demo.py"), "--output", str(tmp_path), "--speed", "60"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "walking" in done.stdout
    assert (tmp_path / "events.jsonl").read_text().count("stream.ended") == 3
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
