"""What results say about one codec, asked as the seeds' targets ask."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import (
    TIMED,
    by_machine,
    measured,
    ratio_at,
    series_of,
    usual,
)
from kvferry.codec.lab.needles.places import by_setting, placed

Choose = Callable[[Result], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Newest results of one model."""

    results: Sequence[Result]

    def of(self, kind: str, codec: str, choose: Choose | None = None) -> list[Result]:
        """Measured results of a codec with the user's own calibration, at the usual lengths.

        Args: codec: as results call it, by its label where it has one.
        """
        own = usual(self._usual(kind))
        return [r for r in own if r.run.codec.shown == codec and (choose is None or choose(r))]

    def mean(self, kind: str, codec: str, *keys: str, choose: Choose | None = None) -> float | None:
        """Arithmetic mean of a metric over those; None where there is none."""
        numbers = [r.number(*keys) for r in self.of(kind, codec, choose)]
        found = [number for number in numbers if number is not None]
        return statistics.fmean(found) if found else None

    def ratio_at_kl(self, codec: str, kl: float) -> float | None:
        """Ratio at which the mean KL over texts comes to ``kl``, between settings that were
        measured on all texts; None where no two are on both sides of it."""
        own = series_of(self.of("fidelity", codec))
        texts = max((len(series.texts) for series in own), default=0)
        points = [
            (ratio, found)
            for series in own
            if len(series.texts) == texts
            and (ratio := series.middle("compression_ratio")) is not None
            and (found := series.mean("kl_mean")) is not None
        ]
        return ratio_at(points, kl)

    def kl_at_ratio(self, codec: str, ratio: float) -> float | None:
        """Mean KL of runs that were turned to a ratio."""
        return self.mean(
            "fidelity", codec, "kl_mean", choose=lambda result: result.run.codec.ratio == ratio
        )

    def gain(
        self, kind: str, key: str, codec: str, other: str, ratio: float | None = None
    ) -> float | None:
        """Mean difference of a metric between two codecs, run by run.

        Args:
            ratio: that both were turned to; None: any, and ``other`` as it is.
        Returns: of ``codec`` less that of ``other``, over all runs that differ in nothing
            but the codec; None where there are none.
        """
        own, others = self._both(kind, codec, other, ratio)
        base = {_place(r): r.number(key) for r in others}
        found = [
            mine - theirs
            for r in own
            if (theirs := base.get(_place(r))) is not None
            if (mine := r.number(key)) is not None
        ]
        return statistics.fmean(found) if found else None

    def found_gain(self, codec: str, other: str, ratio: float | None = None) -> float | None:
        """Difference in shares of needles found, needle by needle: a run may ask for 3 or 9.

        Args:
            ratio: as `gain` has it.
        Returns: over all needles that both were asked for; None where there are none.
        """
        own, others = self._both("needles", codec, other, ratio)
        base = placed(others)
        found = [
            bool(needle["exact"]) - bool(base[place]["exact"])
            for setting in by_setting(own).values()
            for place, needle in placed(setting).items()
            if place in base
        ]
        return statistics.fmean(found) if found else None

    def _both(
        self, kind: str, codec: str, other: str, ratio: float | None
    ) -> tuple[list[Result], list[Result]]:
        """Results of two codecs that are to be compared; ``ratio`` as `gain` has it."""
        usual = self._usual(kind)
        own = [r for r in usual if r.run.codec.shown == codec]
        return (
            [r for r in own if ratio is None or r.run.codec.ratio == ratio],
            [r for r in usual if r.run.codec.shown == other and r.run.codec.ratio == ratio],
        )

    def _usual(self, kind: str) -> list[Result]:
        """Of all codecs and lengths, with the user's own calibrations."""
        own = [r for r in measured(self.results) if r.run.kind == kind]
        own = [r for r in own if not r.run.codec.calibration]
        if kind == TIMED:  # times are of one machine: of that with most
            own = next(iter(by_machine(own).values()), [])
        return own


def _place(result: Result) -> str:
    run = result.run.to_json()
    return json.dumps({name: run[name] for name in run if name != "codec"}, sort_keys=True)
