"""Calibrations of `lowrank`, and pages of heads of low rank, that its tests share."""

import numpy as np
from codec_samples import MODEL_ID, rope_spec

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.lowrank_calibration import LowRankCalibration
from kvferry.codec.lowrank_fit import HeadAccumulator
from kvferry.codec.rope import RopeSpec
from kvferry.codec.rows import store_values


def low_page(
    *,
    layers: tuple[int, int] = (0, 2),
    heads: tuple[int, int] = (0, 2),
    tokens: tuple[int, int] = (0, 40),
    dim: int = 16,
    inner: int = 6,
    dtype: DType = DType.FLOAT32,
    seed: int = 2,
    rope: RopeSpec | None = None,
    model: int = 1,
) -> PageTensors:
    """Heads whose values and unrotated keys span ``inner`` directions, the same for every
    page of a ``model``; those of K differ from those of V."""
    count, wide = layers[1] - layers[0], heads[1] - heads[0]
    drawn, fixed = np.random.default_rng(seed), np.random.default_rng(model)
    streams = {}
    for name in ("k", "v"):
        mix = fixed.standard_normal((count, wide, inner, dim))
        mean = 3 * fixed.standard_normal((count, wide, 1, dim))
        inside = drawn.standard_normal((count, wide, tokens[1] - tokens[0], inner))
        values = (inside @ mix + mean).astype(np.float32)
        out = np.empty(values.shape, dtype=dtype.storage)
        ropes = [rope or rope_spec(dim)] * count if name == "k" else None
        store_values(out, dtype, values, ropes, tokens)
        streams[name] = Stream(name, out, dtype)
    return PageTensors(layers, heads, tokens, streams)


def lowrank_calibration(
    *,
    layers: tuple[int, int] = (0, 2),
    heads: tuple[int, int] = (0, 2),
    dim: int = 16,
    inner: int = 6,
    rope: RopeSpec | None = None,
    tokens: int = 400,
) -> LowRankCalibration:
    """Fitted to pages of `low_page`'s first model."""
    count, wide = layers[1] - layers[0], heads[1] - heads[0]
    seen = HeadAccumulator(
        model_id=MODEL_ID,
        layers=layers,
        heads=heads,
        shapes={"k": (wide, dim), "v": (wide, dim)},
        ropes={"k": (rope or rope_spec(dim),) * count},
    )
    seen.add(
        low_page(
            layers=layers, heads=heads, tokens=(0, tokens), dim=dim, inner=inner, rope=rope, seed=7
        )
    )
    return seen.finish("tests")
