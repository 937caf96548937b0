"""Features and actions on their grid, in the four layouts, against what the official formulas give.

The official readers themselves were run beside these once; here are numbers that one can check by hand.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import ConfigError, DataError
from trainer.features import UNKNOWN_DURATION, Clip, FeatureSet, cut, read_features, stretch
from trainer.recipe import Recipe

ANET = {"dataset_name": "anet", "feat_stride": 16, "num_frames": 16, "default_fps": 16}


def action(start: float, end: float, number: int = 0) -> dict[str, Any]:
    return {"segment": [start, end], "label": f"c{number}", "label_id": number}


def video(*actions: dict[str, Any], subset: str = "Training", **entry: Any) -> dict[str, Any]:
    return {"subset": subset, "annotations": list(actions)} | entry


def features(frames: int, width: int = 4) -> NDArray[np.float32]:
    return np.arange(frames * width, dtype=np.float32).reshape(frames, width)


class Layout:
    """A data set on disk, and the recipe for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "rgb").mkdir()

    def database(self, **videos: dict[str, Any]) -> None:
        (self.root / "a.json").write_text(json.dumps({"database": videos}))

    def save(self, name: str, array: NDArray[Any], folder: str = "rgb") -> None:
        (self.root / folder).mkdir(exist_ok=True)
        np.save(self.root / folder / f"{name}.npy", array)

    def recipe(self, dataset_name: str = "thumos", **dataset: Any) -> Recipe:
        given = {
            "json_file": self.root / "a.json",
            "feat_folder": self.root / "rgb",
            "num_classes": 1,
            "input_dim": 4,
            "feat_stride": 4,
            "num_frames": 16,
            "default_fps": 30,
            "max_seq_len": 64,
        }
        single = {"backbone_arch": [2, 2, 0], "regression_range": [[0, 10000]]}  # takes every max_seq_len
        return Recipe.model_validate(
            {"dataset_name": dataset_name, "dataset": given | dataset, "model": single}
        )

    def set(
        self, training: bool = True, split: tuple[str, ...] = ("training",), **dataset: Any
    ) -> FeatureSet:
        return FeatureSet(self.recipe(**dataset), split, training)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


# ---------------------------------------------------------------------------------------------- the layouts


def test_thumos(layout: Layout) -> None:
    layout.database(
        v1=video(action(1, 3, 1), action(1, 3, 1), action(0, 0.1), duration=9.5),
        v2=video(action(2, 4), subset="validation"),
    )
    layout.save("v1", features(30).astype(np.float64))
    layout.save("v2", features(5))
    found = layout.set(num_classes=2)
    assert (found.classes, found.empty, found.missing, len(found)) == (("c0", "c1"), (), (), 1)
    item = found.videos[0]
    assert (item.name, item.fps, item.duration) == ("v1", 30.0, 9.5)
    assert (item.segments.dtype, item.labels.dtype) == (np.float32, np.int64)
    clip = found.read(0)
    assert (clip.name, clip.fps, clip.duration, clip.stride, clip.num_frames) == ("v1", 30.0, 9.5, 4.0, 16.0)
    assert clip.offset == 2.0
    np.testing.assert_array_equal(clip.features, features(30))
    assert (clip.features.dtype, clip.segments.dtype) == (np.float32, np.float32)
    # Repetitions stay, a little below 0 is fine: 1 * 30 / 4 - 0.5 * 16 / 4.
    np.testing.assert_allclose(clip.segments, [[5.5, 20.5], [5.5, 20.5], [-2.0, -1.25]])
    assert clip.labels.tolist() == [1, 1, 0]


def test_own_rate_and_unknown_duration(layout: Layout) -> None:
    layout.database(v1=video(action(2, 4), subset="TEST", fps=24), v2=video(action(0, 1), fps=50))
    for name in ("v1", "v2"):
        layout.save(name, features(8))
    found = layout.set(split=("test", "Training"), default_fps=None, training=False)
    assert [(item.name, item.fps) for item in found.videos] == [("v1", 24.0), ("v2", 50.0)]
    assert found.videos[0].duration == UNKNOWN_DURATION == 1e8
    np.testing.assert_allclose(found.read(0).segments, [[10.0, 22.0]])


def test_epic(layout: Layout) -> None:
    layout.database(P1=video(action(8, 16, 2), action(0, 8)))
    np.savez(layout.root / "rgb" / "P1.npz", feats=features(41))
    ours = {"dataset_name": "epic", "file_ext": ".npz", "num_classes": 4, "feat_stride": 16, "num_frames": 32}
    found = layout.set(**ours)
    assert (found.classes, found.empty) == (("c0", "class 1", "c2", "class 3"), (1, 3))
    clip = found.read(0)
    np.testing.assert_allclose(clip.segments, [[14, 29], [-1, 14]])
    assert clip.labels.tolist() == [2, 0]
    half = layout.set(**ours, downsample_rate=2).read(0)
    np.testing.assert_array_equal(half.features, features(41)[::2])
    np.testing.assert_allclose(half.segments, [[7, 14.5], [-0.5, 7]])
    assert (half.stride, half.num_frames, half.offset) == (32.0, 32.0, 0.5)


def test_ego4d_joins_folders(layout: Layout) -> None:
    layout.database(v1=video(action(8, 16)))
    layout.save("x_v1", features(9))
    layout.save("x_v1", 100 + features(9, 2), "flow")
    folders = [layout.root / "rgb", layout.root / "flow"]
    ours = {"dataset_name": "ego4d", "feat_folder": folders, "file_prefix": "x_", "feat_stride": 16}
    clip = layout.set(**ours, input_dim=6, num_frames=32).read(0)
    np.testing.assert_array_equal(clip.features, np.concatenate((features(9), 100 + features(9, 2)), axis=1))
    np.testing.assert_allclose(clip.segments, [[14, 29]])


def test_anet_of_variable_length(layout: Layout) -> None:
    layout.database(v=video(action(2, 3, 0), action(2.0005, 3, 0), action(2, 3, 1), action(5, 5.0005, 1)))
    layout.save("v", features(9))
    clip = layout.set(**ANET, num_classes=2).read(0)
    np.testing.assert_allclose(clip.segments, [[1.5, 2.5], [1.5, 2.5]])  # repetitions and the tiny are gone
    assert clip.labels.tolist() == [0, 1]
    half = layout.set(**ANET, num_classes=2, downsample_rate=2, training=False).read(0)
    np.testing.assert_array_equal(half.features, features(9)[::2])
    np.testing.assert_allclose(half.segments[0], [0.75, 1.25])
    assert (half.stride, half.num_frames) == (32.0, 16.0)


def test_anet_stretched(layout: Layout) -> None:
    layout.database(v=video(action(1, 4, 7)))
    layout.save("v", features(10))
    found = layout.set(
        **{**ANET, "default_fps": 25}, force_upsampling=True, max_seq_len=20, downsample_rate=3
    )
    clip = found.read(0)
    assert (clip.stride, clip.num_frames, clip.offset) == (
        8.0,
        8.0,
        0.5,
    )  # (9 * 16 + 16) / 20, not downsampled
    np.testing.assert_allclose(clip.segments, [[2.625, 12.0]])
    np.testing.assert_array_equal(clip.features, stretch(features(10), 20))
    # One class for "any action"; the file's own names remain for external scores.
    assert clip.labels.tolist() == [0]
    assert (len(found.classes), found.classes[0], found.classes[7], found.empty) == (8, "class 0", "c7", ())


@pytest.mark.parametrize(("forced", "stride", "segment"), [(False, 50, [0.5, 1.5]), (True, 25, [1.5, 3.5])])
def test_anet_of_fixed_length(layout: Layout, forced: bool, stride: float, segment: list[float]) -> None:
    layout.database(v=video(action(2, 4), duration=20))
    layout.save("v", features(10))
    ours = {**ANET, "default_fps": 25, "feat_stride": 0, "force_upsampling": forced, "max_seq_len": 20}
    clip = layout.set(**ours).read(0)
    assert (clip.stride, clip.num_frames, len(clip.features)) == (stride, stride, 20 if forced else 10)
    np.testing.assert_allclose(clip.segments, [segment])
    layout.save("v", features(21))
    with pytest.raises(DataError, match=r"v\.npy: 21 vectors, expected at most `dataset\.max_seq_len` 20"):
        layout.set(**ours).read(0)
    layout.save("v", features(10))
    layout.database(v=video(action(2, 4)))
    with pytest.raises(DataError, match=r"`v` has no `duration`"):
        layout.set(**ours).read(0)


def test_anet_training_drops_what_lies_behind_the_features(layout: Layout) -> None:
    # On the grid: t - 0.5; the features end at 10.5.
    layout.database(v=video(action(11.5, 13), action(9, 13), action(10, 13), action(2, 3)))
    layout.save("v", features(10))
    clip = layout.set(**ANET).read(0)
    np.testing.assert_allclose(clip.segments, [[8.5, 10.5], [1.5, 2.5]])
    assert len(clip.labels) == 2
    assert len(layout.set(**ANET, training=False).read(0).segments) == 4
    layout.database(v=video(action(20, 30)))
    assert layout.set(**ANET).read(0).segments.shape == (0, 2)


def test_videos_without_actions(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    layout.database(v1=video(), v2=video(action(0, 1)), v3=video(subset="test"))
    for name in ("v1", "v2", "v3"):
        layout.save(name, features(8))
    with caplog.at_level(logging.INFO):
        assert [item.name for item in layout.set().videos] == ["v2"]
    assert "1 recordings without annotations are left out of training" in caplog.text
    kept = layout.set(training=False)
    assert [item.name for item in kept.videos] == ["v1", "v2"]
    clip = kept.read(0)
    assert (clip.segments.shape, clip.segments.dtype, clip.labels.shape) == ((0, 2), np.float32, (0,))
    with pytest.raises(DataError, match=r"none of the 1 recordings of `test` has an annotation"):
        layout.set(split=("test",))


# ------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("name", ["thumos", "ego4d"])
def test_missing_features_are_left_out_with_one_warning(
    layout: Layout, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    layout.database(**{f"v{i:02d}": video(action(0, 1)) for i in range(14)})
    layout.save("v03", features(8))
    found = layout.set(dataset_name=name)
    assert [item.name for item in found.videos] == ["v03"]
    assert len(found.missing) == 13
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "13 of 14 recordings have no features" in warnings[0]
    assert "v00, v01, v02, v04, v05, v06, v07, v08, v09, v10 and 3 more" in warnings[0]


@pytest.mark.parametrize("name", ["epic", "anet"])
def test_missing_features_are_listed_together(layout: Layout, name: str) -> None:
    layout.database(**{f"v{i:02d}": video(action(0, 1)) for i in range(23)})
    layout.save("v03", features(8))
    with pytest.raises(DataError, match=r"22 of 23 recordings have no features") as problem:
        layout.set(dataset_name=name)
    message = str(problem.value)
    assert str(layout.root / "rgb" / "v20.npy") in message
    assert "v03.npy" not in message
    assert "v21.npy" not in message
    assert "and 2 more; check `dataset.feat_folder`, `dataset.file_prefix` and `dataset.file_ext`" in message


@pytest.mark.parametrize("name", ["thumos", "ego4d", "epic", "anet"])
def test_no_features_at_all(layout: Layout, name: str) -> None:
    layout.database(v=video(action(0, 1)))
    with pytest.raises(DataError, match=r"1 of 1 recordings have no features; expected .*v\.npy;"):
        layout.set(dataset_name=name)


def test_a_video_needs_its_features_in_every_folder(layout: Layout) -> None:
    layout.database(v=video(action(0, 1)))
    layout.save("v", features(8))
    (layout.root / "flow").mkdir()
    with pytest.raises(DataError, match=r"flow/v\.npy"):
        layout.set(feat_folder=[layout.root / "rgb", layout.root / "flow"])


def test_paths_that_are_not_set_or_not_there(layout: Layout) -> None:
    layout.database(v=video(action(0, 1)))
    with pytest.raises(ConfigError, match=r"`dataset\.json_file` is not set"):
        layout.set(json_file=None)
    with pytest.raises(ConfigError, match=r"`dataset\.json_file` is .*b\.json, which is no file"):
        layout.set(json_file=layout.root / "b.json")
    with pytest.raises(ConfigError, match=r"`dataset\.feat_folder` is not set"):
        layout.set(feat_folder=())
    for path in ("flow", "a.json"):
        with pytest.raises(ConfigError, match=rf"`dataset\.feat_folder` is .*{path}, which is no folder"):
            layout.set(feat_folder=(layout.root / "rgb", layout.root / path))
    with pytest.raises(ConfigError, match=r"HDF5 are not read; convert them to \.npy.*numpy\.save"):
        layout.set(feat_folder=layout.root / "feats.hdf5")
    with pytest.raises(ConfigError, match=r"`dataset\.feat_stride` is 0.*belongs to `dataset_name: anet`"):
        layout.set(feat_stride=0)


def test_subsets_that_are_not_there(layout: Layout) -> None:
    layout.database(v=video(action(0, 1)))
    layout.save("v", features(8))
    with pytest.raises(
        DataError, match=r"a\.json: no recording has the subset `trainin` \(did you mean `Trai"
    ):
        layout.set(split=("training", "trainin"))
    with pytest.raises(ConfigError, match=r"no subset was asked for; set `train_split`"):
        layout.set(split=())


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("thumos", 3, r"found 2 labels, expected `dataset\.num_classes` 3"),
        ("ego4d", 1, r"found 2 labels, expected `dataset\.num_classes` 1"),
        ("anet", 3, r"found 2 labels, expected `dataset\.num_classes` 3"),
        ("epic", 1, r"found 2 labels, expected at most `dataset\.num_classes` 1"),
        ("epic", 5, r"found label ids outside 0\.\.4: `c5` \(5\)"),
        ("thumos", 2, r"found label ids outside 0\.\.1: `c5` \(5\); number the labels from 0"),
    ],
)
def test_labels_that_do_not_fit(layout: Layout, name: str, classes: int, message: str) -> None:
    layout.database(v=video(action(0, 1, 0), action(0, 1, 5)))
    with pytest.raises(DataError, match=r"a\.json: " + message):
        layout.set(dataset_name=name, num_classes=classes)


def test_ids_are_bounded_where_the_recipe_has_one_class(layout: Layout) -> None:
    for number in (-1, 10**9):
        layout.database(v=video(action(0, 1, number)))
        with pytest.raises(DataError, match=r"found label ids outside 0\.\.99999"):
            layout.set(**ANET)


def test_unknown_rates(layout: Layout) -> None:
    layout.database(v1=video(action(0, 1)), v2=video(action(0, 1), fps=25), v3=video(action(0, 1)))
    for name in ("v1", "v2"):
        layout.save(name, features(8))
    with pytest.raises(DataError, match=r"no `fps` for 1 recordings: `v1`; .*`dataset\.default_fps`"):
        layout.set(default_fps=None)


def test_widths_that_do_not_fit(layout: Layout) -> None:
    layout.database(v=video(action(0, 1)))
    layout.save("v", features(8, 3))
    layout.save("v", features(8, 2), "flow")
    found = layout.set(feat_folder=(layout.root / "rgb", layout.root / "flow"), input_dim=6)
    with pytest.raises(DataError) as problem:
        found.read(0)
    message = str(problem.value)
    assert "features of `v` are 5 wide" in message
    assert f"{layout.root / 'rgb' / 'v.npy'} has 3, {layout.root / 'flow' / 'v.npy'} has 2" in message
    assert "expected `dataset.input_dim` 6" in message
    assert "transpose" not in message
    with pytest.raises(DataError, match=r"are 3 wide .*; its rows should be vectors: transpose it"):
        layout.set(input_dim=8).read(0)


def test_lengths_that_differ(layout: Layout) -> None:
    layout.save("v", features(8))
    layout.save("v", features(9), "flow")
    rgb, flow = layout.root / "rgb", layout.root / "flow"
    with pytest.raises(DataError, match=r"`v` differ in length: .*rgb/v\.npy has 8, .*flow/v\.npy has 9"):
        read_features((rgb, flow), "v", None, ".npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_features_that_are_not_finite(layout: Layout, value: float) -> None:
    array = features(8).astype(np.float64)
    array[3, 1] = value
    layout.save("v", array)
    with pytest.raises(DataError, match=r"rgb/v\.npy: holds NaN or Inf"):
        read_features((layout.root / "rgb",), "v", None, ".npy")


def test_features_are_never_unpickled(layout: Layout) -> None:
    np.save(layout.root / "rgb" / "v.npy", np.array([{}, None], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"v\.npy: not readable"):
        read_features((layout.root / "rgb",), "v", None, ".npy")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_name_cannot_lead_out_of_the_folder(layout: Layout, name: str) -> None:
    layout.database(**{name: video(action(0, 1))})
    with pytest.raises(DataError, match=r"leaves the folder, expected a plain name"):
        layout.set()


def test_torch_is_not_needed() -> None:
    code = "import sys, trainer.features, trainer.fusion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------ stretching


@pytest.mark.parametrize(
    ("frames", "length"),
    [(1, 192), (2, 192), (50, 192), (191, 192), (192, 192), (193, 192), (5000, 192), (100, 2304), (7, 5)],
)
def test_stretching_agrees_with_torch(frames: int, length: int) -> None:
    array = np.random.default_rng(frames).random((frames, 8), np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(array.T.copy())[None], size=length, mode="linear", align_corners=False
    )
    found = stretch(array, length)
    assert found.dtype == np.float32
    # How torch rounds a position (in float32, once or twice) changes with the processor and the release.
    np.testing.assert_allclose(found, expected[0].numpy().T, rtol=0, atol=5e-5)


@given(st.integers(1, 60), st.integers(1, 60))
def test_stretching_keeps_a_line_and_its_ends(frames: int, length: int) -> None:
    line = np.arange(frames, dtype=np.float32)[:, None]
    expected = ((np.arange(length) + 0.5) * frames / length - 0.5).clip(0, frames - 1)
    np.testing.assert_allclose(stretch(line, length)[:, 0], expected, atol=1e-5)


# --------------------------------------------------------------------------------------------------- cutting


def clip_of(frames: int, segments: list[tuple[float, float]], num_frames: float = 32) -> Clip:
    """A clip whose features are their own positions, and whose labels are those of its segments."""
    return Clip(
        name="v",
        features=np.arange(frames, dtype=np.float32)[:, None],
        segments=np.array(segments, np.float32).reshape(-1, 2),
        labels=np.arange(len(segments)),
        fps=30.0,
        duration=9.0,
        stride=16.0,
        num_frames=num_frames,
    )


def test_a_cut_where_nothing_is_to_do_is_the_clip() -> None:
    clip = clip_of(20, [(1, 2)])
    generator = np.random.default_rng(0)
    assert cut(clip, 20, 0.5, None, generator) is clip
    assert cut(clip, 30, 0.5, (1.0, 1.0), generator) is clip


def test_a_cut_by_hand() -> None:
    # Pieces of 4 vectors reach 1 beyond both ends: [-1, 5], [0, 6] and [1, 7].
    clip = clip_of(6, [(-1, 1), (5.0, 8.0), (2, 2), (2.5, 3)])
    expected = {
        0: ([[-1, 1], [2.5, 3]], [0, 3]),
        1: ([[-1, 0], [1.5, 2]], [0, 3]),
        2: ([[3, 5], [0.5, 1]], [1, 3]),
    }
    seen = set()
    for seed in range(20):
        piece = cut(clip, 4, 0.5, None, np.random.default_rng(seed))
        first = int(piece.features[0, 0])
        seen.add(first)
        segments, labels = expected[first]
        np.testing.assert_allclose(piece.segments, segments)
        assert piece.labels.tolist() == labels
        assert piece.segments.dtype == np.float32
    assert seen == {0, 1, 2}


def test_a_cut_looks_for_an_action() -> None:
    clip = clip_of(1000, [(900, 910)])
    for seed in range(20):
        assert cut(clip, 100, 0.5, None, np.random.default_rng(seed)).labels.tolist() == [0]


def test_a_cut_without_any_action_is_the_last_tried() -> None:
    for clip in (clip_of(50, []), clip_of(50, [(10, 10)]), clip_of(50, [(0, 50)])):
        piece = cut(clip, 10, 0.5, None, np.random.default_rng(0))
        assert (len(piece.features), piece.segments.shape, piece.labels.shape) == (10, (0, 2), (0,))


def test_a_share_of_nothing_is_at_least_one_vector() -> None:
    assert len(cut(clip_of(3, [(0, 3)]), 8, 0.0, (0.0, 0.1), np.random.default_rng(0)).features) == 1


@st.composite
def clips(draw: st.DrawFn) -> Clip:
    frames = draw(st.integers(1, 60))
    times = st.floats(-3, frames + 3, width=32)
    pairs = draw(st.lists(st.tuples(times, times), max_size=6))
    return clip_of(frames, [(min(pair), max(pair)) for pair in pairs], draw(st.sampled_from([8, 16, 32])))


@given(
    clip=clips(),
    max_length=st.integers(1, 70),
    thresh=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    ratio=st.sampled_from([None, (0.9, 1.0), (0.2, 0.6), (0.0, 1.0)]),
    seed=st.integers(0, 2**32),
)
def test_properties_of_a_cut(
    clip: Clip, max_length: int, thresh: float, ratio: tuple[float, float] | None, seed: int
) -> None:
    frames = len(clip.features)
    piece = cut(clip, max_length, thresh, ratio, np.random.default_rng(seed))
    again = cut(clip, max_length, thresh, ratio, np.random.default_rng(seed))
    for name in ("features", "segments", "labels"):
        np.testing.assert_array_equal(getattr(piece, name), getattr(again, name))

    length = len(piece.features)
    if frames > max_length:
        assert length == max_length
    elif ratio is None:
        assert piece is clip
    else:
        assert max(round(ratio[0] * frames), 1) <= length <= max(round(ratio[1] * frames), 1)
    if piece is clip:
        return

    first = int(piece.features[0, 0])
    np.testing.assert_array_equal(piece.features, clip.features[first : first + length])
    assert len(piece.segments) == len(piece.labels)
    assert (piece.segments >= -clip.offset - 1e-4).all()
    assert (piece.segments <= length + clip.offset + 1e-4).all()
    assert (piece.segments[:, 0] < piece.segments[:, 1]).all()
    # A label is the number of its segment in the clip: the piece has that segment, shifted and cut off.
    whole = clip.segments[piece.labels].astype(np.float64)
    expected = whole.clip(first - clip.offset, first + length + clip.offset)
    np.testing.assert_allclose(piece.segments, expected - first, atol=1e-4)
    share = (expected[:, 1] - expected[:, 0]) / (whole[:, 1] - whole[:, 0])
    assert (share >= thresh - 1e-4).all()
    assert (np.diff(piece.labels) > 0).all()


@given(st.integers(2, 40), st.data())
def test_a_cut_has_an_action_where_every_place_has_one(frames: int, data: st.DataObject) -> None:
    # An action of one vector at every position: whatever the place, one lies inside.
    clip = clip_of(frames, [(i, i + 1) for i in range(frames)])
    length = data.draw(st.integers(1, frames - 1))
    piece = cut(clip, length, 0.5, None, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(piece.labels) >= length
