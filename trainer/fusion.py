"""Video-level class scores from elsewhere, fused with moments that know no class (ActivityNet, THUMOS14).

A model trained on one class finds when something happens; a classifier of whole videos (CUHK's for
ActivityNet, UntrimmedNet's for THUMOS14) says what. Scores are fused as the official ActionFormer does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.errors import ConfigError, DataError
from engine.recording import read_arrays

Scores = dict[str, NDArray[np.float64]]

# CUHK's file for ActivityNet's validation videos, 4 926 videos of 200 classes, has some 20 MB.
MAX_SCORE_BYTES = 512 * 1024**2
_SHOWN = 20


def read_scores(path: Path) -> Scores:
    """Read video-level class scores: {video: float64 [K]}, the same K for every video.

    - `.json`: {"results": {video: [K numbers]}}, or the inner object alone.
    - `.npz`: one array [K] a video, under its name.

    Raises ConfigError where there is no such file, or it is a pickle or of another kind; DataError where it
    is damaged or not what is expected, naming the videos.
    """
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise ConfigError(
            f"`test_cfg.ext_score_file` is {path}, a pickle: it could run any code and is never read; if you "
            f'trust its origin, convert it to JSON yourself: python -c "import json, pickle; '
            f"s = pickle.load(open('{path}', 'rb')); "
            "json.dump({k: [float(x) for x in v] for k, v in s.items()}, "
            f"open('{path.with_suffix('.json')}', 'w'))\""
        )
    if suffix not in (".json", ".npz"):
        raise ConfigError(f"`test_cfg.ext_score_file` is {path}, expected a .json or an .npz file")
    if not path.is_file():
        raise ConfigError(
            f"`test_cfg.ext_score_file` is {path}, which is no file; set it to the file of class scores "
            "(relative to the working directory), or leave it out"
        )
    size = path.stat().st_size
    if size > MAX_SCORE_BYTES:
        raise DataError(f"{path}: {size} bytes, expected class scores of at most {MAX_SCORE_BYTES}")
    found: Mapping[str, Any] = read_arrays(path) if suffix == ".npz" else _read_json(path)
    if not found:
        raise DataError(f"{path}: holds no video, expected class scores for each")
    scores: Scores = {}
    problems: list[str] = []
    for name, value in found.items():
        row = _row(value)
        if row is None:
            problems.append(f"`{name}`")
        else:
            scores[name] = row
    if problems:
        raise DataError(
            f"{path}: expected a list of finite numbers, one for each class, for each video; "
            f"found something else for {_listed(problems)}"
        )
    lengths = {len(row): name for name, row in scores.items()}
    if len(lengths) > 1:
        shown = ", ".join(f"{length} for `{name}`" for length, name in sorted(lengths.items())[:_SHOWN])
        raise DataError(f"{path}: different numbers of classes: {shown}; expected the same for each video")
    return scores


def check_covered(scores: Mapping[str, object], names: Iterable[str]) -> None:
    """See that every video in `names` has class scores. Raises DataError that lists those without."""
    wanted = list(names)
    missing = [f"`{name}`" for name in wanted if name not in scores]
    if missing:
        raise DataError(
            f"`test_cfg.ext_score_file` has no class scores for {len(missing)} of {len(wanted)} videos: "
            f"{_listed(missing)}; take the file of this subset, whose names are those of the annotations"
        )


def fuse(
    segments: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
    class_scores: ArrayLike,
    *,
    keep: int = 200,
    top: int = 2,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Give the best `keep` moments of a video, one after another, to each of its `top` best classes.

    `segments` [N, 2] and `scores` [N] are moments in any order, `class_scores` [K] the video's. Returns
    segments [M, 2], scores [M] (the roots of class score times score) and labels [M], where
    M = min(N, keep) * min(K, top): all moments of the best class, best first, then those of the next.
    Raises DataError where a product is negative, as no root is a score then.
    """
    moments = np.asarray(segments, np.float64).reshape(-1, 2)
    confidence, by_class = np.asarray(scores, np.float64), np.asarray(class_scores, np.float64)
    # A stable order, so that equal scores come out the same on every machine: the later of them first.
    best = np.argsort(confidence, kind="stable")[::-1][:keep]
    labels = np.argsort(by_class, kind="stable")[::-1][:top]
    products = by_class[labels][:, None] * confidence[best][None, :]
    if (products < 0).any():
        raise DataError(
            f"found the class scores {by_class[labels].tolist()} and moments scored down to "
            f"{confidence.min():g}; expected probabilities: give the file of `test_cfg.ext_score_file` a "
            "softmax or a sigmoid if it holds logits"
        )
    return (
        np.tile(moments[best], (len(labels), 1)),
        np.sqrt(products).reshape(-1),
        np.repeat(labels.astype(np.int64), len(best)),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not readable as JSON: {problem}") from None
    if isinstance(document, dict) and isinstance(document.get("results"), dict):
        document = document["results"]
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: found a {type(document).__name__}, expected an object of videos and their scores, or "
            "one under the key `results`"
        )
    return document


def _row(value: object) -> NDArray[np.float64] | None:
    try:
        row = np.asarray(value)
    except (ValueError, OverflowError, RecursionError):  # rows of different lengths, or nested too deeply
        return None
    if row.ndim != 1 or row.size == 0 or row.dtype.kind not in "fiu" or not np.isfinite(row).all():
        return None
    return row.astype(np.float64)


def _listed(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
