"""What `make abuse` does for half an hour, in less than a minute."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.stream.abuse.course import ABUSERS, run


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets limits of another process")
@pytest.mark.timeout(600)
def test_no_producer_no_file_and_no_stall_takes_a_stream_down(tiny_bundle: Path, tmp_path: Path) -> None:
    # In so short a time memory is what happens to wait; `make abuse` asks whether it stays the same.
    outcome = run(tiny_bundle, tmp_path, seconds=20, seed=0, most_growth=1.0)
    log = (tmp_path / "log").read_text(errors="replace")
    assert not outcome.faults, f"{outcome.faults}\n{outcome}\n{log[-8000:]}"
    assert outcome.events > 500, outcome
    assert outcome.acts.keys() == ABUSERS.keys()
    assert all(outcome.acts.values()), outcome
