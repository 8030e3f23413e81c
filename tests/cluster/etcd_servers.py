"""Real etcd members for tests, from Debian's package."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from debian_server import program

from kvferry.cli.cluster_bench.etcd_members import EtcdMembers
from kvferry.cluster.etcd.access import EtcdAccess, parse_endpoints
from kvferry.cluster.etcd.client import EtcdClient


class EtcdCluster(EtcdMembers):
    """Three members, and clients of them."""

    def client(self, *, timeout_s: float = 5.0) -> EtcdClient:
        """One of all members, for the running loop."""
        access = EtcdAccess(endpoints=parse_endpoints(self.endpoints))
        return EtcdClient(access, timeout_s=timeout_s)


def etcd_cluster(folder: Path) -> EtcdCluster:
    """To be entered: three members, known to be ready; ended at the end."""
    return EtcdCluster(program("etcd", "etcd-server"), folder)


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that cannot be waited for."""
    async with asyncio.timeout(60):
        while not await what():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.05)
