"""The fakes of TensorRT and of the CUDA driver say nothing that the real bindings would not."""

from __future__ import annotations

import inspect

import pytest

from tests.engine.fake_driver import FakeDriver, listing
from tests.engine.fake_tensorrt import CUDA, KINDS, RELEASES


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


def public(kind: type) -> dict[str, object]:
    own = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if name not in ("kind", "driver")}


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_of_the_fake_is_one_of_tensorrt_with_its_parameters(release: str) -> None:
    classes = listing(f"tensorrt-{release}")["classes"]
    for kind in KINDS:
        for name, value in public(kind).items():
            overloads = classes.get(kind.__name__, {}).get(name)
            if overloads and inspect.isfunction(value):
                mine = parameters(value)
                assert mine in [overload[: len(mine)] for overload in overloads], (
                    kind.__name__,
                    name,
                    overloads,
                )


def test_no_name_of_the_fake_is_invented() -> None:
    known = [listing(f"tensorrt-{release}")["classes"] for release in RELEASES]
    for kind in KINDS:
        for name in public(kind):
            assert any(name in classes.get(kind.__name__, {}) for classes in known), (kind.__name__, name)


def test_every_call_of_the_fake_driver_is_one_of_cuda_bindings_with_its_parameters() -> None:
    calls = listing(CUDA)["calls"]
    mine = {name: value for name, value in vars(FakeDriver).items() if name.startswith("cu")}
    assert len(mine) > 20
    for name, value in mine.items():
        assert parameters(value) in [[word.strip("*") for word in o] for o in calls[name]], (
            name,
            calls[name],
        )
