"""Which of the services that announce themselves a node uses."""

import asyncio

import pytest

from kvferry.cluster.discovery import Seen
from kvferry.node import finder as finders
from kvferry.node.finder import Finder, Sought


class Store:
    """What is pointed at, and whether it answers."""

    def __init__(self) -> None:
        self.address, self.answers = "", True

    async def point_at(self, address: str) -> None:
        self.address = address

    def finder(self) -> Finder:
        kinds = {"192.168.1.5:1": "wifi", "169.254.1.5:1": "thunderbolt"}
        sought = {"store": Sought(self.point_at, lambda: self.answers)}
        return Finder("home", "127.0.0.1:0", sought, lambda address: kinds.get(address, "virtual"))


async def test_the_first_is_used_over_its_best_link_and_followed_where_it_moves() -> None:
    store = Store()
    finder = store.finder()
    await finder.take(Seen("a", "store", ["10.0.0.5:1", "192.168.1.5:1", "169.254.1.5:1"]))
    assert store.address == "169.254.1.5:1"
    await finder.take(Seen("b", "store", ["10.0.0.6:1"]))
    await finder.take(Seen("c", "coordinator", ["10.0.0.7:1"]))
    assert store.address == "169.254.1.5:1"
    await finder.take(Seen("a", "store", ["10.0.0.8:1"]))
    assert store.address == "10.0.0.8:1"
    await finder.take(Seen("a", "", []))
    assert store.address == "10.0.0.6:1"
    await finder.take(Seen("b", "", []))
    assert store.address == "10.0.0.6:1"  # the last one known is better than none
    await finder.take(Seen("d", "store", ["10.0.0.9:1"]))
    assert store.address == "10.0.0.9:1"


async def test_another_takes_over_where_one_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finders, "LOOK_S", 0.01)
    store = Store()
    finder = store.finder()
    await finder.take(Seen("a", "store", ["10.0.0.5:1"]))
    await finder.take(Seen("b", "store", ["10.0.0.6:1"]))
    task = asyncio.create_task(finder._change_over())
    await asyncio.sleep(0.1)
    assert store.address == "10.0.0.5:1"
    store.answers = False
    async with asyncio.timeout(10):
        while store.address != "10.0.0.6:1":
            await asyncio.sleep(0.01)
            if store.address == "10.0.0.6:1":
                store.answers = True
    task.cancel()


async def test_a_flood_of_announcements_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finders, "MAX_KNOWN", 3)
    store = Store()
    finder = store.finder()
    for number in range(10):
        await finder.take(Seen(f"s{number}", "store", [f"10.0.0.{number}:1"]))
    assert len(finder._known["store"]) == 3
    await finder.take(Seen("s0", "store", ["10.0.1.1:1"]))
    assert store.address == "10.0.1.1:1"  # those known may still move
