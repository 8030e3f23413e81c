"""The published codec on a small model: calibrated, evaluated, found by the commands."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.cli.lab_input import calibration_of
from kvferry.codec.kvtc_calibration import KvtcCalibration
from kvferry.codec.lab.evaluate import Setup, evaluate
from kvferry.codec.lab.kvtc import KvtcPlan, calibrate, calibration_work
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError, IdentityMismatchError

MODEL_ID = bytes(range(32))
TOKENS = 4096
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def made(tiny: LoadedModel, text: list[int]) -> KvtcCalibration:
    reports: list[float] = []
    given, apart = text[:TOKENS], [text[TOKENS : TOKENS + 600]]

    def report(done: float, _: str) -> None:
        reports.append(done)

    plan = KvtcPlan(tokens=TOKENS)
    found = calibrate(tiny, MODEL_ID, given, "tests", plan, report, apart)
    assert reports == sorted(reports)
    assert reports[-1] == calibration_work(TOKENS + 600, 2)
    return found


def test_one_basis_a_stream_covers_the_whole_model(made: KvtcCalibration) -> None:
    assert (made.layers, made.heads) == ((0, 3), (0, 2))
    assert {name: b.rank for name, b in made.bundles.items()} == {"k": 96, "v": 96}
    assert all(stream.weight is None for stream in made.streams.values())
    assert made.tokens == TOKENS - 2 * 4  # two sequences, four sinks in each


def test_a_lower_ratio_is_nearer_to_the_exact_model(
    tiny: LoadedModel, text: list[int], made: KvtcCalibration
) -> None:
    kl, sizes = [], []
    for ratio in (2, 5, 12):
        setup = Setup(
            codec="kvtc",
            options={"ratio": ratio},
            context=512,
            continuation=256,
            groups=[made],
        )
        found = evaluate(tiny, MODEL_ID, text[-setup.text_tokens :], setup, lambda _: None)
        kl.append(found.found.kl_mean)
        sizes.append(found.pages.blob_bytes)
        values = found.pages.values
        assert 2 * values / found.pages.blob_bytes > 0.7 * ratio  # sinks and headers, so small
    assert kl == sorted(kl)
    assert sizes == sorted(sizes, reverse=True)
    assert kl[0] < kl[-1] / 4


def test_eval_finds_it_in_a_folder(made: KvtcCalibration, tmp_path: Path) -> None:
    made.save(tmp_path)
    (group,) = calibration_of("kvtc", tmp_path, MODEL_ID).groups
    assert isinstance(group, KvtcCalibration)
    assert group.id == made.id
    assert group.plans == made.plans
    with pytest.raises(IdentityMismatchError, match="model"):
        calibration_of("kvtc", tmp_path, bytes(32))


def test_too_few_tokens_are_one_line(tiny: LoadedModel, text: list[int]) -> None:
    with pytest.raises(ConfigError, match="at least 512"):
        KvtcPlan(tokens=500)
    with pytest.raises(ConfigError, match="1024 tokens"):
        calibrate(tiny, MODEL_ID, text[:1000], "x", KvtcPlan(tokens=1024), lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "--codec", "kvtc", "--opt", "ratio=0.5"], "ratio"),
        (["eval", "--codec", "kvtc", "--opt", "entropy=zip"], "zlib or zstd"),
        (["calibrate", "--codec", "raw"], "ferry, kvtc or lowrank"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(
    kvferry: Run, arguments: list[str], says: str
) -> None:
    if arguments[0] == "eval":
        arguments = [*arguments, "--model", "/no/such/model", "--text", __file__]
    done = kvferry(*arguments)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kvferry:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr
