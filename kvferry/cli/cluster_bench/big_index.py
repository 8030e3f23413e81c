"""A store whose index has 100,000 pages, for lookups: ``python -m ... FOLDER`` serves it.

The pages have no files, so that what is measured is the index, the service and the wire.
Prints its address, and serves until its standard input ends.
"""

import asyncio
import sys
import time
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.allocator import tune_allocator
from kvferry.cluster.backends import FileBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.index import Index
from kvferry.cluster.index_units import Record
from kvferry.cluster.repository import BlobInfo, CodecInfo
from kvferry.cluster.server import start_server
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.cluster.store_core import StoreCore
from kvferry.proto.keys import BlobKey, codec_id

PAGES, CHAIN, GROUPS = 100_000, 100, 2
ROOT, MODEL = bytes(32), bytes(32)
CODEC = CodecInfo(name="ferry", version=1, params_json='{"target_kl":0.005}')


def page_key(chain: int, page: int) -> bytes:
    """Key of a page of one of the chains."""
    return blake3(f"{chain}/{page}".encode()).digest()


def _records(chain: int) -> list[Record]:
    records = []
    coded = codec_id(CODEC.name, CODEC.version, {"target_kl": 0.005})
    for page in range(CHAIN):
        for group in range(GROUPS):
            layers = (15 * group, 15 * group + 15)
            info = BlobInfo(
                key=BlobKey("page", page_key(chain, page), layers, (0, 3), coded),
                size=150_000,
                codec=CODEC,
                model_id=MODEL,
                previous_key=page_key(chain, page - 1) if page else ROOT,
                tokens=(256 * page, 256 * page + 256),
                layers=layers,
                heads=(0, 3),
                model_layers=15 * GROUPS,
                model_heads=3,
            )
            records.append(Record(info=info, charged=151_552))
    return records


class _IndexOnly(StoreCore):
    def open(self) -> None:
        self.backend.open()
        index = Index(self.backend.index_path)
        for chain in range(PAGES // CHAIN):
            index.insert(_records(chain), time.time())
        self.index._index = index


def open_big_store(folder: Path) -> LocalStore:
    """Blocks for some seconds."""
    core = _IndexOnly(FileBackend(folder), StoreLimits(budget_bytes=1 << 40))
    core.open()
    return LocalStore(core, "store")


async def _serve(folder: Path) -> None:
    store = open_big_store(folder)
    servicer = BlobStoreServicer(store)
    server = await start_server([blob_store_service(servicer)], ["127.0.0.1:0"])
    sys.stdout.write(f"{server.addresses[0]}\n")
    sys.stdout.flush()
    upkeep = asyncio.create_task(store.run_maintenance())
    await asyncio.to_thread(sys.stdin.read)
    upkeep.cancel()
    await server.stop(0.2)
    await store.aclose()


if __name__ == "__main__":
    tune_allocator()
    asyncio.run(_serve(Path(sys.argv[1])))
