"""Rows that move on the GPU: `rows.ptx`, as the fake driver runs it, and as NVIDIA's assembler reads it."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import engine.gpu
from engine.gpu import Gpu
from tests.engine.fake_driver import FakeDriver
from tests.engine.fake_tensorrt import install

PTX = Path(engine.gpu.__file__).with_name("rows.ptx")
ARCHITECTURES = ("75", "80", "86", "87", "89", "90", "100", "110", "120")


@pytest.mark.parametrize(
    ("rows", "slots", "size"), [(1, 1, 1), (3, 5, 7), (5, 5, 256), (2, 9, 257), (7, 7, 1000)]
)
def test_gather_and_scatter_move_rows_and_touch_no_other(
    monkeypatch: pytest.MonkeyPatch, rows: int, slots: int, size: int
) -> None:
    driver = FakeDriver()
    install(monkeypatch, driver)
    gpu, random = Gpu(), np.random.default_rng(size)
    table, dense, index = (
        gpu.allocate(4 * slots * size),
        gpu.allocate(4 * rows * size),
        gpu.allocate(4 * rows),
    )
    gpu.wait()
    before = random.standard_normal((slots, size)).astype(np.float32)
    chosen = random.permutation(slots)[:rows]
    driver.array(table, slots * size)[:] = before.ravel()
    driver.array(index, rows, np.int32)[:] = chosen
    gpu.gather(dense, table, index, rows, size)
    gpu.wait()
    np.testing.assert_array_equal(driver.array(dense, rows * size).reshape(rows, size), before[chosen])
    fresh = random.standard_normal((rows, size)).astype(np.float32)
    driver.array(dense, rows * size)[:] = fresh.ravel()
    gpu.scatter(dense, table, index, rows, size)
    gpu.wait()
    before[chosen] = fresh
    np.testing.assert_array_equal(driver.array(table, slots * size).reshape(slots, size), before)


def test_addresses_beyond_4_gib_are_reached() -> None:
    """512 streams of a large state fill more than 32 bits can count: the products are wide."""
    code = [line for line in PTX.read_text().splitlines() if ", %size;" in line and "mul" in line]
    assert len(code) == 4
    assert all("mul.wide.u32" in line for line in code)


def assembler() -> str | None:
    packages = Path(sysconfig.get_path("purelib"))
    return shutil.which("ptxas") or next((str(p) for p in packages.glob("nvidia/cu*/bin/ptxas")), None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvidias_assembler_takes_it_for_each_architecture(architecture: str, tmp_path: Path) -> None:
    ptxas = assembler()
    if ptxas is None:
        pytest.skip("there is no ptxas: pip install nvidia-cuda-nvcc")
    command = [ptxas, f"-arch=sm_{architecture}", str(PTX), "-o", str(tmp_path / "rows.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
