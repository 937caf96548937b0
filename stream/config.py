"""The configuration of the runtime and of the service around it (`onset run CONFIG`).

Relative paths in a file are relative to the folder of that file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.choice import EngineSettings
from engine.errors import ConfigError
from engine.manifest import GRAPH, MANIFEST, NMS, Decoding
from engine.schema import Strict, load_config, parse
from stream.dead_letters import DeadLetterSettings
from stream.health import HttpSettings
from stream.kafka_sink import KafkaSinkSettings
from stream.kafka_source import KafkaSourceSettings
from stream.logs import LogFormat
from stream.spool_file import SPOOL_SUFFIXES
from stream.zmq_settings import ZmqSettings


class RuntimeSettings(Strict):
    """How streams are held. Times are seconds."""

    max_streams: int = Field(default=64, ge=1, le=65536, description="streams at once; the next is refused")
    max_batch: int = Field(default=64, ge=1, le=4096, description="streams in one run of the network")
    idle_timeout: float = Field(
        default=30.0, gt=0, description="a stream without new samples for so long is lost; its actions abort"
    )
    reorder: float = Field(
        default=0.5, ge=0, le=60, description="how much newer samples may be before a missing one is given up"
    )
    max_gap: float = Field(
        default=2.0, ge=0, le=600, description="longest gap that is masked; a longer one begins a new epoch"
    )


class Source(Strict):
    """One source of messages: `zmq: {...}` or `kafka: {...}`."""

    zmq: ZmqSettings | None = None
    kafka: KafkaSourceSettings | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.zmq is None) == (self.kafka is None):
            raise ValueError("expected either `zmq` or `kafka`")
        return self


class Sink(Strict):
    """One place for events: `kafka: {...}`, or as JSON lines `file: PATH` (appended to) or `stdout: true`."""

    file: Path | None = None
    stdout: bool = False
    kafka: KafkaSinkSettings | None = None
    on_error: Literal["continue", "stop"] = Field(
        default="continue", description="when it fails: the other sinks go on, or the service ends"
    )
    when_full: Literal["drop-oldest", "block"] = Field(
        default="drop-oldest",
        description="when 16384 events wait for it: the oldest are lost, or the service waits",
    )

    @model_validator(mode="after")
    def _one(self) -> Sink:
        if (self.file is not None) + self.stdout + (self.kafka is not None) != 1:
            raise ValueError("expected one of `kafka: {...}`, `file: PATH` and `stdout: true`")
        if self.kafka is not None and "when_full" in self.model_fields_set:
            raise ValueError("`when_full` of a kafka sink belongs to its spool: put it below `kafka`")
        return self


class ServiceConfig(RuntimeSettings):
    """`onset run`: a bundle, a source, sinks."""

    bundle: Path = Field(description="folder of the bundle")
    source: Source
    sinks: tuple[Sink, ...] = Field(
        default=(), description="where events go; a Kafka source names its topic of events itself"
    )
    dead_letters: DeadLetterSettings = DeadLetterSettings()
    http: HttpSettings | None = Field(default=None, description="/live, /ready, /metrics; default: none")
    log: LogFormat = "text"
    overload: Literal["block", "drop-oldest"] = Field(
        default="block",
        description="ZeroMQ: when the engine cannot keep up, producers wait, or the oldest messages are "
        "lost, which events say. Kafka keeps what waits",
    )
    queue_bytes: int = Field(
        default=64 * 1024 * 1024, ge=64 * 1024, le=1024**4, description="messages that wait for the engine"
    )
    grace: float = Field(
        default=20.0,
        ge=1,
        le=3600,
        description="seconds from SIGTERM to the end: half for what has arrived, half for sinks to take it",
    )
    watch_bundle: bool = Field(default=True, description="take the bundle anew when its files change")
    engine: EngineSettings = EngineSettings()
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="threads of one step on ONNX Runtime; default: all cores"
    )
    decoding: dict[str, Any] = Field(
        default_factory=dict, description="replaces the bundle's decoding settings, key by key"
    )

    @model_validator(mode="after")
    def _fits(self) -> ServiceConfig:
        if self.source.kafka is not None and self.sinks:
            raise ValueError(
                "`sinks` does not go with a Kafka source: its events go to the topic `source.kafka.events`, "
                "in the transaction that commits what was read; read them there"
            )
        if self.source.kafka is None and not self.sinks:
            raise ValueError("`sinks` is missing: where do events go?")
        letters = self.dead_letters.kafka_topic
        if self.source.kafka is not None and letters in self.source.kafka.topics:
            raise ValueError(
                f"`dead_letters.kafka_topic` is {letters!r}, which has another use; give it its own"
            )
        if self.source.kafka is None and self.dead_letters.kafka_topic is not None:
            raise ValueError("`dead_letters.kafka_topic` takes a Kafka source; use `dead_letters.file`")
        return self

    @field_validator("decoding")
    @classmethod
    def _known(cls, values: dict[str, Any]) -> dict[str, Any]:
        # All keys of Decoding have defaults, so that a part of them can be checked without a bundle.
        try:
            parse(Decoding, values, "decoding")
        except ConfigError as problem:  # pydantic gathers ValueErrors, and names the file with the others
            raise ValueError(str(problem)) from None
        return values


def load_service_config(path: Path) -> ServiceConfig:
    """Read a service's YAML; ConfigError names the file, the key and the nearest right key."""
    config = _below(path.resolve().parent, load_config(ServiceConfig, path))
    _check_files(config, path)
    return config


def _below(folder: Path, config: ServiceConfig) -> ServiceConfig:
    """The same, with relative paths relative to `folder`."""
    zmq, kafka, letters = config.source.zmq, config.source.kafka, config.dead_letters
    return config.model_copy(
        update={
            "bundle": folder / config.bundle,
            "sinks": tuple(
                sink.model_copy(
                    update={
                        "file": sink.file and folder / sink.file,
                        "kafka": sink.kafka and sink.kafka.relative_to(folder),
                    }
                )
                for sink in config.sinks
            ),
            "source": Source(zmq=zmq and zmq.relative_to(folder), kafka=kafka and kafka.relative_to(folder)),
            "dead_letters": letters.model_copy(update={"file": letters.file and folder / letters.file}),
        }
    )


def _check_files(config: ServiceConfig, path: Path) -> None:
    """Raise ConfigError where two things would write to one file, or one to a file that another reads."""
    written: dict[str, list[Path]] = {}
    for number, sink in enumerate(config.sinks):
        if sink.file is not None:
            written[f"sinks.{number}.file"] = [sink.file]
        if sink.kafka is not None:
            written[f"sinks.{number}.kafka.spool"] = [
                sink.kafka.spool.with_name(sink.kafka.spool.name + suffix) for suffix in SPOOL_SUFFIXES
            ]
    if config.dead_letters.file is not None:
        written["dead_letters.file"] = [config.dead_letters.file, Path(f"{config.dead_letters.file}.1")]
    read = {f"a file of the bundle ({name})": config.bundle / name for name in (MANIFEST, GRAPH, NMS)}
    read["this configuration"] = path
    read |= _paths_in(config.source, "source")
    for number, sink in enumerate(config.sinks):
        if sink.kafka is not None:
            read |= _paths_in(sink.kafka.connection, f"sinks.{number}.kafka.connection")
    owners = {_identity(file): what for what, file in read.items()}
    for key, files in written.items():
        for file in files:
            if file.exists() and not file.is_file():
                continue  # a device or a pipe may be shared
            other = owners.setdefault(_identity(file), f"`{key}`")
            if other != f"`{key}`":
                raise ConfigError(
                    f"{path}: `{key}` writes to {file}, which is {other}; give each its own file"
                )


def _paths_in(settings: Strict, prefix: str) -> dict[str, Path]:
    """Every path in `settings`, by its key."""
    found: dict[str, Path] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Strict):
            found |= _paths_in(value, f"{prefix}.{name}")
        elif isinstance(value, Path):
            found[f"`{prefix}.{name}`"] = value
    return found


def _identity(file: Path) -> object:
    """What two names of one file have in common, whether it is there or not."""
    try:
        state = file.stat()
        return state.st_dev, state.st_ino
    except OSError:
        return os.path.realpath(file)


def overridden(decoding: Decoding, values: Mapping[str, Any], origin: str) -> Decoding:
    """`decoding` with some keys replaced; ConfigError, opening with `origin`, for keys or values unknown."""
    return parse(Decoding, {**decoding.model_dump(), **values}, origin)
