"""When the bundle is taken anew: once for each reason."""

from __future__ import annotations

from pathlib import Path

from stream.reload import Reload


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
