"""Rests between pieces of work on a machine that has no core to spare.

A scheduling class does not protect a model that computes on all cores: the threads of a
BLAS wait for each other by yielding, which hands their core to whoever else wants it, for
a whole time slice. Measured with two cores and OpenBLAS, a process that only counted at
SCHED_IDLE halved the speed of a generation. So where no core was idle, work takes a small
share of the time instead, until one is.
"""

import threading
import time
from collections.abc import Callable

import psutil

# Of the time, where all cores are busy. Measured, a token takes up to twice as long while
# work is done beside it: this costs a generation two to three per cent.
SHARE = 0.025
# A core that is idle for so much of the time is one that work may have.
IDLE_CORES = 0.75
# Counters of idle time move in steps of 10 ms.
POLL_S = 0.1
MAX_REST_S = 5.0


class Pace:
    """How long to rest before the next piece of work. Belongs to one thread.

    Args:
        share: of the time that work may take on a busy machine.
        wake: while it is set nobody rests.
        idle_seconds: that all cores together have had since some moment.
    """

    def __init__(
        self,
        wake: threading.Event,
        share: float = SHARE,
        idle_seconds: Callable[[], float] | None = None,
    ) -> None:
        self._wake, self._share = wake, share
        self._idle_seconds = idle_seconds or machine_idle_seconds
        self._began = self._idle = self._rest_until = 0.0

    def begin(self) -> None:
        """Return once the next piece may begin."""
        while (left := self._rest_until - time.monotonic()) > 0:
            self._watch()
            if self._wake.wait(min(POLL_S, left)) or self._core_was_idle():
                break
        self._watch()

    def done(self) -> None:
        """A piece has ended."""
        self._rest_until = now = time.monotonic()
        if not self._core_was_idle():
            self._rest_until += min(MAX_REST_S, (now - self._began) * (1 / self._share - 1))

    def _watch(self) -> None:
        self._began, self._idle = time.monotonic(), self._idle_seconds()

    def _core_was_idle(self) -> bool:
        passed = max(1e-3, time.monotonic() - self._began)
        return self._idle_seconds() - self._idle >= IDLE_CORES * passed


def machine_idle_seconds() -> float:
    """Since this machine started, summed over its cores."""
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))
