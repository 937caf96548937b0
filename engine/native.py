"""Native code that somebody named: loading a library runs it, so it is looked at first.

It must be a regular file that belongs to this user or to root, and nobody else may be able to change it or to
put another in its place: the same holds of its folder and of all above (of those above, a folder like /tmp,
where only the owner of a file may move it, will do). Nothing is looked for anywhere, least of all in the
working directory. Knows nothing of TensorRT.
"""

from __future__ import annotations

import ctypes
import logging
import os
import stat
from pathlib import Path

from engine.errors import ConfigError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


def trusted(path: Path) -> Path:
    """The file, links followed. Raises ConfigError unless this user or root alone can have written it."""
    try:
        file = path.resolve(strict=True)
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file}: is not a regular file, expected a library, libonset_nms.so for one")
        for place in (file, *file.parents):
            found = place.lstat()
            if found.st_uid not in (0, os.geteuid()):
                raise ConfigError(
                    f"{file} is not loaded: {place} belongs to user {found.st_uid}, expected root or user "
                    f"{os.geteuid()}, which is you; copy the library to a folder of your own"
                )
            is_sticky = bool(found.st_mode & stat.S_ISVTX) and place not in (file, file.parent)
            if found.st_mode & _OTHERS_WRITE and not is_sticky:
                raise ConfigError(
                    f"{file} is not loaded: others can write {place} (mode "
                    f"{stat.S_IMODE(found.st_mode):04o}), and put in what they like; `chmod go-w {place}`, "
                    "or copy the library to a folder that only you can write"
                )
    except (OSError, RuntimeError, ValueError) as problem:  # links in a circle are a RuntimeError before 3.13
        raise ConfigError(f"{path}: cannot be loaded: {problem}") from None
    return file


def load(path: Path) -> ctypes.CDLL:
    """Load the library; the log names it before. Raises ConfigError where it is not `trusted`, or is none."""
    file = trusted(path)
    found = file.stat()
    log.info("loading %s into this process: %d bytes, of user %d", file, found.st_size, found.st_uid)
    try:
        return ctypes.CDLL(str(file))
    except OSError as problem:
        raise ConfigError(f"{file}: cannot be loaded: {problem}; build it on this machine") from None
