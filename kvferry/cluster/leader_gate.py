"""Calls that only a leader answers, and the term that their answers carry."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message

from kvferry.cluster.leadership import Leadership
from kvferry.errors import NotLeaderError

_Q = TypeVar("_Q", bound=Message)
_R = TypeVar("_R", bound=Message)


class LeaderGate:
    """Wraps a service's methods. All raise NotLeaderError where we do not lead (any more)."""

    def __init__(self, leadership: Leadership) -> None:
        self._leadership = leadership

    def unary(self, method: Callable[[_Q], Awaitable[_R]]) -> Callable[[_Q], Awaitable[_R]]:
        """Checked before, and again before the answer goes out, which may be much later."""

        async def gated(request: _Q) -> _R:
            self._leadership.require()
            reply = await method(request)
            return _stamped(reply, self._leadership.require())

        return gated

    def stream(
        self, method: Callable[[_Q], AsyncGenerator[_R, None]]
    ) -> Callable[[_Q], AsyncGenerator[_R, None]]:
        """Checked before each message."""

        async def gated(request: _Q) -> AsyncGenerator[_R, None]:
            begun = self._leadership.require()
            async with aclosing(method(request)) as replies:
                async for reply in replies:
                    term = self._leadership.require()
                    if term != begun:  # we led, lost and lead again: what was said is old
                        raise NotLeaderError("this coordinator", self._leadership.leader)
                    yield _stamped(reply, term)

        return gated


def _stamped(reply: _R, term: int) -> _R:
    """A copy that carries the term, as a message may be shared by many watchers."""
    if not term or "term" not in reply.DESCRIPTOR.fields_by_name:
        return reply
    copy = type(reply)()
    copy.CopyFrom(reply)
    copy.term = term  # type: ignore[attr-defined]
    return copy
