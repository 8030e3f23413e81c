"""The direction that a LayerNorm empties: when there is one, what it saves, when it is refused."""

from dataclasses import replace

import numpy as np
import pytest
from codec_samples import MODEL_ID, decoded, meta_for
from lowrank_samples import lowrank_calibration

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.blob import encode_blob
from kvferry.codec.calibration_kinds import group_from_blob
from kvferry.codec.lowrank import LowRankCodec
from kvferry.codec.lowrank_calibration import LAYER_NORM, RMS_NORM, LowRankCalibration
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.codec.lowrank_null import null_directions
from kvferry.codec.registry import make_codec
from kvferry.errors import ConfigError

DIM = 8


def normed(tokens: int, width: int, gain: np.ndarray, bias: np.ndarray, seed: int) -> np.ndarray:
    """What a LayerNorm makes of anything."""
    x = np.random.default_rng(seed).standard_normal((tokens, width)) * 5 + 2
    x = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    return x * gain + bias


class Layer:
    """One layer of one head as wide as the model: K and V of a LayerNorm's outputs."""

    def __init__(self, width: int = DIM) -> None:
        random = np.random.default_rng(4)
        self.gain, self.bias = random.uniform(0.5, 2, width), random.standard_normal(width)
        self.weights = {n: random.standard_normal((1, 1, DIM, width)) for n in ("k", "v")}

    def page(self, tokens: tuple[int, int], seed: int = 1) -> PageTensors:
        y = normed(tokens[1] - tokens[0], len(self.gain), self.gain, self.bias, seed)
        streams = {
            name: Stream.from_float32(name, (y @ w[0, 0].T + 1)[None, None].astype("f4"), d)
            for (name, w), d in zip(self.weights.items(), [DType.FLOAT16] * 2, strict=True)
        }
        return PageTensors((0, 1), (0, 1), tokens, streams)

    def nulls(self) -> dict[str, np.ndarray]:
        return {n: null_directions(w[0], self.gain)[None] for n, w in self.weights.items()}

    def calibration(self, norm: str = LAYER_NORM) -> LowRankCalibration:
        seen = HeadAccumulator(
            model_id=MODEL_ID,
            layers=(0, 1),
            heads=(0, 1),
            shapes={"k": (1, DIM), "v": (1, DIM)},
            ropes={},
        )
        seen.add(self.page((0, 600)))
        return seen.finish("tests", norm=norm, nulls=self.nulls())


def test_a_head_as_wide_as_its_model_has_one_and_it_is_free() -> None:
    layer = Layer()
    known = layer.calibration()
    again = group_from_blob(known.to_blob()[1])
    assert isinstance(again, LowRankCalibration)
    assert (again.id, again.norm) == (known.id, LAYER_NORM)
    assert all((again.nulls[name] == 1).all() for name in ("k", "v"))
    page = layer.page((256, 512), seed=9)
    sizes, errors = {}, {}
    for name, options in {
        "all": {"rank": DIM},
        "null": {"rank": DIM, "ln_nullspace": "true"},
        "auto": {"rank": DIM, "ln_nullspace": "auto"},
        "less": {"rank": DIM - 1},
    }.items():
        codec = make_codec("lowrank", options, known)
        key, data = encode_blob(codec, page, meta_for())
        sizes[name] = len(data)
        found = decoded(data, key, page.tokens, known).streams["v"].float32()
        errors[name] = float(np.abs(found - page.streams["v"].float32()).max())
    assert sizes["null"] == sizes["auto"] == sizes["less"] < sizes["all"]
    assert errors["null"] < 2 * errors["all"] + 1e-2
    # The direction follows from weights; the basis has it as its last.
    u = layer.nulls()["v"][0, 0]
    assert abs(abs(float(known.bases["v"].vectors[0, 0, :, -1] @ u)) - 1) < 1e-5


def test_heads_narrower_than_their_model_have_none() -> None:
    layer = Layer(width=4 * DIM)
    assert not any(u.any() for u in layer.nulls().values())
    known = layer.calibration()
    assert not known.nulls
    with pytest.raises(ConfigError, match="0 of this model's heads"):
        make_codec("lowrank", {"ln_nullspace": "true"}, known)
    plain = make_codec("lowrank", {"ln_nullspace": "auto"}, known)
    assert plain.params["rank"] == {"v": 7}


def test_all_heads_of_a_layer_together_have_one_but_not_each() -> None:
    """What the seed took for a direction of each head is one of the whole layer."""
    random = np.random.default_rng(3)
    width, heads = 24, 3
    weights = random.standard_normal((heads, DIM, width))
    gain = random.uniform(0.5, 2, width)
    assert not null_directions(weights, gain).any()
    assert null_directions(weights.reshape(1, width, width), gain).any()


def test_weights_made_so_have_one_whatever_their_width() -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((2, DIM, 40))
    gain = random.uniform(0.5, 2, 40)
    weights[1, 3] = 2.5 / gain  # ones lie in this head's row space
    found = null_directions(weights, gain)
    assert not found[0].any()
    assert abs(found[1, 3]) == pytest.approx(1, abs=1e-5)


def test_an_rmsnorm_is_refused_in_words() -> None:
    known = replace(lowrank_calibration(), norm=RMS_NORM)
    with pytest.raises(ConfigError, match="RMSNorm, which does not take the mean away"):
        make_codec("lowrank", {"ln_nullspace": "true"}, known)
    emergency = make_codec("lowrank", {"policy": "memory_emergency"}, known)
    assert isinstance(emergency, LowRankCodec)
    assert emergency.rank == {"v": 12}


def test_text_that_disagrees_with_weights_wins() -> None:
    """A cache that holds something else than the weights say loses nothing."""
    layer = Layer()
    seen = HeadAccumulator(
        model_id=MODEL_ID,
        layers=(0, 1),
        heads=(0, 1),
        shapes={"k": (1, DIM), "v": (1, DIM)},
        ropes={},
    )
    page = layer.page((0, 600))
    noise = np.random.default_rng(0).standard_normal(page.streams["v"].data.shape)
    v = Stream.from_float32("v", page.streams["v"].float32() + noise.astype("f4"), DType.FLOAT16)
    seen.add(PageTensors(page.layers, page.heads, page.tokens, {**page.streams, "v": v}))
    known = seen.finish("tests", norm=LAYER_NORM, nulls=layer.nulls())
    assert set(known.nulls) == {"k"}
