"""``kvferry experiment`` as a user meets it, on a small model from a folder."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.codec.mlx.openblas import model_environment

FILE = """
model = "MODEL"
texts = "some.txt"
contexts = 40
continuation = 8
[[codec]]
name = "affine"
options = { bits = 4 }
[[experiment]]
kind = "fidelity"
greedy = 2
codecs = ["affine", "kvtc"]
"""


CALIBRATED = """
model = "MODEL"
texts = "some.txt"
contexts = 256
continuation = 16
[[calibration]]
name = "one"
codecs = "kvtc"
texts = "some.txt"
tokens = 2048
[[codec]]
name = "kvtc"
calibration = "one"
ratios = 4
[[experiment]]
kind = "fidelity"
greedy = 0
"""


def kvferry(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "kvferry", "experiment", *map(str, arguments)],
        env=dict(os.environ) | model_environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_from_a_file_to_a_report(tmp_path: Path) -> None:
    model, out, report = tmp_path / "model", tmp_path / "out", tmp_path / "report.md"
    model.mkdir()
    save_model(*sharp_llama(97, head_dim=32), model)
    (tmp_path / "some.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    file = tmp_path / "some.toml"
    file.write_text(FILE.replace("MODEL", str(model)))
    first = kvferry(file, "--out", out, "--json", "-")
    # kvtc has no calibration here: its run fails, in one line, and the other is measured.
    assert first.returncode == 1
    told = json.loads(first.stdout)
    assert (told["measured"], told["failed"], told["skipped"]) == (1, 1, 0)
    lines = [line for line in first.stderr.splitlines() if line.startswith("kvferry:")]
    assert len(lines) == 1
    assert "kvferry calibrate --codec kvtc" in lines[0]
    file.write_text(file.read_text().replace(', "kvtc"', ""))
    second = kvferry(file, "--out", out, "--report", report)
    assert second.returncode == 0, second.stderr
    assert "1 there already" in second.stdout
    assert "affine bits=4" in report.read_text()


@pytest.mark.long
def test_a_file_has_its_calibrations_made(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    report = out / "report.md"  # in a folder that is made for the results
    model.mkdir()
    save_model(*sharp_llama(97, head_dim=32), model)
    letters = random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=30_000)
    (tmp_path / "some.txt").write_text("".join(letters))
    file = tmp_path / "some.toml"
    file.write_text(CALIBRATED.replace("MODEL", str(model)))
    done = kvferry(file, "--out", out, "--report", report)
    assert done.returncode == 0, done.stderr
    (text,) = out.glob("calibrations/one-*/texts/0.txt")
    assert text.read_text() == "".join(letters[15_000:])  # runs read the other half
    assert (
        "| kvtc 4x | one | 4." in report.read_text() or "| kvtc 4x | one | 3." in report.read_text()
    )
    again = kvferry(file, "--out", out)
    assert "1 there already" in again.stdout
    assert "calibrating" not in again.stderr
    (tmp_path / "some.txt").write_text("".join(letters[::-1]))
    other = kvferry(file, "--out", out)
    assert other.returncode == 0, other.stderr
    assert "calibrating" in other.stderr
    (tmp_path / "second").mkdir()
    save_model(*sharp_llama(97, head_dim=32), tmp_path / "second")
    second = kvferry(file, "--out", out, "--model", tmp_path / "second")
    assert second.returncode == 0, second.stderr
    assert len(list(out.glob("calibrations/one-*"))) == 3


def test_a_bad_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("[[[")
    done = kvferry(tmp_path / "some.toml", "--out", tmp_path / "out")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "TOML" in lines[0]
    assert not (tmp_path / "out").exists()


def test_nothing_asked_for_is_bad_usage(tmp_path: Path) -> None:
    done = kvferry("--out", tmp_path)
    assert done.returncode == 2
    assert "--report" in done.stderr
