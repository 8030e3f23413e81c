"""Lookup of the longest complete prefix in an index of 100,000 pages."""

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from blake3 import blake3

from benchmarks.record import write_result
from kvferry.cluster.backends import FileBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.index import Index
from kvferry.cluster.index_units import Record
from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery
from kvferry.cluster.server import start_server
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.cluster.store_core import StoreCore
from kvferry.proto.keys import BlobKey, codec_id

COMMAND = "python -m benchmarks.lookup"
PAGES, CHAIN, GROUPS = 100_000, 100, 2
LOOKUPS = 2000
ROOT, MODEL = bytes(32), bytes(32)
CODEC = CodecInfo(name="ferry", version=1, params_json='{"target_kl":0.005}')


def _key(chain: int, page: int) -> bytes:
    return blake3(f"{chain}/{page}".encode()).digest()


def _records(chain: int) -> list[Record]:
    records = []
    coded = codec_id(CODEC.name, CODEC.version, {"target_kl": 0.005})
    for page in range(CHAIN):
        for group in range(GROUPS):
            layers = (15 * group, 15 * group + 15)
            info = BlobInfo(
                key=BlobKey("page", _key(chain, page), layers, (0, 3), coded),
                size=150_000,
                codec=CODEC,
                model_id=MODEL,
                previous_key=_key(chain, page - 1) if page else ROOT,
                tokens=(256 * page, 256 * page + 256),
                layers=layers,
                heads=(0, 3),
                model_layers=15 * GROUPS,
                model_heads=3,
            )
            records.append(Record(info=info, charged=151_552))
    return records


class _IndexOnly(StoreCore):
    """A store whose 100,000 pages have no files: lookups read the index alone."""

    def open(self) -> None:
        self.backend.open()
        index = Index(self.backend.index_path)
        for chain in range(PAGES // CHAIN):
            index.insert(_records(chain), time.time())
        self.index._index = index


async def _timed(look: Callable[[LookupQuery], Awaitable[object]], pages: int) -> dict[str, float]:
    chance = random.Random(1)
    took = []
    for _ in range(LOOKUPS):
        chain = chance.randrange(PAGES // CHAIN)
        query = LookupQuery(root=ROOT, page_keys=[_key(chain, i) for i in range(pages)])
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
        limits = StoreLimits(budget_bytes=1 << 40)
        store = LocalStore(_IndexOnly(FileBackend(Path(folder)), limits), "store")
        await asyncio.to_thread(store._core.open)
        server = await start_server([blob_store_service(BlobStoreServicer(store))], ["127.0.0.1:0"])
        async with BlobStoreClient(server.addresses[0]) as client:
            for pages in (8, CHAIN):
                figures[f"store_{pages}_pages"] = await _timed(store.lookup, pages)
                figures[f"grpc_{pages}_pages"] = await _timed(client.lookup, pages)
        await server.stop(1)
        await store.aclose()
    return figures


def main() -> None:
    """Measure and keep it."""
    print(write_result("lookup", COMMAND, asyncio.run(measure())))


if __name__ == "__main__":
    main()
