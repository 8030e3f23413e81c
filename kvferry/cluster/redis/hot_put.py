"""A put to the store behind Redis, whose bytes are kept for Redis meanwhile."""

from collections.abc import Callable, Sequence

from kvferry.cluster.repository import PutSession


class HotPut:
    """One put; ``keep`` or ``let_go`` is called once it is over."""

    def __init__(
        self,
        inner: PutSession,
        keep: Callable[[Sequence[bytes | memoryview]], None],
        let_go: Callable[[], None],
    ) -> None:
        self._inner, self._keep, self._let_go = inner, keep, let_go
        self._parts: list[bytes | memoryview] = []

    async def write(self, chunk: bytes | memoryview) -> None:
        """See `PutSession.write`."""
        await self._inner.write(chunk)
        self._parts.append(chunk)

    async def finish(self) -> bool:
        """See `PutSession.finish`."""
        stored = await self._inner.finish()
        parts, self._parts = self._parts, []
        if stored:
            self._keep(parts)
        else:
            self._let_go()
        self._let_go = _nothing
        return stored

    async def abort(self) -> None:
        """See `PutSession.abort`."""
        self._let_go()
        self._let_go = _nothing
        await self._inner.abort()


def _nothing() -> None:
    return
