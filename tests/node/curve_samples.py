"""A fitted calibration of a small model, with curves, and pages for it."""

from collections.abc import Iterator

import numpy as np

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.calibration import (
    CalibrationSet,
    GroupAccumulator,
    GroupCalibration,
    GroupEntry,
    RateDistortion,
    StreamCurve,
    TextCurve,
    fit_group,
)
from kvferry.node.coding import Shard

MODEL = b"m" * 32
GROUPS = ((0, 2), (2, 4))
HEADS, DIM = 2, 32
STEPS = (2.0, 1.0, 0.5, 0.25)
BITS = (0.4, 0.9, 1.8, 2.8)
KL = (0.016, 0.004, 0.001, 0.00025)


def tensors(layers: tuple[int, int], tokens: tuple[int, int], seed: int = 3) -> PageTensors:
    """Correlated keys and values."""
    rng = np.random.default_rng([seed, layers[0], tokens[0]])
    shape = (layers[1] - layers[0], HEADS, tokens[1] - tokens[0], DIM)
    streams = {
        n: Stream(n, 2 * rng.standard_normal(shape, dtype=np.float32), DType.FLOAT32) for n in "kv"
    }
    return PageTensors(layers, (0, HEADS), tokens, streams)


class Cache:
    """A cache of any length, for `kvferry.node.offers.Offer`."""

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        return tensors(layers, tokens)

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterator[PageTensors]:
        yield from ()


def group(layers: tuple[int, int]) -> GroupCalibration:
    seen = GroupAccumulator(model_id=MODEL, layers=layers, heads=(0, HEADS), ropes={})
    seen.add(tensors(layers, (0, 512)))
    return fit_group(seen)


def calibration() -> tuple[CalibrationSet, dict[bytes, GroupCalibration]]:
    """The whole, and its groups by id."""
    groups = [group(layers) for layers in GROUPS]
    streams = tuple(
        StreamCurve(layers=layers, stream=name, width=2 * HEADS * DIM, bits=BITS, kl=KL)
        for layers in GROUPS
        for name in "kv"
    )
    predicted = tuple(4 * kl for kl in KL)
    text = TextCurve(name="text", tokens=100, bits=BITS, kl=predicted, predicted=predicted)
    rates = RateDistortion(steps=STEPS, streams=streams, texts=(text,))
    made = CalibrationSet(
        model_id=MODEL,
        model_layers=4,
        model_heads=HEADS,
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in groups),
        curve=rates.safe_curve(),
        rates=rates,
    )
    return made, {g.id: g for g in groups}


def shard(layers: tuple[int, int]) -> Shard:
    return Shard(
        model_id=MODEL, model_layers=4, model_heads=HEADS, head_dim=DIM, layers=layers,
        heads=(0, HEADS),
    )  # fmt: skip
