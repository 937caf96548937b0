"""Tests that need a GPU are skipped where there is none; `make test-gpu` runs them."""

from __future__ import annotations

import pytest

from tests.gpu.driver import Gpu, is_there


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    if not is_there():
        pytest.skip("needs an NVIDIA GPU")
    return Gpu()
