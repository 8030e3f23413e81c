"""One store server over a bucket against three: small blobs, put and got by many at once.

Servers, clients and the bucket's own server share this machine. Three servers can give more
than one only as far as a core is idle with one; so what the processors did meanwhile is
measured as well, and what they would allow: a machine's worth of processor time, divided by
what an operation takes of it in all parts together.
"""

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path

import psutil

from kvferry.cluster.bench_peer import bench_blob
from kvferry.cluster.client import BlobStoreClient
from kvferry.errors import ConfigError, StoreUnavailableError
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

BLOB_BYTES = 8 * 1024
CLIENTS = 24
SECONDS = 8.0
SERVERS = 3
# What keeps the machine busy enough that more servers have nothing to run on.
BOUND = 0.9


def _blob(number: int) -> tuple[BlobKey, bytes]:
    key = uuid.uuid4().bytes * 2
    noise = bench_blob(BLOB_BYTES)[-BLOB_BYTES + 512 :]
    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_PAGE,
        model_id=bytes(32),
        page_key=key,
        previous_key=bytes(32),
        token_start=0,
        token_end=256,
        layer_start=0,
        layer_end=1,
        head_start=0,
        head_end=1,
        model_layers=1,
        model_heads=1,
        codec=blob_pb2.CodecSpec(name="raw", version=1, params_json="{}"),
    )
    raw = container.pack(header, [container.SectionData("k", noise, len(noise))])
    return container.key_of(container.read_header(raw)), raw


@contextmanager
def _server(url: str, folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    ready = folder / f"{uuid.uuid4().hex}.json"
    command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "", "--backend", url, "--ready-file", str(ready)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 60
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > end:
                    said = (folder / "log").read_text()[-500:]
                    raise StoreUnavailableError("store server", said)
                time.sleep(0.05)
            yield json.loads(ready.read_text())["address"], psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _busy(processes: Sequence[psutil.Process]) -> float:
    """Processor seconds so far."""
    return sum(sum(p.cpu_times()[:2]) for p in processes)


async def _for_a_while(
    clients: Sequence[BlobStoreClient], seconds: float
) -> tuple[list[BlobKey], float, int, float]:
    """Put for a while, then get what was put: (keys, puts/s, gets, gets/s)."""
    keys: list[BlobKey] = []

    async def put(client: BlobStoreClient, end: float) -> None:
        while time.perf_counter() < end:
            key, data = await asyncio.to_thread(_blob, 0)
            await client.put(key, data)
            keys.append(key)

    async def get(client: BlobStoreClient, number: int, end: float) -> int:
        done = 0
        while time.perf_counter() < end:
            await client.get(keys[(number * 7919 + done) % len(keys)])
            done += 1
        return done

    began = time.perf_counter()
    await asyncio.gather(*(put(c, began + seconds) for c in clients))
    puts_per_s = len(keys) / (time.perf_counter() - began)
    began = time.perf_counter()
    gets = await asyncio.gather(*(get(c, i, began + seconds) for i, c in enumerate(clients)))
    return keys, puts_per_s, sum(gets), sum(gets) / (time.perf_counter() - began)


async def _with_servers(url: str, count: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        started = [running.enter_context(_server(url, Path(folder))) for _ in range(count)]
        servers = [process for _, process in started]
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(BlobStoreClient(started[i % count][0]))
                for i in range(CLIENTS)
            ]
            idle_before = psutil.cpu_times()
            servers_before, own_before = _busy(servers), _busy([psutil.Process()])
            began = time.perf_counter()
            keys, puts_per_s, gets, gets_per_s = await _for_a_while(clients, seconds)
            wall = time.perf_counter() - began
            servers_s = _busy(servers) - servers_before
            own_s = _busy([psutil.Process()]) - own_before
            idle = psutil.cpu_times().idle - idle_before.idle
    cores = os.cpu_count() or 1
    return {
        "puts_per_s": puts_per_s,
        "gets_per_s": gets_per_s,
        "per_s": (len(keys) + gets) / wall,
        "busy": 1 - idle / (wall * cores),
        "servers_ms": 1000 * servers_s / (len(keys) + gets),
        "clients_ms": 1000 * own_s / (len(keys) + gets),
    }


@contextmanager
def _any_bucket() -> Iterator[str]:
    """moto's server, where it is installed: a bucket in the memory of a process."""
    if importlib.util.find_spec("moto") is None:
        raise ConfigError("url", "", "s3://BUCKET?endpoint=URL, or install moto[s3] for a try")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    try:
        _create(f"{endpoint}/kvferry-bench")
        yield f"s3://kvferry-bench/{uuid.uuid4().hex}?endpoint={endpoint}"
    finally:
        os.environ.clear()
        os.environ |= kept
        process.terminate()
        process.wait(30)


def _create(bucket: str) -> None:
    """Make a bucket of a server that asks for no keys, once it is up."""
    end = time.monotonic() + 60
    while True:
        try:
            request = urllib.request.Request(bucket, method="PUT")  # noqa: S310 - loopback
            urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def measure(url: str = "", seconds: float = SECONDS) -> dict[str, object]:
    """Throughput with one server and with three, and what the processors did.

    Args:
        url: a backend, s3://BUCKET/PREFIX?endpoint=URL; "": one in memory.
        seconds: of puts, and again of gets, for each number of servers.
    Raises: ConfigError: no bucket to be had.
    """
    with ExitStack() as stack:
        where = url or stack.enter_context(_any_bucket())
        one = asyncio.run(_with_servers(where, 1, seconds))
        many = asyncio.run(_with_servers(where, SERVERS, seconds))
    return {
        "store_scaling": round(many["per_s"] / one["per_s"], 2),
        "store_put_scaling": round(many["puts_per_s"] / one["puts_per_s"], 2),
        "store_get_scaling": round(many["gets_per_s"] / one["gets_per_s"], 2),
        "store_cpu_bound": one["busy"] >= BOUND or many["busy"] >= BOUND,
        **{f"one_{name}": round(value, 2) for name, value in one.items()},
        **{f"three_{name}": round(value, 2) for name, value in many.items()},
    }
