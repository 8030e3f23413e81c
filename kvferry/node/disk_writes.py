"""What the disk tier writes in a day, counted so that a restart does not forget it.

A flash disk takes so many bytes in its life. What is on file is always a step ahead of what
was written, so that a daemon that is killed has counted too much rather than too little.
"""

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from kvferry.cluster.durable import write_durably
from kvferry.settings import NodeSettings

log = logging.getLogger(__name__)

STEP_BYTES = 64 << 20
KEPT_DAYS = 30
DAY_S = 86_400
YEAR_DAYS = 365.25
# Consumer disks are rated to be written 300 to 600 times over.
RATED_FILLS = 300
# The budget, where none was set, is what makes the rating last so long.
WANTED_YEARS = 10
MAX_FILE_BYTES = 64 * 1024


def disk_writes(settings: NodeSettings) -> "DiskWrites":
    """Counts of the disk under ``settings.data_dir``. Blocks."""
    size = shutil.disk_usage(settings.data_dir).total
    endurance = settings.disk_endurance_bytes or rated_endurance(size)
    budget = settings.disk_writes_per_day_bytes or default_budget(endurance, settings.disk_bytes)
    return DiskWrites(settings.data_dir / "disk_writes.json", budget, endurance)


def rated_endurance(disk_bytes: int) -> int:
    """What a disk of that size is rated for where its owner has not said, in bytes."""
    return RATED_FILLS * disk_bytes


def default_budget(endurance: int, tier_bytes: int) -> int:
    """Bytes a day, where none were set: never less than filling the tier once."""
    return max(tier_bytes, int(endurance / (WANTED_YEARS * YEAR_DAYS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Bytes written by the disk tier. Days are UTC's.

    Attributes:
        per_day: on average over the last days, today included.
        endurance: what the disk is rated for.
        lifetime_years: until ``endurance`` is used up at that pace, by this tier alone; 0:
            nothing was written yet.
    """

    today: int
    budget_per_day: int
    per_day: float
    total: int
    endurance: int
    lifetime_years: float


class DiskWrites:
    """Counts against a daily budget. Usable from any thread; `save` blocks.

    Args:
        path: JSON file; one that cannot be read is begun anew.
        clock: unix time in seconds.
    """

    def __init__(
        self,
        path: Path,
        budget_per_day: int,
        endurance: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path, self._budget, self._endurance = path, budget_per_day, endurance
        self._clock = clock
        self._lock = threading.Lock()
        self._day = int(clock()) // DAY_S
        self._today = self._total = self._ahead = 0
        self._days: dict[int, int] = {}
        self._load()

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            with self._path.open("rb") as file:
                kept = json.loads(file.read(MAX_FILE_BYTES))
            days = {int(day): max(0, int(count)) for day, count in kept["days"].items()}
            day, today, total = int(kept["day"]), int(kept["today"]), int(kept["total"])
            self._day, self._days = day, days
            self._today, self._total = max(0, today), max(0, total)
        self._ahead = self._today
        self._turn()

    def _turn(self) -> None:
        """Begin a new day, if it has come. A clock that is set back by hours changes nothing."""
        day = int(self._clock()) // DAY_S
        if day == self._day or day == self._day - 1:
            return
        if day > self._day:
            self._days[self._day] = self._today
            self._today = self._ahead = 0
        self._day = day
        for old in [d for d in self._days if not day - KEPT_DAYS < d < day]:
            del self._days[old]

    def reserve(self, size: int) -> bool:
        """Count bytes that are about to be written; False: not today."""
        with self._lock:
            self._turn()
            if self._today + size > self._budget:
                return False
            self._today += size
            self._total += size
            return True

    def refund(self, size: int) -> None:
        """They were not written after all."""
        with self._lock:
            self._today = max(0, self._today - size)
            self._total = max(0, self._total - size)

    @property
    def due(self) -> bool:
        """Whether `save` is to be called before more is written."""
        with self._lock:
            return self._today > self._ahead

    def save(self, exact: bool = False) -> None:
        """Write the file; ``exact``: at a clean end. A disk that refuses is logged only."""
        with self._lock:
            extra = 0 if exact else STEP_BYTES
            self._ahead = self._today + extra
            kept = {
                "day": self._day,
                "today": self._ahead,
                "total": self._total + extra,
                "days": {str(day): count for day, count in self._days.items()},
            }
            try:
                write_durably(self._path, json.dumps(kept).encode())
            except OSError as exc:
                log.warning("%s: %s", self._path, exc)

    def now(self) -> Written:
        """As it stands."""
        with self._lock:
            self._turn()
            first = min((day for day, count in self._days.items() if count), default=self._day)
            pace = (sum(self._days.values()) + self._today) / (self._day - first + 1)
            left = max(0, self._endurance - self._total)
            return Written(
                today=self._today,
                budget_per_day=self._budget,
                per_day=pace,
                total=self._total,
                endurance=self._endurance,
                lifetime_years=left / pace / YEAR_DAYS if pace else 0.0,
            )


def add_write_metrics(writes: DiskWrites, registry: CollectorRegistry) -> None:
    """Gauges, asked when they are scraped."""
    for name, text, value in (
        ("today_bytes", "Written today, UTC", lambda: writes.now().today),
        ("budget_bytes", "That may be written in a day", lambda: writes.now().budget_per_day),
        ("total_bytes", "Ever written", lambda: writes.now().total),
        ("lifetime_years", "Left at this pace", lambda: writes.now().lifetime_years),
    ):
        Gauge(f"kvferry_node_disk_writes_{name}", text, registry=registry).set_function(value)
