"""When the bundle is taken anew: once for each reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import BundleError
from stream.reload import Reload
from tests.stream.test_runtime import Clock


def test_a_changed_bundle_that_is_asked_for_is_taken_once_and_a_later_change_again(tmp_path: Path) -> None:
    now, manifest = 0.0, tmp_path / "bundle.json"
    manifest.write_text("1")
    reload = Reload(tmp_path, watch=True, clock=lambda: now)
    manifest.write_text("another")
    reload.request()
    assert reload.is_due()
    now = 2.0
    assert not reload.is_due()
    manifest.write_text("yet another")
    now = 4.0
    assert reload.is_due()
    now = 6.0
    assert not reload.is_due()


def test_a_request_does_not_hide_a_bundle_that_is_just_being_written(tmp_path: Path) -> None:
    now, manifest = 0.0, tmp_path / "bundle.json"
    manifest.write_text("1")
    reload = Reload(tmp_path, watch=True, clock=lambda: now)
    manifest.unlink()
    reload.request()
    assert reload.is_due()
    manifest.write_text("another")
    now = 2.0
    assert reload.is_due()


def test_files_that_are_not_watched_are_taken_on_request_alone(tmp_path: Path) -> None:
    now, manifest = 0.0, tmp_path / "bundle.json"
    manifest.write_text("1")
    reload = Reload(tmp_path, watch=False, clock=lambda: now)
    manifest.write_text("another")
    now = 2.0
    assert not reload.is_due()
    reload.request()
    assert reload.is_due()
    assert not reload.is_due()


def test_a_bundle_that_was_refused_is_looked_at_again_when_it_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copied manifest first: while it grows it is left alone, and once it is whole it is taken, once."""
    clock, manifest, graph = Clock(), tmp_path / "bundle.json", tmp_path / "model.onnx"
    manifest.write_text("1")
    graph.write_bytes(b"old")
    reload = Reload(tmp_path, watch=True, clock=clock)

    def look() -> bool:
        clock.now += 2.0
        return reload.is_due()

    assert not look()
    manifest.write_text("the new one")
    assert look()
    reload.refused("old@1", BundleError("the graph was changed"))
    for size in range(1, 4):
        graph.write_bytes(b"n" * size)
        assert not look(), "it is being written"
    assert look()
    reload.refused("old@1", RuntimeError("what nobody foresaw"))
    assert not look(), "nothing is another"
    manifest.unlink()
    assert not look()
    assert not look(), "without a manifest it is no bundle"
    manifest.write_text("the new one again")
    assert not look()
    assert look()
    assert not look()
    assert caplog.text.count("the bundle stays old@1") == 2
    assert "RuntimeError: what nobody foresaw" in caplog.text, "with its traceback"


def test_a_bundle_that_could_not_be_read_is_looked_at_again_with_other_rights(
    tmp_path: Path,
) -> None:
    clock, manifest = Clock(), tmp_path / "bundle.json"
    manifest.write_text("1")
    reload = Reload(tmp_path, watch=True, clock=clock)
    manifest.chmod(0o640)
    clock.now = 2.0
    assert not reload.is_due(), "rights are no other bundle"
    reload.request()
    assert reload.is_due()
    reload.refused("old@1", BundleError("not readable"))
    manifest.chmod(0o644)
    due = []
    for now in (4.0, 6.0, 8.0):
        clock.now = now
        due.append(reload.is_due())
    assert due == [False, True, False]


def test_a_graph_that_comes_before_its_manifest_is_left_alone(tmp_path: Path) -> None:
    clock, manifest, graph = Clock(), tmp_path / "bundle.json", tmp_path / "model.onnx"
    manifest.write_text("1")
    reload = Reload(tmp_path, watch=True, clock=clock)
    graph.write_bytes(b"new")
    clock.now = 2.0
    assert not reload.is_due()
    manifest.write_text("the new one")
    clock.now = 4.0
    assert reload.is_due()
