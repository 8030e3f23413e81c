"""``kvferry store`` with all that looks after it: Redis before it, a slow scrub, metrics."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis_servers import one_redis, wait_for
from store_samples import blob, digest, pages

from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import BlobNotFoundError

pytestmark = pytest.mark.processes


class Store:
    """A running store process."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.root, ready = folder / name, folder / f"{name}.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
        command += ["--metrics-listen", "127.0.0.1:0", "--backend", f"file://{self.root}"]
        command += ["--ready-file", str(ready), "--reserve-bytes", "0", *options]
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(ready.exists, self._log.read_text, 60.0)
        self.ready = json.loads(ready.read_text())
        self.address: str = self.ready["address"]

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.ready['metrics']}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@contextmanager
def running(folder: Path, name: str, *options: str) -> Iterator[Store]:
    store = Store(folder, name, *options)
    try:
        yield store
        assert store.stop() == 0, store._log.read_text()
        assert "Traceback" not in store._log.read_text()
    finally:
        if store.process.poll() is None:
            store.process.kill()
            store.process.wait()


def test_redis_before_a_store_shows_in_its_metrics(tmp_path: Path) -> None:
    made = pages(4, namespace=0xABCD)
    with (
        one_redis(tmp_path) as redis,
        running(tmp_path, "s", "--hot", redis.url, "--hot-fill", "both") as store,
        SyncBlobStoreClient(store.address) as client,
    ):
        for key, data in made:
            assert client.put(key, data)
        wait_for(lambda: redis.ask("DBSIZE") == 4, lambda: "not in redis")
        for key, data in made:
            assert bytes(client.get(key)) == data
        wait_for(
            lambda: store.metrics()['kvferry_store_tier_blobs{tier="redis"}'] == 4,
            lambda: str(store.metrics()),
        )
        found = store.metrics()
        assert found['kvferry_store_tier_events_total{event="hits",tier="redis"}'] == 4
        assert found['kvferry_store_tier_up{tier="redis"}'] == 1
        assert found['kvferry_store_tier_blobs{tier="file"}'] == 4
        ours = 'namespace="000000000000abcd"'
        assert found[f"kvferry_store_namespace_blobs{{{ours}}}"] == 4
        assert found[f'kvferry_store_namespace_events_total{{event="puts",{ours}}}'] == 4
        redis.stop()
        for key, data in made:
            assert bytes(client.get(key)) == data
        found = store.metrics()
        assert found['kvferry_store_tier_up{tier="redis"}'] == 0
        assert any("failed_" in name and 'tier="redis"' in name for name in found)


def test_a_slow_scrub_mends_from_another_store_by_itself(tmp_path: Path) -> None:
    made = [blob(digest(i)) for i in range(3)]
    with (
        running(tmp_path, "a") as other,
        running(
            tmp_path, "b", "--replica", other.address, "--scrub-bytes-per-s", "10000000"
        ) as store,
        SyncBlobStoreClient(other.address) as there,
        SyncBlobStoreClient(store.address) as client,
    ):
        for key, data in made:
            client.put(key, data)
            there.put(key, data)
        # A pass rests a minute: one that the store makes anew finds it sooner.
        (path,) = store.root.glob(f"blobs/*/page-{made[1][0].page_key.hex()}*")
        with path.open("r+b") as file:
            file.seek(-100, 2)
            file.write(b"damage")
        assert store.stop() == 0
        with (
            running(
                tmp_path, "b", "--replica", other.address, "--scrub-bytes-per-s", "10000000"
            ) as again,
            SyncBlobStoreClient(again.address) as mended,
        ):
            name = "kvferry_store_scrub_mended_blobs_total"
            wait_for(lambda: again.metrics().get(name) == 1, lambda: str(again.metrics()))
            assert bytes(mended.get(made[1][0])) == made[1][1]
            assert mended.stat().quarantined == 1


def test_a_life_that_ends_frees_its_room_by_itself(tmp_path: Path) -> None:
    key, data = blob()
    with (
        running(tmp_path, "s") as store,
        SyncBlobStoreClient(store.address) as client,
    ):
        client.put(key, data, ttl_s=1)
        client.put(*blob(digest("lasting")))
        time.sleep(1.2)
        with pytest.raises(BlobNotFoundError):
            client.get(key)
        wait_for(
            lambda: len(list(store.root.glob("blobs/*/*"))) == 1, lambda: "the file is there still"
        )
        wait_for(lambda: client.stat().counters["expired"] == 1, lambda: str(client.stat()))


def test_redis_is_no_backend_of_a_store(tmp_path: Path) -> None:
    for backend, says in (
        ("redis://127.0.0.1:1", "`hot`"),
        ("127.0.0.1:7800", "`hot`"),
        ("redis://:hunter2@127.0.0.1:x", "redis://HOST"),
    ):
        command = [sys.executable, "-m", "kvferry", "store", "--listen", "127.0.0.1:0"]
        command += ["--metrics-listen", "", "--backend", backend]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert says in done.stderr
        assert "hunter2" not in done.stderr
