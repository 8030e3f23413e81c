"""How far a restored cache leads the model astray, teacher-forced on the text itself."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.codec.lab.forward import Done, logits

CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Next-token distributions with the exact cache against those with a restored one.

    Attributes:
        kl_mean, kl_p99: KL(exact || restored) in nats, per position.
        ppl_exact, ppl_restored: perplexity of the text that follows.
        top1_agreement: share of positions with the same most likely token.
        logit_cosine: between the two logit vectors of a position, mean over positions.
    """

    kl_mean: float
    kl_p99: float
    ppl_exact: float
    ppl_restored: float
    top1_agreement: float
    logit_cosine: float = 1.0

    @property
    def ppl_delta_pct(self) -> float:
        """Change of perplexity in per cent."""
        return 100.0 * (self.ppl_restored / self.ppl_exact - 1.0)


@dataclass(slots=True)
class _Tally:
    kl: list[np.ndarray[Any, np.dtype[np.float64]]]
    same: int = 0
    loss: float = 0.0
    cosine: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What the model says of a stretch of text with the exact cache.

    Attributes:
        fed: tokens given to it, `CHUNK` of them or fewer.
        wanted: (tokens,) those that follow each.
        scores: (tokens, vocabulary) log-probabilities, float32.
        loss: summed over ``wanted``, in nats.
        normalizer: (tokens, 1) float32; logits are ``scores`` and this.
    """

    fed: Sequence[int]
    wanted: mx.array
    scores: mx.array
    loss: float
    normalizer: mx.array


def references(model: Any, exact: list[Any], tokens: Sequence[int]) -> Iterator[Reference]:
    """Feed ``tokens`` after the exact cache, stretch by stretch, as they are asked for.

    Args:
        exact: the caches as prefill left them; filled further.
        tokens: the continuation and one more, whose prediction is the last measured.
    """
    fed, targets = tokens[:-1], tokens[1:]
    for start in range(0, len(fed), CHUNK):
        part = slice(start, start + CHUNK)
        wanted = mx.array(list(targets[part]))
        scores, normalizer = _log_softmax(logits(model, fed[part], exact))
        loss = _loss(scores, wanted)
        yield Reference(fed[part], wanted, scores, loss, normalizer)


def compare(
    model: Any,
    exact: list[Any],
    restored: Sequence[list[Any]],
    tokens: Sequence[int],
    done: Done | None = None,
) -> list[Comparison]:
    """`compare_with` what `references` gives, which is not kept."""
    return compare_with(model, references(model, exact, tokens), restored, done)


def compare_with(
    model: Any,
    reference: Iterable[Reference],
    restored: Sequence[list[Any]],
    done: Done | None = None,
) -> list[Comparison]:
    """Feed the same tokens after restored caches, which are filled further by it.

    Args:
        reference: all of `references`, in order.
        restored: any number of caches, each of as many tokens as the exact one had, kept
            or not.
    Returns: one comparison per restored cache.
    """
    tallies = [_Tally([]) for _ in restored]
    loss_exact, count = 0.0, 0
    for part in reference:
        loss_exact += part.loss
        count += len(part.fed)
        best = mx.argmax(part.scores, axis=-1)
        for tally, cache in zip(tallies, restored, strict=True):
            given = logits(model, part.fed, cache)
            found, _ = _log_softmax(given)
            kl = (mx.exp(part.scores) * (part.scores - found)).sum(axis=-1)
            tally.kl.append(np.array(kl, dtype=np.float64))
            tally.same += int(np.array(mx.argmax(found, axis=-1) == best).sum())
            tally.loss += _loss(found, part.wanted)
            tally.cosine += _cosine(part.scores + part.normalizer, given)
        if done is not None:
            done(len(part.fed))
    return [_result(tally, loss_exact, count) for tally in tallies]


def loss_of(model: Any, cache: list[Any], tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood in nats of all tokens but the first, which is given.

    Args:
        cache: of what is before them; filled further.
    """
    parts = list(references(model, cache, tokens))
    return sum(part.loss for part in parts) / (len(tokens) - 1)


def _log_softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    normalizer = mx.logsumexp(scores, axis=-1, keepdims=True)
    return scores - normalizer, normalizer


def _cosine(first: mx.array, second: mx.array) -> float:
    """Summed over rows."""
    lengths = mx.linalg.norm(first, axis=-1) * mx.linalg.norm(second, axis=-1)
    found = (first * second).sum(axis=-1) / mx.maximum(lengths, 1e-30)
    return float(np.array(found, dtype=np.float64).sum())


def _loss(log_probabilities: mx.array, wanted: mx.array) -> float:
    chosen = mx.take_along_axis(log_probabilities, wanted[:, None], axis=-1)
    return -float(np.array(chosen, dtype=np.float64).sum())


def _result(tally: _Tally, loss_exact: float, count: int) -> Comparison:
    kl = np.concatenate(tally.kl)
    return Comparison(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        ppl_exact=math.exp(loss_exact / count),
        ppl_restored=math.exp(tally.loss / count),
        top1_agreement=tally.same / count,
        logit_cosine=tally.cosine / count,
    )
