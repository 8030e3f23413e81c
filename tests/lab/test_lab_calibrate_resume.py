"""A calibration that was stopped goes on where it was, and ends up the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.lab.calibrate import calibrate
from kvferry.codec.lab.checkpoint import Checkpoint, checkpoint_key
from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.lab.memory import memory_need
from kvferry.codec.lab.plan import HeldText, Plan, Stopped
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.openblas import model_environment
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import rope_specs
from kvferry.errors import ModelError

MODEL_ID = bytes(range(32))
PLAN = Plan(
    tokens=2048, sequence=512, held_context=300, held_continuation=48, curve_bits=(1.5, 0.5)
)


@pytest.fixture(scope="module")
def text(text: list[int]) -> list[int]:
    return text[: PLAN.fitted_tokens + PLAN.held_tokens]


class StopAt:
    """Stops a run at its nth report; counts what was read of the text."""

    def __init__(self, report: int = 10**9) -> None:
        self._left = report
        self.read = 0

    def __call__(self, done: float, note: str) -> None:
        self.read += note == "reading"
        self._left -= 1
        if self._left < 0:
            raise Stopped


Made = tuple[CalibrationSet, list[GroupCalibration]]


def run(tiny: LoadedModel, text: list[int], kept: Checkpoint | None, report: StopAt) -> Made:
    return calibrate(tiny, MODEL_ID, text, "tests", PLAN, report, checkpoint=kept)


def checkpoint(folder: Path, text: list[int], plan: Plan = PLAN) -> Checkpoint:
    fitted = plan.fitted_tokens
    held = [HeldText("held", text[fitted:])]
    return Checkpoint(folder / "unfinished", checkpoint_key(MODEL_ID, text[:fitted], held, plan))


@pytest.fixture(scope="module")
def uninterrupted(tiny: LoadedModel, text: list[int]) -> Made:
    return run(tiny, text, None, StopAt())


@pytest.mark.parametrize("report", [1, 4, 8, 13, 15])
def test_wherever_it_is_stopped_the_end_is_the_same(
    tiny: LoadedModel, text: list[int], tmp_path: Path, uninterrupted: Made, report: int
) -> None:
    whole, groups = uninterrupted
    with pytest.raises(Stopped):
        run(tiny, text, checkpoint(tmp_path, text), StopAt(report))
    again, regrouped = run(tiny, text, checkpoint(tmp_path, text), after := StopAt())
    assert again == whole
    assert [group.id for group in regrouped] == [group.id for group in groups]
    if report >= 4:  # a sequence is two reads and a pass
        assert after.read < 8
    if report >= 13:
        assert after.read == 0


def test_another_text_or_plan_starts_afresh(
    tiny: LoadedModel, text: list[int], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        run(tiny, text, checkpoint(tmp_path, text), StopAt(8))
    other = [*text[:100], (text[100] + 1) % 97, *text[101:]]
    assert checkpoint(tmp_path, other).folder != checkpoint(tmp_path, text).folder
    finer = Plan(tokens=2048, sequence=512, ridge=2.0)
    assert checkpoint(tmp_path, text, finer).folder != checkpoint(tmp_path, text).folder
    run(tiny, other, checkpoint(tmp_path, other), after := StopAt())
    assert after.read == 8


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: len(data) // 2]
    elif kind == "bit":
        data[len(data) // 2] ^= 4
    elif kind == "header":
        data[:8] = (1 << 62).to_bytes(8, "little")
    elif kind == "huge":
        data += bytes(4 << 20)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "bit", "header", "huge"])
def test_a_damaged_state_is_left_aside_with_one_line(
    tiny: LoadedModel,
    text: list[int],
    tmp_path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = checkpoint(tmp_path, text)
    with pytest.raises(Stopped):
        run(tiny, text, kept, StopAt(8))
    damage(kept.folder / "gathered.safetensors", kind)
    run(tiny, text, checkpoint(tmp_path, text), after := StopAt())
    assert after.read == 8
    lines = [r.getMessage() for r in caplog.records if "afresh" in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]


def gathered(tiny: LoadedModel) -> Gathered:
    return Gathered(MODEL_ID, describe(tiny.model, tiny.config), {"k": rope_specs(tiny.model)})


def test_state_of_another_model_is_refused(
    tiny: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoint(tmp_path, "x")
    kept.save({"covered": np.zeros(2, "<i8"), "other": np.zeros(3, "<f8")})
    assert kept.load(gathered(tiny).layout()) is None
    kept.save({"covered": np.zeros(2, "<f8")})
    assert kept.load(gathered(tiny).layout()) is None
    assert "another type" in caplog.text


def test_memory_is_the_same_however_long_the_text(tiny: LoadedModel) -> None:
    shape = describe(tiny.model, tiny.config)
    short = memory_need(tiny, shape, Plan(tokens=1024)).to_json()
    long = memory_need(tiny, shape, Plan(tokens=10**6)).to_json()
    for name in ("covariances_bytes", "fisher_bytes", "additional_bytes"):
        assert short[name] == long[name]
    found = gathered(tiny)
    covariances = short["covariances_bytes"] + short["fisher_bytes"] // 2
    assert found.most_bytes == pytest.approx(covariances, rel=0.02)


def test_what_does_not_fit_is_refused_before_it_starts(tiny: LoadedModel) -> None:
    need = memory_need(tiny, describe(tiny.model, tiny.config), PLAN)
    need.check(need.additional)
    with pytest.raises(ModelError, match=r"needs .* GiB .* are free: close .*--memory-limit"):
        need.check(need.additional - 1)
    assert need.total == need.resident + need.additional
    assert "\n" not in need.line()


COMMAND = [
    sys.executable, "-m", "kvferry", "calibrate",
    "--tokens", "2048", "--weights", "identity", "--json", "-",
]  # fmt: skip


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    environment = dict(os.environ) | model_environment() | {"XDG_CACHE_HOME": str(folder)}
    return subprocess.Popen(
        [*COMMAND, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.model
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    running = start(tmp_path)
    assert running.stderr is not None
    first = running.stderr.readline()
    assert first.startswith("memory: ")  # before the text is read
    time.sleep(2.0)
    running.send_signal(number)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    (line,) = [line for line in errors.splitlines() if line.startswith("kvferry: ")]
    assert "interrupted" in line
    assert "--restart" in line
    assert not list(tmp_path.glob("kvferry/calibrations/*/calibration.json"))


@pytest.mark.model
def test_the_command_refuses_what_exceeds_the_limit(tmp_path: Path) -> None:
    running = start(tmp_path, "--memory-limit", "0.1")
    output, errors = running.communicate(timeout=120)
    assert (running.returncode, output) == (1, "")
    assert "0.1 GiB are free" in errors.splitlines()[-1]


def test_sums_come_back_bit_for_bit(tiny: LoadedModel, text: list[int], tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, text)
    with pytest.raises(Stopped):
        run(tiny, text, kept, StopAt(7))
    state = kept.load(gathered(tiny).layout())
    assert state is not None
    again = gathered(tiny)
    again.load(state)
    assert again.covered == 1024
    assert {n: v.tobytes() for n, v in again.tensors().items()} == {
        n: v.tobytes() for n, v in state.items()
    }
    kept.clear()
    assert kept.load(gathered(tiny).layout()) is None
    assert not list(tmp_path.iterdir())
