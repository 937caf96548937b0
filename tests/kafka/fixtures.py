"""Brokers that all tests of a run share, and topics of their own in them. A plugin of tests/conftest.py."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest

from tests.kafka.broker import Cluster, available


@pytest.fixture(scope="session")
def has_kafka() -> None:
    """Skip where no broker can be had; fail instead where `CI_REQUIRES_KAFKA` is 1."""
    if (reason := available()) is None:
        return
    if os.environ.get("CI_REQUIRES_KAFKA") == "1":
        pytest.fail(f"CI_REQUIRES_KAFKA=1, but there is no Kafka: {reason}", pytrace=False)
    pytest.skip(f"there is no Kafka: {reason}")


@pytest.fixture(scope="session")
def kafka(has_kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker for the whole run. Leave it as it is: what is to be killed or cut off is `fragile`."""
    with Cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def fragile(has_kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One to be killed and cut off, behind a proxy; whole again when a test is over."""
    with Cluster(tmp_path_factory.mktemp("fragile"), advertised_through_proxy=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def guarded(has_kafka: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The same, and it asks who comes."""
    with Cluster(tmp_path_factory.mktemp("guarded"), sasl=True, advertised_through_proxy=True) as cluster:
        yield cluster


@pytest.fixture
def topic(kafka: Cluster, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Makes a topic of the test's own in `kafka`: `topic(partitions=1, config={})` returns its name."""
    made = 0

    def make(partitions: int = 1, config: dict[str, str] | None = None) -> str:
        nonlocal made
        made += 1
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", f"{request.node.name[:100]}-{made}-{os.urandom(4).hex()}")
        kafka.create_topic(name, partitions, config=config or {})
        return name

    return make
