"""Two ``kvferry store`` processes over one bucket elect in etcd which of them sweeps."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from etcd_servers import EtcdCluster, until
from s3_servers import S3Server
from store_process import Process, running

from kvferry.cluster.client import BlobStoreClient

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture
def stores(
    members: EtcdCluster, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Process]]:
    monkeypatch.setenv("KVFERRY_STORE_ETCD", members.endpoints)
    options = ("--backend", moto.url(), "--sweep-s", "1")
    with ExitStack() as stack:
        started = []
        for name in "ab":
            (tmp_path / name).mkdir()
            started.append(stack.enter_context(running(tmp_path / name / "unused", *options)))
        yield started


async def test_one_sweeps_until_it_is_gone_and_then_the_other(
    stores: list[Process], clients: list[BlobStoreClient]
) -> None:
    async def sweeps() -> list[int]:
        return [(await client.stat()).counters.get("sweeps", 0) for client in clients]

    async def several() -> bool:
        return max(await sweeps()) >= 3

    await until(several)
    counts = await sweeps()
    assert min(counts) == 0
    first = counts.index(max(counts))
    stores[first].process.kill()
    left = clients[1 - first]

    async def followed() -> bool:
        return (await left.stat()).counters.get("sweeps", 0) > 0

    await until(followed)
