"""One target: what was wanted, and where among results it is found."""

from collections.abc import Callable
from dataclasses import dataclass

from kvferry.codec.lab.experiment.evidence import Choose, Evidence
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import shown

Value = Callable[[Evidence], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One target.

    Attributes:
        source: the seed, or the design.
        wanted: in words.
        value: of what was measured; None: it was not.
        low, high: between which it is met.
        why: said where it is not met.
    """

    codec: str
    source: str
    wanted: str
    value: Value
    low: float = float("-inf")
    high: float = float("inf")
    form: str = ".3g"
    unit: str = ""
    why: str = ""

    def row(self, evidence: Evidence) -> tuple[str, ...]:
        """Of the table."""
        found = self.value(evidence)
        if found is None:
            return self.codec, self.source, self.wanted, "not measured", "-", ""
        met = self.low <= found <= self.high
        told = shown(found, self.form, self.unit)
        why = "" if met else self.why or "no reason is known beforehand: see the tables below"
        return self.codec, self.source, self.wanted, told, "yes" if met else "**no**", why


def gain(kind: str, key: str, codec: str, other: str, ratio: float | None = None) -> Value:
    """`Evidence.gain`, in per cent."""

    def value(evidence: Evidence) -> float | None:
        found = evidence.gain(kind, key, codec, other, ratio)
        return None if found is None else 100 * found

    return value


def found_gain(codec: str, other: str, ratio: float | None = None) -> Value:
    """`Evidence.found_gain`, in per cent."""

    def value(evidence: Evidence) -> float | None:
        found = evidence.found_gain(codec, other, ratio)
        return None if found is None else 100 * found

    return value


def mean_of(
    kind: str, codec: str, *keys: str, choose: Choose | None = None, scale: float = 1.0
) -> Value:
    """`Evidence.mean`, times ``scale``."""

    def value(evidence: Evidence) -> float | None:
        found = evidence.mean(kind, codec, *keys, choose=choose)
        return None if found is None else scale * found

    return value


def at_ratio(ratio: float) -> Choose:
    """Runs that were asked for it, not those that happened to come to it."""
    return lambda result: result.run.codec.ratio == ratio


def with_option(name: str, value: object) -> Choose:
    """Runs of a codec that was given it, or turned to it."""

    def choose(result: Result) -> bool:
        options = result.metrics.get("options")
        return isinstance(options, dict) and str(options.get(name)) == str(value)

    return choose


def quotient(first: float | None, second: float | None) -> float | None:
    """None where either is not known."""
    return None if first is None or not second else first / second
