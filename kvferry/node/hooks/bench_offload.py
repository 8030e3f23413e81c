"""What an offer that is encoded in the background costs a generation in progress.

Tokens are generated one by one, in turn with and without offers under way, a few at a
time, so that other work on the machine slows both.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from kvferry.node.hooks.bench_restore import Report, Subject, timed

# Long against the rests that work takes on a busy machine.
WINDOW = 72
WARM = 8


def measure_offload(
    subject: Subject, tokens: Sequence[int], rounds: int, report: Report
) -> dict[str, Any]:
    """Tokens per second with and without.

    Args:
        tokens: of the cache that is offered, again and again under other keys, so that
            encoding never ends while a window with offers is timed.
        rounds: pairs of windows.
    """
    prefix = subject.prefix
    offered = subject.fill(tokens)
    step = _Generation(subject, tokens[: min(512, len(tokens))])
    names = itertools.count(1)

    def offer() -> None:
        other = [next(names), *tokens[1:]]  # another prompt, to whoever looks at the keys
        prefix.offer(other, offered)

    step.seconds(WARM)
    offer()
    flush_s = timed(lambda: prefix.flush(120.0))
    offer_blobs = prefix.counters["blobs_put"]
    pairs, blobs = [], 0
    for index in range(rounds):
        quiet = [step.seconds(WINDOW // 2)]
        before = prefix.counters["blobs_put"]
        busy = _while_offering(offer, lambda: step.seconds(WINDOW))
        blobs += prefix.counters["blobs_put"] - before
        prefix.flush(120.0)
        quiet.append(step.seconds(WINDOW // 2))
        pairs.append((sum(quiet), busy))
        report(float(index + 1), "generating")
    slower = [busy / quiet for quiet, busy in pairs]
    return {
        "slowdown_pct": 100 * (sum(b for _, b in pairs) / sum(q for q, _ in pairs) - 1),
        "slowdown_pct_quartiles": [
            100 * (sorted(slower)[index] - 1) for index in (rounds // 4, (3 * rounds) // 4)
        ],
        "tokens_per_second_without": WINDOW / statistics.median(quiet for quiet, _ in pairs),
        "tokens_per_second_with": WINDOW / statistics.median(busy for _, busy in pairs),
        "offered_tokens": len(tokens),
        "blobs_encoded_meanwhile": blobs,
        "blobs_per_second": blobs / sum(busy for _, busy in pairs),
        "blobs_per_offer": offer_blobs,
        "flush_seconds_per_offer": flush_s,
        "window_tokens": WINDOW,
        "rounds": rounds,
    }


def _while_offering(offer: Callable[[], None], work: Callable[[], float]) -> float:
    """An offer under way and another behind it, at every moment of ``work``."""
    offer()
    offer()
    time.sleep(0.02)
    return work()


class _Generation:
    """Greedy generation that goes on where it stopped."""

    def __init__(self, subject: Subject, prompt: Sequence[int]) -> None:
        self._model = subject.loaded.model
        self._cache: list[Any] = subject.fill(prompt)
        self._token = int(prompt[-1])

    def seconds(self, tokens: int) -> float:
        """What ``tokens`` more took."""
        started = time.perf_counter()
        for _ in range(tokens):
            logits = self._model(mx.array([[self._token]]), cache=self._cache)
            self._token = int(np.array(mx.argmax(logits[0, -1])))
        return time.perf_counter() - started
