"""``lookup_p99_ms``: the longest complete prefix among 100,000 pages, for 50 clients.

The store is a process of its own, as is whoever asks. Clients ask as nodes do: each at its
own moments, a few times a second (a lookup is made once a prompt). What the store can do at
most is measured too, with all clients asking again at once; its waiting time is then what a
queue of 50 makes of it, and says nothing else.
"""

import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

import psutil

from kvferry.cli.cluster_bench.big_index import CHAIN, PAGES, ROOT, page_key
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import LookupQuery
from kvferry.errors import StoreUnavailableError

CLIENTS = 50
PAGES_ASKED = 8
RATE_PER_CLIENT = 2.0
SECONDS = 15.0


@contextmanager
def _store() -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "kvferry.cli.cluster_bench.big_index"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [*command, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        address = process.stdout.readline().strip() if process.stdout else ""
        if not address:
            raise StoreUnavailableError("store of the benchmark", "it did not start")
        try:
            yield address, psutil.Process(process.pid)
        finally:
            process.communicate("")


def _query(chance: random.Random) -> LookupQuery:
    chain = chance.randrange(PAGES // CHAIN)
    return LookupQuery(root=ROOT, page_keys=[page_key(chain, i) for i in range(PAGES_ASKED)])


async def _ask(client: BlobStoreClient, query: LookupQuery) -> float:
    start = time.perf_counter()
    found = await client.lookup(query)
    took = time.perf_counter() - start
    if found.complete_pages != PAGES_ASKED:
        raise StoreUnavailableError(client.address, "a lookup found too little")
    return took * 1000


async def _paced(client: BlobStoreClient, number: int, rate: float, end: float) -> list[float]:
    chance = random.Random(number)  # noqa: S311 - moments and chains
    took: list[float] = []
    while True:
        query = _query(chance)
        await asyncio.sleep(chance.expovariate(rate))
        if time.perf_counter() >= end:
            return took
        took.append(await _ask(client, query))


async def _flat_out(client: BlobStoreClient, number: int, end: float) -> list[float]:
    chance = random.Random(number)  # noqa: S311
    took: list[float] = []
    while time.perf_counter() < end:
        took.append(await _ask(client, _query(chance)))
    return took


def _quantile(took: list[float], share: float) -> float:
    return round(sorted(took)[min(len(took) - 1, int(len(took) * share))], 2)


async def _measure(seconds: float, rate: float, clients: int) -> dict[str, float]:
    with _store() as (address, server):
        async with AsyncExitStack() as stack:
            asking = [
                await stack.enter_async_context(BlobStoreClient(address)) for _ in range(clients)
            ]
            await asyncio.gather(*(_ask(c, _query(random.Random(0))) for c in asking))  # noqa: S311
            end = time.perf_counter() + seconds
            paced = await asyncio.gather(*(_paced(c, i, rate, end) for i, c in enumerate(asking)))
            began, spent = time.perf_counter(), sum(server.cpu_times()[:2])
            end = began + seconds / 3
            flat = await asyncio.gather(*(_flat_out(c, i, end) for i, c in enumerate(asking)))
            flat_s = time.perf_counter() - began
            spent = sum(server.cpu_times()[:2]) - spent
    took, full = [t for part in paced for t in part], [t for part in flat for t in part]
    return {
        "lookup_p99_ms": _quantile(took, 0.99),
        "lookup_p50_ms": round(statistics.median(took), 2),
        "lookup_clients": clients,
        "lookup_pages": PAGES,
        "lookup_asked_per_s": round(len(took) / seconds, 1),
        "lookup_most_per_s": round(len(full) / flat_s, 1),
        "lookup_server_cpu_ms": round(1000 * spent / len(full), 3),
        "lookup_queued_p99_ms": _quantile(full, 0.99),
    }


def measure(
    seconds: float = SECONDS, rate: float = RATE_PER_CLIENT, clients: int = CLIENTS
) -> dict[str, float]:
    """``rate``: lookups a second of each client. Times in ms; see the module."""
    return asyncio.run(_measure(seconds, rate, clients))
