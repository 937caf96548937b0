"""What all tests share: small, random, but real bundles; and the same random examples on every run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny import write_tiny_bundle

pytest_plugins = ["tests.kafka.fixtures"]

# Random examples are the same on every run and on every machine; ONSET_EXPLORE=1 draws others.
settings.register_profile("same", derandomize=True)
if not os.environ.get("ONSET_EXPLORE"):
    settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bundle: 50 Hz, hop 4, chunk 2, 3 channels, classes a, b, c."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "other", seed=1)


@pytest.fixture(scope="session")
def hapt_bundle() -> Path:
    """The trained bundle that the repository ships."""
    return ROOT / "deploy" / "demo" / "bundle"
