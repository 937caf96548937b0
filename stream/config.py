"""The configuration of the runtime and of the service around it (`onset run CONFIG`).

Relative paths in a file are relative to the folder of that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from engine.errors import ConfigError
from engine.manifest import Decoding
from engine.schema import Strict, load_config, parse
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
    """One source of messages."""

    zmq: ZmqSettings


class Sink(Strict):
    """One place for events, as JSON lines: `file: PATH` (appended to) or `stdout: true`."""

    file: Path | None = None
    stdout: bool = False

    @model_validator(mode="after")
    def _one(self) -> Sink:
        if (self.file is None) == (not self.stdout):
            raise ValueError("expected either `file: PATH` or `stdout: true`")
        return self


class ServiceConfig(RuntimeSettings):
    """`onset run`: a bundle, a source, sinks."""

    bundle: Path = Field(description="folder of the bundle")
    source: Source
    sinks: tuple[Sink, ...] = Field(min_length=1)
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="threads of one step; default: all cores"
    )
    decoding: dict[str, Any] = Field(
        default_factory=dict, description="replaces the bundle's decoding settings, key by key"
    )

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
    config = load_config(ServiceConfig, path)
    folder = path.resolve().parent
    sinks = tuple(
        sink if sink.file is None else sink.model_copy(update={"file": folder / sink.file})
        for sink in config.sinks
    )
    return config.model_copy(update={"bundle": folder / config.bundle, "sinks": sinks})


def overridden(decoding: Decoding, values: Mapping[str, Any], origin: str) -> Decoding:
    """`decoding` with some keys replaced; ConfigError, opening with `origin`, for keys or values unknown."""
    return parse(Decoding, {**decoding.model_dump(), **values}, origin)
