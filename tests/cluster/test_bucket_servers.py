"""Three ``kvferry store`` processes over one bucket."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from s3_servers import BUCKET, S3Server
from store_process import Process, running
from store_samples import MIB, blob, chain, digest, pages, query, tail

from kvferry.cluster.client import BlobStoreClient
from kvferry.errors import BlobNotFoundError, FerryError
from kvferry.proto.keys import BlobKey

pytestmark = pytest.mark.processes

PARTS = [(0, 1), (1, 3), (3, 4)]


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def server(request: pytest.FixtureRequest) -> S3Server:
    found: S3Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def stores(server: S3Server, tmp_path: Path) -> Iterator[list[Process]]:
    url = server.url()
    with ExitStack() as stack:
        started = []
        for name in ("a", "b", "c"):
            (tmp_path / name).mkdir()
            options = ("--backend", url, "--sweep-s", "2")
            started.append(stack.enter_context(running(tmp_path / name / "unused", *options)))
        yield started


async def test_one_store_in_three_processes(clients: list[BlobStoreClient]) -> None:
    """Layer groups of each page arrive through different servers, all at once."""
    made = [each for part in PARTS for each in pages(6, layers=part)]
    made += [tail(chain(6)[5], "t", 1536), blob(digest("big"), size=12 * MIB)]
    stored = await asyncio.gather(*(clients[i % 3].put(*each) for i, each in enumerate(made)))
    assert all(stored)
    for client in clients:
        found = await client.lookup(query(chain(6)))
        assert [len(page) for page in found.pages] == [3] * 6
        assert len(found.tails) == 1
        assert await client.has([key for key, _ in made]) == [True] * len(made)
    for i, (key, data) in enumerate(made):
        assert bytes(await clients[(i + 1) % 3].get(key)) == data
    again = await asyncio.gather(*(clients[i % 2].put(*each) for i, each in enumerate(made)))
    assert not any(again)
    key = made[0][0]
    assert await clients[2].delete([key]) == 1
    with pytest.raises(BlobNotFoundError):
        await clients[0].get(key)
    assert (await clients[1].stat()).blobs == len(made) - 1


async def test_a_server_that_is_killed_costs_nothing_that_was_accepted(
    stores: list[Process], clients: list[BlobStoreClient]
) -> None:
    """Its clients go to the others; pages it had half taken are completed there."""
    accepted: dict[BlobKey, bytes] = {}
    began = asyncio.Event()

    async def put_until_it_dies() -> None:
        for part in PARTS[:2]:
            for key, data in pages(20, layers=part, size=20_000):
                try:
                    await clients[0].put(key, data)
                except FerryError:
                    return
                accepted[key] = data
                if len(accepted) > 5:
                    began.set()

    working = asyncio.create_task(put_until_it_dies())
    await began.wait()
    stores[0].process.kill()
    await working
    for key, data in accepted.items():
        assert bytes(await clients[1].get(key)) == data
    made = [each for part in PARTS for each in pages(20, layers=part, size=100)]
    for i, (key, data) in enumerate(made):
        if key not in accepted:
            await clients[1 + i % 2].put(key, data)
    for client in clients[1:]:
        assert (await client.lookup(query(chain(20)))).complete_pages == 20
    for client in clients[1:]:
        async for report in client.scrub():
            assert report.findings == []


async def test_one_sweeps_and_another_when_it_is_gone(
    stores: list[Process], clients: list[BlobStoreClient]
) -> None:
    async def sweepers(left: list[BlobStoreClient]) -> list[int]:
        return [(await c.stat()).counters.get("sweeps", 0) for c in left]

    async def wait_for_one(left: list[BlobStoreClient]) -> int:
        end = time.monotonic() + 40
        while time.monotonic() < end:
            counts = await sweepers(left)
            if any(counts):
                return counts.index(max(counts))
            await asyncio.sleep(0.3)
        raise AssertionError("nobody sweeps")

    key, data = tail(digest("root"), "t")
    await clients[0].put(key, data, ttl_s=3)
    first = await wait_for_one(clients)
    stores[first].process.kill()
    left = [client for i, client in enumerate(clients) if i != first]
    await wait_for_one(left)
    end = time.monotonic() + 40
    while any([b async for batch in left[0].list() for b in batch]):
        assert time.monotonic() < end
        await asyncio.sleep(0.3)
    codes = [s.end(signal.SIGTERM)[0] for i, s in enumerate(stores) if i != first]
    assert codes == [0, 0]


def test_a_bucket_that_is_not_there_is_one_line_and_exit_code_2(moto: S3Server) -> None:
    url = moto.url().replace(BUCKET, "nosuch")
    command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "", "--backend", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no such bucket" in done.stderr
