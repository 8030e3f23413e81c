"""Keys at other positions stay keys."""

import numpy as np

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.kept import Kept
from kvferry.codec.moving import side_by_side
from kvferry.codec.rope import RopeSpec


def test_a_large_float16_key_that_is_turned_stays_finite() -> None:
    keys = np.full((1, 1, 2, 2), 60_000, np.float16)
    streams = {name: Stream(name, keys, DType.FLOAT16) for name in ("k", "v")}
    page = PageTensors((0, 1), (0, 1), (0, 10), streams, Kept(np.array([0, 9]), contiguous=True))
    moved = side_by_side(page, [RopeSpec(2, False, (0.05,))]).streams["k"].float32()
    assert np.isfinite(moved).all()
    assert moved[0, 0, 1].max() == np.finfo(np.float16).max  # it would have been 79,000
    assert (moved[0, 0, 0] == 60_000).all()
