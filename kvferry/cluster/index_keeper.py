"""Keeps a usable index over an engine: made anew whenever it is lost or damaged."""

import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from kvferry.cluster import store_rebuild
from kvferry.cluster.backends.base import BlobBackend
from kvferry.cluster.index import Index
from kvferry.cluster.index_schema import IndexDamagedError, is_damage, remove_database
from kvferry.cluster.space import StoreLimits
from kvferry.errors import StoreFullError, StoreUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")


class IndexKeeper:
    """Blocks; usable from any thread. ``counters`` get "index_rebuilt", "quarantined"."""

    def __init__(
        self,
        backend: BlobBackend,
        limits: StoreLimits,
        clock: Callable[[], float],
        counters: Counter[str],
        lock: threading.RLock,
        on_open: Callable[[Index], None],
    ) -> None:
        """``lock``: held while the index is replaced, so that nothing is written meanwhile.

        ``on_open`` is called with every index that was made to agree with the files.
        """
        self._backend, self._limits, self._clock = backend, limits, clock
        self._counters, self._lock, self._on_open = counters, lock, on_open
        self._index: Index | None = None
        self._broken = False

    def stamp(self, now_s: float, token_start: int) -> int:
        """Time of use in ns: coarse, and the earlier in its chain the later."""
        grain = self._limits.use_grain_s
        return int(now_s // grain * grain) * 1_000_000_000 - min(token_start, 999_999_999)

    def open(self) -> None:
        """Open the index and make it agree with the files."""
        path = self._backend.index_path
        try:
            index = Index(path)
        except IndexDamagedError as exc:
            self._forget(exc)
            try:
                index = Index(path)
            except IndexDamagedError as again:
                raise StoreUnavailableError(self._backend.url, str(again)) from again
        report = store_rebuild.reconcile(
            self._backend, index, self._limits, self._clock(), self.stamp
        )
        self._counters["quarantined"] += report.set_aside
        if report.added or report.lost or report.set_aside:
            log.info("%s: %s", self._backend.url, report)
        self._on_open(index)
        self._index = index

    def close(self) -> None:
        """May be called twice."""
        index, self._index = self._index, None
        if index is not None:
            with suppress(sqlite3.Error):
                index.close()

    def ask(self, call: Callable[[Index], T]) -> T:
        """Ask the index; where it is found damaged, make it anew from the files first.

        Raises: StoreFullError, StoreUnavailableError for what SQLite cannot do.
        """
        index = self._current()
        try:
            return call(index)
        except sqlite3.Error as exc:
            self._replace(index, exc)
        try:
            return call(self._current())
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc

    def _current(self) -> Index:
        index = self._index
        if index is None:
            raise StoreUnavailableError(self._backend.url, "it is closed")
        return index

    def _translated(self, exc: sqlite3.Error) -> StoreFullError | StoreUnavailableError:
        if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return StoreFullError(self._backend.url, 0, 0)
        return StoreUnavailableError(self._backend.url, f"index: {exc}")

    def _forget(self, cause: Exception) -> None:
        log.warning("index of %s is made anew: %s", self._backend.url, cause)
        self._counters["index_rebuilt"] += 1
        remove_database(self._backend.index_path)

    def _replace(self, damaged: Index, cause: sqlite3.Error) -> None:
        """Make the index anew, once; others that meet the old, closed one wait here."""
        if not (is_damage(cause) or isinstance(cause, sqlite3.ProgrammingError)):
            raise self._translated(cause) from cause
        with self._lock:
            if self._index is not damaged:
                return
            if not (is_damage(cause) or self._broken):
                raise self._translated(cause) from cause
            self._broken = True
            with suppress(sqlite3.Error):
                damaged.close()
            self._forget(cause)
            self.open()
            self._broken = False
