"""Fetching and decoding for a request that waits, while answers to others are generated."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait

from kvferry.errors import FerryError
from kvferry.node.hooks.loaded import Loaded

Timed = tuple[Loaded | None, float]


class Ahead:
    """At most one prompt at a time. For the model's thread; the work is on another."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._tokens: list[int] = []
        self._future: Future[Timed] | None = None

    def begin(self, tokens: Sequence[int], load: Callable[[], Loaded | None]) -> bool:
        """Have ``load`` called; True."""
        self._threads = self._threads or ThreadPoolExecutor(1, "kvferry-ahead")
        self._tokens, self._future = list(tokens), self._threads.submit(_timed, load)
        return True

    def under_way(self, timeout_s: float = 0.0) -> bool:
        """Whether it has not ended, after waiting for so long."""
        return self._future is not None and bool(wait([self._future], timeout_s).not_done)

    def take(self, tokens: Sequence[int]) -> Timed:
        """What was loaded for just these tokens, and in what time; else (None, 0)."""
        future, self._future = self._future, None
        if future is None or not future.done() or self._tokens != list(tokens):
            return None, 0.0
        try:
            return future.result()
        except (CancelledError, FerryError):
            return None, 0.0

    def clear(self) -> None:
        """Wait for what is under way, and forget it."""
        self._future = None
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None


def _timed(load: Callable[[], Loaded | None]) -> Timed:
    started = time.monotonic()
    return load(), time.monotonic() - started
