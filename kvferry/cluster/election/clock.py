"""The clock that leases are held against."""

import time

# Neither stands still while the machine sleeps, as `time.monotonic` does.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def wakeful_clock() -> float:
    """Seconds that never go back, and count also while this machine sleeps.

    A leader whose lid was closed must find its lease over when it wakes.
    """
    return time.clock_gettime(_CLOCK)
