"""Lookup of the longest complete prefix in an index of 100,000 pages."""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.record import write_result
from kvferry.cli.cluster_bench.big_index import CHAIN, GROUPS, PAGES, ROOT, open_big_store, page_key
from kvferry.cli.cluster_bench.lookup import measure as measure_clients
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import LookupQuery
from kvferry.cluster.server import start_server

COMMAND = "python -m benchmarks.lookup"
LOOKUPS = 2000


async def _timed(look: Callable[[LookupQuery], Awaitable[object]], pages: int) -> dict[str, float]:
    chance = random.Random(1)
    took = []
    for _ in range(LOOKUPS):
        chain = chance.randrange(PAGES // CHAIN)
        query = LookupQuery(root=ROOT, page_keys=[page_key(chain, i) for i in range(pages)])
        start = time.perf_counter()
        await look(query)
        took.append((time.perf_counter() - start) * 1000)
    took.sort()
    return {
        "p50_ms": round(statistics.median(took), 3),
        "p99_ms": round(took[LOOKUPS * 99 // 100], 3),
    }


async def measure() -> dict[str, object]:
    """In the store, and asked over loopback, for prefixes of 8 and of 100 pages."""
    figures: dict[str, object] = {"pages": PAGES, "blobs": PAGES * GROUPS, "lookups": LOOKUPS}
    with tempfile.TemporaryDirectory() as folder:
        store = await asyncio.to_thread(open_big_store, Path(folder))
        server = await start_server([blob_store_service(BlobStoreServicer(store))], ["127.0.0.1:0"])
        async with BlobStoreClient(server.addresses[0]) as client:
            for pages in (8, CHAIN):
                figures[f"store_{pages}_pages"] = await _timed(store.lookup, pages)
                figures[f"grpc_{pages}_pages"] = await _timed(client.lookup, pages)
        await server.stop(1)
        await store.aclose()
    return figures


def main() -> None:
    """Measure and keep it: one client in one process with the store, then fifty."""
    print(write_result("lookup", COMMAND, asyncio.run(measure()) | measure_clients()))


if __name__ == "__main__":
    main()
