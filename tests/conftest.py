"""Bundles that tests run: small, random, but real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny_bundle

pytest_plugins = ["tests.kafka.fixtures"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle: 50 Hz, hop 4, chunk 2, 3 channels, classes a, b, c."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def hapt_bundle() -> Path:
    """The trained bundle that the repository ships."""
    return ROOT / "deploy" / "demo" / "bundle"
