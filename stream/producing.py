"""What all producers have in common: left in order they wait until all is taken, else they give up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

from stream.wire import DtypeName, Message

Own = TypeVar("Own", bound="Producer")


class Producer(ABC):
    """Sends until it is closed; a context manager."""

    @abstractmethod
    def send(self, message: Message, dtype: DtypeName = "float32", scale: float | None = None) -> None:
        """Send one message. Raises WireError if `dtype` cannot hold it."""

    @abstractmethod
    def close(self) -> None:
        """Wait until everything is handed over. Raises OnsetError when that takes too long."""

    @abstractmethod
    def _abandon(self) -> None:
        """Hang up; what is not handed over is given up."""

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()
