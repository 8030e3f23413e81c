"""What a calibration learns from."""

from pathlib import Path

import pytest

from kvferry.codec.lab.text import calibration_text, in_turn
from kvferry.errors import ModelError


def test_every_file_has_a_share_of_the_tokens_that_are_fitted(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text(file.stem * 50_000)
    made = calibration_text(files, 1024)
    read = made.fitted[: 4 * 1024]
    assert min(read.count(file.stem) for file in files) > 1024
    assert {made.fitted.count(file.stem) for file in files} == {50_000}
    assert made.source == "a.txt, b.txt, c.txt"


def test_one_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one two\n\nthree")
    assert calibration_text([file], 1024).fitted == "one two\n\nthree"


def test_a_short_text_ends_and_the_others_go_on() -> None:
    assert in_turn([("abc", 2), ("123456789", 2)]) == "ab\n\n12\n\nc\n\n34\n\n56\n\n78\n\n9"
    assert in_turn([]) == in_turn([("", 5), ("", 5)]) == ""


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.txt"):
        calibration_text([tmp_path / "gone.txt"], 1024)
