"""Async methods as gRPC handlers: our errors become statuses, bugs become INTERNAL."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from kvferry.cluster.status import error_metadata, status_code
from kvferry.cluster.wire import Outgoing, serialize
from kvferry.errors import FerryError

log = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
OnFailure = Callable[[str], None]
_Q = TypeVar("_Q", bound=Message)
_R = TypeVar("_R", bound=Outgoing)
_O = TypeVar("_O", bound=Outgoing)
_I = TypeVar("_I")


async def _fail(context: Any, name: str, error: Exception, on_failure: OnFailure) -> NoReturn:
    if isinstance(error, FerryError):
        on_failure(error.reason)
        await context.abort(status_code(error), str(error)[:500], error_metadata(error))
    on_failure("internal")
    log.error("%s failed", name, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"{name} failed inside; see the log")
    raise AssertionError("abort returns never")


def unary(
    method: Callable[[_Q], Awaitable[_R]], request: type[_Q], on_failure: OnFailure
) -> Handler:
    """A handler that answers one message with one. ``on_failure`` gets reasons to count."""

    async def handle(message: _Q, context: Any) -> _R:
        try:
            return await method(message)
        except Exception as exc:  # every failure must end in a status
            await _fail(context, request.DESCRIPTOR.name, exc, on_failure)

    return grpc.unary_unary_rpc_method_handler(handle, request.FromString, serialize)


def stream(
    method: Callable[[_Q], AsyncGenerator[_O, None]], request: type[_Q], on_failure: OnFailure
) -> Handler:
    """A handler that answers one message with many messages, or chunks of a blob."""

    async def handle(message: _Q, context: Any) -> AsyncIterator[_O]:
        try:
            async with aclosing(method(message)) as replies:
                async for reply in replies:
                    yield reply
        except Exception as exc:  # every failure must end in a status
            await _fail(context, request.DESCRIPTOR.name, exc, on_failure)

    return grpc.unary_stream_rpc_method_handler(handle, request.FromString, serialize)


def upload(
    method: Callable[[AsyncIterator[_I]], Awaitable[_R]],
    name: str,
    deserialize: Callable[[bytes], _I],
    on_failure: OnFailure,
) -> Handler:
    """A handler that answers many messages, read by ``deserialize``, with one."""

    async def handle(items: AsyncIterator[_I], context: Any) -> _R:
        try:
            return await method(items)
        except Exception as exc:  # every failure must end in a status
            await _fail(context, name, exc, on_failure)

    return grpc.stream_unary_rpc_method_handler(handle, deserialize, serialize)
