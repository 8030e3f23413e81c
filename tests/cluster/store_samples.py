"""Small blobs of every kind, and stores and servers to put them in."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.backends import BlobBackend, FileBackend, MemoryBackend
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import BlobRepository, LookupQuery, PutSpec
from kvferry.cluster.server import start_server
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.proto import container
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import blob_pb2

MIB = 1 << 20
MODEL = blake3(b"model").digest()
ROOT = blake3(b"root").digest()


def digest(*parts: object) -> bytes:
    """32 bytes that depend on the parts."""
    return blake3(repr(parts).encode()).digest()


def chain(length: int, name: str = "chain") -> list[bytes]:
    """Page keys of a chain; the first one's previous key is `ROOT`."""
    return [digest(name, i) for i in range(length)]


def blob(
    page_key: bytes = digest("page"),
    *,
    previous: bytes = ROOT,
    kind: int = blob_pb2.BLOB_KIND_PAGE,
    layers: tuple[int, int] = (0, 4),
    heads: tuple[int, int] = (0, 2),
    model_layers: int = 4,
    model_heads: int = 2,
    tokens: tuple[int, int] = (0, 256),
    codec: str = "raw",
    payload: bytes = b"",
    size: int = 2000,
    model: bytes = MODEL,
    params: str = "{}",
    namespace: int = 0,
) -> tuple[BlobKey, bytes]:
    """A whole, valid blob of about ``size`` bytes of noise, and its key."""
    data = payload or os.urandom(size)
    header = blob_pb2.BlobHeader(
        kind=kind,
        model_id=model,
        page_key=page_key,
        previous_key=previous,
        token_start=tokens[0],
        token_end=tokens[1],
        layer_start=layers[0],
        layer_end=layers[1],
        head_start=heads[0],
        head_end=heads[1],
        model_layers=model_layers,
        model_heads=model_heads,
        codec=blob_pb2.CodecSpec(name=codec, version=1, params_json=params),
        namespace_tag=namespace,
    )
    raw = container.pack(header, [container.SectionData("k", data, len(data))])
    return container.key_of(container.read_header(raw)), raw


def pages(count: int, name: str = "chain", **fields: object) -> list[tuple[BlobKey, bytes]]:
    """One blob for each page of a chain."""
    keys = chain(count, name)
    before = [ROOT, *keys]
    return [
        blob(
            key,
            previous=before[i],
            tokens=(256 * i, 256 * (i + 1)),
            **fields,  # type: ignore[arg-type]
        )
        for i, key in enumerate(keys)
    ]


def tail(anchor: bytes, name: str, start: int = 0, **fields: object) -> tuple[BlobKey, bytes]:
    """A tail of 10 tokens after ``anchor``."""
    return blob(
        digest("tail", name),
        previous=anchor,
        kind=blob_pb2.BLOB_KIND_TAIL,
        tokens=(start, start + 10),
        **fields,  # type: ignore[arg-type]
    )


def state(
    anchor: bytes,
    name: str,
    end: int,
    layers: tuple[int, int] = (0, 3),
    part: int = 0,
    parts: int = 1,
) -> tuple[BlobKey, bytes]:
    """A state of a model with three state layers, after ``end`` tokens."""
    return blob(
        digest("state", name),
        previous=anchor,
        kind=blob_pb2.BLOB_KIND_STATE,
        layers=layers,
        heads=(part, part + 1),
        model_layers=3,
        model_heads=parts,
        tokens=(end - 10, end),
        codec="zstd",
    )


async def put(
    store: BlobRepository, key: BlobKey, data: bytes, chunk: int = MIB, **spec: object
) -> bool:
    """Put as the service does."""
    session = await store.open_put(PutSpec(key=key, size=len(data), **spec))  # type: ignore[arg-type]
    if session is None:
        return False
    try:
        for at in range(0, len(data), chunk):
            await session.write(data[at : at + chunk])
        return await session.finish()
    except BaseException:
        await session.abort()
        raise


async def get(store: BlobRepository, key: BlobKey, offset: int = 0, length: int = 0) -> bytes:
    """Read to the end of a range."""
    session = await store.open_get(key, offset, length)
    return b"".join([bytes(chunk) async for chunk in session.chunks])


def query(page_keys: Sequence[bytes], **fields: object) -> LookupQuery:
    """A lookup of a chain from `ROOT`."""
    return LookupQuery(root=ROOT, page_keys=page_keys, **fields)  # type: ignore[arg-type]


class Clock:
    """A clock that tests set."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def backend_at(kind: str, root: Path) -> BlobBackend:
    """An engine by name."""
    return MemoryBackend() if kind == "memory" else FileBackend(root)


@asynccontextmanager
async def local_store(
    backend: BlobBackend, *, clock: Clock | None = None, **limits: object
) -> AsyncIterator[LocalStore]:
    """A store that is closed at the end; budget 64 MiB unless told."""
    bounds = StoreLimits(**{"budget_bytes": 64 * MIB, **limits})  # type: ignore[arg-type]
    more = {"clock": clock} if clock is not None else {}
    store = await LocalStore.open(backend, bounds, **more)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.aclose()


@asynccontextmanager
async def served(
    repository: BlobRepository, address: str = "127.0.0.1:0", **options: object
) -> AsyncIterator[BlobStoreClient]:
    """A client of a real server over a real socket."""
    servicer = BlobStoreServicer(repository, **options)  # type: ignore[arg-type]
    server = await start_server([blob_store_service(servicer)], [address])
    try:
        async with BlobStoreClient(server.addresses[0], timeout_s=20.0) as client:
            yield client
    finally:
        await server.stop(0.2)


def disk_bytes(root: Path) -> int:
    """What a root takes on disk: allocated blocks of all files and folders."""
    blocks: dict[int, int] = {}  # by inode, as files may move while this looks
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, f) for f in files)):  # noqa: PTH118
            try:
                found = os.lstat(path)
            except FileNotFoundError:
                continue
            blocks[found.st_ino] = found.st_blocks
    return sum(blocks.values()) * 512


class Direct:
    """A repository with the client's ``put`` and ``get``, so that one test fits both."""

    def __init__(self, store: BlobRepository) -> None:
        self.store = store

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    async def put(self, key: BlobKey, data: bytes, **spec: object) -> bool:
        """As `BlobStoreClient.put`."""
        return await put(self.store, key, data, **spec)

    async def get(self, key: BlobKey, offset: int = 0, length: int = 0) -> bytes:
        """As `BlobStoreClient.get`."""
        return await get(self.store, key, offset, length)
