"""Whether a machine that was about to sleep is awake again. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

# A clock that stands still in sleep falls behind the other by at least this much.
SLEPT_S = 2.0


@dataclass(slots=True)
class Nap:
    """Begun when the node said that it is away.

    Args:
        running_s: a clock that stands still while the machine sleeps (time.monotonic).
        wall_s: one that does not (time.time).
        called_off_s: awake for so long, it did not sleep after all.
    """

    running_s: Callable[[], float]
    wall_s: Callable[[], float]
    called_off_s: float
    _running: float = 0.0
    _behind: float = 0.0

    def __post_init__(self) -> None:
        self._running = self.running_s()
        self._behind = self.wall_s() - self._running

    def over(self, active: bool) -> str:
        """Why the node is awake; empty: it may still be on its way to sleep.

        ``active``: a hook has asked for something since.
        """
        if active:
            return "a hook is at work"
        running = self.running_s()
        if self.wall_s() - running > self._behind + SLEPT_S:
            return "the machine slept"
        if running - self._running > self.called_off_s:
            return "it did not sleep"
        return ""
