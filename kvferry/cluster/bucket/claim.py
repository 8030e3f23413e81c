"""Who of several servers sweeps: a claim in the bucket, without conditional writes.

A claim that has run out is written over, left to settle, and read again: who then finds its
own name in it has it. Two that do so at once both read the later one's name, unless one is
slower than the pause; then both sweep, which costs double work and nothing else, since what
they delete is judged by the same rules, and deleting twice is deleting.
"""

import asyncio
import secrets
from collections.abc import Callable
from typing import Protocol

from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import CLAIM
from kvferry.cluster.bucket.objects import Bucket
from kvferry.proto.v1 import bucket_pb2

SETTLE_S = 1.0


class Turn(Protocol):
    """Whether this server is the one that sweeps. An election through etcd is another."""

    async def mine(self) -> bool:
        """Ask, and try to get it. Raises: StoreUnavailableError."""

    async def give_up(self) -> None:
        """Let another have it at once."""


class BucketClaim:
    """`Turn` by an object of the bucket."""

    def __init__(
        self,
        bucket: Bucket,
        clock: Callable[[], float],
        *,
        ttl_s: float = 120.0,
        settle_s: float = SETTLE_S,
    ) -> None:
        """``ttl_s``: after so long without a sweep another server takes over."""
        self._bucket, self._clock = bucket, clock
        self._ttl_s, self._settle_s = ttl_s, settle_s
        self.owner = secrets.token_hex(8)

    async def _read(self) -> bucket_pb2.SweepClaim:
        try:
            return bucket_pb2.SweepClaim.FromString(await self._bucket.get(CLAIM) or b"")
        except DecodeError:
            return bucket_pb2.SweepClaim()

    async def mine(self) -> bool:
        """See `Turn`."""
        found = await self._read()
        now = self._clock()
        # A clock that is far ahead must not keep everybody from it for ever.
        if found.owner != self.owner and now < found.until_unix_s <= now + 2 * self._ttl_s:
            return False
        claim = bucket_pb2.SweepClaim(owner=self.owner, until_unix_s=now + self._ttl_s)
        await self._bucket.put(CLAIM, claim.SerializeToString())
        if found.owner == self.owner:
            return True
        await asyncio.sleep(self._settle_s)
        return (await self._read()).owner == self.owner

    async def give_up(self) -> None:
        """See `Turn`."""
        if (await self._read()).owner == self.owner:
            await self._bucket.delete([CLAIM])
