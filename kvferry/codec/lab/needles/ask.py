"""A question after a restored context, and how well the model answers it."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.codec.lab.forward import logits
from kvferry.codec.lab.needles.haystack import Question
from kvferry.codec.mlx.tokenizer import Tokenizer
from kvferry.codec.mlx.weighted_attention import attention_for


@dataclass(frozen=True, slots=True)
class Found:
    """Of one question.

    Attributes:
        exact: the greedy answer is the key, no digit less or more.
        log_prob: of the key, teacher-forced, in nats; 0 is certainty. Where the greedy
            answer is wrong it still shows how much of the key is left.
        tokens: of the key.
        said: the likeliest tokens, each after the right ones before it.
    """

    exact: bool
    log_prob: float
    tokens: int
    said: str


def ask(model: Any, tokenizer: Tokenizer, cache: list[Any], question: Question) -> Found:
    """Feed the question and its answer after ``cache``, which is filled further.

    One pass tells the greedy answer too: it is the key if and only if each of the key's
    tokens is the likeliest after those before it.
    """
    given = [*question.asked, *question.answer]
    with attention_for(model, cache):
        scores = logits(model, given, cache)[len(question.asked) - 1 :]
    chosen = np.array(mx.argmax(scores, axis=-1)).tolist()
    wanted = mx.array([list(question.answer)]).T
    steps = scores[:-1] - mx.logsumexp(scores[:-1], axis=-1, keepdims=True)
    log_probs = np.array(mx.take_along_axis(steps, wanted, axis=-1), dtype=np.float64)
    goes_on = tokenizer.decode(chosen[-1:])[:1].isdigit()
    exact = chosen[:-1] == list(question.answer) and not goes_on
    said = tokenizer.decode(chosen)
    return Found(exact, float(log_probs.sum()), len(question.answer), said)
