"""Annotations, predictions and scores with a flipped bit or cut: an error by name, or a file that is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import DataError
from trainer.annotations import read_annotations
from trainer.fusion import read_scores
from trainer.predictions import read_predictions

ANNOTATIONS = json.dumps(
    {
        "classes": ["walk", "sit"],
        "database": {
            "a": {
                "subset": "test",
                "duration": 12.5,
                "annotations": [{"segment": [1.0, 2.5], "label": "walk", "label_id": 0}],
            },
            "b": {"subset": "train", "duration": 3, "annotations": []},
        },
    }
)
TABLE = "recording,start,end,label,subset\na,1.0,2.5,walk,test\na,3.25,4,sit,test\nb,0,1e0,walk,train\n"
RESULTS = json.dumps({"results": {"a": [{"segment": [1.0, 2.5], "label": "walk", "score": 0.75}], "b": []}})


def events() -> str:
    """The lines of one action."""
    common = {"version": 1, "stream": "a", "bundle": "tiny@0", "instance_id": "a/0/1", "label": "walk"}
    lines = [
        {**common, "type": "action.started", "start": 1.0, "score": 0.5, "time": 1.5},
        {**common, "type": "action.ended", "start": 1.0, "end": 2.5, "score": 0.75, "time": 3.0},
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


FORMS: list[tuple[str, str, Callable[[Path], object]]] = [
    ("a.json", ANNOTATIONS, read_annotations),
    ("a.csv", TABLE, read_annotations),
    ("r.json", RESULTS, read_predictions),
    ("e.jsonl", events(), read_predictions),
    ("s.json", '{"results": {"a": [0.75, 1.0], "b": [2.5, 0.5]}}', read_scores),
]


@pytest.mark.parametrize(("name", "text", "read"), FORMS, ids=[form[0] for form in FORMS])
def test_no_flipped_bit_ends_in_a_traceback(
    name: str, text: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    read(path)
    draw = random.Random(15)
    refused = 0
    for number in range(400):
        data = bytearray(text.encode())
        if number % 10 == 9:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            read(path)
        except DataError as problem:
            refused += name in str(problem)
    assert refused > 50


@pytest.mark.parametrize(("name", "text", "read"), FORMS, ids=[form[0] for form in FORMS])
@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 4000, "9" * 600_000, "1e999", "NaN", "[" * 50_000])
def test_no_number_is_beyond_measure(
    number: str, name: str, text: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / name
    for found in ("2.5", "1.0", "0.75", "12.5", '"walk"', "{", "1,"):
        if found not in text:
            continue
        path.write_text(text.replace(found, number + ("," if found == "1," else "")))
        with pytest.raises(DataError):
            read(path)
