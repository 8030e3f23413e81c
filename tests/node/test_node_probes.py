"""Link probes: rationed, only where nothing is known, never in the way of a transfer."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvferry.cluster.link_probe import MAX_PROBE_BYTES, PROBE_BYTES, link_service, probe
from kvferry.cluster.server import start_server
from kvferry.errors import ProtocolError, QueueFullError
from kvferry.node.link_table import LinkTable
from kvferry.node.prober import HOUR_S, RECENT_S, Prober, Ration
from kvferry.node.remotes import Peers, Remote
from kvferry.proto.v1 import coordinator_pb2 as pb


class Clock:
    """A clock that a test moves on."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def other_end(failures: Counter[str]) -> AsyncIterator[str]:
    """A server that answers probes."""
    server = await start_server(
        [link_service(lambda reason: failures.update([reason]))], ["127.0.0.1:0"]
    )
    try:
        yield server.addresses[0]
    finally:
        await server.stop(0.2)


def table_of(store: Remote, peers: Peers) -> LinkTable:
    """The links of a node that has these remotes."""
    return LinkTable(peers, store, lambda _: "thunderbolt")


async def test_a_link_is_probed_once_until_that_is_old() -> None:
    failures: Counter[str] = Counter()
    async with other_end(failures) as address:
        store, peers = Remote("the store", address, 5.0, 1 << 20), Peers("me", 5.0, 1 << 20)
        await peers.update([pb.NodeAddress(node_id="b", address=address)])
        links, clock, counted = table_of(store, peers), Clock(), Counter[str]()
        prober = Prober(links, Ration(1 << 30), counted, clock)
        assert {await prober.round(), await prober.round()} == {"b", "store"}
        assert await prober.round() == ""
        await links.look()
        for sample in links.samples():
            assert sample.bytes_per_s > 0
            assert sample.latency_s > 0
            assert sample.probed
            assert sample.kind == "thunderbolt"
            assert 0 < sample.age_s < 60
        store.measured_s = peers.all[0].measured_s = clock.now - 1.0
        assert await prober.round() == ""
        store.measured(1 << 20, 0.1)  # a blob has told since
        assert not store.probed
        store.measured_s = clock.now - RECENT_S - 1.0
        assert await prober.round() == "store"
        assert counted["probes"] == 3
        await store.aclose()
        await peers.aclose()


async def test_no_probe_while_a_transfer_runs() -> None:
    async with other_end(Counter()) as address:
        store, peers = Remote("the store", address, 5.0, 1 << 20), Peers("me", 5.0, 1 << 20)
        prober = Prober(table_of(store, peers), Ration(1 << 30), Counter(), Clock())
        async with store.asking(short=False):
            assert await prober.round() == ""
        async with store.asking():  # a short question is none
            assert store.under_way == 0
        assert await prober.round() == "store"
        await store.aclose()


async def test_who_cannot_be_probed_is_left_alone_and_who_is_down_costs_no_ration() -> None:
    clock = Clock()
    old_release = await start_server([], ["127.0.0.1:0"])
    store = Remote("the store", old_release.addresses[0], 5.0, 1 << 20)
    peers = Peers("me", 0.5, 1 << 20)
    counted: Counter[str] = Counter()
    prober = Prober(table_of(store, peers), Ration(PROBE_BYTES * 2), counted, clock)
    assert await prober.round() == "store"
    assert await prober.round() == ""
    assert counted == {"probes_failed": 1}
    await store.point_at("127.0.0.1:1")
    clock.now += RECENT_S + 1
    for _ in range(2):
        assert await prober.round() == "store"
    async with other_end(Counter()) as address:
        await store.point_at(address)
        assert await prober.round() == "store"
        assert store.measured_s
        # What was sent within the hour is all there is.
        store.measured_s = clock.now - RECENT_S - 1.0
        assert await prober.round() == ""
    await store.aclose()
    await old_release.stop(0.0)


def test_the_ration_is_for_any_hour() -> None:
    clock = Clock()
    ration = Ration(10, clock)
    assert ration.take(6)
    clock.now += HOUR_S / 2
    assert not ration.take(6)
    assert ration.take(4)
    clock.now += HOUR_S / 2
    assert ration.take(6)
    assert not ration.take(1)
    ration.give_back()
    assert ration.take(6)
    assert not Ration(0, clock).take(1)


async def test_a_server_sends_no_more_than_it_should() -> None:
    failures: Counter[str] = Counter()
    async with other_end(failures) as address:
        remote = Remote("x", address, 5.0, 1 << 20)
        found = await probe(remote.client.channel, "x", 5.0, 300_001)
        assert found.bytes_per_s > 0
        with pytest.raises(ProtocolError):
            await probe(remote.client.channel, "x", 5.0, MAX_PROBE_BYTES + 1)
        assert failures["protocol"] == 1
        await remote.aclose()


async def test_more_probes_at_a_time_than_make_sense_are_refused() -> None:
    from kvferry.cluster.link_probe import MAX_AT_ONCE, LinkServicer
    from kvferry.proto.v1 import link_pb2

    servicer, request = LinkServicer(), link_pb2.ProbeRequest(bytes=PROBE_BYTES)
    running = [servicer.probe(request) for _ in range(MAX_AT_ONCE)]
    for stream in running:
        await anext(stream)
    with pytest.raises(QueueFullError):
        await anext(servicer.probe(request))
    await running[0].aclose()
    assert sum([len(reply.data) async for reply in servicer.probe(request)]) == PROBE_BYTES
    await running[1].aclose()
