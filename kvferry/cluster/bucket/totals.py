"""How much a bucket holds: counted by whoever sweeps, and by each server since then."""

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import TOTALS, parse_blob_path
from kvferry.cluster.bucket.objects import Bucket
from kvferry.errors import InvalidKeyError
from kvferry.proto.v1 import bucket_pb2

# A bucket of fewer blobs is counted whenever somebody asks.
SMALL = 2000


@dataclass(slots=True)
class Totals:
    """Of what is committed. ``bytes``: of blobs."""

    blobs: int = 0
    bytes: int = 0
    complete_pages: int = 0
    quarantined: int = 0
    pinned: int = 0
    unix_s: float = 0.0


async def count(bucket: Bucket, pinned: int, now_s: float) -> Totals:
    """By listing everything: one request for a thousand objects."""
    totals = Totals(pinned=pinned, unix_s=now_s)
    async for batch in bucket.walk("blobs"):
        for entry in batch:
            try:
                _, ends = parse_blob_path(entry.path)
            except InvalidKeyError:
                continue
            if not 0 < ends <= now_s:
                totals.blobs += 1
                totals.bytes += entry.size
    async for batch in bucket.walk("pages"):
        totals.complete_pages += len(batch)
    async for batch in bucket.walk("quarantine"):
        totals.quarantined += len(batch)
    return totals


async def read_totals(bucket: Bucket) -> Totals:
    """What the last sweep counted; zeros where there was none."""
    try:
        found = bucket_pb2.SweepTotals.FromString(await bucket.get(TOTALS) or b"")
    except DecodeError:
        return Totals()
    return Totals(
        found.blobs,
        found.bytes,
        found.complete_pages,
        found.quarantined,
        found.pinned,
        found.unix_s,
    )


async def write_totals(bucket: Bucket, totals: Totals) -> None:
    """For other servers, and for the next start."""
    message = bucket_pb2.SweepTotals(
        blobs=totals.blobs,
        bytes=totals.bytes,
        complete_pages=totals.complete_pages,
        quarantined=totals.quarantined,
        pinned=totals.pinned,
        unix_s=totals.unix_s,
    )
    await bucket.put(TOTALS, message.SerializeToString())
