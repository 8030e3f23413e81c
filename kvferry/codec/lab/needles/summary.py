"""Many needles as a few shares, each with how far it can be trusted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.lab.intervals import wilson


@dataclass(frozen=True, slots=True)
class Recall:
    """Of some needles.

    Attributes:
        low, high: 95 % interval of the share that was found exactly.
        log_prob: mean of the key's log-probability per token, nats.
    """

    found: int
    asked: int
    low: float
    high: float
    log_prob: float

    @property
    def share(self) -> float:
        """Found of asked."""
        return self.found / self.asked


def recall(needles: Iterable[Mapping[str, object]]) -> Recall | None:
    """Of needles as results have them; None of none."""
    listed = list(needles)
    if not listed:
        return None
    found = sum(bool(needle["exact"]) for needle in listed)
    low, high = wilson(found, len(listed))
    return Recall(found, len(listed), low, high, mean([nats(needle) for needle in listed]))


def nats(needle: Mapping[str, object]) -> float:
    """The key's log-probability per token."""
    return number(needle, "log_prob") / max(1.0, number(needle, "tokens"))


def number(table: Mapping[str, object], key: str) -> float:
    """A number of a result; 0 where JSON had to say null. Raises: KeyError, ValueError."""
    value = table[key]
    return 0.0 if value is None else float(str(value))


def shown(found: Recall | None) -> str:
    """For a table: share with its interval."""
    if found is None:
        return ""
    return f"{100 * found.share:.0f} % ({100 * found.low:.0f}-{100 * found.high:.0f})"


def mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0
