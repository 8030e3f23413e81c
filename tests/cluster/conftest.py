"""Servers that several modules of this folder share, and clients of theirs."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
from etcd_servers import EtcdCluster, etcd_cluster
from s3_servers import ceph, moto
from store_process import Process

from kvferry.cluster.client import BlobStoreClient

__all__ = ["ceph", "moto"]


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """Three members of etcd."""
    with etcd_cluster(tmp_path_factory.mktemp("etcd")) as cluster:
        yield cluster


@pytest.fixture
async def clients(stores: list[Process]) -> AsyncIterator[list[BlobStoreClient]]:
    """One of each of the module's ``stores``."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(BlobStoreClient(store.address, timeout_s=30))
            for store in stores
        ]
