"""Forty seconds of what `make chaos` does for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kafka.chaos import run


@pytest.mark.timeout(600)
def test_nothing_is_lost_and_nothing_told_twice(has_kafka: None, tiny_bundle: Path, tmp_path: Path) -> None:
    outcome = run(tiny_bundle, tmp_path, seconds=40, brokers=1, seed=0)
    log = (tmp_path / "workers.log").read_text(errors="replace")
    assert outcome.kills, outcome
    assert outcome.bursts, outcome
    assert outcome.events > 500, outcome
    assert (outcome.lost, outcome.duplicated, outcome.disordered) == (0, 0, 0), f"{outcome}\n{log[-8000:]}"
