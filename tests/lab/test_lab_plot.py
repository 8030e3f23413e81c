"""Figures show what was measured: points, predictions, and a PNG that can be opened."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from kvferry.codec.base import PageTensors, Stream
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.curve import weighted_error
from kvferry.codec.lab.evaluate import Prepared, Setup, prepare
from kvferry.codec.lab.knobs import knob_of
from kvferry.codec.lab.plot_layers import (
    RELATIVE_ERROR,
    LayerMap,
    draw_layers,
    layer_map,
    predict,
)
from kvferry.codec.lab.plot_rate import (
    Measured,
    RatePoint,
    draw_rate,
    rate_points,
    spread_out,
)
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError, FerryError
from kvferry.proto.keys import SINK_TOKENS

MODEL_ID = bytes(range(32))
CONTEXT, CONTINUATION = 320, 48


def silent(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def texts(tiny: LoadedModel) -> dict[str, Prepared]:
    words = [ord(c) % 97 for c in Path(__file__).read_text()]
    count = Setup(codec="", context=CONTEXT, continuation=CONTINUATION).text_tokens
    return {
        name: prepare(tiny, MODEL_ID, words[at : at + count], CONTEXT, CONTINUATION, silent)
        for name, at in (("one", 0), ("two", 700))
    }


@pytest.fixture(scope="module")
def points(texts: dict[str, Prepared], fitted: list[GroupCalibration]) -> list[RatePoint]:
    codecs = [Measured(knob_of("ferry", fitted), fitted), Measured(knob_of("affine"))]
    return rate_points(texts, codecs, 3, silent, silent)


def test_every_codec_setting_and_text_is_a_point(points: list[RatePoint]) -> None:
    assert len(points) == 2 * 3 * 2
    for codec in ("ferry", "affine"):
        for text in ("one", "two"):
            own = [p for p in points if (p.codec, p.text) == (codec, text)]
            assert [p.setting for p in own] == [0, 1, 2]
            ratios = [p.ratio for p in own]
            assert ratios == sorted(ratios)
            assert own[0].kl < own[-1].kl


def test_a_point_says_what_it_is(points: list[RatePoint]) -> None:
    found = points[0].to_json()
    assert set(found) == {
        "codec", "options", "text", "compression_ratio", "kl_mean", "ppl_delta_pct"
    }  # fmt: skip


def is_figure(path: Path) -> bool:
    pixels = imread(path)
    return pixels.shape[0] > 400 and pixels.shape[1] > 800 and float(pixels[..., :3].std()) > 0.01


def test_rate_is_drawn(points: list[RatePoint], tmp_path: Path) -> None:
    path = tmp_path / "rate.png"
    assert draw_rate(points, "tiny", "below", path) == path.stat().st_size
    assert is_figure(path)
    one = [point for point in points if point.text == "one" and not point.setting]
    draw_rate(one, "a single point", "", path)
    assert is_figure(path)
    assert [file.name for file in tmp_path.iterdir()] == ["rate.png"]


def test_a_codec_looks_the_same_in_every_picture_and_like_no_other() -> None:
    names = [name for name in codec_names() if name not in ("raw", "zstd")]
    every = style.looks([*names, "random, 4 sinks", "random 4x", "mine"])
    assert len(set(every.values())) == len(every)
    assert len({every[name][0] for name in names}) == len(names)
    assert style.looks(["streaming 4x", "ferry"])["ferry"] == every["ferry"]
    assert every["random, 4 sinks"][0] == every["random"][0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_settings_are_spread_from_end_to_end(count: int) -> None:
    settings = [float(i) for i in range(7)]
    found = spread_out(settings, count)
    assert len(found) == min(count, 7)
    assert found == sorted(set(found))
    if count > 1:
        assert (found[0], found[-1]) == (0.0, 6.0)


def test_every_codec_has_a_knob_that_it_takes(fitted: list[GroupCalibration]) -> None:
    from kvferry.codec.registry import make_codec

    for name in codec_names():
        knob = knob_of(name, fitted)
        assert knob.settings
        if name in ("kvtc", "lowrank"):
            continue  # calibrations of their own: see their tests
        for value in knob.settings:
            make_codec(name, knob.options(value), fitted[0])
    with pytest.raises(ConfigError, match="one of raw"):
        knob_of("nonsense")


@pytest.fixture(scope="module")
def found(texts: dict[str, Prepared], fitted: list[GroupCalibration]) -> LayerMap:
    return layer_map(texts["one"], fitted, measured=True, report=silent)


def test_layers_are_predicted_and_measured(found: LayerMap) -> None:
    for name in ("k", "v"):
        assert found.heads[name].shape == (3, 2)
        for values in (found.error[name], found.predicted[name], found.measured[name]):
            assert values.shape == (3,)
        assert (found.heads[name] > 0).all()
        # Three bits of a group of 16 leave a tenth or so.
        assert ((found.error[name] > 0.02) & (found.error[name] < 0.3)).all()
        assert (found.measured[name] > 0).all()
        # Right within its order: the weights are from other text, and hold a ridge.
        ratio = found.predicted[name] / found.measured[name]
        assert 0.2 < np.median(ratio) < 20


def test_the_prediction_for_a_head_is_that_of_white_noise(
    texts: dict[str, Prepared], fitted: list[GroupCalibration], found: LayerMap
) -> None:
    """The mean of e' A'A e over noise of a tenth of the head's own deviation."""
    page = texts["one"].snapshot.page((0, 3), (4, CONTEXT))
    values = page.streams["v"].float32()[1, 0]
    weight: Any = fitted[0].streams["v"].weight
    size = np.sqrt(np.square(values - values.mean(axis=0)).mean())
    noise = np.random.default_rng(0).standard_normal((200_000, 16)) * RELATIVE_ERROR * size
    cost = np.square(noise @ weight[1, 0].T.astype(np.float64)).sum(axis=1).mean()
    assert found.heads["v"][1, 0] == pytest.approx(cost, rel=0.02)


def test_the_prediction_for_an_error_is_the_quadratic_form(
    texts: dict[str, Prepared], fitted: list[GroupCalibration]
) -> None:
    """As the calibration's own curves have it, keys before rotation included."""
    exact = texts["one"].snapshot.page((0, 3), (0, CONTEXT))
    rng = np.random.default_rng(0)
    streams = {}
    for name, stream in exact.streams.items():
        noise = rng.standard_normal(stream.data.shape).astype(np.float32) * 0.1
        noise *= np.linspace(0.1, 2, 16, dtype=np.float32)  # of no symmetric shape
        noise[:, :, :SINK_TOKENS] = 0
        streams[name] = Stream(name, stream.float32() + noise, stream.dtype)
    coarse = PageTensors(exact.layers, exact.heads, exact.tokens, streams)
    for name, basis in fitted[0].streams.items():
        weight: Any = basis.weight
        metric = np.matmul(weight.swapaxes(-1, -2), weight).astype(np.float64)
        total = weighted_error(exact, coarse, name, fitted[0], metric) / (CONTEXT - SINK_TOKENS)
        _, error, predicted = predict(exact, coarse, name, fitted[0])
        assert predicted.sum() == pytest.approx(total, rel=1e-3)
        assert (error > 0).all()


def test_layers_are_drawn_with_and_without_measurements(
    texts: dict[str, Prepared],
    fitted: list[GroupCalibration],
    found: LayerMap,
    tmp_path: Path,
) -> None:
    draw_layers(found, "tiny", "below", tmp_path / "a.png")
    quick = layer_map(texts["one"], fitted, measured=False, report=silent)
    assert not quick.measured
    np.testing.assert_array_equal(quick.heads["k"], found.heads["k"])
    draw_layers(quick, "tiny", "below", tmp_path / "b.png")
    assert is_figure(tmp_path / "a.png")
    assert is_figure(tmp_path / "b.png")
    described = found.to_json()
    assert np.shape(described["predicted_kl_per_head"]["k"]) == (3, 2)  # type: ignore[index]


def test_identity_weights_predict_nothing(
    texts: dict[str, Prepared], fitted: list[GroupCalibration]
) -> None:
    from dataclasses import replace

    both = fitted[0].bundles["k+v"]
    plain = replace(both, parts=tuple(replace(part, weight=None) for part in both.parts))
    group = replace(fitted[0], bundles={"k+v": plain})
    with pytest.raises(ConfigError, match="--weights identity"):
        layer_map(texts["one"], [group], measured=False, report=silent)


def test_a_figure_that_cannot_be_written_is_one_line(
    points: list[RatePoint], tmp_path: Path
) -> None:
    with pytest.raises(FerryError, match="--out"):
        draw_rate(points, "tiny", "below", tmp_path / "missing" / "rate.png")
