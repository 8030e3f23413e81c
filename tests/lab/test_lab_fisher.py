"""The Fisher information predicts what an error in the cache costs."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model_zoo import config_of, model_of, prefilled, tokens_of

from kvferry.codec.base import DType, PageTensors, Stream
from kvferry.codec.calibration import fit_group
from kvferry.codec.lab.coding import Coder, GroupSource, group_codecs
from kvferry.codec.lab.compare import compare
from kvferry.codec.lab.fisher import Fisher, outer_products, token_energy, unrotated
from kvferry.codec.lab.gathered import Gathered
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.probe import describe
from kvferry.codec.mlx.rope import rope_specs, stream_ropes
from kvferry.codec.rope import RopeSpec, apply, positions_of
from kvferry.proto.keys import SINK_TOKENS, WINDOW_TOKENS

Fill = Callable[[list[int]], list[Any]]
HELD, CONTINUED = 400, 64


@pytest.fixture
def fisher(tiny: LoadedModel, tokens: list[int], filled: Fill) -> Fisher:
    found = Fisher({"k": rope_specs(tiny.model)})
    for start in range(0, 8 * HELD, HELD):
        part = tokens[start : start + HELD]
        follows = tokens[start + HELD : start + HELD + CONTINUED]
        found.add(tiny.model, filled(part), follows)
    return found


def nudged(cache: list[Any], name: str, layer: int, error: np.ndarray) -> list[Any]:
    """Add ``error`` (heads, tokens, dim) behind the sinks and before the window."""
    end = HELD - WINDOW_TOKENS
    buffer = np.array(getattr(cache[layer], name))
    buffer[0, :, SINK_TOKENS:end] += error
    setattr(cache[layer], name, mx.array(buffer))
    return cache


@pytest.mark.parametrize("stream", ["k", "v"])
def test_half_the_quadratic_form_is_the_kl(
    tiny: LoadedModel, tokens: list[int], filled: Fill, fisher: Fisher, stream: str
) -> None:
    """White noise on one layer: its KL is the trace of F times the noise's variance."""
    rng = np.random.default_rng(0)
    held, then = tokens[:HELD], tokens[HELD : HELD + CONTINUED + 1]
    count = HELD - WINDOW_TOKENS - SINK_TOKENS
    for layer in range(3):
        trace = np.trace(fisher.sums[stream][layer], axis1=-2, axis2=-1).sum() / fisher.passes
        deviation = np.sqrt(1e-3 / trace)  # for a predicted KL of 1e-3
        name = {"k": "keys", "v": "values"}[stream]
        restored = [
            nudged(filled(held), name, layer, deviation * rng.standard_normal((2, count, 16)))
            for _ in range(6)
        ]
        found = compare(tiny.model, filled(held), restored, then)
        measured = np.mean([comparison.kl_mean for comparison in found])
        assert 0.3e-3 < measured < 3e-3


def test_keys_count_as_they_were_before_rotation() -> None:
    """A gradient that is one vector, rotated along, sums to that vector's outer product."""
    spec = RopeSpec(8, False, (1.0, 0.3, 0.1, 0.01), key_scale=1.5)
    vector = np.arange(1, 9, dtype=np.float32)
    plain = np.broadcast_to(vector, (1, HELD, 8))
    rotated = apply(plain, spec, positions_of((0, HELD)))  # scaled by 1.5 as keys are
    count = HELD - WINDOW_TOKENS - SINK_TOKENS
    found = outer_products(unrotated(mx.array(rotated[None]), spec))
    np.testing.assert_allclose(found[0], count * 1.5**4 * np.outer(vector, vector), rtol=1e-4)
    values = outer_products(unrotated(mx.array(plain[None]), None))
    np.testing.assert_allclose(values[0], count * np.outer(vector, vector), rtol=1e-4)


def test_a_tokens_energy_is_its_share_whatever_the_heads_scale() -> None:
    size = np.ones((2, HELD, 1), dtype=np.float32)
    size[:, 50] = 3.0  # nine times the energy, in both heads
    size[1] *= 1000.0
    found = token_energy(np.broadcast_to(size, (2, HELD, 8)))
    assert np.isnan(found[:SINK_TOKENS]).all()
    assert np.isnan(found[HELD - WINDOW_TOKENS :]).all()
    coded = found[SINK_TOKENS : HELD - WINDOW_TOKENS]
    assert coded.mean() == pytest.approx(2.0)  # one for each head
    assert found[50] == pytest.approx(9 * found[51])
    silent = token_energy(np.zeros((2, HELD, 8), dtype=np.float32))
    assert (silent[SINK_TOKENS : HELD - WINDOW_TOKENS] == 0).all()


def test_weights_turn_squared_error_into_the_form(fisher: Fisher) -> None:
    error = np.random.default_rng(1).standard_normal(16)
    weights = fisher.weights((1, 3), ridge=0.0)
    for stream, total in fisher.sums.items():
        assert weights[stream].shape == (2, 2, 16, 16)
        for layer, head in ((1, 0), (2, 1)):
            form = error @ (total[layer, head] / fisher.passes) @ error
            weighted = weights[stream][layer - 1, head] @ error
            assert weighted @ weighted == pytest.approx(form, rel=1e-3)


def test_a_ridge_evens_out_directions(fisher: Fisher) -> None:
    def condition(ridge: float) -> float:
        return float(np.linalg.cond(fisher.weights((0, 3), ridge)["k"]).max())

    assert condition(3.0) < condition(0.1) < condition(0.0)
    assert condition(3.0) < 8


def test_a_head_that_nothing_listens_to_still_has_an_inverse() -> None:
    found = Fisher({}, {"v": np.zeros((1, 1, 4, 4))}, passes=1)
    weight = found.weights((0, 1), 1.0)["v"]
    assert np.isfinite(np.linalg.inv(weight)).all()


def test_the_same_text_gives_the_same_weights(
    tiny: LoadedModel, tokens: list[int], filled: Fill
) -> None:
    sums = []
    for _ in range(2):
        found = Fisher({"k": rope_specs(tiny.model)})
        found.add(tiny.model, filled(tokens[:HELD]), tokens[HELD : HELD + 32])
        sums.append(found.sums)
    np.testing.assert_array_equal(sums[0]["k"], sums[1]["k"])


def test_the_cache_is_left_as_it_was(tiny: LoadedModel, tokens: list[int], filled: Fill) -> None:
    cache = filled(tokens[:HELD])
    before = np.array(cache[0].keys)
    Fisher({"k": rope_specs(tiny.model)}).add(tiny.model, cache, tokens[:16])
    assert cache[0].offset == HELD
    np.testing.assert_array_equal(np.array(cache[0].keys), before)


@pytest.mark.parametrize("name", ["glm4_moe_lite", "deepseek_v32", "lfm2", "gemma3_text"])
def test_gradients_of_any_model_predict_what_an_error_costs(name: str) -> None:
    """Latents, rotated keys and rows between recurrent layers and rings."""
    model, config, tokens = model_of(name), config_of(name), tokens_of(460)
    shape = describe(model, config)
    cache = prefilled(model, tokens[:300])
    found = Fisher(stream_ropes(model, shape), latent=shape.latent)
    for _ in range(4):
        found.add(model, cache, tokens[300:])
    exact = adapters.snapshot(cache, 300, latent=shape.latent)
    page = exact.page(exact.layers, (0, 300))
    rng, span = np.random.default_rng(2), slice(SINK_TOKENS, 300 - WINDOW_TOKENS)
    assert set(found.sums) == set(page.streams)
    for stream in ("latent", "rope_key") if shape.latent else ("k", "v"):
        trace = np.trace(found.sums[stream][-1], axis1=-2, axis2=-1).sum() / found.passes
        deviation = np.sqrt(1e-5 / trace)  # for a predicted KL of 1e-5
        restored = []
        for _ in range(4):
            values = page.streams[stream].float32().copy()
            noise = rng.standard_normal(values[-1, :, span].shape)
            values[-1, :, span] += deviation * noise.astype(np.float32)
            streams = {**page.streams, stream: Stream(stream, values, DType.FLOAT32)}
            restored.append(make_prompt_cache(model))
            pages = [PageTensors(page.layers, page.heads, page.tokens, streams)]
            exact.refill(restored[-1], pages)
        kl = compare(model, prefilled(model, tokens[:300]), restored, tokens[300:])
        assert 0.4e-5 < np.mean([each.kl_mean for each in kl]) < 2.5e-5


def test_an_indexers_keys_are_kept_although_no_gradient_reaches_them() -> None:
    model, config, tokens = model_of("deepseek_v32"), config_of("deepseek_v32"), tokens_of(460)
    shape = describe(model, config)
    gathered = Gathered(b"m" * 32, shape, stream_ropes(model, shape))
    cache = prefilled(model, tokens[:300])
    snapshot = adapters.snapshot(cache, 300, latent=True)
    pages = [snapshot.page(group.layers, (0, 300)) for group in gathered.groups]
    gathered.add(pages, gathered.fisher.measure(model, cache, tokens[300:]), 300)
    assert not gathered.fisher.sums["index_key"].any()
    groups = []
    for seen in gathered.groups:
        weights = gathered.weights(seen, ridge=0.3)
        assert weights is not None
        groups.append(fit_group(seen, weights=weights, source="tests"))
    codecs = group_codecs("ferry", {"step": 1e-4}, [g.layers for g in groups], groups)
    coder = Coder(b"m" * 32, codecs, GroupSource(groups), shape.kv_heads)
    (back,) = coder.run(snapshot, (0, 256)).pages
    for name, stream in snapshot.page((0, 4), (0, 256)).streams.items():
        exact, found = (s.float32()[:, :, SINK_TOKENS:] for s in (stream, back.streams[name]))
        assert np.abs(found - exact).mean() <= 0.3 * np.abs(exact - exact.mean()).mean(), name
