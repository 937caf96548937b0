"""Everything Onset raises on purpose, in one tree.

OnsetError
├── ConfigError        a configuration or an option: wrong key, wrong value, files that do not fit together
├── DataError          a recording, an annotation file or a predictions file that cannot be used
├── BundleError        a bundle that is missing, damaged, of another version, or does not fit
├── WireError          one message from outside that cannot be read
└── EngineError        misuse of a running session: a stale slot, a wrong shape, no free slot

Each message says what was found, what was expected and what to do, and names the file, key or stream.
The command line prints it as one sentence and exits with status 2; nothing else is printed.
"""

from __future__ import annotations

from engine.redaction import redacted


class OnsetError(Exception):
    """Base of every error that Onset raises on purpose; without secrets (`engine.redaction`)."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(OnsetError):
    """A configuration or an option cannot be used."""


class DataError(OnsetError):
    """A recording, an annotation file or a predictions file cannot be used."""


class BundleError(OnsetError):
    """A bundle is missing, damaged, of an unknown version, or does not fit its graph."""


class WireError(OnsetError):
    """One message from outside cannot be read; `reason` is a short counter label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(OnsetError):
    """A session was used wrongly: a stale slot, a wrong shape, no free slot."""
