"""What this machine's model and links have been seen to do, per second."""

import math
from dataclasses import dataclass

MIN_TOKENS = 32
SMOOTHING = 0.3


@dataclass(slots=True)
class Rate:
    """A smoothed rate; None until something long enough was measured.

    Attributes:
        least: shorter measurements say too little and are left out.
        jump: so many times more or less is no noise: what was known no longer holds.
    """

    least: int = MIN_TOKENS
    jump: float = math.inf
    per_s: float | None = None

    def add(self, amount: int, seconds: float) -> None:
        """Take in one measurement."""
        if amount < self.least or seconds <= 0:
            return
        seen = amount / seconds
        if self.per_s is None or not self.per_s / self.jump < seen < self.per_s * self.jump:
            self.per_s = seen
        else:
            self.per_s += SMOOTHING * (seen - self.per_s)

    def seconds_for(self, amount: int, otherwise: float) -> float:
        """Predicted time for ``amount``; ``otherwise`` where nothing was measured."""
        return otherwise if not self.per_s else amount / self.per_s
