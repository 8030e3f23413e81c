"""Who may have what: filters, what was found out, and how little all of it may take."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_samples import blob, chain, digest

from kvferry.errors import ProtocolError
from kvferry.node.bloom import MAX_BYTES, Bloom, item_of, page_item
from kvferry.node.directory import DENIED_S, REMEMBERED, Directory
from kvferry.node.holdings import Holdings
from kvferry.node.memory_tier import MemoryTier
from kvferry.node.remotes import GRACE_S, Peers
from kvferry.node.tiers import Tiers
from kvferry.proto.v1 import coordinator_pb2 as pb

MIB = 1 << 20


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=300, unique=True))
def test_what_was_added_is_there_after_the_wire_too(items: list[bytes]) -> None:
    made = Bloom.for_count(len(items))
    for item in items:
        made.add(item)
    again = Bloom(bytes(made.bits), made.hashes)
    assert all(item in again for item in items)


@pytest.mark.parametrize("count", [10, 5000, 40_000])
def test_few_are_said_to_be_there_that_are_not(count: int) -> None:
    made = Bloom.for_count(count)
    for n in range(count):
        made.add(digest(n))
    wrong = sum(digest("not there", n) in made for n in range(4000))
    assert wrong < 4000 * 0.02


def test_a_filter_is_bounded_whatever_it_is_told() -> None:
    assert len(Bloom.for_count(10**9).bits) == MAX_BYTES
    for bits, hashes in ((b"", 4), (bytes(MAX_BYTES + 1), 4), (bytes(64), 0), (bytes(64), 99)):
        with pytest.raises(ProtocolError):
            Bloom(bits, hashes)


def tiers(budget: int = 64 * MIB) -> Tiers:
    return Tiers(MemoryTier(budget), None, Counter())


async def test_a_node_tells_what_it_holds_and_only_when_there_is_news() -> None:
    held = tiers()
    holdings = Holdings(held)
    held.on_new = holdings.add
    made = chain(5)
    for key, data in made[:3]:
        await held.remember(key, data)
    first = holdings.reply(0)
    told = Bloom(first.bits, first.hashes)
    assert all(item_of(key) in told and page_item(key.page_key) in told for key, _ in made[:3])
    assert item_of(made[4][0]) not in told
    assert not holdings.reply(first.version).bits
    await held.remember(*made[3])
    assert holdings.reply(first.version).bits
    # What is let go of leaves the filter when it is made anew.
    await held.delete([made[0][0]])
    await holdings.rebuild()
    last = holdings.reply(first.version)
    again = Bloom(last.bits, last.hashes)
    assert item_of(made[0][0]) not in again
    assert all(item_of(key) in again for key, _ in made[1:4])


async def peers_named(*names: str, clock: object = None) -> Peers:
    made = Peers("me", 0.2, MIB, clock=clock) if clock else Peers("me", 0.2, MIB)  # type: ignore[arg-type]
    await made.update([address(name, n) for n, name in enumerate(names)])
    return made


def address(name: str, port: int = 0, incarnation: int = 1) -> pb.NodeAddress:
    return pb.NodeAddress(node_id=name, address=f"127.0.0.1:{port + 1}", incarnation=incarnation)


async def test_a_hint_is_forgotten_once_it_was_wrong_and_believed_again_later() -> None:
    now = [0.0]
    peers = await peers_named("a", "b")
    directory = Directory(peers, 5.0, 0.2, Counter(), lambda: now[0])
    key = blob("x")[0]
    assert directory.holders(key) == []
    directory.has("a", key)
    directory.has("b", key)
    assert [p.name for p in directory.holders(key)] == ["a", "b"]
    directory.has_not("a", key)
    assert [p.name for p in directory.holders(key)] == ["b"]
    assert directory.copies(key) == 1
    now[0] += DENIED_S + 1
    assert [p.name for p in directory.holders(key)] == ["b"]
    directory.has("a", key)
    assert directory.copies(key) == 2
    await peers.aclose()


async def test_peers_that_do_not_answer_are_nobodys_hint() -> None:
    peers = await peers_named("a", "b")
    directory = Directory(peers, 5.0, 0.2, Counter())
    key = blob("x")[0]
    directory.has("a", key)
    for _ in range(2):
        next(p for p in peers.all if p.name == "a").breaker.failed()
    assert directory.holders(key) == []
    assert directory.copies(key) == 1  # it has it all the same
    assert [p.name for p in directory.with_page([key.page_key], 16)] == ["b"]
    assert await directory.ask_around(key, 8, 0.2) == []
    await peers.aclose()


async def test_what_is_remembered_is_bounded() -> None:
    peers = await peers_named("a")
    directory = Directory(peers, 5.0, 0.2, Counter())
    template = blob("x")[0]
    keys = [
        type(template)(template.kind, digest(n), template.layers, template.heads, template.codec_id)
        for n in range(REMEMBERED + 10)
    ]
    for key in keys:
        directory.has("a", key)
    assert directory.holders(keys[0]) == []
    assert directory.holders(keys[-1]) != []
    assert len(directory.with_page([], 0)) == 0
    await peers.aclose()


async def test_a_peer_that_left_is_known_for_a_while_and_comes_back_as_it_was() -> None:
    now = [0.0]
    peers = await peers_named("a", "b", clock=lambda: now[0])
    first = peers.named("a")
    assert first is not None
    await peers.update([address("b", 1)])
    assert [p.name for p in peers.all] == ["b"]
    assert peers.named("a") is first
    await peers.update([address("a", 0, incarnation=2), address("b", 1), address("me", 9)])
    assert peers.named("a") is first
    assert first.incarnation == 2
    await peers.update([address("a", 7), address("b", 1)])
    assert peers.named("a") is not first
    await peers.update([address("b", 1)])
    now[0] += GRACE_S + 1
    await peers.update([address("b", 1)])
    assert peers.named("a") is None
    await peers.aclose()
