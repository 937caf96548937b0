"""What native code may be loaded into the process: only what this user, or root, alone can have written."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from engine import ConfigError
from engine.native import load, trusted


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    (folder / "answer.c").write_text("int answer(void) { return 42; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "answer.so", "answer.c"], cwd=folder, check=True)
    (folder / "answer.so").chmod(0o755)
    return folder / "answer.so"


def test_a_library_of_this_user_is_loaded_and_named_before(
    library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert load(library).answer() == 42
    assert f"loading {library} into this process" in caplog.text


def test_a_link_is_followed_to_what_it_names(library: Path, tmp_path: Path) -> None:
    (tmp_path / "link.so").symlink_to(library)
    assert trusted(tmp_path / "link.so") == library
    library.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=f"others can write {library.parent}"):
        trusted(tmp_path / "link.so")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o666])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_what_others_can_write_is_refused_itself_and_all_above_it(
    library: Path, mode: int, above: int
) -> None:
    place = (library, *library.parents)[above]
    place.chmod(mode | 0o100)
    with pytest.raises(ConfigError, match=rf"others can write {place} \(mode 0.*chmod go-w {place}"):
        load(library)
    place.chmod(0o755)
    load(library)


def test_a_folder_like_tmp_will_do_above_the_librarys_own_but_not_as_that(
    library: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o1777)
    trusted(library)
    shutil.copy(library, tmp_path / "answer.so")
    with pytest.raises(ConfigError, match="others can write"):
        trusted(tmp_path / "answer.so")


@pytest.mark.parametrize("above", [0, 1])
def test_what_belongs_to_another_user_is_refused(
    library: Path, above: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (library, *library.parents)[above]
    if os.geteuid() == 0:
        os.chown(place, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=r"belongs to user \d+, expected root or user \d+, which is you"):
        load(library)


def test_what_is_no_library_is_a_sentence(library: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "text.so").write_text("text")
    (tmp_path / "text.so").chmod(0o644)
    for path, sentence in {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "not a regular file",
        tmp_path / "none": "No such file",
        tmp_path / "loop": "cannot be loaded",
        library / "below": "Not a directory",
        tmp_path / "text.so": "build it on this machine",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            load(path)
