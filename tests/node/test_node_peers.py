"""Blobs from peers: hints that are stale, peers that sleep, stall or are slow. Real processes."""

import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from node_samples import ROOT, Machines, Service, blob, chain, wait_for

from kvferry.cluster.repository import LookupQuery
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.node.client import NodeClient
from kvferry.proto.keys import BlobKey

pytestmark = pytest.mark.processes
NOBODY = "127.0.0.1:1"
QUICK = ("--holdings-interval-s", "0.2")


def event(service: Service, name: str) -> float:
    return service.metrics().get(f'kvferry_node_events_total{{event="{name}"}}', 0.0)


def cluster(
    machines: Machines, store: str, options: Sequence[Sequence[str]], timeout_s: float = 20.0
) -> tuple[list[Service], list[NodeClient]]:
    """Daemons n0, n1, ... that know each other, each with its own options."""
    coordinator = machines.coordinator()
    names = [f"n{i}" for i in range(len(options))]
    nodes = [
        machines.node(*QUICK, *own, name=name, store=store, coordinator=coordinator.address)
        for name, own in zip(names, options, strict=True)
    ]
    clients = [machines.client(name, timeout_s) for name in names]
    for client in clients:
        wait_for(lambda c=client: len(c.status().peers) == len(options) - 1)
    return nodes, clients


def told(*nodes: Service) -> None:
    """Until each of them has asked its peers what they hold, from now on."""
    before = [event(node, "holdings_asked") for node in nodes]
    for node, asked in zip(nodes, before, strict=True):
        wait_for(lambda n=node, a=asked: event(n, "holdings_asked") >= a + 6)


def spread(clients: Sequence[NodeClient], made: Sequence[tuple[BlobKey, bytes]]) -> None:
    """The same blobs to every one of these nodes."""
    for client in clients:
        for key, data in made:
            client.put(key, data)


def ask(client: NodeClient, made: Sequence[tuple[BlobKey, bytes]], layers: int = 4) -> None:
    """A lookup, after which the node knows who has what and how large it is."""
    query = LookupQuery(
        root=ROOT, page_keys=list(dict.fromkeys(k.page_key for k, _ in made)), layers=(0, layers)
    )
    assert client.lookup(query).complete_pages == len(query.page_keys)


def test_blobs_go_from_machine_to_machine_and_not_through_the_store(machines: Machines) -> None:
    store = machines.store()
    nodes, clients = cluster(machines, store.address, [(), ()])
    made = chain(6, size=100_000)
    spread(clients[:1], made)
    assert clients[0].flush(20.0)
    told(nodes[1])
    assert clients[1].get_many([key for key, _ in made]) == dict(made)
    # The store is asked too where it is as quick.
    assert event(nodes[1], "hits_peer") >= 1
    assert event(nodes[1], "hits_peer") + event(nodes[1], "hits_store") == len(made)
    store.end(signal.SIGKILL)
    more = chain(3, "more", size=100_000)
    spread(clients[:1], more)
    told(nodes[1])
    assert clients[1].get_many([key for key, _ in more]) == dict(more)


def test_a_stale_hint_costs_a_question_at_most_and_the_store_has_it(machines: Machines) -> None:
    store = machines.store()
    nodes, clients = cluster(machines, store.address, [(), ()])
    made = chain(4)
    spread(clients[:1], made)
    assert clients[0].flush(20.0)
    told(nodes[1])
    with SyncBlobStoreClient(f"unix:{machines.socket('n0')}") as own:
        own.delete([key for key, _ in made[:2]])
    with SyncBlobStoreClient(store.address) as direct:
        for key, data in made[:2]:
            direct.put(key, data)
    assert clients[1].get_many([key for key, _ in made]) == dict(made)
    # At most one each: where the store is quicker, the peer is not even asked.
    assert event(nodes[1], "stale_hints") <= 2
    assert event(nodes[1], "hits_store") >= 2
    assert event(nodes[1], "misses") == 0


def test_what_nobody_has_is_missed_quickly_though_peers_sleep(machines: Machines) -> None:
    nodes, clients = cluster(machines, NOBODY, [(), (), ()])
    made = chain(3)
    spread(clients[:1], made)
    for node in nodes[1:]:
        node.send(signal.SIGSTOP)
    started = time.monotonic()
    for n in range(40):
        assert clients[0].get_many([blob(f"nowhere {n}")[0]], 10.0)
        ask(clients[0], made)
    # Two of them sleep; asked for every blob they would have cost half a second each time.
    assert time.monotonic() - started < 15.0
    for node in nodes[1:]:
        node.send(signal.SIGCONT)
    # And they are found again without anybody asking for a blob.
    key, data = blob("later", size=5000)
    clients[1].put(key, data)
    wait_for(lambda: clients[0].get_many([key], 5.0) == {key: data})


def test_a_peer_stopped_in_mid_transfer_is_overtaken(machines: Machines) -> None:
    slow = ("--serve-bytes-per-s", "1500000")
    nodes, clients = cluster(machines, NOBODY, [slow, slow, ()])
    warm = chain(6, "warm", size=300_000)
    spread(clients[:2], warm)
    ask(clients[2], warm)
    assert clients[2].get_many([key for key, _ in warm]) == dict(warm)
    made = chain(1, "long", size=6_000_000)
    spread(clients[:2], made)
    ask(clients[2], made)
    before = [event(node, "sent_bytes_peer") for node in nodes[:2]]

    def sender() -> Service | None:
        for node, sent in zip(nodes[:2], before, strict=True):
            if event(node, "sent_bytes_peer") > sent:
                return node
        return None

    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(clients[2].get, made[0][0])
        stopped = wait_for(sender)
        stopped.send(signal.SIGSTOP)
        assert got.result(30) == made[0][1]
    assert event(nodes[2], "hedges") >= 1
    assert event(nodes[2], "hedge_wins") >= 1
    assert event(nodes[2], "hits_peer") == 7
    stopped.send(signal.SIGCONT)


def test_a_slow_peer_is_overtaken_within_the_budget(machines: Machines) -> None:
    nodes, clients = cluster(machines, NOBODY, [("--serve-bytes-per-s", "100000"), (), ()])
    made = chain(12, size=400_000)
    spread(clients[:2], made)
    ask(clients[2], made)
    assert clients[2].get_many([key for key, _ in made], 30.0) == dict(made)
    # By its bucket alone the slow one would have taken four seconds for each.
    assert event(nodes[2], "hits_peer") == 12
    assert event(nodes[2], "hedge_wins") >= 1
    assert event(nodes[1], "sent_bytes_peer") > event(nodes[0], "sent_bytes_peer")
    assert event(nodes[2], "hedge_extra_bytes") < 0.5 * sum(len(data) for _, data in made)


def test_several_peers_are_read_at_once_for_different_layers(machines: Machines) -> None:
    limit = ("--serve-bytes-per-s", "4000000")
    nodes, clients = cluster(machines, NOBODY, [limit, limit, ()])
    groups = [chain(8, layers=(a, a + 1), size=150_000) for a in range(4)]
    made = [entry for group in groups for entry in group]
    spread(clients[:2], made)
    ask(clients[2], made)
    assert clients[2].get_many([key for key, _ in made], 30.0) == dict(made)
    sent = [event(node, "sent_bytes_peer") for node in nodes[:2]]
    assert min(sent) > 0.3 * sum(sent)
    assert event(nodes[2], "hits_peer") == len(made)
