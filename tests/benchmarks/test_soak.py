"""Twelve hours of 20 streams, in less than a minute: a worker that has warmed up takes no more memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks.soak import alone, write_bundle


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_what_it_was(tmp_path: Path) -> None:
    done = alone(write_bundle(tmp_path / "bundle"), streams=20, hours=12)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RSS" in done.stdout
