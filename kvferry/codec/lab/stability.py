"""One setting over several texts and places in them: how much its figures vary."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvferry.codec.lab.evaluate import Evaluation
from kvferry.errors import ConfigError

METRICS: Mapping[str, Callable[[Evaluation], float]] = {
    "compression_ratio": lambda e: 2 * e.pages.values / e.pages.blob_bytes,
    "kl_mean": lambda e: e.found.kl_mean,
    "ppl_delta_pct": lambda e: e.found.ppl_delta_pct,
    "top1_agreement": lambda e: e.found.top1_agreement,
}


@dataclass(frozen=True, slots=True)
class Spread:
    """A metric over all runs. ``deviation`` is that of the sample; 0 of a single run."""

    mean: float
    deviation: float
    lowest: float
    highest: float

    def to_json(self) -> dict[str, float]:
        """As results hold it."""
        return {
            "mean": self.mean,
            "deviation": self.deviation,
            "lowest": self.lowest,
            "highest": self.highest,
        }


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, min(values), max(values))


def spreads(results: Sequence[Evaluation]) -> dict[str, Spread]:
    """Every metric of `METRICS` over several runs."""
    return {name: spread([of(result) for result in results]) for name, of in METRICS.items()}


def places(length: int, wanted: int, runs: int, seed: int, what: str) -> list[int]:
    """Where in a text each run begins, drawn evenly and without runs that overlap.

    Args:
        length: tokens of the text.
        wanted: tokens of a run.
    Returns: ``runs`` starts, rising.
    Raises: ConfigError: a text too short for so many runs.
    """
    spare = length - runs * wanted
    if spare < 0:
        allowed = f"at least {runs * wanted:,} tokens for {runs} runs that do not overlap"
        raise ConfigError("--text", f"{what}: {length:,} tokens", allowed)
    gaps = np.sort(np.random.default_rng(seed).integers(0, spare + 1, runs))
    return [int(gap) + index * wanted for index, gap in enumerate(gaps)]
