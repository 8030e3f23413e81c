"""Calibration of a small model: it fits, it is stored, its curve means something."""

from pathlib import Path

import numpy as np
import pytest

from kvferry.codec.calibration import CalibrationSet, GroupCalibration
from kvferry.codec.lab.calibrate import HeldText, Plan, calibrate, steps_for_bits
from kvferry.codec.lab.evaluate import Evaluation, Setup, evaluate
from kvferry.codec.lab.held import held_texts
from kvferry.codec.lab.text import (
    first_tokens,
    held_text,
    read_text,
)
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ConfigError, ModelError
from kvferry.proto.keys import WINDOW_TOKENS

MODEL_ID = bytes(range(32))
PLAN = Plan(tokens=2048, sequence=512, held_context=512, held_continuation=128)
Made = tuple[CalibrationSet, list[GroupCalibration]]


@pytest.fixture(scope="module")
def made(tiny: LoadedModel, text: list[int]) -> Made:
    reports: list[float] = []
    given = text[: PLAN.fitted_tokens + PLAN.held_tokens]
    found = calibrate(tiny, MODEL_ID, given, "tests", PLAN, lambda done, _: reports.append(done))
    assert reports == sorted(reports)
    assert reports[-1] == pytest.approx(PLAN.work(3), rel=0.02)
    return found


def test_it_covers_the_model_and_says_where_it_comes_from(made: Made) -> None:
    found, groups = made
    assert (found.model_layers, found.model_heads) == (3, 2)
    assert [group.layers for group in groups] == [(0, 3)]
    assert set(groups[0].streams) == {"k", "v"}
    assert (found.text_source, found.tokens) == ("tests", 2048)
    assert all(stream.weight is not None for stream in groups[0].streams.values())


def test_finer_steps_cost_more_bits_and_less_kl(made: Made) -> None:
    points = sorted(made[0].curve, key=lambda point: point.step)
    assert len(points) == len(PLAN.curve_bits)
    bits = [point.bits_per_value for point in points]
    kl = [point.kl for point in points]
    assert bits == sorted(bits, reverse=True)
    assert kl[0] < kl[-1]
    assert all(value > 0 for value in kl)


def test_every_stream_has_a_curve_whose_sum_is_the_prediction(made: Made) -> None:
    rates = made[0].rates
    assert rates is not None
    assert [(curve.layers, curve.stream) for curve in rates.streams] == [
        ((0, 3), "k"),
        ((0, 3), "v"),
    ]
    (text,) = rates.texts
    assert text.predicted == pytest.approx(
        [sum(column) for column in zip(*(curve.kl for curve in rates.streams), strict=True)]
    )
    widths = [curve.width for curve in rates.streams]
    assert sum(widths) == 3 * 2 * 16 * 2
    for curve in rates.streams:
        assert list(curve.kl) == sorted(curve.kl, reverse=True)
        assert list(curve.bits) == sorted(curve.bits)


def test_a_step_is_one_that_the_worst_of_the_texts_keeps_to(
    tiny: LoadedModel, text: list[int]
) -> None:
    plan = Plan(
        tokens=1024, sequence=512, held_context=300, held_continuation=48, curve_bits=(6.0, 4.0)
    )
    rng = np.random.default_rng(0)
    noise = [int(token) for token in rng.integers(0, 97, plan.held_tokens)]
    held = [HeldText("source", text[-plan.held_tokens :]), HeldText("noise", noise)]
    given = text[: plan.fitted_tokens]
    seconds: dict[str, float] = {}
    found, _ = calibrate(
        tiny, MODEL_ID, given, "tests", plan, lambda *_: None, held=held, seconds=seconds
    )
    assert found.rates is not None
    assert [measured.name for measured in found.rates.texts] == ["source", "noise"]
    for index, point in enumerate(found.curve):
        assert point.kl == max(measured.kl[index] for measured in found.rates.texts)
    source = found.rates.texts[0]  # of the kind that was fitted on, and small enough a KL
    assert 0.2 < source.kl[-1] / source.predicted[-1] < 5
    assert set(seconds) == {"capture", "gradients", "covariances", "fitting", "curve"}


def test_held_texts_are_of_several_kinds_on_any_machine(tiny: LoadedModel) -> None:
    found = held_texts(tiny.tokenizer, 900, held_text())
    assert [held.name for held in found] == ["source", "prose", "chat"]
    assert all(len(held.tokens) == 900 for held in found)
    with_rest = held_texts(tiny.tokenizer, 900, "", list(range(90)) * 10)
    assert [held.name for held in with_rest] == ["rest", "prose", "chat"]


def test_it_comes_back_from_a_folder(made: Made, tmp_path: Path) -> None:
    found, groups = made
    found.save(tmp_path, groups)
    again, loaded = CalibrationSet.load(tmp_path)
    assert again.id == found.id
    assert [group.id for group in loaded] == [group.id for group in groups]


def test_the_same_text_gives_the_same_calibration(
    tiny: LoadedModel, text: list[int], made: Made
) -> None:
    given = text[: PLAN.fitted_tokens + PLAN.held_tokens]
    again, _ = calibrate(tiny, MODEL_ID, given, "tests", PLAN, lambda *_: None)
    assert again.groups == made[0].groups


def run(tiny: LoadedModel, text: list[int], setup: Setup) -> Evaluation:
    given = text[-setup.text_tokens :]
    return evaluate(tiny, MODEL_ID, given, setup, lambda _: None)


def test_weights_are_worth_their_passes(tiny: LoadedModel, text: list[int], made: Made) -> None:
    plain = Plan(tokens=2048, sequence=512, ridge=None, curve_bits=())
    given = text[: plain.fitted_tokens + plain.held_tokens]
    _, groups = calibrate(tiny, MODEL_ID, given, "tests", plain, lambda *_: None)

    def cost(groups: list[GroupCalibration]) -> tuple[float, float]:
        (step,) = steps_for_bits(groups, [1.2])
        setup = Setup(
            codec="ferry",
            options={"step": step},
            context=512,
            continuation=256,
            groups=groups,
        )
        found = run(tiny, text, setup)
        return found.pages.blob_bytes, found.found.kl_mean

    weighted, identity = cost(made[1]), cost(groups)
    assert weighted[0] < 1.1 * identity[0]
    assert weighted[1] < identity[1]


def test_exact_codecs_change_nothing_but_the_tail(tiny: LoadedModel, text: list[int]) -> None:
    for codec in ("raw", "zstd"):
        setup = Setup(codec=codec, context=300, continuation=64)
        found = run(tiny, text, setup).to_json("tiny")
        assert found["kl_mean"] == pytest.approx(0, abs=3e-3)  # the tail is 8-bit affine
        assert found["context_tokens"] == 300
        assert found["window_tokens"] == WINDOW_TOKENS
        assert found["raw_bytes_fp16"] == 2 * 300 * 3 * 2 * 2 * 16
        # float32 is stored as it is: about twice the bytes of float16
        assert 0.4 < float(str(found["compression_ratio"])) < 0.8


def test_every_byte_is_counted(tiny: LoadedModel, text: list[int]) -> None:
    setup = Setup(codec="affine", options={"bits": 4}, context=512, continuation=64)
    result = run(tiny, text, setup)
    found = result.to_json("tiny")
    values = 512 * 3 * 2 * 2 * 16
    assert int(str(found["blob_bytes"])) > values * 4.5 / 8  # with headers and group scales
    assert float(str(found["bits_per_value"])) == pytest.approx(
        8 * result.pages.blob_bytes / values
    )
    both = result.pages.blob_bytes + result.tail.blob_bytes
    whole = 2 * values * (512 + WINDOW_TOKENS) / 512
    assert float(str(found["ratio_with_tail"])) == pytest.approx(whole / both)


def test_steps_for_bits_fall_as_bits_rise(made: Made) -> None:
    steps = steps_for_bits(made[1], [0.25, 1.0, 3.0])
    assert steps == sorted(steps, reverse=True)
    assert np.isfinite(steps).all()


def test_too_little_text_is_one_line(tiny: LoadedModel, text: list[int]) -> None:
    with pytest.raises(ModelError, match=r"my file gives 5 tokens where 9 are needed"):
        first_tokens(tiny.tokenizer, "hello", 9, "my file")
    with pytest.raises(ConfigError, match="text"):
        calibrate(tiny, MODEL_ID, text[:600], "x", Plan(tokens=512), lambda *_: None)
    with pytest.raises(ConfigError, match="at least 512"):
        Plan(tokens=100)
    with pytest.raises(ConfigError, match="context"):
        Setup(codec="raw", context=0)


def test_unreadable_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_text(tmp_path / "missing")
    odd = tmp_path / "odd"
    odd.write_bytes(b"caf\xe9")
    assert read_text(odd) == "caf\ufffd"
