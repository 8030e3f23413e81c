"""`PrefixCache` for a loop that runs on asyncio: the model keeps one thread of its own.

MLX's streams belong to threads, so a restored cache is of use only on the thread that runs
the model. Everything that touches it goes there, one call after the other, and the event
loop never waits.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, Self, TypeVar

from kvferry.codec.mlx.load import LoadedModel
from kvferry.errors import ModelError
from kvferry.node.hooks.options import HookOptions
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.report import RestoreReport
from kvferry.node.hooks.thread_end import wait_ended

P = ParamSpec("P")
T = TypeVar("T")


class AsyncPrefixCache:
    """The two calls, awaited. Use it as an async context manager.

    A call that is cancelled goes on in its thread, and what it returns is dropped.

    Args:
        loaded: from `kvferry.codec.mlx.load.load_model`.
        options: see `HookOptions`.
        executor: of exactly one thread, the one that runs the model; one of our own, ended
            at the end, if None.
        others: as for `PrefixCache`: group, layers, make_cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        options: HookOptions | None = None,
        *,
        executor: Executor | None = None,
        **others: Any,
    ) -> None:
        self._make = partial(PrefixCache, loaded, options, **others)
        self._own = ThreadPoolExecutor(1, "kvferry-model") if executor is None else None
        self._executor: Executor = self._own or executor  # type: ignore[assignment]
        self._thread: int | None = None
        self._prefix: PrefixCache | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        try:
            self._thread = await self._submit(threading.get_native_id)
            self._prefix = await self.run(self._make)
        except BaseException:
            await self._let_go()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hand over what is still queued, then let go of the daemon. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._prefix is not None:
                await asyncio.to_thread(self._prefix.close)  # of MLX it needs nothing
        finally:
            await self._let_go()

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the last restore did; also after the end."""
        return None if self._prefix is None else self._prefix.last_restore

    @property
    def counters(self) -> dict[str, int]:
        """A copy of `PrefixCache.counters`; also after the end."""
        return {} if self._prefix is None else dict(self._prefix.counters)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the model's thread: your own prefill and generation.

        Raises: ModelError: the executor that was given has more threads than one; and
            whatever the function raises.
        """
        return await self._submit(partial(self._call, function, *args, **kwargs))

    async def ready(self, timeout_s: float = 60.0) -> bool:
        """`PrefixCache.ready`."""
        return await self.run(self._open.ready, timeout_s)

    async def restore(
        self, tokens: Sequence[int], *, beyond: int = 0
    ) -> tuple[list[Any], list[int]]:
        """`PrefixCache.restore`: (cache, remaining tokens); use the cache within `run`."""
        return await self.run(self._open.restore, tokens, beyond=beyond)

    async def offer(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str = "prefill",
        *,
        lasting: bool = False,
    ) -> bool:
        """`PrefixCache.offer`: whether it was taken; the rest happens in the background."""
        return await self.run(self._open.offer, tokens, cache, event, lasting=lasting)

    async def idle(self, budget_s: float = 0.25) -> bool:
        """`PrefixCache.idle`: whether there is more to do now."""
        return await self.run(self._open.idle, budget_s)

    async def flush(self, timeout_s: float = 60.0) -> bool:
        """`PrefixCache.flush`; the model's thread is free meanwhile."""
        return await asyncio.to_thread(self._open.flush, timeout_s)

    @property
    def _open(self) -> PrefixCache:
        if self._prefix is None or self._closed:
            raise ModelError("this prefix cache is not open: use it within `async with`")
        return self._prefix

    def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_native_id() != self._thread:
            raise ModelError("the executor must have exactly one thread, the model's")
        return function(*args, **kwargs)

    async def _submit(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def _let_go(self) -> None:
        if self._own is not None:
            await asyncio.to_thread(self._own.shutdown)
            await asyncio.to_thread(wait_ended, self._thread)
