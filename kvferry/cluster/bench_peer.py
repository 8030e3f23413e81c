"""The other side of ``kvferry bench transport``, in a process of its own.

``python -m kvferry.cluster.bench_peer grpc|raw BYTES [TLS_DIR]`` prints its address and serves
until it is killed or its standard input closes. Nothing is kept: puts go nowhere, gets come
from memory, so that the transport alone is measured.
"""

import asyncio
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from blake3 import blake3

from kvferry.cluster.allocator import tune_allocator
from kvferry.cluster.blob_service import BlobStoreServicer, blob_store_service
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.repository import GetSession, PutSession, PutSpec
from kvferry.cluster.server import start_server
from kvferry.cluster.tls import TlsFiles
from kvferry.errors import CorruptBlobError
from kvferry.proto import container
from kvferry.proto.keys import DIGEST_BYTES, BlobKey
from kvferry.proto.v1 import blob_pb2

_VERIFY_BYTES = 4 << 20


def bench_blob(size: int) -> bytes:
    """A valid blob of exactly ``size`` bytes (at least 1 KiB), not compressible."""
    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_CALIBRATION, model_id=bytes(32), page_key=bytes(32)
    )
    noise = blake3(b"kvferry bench").digest(length=size)
    length = size - 512
    for _ in range(4):  # the header's length depends on the payload's
        blob = container.pack(header, [container.SectionData("k", noise[:length], length)])
        length -= len(blob) - size
    return blob


def plain_key() -> BlobKey:
    """Put here: counted and dropped."""
    return BlobKey("calibration", b"p" * 32)


def verified_key() -> BlobKey:
    """Put here: the digest is checked, as a store does."""
    return BlobKey("calibration", b"v" * 32)


class _Sink:
    """Counts what comes; with ``verify`` it hashes in a thread while the next arrives."""

    def __init__(self, spec: PutSpec, verify: bool) -> None:
        self._size, self._verify = spec.size, verify
        self._received = 0
        self._waiting: list[bytes | memoryview] = []
        self._waiting_bytes = 0
        self._hasher, self._digest = blake3(), b""
        self._hashed = 0
        self._job: asyncio.Future[None] | None = None

    async def write(self, chunk: bytes | memoryview) -> None:
        self._received += len(chunk)
        if self._verify:
            self._waiting.append(chunk)
            self._waiting_bytes += len(chunk)
            if self._waiting_bytes >= _VERIFY_BYTES:
                await self._hash_waiting()

    async def _hash_waiting(self) -> None:
        if self._job is not None:
            await self._job
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._job = asyncio.get_running_loop().run_in_executor(None, self._hash, waiting)

    def _hash(self, chunks: Sequence[bytes | memoryview]) -> None:
        for chunk in chunks:
            data = memoryview(chunk)
            count = max(0, min(len(data), self._size - DIGEST_BYTES - self._hashed))
            self._hasher.update(data[:count])
            self._digest += bytes(data[count:])
            self._hashed += len(data)

    async def finish(self) -> bool:
        if self._verify:
            await self._hash_waiting()
            if self._job is not None:
                await self._job
            if self._hasher.digest() != self._digest:
                raise CorruptBlobError("digest", "differs")
        return self._received == self._size

    async def abort(self) -> None:
        return


class _MemoryPeer:
    """As much of a `BlobRepository` as a transfer needs."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    async def open_put(self, spec: PutSpec) -> PutSession:
        return _Sink(spec, spec.key == verified_key())

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        async def chunks() -> AsyncIterator[bytes]:
            yield self._blob

        return GetSession(len(self._blob), "memory", chunks())


def bench_credentials(folder: Path | None) -> Credentials:
    """TLS of a folder as `kvferry certs issue` makes it, without tokens; None: plaintext."""
    if folder is None:
        return PLAINTEXT
    files = TlsFiles.of_folder(folder)
    return Credentials(tls=files, pem=files.read())


def bench_context(folder: Path, server: bool) -> ssl.SSLContext:
    """The same for a raw socket: TLS 1.3, certificates asked for on both sides."""
    files = TlsFiles.of_folder(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(files.cert, files.key)
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _serve_grpc(blob: bytes, folder: Path | None) -> None:
    servicer = BlobStoreServicer(_MemoryPeer(blob))  # type: ignore[arg-type]
    server = await start_server(
        [blob_store_service(servicer)], ["127.0.0.1:0"], credentials=bench_credentials(folder)
    )
    sys.stdout.write(server.addresses[0] + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(0.1)


def _serve_raw(blob: bytes, folder: Path | None) -> None:
    """One connection: "p" and a blob, answered by a byte; "g", answered by a blob."""
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"127.0.0.1:{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if folder is not None:
        connection = bench_context(folder, True).wrap_socket(connection, server_side=True)
    buffer = memoryview(bytearray(len(blob)))
    while order := connection.recv(1):
        if order == b"p":
            receive_exactly(connection, buffer)
            connection.sendall(b"k")
        else:
            connection.sendall(blob)


def receive_exactly(connection: socket.socket, buffer: memoryview) -> None:
    """Fill ``buffer``. Raises: ConnectionError."""
    at = 0
    while at < len(buffer):
        got = connection.recv_into(buffer[at:])
        if not got:
            raise ConnectionError("the other side went away")
        at += got


def main() -> None:
    """See the module."""
    kind, size = sys.argv[1], int(sys.argv[2])
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    tune_allocator()
    blob = bench_blob(size)
    if kind == "raw":
        threading.Thread(target=_serve_raw, args=(blob, folder), daemon=True).start()
        sys.stdin.read()
    else:
        asyncio.run(_serve_grpc(blob, folder))


if __name__ == "__main__":
    main()
