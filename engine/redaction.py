"""Secrets do not leave: what is known to be one is `***` in every error and every line of a log.

Known is what somebody told (`hide`): passwords and keys when they are read. More is learnt from
configurations and command lines (`learn`), whatever key it is under: what is called a secret, what looks
like one, and what is a name and a password in front of a host. One thing cannot be told: a password that is
a plain word, such as a topic might be called, where a name belongs.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from types import TracebackType
from urllib.parse import quote, unquote

MASK = "***"

# A shorter one is hidden where it stands alone: it may be a part of many words.
_SHORT = 6
# So short a thing under a key that is called a secret is not taken for one: `***` would be all over the log.
_LEAST = 4
# Deeper than any configuration is allowed to be, see `engine.schema`.
_DEEPEST = 64

_USERINFO = re.compile(r"(?<=://)\S*@")
_USER_AT_HOST = re.compile(r"(?:[a-z0-9+.-]+:)*(?://)?(?P<userinfo>[^\s/:@]+:\S+|(?<=//)\S+)@[^\s@]+")
_SECRET_NAME = re.compile(
    r"pass(?!ive)|pwd|secret|token|credential|private|sasl|(^|[^a-z])(pw|auth|(api|access)?key)($|[^a-z])",
    re.I,
)
_NAMES_UNDER_SASL = frozenset({"mechanism", "username"})
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_PATH = re.compile(r"~?[\w./ -]*(/[\w. -]+|\.(secret|password|passwd|pass|pem|key|crt|cer|txt|env|public))")

_CURVE_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_CURVE_MARKS = frozenset("=^!*?&<>()[]{}@%$#")  # what a path of 40 characters hardly has
_PASSWORD_MARKS = frozenset("!\"#$%&'();<=>?[\\]^`{|}")


class Hidden:
    """What is replaced. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forms: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def add(self, secret: str) -> None:
        """Also in the forms in which it is quoted as Python, JSON, URL or path."""
        forms = {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""), quote(secret)}
        forms |= {unquote(secret), str(PurePath(secret))} if "\0" not in secret else set()
        forms -= {"", "."}
        with self._lock:
            if forms <= self._forms:
                return
            self._forms |= forms
            # The longest first: one secret may be a part of another.
            self._pattern = re.compile("|".join(map(_alone, sorted(self._forms, key=len, reverse=True))))

    def replace(self, text: str) -> str:
        """`text` without them."""
        pattern = self._pattern
        return text if pattern is None else pattern.sub(MASK, text)


_hidden = Hidden()


def hide(secret: str) -> None:
    """Replace `secret` in all that leaves from now on."""
    _hidden.add(secret)


def redacted(text: str) -> str:
    """`text` without what is hidden, and without what stands before the @ of a URL."""
    return _USERINFO.sub(MASK + "@", _hidden.replace(text))


def learn(values: object) -> None:
    """Hide what is, or seems to be, a secret among the values of a configuration, whatever its key is."""
    _learn(values, False, 0)


def learn_arguments(words: Sequence[str]) -> None:
    """Hide what is, or seems to be, a secret in a command line."""
    for word in words:
        _learn_text(word, False)
        name, _, value = word.partition("=")
        _learn_text(value, is_secret_name(name))


def is_secret_name(name: str) -> bool:
    """Whether what is called so is a secret, or where one is found."""
    return _SECRET_NAME.search(name) is not None


def guard_tracebacks() -> None:
    """Let no exception that nobody caught, in any thread, show a secret on standard error."""

    def tell(kind: type[BaseException], problem: BaseException | None, trace: TracebackType | None) -> None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, problem, trace))))

    sys.excepthook = tell
    threading.excepthook = lambda args: tell(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: tell(args.exc_type, args.exc_value, args.exc_traceback)


def _alone(form: str) -> str:
    escaped = re.escape(form)
    return escaped if len(form) >= _SHORT else rf"(?<![0-9A-Za-z]){escaped}(?![0-9A-Za-z])"


def _learn(value: object, named: bool, depth: int) -> None:
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        for key, below in value.items():
            _learn_text(str(key), False)
            inherited = named and key not in _NAMES_UNDER_SASL
            _learn(below, inherited or is_secret_name(str(key)), depth + 1)
    elif isinstance(value, (list, tuple)):
        for below in value:
            _learn(below, named, depth + 1)
    elif isinstance(value, (str, bytes)):
        _learn_text(value.decode("latin-1") if isinstance(value, bytes) else value, named)
    elif value is not None and not isinstance(value, bool) and named:
        _learn_text(str(value), named)


def _learn_text(text: str, named: bool) -> None:
    for part in {text, *text.split(",")}:
        if match := _USER_AT_HOST.fullmatch(part.strip()):
            userinfo = match["userinfo"]
            _hide_long(userinfo)
            _hide_long(userinfo.partition(":")[2])
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) > 1 and "-----BEGIN" in text:
        named = True  # a key or a certificate in place of its file
    for line in lines:
        if named and len(lines) > 1 and "-----" not in line:
            _hide_long(line)
        for word in {line, *line.split(), *(part.rpartition(":")[2] for part in line.split())}:
            if _seems_key(word) or _seems_password(word):
                hide(word)
    if named and not _VARIABLE.fullmatch(text) and not _seems_path(text):
        _hide_long(text)
        _hide_long(text.strip())
        _hide_long(text.rpartition(":")[2].strip())


def _hide_long(text: str) -> None:
    if len(text) >= _LEAST:
        hide(text)


def _seems_key(text: str) -> bool:
    """Whether it is a CURVE key, and no path that is as long as one."""
    return _CURVE_KEY.fullmatch(text) is not None and (
        not _CURVE_MARKS.isdisjoint(text) or len(set(text)) >= 25
    )


def _seems_password(text: str) -> bool:
    """Whether its characters are mixed as those of no name are."""
    if not 8 <= len(text) <= 1024 or "://" in text:
        return False
    kinds = [_kind(character) for character in text if character not in "-_."]
    if not {"lower", "upper", "digit"} <= set(kinds) or _seems_path(text):
        return False
    changes = sum(one != other for one, other in pairwise(kinds))
    return not _PASSWORD_MARKS.isdisjoint(text) or (len(kinds) >= 10 and changes >= 0.45 * (len(kinds) - 1))


def _seems_path(text: str) -> bool:
    return _PATH.fullmatch(text) is not None and not any(
        _seems_password(part) for part in text.split("/") if part != text
    )


def _kind(character: str) -> str:
    if character.islower():
        return "lower"
    if character.isupper():
        return "upper"
    return "digit" if character.isdigit() else "other"
