"""Results put together: one codec at one setting over all texts."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvferry.codec.lab.experiment.results import Result, Status

# The kind whose figures are times, and so of a machine.
TIMED = "cost"


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One codec at one setting; a result per text, or several where a run had other settings.

    Attributes:
        index: of the setting among those of its codec, in the order they were asked for.
    """

    label: str
    shown: str
    index: int
    results: Sequence[Result]

    @property
    def texts(self) -> frozenset[str]:
        """That it was measured on."""
        return frozenset(result.run.text for result in self.results)

    def mean(self, *keys: str) -> float | None:
        """Arithmetic mean of a metric over texts; None where none has it."""
        found = [v for r in self.results if (v := r.number(*keys)) is not None]
        return statistics.fmean(found) if found else None

    def middle(self, *keys: str) -> float | None:
        """Geometric mean; numbers at or below 0 count as 1e-9."""
        found = [v for r in self.results if (v := r.number(*keys)) is not None]
        if not found:
            return None
        return math.exp(statistics.fmean(math.log(max(v, 1e-9)) for v in found))


def measured(results: Sequence[Result]) -> list[Result]:
    """Those with metrics."""
    return [result for result in results if result.status is Status.MEASURED]


def newest(results: Sequence[Result]) -> list[Result]:
    """The last result of each run, in the order in which runs first appear; of one whose
    times count, the last on each machine.

    Args: results: oldest first.
    """
    found: dict[str, Result] = {}
    for result in results:
        where = machine_of(result) if result.run.kind == TIMED else ""
        key = [result.about.get("model"), result.run.to_json(), where]
        found[json.dumps(key, default=str)] = result
    return list(found.values())


def machine_of(result: Result) -> str:
    """What times depend on most of what it was measured on; empty: not known."""
    return timed_on(result.about.get("hardware"))


def timed_on(hardware: object) -> str:
    """Processor and cores, of what `kvferry.codec.lab.machine` gives. A new kernel or Python
    is the same machine: figures are not to be measured again with every update."""
    if not isinstance(hardware, Mapping):
        return ""
    return f"{hardware.get('processor')}, {hardware.get('cores')} cores"


def by_machine(results: Sequence[Result]) -> dict[str, list[Result]]:
    """That with most results first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(machine_of(result), []).append(result)
    return dict(sorted(found.items(), key=lambda item: -len(measured(item[1]))))


def series_of(results: Sequence[Result]) -> list[Series]:
    """Measured results by codec and setting; codecs in order of names, ratios rising."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in sorted(measured(results), key=_order):
        codec = result.run.codec
        setting = json.dumps([codec.ratio, dict(codec.options), codec.calibration], default=str)
        groups.setdefault((codec.shown, setting, codec.described()), []).append(result)
    counts: dict[str, int] = {}
    found = []
    for (label, _, shown), own in groups.items():
        index = counts[label] = counts.get(label, -1) + 1
        found.append(Series(label, shown, index, own))
    return found


def _order(result: Result) -> tuple[str, float, str]:
    codec = result.run.codec
    return codec.shown, codec.ratio or 0.0, json.dumps(dict(codec.options), default=str)


def main_context(results: Sequence[Result]) -> int:
    """The length that most runs have; 0 without runs."""
    lengths = [result.run.context for result in measured(results)]
    return max(set(lengths), key=lambda n: (lengths.count(n), n), default=0)


def at_context(results: Sequence[Result], context: int) -> list[Result]:
    """Those of one length."""
    return [result for result in results if result.run.context == context]


def usual(results: Sequence[Result]) -> list[Result]:
    """Those of the main length, and of the continuation that most of these have: results
    stay when a file is edited, and what predicts fewer tokens is another measurement."""
    own = at_context(results, main_context(results))
    spans = [result.run.continuation for result in measured(own)]
    main = max(set(spans), key=lambda n: (spans.count(n), n), default=0)
    return [result for result in own if result.run.continuation == main]


def ratio_at(points: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Compression ratio at a KL, on logarithmic axes between (ratio, KL) points; None outside."""
    ordered = sorted(points, key=lambda point: point[1])
    for (low_ratio, low), (high_ratio, high) in itertools.pairwise(ordered):
        if 0 < low <= kl <= high:
            share = math.log(kl / low) / math.log(high / low) if high > low else 0.0
            return math.exp(math.log(low_ratio) + share * math.log(high_ratio / low_ratio))
    return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def text_name(text: str) -> str:
    """A text as people call it: files without folder and ending."""
    return Path(text).stem


def shown(value: float | None, form: str = ".3g", unit: str = "") -> str:
    """A number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:{form}}{unit}"
