"""What results say about one codec, asked as the seeds' targets ask."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import at_context, main_context, measured, ratio_at

Choose = Callable[[Result], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Newest results of one model."""

    results: Sequence[Result]

    def of(self, kind: str, codec: str, choose: Choose | None = None) -> list[Result]:
        """Measured results of a codec with the user's own calibration, at the usual length."""
        own = [r for r in measured(self.results) if r.run.kind == kind]
        own = [r for r in own if not r.run.codec.calibration]
        own = at_context(own, main_context(own))
        return [r for r in own if r.run.codec.name == codec and (choose is None or choose(r))]

    def mean(self, kind: str, codec: str, *keys: str, choose: Choose | None = None) -> float | None:
        """Arithmetic mean of a metric over those; None where there is none."""
        numbers = [r.number(*keys) for r in self.of(kind, codec, choose)]
        found = [number for number in numbers if number is not None]
        return statistics.fmean(found) if found else None

    def ratio_at_kl(self, codec: str, kl: float) -> float | None:
        """Geometric mean over texts of the ratio at a KL; None where a text does not reach it."""
        points: dict[str, list[tuple[float, float]]] = {}
        for result in self.of("fidelity", codec):
            ratio, found = result.number("compression_ratio"), result.number("kl_mean")
            if ratio is not None and found is not None:
                points.setdefault(result.run.text, []).append((ratio, found))
        ratios = [ratio_at(own, kl) for own in points.values()]
        known = [ratio for ratio in ratios if ratio is not None]
        if not known or len(known) < len(ratios):
            return None
        return math.exp(statistics.fmean(math.log(ratio) for ratio in known))

    def kl_at_ratio(self, codec: str, ratio: float) -> float | None:
        """Mean KL of runs that were turned to a ratio."""
        return self.mean(
            "fidelity", codec, "kl_mean", choose=lambda result: result.run.codec.ratio == ratio
        )
