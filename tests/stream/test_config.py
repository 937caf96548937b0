"""The configurations that the repository ships: valid, complete, and showing the defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.schema import Strict
from stream.config import ServiceConfig, load_service_config
from stream.dead_letters import DeadLetterSettings
from stream.health import HttpSettings
from stream.kafka_connection import KafkaConnection, Sasl, Tls
from stream.kafka_sink import KafkaSinkSettings
from stream.kafka_source import KafkaSourceSettings
from stream.zmq_settings import CurveSettings, ZmqSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize("name", ["service.yaml", "service-kafka.yaml"])
def test_the_example_shows_the_defaults(name: str) -> None:
    config = load_service_config(CONFIGS / name)
    assert config == ServiceConfig(bundle=config.bundle, source=config.source, sinks=config.sinks)
    if config.source.kafka is None:
        assert config.source.zmq == ZmqSettings()
        return
    kafka = config.source.kafka
    connection = KafkaConnection(bootstrap=kafka.connection.bootstrap)
    assert kafka == KafkaSourceSettings(connection=connection, topic=kafka.topic, events=kafka.events)


@pytest.mark.parametrize(
    ("name", "models", "others"),
    [
        ("service.yaml", (ZmqSettings, CurveSettings, KafkaSinkSettings), set()),
        (
            "service-kafka.yaml",
            (KafkaSourceSettings, KafkaConnection, Tls, Sasl),
            {"sinks", "overload", "queue_bytes"},
        ),
    ],
)
def test_the_example_names_every_key_and_what_stands_in_its_comments_is_valid(
    name: str, models: tuple[type[Strict], ...], others: set[str], tmp_path: Path
) -> None:
    text = (CONFIGS / name).read_text()
    text = re.sub(r"^( *)# ( *(?:- )?[a-z_]+:(?: .*)?)$", r"\1\2", text, flags=re.M)
    (tmp_path / "all.yaml").write_text(text)
    load_service_config(tmp_path / "all.yaml")
    models = (ServiceConfig, DeadLetterSettings, HttpSettings, *models)
    keys = {key for model in models for key in model.model_fields}
    # One place for dead letters excludes the other, and one way to give a password the two others.
    keys -= others | {"password", "password_env", "kafka_topic" if name == "service.yaml" else "file"}
    assert not [key for key in keys if not re.search(rf"^ *(?:- )?{key}:", text, flags=re.M)]
