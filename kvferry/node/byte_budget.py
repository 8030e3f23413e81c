"""Bytes that may be spent on what nobody waits for."""

import time
from collections.abc import Callable


class ByteBudget:
    """At most ``most`` at once; what was spent comes back with time, or is earned.

    Args:
        most: bytes to begin with, and never more.
        per_s: bytes that come back in a second.
        clock: monotonic seconds.
    """

    def __init__(
        self, most: int, per_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._per_s, self._clock = most, per_s, clock
        self._held = float(most)
        self._at = clock()

    @property
    def left(self) -> int:
        """Bytes that may be spent now."""
        now = self._clock()
        self.earn((now - self._at) * self._per_s)
        self._at = now
        return int(self._held)

    def take(self, count: int) -> bool:
        """Spend; False: there is not enough, and nothing was spent."""
        if count > self.left:
            return False
        self._held -= count
        return True

    def earn(self, count: float) -> None:
        """Add what was saved, or was not spent after all."""
        self._held = min(float(self._most), self._held + max(0.0, count))
