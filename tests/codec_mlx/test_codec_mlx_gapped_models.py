"""Models of every kind go on from caches that lack tokens."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import CONFIGS, config_of, go_on, model_of, prefilled, tokens_of

from kvferry.codec.base import PageTensors
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.gapped_cache import GappedKVCache
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import page_ropes
from kvferry.errors import ModelError

HELD, TAIL = 100, 9
RINGS = ("gpt_oss", "gemma3_text")
STATES = ("lfm2", "qwen3_next", "qwen3_5", "nemotron_h")
SEVERAL = ("deepseek_v32",)  # more than one cache in a layer
PLAIN = [name for name in CONFIGS if name not in (*RINGS, *STATES, *SEVERAL)]


def taken(name: str) -> tuple[Any, list[int], CacheSnapshot]:
    model, tokens = model_of(name), tokens_of(HELD + TAIL + 20)
    cache = prefilled(model, tokens[: HELD + TAIL])
    shape = describe(model, config_of(name))
    ropes = partial(page_ropes, model, shape.page_layers)
    snapshot = adapters.snapshot(cache, HELD + TAIL, latent=shape.latent, ropes=ropes)
    return model, tokens[HELD + TAIL :], snapshot


def dropped(snapshot: CacheSnapshot, kept: np.ndarray, *, contiguous: bool) -> list[PageTensors]:
    page = snapshot.page(snapshot.layers, (0, HELD)).take(kept, contiguous=contiguous)
    return [page, snapshot.page(snapshot.layers, (HELD, HELD + TAIL))]


@pytest.mark.parametrize("name", PLAIN)
def test_recent_tokens_alone_mean_the_same_wherever_they_are(name: str) -> None:
    """What attention sees of positions is how far they are apart."""
    model, follows, snapshot = taken(name)
    kept = np.arange(60, HELD)
    said = []
    for contiguous in (True, False):
        cache = make_prompt_cache(model)
        at = snapshot.refill(cache, dropped(snapshot, kept, contiguous=contiguous))
        assert at == (49 if contiguous else HELD + TAIL)
        said.append(go_on(model, cache, follows, [3, 1, 1, 15]))
    np.testing.assert_allclose(*said, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in SEVERAL])
def test_with_gaps_a_chunk_says_what_single_tokens_say(name: str) -> None:
    model, follows, snapshot = taken(name)
    kept = np.flatnonzero(np.random.default_rng(2).random(HELD) < 0.3)
    said = []
    for steps in ([20], [1] * 20):
        cache = make_prompt_cache(model)
        snapshot.refill(cache, dropped(snapshot, kept, contiguous=False))
        assert any(isinstance(layer, GappedKVCache) for layer in cache)
        said.append(go_on(model, cache, follows, steps))
    np.testing.assert_allclose(*said, rtol=2e-3, atol=2e-3)
    everything = make_prompt_cache(model)
    snapshot.refill(everything, [snapshot.page(snapshot.layers, (0, HELD + TAIL))])
    assert np.abs(go_on(model, everything, follows, [20]) - said[0]).max() > 1e-4


@pytest.mark.parametrize("name", [*RINGS, *SEVERAL])
def test_caches_that_cannot_lose_tokens_say_so(name: str) -> None:
    model, _, snapshot = taken(name)
    kept = np.arange(50)
    wanted = "rings" if name in RINGS else "only KVCache"
    pages = dropped(snapshot, kept, contiguous=name in RINGS)
    with pytest.raises(ModelError, match=wanted):
        snapshot.refill(make_prompt_cache(model), pages)
