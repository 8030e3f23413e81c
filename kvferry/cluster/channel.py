"""Channels to other processes: TLS where there is a certificate, a token with every call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import grpc.aio

from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.wire import channel_options

Metadata = Sequence[tuple[str, str]]


class _Opens(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> Callable[..., Any]: ...


class _Bearing:
    """A channel whose every call carries ``metadata``.

    In place of grpc's call credentials, which want TLS also on loopback, and of its client
    interceptors, which put a queue between a put and its chunks.
    """

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._channel, self._metadata = channel, metadata
        self.unary_unary = self._opener(channel.unary_unary)
        self.unary_stream = self._opener(channel.unary_stream)
        self.stream_unary = self._opener(channel.stream_unary)
        self.stream_stream = self._opener(channel.stream_stream)

    def _opener(self, inner: _Opens) -> _Opens:
        def opened(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return partial(inner(*args, **kwargs), metadata=self._metadata)

        return opened

    async def __aenter__(self) -> "_Bearing":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)


def open_channel(
    address: str, max_receive_bytes: int, credentials: Credentials = PLAINTEXT
) -> grpc.aio.Channel:
    """A channel to HOST:PORT or unix:PATH; connects when first used.

    Raises: ConfigError: credentials that cannot be used for this address.
    """
    options = channel_options(max_receive_bytes, near=address.startswith("unix:"))
    secure = credentials.channel(address)
    if secure is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        channel = grpc.aio.secure_channel(address, secure, options=options)
    metadata = credentials.metadata(address)
    if not metadata:
        return channel
    return cast("grpc.aio.Channel", _Bearing(channel, metadata))
