"""Class scores from elsewhere: what is read, what is refused, and how they are fused with moments."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from engine.errors import ConfigError, DataError
from trainer import fusion
from trainer.fusion import check_covered, fuse, read_scores

GOLDEN = Path(__file__).parents[1] / "golden"


def _write(folder: Path, document: Any) -> Path:
    path = folder / "scores.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# --------------------------------------------------------------------------------------------------- reading


def test_json_with_and_without_results(tmp_path: Path) -> None:
    rows = {"v1": [0.25, 0.75], "v2": [1, 0]}
    for document in (rows, {"version": "VERSION 1.3", "results": rows, "class": ["a", "b"]}):
        scores = read_scores(_write(tmp_path, document))
        assert list(scores) == ["v1", "v2"]
        assert scores["v1"].tolist() == [0.25, 0.75]
        assert scores["v2"].dtype == np.float64


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "scores.npz", v1=np.array([0.25, 0.75], np.float32), v2=np.array([1, 0]))
    scores = read_scores(tmp_path / "scores.npz")
    assert {name: row.tolist() for name, row in scores.items()} == {"v1": [0.25, 0.75], "v2": [1.0, 0.0]}
    assert all(row.dtype == np.float64 for row in scores.values())
    np.savez(tmp_path / "objects.npz", v1=np.array([{}], object))
    with pytest.raises(DataError, match=r"objects\.npz: not readable as an \.npz file of plain arrays"):
        read_scores(tmp_path / "objects.npz")


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".PKL"])
def test_a_pickle_is_never_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    path.write_bytes(pickle.dumps(_Trap(tmp_path / "trapped")))
    with pytest.raises(ConfigError, match=r"`test_cfg\.ext_score_file` is .*never read.*json\.dump"):
        read_scores(path)
    assert not (tmp_path / "trapped").exists()


def test_the_way_out_of_a_pickle_works(tmp_path: Path) -> None:
    path = tmp_path / "scores.pkl"
    path.write_bytes(pickle.dumps({"v1": np.array([0.25, 0.5], np.float32)}))
    with pytest.raises(ConfigError) as problem:
        read_scores(path)
    line = re.search(r'python -c "(.*)"', str(problem.value))
    assert line is not None
    exec(line[1], {})
    assert read_scores(tmp_path / "scores.json")["v1"].tolist() == [0.25, 0.5]


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`test_cfg\.ext_score_file` is .*s\.json, which is no file"):
        read_scores(tmp_path / "s.json")
    with pytest.raises(ConfigError, match=r"s\.csv, expected a \.json or an \.npz file"):
        read_scores(tmp_path / "s.csv")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("[1]", "found a list, expected an object of videos"),
        ("{}", "holds no video"),
        ('{"results": {}}', "holds no video"),
        ('{"a": [1, 2], "b": [1], "c": [3, 4]}', "different numbers of classes: 1 for `b`, 2 for `c`"),
        (
            '{"a": [1], "b": [NaN], "c": [true], "d": [[1]], "e": ["1"], "f": [], "g": 1, "h": [1, [2]], '
            '"i": null, "j": {"x": 1}, "k": [1' + "0" * 400 + "]}",
            "something else for `b`, `c`, `d`, `e`, `f`, `g`, `h`, `i`, `j`, `k`",
        ),
    ],
)
def test_malformed_scores(tmp_path: Path, document: str, message: str) -> None:
    with pytest.raises(DataError, match=r"scores\.json: ") as problem:
        read_scores(_write(tmp_path, document))
    assert message in str(problem.value)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "MAX_SCORE_BYTES", 5)
    with pytest.raises(DataError, match=r"scores\.json: 12 bytes, expected class scores of at most 5"):
        read_scores(_write(tmp_path, '{"v1": [10]}'))


def test_videos_without_scores_are_listed_together() -> None:
    scores = {"v1": np.ones(2)}
    check_covered(scores, ["v1"])
    check_covered(scores, [])
    with pytest.raises(DataError, match=r"no class scores for 2 of 3 videos: `v2`, `v3`; take the file"):
        check_covered(scores, ["v1", "v2", "v3"])
    with pytest.raises(DataError, match=r"`v19` and 5 more"):
        check_covered({}, [f"v{i:02d}" for i in range(25)])


# ---------------------------------------------------------------------------------------------------- fusing


def test_fusing_by_hand() -> None:
    segments = np.array([[0, 1], [2, 3], [4, 5]], np.float32)
    scores = np.array([0.25, 1.0, 0.01], np.float32)
    moments, fused, labels = fuse(segments, scores, [0.09, 0.0, 0.81, 0.04], keep=2, top=2)
    assert moments.tolist() == [[2, 3], [0, 1], [2, 3], [0, 1]]
    np.testing.assert_allclose(fused, [0.9, 0.45, 0.3, 0.15], rtol=1e-12)
    assert labels.tolist() == [2, 2, 0, 0]
    assert (moments.dtype, fused.dtype, labels.dtype) == (np.float64, np.float64, np.int64)


def test_fusing_as_officially() -> None:
    """`fusion.json` holds the input and the output of the official `postprocess_results`."""
    golden = json.loads((GOLDEN / "fusion.json").read_text())
    given, expected = golden["input"], golden["output"]
    names, expected_names = np.array(given["video-id"]), np.array(expected["video-id"])
    for name, class_scores in golden["class_scores"].items():
        mine, theirs = names == name, expected_names == name
        segments = np.stack([np.array(given[key])[mine] for key in ("t-start", "t-end")], axis=1)
        moments, scores, labels = fuse(
            segments,
            np.array(given["score"])[mine],
            class_scores,
            keep=golden["num_pred"],
            top=golden["topk"],
        )
        for key, found in (("t-start", moments[:, 0]), ("t-end", moments[:, 1]), ("score", scores)):
            np.testing.assert_allclose(found, np.array(expected[key])[theirs], rtol=1e-12)
        np.testing.assert_array_equal(labels, np.array(expected["label"])[theirs])


def test_nothing_to_fuse_and_few_classes() -> None:
    moments, scores, labels = fuse(np.zeros((0, 2)), np.zeros(0), [0.5, 0.5])
    assert (moments.shape, scores.shape, labels.shape) == ((0, 2), (0,), (0,))
    assert fuse(np.array([[1.0, 2.0]]), np.array([1.0]), [0.25])[1].tolist() == [0.5]


def test_logits_are_refused() -> None:
    with pytest.raises(DataError, match=r"class scores \[-1\.0, -2\.0\].*expected probabilities"):
        fuse(np.array([[1.0, 2.0]]), np.array([1.0]), [-2.0, -3.0, -1.0])


_share = st.floats(0, 1, width=32)


@given(
    scores=hnp.arrays(np.float32, st.integers(0, 12), elements=_share),
    class_scores=hnp.arrays(np.float32, st.integers(1, 5), elements=_share),
    keep=st.integers(1, 8),
    top=st.integers(1, 6),
)
def test_properties_of_fusing(
    scores: NDArray[np.float32], class_scores: NDArray[np.float32], keep: int, top: int
) -> None:
    segments = np.stack((np.arange(len(scores)), np.arange(len(scores)) + 1), axis=1).astype(np.float32)
    moments, fused, labels = fuse(segments, scores, class_scores, keep=keep, top=top)
    kept, classes = min(keep, len(scores)), min(top, len(class_scores))
    assert (moments.shape, fused.shape, labels.shape) == ((kept * classes, 2),) + ((kept * classes,),) * 2
    source = moments[:, 0].astype(int)
    np.testing.assert_allclose(fused**2, class_scores[labels].astype(np.float64) * scores[source], atol=1e-9)
    left_out = np.delete(scores, source[:kept])
    assert kept == 0 or left_out.size == 0 or left_out.max() <= scores[source[:kept]].min()
    for block in fused.reshape(classes, kept):
        assert (np.diff(block) <= 0).all()
