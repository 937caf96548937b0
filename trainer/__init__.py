"""The torch side: models, data, training, evaluation, export. Importing this package imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.offline import OfflineDetector


def load_official(config: Path | str, checkpoint: Path | str, *, ema: bool = True) -> OfflineDetector:
    """The detector of an official ActionFormer configuration and checkpoint: see `trainer.official`."""
    from trainer import official

    return official.load_official(config, checkpoint, ema=ema)
