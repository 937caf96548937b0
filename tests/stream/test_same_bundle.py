"""A bundle that is asked for and is what it was changes nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stream.reload import Reload
from tests.stream.test_service import of, read, wave
from tests.stream.test_zmq_worker import await_event, config_of, message, running, undisturbed


def test_a_bundle_that_is_what_it_was_takes_over_nothing(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path, samples = tmp_path / "events.jsonl", wave(2, 400)
    reload = Reload(tiny_bundle, watch=False)
    with running(config_of(tiny_bundle, path), reload) as send:
        for start in range(0, 400, 50):
            send(message("one", samples, start, start + 50))
            if start == 50:
                await_event(path, "one", "stream.started")
                reload.request()
                deadline = time.monotonic() + 60
                while "the bundle is what it was" not in caplog.text:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        await_event(path, "one", "stream.ended")
    assert of(read(path), "one") == undisturbed(tiny_bundle, "one", samples)
