"""The strict pydantic base of every configuration and manifest, and how its complaints read.

A wrong key is an error that names the nearest right one; a wrong value names the key, what was found and
what was expected. Knows nothing of any particular schema.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import ConfigError, OnsetError
from engine.redaction import is_secret_name, learn, redacted
from engine.yaml_file import load_yaml


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


# What is shown of a wrong configuration: a key as keys look, a value as those of choices and numbers look.
_KEY = re.compile(r"[A-Za-z_][A-Za-z_-]{0,39}[0-9]{0,3}")
_WORD = re.compile(r"[a-z]{1,16}([-_ ][a-z]{1,16})?|[a-z]{2}[0-9]{1,2}|[-+.:0-9]{0,20}")

ModelT = TypeVar("ModelT", bound=BaseModel)


def parse(model: type[ModelT], values: object, origin: str, error: type[OnsetError] = ConfigError) -> ModelT:
    """Validate `values` as `model`; on failure raise `error` with one line for each problem.

    `origin` names where the values came from (a file, an option) and opens the message.
    """
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        learn(values)
        lines = [_sentence(model, dict(item)) for item in problem.errors()]
        raise error(redacted(f"{origin}: " + "; ".join(lines))) from None


def as_tuple(value: Any) -> Any:
    """One thing or a list of them, as a tuple: for keys that take either."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def load_config(model: type[ModelT], path: Path) -> ModelT:
    """Read a YAML file as `model`; ConfigError names the file, the key and the nearest right key."""
    values = load_yaml(path)
    learn(values)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found {type(values).__name__}, expected a mapping of keys to values")
    return parse(model, values, str(path))


def nearest(word: str, known: Sequence[str]) -> str:
    """' (did you mean `x`?)' for the closest known word, else a list of what is known."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if match:
        return f" (did you mean `{match[0]}`?)"
    return f" (known: {', '.join(sorted(known))})" if known else ""


def _sentence(model: type[BaseModel], item: dict[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        if not _KEY.fullmatch(location[-1]):  # a value, perhaps: a colon, or the blank behind it, is missing
            location[-1] = f"a text of {len(location[-1])} characters"
            key = ".".join(location)
        return f"`{key}` is not a key here{nearest(location[-1], _keys_at(model, location[:-1]))}"
    if item["type"] == "missing":
        return f"`{key}` is missing"
    shown = _shown(item, key)
    return f"`{key}`: {item['msg']} (found {shown})" if key else f"{item['msg']}"


def _shown(item: dict[str, Any], key: str) -> str:
    """What was found at `key`: its type, and of what can hardly be a secret the value."""
    found = item.get("input")
    if not is_secret_name(key):
        if found is None or isinstance(found, (bool, float)):
            return repr(found)
        if isinstance(found, int) and found.bit_length() <= 64:
            return str(found)
        if isinstance(found, str) and _WORD.fullmatch(found):
            return repr(found)
    return f"a text of {len(found)} characters" if isinstance(found, str) else type(found).__name__


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys that the model nested at `location` accepts; [] when it cannot be told."""
    here: list[type[BaseModel]] = [model]
    for part in location:
        below: list[type[BaseModel]] = []
        for candidate in here:
            field = candidate.model_fields.get(part)
            if field is not None:
                below += _models_in(field.annotation)
        here = below or here  # a list index or the tag of a union leaves us where we are
    return sorted({name for candidate in here for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
