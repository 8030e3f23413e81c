"""An office in etcd for what is asked only now and then: is it my turn?"""

import asyncio
import contextlib

from kvferry.cluster.election.election import Election
from kvferry.cluster.etcd.access import EtcdAccess
from kvferry.cluster.etcd.client import EtcdClient
from kvferry.settings import EtcdSettings

PATIENCE_S = 1.0


class ElectedTurn:
    """Whether this process holds an office; campaigns from the first question on.

    A `kvferry.cluster.bucket.claim.Turn`: of several store servers over one bucket one
    sweeps, and another one some seconds after it is gone. Belongs to one event loop.
    """

    def __init__(self, etcd: EtcdClient, election: Election) -> None:
        """``etcd``: closed by `give_up`."""
        self._etcd, self._election = etcd, election
        self._task: asyncio.Task[None] | None = None
        self._given_up = False

    @classmethod
    async def open(cls, settings: EtcdSettings, office: str, candidate: str) -> "ElectedTurn":
        """As the settings say; connects to nothing yet. Raises: ConfigError."""
        etcd = EtcdClient(await asyncio.to_thread(EtcdAccess.of, settings))
        prefix, ttl_s = settings.etcd_prefix, settings.lease_ttl_s
        return cls(etcd, Election(etcd, office, candidate, prefix=prefix, ttl_s=ttl_s))

    async def mine(self) -> bool:
        """Ask; where nobody holds it, wait a moment for winning it. False without etcd."""
        if self._given_up:
            return False
        if self._task is None:
            self._task = asyncio.create_task(self._election.run())
        if self._task.done():
            self._task.result()  # a bug: raises
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._election.won()
        return self._election.held

    async def give_up(self) -> None:
        """Let another have it at once, and ask no more. May be called twice."""
        self._given_up = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._etcd.aclose()
