"""When hooks shall offload: memory pressure and idleness, each said once until it is over."""

import time
from collections.abc import Callable

import psutil

HYSTERESIS = 0.05


def memory_used_share() -> float:
    """Share of this machine's memory that is in use, 0 to 1."""
    memory = psutil.virtual_memory()
    return 1.0 - memory.available / memory.total


class PressureWatch:
    """Rises once when a mark is reached; again only after falling well below it."""

    def __init__(self) -> None:
        self._above = False

    def update(self, used_share: float, mark: float) -> bool:
        """Whether pressure begins now. ``mark`` 0: never."""
        if mark <= 0.0:
            self._above = False
        elif used_share >= mark and not self._above:
            self._above = True
            return True
        elif used_share < mark - min(HYSTERESIS, mark / 2):
            self._above = False
        return False


class IdleWatch:
    """Rises once when hooks have been quiet for so long; again only after they were not.

    Attributes:
        touches: how often a hook did something.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self.touches = clock, 0
        self._last: float | None = None

    def touch(self) -> None:
        """A hook did something."""
        self.touches += 1
        self._last = self._clock()

    def update(self, idle_s: float) -> bool:
        """Whether the node is idle from now on. ``idle_s`` 0: never said."""
        if self._last is None or idle_s <= 0 or self._clock() - self._last < idle_s:
            return False
        self._last = None
        return True
