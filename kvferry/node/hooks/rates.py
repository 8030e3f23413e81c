"""What this machine's model has been seen to do, in tokens per second."""

from dataclasses import dataclass

MIN_TOKENS = 32
SMOOTHING = 0.3


@dataclass(slots=True)
class Rate:
    """A smoothed rate; None until something long enough was measured."""

    per_s: float | None = None

    def add(self, tokens: int, seconds: float) -> None:
        """Take in one measurement; short ones say too little and are left out."""
        if tokens < MIN_TOKENS or seconds <= 0:
            return
        seen = tokens / seconds
        self.per_s = seen if self.per_s is None else self.per_s + SMOOTHING * (seen - self.per_s)

    def seconds_for(self, tokens: int, otherwise: float) -> float:
        """Predicted time for ``tokens``; ``otherwise`` where nothing was measured."""
        return otherwise if not self.per_s else tokens / self.per_s
