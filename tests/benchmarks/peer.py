"""The original ActionFormer as a peer: a clone that the user names, imported from there and run as it is.

Nothing of it is in this repository. All that it is given is what it expects of its time and place: the name
`np.float`, which NumPy has dropped, and its extension for non-maximum suppression, compiled into PyTorch's
cache for such extensions.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NEEDED = (
    "measuring against the original needs `.venv/bin/pip install pandas joblib ninja`, a C++ compiler, and "
    "`make bench ACTIONFORMER=CLONE` with a clone of https://github.com/happyharrycn/actionformer_release"
)
_EXTENSION = "nms_1d_cpu"
_SOURCE = Path("libs", "utils", "csrc", "nms_cpu.cpp")


class NoPeerError(Exception):
    """There is no peer to measure against; the message says in one sentence what is missing and needed."""


class Peer:
    """A clone of the original, and what the benchmark calls of it."""

    def __init__(self, clone: str | None) -> None:
        """Import it. Raises NoPeerError."""
        if not clone:
            raise NoPeerError(NEEDED)
        folder = Path(clone).expanduser().resolve()
        if not (folder / _SOURCE).is_file():
            raise NoPeerError(f"{folder} has no {_SOURCE}: {NEEDED}")
        np.__dict__.setdefault("float", float)
        sys.path.insert(0, str(folder))
        try:
            if importlib.util.find_spec(_EXTENSION) is None:
                sys.modules[_EXTENSION] = _built(folder / _SOURCE)
            core, self._modeling, self._utils = (
                importlib.import_module(f"libs.{name}") for name in ("core", "modeling", "utils")
            )
        except (ImportError, OSError, RuntimeError) as problem:
            reason = textwrap.shorten(str(problem) or type(problem).__name__, 80, placeholder="...")
            raise NoPeerError(f"{reason}: {NEEDED}") from None
        self.config: dict[str, Any] = core.load_config(str(folder / "configs" / "thumos_i3d.yaml"))

    def model(self) -> Any:
        """The model of its THUMOS14 configuration with random weights; no branch is scaled to nothing."""
        model = self._modeling.make_meta_arch(self.config["model_name"], **self.config["model"])
        for name, parameter in model.named_parameters():
            if "drop_path" in name:
                nn.init.uniform_(parameter, 0.5, 1.0)
        return model

    @staticmethod
    def levels(model: Any, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features [C, T] through backbone, neck and heads -> each level's logits [1, K, T_l] and offsets
        [1, 2, T_l]."""
        with torch.no_grad():
            x, mask = model.neck(*model.backbone(*model.preprocessing([{"feats": features}])))
            return list(zip(model.cls_head(x, mask), model.reg_head(x, mask), strict=True))

    def trained(self, model: Any, videos: list[dict[str, Tensor]]) -> Callable[[], None]:
        """A training step on `videos`, to be called again and again."""
        optimizer = self._utils.make_optimizer(model, self.config["opt"])
        average = self._utils.ModelEma(model)
        largest = self.config["train_cfg"]["clip_grad_l2norm"]

        def step() -> None:
            model.train()
            optimizer.zero_grad(set_to_none=True)
            model(videos)["final_loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), largest)
            optimizer.step()
            average.update(model)

        return step

    def suppress(
        self, segments: Tensor, scores: Tensor, labels: Tensor, **settings: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its non-maximum suppression."""
        kept: tuple[Tensor, Tensor, Tensor] = self._utils.batched_nms(segments, scores, labels, **settings)
        return kept

    def evaluate(self, truth: Path, said: dict[str, Any], tious: tuple[float, ...]) -> tuple[Any, Any]:
        """mAP [tious] and recall at 1x and 5x [tious, 2] on the subset `test`, in this process."""
        evaluator = self._utils.ANETdetection(
            str(truth), "test", tiou_thresholds=np.array(tious), num_workers=1
        )
        mean_ap, _, recall = evaluator.evaluate(said, verbose=False)
        return mean_ap, recall


def _built(source: Path) -> Any:
    """The extension, compiled as its own set-up does: with Python's optimisation and OpenMP."""
    from torch.utils.cpp_extension import load  # needs setuptools

    beside = Path(sys.executable).parent  # where pip puts ninja
    os.environ["PATH"] = os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)])
    return load(_EXTENSION, [str(source)], extra_cflags=["-O3", "-fopenmp"])
