"""Bounds of a bucket and of one server over it."""

from dataclasses import dataclass

from kvferry.proto.container import DEFAULT_LIMITS


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketLimits:
    """What an operator sets.

    Attributes:
        budget_bytes: of blobs in the bucket. Held by sweeps, so that between two of them
            it may be exceeded by what comes in.
        max_blob_bytes: of one blob.
        staged_ttl_s: a blob staged and not committed for so long is dropped.
        max_age_s: a page that nobody used for so long goes; 0: as long as there is room.
        fresh_s: a complete page that was seen is taken to be there for so long.
        in_flight_bytes: of puts at once in this server; more of them wait.
        sweep_s: between two sweeps; also how often uses are written.
    """

    budget_bytes: int
    max_blob_bytes: int = DEFAULT_LIMITS.max_blob
    staged_ttl_s: float = 600.0
    max_age_s: float = 0.0
    fresh_s: float = 30.0
    in_flight_bytes: int = 256 << 20
    sweep_s: float = 60.0
