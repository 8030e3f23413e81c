"""The published codec's calibration goes on where it was stopped, and says what it needs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import save_model, sharp_llama

from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
from kvferry.codec.lab.kvtc import KvtcPlan, calibrate
from kvferry.codec.lab.memory import kvtc_memory_need
from kvferry.codec.lab.plan import HeldText, Stopped
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.openblas import model_environment
from kvferry.codec.mlx.probe import describe

MODEL_ID = bytes(range(32))
PLAN = KvtcPlan(tokens=4096, sequence=1024)
APART = 600


class StopAt:
    """Stops a run at its nth report; counts what was read of the texts."""

    def __init__(self, report: int = 10**9) -> None:
        self._left, self.read = report, 0

    def __call__(self, done: float, note: str) -> None:
        self.read += note == "reading"
        self._left -= 1
        if self._left < 0:
            raise Stopped


def run(tiny: LoadedModel, text: list[int], folder: Path | None, report: StopAt) -> KvtcCalibration:
    given = text[: PLAN.tokens]
    apart = [text[PLAN.tokens : PLAN.tokens + APART], text[-APART:]]
    kept = None
    if folder is not None:
        held = [HeldText("apart", part) for part in apart]
        kept = Checkpoint(folder, checkpoint_key(MODEL_ID, given, held, PLAN))
    return calibrate(tiny, MODEL_ID, given, "tests", PLAN, report, apart, kept)


def files(made: KvtcCalibration, folder: Path) -> dict[str, bytes]:
    """All that `save` writes."""
    made.save(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# 16 reads of 256 tokens, two texts of three, then a report before each basis.
@pytest.mark.parametrize("report", [2, 6, 16, 20, 22, 23])
def test_wherever_it_is_stopped_the_end_is_the_same(
    tiny: LoadedModel, text: list[int], tmp_path: Path, report: int
) -> None:
    whole = files(run(tiny, text, None, StopAt()), tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tiny, text, tmp_path / "state", StopAt(report))
    again = run(tiny, text, tmp_path / "state", after := StopAt())
    assert files(again, tmp_path / "again") == whole
    assert after.read == 22 - {2: 0, 6: 4, 16: 16, 20: 19}.get(report, 22)


def test_what_is_kept_does_not_grow_with_the_text(
    tiny: LoadedModel, text: list[int], tmp_path: Path
) -> None:
    sizes = []
    for report in (6, 14):
        with pytest.raises(Stopped):
            run(tiny, text, tmp_path / str(report), StopAt(report))
        (state,) = (tmp_path / str(report)).glob("*/gathered.safetensors")
        sizes.append(state.stat().st_size)
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_its_need_is_what_the_sums_take(tiny: LoadedModel) -> None:
    shape = describe(tiny.model, tiny.config)
    need = kvtc_memory_need(tiny, shape, PLAN, [[0] * APART])
    assert need.covariances == 2 * 96 * 96 * np.dtype("f8").itemsize
    longer = kvtc_memory_need(tiny, shape, KvtcPlan(tokens=10**6, sequence=1024), [[0] * APART])
    assert longer.additional == need.additional
    assert "Fisher" not in need.line()


class Command:
    """The command on a small model, with a folder of its own for what it keeps."""

    def __init__(self, folder: Path) -> None:
        self._model = folder / "model"
        self._model.mkdir()
        save_model(*sharp_llama(27), self._model)
        self._text = folder / "text.txt"
        letters = np.random.default_rng(5).integers(97, 123, 120_000, dtype=np.uint8)
        self._text.write_bytes(letters.tobytes())
        self._folder = folder

    def start(self, name: str, *more: str) -> "subprocess.Popen[str]":
        environment: dict[str, Any] = dict(os.environ) | model_environment()
        return subprocess.Popen(
            [
                sys.executable, "-m", "kvferry", "calibrate", "--codec", "kvtc",
                "--model", str(self._model), "--text", str(self._text), "--tokens", "60000",
                "--out", str(self._folder / name), *more,
            ],
            env=environment | {"XDG_CACHE_HOME": str(self._folder / "cache")},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def made(self, name: str) -> dict[str, bytes]:
        found = (self._folder / name).glob("*")
        return {file.name: file.read_bytes() for file in found}


@pytest.mark.processes
@pytest.mark.long
def test_interrupted_and_resumed_it_writes_the_same_bytes(tmp_path: Path) -> None:
    command = Command(tmp_path)
    whole = command.start("whole")
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    assert errors.startswith("memory: ")

    for wait_s in (0.5, 1.0, 2.0, 4.0):  # until it has read something
        stopped = command.start("again")
        assert stopped.stderr is not None
        assert stopped.stderr.readline().startswith("memory: ")  # before the text is read
        time.sleep(wait_s)
        stopped.send_signal(signal.SIGINT)
        _, errors = stopped.communicate(timeout=120)
        assert stopped.returncode == 130
        assert "interrupted; the same command goes on from here" in errors.splitlines()[-1]
        if list(tmp_path.glob("cache/kvferry/calibrations/*.unfinished/*/gathered.safetensors")):
            break
    else:
        pytest.fail("nothing was kept")
    assert not command.made("again")

    resumed = command.start("again")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert command.made("again") == command.made("whole") != {}
    assert not list(tmp_path.glob("cache/kvferry/calibrations/*.unfinished"))


def test_too_little_memory_is_said_before_it_begins(tmp_path: Path) -> None:
    refused = Command(tmp_path).start("x", "--memory-limit", "0.001")
    output, errors = refused.communicate(timeout=120)
    assert (refused.returncode, output) == (1, "")
    memory, problem = errors.splitlines()
    assert memory.startswith("memory: ")
    assert "0.0 GiB are free" in problem
    assert "--memory-limit" in problem
