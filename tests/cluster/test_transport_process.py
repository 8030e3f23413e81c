"""What every service process does: metrics, ready file, a loud end when it fails."""

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from kvferry.cluster.metrics import FailureCounts, repository_registry
from kvferry.cluster.repository import RepositoryStat
from kvferry.cluster.service import Running, metrics_endpoint, run_service, setup_logging
from kvferry.errors import ConfigError, StoreUnavailableError


class _Service:
    def __init__(self, background: "asyncio.Future[None] | None" = None) -> None:
        self.stopped = 0
        self.background = background

    async def start(self) -> Running:
        async def stop() -> None:
            self.stopped += 1

        return Running(
            addresses=["127.0.0.1:7", "unix:/x"],
            stop=stop,
            background=self.background,
            info={"color": "blue"},
        )


async def test_a_signal_ends_it_after_it_said_that_it_is_ready(tmp_path: Path) -> None:
    lines: list[str] = []
    ready = tmp_path / "new folder" / "ready.json"
    service = _Service()
    seen: dict[str, object] = {}

    said = asyncio.Event()

    def announce(line: str) -> None:
        lines.append(line)
        said.set()

    async def end_when_ready() -> None:
        await said.wait()
        seen.update(json.loads(ready.read_text()))
        os.kill(os.getpid(), signal.SIGTERM)

    ending = asyncio.create_task(end_when_ready())
    await run_service("thing", service.start, ready_file=ready, announce=announce)
    await ending
    assert lines == ["kvferry thing ready on 127.0.0.1:7"]
    assert (seen["address"], seen["pid"], seen["color"]) == ("127.0.0.1:7", os.getpid(), "blue")
    assert seen["addresses"] == ["127.0.0.1:7", "unix:/x"]
    assert service.stopped == 1
    assert not ready.exists()


async def test_a_failing_background_ends_it_loudly_and_cleanly() -> None:
    async def fails() -> None:
        raise RuntimeError("a bug")

    service = _Service(asyncio.ensure_future(fails()))
    with pytest.raises(RuntimeError, match="a bug"):
        await run_service("thing", service.start, announce=lambda line: None)
    assert service.stopped == 1


async def test_metrics_are_served_and_stop_with_the_service() -> None:
    failures = FailureCounts()
    failures("full")
    stat = RepositoryStat(blobs=3, bytes=10, budget_bytes=100, counters={"evicted": 2})
    registry = repository_registry("kvferry_test", lambda: stat, failures)
    with metrics_endpoint("127.0.0.1:0", registry) as address:
        text = await asyncio.to_thread(_fetch, address)
    assert "kvferry_test_blobs 3.0" in text
    assert 'kvferry_test_events_total{event="evicted"} 2.0' in text
    assert 'kvferry_test_failed_calls_total{reason="full"} 1.0' in text
    with pytest.raises(OSError, match=r"refused|closed|reset"):
        await asyncio.to_thread(_fetch, address)


def _fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as reply:
        return str(reply.read().decode())


def test_metrics_of_a_store_that_is_gone_do_not_fail() -> None:
    def gone() -> RepositoryStat:
        raise StoreUnavailableError("x", "closed")

    registry = repository_registry("kvferry_test", gone, FailureCounts())
    assert [m.name for m in registry.collect()] == ["kvferry_test_failed_calls"]


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "nonsense", "127.0.0.1:x", "127.0.0.1:99999"])
def test_metrics_addresses_are_checked(listen: str) -> None:
    with pytest.raises(ConfigError), metrics_endpoint(listen, CollectorRegistry()):
        pass


def test_no_metrics_where_none_are_wanted() -> None:
    with metrics_endpoint("", CollectorRegistry()) as address:
        assert address == ""


def test_unknown_log_level() -> None:
    with pytest.raises(ConfigError, match="debug"):
        setup_logging("loud")
