"""KL, perplexity and agreement are what their definitions say, and chunks change nothing."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kvferry.codec.lab import compare as module
from kvferry.codec.lab.compare import compare
from kvferry.codec.mlx.load import LoadedModel

Fill = Callable[[list[int]], list[Any]]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def disturbed(cache: list[Any]) -> list[Any]:
    noise = np.random.default_rng(2).standard_normal(cache[1].values.shape) * 0.1
    cache[1].values = cache[1].values + mx.array(noise.astype(np.float32))
    return cache


@pytest.mark.parametrize("chunk", [7, 64])
def test_definitions(
    tiny: LoadedModel,
    tokens: list[int],
    filled: Fill,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    held, then = tokens[:100], tokens[100:151]
    whole = mx.array([then[:-1]])
    p = softmax(np.array(tiny.model(whole, cache=filled(held))[0], dtype=np.float64))
    q = softmax(np.array(tiny.model(whole, cache=disturbed(filled(held)))[0], dtype=np.float64))
    kl = (p * np.log(p / q)).sum(axis=-1)
    found = compare(tiny.model, filled(held), [disturbed(filled(held))], then)[0]
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    rows = np.arange(50)
    assert found.ppl_exact == pytest.approx(np.exp(-np.log(p[rows, then[1:]]).mean()), rel=1e-4)
    assert found.ppl_restored == pytest.approx(np.exp(-np.log(q[rows, then[1:]]).mean()), rel=1e-4)
    assert found.top1_agreement == np.mean(p.argmax(axis=-1) == q.argmax(axis=-1))
    assert kl.mean() > 1e-4
    a, b = (
        np.array(tiny.model(whole, cache=c)[0], dtype=np.float64)
        for c in (filled(held), disturbed(filled(held)))
    )
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.logit_cosine == pytest.approx(cosine.mean(), abs=1e-5)


def test_the_same_cache_costs_nothing(tiny: LoadedModel, tokens: list[int], filled: Fill) -> None:
    held, then = tokens[:80], tokens[80:121]
    for found in compare(tiny.model, filled(held), [filled(held), filled(held)], then):
        assert abs(found.kl_mean) < 1e-6
        assert found.top1_agreement == 1.0
        assert found.ppl_delta_pct == pytest.approx(0.0, abs=1e-4)
