"""When to try again: exponential backoff with jitter, and a breaker built on it."""

import random
import time
from collections.abc import Callable


class Backoff:
    """Waits that double from ``first_s`` to ``most_s``, each cut by up to half at random.

    The jitter keeps nodes that lost the same store from coming back in the same instant.
    """

    def __init__(self, *, first_s: float, most_s: float) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._attempt = 0

    def next_s(self) -> float:
        """Seconds to wait before the next attempt."""
        wait = min(self._most_s, self._first_s * 2.0 ** min(self._attempt, 30))
        self._attempt += 1
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, no secret

    def reset(self) -> None:
        """An attempt succeeded."""
        self._attempt = 0


class Breaker:
    """Whether a remote is worth asking now.

    Closed until ``threshold`` failures in a row; then open for a backoff's time, after
    which one caller at a time may try. A success closes it. Not for several threads.
    """

    def __init__(
        self,
        *,
        threshold: int = 2,
        first_s: float = 0.25,
        most_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold, self._clock = threshold, clock
        self._backoff = Backoff(first_s=first_s, most_s=most_s)
        self._failures = 0
        self._closed_again_at = 0.0

    @property
    def healthy(self) -> bool:
        """Whether it is closed: no failures in a row beyond the threshold."""
        return self._failures < self._threshold

    def wait_s(self) -> float:
        """Seconds until an attempt is allowed; 0: now."""
        return 0.0 if self.healthy else max(0.0, self._closed_again_at - self._clock())

    def allow(self) -> bool:
        """Whether to try now. An open breaker lets one caller through per waiting time."""
        if self.healthy:
            return True
        if self.wait_s() > 0:
            return False
        self._closed_again_at = self._clock() + self._backoff.next_s()
        return True

    def succeeded(self) -> None:
        """The remote answered (also with a refusal: it is alive)."""
        self._failures = 0
        self._backoff.reset()

    def failed(self) -> None:
        """The remote did not answer, or not in time."""
        self._failures += 1
        if not self.healthy:
            self._closed_again_at = self._clock() + self._backoff.next_s()
