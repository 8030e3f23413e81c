"""Blobs of one offer on their way to the node daemon."""

from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field

PUTS_UNDER_WAY = 2


@dataclass(slots=True)
class Puts:
    """Blobs of one offer on their way to the daemon, while the next one is encoded."""

    counters: Counter[str]
    under_way: deque[tuple[Future[bool], int, int]] = field(default_factory=deque)

    def add(self, put: Future[bool], size: int, raw: int) -> None:
        """One more, as soon as fewer than `PUTS_UNDER_WAY` are left. Raises: FerryError."""
        self.under_way.append((put, size, raw))
        self.finish(PUTS_UNDER_WAY - 1)

    def finish(self, left: int = 0) -> None:
        """Wait until no more than ``left`` are under way. Raises: FerryError."""
        while len(self.under_way) > left:
            put, size, raw = self.under_way.popleft()
            stored = put.result()
            self.counters["blobs_put" if stored else "blobs_known"] += 1
            self.counters["bytes_put"] += size
            self.counters["bytes_raw_fp16"] += raw
