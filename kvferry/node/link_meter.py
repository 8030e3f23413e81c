"""What a link to another machine does, measured by the transfers that cross it anyway."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SMOOTHING = 0.3
# Less says nothing about bandwidth.
MEASURED_BYTES = 64 * 1024
# A rate that nothing has confirmed for so long no longer counts as known.
FORGET_S = 60.0
WINDOW = 64
FEW = 8
# How late a transfer may be, as a multiple of what was foreseen: before anything is known
# of the spread, and whatever was seen of it.
UNKNOWN_SPREAD = 3.0
LEAST_SPREAD, MOST_SPREAD = 1.5, 8.0
# Below this, the event loop's own delays are taken for a peer's.
LEAST_WAIT_S = 0.03
# A transfer has stalled when nothing came for so many of the link's usual pauses.
PAUSES = 3.0
LEAST_SILENCE_S, MOST_SILENCE_S = 0.25, 2.0


def smooth(old: float, new: float) -> float:
    """Exponentially weighted; the first value as it is."""
    return new if not old else old + SMOOTHING * (new - old)


@dataclass(eq=False, slots=True)
class Transfer:
    """One blob on its way. Times are the meter's clock, ``expected_s`` from ``started_s``."""

    size: int
    started_s: float
    expected_s: float
    received: int = 0
    last_byte_s: float = 0.0
    ended: bool = False

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return max(0, self.size - self.received)


class LinkMeter:
    """Rate and spread of one link. Belongs to the event loop.

    The rate is that of the link and not of one transfer: bytes of all transfers over the
    time in which at least one was under way.

    Args:
        clock: monotonic seconds.
        on_rate: called with bytes and seconds of every measurement.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        on_rate: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.clock, self._on_rate = clock, on_rate
        self._rate = 0.0
        self._rated_s = 0.0
        self._under_way: set[Transfer] = set()
        self._lateness: deque[float] = deque(maxlen=WINDOW)
        self._gaps: deque[float] = deque(maxlen=WINDOW)
        self._mark_s = 0.0
        self._bytes = 0
        self._busy_s = 0.0

    @property
    def under_way(self) -> int:
        """Transfers now."""
        return len(self._under_way)

    @property
    def queued_bytes(self) -> int:
        """Bytes that were asked for and have not come."""
        return sum(transfer.left for transfer in self._under_way)

    @property
    def bytes_per_s(self) -> float:
        """As measured lately, and no more than the transfers under way bear out; 0: unknown."""
        if not self._rate or self.clock() - self._rated_s > FORGET_S:
            return 0.0
        busy = self._busy_s + (self.clock() - self._mark_s if self._under_way else 0.0)
        if busy <= LEAST_WAIT_S:
            return self._rate
        return min(self._rate, max(1.0, (self._bytes + MEASURED_BYTES) / busy))

    def begin(self, size: int, expected_s: float) -> Transfer:
        """A blob of about ``size`` bytes was asked for."""
        now = self.clock()
        if not self._under_way:
            self._mark_s = now
        transfer = Transfer(size, now, expected_s, last_byte_s=now)
        self._under_way.add(transfer)
        return transfer

    def received(self, transfer: Transfer, total: int) -> None:
        """So many of its bytes are here now."""
        now = self.clock()
        self._bytes += total - transfer.received
        self._gaps.append(now - transfer.last_byte_s)
        transfer.received, transfer.last_byte_s = total, now

    def end(self, transfer: Transfer, whole: bool) -> None:
        """It is here, or is not awaited any more."""
        if transfer.ended:
            return
        now, transfer.ended = self.clock(), True
        self._under_way.discard(transfer)
        self._busy_s += now - self._mark_s
        self._mark_s = now
        took = now - transfer.started_s
        # One that was overtaken would have taken longer still.
        if transfer.expected_s > 0 and (whole or took > transfer.expected_s):
            self._lateness.append(took / transfer.expected_s)
        if self._bytes >= MEASURED_BYTES and self._busy_s > 0:
            known = self._rate if now - self._rated_s <= FORGET_S else 0.0
            self._rate, self._rated_s = smooth(known, self._bytes / self._busy_s), now
            self._on_rate(self._bytes, self._busy_s)
            self._bytes, self._busy_s = 0, 0.0

    def patience_s(self, expected_s: float) -> float:
        """After so long, 19 of 20 transfers of this link were over."""
        spread = _p95(self._lateness) if len(self._lateness) >= FEW else UNKNOWN_SPREAD
        return max(LEAST_WAIT_S, expected_s * min(MOST_SPREAD, max(LEAST_SPREAD, spread)))

    def silence_s(self) -> float:
        """So long without a byte, a transfer has stalled, by the pauses that this link makes."""
        usual = _p95(self._gaps) if len(self._gaps) >= FEW else MOST_SILENCE_S
        return min(MOST_SILENCE_S, max(LEAST_SILENCE_S, PAUSES * usual))


def _p95(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
