"""``kvferry store`` as a process: ready, killed, stopped."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from store_process import Process, running
from store_samples import MIB, blob, chain, digest, pages, query

from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.repository import PutSpec
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import BlobNotFoundError, FerryError

pytestmark = pytest.mark.processes


def test_ready_metrics_and_a_clean_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    made = pages(3)
    with running(root) as store:
        assert store.ready["pid"] == store.process.pid
        with SyncBlobStoreClient(store.address, timeout_s=20) as client:
            for key, data in made:
                assert client.put(key, data)
            assert client.lookup(query(chain(3))).complete_pages == 3
            assert [bytes(b) for b in client.get_many([k for k, _ in made])] == [d for _, d in made]
            (batch,) = client.list()
            assert len(batch) == 3
            assert [r.checked for r in client.scrub()] == [3]
            with pytest.raises(BlobNotFoundError):
                client.get(blob(digest("no"))[0])
            many = client.get_many([made[0][0], blob(digest("no"))[0]])
            assert isinstance(many[1], BlobNotFoundError)
        url = f"http://{store.ready['metrics']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as reply:
            text = reply.read().decode()
        assert "kvferry_store_blobs 3.0" in text
        assert 'kvferry_store_failed_calls_total{reason="not_found"} 2.0' in text
        code, out, err = store.end(signal.SIGTERM)
        assert (code, out) == (0, f"kvferry store ready on {store.address}\n"), err
        assert "Traceback" not in err
        assert not store.ready_file.exists()
    with running(root) as store, SyncBlobStoreClient(store.address) as client:
        assert client.has([key for key, _ in made]) == [True] * 3


def test_ctrl_c_ends_it_too(tmp_path: Path) -> None:
    with running(tmp_path / "root") as store:
        code, _, err = store.end(signal.SIGINT)
        assert code == 0
        assert "Traceback" not in err


async def test_a_put_under_way_is_finished_before_the_end(tmp_path: Path) -> None:
    key, data = blob(size=7 * MIB)
    with running(tmp_path / "root") as store:
        async with BlobStoreClient(store.address) as client:
            ending = asyncio.Event()

            async def slowly() -> AsyncIterator[bytes]:
                yield data[: 6 * MIB]
                await ending.wait()
                await asyncio.sleep(1.0)
                yield data[6 * MIB :]

            sending = asyncio.create_task(
                client.put_stream(PutSpec(key=key, size=len(data)), slowly())
            )
            # Until the store has met it, and written a part.
            while not (await client.stat()).in_flight_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            store.process.terminate()
            ending.set()
            assert await sending
        assert await asyncio.to_thread(store.process.wait, 30) == 0
    with running(tmp_path / "root") as store:
        async with BlobStoreClient(store.address) as client:
            assert bytes(await client.get(key)) == data


@pytest.mark.slow
async def test_kill_9_during_puts_loses_nothing_accepted_and_shows_nothing_partial(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    chance = random.Random(7)
    accepted: dict[Any, bytes] = {}
    counter = iter(range(10**9))

    async def put_until_it_dies(client: BlobStoreClient) -> None:
        while True:
            i = next(counter)
            key, data = blob(digest("kill", i), size=chance.choice([300, 70_000, 900_000, 3 * MIB]))
            try:
                staged = i % 5 == 0
                if await client.put(key, data, stage=staged) and staged:
                    await client.commit([key])
                accepted[key] = data
            except FerryError:
                return

    async def check(client: BlobStoreClient) -> None:
        keys = list(accepted)
        assert await client.has(keys) == [True] * len(keys)
        for key in keys:
            assert bytes(await client.get(key)) == accepted[key]
        async for report in client.scrub():
            assert report.findings == []
        stat = await client.stat()
        assert stat.quarantined == 0
        assert stat.in_flight_bytes == 0
        assert os.listdir(root / "tmp") == []  # noqa: PTH208

    for _ in range(6):
        store = await asyncio.to_thread(Process, root)
        try:
            async with BlobStoreClient(store.address, timeout_s=20) as client:
                await check(client)
                workers = [asyncio.create_task(put_until_it_dies(client)) for _ in range(4)]
                before = len(accepted)
                await asyncio.sleep(chance.uniform(0.1, 0.6))
                while len(accepted) < before + 4:  # noqa: ASYNC110 - a machine may be slow
                    await asyncio.sleep(0.02)
                store.process.kill()
                await asyncio.gather(*workers)
        finally:
            store.process.kill()
            store.process.communicate()
    assert len(accepted) > 20
    with running(root) as store:
        async with BlobStoreClient(store.address) as client:
            await check(client)


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    with running(tmp_path / "root") as store:
        command = [sys.executable, "-m", "kvferry", "store", "--listen", store.address]
        command += ["--metrics-listen", "", "--backend", "memory://"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "free" in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backend", "s3://key:secret@b"], "AWS_SECRET_ACCESS_KEY"),
        (["--backend", "s3://b?endpoint=http://192.0.2.1"], "https://"),
        (["--backend", "s3://b?what=1"], "endpoint"),
        (["--listen", "0.0.0.0:0"], "loopback"),
        (["--listen", "nonsense"], "HOST:PORT"),
        (["--budget-bytes", "0"], "budget_bytes"),
        (["--metrics-listen", "192.0.2.1:1"], "loopback"),
        (["--log-level", "loud"], "log_level"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    tmp_path: Path, options: list[str], says: str
) -> None:
    command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
    command += ["--metrics-listen", "", "--backend", f"file://{tmp_path}/r", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
