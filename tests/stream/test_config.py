"""The configurations that the repository ships: valid, complete, and showing the defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine import ConfigError
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


SERVICE = """
bundle: bundle
source: {{zmq: {{curve: {{secret: keys/service.secret, clients: keys/clients}}}}}}
sinks: {sinks}
dead_letters: {letters}
"""


def kafka(spool: str, bootstrap: str = "127.0.0.1:9092") -> str:
    return f"{{kafka: {{connection: {{bootstrap: '{bootstrap}'}}, topic: events, spool: {spool}}}}}"


@pytest.mark.parametrize(
    ("sinks", "letters", "complaint"),
    [
        ("[{file: a.jsonl}, {file: ./x/../a.jsonl}]", "{}", r"`sinks.1.file` .*`sinks.0.file`"),
        ("[{file: a.jsonl}, {file: link.jsonl}]", "{}", r"`sinks.1.file` .*`sinks.0.file`"),
        ("[{file: a.jsonl}, {file: hard.jsonl}]", "{}", r"`sinks.1.file` .*`sinks.0.file`"),
        ("[{file: a.jsonl}]", "{file: a.jsonl}", r"`dead_letters.file` .*`sinks.0.file`"),
        ("[{file: a.jsonl.1}]", "{file: a.jsonl}", r"`dead_letters.file` .*`sinks.0.file`"),
        (f"[{{file: s.db}}, {kafka('s.db')}]", "{}", r"`sinks.1.kafka.spool` .*`sinks.0.file`"),
        (
            f"[{kafka('s.db')}, {kafka('s.db', 'h:1')}]",
            "{}",
            r"`sinks.1.kafka.spool` .*`sinks.0.kafka.spool`",
        ),
        (f"[{kafka('s.db')}]", "{file: s.db-wal}", r"`dead_letters.file` .*`sinks.0.kafka.spool`"),
        ("[{file: service.yaml}]", "{}", r"`sinks.0.file` .*this configuration"),
        ("[{file: bundle/bundle.json}]", "{}", r"`sinks.0.file` .*a file of the bundle \(bundle.json\)"),
        ("[{file: keys/service.secret}]", "{}", r"`sinks.0.file` .*`source.zmq.curve.secret`"),
    ],
)
def test_two_writers_of_one_file_are_refused(
    sinks: str, letters: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    path = tmp_path / "service.yaml"
    path.write_text(SERVICE.format(sinks=sinks, letters=letters))
    with pytest.raises(ConfigError, match=complaint):
        load_service_config(path)


def test_files_of_their_own_and_shared_devices_are_no_clash(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    sinks = f"[{{file: a.jsonl}}, {{file: /dev/null}}, {{file: /dev/null}}, {kafka('s.db')}]"
    path.write_text(SERVICE.format(sinks=sinks, letters="{file: l.jsonl}"))
    assert load_service_config(path).sinks[0].file == tmp_path / "a.jsonl"


def test_the_unit_keeps_what_the_service_writes_to_itself() -> None:
    lines = (CONFIGS.parent / "deploy" / "onset.service").read_text().splitlines()
    assert {"StateDirectory=onset", "StateDirectoryMode=0700", "UMask=0077"} <= set(lines)
