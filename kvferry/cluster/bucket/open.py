"""From ``s3://...`` and a store's limits to a store."""

from kvferry.cluster.bucket.claim import Turn
from kvferry.cluster.bucket.limits import BucketLimits
from kvferry.cluster.bucket.objects import Bucket
from kvferry.cluster.bucket.store import BucketStore
from kvferry.cluster.bucket.url import parse_bucket_url
from kvferry.cluster.space import StoreLimits


def is_bucket(url: str) -> bool:
    """Whether `open_bucket` is for it."""
    return url.startswith("s3:")


async def open_bucket(url: str, limits: StoreLimits, turn: Turn | None = None) -> BucketStore:
    """A store over a bucket, which other servers may have open too.

    ``turn``: which of them sweeps; without one that is settled in the bucket.
    Raises: ConfigError: no such bucket, not to be read or written, or obstore is missing.
    """
    bounds = BucketLimits(
        budget_bytes=limits.budget_bytes,
        max_blob_bytes=limits.max_blob_bytes,
        staged_ttl_s=limits.staged_ttl_s,
        max_age_s=limits.max_age_s,
        sweep_s=limits.sweep_s,
    )
    return await BucketStore.open(Bucket.open(parse_bucket_url(url)), bounds, turn=turn)
