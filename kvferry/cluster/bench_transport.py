"""How fast blobs travel between two processes, next to a raw blocking socket; with TLS, too."""

import asyncio
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import numpy as np

from kvferry.cluster.authority import Authority
from kvferry.cluster.bench_peer import (
    bench_blob,
    bench_context,
    bench_credentials,
    plain_key,
    receive_exactly,
    verified_key,
)
from kvferry.cluster.client import BlobStoreClient
from kvferry.errors import StoreUnavailableError

MIB = 1 << 20

Action = Callable[[], Awaitable[None]]


@contextmanager
def _peer(kind: str, size: int, folder: Path | None) -> Iterator[str]:
    """Another process that serves; ends with its standard input."""
    command = [sys.executable, "-m", "kvferry.cluster.bench_peer", kind, str(size)]
    command += [] if folder is None else [str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            if process.stdout is None:
                raise StoreUnavailableError(kind, "no output")
            address = process.stdout.readline().strip()
            if not address:
                raise StoreUnavailableError("bench peer", "it did not start")
            yield address
        finally:
            process.kill()


def _raw_actions(
    address: str, blob: bytes, folder: Path | None
) -> tuple[socket.socket, dict[str, Action]]:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if folder is not None:
        connection = bench_context(folder, False).wrap_socket(connection, server_hostname=host)

    async def put() -> None:
        connection.sendall(b"p")
        connection.sendall(blob)
        connection.recv(1)

    async def get() -> None:
        connection.sendall(b"g")
        receive_exactly(connection, np.empty(len(blob), dtype=np.uint8).data)

    return connection, {"raw_put": put, "raw_get": get}


def _grpc_actions(client: BlobStoreClient, blob: bytes) -> dict[str, Action]:
    async def put() -> None:
        await client.put(plain_key(), blob)

    async def put_verified() -> None:
        await client.put(verified_key(), blob)

    async def get() -> None:
        await client.get(plain_key(), verify=False)

    async def get_verified() -> None:
        await client.get(plain_key(), verify=True)

    return {"put": put, "get": get, "put_verified": put_verified, "get_verified": get_verified}


async def _pair(
    stack: AsyncExitStack, blob: bytes, folder: Path | None, suffix: str
) -> dict[str, Action]:
    """A raw peer and one of ours, and what is done with them."""
    raw, ours = (stack.enter_context(_peer(kind, len(blob), folder)) for kind in ("raw", "grpc"))
    connection, actions = _raw_actions(raw, blob, folder)
    stack.callback(connection.close)
    client = BlobStoreClient(ours, credentials=bench_credentials(folder))
    await stack.enter_async_context(client)
    actions |= _grpc_actions(client, blob)
    return {f"{name}{suffix}": act for name, act in actions.items()}


async def measure(
    size: int = 16 * MIB,
    rounds: int = 21,
    on_round: Callable[[int], None] | None = None,
    tls: bool = False,
) -> Mapping[str, object]:
    """Run every action in turn, ``rounds`` times, and compare medians.

    Args:
        tls: measure all with TLS (certificates on both sides) as well.
    Returns: ``put_ratio`` and the like, the share of the raw socket's rate; rates in
        bytes/s; the blob's size in bytes. With ``tls`` also ``put_tls_ratio``, against the
        raw socket without TLS, and ``put_tls_vs_raw_tls_ratio``, against one with TLS.
    """
    blob = bench_blob(size)
    warm = max(2, rounds // 10)
    seconds: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        actions = await _pair(stack, blob, None, "")
        if tls:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvferry-")))
            folder = (await asyncio.to_thread(Authority.create, root / "ca")).issue("bench")
            actions |= await _pair(stack, blob, folder, "_tls")
        for number in range(rounds + warm):
            for name, act in actions.items():
                start = time.perf_counter()
                await act()
                if number >= warm:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
            if on_round is not None:
                on_round(number + 1)
            await asyncio.sleep(0)
    rates = {name: len(blob) / statistics.median(took) for name, took in seconds.items()}
    result: dict[str, object] = {"blob_bytes": len(blob), "rounds": rounds}
    for name in ("put", "get", "put_verified", "get_verified"):
        raw = "raw_" + name.removesuffix("_verified")
        result[f"{name}_ratio"] = round(rates[name] / rates[raw], 3)
        if tls:
            rate = rates[f"{name}_tls"]
            result[f"{name}_tls_ratio"] = round(rate / rates[raw], 3)
            result[f"{name}_tls_vs_raw_tls_ratio"] = round(rate / rates[f"{raw}_tls"], 3)
    return result | {f"{name}_bytes_per_s": round(rate) for name, rate in rates.items()}
