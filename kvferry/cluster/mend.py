"""Whole copies of damaged blobs, from whoever has one."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Protocol

from kvferry.cluster.checked import checked_info
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import BlobRepository, PutSpec, ScrubReport
from kvferry.errors import BlobNotFoundError, FerryError
from kvferry.proto.keys import BlobKey

log = logging.getLogger(__name__)

REPLICA_TIMEOUT_S = 20.0


class Replica(Protocol):
    """Somebody else who may hold the same blobs."""

    @property
    def name(self) -> str:
        """For people."""

    async def fetch(self, key: BlobKey) -> bytes | memoryview:
        """A blob as it lies there. Raises: FerryError."""


class RemoteReplica:
    """Another store, or a node's daemon. Asked for what it holds itself."""

    def __init__(self, client: BlobStoreClient) -> None:
        self.name = client.address
        self._client = client

    async def fetch(self, key: BlobKey) -> memoryview:
        """Raises: as `BlobStoreClient.get`."""
        return await self._client.get(key, local_only=True, timeout_s=REPLICA_TIMEOUT_S)


async def mend(
    repository: BlobRepository, key: BlobKey, expires_unix_s: int, replicas: Sequence[Replica]
) -> str:
    """Put a whole copy where a damaged one was set aside.

    Args:
        expires_unix_s: when the damaged one would have ended; 0: never.
    Returns: who gave it; "" where nobody had one, or it could not be put.
    """
    ttl_s = max(1, expires_unix_s - int(time.time())) if expires_unix_s else 0
    for replica in replicas:
        try:
            data = await replica.fetch(key)
            await asyncio.to_thread(checked_info, key, data)
            await put_whole(repository, PutSpec(key=key, size=len(data), ttl_s=ttl_s), data)
        except BlobNotFoundError:
            continue
        except FerryError as exc:
            log.info("%s is not mended from %s: %s", key, replica.name, exc)
            continue
        log.info("%s is mended from %s", key, replica.name)
        return replica.name
    return ""


async def put_whole(repository: BlobRepository, spec: PutSpec, data: bytes | memoryview) -> bool:
    """Put bytes at hand. False: the key was there already. Raises: as `PutSession`."""
    session = await repository.open_put(spec)
    if session is None:
        return False
    try:
        await session.write(data)
        return await session.finish()
    except BaseException:
        await asyncio.shield(session.abort())
        raise


async def scrub_and_mend(
    repository: BlobRepository, repair: bool, replicas: Sequence[Replica]
) -> AsyncIterator[ScrubReport]:
    """A scrub that, with ``repair``, also brings whole copies of what it has set aside."""
    async for report in repository.scrub(repair):
        if not (repair and replicas and report.findings):
            yield report
            continue
        mended = dict(report.mended)
        for text, _ in report.findings:
            ends = report.expires.get(text, 0)
            giver = await mend(repository, BlobKey.parse(text), ends, replicas)
            if giver:
                mended[text] = giver
        yield replace(report, mended=mended)
