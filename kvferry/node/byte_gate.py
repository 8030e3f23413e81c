"""No more than so many bytes under way at a time, however many callers there are."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class ByteGate:
    """First come, first served. Belongs to the event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held_bytes(self) -> int:
        """Bytes under way now."""
        return self._held

    @contextlib.asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait for room; what is larger than all of it goes alone."""
        size = min(size, self._limit)
        if self._waiting or self._held + size > self._limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((size, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(size)  # its turn came in the same moment
                else:
                    self._waiting.remove((size, turn))
                    self._wake()
                raise
        else:
            self._held += size
        try:
            yield
        finally:
            self._give_back(size)

    def _give_back(self, size: int) -> None:
        self._held -= size
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._held + self._waiting[0][0] <= self._limit:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self._held += size
                turn.set_result(None)
