"""Whoever writes golden vectors anew changes those that were named, and no other file."""

import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))

import regenerate  # noqa: E402


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["keys"], {"keys.json"}),
        (["affine8"], {"affine8.kvferry", "affine8.restored.kvferry"}),
        (["streaming", "random", "random"], {"streaming.kvferry", "random.kvferry"}),
        (["centroid"], {"centroid.kvferry"}),
        (["ferry"], {"ferry.kvferry", "ferry.restored.kvferry"}),
        (["calibration_ferry"], {"calibration_ferry.kvferry"}),
    ],
)
def test_only_what_is_named_is_written(tmp_path: Path, names: list[str], files: set[str]) -> None:
    assert regenerate.main(names, tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == files


def test_key_vectors_come_out_as_they_are(tmp_path: Path) -> None:
    regenerate.main(["keys"], tmp_path)
    assert (tmp_path / "keys.json").read_bytes() == (GOLDEN / "keys.json").read_bytes()


@pytest.mark.parametrize("names", [[], ["keys", "gzip"], ["--help"]])
def test_without_a_name_that_is_one_nothing_is_written(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert regenerate.main(names, tmp_path) == 2
    assert not list(tmp_path.iterdir())
    told = capsys.readouterr().err
    assert "names: keys calibration_ferry" in told
    assert ("there is no 'gzip'" in told) == ("gzip" in names)


def test_every_golden_file_has_a_name(tmp_path: Path) -> None:
    assert regenerate.main(["all"], tmp_path) == 0
    kept = {path.name for path in GOLDEN.iterdir() if path.suffix in (".kvferry", ".json")}
    assert {path.name for path in tmp_path.iterdir()} == kept
