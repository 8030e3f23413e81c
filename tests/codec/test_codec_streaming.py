"""Codecs that keep some tokens exactly: which ones, and what comes back of them."""

from typing import Any

import numpy as np
import pytest
from codec_samples import bits, meta_for, random_page, restored
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.codec.base import DType, PageTensors, Stream, takes_whole_context
from kvferry.codec.blob import encode_blob
from kvferry.codec.random_share import RandomCodec, lots
from kvferry.codec.registry import CODECS, make_codec
from kvferry.codec.streaming import StreamingCodec
from kvferry.errors import ConfigError, UnsupportedTensorError

LOTS = [13309476754707697221, 2875738036014693257, 16129155333475108587]


def kept_by(name: str, page: PageTensors, **options: object) -> list[int]:
    found = restored(make_codec(name, options), page)
    assert found.kept is not None
    assert found.kept.contiguous == (options.get("positions") != "original")
    return found.kept.positions.tolist()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["streaming", "random"]),
    start=st.sampled_from([0, 2, 256]),
    tokens=st.integers(1, 50),
    ratio=st.sampled_from([1, 1.5, 2, 4, 32]),
    sinks=st.integers(0, 6),
    dtype=st.sampled_from(list(DType)),
    seed=st.integers(0, 3),
)
def test_what_is_kept_is_exact_and_as_much_as_asked_for(
    name: str, start: int, tokens: int, ratio: float, sinks: int, dtype: DType, seed: int
) -> None:
    page = random_page(tokens=(start, start + tokens), dtype=dtype, seed=seed)
    if dtype is DType.FLOAT32:  # what float16 holds: float32 caches are stored so
        streams = {
            n: Stream(n, s.data.astype(np.float16).astype(np.float32), dtype)
            for n, s in page.streams.items()
        }
        page = PageTensors(page.layers, page.heads, page.tokens, streams)
    codec = make_codec(name, {"ratio": ratio, "sinks": sinks})
    found = restored(codec, page)
    assert found.kept is not None
    kept = found.kept.positions - start
    assert bits(found) == bits(page.take(kept))
    first = max(0, min(sinks, start + tokens) - start)
    wanted = min(tokens, max(1, round(tokens / ratio)))
    if name == "streaming":
        recent = max(1, wanted - first)
        everything = set(range(min(first, tokens))) | set(range(max(0, tokens - recent), tokens))
        assert set(kept.tolist()) == everything
    else:
        assert len(kept) == wanted
        assert set(range(min(first, wanted))) <= set(kept.tolist())
    assert restored(codec, page.take(kept)).entries <= len(kept)
    cut = encode_blob(codec, page, meta_for())
    assert cut == encode_blob(codec, page, meta_for())


def test_streaming_keeps_the_first_and_the_last() -> None:
    page = random_page(tokens=(0, 40))
    assert kept_by("streaming", page, window=6) == [0, 1, 2, 3, *range(34, 40)]
    assert kept_by("streaming", page, ratio=4) == [0, 1, 2, 3, *range(34, 40)]
    assert kept_by("streaming", page, window=6, sinks=0, positions="original") == [*range(34, 40)]
    assert kept_by("streaming", page, window=100) == [*range(40)]
    assert kept_by("streaming", page, ratio=40) == [0, 1, 2, 3, 39]


def test_a_random_share_depends_on_seed_and_positions_alone() -> None:
    page = random_page(tokens=(0, 400), heads=(0, 1), dim=8)
    first = kept_by("random", page, ratio=4, seed=1)
    assert len(first) == 100
    assert first == sorted(set(first))
    other = random_page(layers=(5, 6), tokens=(0, 400), heads=(0, 1), dim=8, seed=9)
    assert kept_by("random", other, keep=0.25, seed=1) == first
    assert kept_by("random", page, ratio=4, seed=2) != first
    assert set(kept_by("random", page, ratio=8, seed=1)) < set(first)
    # A quarter of each quarter, more or less.
    counts = np.histogram(first, bins=4, range=(0, 400))[0]
    assert (counts > 12).all()
    assert (counts < 40).all()
    # A published choice: other machines must make the same.
    assert lots(np.arange(3, dtype=np.int64), 7).tolist() == LOTS


@pytest.mark.parametrize("name", ["streaming", "random"])
def test_choosing_again_among_what_is_left(name: str) -> None:
    page = random_page(tokens=(0, 40))
    once = restored(make_codec(name, {"ratio": 2}), page)
    twice = restored(make_codec(name, {"ratio": 2}), once)
    assert once.kept is not None
    assert twice.kept is not None
    assert (once.entries, twice.entries) == (20, 10)
    assert set(twice.kept.positions) < set(once.kept.positions)
    states = {"state.0": Stream("state.0", np.zeros((2, 1, 3, 4), np.float32), DType.FLOAT32)}
    with pytest.raises(UnsupportedTensorError, match="cannot be dropped"):
        restored(make_codec(name, {}), PageTensors((0, 2), (0, 1), (0, 4), states))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("streaming", {"ratio": 0.5}, "from 1"),
        ("streaming", {"ratio": 4, "window": 3}, "left out beside"),
        ("streaming", {"window": 0}, "whole number"),
        ("streaming", {"sinks": -1}, "whole number"),
        ("streaming", {"positions": "elsewhere"}, "contiguous or original"),
        ("streaming", {"seed": 1}, "one of sinks"),
        ("random", {"keep": 2}, "from 1e-06 to 1"),
        ("random", {"keep": "nan"}, "from 1e-06 to 1"),
        ("random", {"keep": 0.5, "ratio": 2}, "left out beside"),
        ("random", {"seed": "x"}, "whole number"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_codec(name, options)


def test_options_come_as_text() -> None:
    text = {"window": "7", "sinks": "2", "positions": "original"}
    assert make_codec("streaming", text).params == {
        "positions": "original",
        "sinks": 2,
        "window": 7,
    }
    assert make_codec("random", {"keep": "0.5", "seed": "3"}).params == {
        "positions": "contiguous",
        "ratio": 2.0,
        "seed": 3,
        "sinks": 0,
    }
    assert takes_whole_context(CODECS["streaming"])
    assert not takes_whole_context(CODECS["raw"])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        (StreamingCodec, {"ratio": 0}),
        (StreamingCodec, {"window": -5}),
        (StreamingCodec, {"sinks": -1}),
        (StreamingCodec, {"positions": "both"}),
        (RandomCodec, {"ratio": float("nan")}),
        (RandomCodec, {"seed": -1}),
    ],
)
def test_one_made_directly_is_checked_too(codec: Any, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        codec(**options)
