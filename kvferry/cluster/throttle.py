"""A token bucket: no more bytes per second over a link than somebody wants to spend."""

import asyncio
import time
from collections.abc import Callable

# What may go at once after a pause: enough that small messages do not wait.
BURST_S = 0.05


class Throttle:
    """Bytes take their time. Belongs to one event loop; the rate may be set from any thread.

    Args:
        bytes_per_s: 0: as fast as it goes.
        clock: monotonic seconds.
    """

    def __init__(
        self, bytes_per_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._free_at = 0.0
        self._bytes_per_s = max(0.0, bytes_per_s)

    @property
    def bytes_per_s(self) -> float:
        """The rate now; 0: none."""
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, rate: float) -> None:
        self._bytes_per_s = max(0.0, rate)
        self._free_at = 0.0

    async def take(self, count: int, within_s: float | None = None) -> bool:
        """Wait until ``count`` bytes have gone by.

        Returns: False: they did not within ``within_s``; the rest is not owed.
        """
        rate = self._bytes_per_s
        if not rate:
            return True
        now = self._clock()
        cost = count / rate
        self._free_at = max(self._free_at, now - BURST_S) + cost
        wait = self._free_at - now
        pause = wait if within_s is None else min(wait, max(0.0, within_s))
        done = False
        try:
            if pause > 0:
                await asyncio.sleep(pause)
            done = pause == wait or wait <= 0
        finally:
            if not done:
                self._give_back(now + wait, cost)
        return done

    def _give_back(self, due: float, cost: float) -> None:
        """What was called off before its turn frees the link for the others."""
        unused = min(cost, due - self._clock())
        if unused > 0:
            self._free_at -= unused
