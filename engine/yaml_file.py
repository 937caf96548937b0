"""YAML from disk: bounded before it is parsed, and in what parsing it may cost.

Knows no schema. What is wrong with a file is told without the words in it: they may be secrets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

MAX_CONFIG_BYTES = 1024 * 1024
# Aliases count as often as they stand: a few lines of them can name more values than a memory holds.
_MAX_VALUES = 100_000
_MAX_DEPTH = 32
# Of a number. Reading one takes time that grows with the square of it.
_MAX_CHARACTERS = 64

# In the words of the YAML reader: what it found, unless it is a character or the name of a token.
_QUOTED = re.compile(r"'(?!<[a-z ]+>').{3,}'|(?<=[!&*])[^\s']{2,}")
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(path: Path) -> Any:
    """Read one YAML document of at most 1 MiB, without constructing Python objects.

    Raises ConfigError when the file is missing, too large or not YAML, and for what costs more than its
    length: numbers of more than 64 characters, aliases that make many of little, merge keys, deep nesting.
    """
    text = _text(path)
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as problem:
        # Its own words quote the line, which may be the one with a password.
        mark = problem.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = _QUOTED.sub("'...'", problem.problem or "")
        raise ConfigError(f"{path}{place}: not readable as YAML: {said}") from None
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as problem:
        raise ConfigError(f"{path}: not readable as YAML: {type(problem).__name__}") from None
    if misfit := _too_much(values):
        raise ConfigError(f"{path}: {misfit}; this is not a configuration")
    return values


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, in C where there is one, without what costs more than its length."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merge keys: merged lists of merged lists double with each line."""
        for key, _ in node.value:
            if key.tag == _MERGE:
                raise _refused("a merge key (`<<`) is not taken here: write the keys out", key)


def _number(tag: str) -> None:
    construct = yaml.SafeLoader.yaml_constructors[tag]

    def bounded(loader: Any, node: yaml.ScalarNode) -> Any:
        if len(node.value) > _MAX_CHARACTERS:
            raise _refused(
                f"a number of {len(node.value)} characters, expected at most {_MAX_CHARACTERS}", node
            )
        return construct(loader, node)

    _Loader.add_constructor(tag, bounded)


_number("tag:yaml.org,2002:int")
_number("tag:yaml.org,2002:float")


def _refused(why: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def _text(path: Path) -> str:
    """Of a pipe or a device, too, and never more than is allowed."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}"
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is not a configuration")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path}: not readable as text in UTF-8: byte {problem.start} is none") from None


def _too_much(values: object) -> str | None:
    """What a configuration has too much of, if anything."""
    waiting, seen = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _MAX_DEPTH:
            return f"nested more than {_MAX_DEPTH} levels deep"
        if seen + len(waiting) > _MAX_VALUES:
            return f"more than {_MAX_VALUES} values, aliases counted as often as they stand"
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in value]
    return None
