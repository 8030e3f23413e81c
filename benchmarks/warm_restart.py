"""A store of 100,000 pages started again: from its index, and from its files alone."""

import asyncio
import os
import tempfile
import time
from pathlib import Path

from blake3 import blake3

from benchmarks.record import write_result
from kvferry.cluster.backends import FileBackend
from kvferry.cluster.blob_name import blob_name
from kvferry.cluster.index_schema import remove_database
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.proto import container
from kvferry.proto.v1 import blob_pb2

COMMAND = "python -m benchmarks.warm_restart"
PAGES, CHAIN, GROUPS = 100_000, 100, 2
PAYLOAD = 600


def _blob(chain: int, page: int, group: int) -> bytes:
    def key(number: int) -> bytes:
        return blake3(f"{chain}/{number}".encode()).digest()

    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_PAGE,
        model_id=bytes(32),
        page_key=key(page),
        previous_key=key(page - 1) if page else bytes(32),
        token_start=256 * page,
        token_end=256 * (page + 1),
        layer_start=15 * group,
        layer_end=15 * group + 15,
        head_start=0,
        head_end=3,
        model_layers=15 * GROUPS,
        model_heads=3,
        codec=blob_pb2.CodecSpec(name="ferry", version=1, params_json='{"target_kl":0.005}'),
    )
    return container.pack(header, [container.SectionData("k", bytes(PAYLOAD), PAYLOAD)])


def _fill(root: Path, pages: int) -> None:
    """Files as the store writes them, without waiting for the disk each time."""
    backend = FileBackend(root)
    backend.open()
    for number in range(pages):
        for group in range(GROUPS):
            raw = _blob(*divmod(number, CHAIN), group)
            path = backend.path("blobs", blob_name(container.key_of(container.read_header(raw))))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
    backend.close()
    os.sync()


async def _opened(root: Path, pages: int) -> float:
    start = time.perf_counter()
    store = await LocalStore.open(FileBackend(root), StoreLimits(budget_bytes=1 << 40))
    took = time.perf_counter() - start
    found = (await store.stat()).pages_complete
    await store.aclose()
    if found != pages:
        raise RuntimeError(f"{found} of {pages} pages were found")
    return round(took, 2)


def measure(pages: int = PAGES) -> dict[str, object]:
    """Seconds until the store answers."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        _fill(root, pages)
        rebuilt = asyncio.run(_opened(root, pages))
        warm = asyncio.run(_opened(root, pages))
        remove_database(str(root / "index.sqlite"))
        again = asyncio.run(_opened(root, pages))
    return {
        "pages": pages,
        "blobs": pages * GROUPS,
        "warm_restart_s": warm,
        "rebuild_s": max(rebuilt, again),
    }


def main() -> None:
    """Measure and keep it."""
    print(write_result("warm_restart", COMMAND, measure()))


if __name__ == "__main__":
    main()
