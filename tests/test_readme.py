"""Every command of the README, as a reader would type it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.kafka.broker import Cluster
from tests.trainer.synthetic import official_checkpoint, sibling, write_feature_set

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, flags=re.S | re.M)


def shell(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block with bash, job control on; `onset` and `python` are this checkout's."""
    commands = folder / "bin"
    commands.mkdir()
    for name, words in (("onset", "-m onset "), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (commands / name).chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "COLUMNS": "200"}
    for name in ("deploy", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return subprocess.run(
        ["bash", "-c", "set -em\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_recordings_in_events_out(tmp_path: Path) -> None:
    script = next(block for block in blocks("sh") if "onset detect" in block)
    done = shell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "timeline.png").exists()
    assert "average" in done.stdout


def test_the_live_service(tmp_path: Path) -> None:
    script = next(block for block in blocks("sh") if "onset run" in block)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "service.yaml").write_text((ROOT / "configs" / "service.yaml").read_text())
    done = shell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "live.jsonl").read_text().splitlines()
    assert sum('"action.ended"' in line for line in lines) > 10
    assert lines == [line for line in done.stdout.splitlines() if line.startswith("{")]


def test_kafka(kafka: Cluster, tmp_path: Path) -> None:
    """The commands as they are, but for the broker's port and for the consumer's Ctrl-C."""
    (script,) = blocks("sh-kafka")
    (tmp_path / "configs").mkdir()
    config = (ROOT / "configs" / "service-kafka.yaml").read_text()
    assert "127.0.0.1:9092" in script
    assert "127.0.0.1:9092" in config
    script, config = (text.replace("127.0.0.1:9092", kafka.bootstrap[0]) for text in (script, config))
    (tmp_path / "configs" / "service-kafka.yaml").write_text(config)
    for topic in ("frames", "events"):
        kafka.create_topic(topic, 2)
    *most, consumer = script.strip().splitlines()
    until = "timeout 120 sh -c 'until grep -q onset.stream.ended printed; do sleep 0.2; done'"
    ending = [f"{consumer.partition('#')[0]} > printed &", until, "kill -INT %2; kill -TERM %1; wait %1"]
    done = shell("\n".join([*most, *ending]), tmp_path)
    assert done.returncode == 0, done.stderr
    printed = (tmp_path / "printed").read_text()
    assert printed.count("onset.action.ended hapt_u10_e19") > 10


def test_the_readme_shows_the_sample_consumer() -> None:
    (shown,) = blocks("python consumer")
    assert (ROOT / "deploy" / "consumer.py").read_text().endswith(shown)


def test_ones_own_data_in_five_commands(tmp_path: Path) -> None:
    """The README's own files and commands; only the recordings are made here, and fewer steps are taken."""
    (script,), (config,), (labels,) = blocks("sh-own"), blocks("yaml"), blocks("csv")
    data = tmp_path / "mydata"
    data.mkdir()
    (data / "labels.csv").write_text(labels)
    random = np.random.default_rng(0)
    for name in ("monday", "tuesday"):
        table = random.normal(size=(600, 3))
        lines = [
            "time,x,y,z",
            *(f"{i / 50:.2f},{a:.4f},{b:.4f},{c:.4f}" for i, (a, b, c) in enumerate(table)),
        ]
        (data / f"{name}.csv").write_text("\n".join(lines) + "\n")
    assert "steps: 2000" in config
    (tmp_path / "my.yaml").write_text(config.replace("steps: 2000", "steps: 3\n  batch: 2"))
    done = shell(script, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "my-events.jsonl").exists()


def test_from_actionformer(tmp_path: Path) -> None:
    """The README's commands and its Python, on a small data set and model under the names that it uses."""
    (script,), (code,) = blocks("sh-features"), blocks("python")
    recipe = write_feature_set(tmp_path / "set")
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "thumos14_i3d.yaml").write_text(recipe.read_text())
    causal = sibling(tmp_path / "set", annotations="../set/annotations.json", recordings="../set/features")
    (configs / "thumos14_i3d_causal.yaml").write_text(causal.read_text())
    official_checkpoint(recipe, tmp_path / "epoch_034.pth.tar")
    features = "import numpy\nfeatures = numpy.load('set/features/video_9.npy')\n"
    (tmp_path / "code.py").write_text(features + code + "print(segments.shape, scores.shape, labels.shape)\n")
    done = shell(script + f'"{sys.executable}" code.py\n', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "recall@1x" in done.stdout
    assert "torch.Size" in done.stdout
    assert (tmp_path / "thumos14.json").exists()
    assert (tmp_path / "thumos14-bundle" / "bundle.json").exists()


def test_the_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "stream" / "WIRE.md", ROOT / "stream" / "KAFKA.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), link


def test_make_has_the_targets_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
