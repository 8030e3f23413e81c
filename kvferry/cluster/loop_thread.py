"""An event loop in a thread of its own, for callers that are synchronous."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Loop(asyncio.SelectorEventLoop):
    """One that may be told of something when it is closed already.

    grpc.aio has one queue of completions for all event loops of a process. Whichever loop
    is awake takes them off and passes them on, those of clients that have just closed too;
    an error there would be logged, and hold up the completions behind it.
    """

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self, context)  # that nobody runs


class LoopThread:
    """Runs coroutines for other threads. The model's thread may wait on it; it never
    waits for the model."""

    def __init__(self, name: str = "kvferry-client") -> None:
        self._loop = _Loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """The coroutine's result. Raises: what it raises; TimeoutError, after cancelling it."""
        future = self.start(coroutine)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Let it run; its result comes with the future, and cancelling that ends it.

        Raises: RuntimeError: it is closed.
        """
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this event loop is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancel what still runs and end the thread. May be called twice."""
        if self._loop.is_closed():
            return
        try:
            self.run(_cancel_others(), 5.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
