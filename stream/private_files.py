"""Files that are their owner's alone: what this service writes holds what its users do.

Made with mode 0600, whatever the umask says.
"""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

MODE = 0o600


def open_private(path: Path, flags: int) -> int:
    """`os.open`, with mode 0600 where the file is new; returns the descriptor. Raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC, MODE)


def tighten(path: Path) -> None:
    """Take from group and others what they may do with a regular file that is there; says so in the log."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & 0o077:
        return
    mode = stat.S_IMODE(found.st_mode)
    try:
        os.chmod(path, MODE)
    except OSError as problem:
        log.warning("%s: mode is %04o, others can read it, and it stays so: %s", path, mode, problem.strerror)
    else:
        log.warning("%s: mode was %04o, others could read it; it is %04o now", path, mode, MODE)
