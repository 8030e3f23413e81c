"""Real multicast DNS on the loopback interface: announced, found, and gone again."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from kvferry.cluster.discovery import Seen, announced, browse
from kvferry.errors import ConfigError
from kvferry.settings import NodeSettings

pytest.importorskip("zeroconf")


class Watching:
    """What a browser has heard so far."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    async def until(self, count: int) -> list[Seen]:
        async with asyncio.timeout(30):
            while len(self.seen) < count:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(0.02)
        return self.seen


@asynccontextmanager
async def watching(cluster: str) -> AsyncIterator[Watching]:
    made = Watching()

    async def listen() -> None:
        async for seen in browse(cluster, "127.0.0.1:0"):
            made.seen.append(seen)

    task = asyncio.create_task(listen())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_service_is_found_by_its_cluster_and_says_when_it_goes() -> None:
    cluster = uuid4().hex
    async with watching(cluster) as mine, watching(uuid4().hex) as others:
        async with announced(cluster, "store", "127.0.0.1:7800"):
            (store,) = await mine.until(1)
            assert (store.role, list(store.addresses)) == ("store", ["127.0.0.1:7800"])
            async with announced(cluster, "coordinator", "127.0.0.1:7802"):
                _, coordinator = await mine.until(2)
                assert coordinator.role == "coordinator"
                # Who comes later hears of those that are there already.
                async with watching(cluster) as late:
                    assert {seen.role for seen in await late.until(2)} == {"store", "coordinator"}
            gone = (await mine.until(3))[2]
            assert (gone.instance, list(gone.addresses)) == (coordinator.instance, [])
        assert (await mine.until(4))[3].instance == store.instance
        assert not [seen for seen in others.seen if seen.addresses]


async def test_nothing_is_announced_unless_asked() -> None:
    async with announced("", "store", "127.0.0.1:7800"):
        pass


async def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[discovery\]'"):
        async with announced("x", "store", "127.0.0.1:7800"):
            pass


async def test_an_interface_that_is_not_here_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="discovery"):
        async with announced("x", "store", "192.0.2.77:7800"):
            pass


def test_only_what_has_no_address_is_looked_for() -> None:
    assert NodeSettings.load().sought == frozenset()
    assert NodeSettings.load(discovery="home").sought == {"store", "coordinator"}
    given = NodeSettings.load(discovery="home", store="127.0.0.1:1", coordinator="")
    assert given.sought == frozenset()
    for name in ("two words", "a" * 33, "x/y"):
        with pytest.raises(ConfigError, match="discovery"):
            NodeSettings.load(discovery=name)
