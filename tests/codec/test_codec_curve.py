"""Rate-distortion curves: kept whole, read typed, and a step that most texts keep to."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from codec_samples import MODEL_ID, random_calibration
from hypothesis import given
from hypothesis import strategies as st

from kvferry.codec.calibration import (
    CalibrationSet,
    GroupEntry,
    RateDistortion,
    StreamCurve,
    TextCurve,
)
from kvferry.codec.calibration_curve import mean_curves, total_prediction
from kvferry.errors import CalibrationCorruptError, UnsupportedVersionError

STEPS = (0.4, 0.2, 0.1)
GROUPS = ((0, 2), (2, 4))


def stream(layers: tuple[int, int], name: str, scale: float = 1.0) -> StreamCurve:
    return StreamCurve(
        layers=layers,
        stream=name,
        width=128,
        bits=(0.5, 1.0, 2.0),
        kl=(0.008 * scale, 0.002 * scale, 0.0005 * scale),
    )


def text(name: str, kl: tuple[float, ...], bits: tuple[float, ...] = (0.5, 1, 2)) -> TextCurve:
    return TextCurve(name=name, tokens=160, bits=bits, kl=kl, predicted=(0.032, 0.008, 0.002))


RATES = RateDistortion(
    steps=STEPS,
    streams=tuple(stream(group, name) for group in GROUPS for name in ("k", "v")),
    texts=(
        text("source", (0.030, 0.010, 0.002)),
        text("prose", (0.040, 0.009, 0.001), (0.7, 1.2, 2.2)),
    ),
)


def a_set(rates: RateDistortion | None = RATES) -> CalibrationSet:
    entries = [random_calibration(layers=layers, seed=layers[1]) for layers in GROUPS]
    return CalibrationSet(
        model_id=MODEL_ID,
        model_layers=4,
        model_heads=2,
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in entries),
        curve=() if rates is None else rates.safe_curve(),
        text_source="tests",
        tokens=100,
        rates=rates,
    )


def test_it_comes_back_whole_from_a_blob_and_a_folder(tmp_path: Path) -> None:
    known = a_set()
    assert CalibrationSet.from_blob(known.to_blob()[1]) == known
    groups = [random_calibration(layers=layers, seed=layers[1]) for layers in GROUPS]
    known.save(tmp_path, groups)
    found, _ = CalibrationSet.load(tmp_path)
    assert (found, found.id) == (known, known.id)
    assert found.group_curves((0, 2))["v"].kl == (0.008, 0.002, 0.0005)
    assert found.group_curves((1, 2)) == {}


def test_sets_from_before_there_were_curves_are_what_they_were(tmp_path: Path) -> None:
    old = a_set(None)
    assert "rate_distortion" not in old.to_json()
    assert CalibrationSet.from_blob(old.to_blob()[1]).rates is None
    assert old.group_curves((0, 2)) == {}


def test_the_step_for_a_kl_is_one_that_every_text_keeps_to() -> None:
    curve = RATES.safe_curve()
    assert [point.kl for point in curve] == [0.040, 0.010, 0.002]
    assert [point.bits_per_value for point in curve] == pytest.approx([0.6, 1.1, 2.1])
    step = a_set().step_for_kl(0.010)
    assert step == pytest.approx(0.2)
    for measured in RATES.texts:
        assert measured.kl[STEPS.index(0.2)] <= 0.010


def test_of_many_texts_one_outlier_does_not_rule() -> None:
    many = tuple(text(str(n), (0.03 + n / 1000, 0.01, 0.001)) for n in range(10))
    outlier = text("odd", (9.0, 1.0, 0.1))
    curve = replace(RATES, texts=(*many, outlier)).safe_curve()
    assert curve[0].kl == pytest.approx(0.039)


def test_prediction_is_summed_up_as_a_ratio() -> None:
    found = RATES.prediction
    assert found is not None
    ratios = sorted([0.030 / 0.032, 0.010 / 0.008, 1.0, 0.040 / 0.032, 0.009 / 0.008, 0.5])
    assert found.median == pytest.approx(math.sqrt(ratios[2] * ratios[3]))
    assert found.worst == pytest.approx(0.5)
    assert total_prediction(RATES.streams) == pytest.approx((0.032, 0.008, 0.002))
    assert replace(RATES, texts=()).prediction is None


def test_curves_of_several_texts_become_their_mean() -> None:
    (mean,) = mean_curves([[stream((0, 2), "k")], [stream((0, 2), "k", 3.0)]])
    assert mean.kl == pytest.approx((0.016, 0.004, 0.001))


@pytest.mark.parametrize(
    "rates",
    [
        replace(RATES, steps=(0.1, 0.2, 0.4)),
        replace(RATES, steps=()),
        replace(RATES, streams=(stream((0, 3), "k"),)),
        replace(RATES, streams=(replace(stream((0, 2), "k"), bits=(1.0,)),)),
        replace(RATES, texts=(text("x", (0.1, float("nan"), 0.1)),)),
        replace(RATES, texts=(text("x", (0.1, -1.0, 0.1)),)),
    ],
)
def test_curves_that_cannot_be_are_refused(rates: RateDistortion) -> None:
    with pytest.raises(CalibrationCorruptError):
        replace(a_set(), rates=rates)


def test_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    groups = [random_calibration(layers=layers, seed=layers[1]) for layers in GROUPS]
    a_set().save(tmp_path, groups)
    file = tmp_path / "calibration.json"
    stored = json.loads(file.read_text())
    stored["rate_distortion"]["version"] = 2
    file.write_text(json.dumps(stored))
    with pytest.raises(UnsupportedVersionError, match="rate-distortion curves version 2"):
        CalibrationSet.load(tmp_path)


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=30))
def test_at_least_nine_of_ten_texts_stay_within_the_safe_curve(costs: list[float]) -> None:
    texts = tuple(text(str(n), (kl, kl / 4, kl / 16)) for n, kl in enumerate(costs))
    safe = replace(RATES, texts=texts).safe_curve()
    for index, point in enumerate(safe):
        within = sum(t.kl[index] <= point.kl for t in texts)
        assert within >= 0.9 * len(texts)
