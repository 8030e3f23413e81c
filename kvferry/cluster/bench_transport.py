"""How fast blobs travel between two processes, next to a raw blocking socket."""

import asyncio
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from kvferry.cluster.bench_peer import bench_blob, plain_key, receive_exactly, verified_key
from kvferry.cluster.client import BlobStoreClient
from kvferry.errors import StoreUnavailableError

MIB = 1 << 20

Action = Callable[[], Awaitable[None]]


@contextmanager
def _peer(kind: str, size: int) -> Iterator[str]:
    """Another process that serves; ends with its standard input."""
    command = [sys.executable, "-m", "kvferry.cluster.bench_peer", kind, str(size)]
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


def _raw_actions(address: str, blob: bytes) -> tuple[socket.socket, dict[str, Action]]:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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


async def measure(
    size: int = 16 * MIB,
    rounds: int = 21,
    on_round: Callable[[int], None] | None = None,
) -> Mapping[str, object]:
    """Run every action in turn, ``rounds`` times, and compare medians.

    Returns: ``put_ratio`` and the like, the share of the raw socket's rate; rates in
    bytes/s; the blob's size in bytes.
    """
    blob = bench_blob(size)
    warm = max(2, rounds // 10)
    seconds: dict[str, list[float]] = {}
    with _peer("raw", size) as raw, _peer("grpc", size) as grpc_address:
        connection, actions = _raw_actions(raw, blob)
        async with BlobStoreClient(grpc_address) as client:
            actions |= _grpc_actions(client, blob)
            for number in range(rounds + warm):
                for name, act in actions.items():
                    start = time.perf_counter()
                    await act()
                    if number >= warm:
                        seconds.setdefault(name, []).append(time.perf_counter() - start)
                if on_round is not None:
                    on_round(number + 1)
                await asyncio.sleep(0)
        connection.close()
    rates = {name: len(blob) / statistics.median(took) for name, took in seconds.items()}
    result: dict[str, object] = {"blob_bytes": len(blob), "rounds": rounds}
    for name in ("put", "get", "put_verified", "get_verified"):
        base = rates["raw_" + name.removesuffix("_verified")]
        result[f"{name}_ratio"] = round(rates[name] / base, 3)
    return result | {f"{name}_bytes_per_s": round(rate) for name, rate in rates.items()}
