"""Restores against prefill, in one process and in turn, so that other work slows both.

A restore is the whole call: lookup, fetch from the store over loopback by a daemon that
keeps nothing itself, decode, and filling the model's cache, tail included.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.lab.forward import prefill
from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import FerryError
from kvferry.node.hooks.prefix_cache import PrefixCache

LENGTHS = (512, 1024, 2048, 4096)
SPEEDUP_LENGTH = 2048
# Restores beside one prefill: they vary more, and cost less.
RESTORES = 3
MAX_SLOWER = 1.05
Report = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model and its prefix cache."""

    loaded: LoadedModel
    prefix: PrefixCache

    def fill(self, tokens: Sequence[int], cache: list[Any] | None = None) -> list[Any]:
        """A cache that holds ``tokens``."""
        made = make_prompt_cache(self.loaded.model) if cache is None else cache
        prefill(self.loaded.model, tokens, made)
        return list(made)

    def first_token(self, tokens: Sequence[int], cache: list[Any]) -> None:
        """Prefill what is left of a prompt, up to the choice of the next token."""
        prefill(self.loaded.model, tokens[:-1], cache)
        mx.eval(mx.argmax(self.loaded.model(mx.array([list(tokens[-1:])]), cache=cache)[0, -1]))

    def store(self, tokens: Sequence[int]) -> dict[str, int]:
        """Prefill, offer, and wait until all is in the store; bytes that were put.

        Raises: FerryError: it did not get there.
        """
        before = self.prefix.counters.copy()
        if not self.prefix.offer(tokens, self.fill(tokens)) or not self.prefix.flush(120.0):
            raise FerryError(f"not stored: {dict(self.prefix.counters)}")
        names = ("bytes_put", "bytes_raw_fp16")
        return {name: self.prefix.counters[name] - before[name] for name in names}

    def restored(self, prompt: Sequence[int], expected: int) -> tuple[float, list[Any]]:
        """Seconds of a restore of ``expected`` tokens, and the cache.

        Raises: FerryError: it was another number of tokens.
        """
        started = time.perf_counter()
        cache, rest = self.prefix.restore(prompt)
        seconds = time.perf_counter() - started
        if len(prompt) - len(rest) != expected:
            report = self.prefix.last_restore
            reason = report.reason if report is not None else ""
            got = len(prompt) - len(rest)
            raise FerryError(f"restored {got} tokens instead of {expected}: {reason}")
        return seconds, cache


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_points(
    subject: Subject, prompts: Sequence[Sequence[int]], rounds: int, report: Report
) -> list[dict[str, Any]]:
    """Prefill and restore of stored prefixes; of each prompt all tokens but the last.

    Args:
        report: called with tokens prefilled so far and what is being timed.
    Raises: FerryError: a restore did not bring what was stored.
    """
    runs: list[list[_Round]] = [[] for _ in prompts]
    done = 0.0
    for prompt in prompts:  # the first use of all that is lazy
        subject.restored(prompt, len(prompt) - 1)
    for _ in range(rounds):
        for prompt, timings in zip(prompts, runs, strict=True):
            timings.append(_round(subject, prompt))
            done += len(prompt)
            report(done, f"{len(prompt) - 1} tokens")
    return [_point(len(p) - 1, timings) for p, timings in zip(prompts, runs, strict=True)]


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds, bytes, and step -> seconds of the restores."""

    prefill: float
    restores: list[float]
    next_token: float
    bytes: int
    steps: list[dict[str, float]]


def _round(subject: Subject, prompt: Sequence[int]) -> _Round:
    prefix, last = prompt[:-1], prompt[-1:]
    taken: list[float] = []
    steps: list[dict[str, float]] = []
    size = 0
    cache: list[Any] = []
    seconds = timed(lambda: subject.fill(prefix))
    for _ in range(RESTORES):
        took, cache = subject.restored(prompt, len(prefix))
        taken.append(took)
        found = subject.prefix.last_restore
        if found is not None:
            steps.append(dict(found.steps))
            size = found.bytes
    return _Round(seconds, taken, timed(lambda: subject.first_token(last, cache)), size, steps)


def _point(tokens: int, rounds: Sequence[_Round]) -> dict[str, Any]:
    prefills = [r.prefill for r in rounds]
    restores = [seconds for r in rounds for seconds in r.restores]
    pairs = [r.prefill / statistics.median(r.restores) for r in rounds]
    follow = statistics.median(r.next_token for r in rounds)
    prefill_s, restore_s = statistics.median(prefills), statistics.median(restores)
    steps = [step for r in rounds for step in r.steps]
    return {
        "tokens": tokens,
        "prefill_seconds": prefill_s,
        "restore_seconds": restore_s,
        "speedup": statistics.median(pairs),
        "speedup_spread": [min(pairs), max(pairs)],
        "ttft_speedup": (prefill_s + follow) / (restore_s + follow),
        "bytes": rounds[-1].bytes,
        "steps": {
            name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]
        },
        "prefill_spread": [min(prefills), max(prefills)],
        "restore_spread": [min(restores), max(restores)],
    }


# -- throttled links ------------------------------------------------------------------


def measure_sweep(
    subject: Subject,
    prompt: Sequence[int],
    unknown: Sequence[int],
    rates: Sequence[float],
    rounds: int,
    report: Report,
) -> dict[str, Any]:
    """Time to first token with and without kvferry, over links of any bandwidth.

    Args:
        prompt: stored, but for its last token.
        unknown: a prompt that is not stored; its prefill teaches the prefill rate.
        rates: bytes per second, rising; 0: as fast as it goes.
    """
    prefix = subject.prefix
    cache, rest = prefix.restore(unknown)
    subject.first_token(rest, cache)
    prefix.offer(unknown, cache)
    prefix.flush(20.0)
    points = []
    for index, rate in enumerate(rates):
        prefix.throttle(rate)
        _with(subject, prompt)  # until the rates are known
        prefix.worth.wait_probe(60.0)
        pairs = []
        for _ in range(rounds):
            cold = timed(
                lambda: subject.first_token(prompt, make_prompt_cache(subject.loaded.model))
            )
            pairs.append((cold, *_with(subject, prompt)))
        report(float(index + 1), f"{rate:,.0f} bytes/s")
        points.append(_sweep_point(rate, pairs))
    prefix.throttle(0.0)
    wins = [point for point in points if point["restored_tokens"]]
    return {
        "tokens": len(prompt) - 1,
        "points": points,
        "worst": max(point["ratio"] for point in points),
        "never_slower": all(point["ratio"] <= MAX_SLOWER for point in points),
        "first_fetched_at_bytes_per_s": wins[0]["bytes_per_s"] if wins else None,
        "break_even_bytes_per_s": _break_even(points),
    }


def _with(subject: Subject, prompt: Sequence[int]) -> tuple[float, int, int, str]:
    """Seconds to the first token; tokens restored, bytes fetched, and why not more."""
    started = time.perf_counter()
    cache, rest = subject.prefix.restore(prompt)
    subject.first_token(rest, cache)
    seconds = time.perf_counter() - started
    found = subject.prefix.last_restore
    size, reason = (found.bytes, found.reason) if found is not None else (0, "")
    return seconds, len(prompt) - len(rest), size, reason


def _sweep_point(
    rate: float, pairs: Sequence[tuple[float, float, int, int, str]]
) -> dict[str, Any]:
    return {
        "bytes_per_s": rate,
        "ttft_without_seconds": statistics.median(pair[0] for pair in pairs),
        "ttft_with_seconds": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
        "ratios": [pair[1] / pair[0] for pair in pairs],
        "restored_tokens": int(statistics.median_low([pair[2] for pair in pairs])),
        "bytes": int(statistics.median_low([pair[3] for pair in pairs])),
        "reasons": sorted({pair[4] for pair in pairs} - {""}),
    }


def _break_even(points: Sequence[dict[str, Any]]) -> list[float] | None:
    """Bandwidths between which it begins to fetch."""
    for before, after in itertools.pairwise(points):
        if not before["restored_tokens"] and after["restored_tokens"]:
            return [before["bytes_per_s"], after["bytes_per_s"]]
    return None
