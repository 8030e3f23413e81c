"""What a server answered to an upload that it ended early.

A server that refuses an upload says why at once and reads no further. Where grpc.aio is
sending a chunk just then, it finds that this failed, and puts "Internal error from Core"
in the place of the answer that it has already.
"""

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")
_OK = grpc.StatusCode.OK


async def answered(call: "grpc.aio.StreamUnaryCall[Any, Any]") -> Any:
    """The reply of an upload. Raises: grpc.aio.AioRpcError, with what the server said."""
    said: list[grpc.aio.AioRpcError] = []
    call.add_done_callback(lambda done: said.append(_error_of(done)))
    try:
        return await call
    except grpc.aio.AioRpcError as exc:
        if exc.code() is grpc.StatusCode.INTERNAL and said and said[0].code() is not _OK:
            raise said[0] from exc
        raise


def _error_of(call: Any) -> grpc.aio.AioRpcError:
    told = _now(call.trailing_metadata())
    return grpc.aio.AioRpcError(
        _now(call.code()), grpc.aio.Metadata(), told, details=_now(call.details())
    )


def _now(answer: Coroutine[Any, Any, T]) -> T:
    """What is known when a call is over, and is to be awaited all the same."""
    try:
        answer.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    answer.close()
    raise RuntimeError("grpc.aio does not know yet how a call ended that has ended")
