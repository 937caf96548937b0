"""CURVE keys as files: plain text, one key of 40 characters (Z85) a line, comments begin with "# ".

NAME.secret holds a secret key and is its owner's alone; NAME.public is for whoever has to know NAME. What a
secret file holds never reaches a message, a log or a repr. Knows nothing of sockets.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from engine.errors import ConfigError
from engine.redaction import hide

# Characters of Z85, "#" among them: hence a comment is told by the blank behind it.
_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")
_MAX_BYTES = 1024 * 1024
_MAX_CLIENTS = 10_000


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One party's own keys, as Z85."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a producer needs: the service's public key (Z85), and keys of its own."""

    server: bytes
    own: KeyPair


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a new pair as NAME.public and NAME.secret (mode 0600) in `folder`; returns both paths.

    Raises ConfigError when one of them is there already, or cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}, expected 1 to 64 of letters, digits, '_', '-' and '.'")
    public, secret = zmq.curve_keypair()
    files = folder / f"{name}.public", folder / f"{name}.secret"
    for path in files:
        if path.exists():
            raise ConfigError(f"{path} is there already and is not replaced; choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, kind, key, mode in zip(
            files, ("public", "secret"), (public, secret), (0o644, 0o600), strict=True
        ):
            # Created with its mode, not changed to it afterwards: it is at no time open to others.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(f"# CURVE {kind} key of {name}\n".encode() + key + b"\n")
    except OSError as problem:
        raise ConfigError(f"{folder}: keys cannot be written: {problem.strerror}") from None
    return files


def read_secret(path: Path) -> KeyPair:
    """The pair of a secret file. Raises ConfigError when it is missing, no key, or open to others."""
    lines, mode = _read(path)
    # A group may read: that is how orchestrators hand secrets to a process that is not root.
    if mode & 0o027:
        raise ConfigError(
            f"{path}: mode is {mode & 0o777:04o}, so that others than its owner can read or change this "
            f"secret key; chmod 600 {path}, or make a new one if it was seen"
        )
    if len(lines) == 1 and _is_key(lines[0]):
        hide(lines[0].decode("ascii"))
        return KeyPair(zmq.curve_public(lines[0]), lines[0])
    raise ConfigError(f"{path}: expected one secret key of 40 characters, as `onset keys` writes it")


def read_public(path: Path) -> bytes:
    """The key of a public file, as Z85. Raises ConfigError when it is missing or holds no key."""
    keys = _public_keys(path)
    if len(keys) != 1:
        raise ConfigError(f"{path}: found {len(keys)} public keys, expected one")
    return keys[0]


def read_clients(path: Path) -> frozenset[bytes]:
    """Public keys (Z85) of a file, or of all *.public in a folder.

    Raises ConfigError when there are none, too many, or one that cannot be read.
    """
    files = sorted(path.glob("*.public")) if path.is_dir() else [path]
    keys: set[bytes] = set()
    for file in files:
        keys.update(_public_keys(file))
        if len(keys) > _MAX_CLIENTS:
            raise ConfigError(f"{path}: more than {_MAX_CLIENTS} public keys")
    if not keys:
        raise ConfigError(
            f"{path}: found no public key, so that nobody would be let in; `onset keys` makes NAME.public"
        )
    return frozenset(keys)


def _public_keys(path: Path) -> list[bytes]:
    if path.suffix == ".secret":
        raise ConfigError(
            f"{path}: this is a secret key, expected public ones; name the .public file instead"
        )
    keys, _ = _read(path)
    for number, key in enumerate(keys, 1):
        if not _is_key(key):  # it is not shown: the file may be another than was meant, and hold anything
            raise ConfigError(
                f"{path}: key {number} is none, expected 40 characters as in NAME.public of `onset keys`"
            )
    return keys


def _read(path: Path) -> tuple[list[bytes], int]:
    """The lines that are no comments, and the file's mode."""
    try:
        if not path.is_file():
            raise ConfigError(
                f"{path}: there is no such file; `onset keys` makes NAME.public and NAME.secret"
            )
        with path.open("rb") as file:
            data, mode = file.read(_MAX_BYTES + 1), os.fstat(file.fileno()).st_mode
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes; this is no file of keys")
    lines = (line.strip() for line in data.splitlines())
    return [line for line in lines if line and line != b"#" and not line.startswith(b"# ")], mode


def _is_key(line: bytes) -> bool:
    if not _KEY.fullmatch(line):
        return False
    try:
        return len(z85.decode(line)) == 32
    except struct.error:  # five characters that are more than 32 bits
        return False
