"""Everything that a bucket holds, page by page: for listings and scrubs."""

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence

from kvferry.cluster.bucket.changes import Changes
from kvferry.cluster.bucket.get import damage
from kvferry.cluster.bucket.layout import UnitKey, anchored, parse_blob_path, parse_marker_path
from kvferry.cluster.bucket.marker import Part
from kvferry.cluster.bucket.objects import Listed
from kvferry.cluster.bucket.totals import count
from kvferry.cluster.repository import ListQuery, ScrubReport
from kvferry.errors import InvalidKeyError
from kvferry.proto.keys import BlobKey

KINDS = ("page", "tail", "state", "calibration")
ANCHORED = frozenset(("tail", "state"))
_PLAIN_ORDER = 200_000


def keys_in(listing: Iterable[Listed]) -> list[tuple[BlobKey, int]]:
    """(key, when it ends) of what lies in a folder of blobs; foreign objects are left out."""
    found: list[tuple[BlobKey, int]] = []
    for entry in listing:
        try:
            found.append(parse_blob_path(entry.path))
        except InvalidKeyError:
            continue
    return found


async def units_in_order(changes: Changes, query: ListQuery) -> AsyncIterator[UnitKey]:
    """Units of a listing: oldest use first, unless they are too many to be sorted here.

    What hangs on a page or root is found by its name where it is a whole tail or state; for
    pages all of them are looked at.
    """
    kinds: Sequence[str] = (query.kind,) if query.kind else KINDS
    if query.page_key:
        for kind in kinds:
            yield UnitKey(kind, query.page_key)
        return
    if query.previous_key:
        for kind in ANCHORED.intersection(kinds):
            for entry in await changes.bucket.names(anchored(kind, query.previous_key)):
                with contextlib.suppress(InvalidKeyError):
                    yield parse_marker_path(entry.path)[0]
        kinds = tuple(kind for kind in kinds if kind == "page")
    if not kinds:
        return
    known, _ = await changes.uses.merged()
    found: dict[UnitKey, int] = {}
    for kind in kinds:
        async for batch in changes.bucket.walk(f"blobs/{kind}"):
            for entry in batch:
                parts = entry.path.split("/")
                if len(parts) != 4 or len(parts[2]) != 64:
                    continue
                unit = UnitKey(kind, bytes.fromhex(parts[2]))
                found[unit] = known.get(unit, int(entry.modified_unix_s * 1e9))
        if len(found) > _PLAIN_ORDER:
            for unit in found:
                yield unit
            found = {}
    for unit in sorted(found, key=lambda u: (u.kind == "calibration", found[u])):
        yield unit


async def listing(changes: Changes, query: ListQuery) -> AsyncIterator[Sequence[Part]]:
    """Batches of blobs that have not ended."""
    now = changes.clock()
    async for unit in units_in_order(changes, query):
        parts = [part for part in await changes.units.load(unit) if part.live(now)]
        if query.model_id:
            parts = [part for part in parts if part.info.model_id == query.model_id]
        if parts:
            yield parts


async def scrub(changes: Changes, repair: bool) -> AsyncIterator[ScrubReport]:
    """Read every blob to its end and compare it with its digest."""
    total = (await count(changes.bucket, 0, changes.clock())).blobs
    done = 0
    async for parts in listing(changes, ListQuery()):
        findings: list[tuple[str, str]] = []
        expires: dict[str, int] = {}
        for part in parts:
            done += 1
            reason = await damage(changes.bucket, part.path)
            if reason:
                findings.append((str(part.info.key), reason))
                expires |= {str(part.info.key): part.ends} if part.ends else {}
                changes.counters["scrub_found"] += 1
                if repair:
                    await changes.set_aside(part.info.key, part.path, reason)
        read = sum(part.info.size for part in parts)
        yield ScrubReport(done, max(total, done), findings, bytes=read, expires=expires)
    if not done:
        yield ScrubReport(0, 0)
