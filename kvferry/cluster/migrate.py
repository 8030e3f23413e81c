"""All blobs from one store to another, whatever stands behind either.

Resumable without a checkpoint: what the target has is asked in batches and skipped, which
costs little beside copying. The source verifies what it reads, the target what it is given;
nothing is visible there before that.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from kvferry.cluster.repository import BlobInfo, BlobRepository, ListQuery, PutSpec
from kvferry.errors import BlobNotFoundError, CodecError, StoreFullError

PARALLEL = 4
HAS_BATCH = 1000
_MAX_NAMED = 100

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which blobs. ``model``: hex digits that a model id begins with, "" for all."""

    model: str = ""

    def takes(self, info: BlobInfo) -> bool:
        """Whether a blob is one of them."""
        return info.model_id.hex().startswith(self.model)


@dataclass(slots=True)
class Survey:
    """What there is to do. Counts of blobs, and their bytes, by kind and in all."""

    kinds: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    missing_bytes: int = 0
    present: int = 0
    present_bytes: int = 0


@dataclass(slots=True)
class Moved:
    """What was done.

    Attributes:
        present: the target had them already.
        gone: they ended or were evicted at the source meanwhile.
        failed: key -> why it was not copied; at most some of them are named.
        failures: reason -> how many.
        stopped: somebody asked to stop before the end.
    """

    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    gone: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    stopped: bool = False


async def survey(
    source: BlobRepository,
    target: BlobRepository,
    wanted: Wanted,
    stopping: Callable[[], bool] = lambda: False,
) -> Survey:
    """Count what the target lacks; nothing is copied. ``stopping``: asked now and then."""
    found = Survey()
    async for infos, held in _asked(source, target, wanted):
        for info, there in zip(infos, held, strict=True):
            if there:
                found.present += 1
                found.present_bytes += info.size
            else:
                found.missing += 1
                found.missing_bytes += info.size
                found.kinds[info.key.kind] += 1
        if stopping():
            break
    return found


async def check_room(target: BlobRepository, need: int) -> None:
    """Refuse what would make the target evict. Raises: StoreFullError."""
    stat = await target.stat()
    if not stat.budget_bytes:
        return  # nobody knows
    free = max(0, stat.budget_bytes - stat.bytes)
    if stat.free_disk_bytes:
        free = min(free, stat.free_disk_bytes)
    if need > free:
        raise StoreFullError(stat.backend or "the target", need, free)


async def migrate(
    source: BlobRepository,
    target: BlobRepository,
    wanted: Wanted,
    *,
    parallel: int = PARALLEL,
    progress: Progress = lambda blobs, size: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Moved:
    """Copy what the target lacks.

    Args:
        parallel: blobs under way at a time.
        progress: told of blobs and bytes that are copied, found there, or given up, so far.
        stopping: asked before each blob; those under way are finished.
    Raises: FerryError: the source or the target does not answer, or the target is full.
        What was copied stays, and the same call goes on from there.
    """
    moved = Moved()
    done = Counter[str]()

    def tell(size: int) -> None:
        done.update(blobs=1, size=size)
        progress(done["blobs"], done["size"])

    async for infos, held in _asked(source, target, wanted):
        missing: list[BlobInfo] = []
        for info, there in zip(infos, held, strict=True):
            if there:
                moved.present += 1
                tell(info.size)
            else:
                missing.append(info)
        await _copy_all(source, target, missing, moved, parallel, tell, stopping)
        if stopping():
            moved.stopped = True
            break
    return moved


async def _copy_all(
    source: BlobRepository,
    target: BlobRepository,
    infos: Sequence[BlobInfo],
    moved: Moved,
    parallel: int,
    tell: Callable[[int], None],
    stopping: Callable[[], bool],
) -> None:
    queue = iter(infos)

    async def work() -> None:
        for info in queue:
            if stopping():
                return
            await _copy(source, target, info, moved)
            tell(info.size)

    workers = [asyncio.create_task(work()) for _ in range(min(parallel, len(infos)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _copy(
    source: BlobRepository, target: BlobRepository, info: BlobInfo, moved: Moved
) -> None:
    """One blob. Raises: FerryError for what is not about this blob alone."""
    ttl_s = 0
    if info.expires_unix_s:
        ttl_s = info.expires_unix_s - int(time.time())
        if ttl_s <= 0:
            moved.gone += 1
            return
    try:
        stored = await _send(source, target, info, ttl_s)
    except BlobNotFoundError:
        moved.gone += 1
    except CodecError as exc:
        moved.failures[exc.reason] += 1
        if len(moved.failed) < _MAX_NAMED:
            moved.failed[str(info.key)] = str(exc)
    else:
        moved.copied += stored
        moved.copied_bytes += info.size if stored else 0
        moved.present += not stored


async def _send(source: BlobRepository, target: BlobRepository, info: BlobInfo, ttl_s: int) -> bool:
    session = await source.open_get(info.key)
    try:
        put = await target.open_put(PutSpec(key=info.key, size=session.size, ttl_s=ttl_s))
        if put is None:
            return False
        try:
            async for chunk in session.chunks:
                await put.write(chunk)
            return await put.finish()
        except BaseException:
            await asyncio.shield(put.abort())
            raise
    finally:
        if isinstance(session.chunks, AsyncGenerator):
            await session.chunks.aclose()


async def _asked(
    source: BlobRepository, target: BlobRepository, wanted: Wanted
) -> AsyncIterator[tuple[Sequence[BlobInfo], Sequence[bool]]]:
    """Blobs of the source in batches, and which of them the target has."""
    async for listed in source.list(ListQuery()):
        infos = [info for info in listed if wanted.takes(info)]
        for at in range(0, len(infos), HAS_BATCH):
            batch = infos[at : at + HAS_BATCH]
            yield batch, await target.has([info.key for info in batch])
