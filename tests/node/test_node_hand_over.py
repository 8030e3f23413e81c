"""What only one node has when it leaves, and what is copied while nobody asks. Real processes."""

import signal

import grpc
import pytest
from node_samples import Machines, Service, blob, chain, wait_for
from test_node_peers import NOBODY, cluster, event

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.status import rpc_errors
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import FencedError, ProtocolError
from kvferry.node.take_over import MAX_BLOBS, told_of
from kvferry.proto.v1 import peer_pb2
from kvferry.proto.v1.peer_pb2_grpc import PeerStub

pytestmark = pytest.mark.processes


def take_over(node: Service, request: peer_pb2.TakeOverRequest) -> list[bool]:
    """Ask a node to fetch blobs, as a peer does."""
    with grpc.insecure_channel(node.address) as channel, rpc_errors("node"):
        return list(PeerStub(channel).TakeOver(request, timeout=20).taken)


def test_accepted_blobs_go_to_a_peer_where_the_store_is_gone(machines: Machines) -> None:
    port = free_port()
    nodes, clients = cluster(machines, f"127.0.0.1:{port}", [(), ()])
    made = chain(5, size=20_000)
    tail, later = blob("tail", kind=2, tokens=(1280, 1300)), blob("x")
    for key, data in made:
        assert clients[0].put(key, data)
    assert clients[0].put(*tail, ttl_s=600)
    assert nodes[0].end() == 0
    # The machine does not come back; the store does.
    held = dict([*made, tail])
    assert event(nodes[1], "handovers_taken") == len(held)
    store = machines.store(port=port)
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: all(direct.has(list(held))))
        assert {key: bytes(direct.get(key)) for key in held} == held
        assert direct.has([later[0]]) == [False]


def test_what_was_handed_over_survives_that_peer_being_killed(machines: Machines) -> None:
    port = free_port()
    nodes, clients = cluster(machines, f"127.0.0.1:{port}", [(), ()])
    made = chain(4)
    for key, data in made:
        assert clients[0].put(key, data)
    assert nodes[0].end() == 0
    nodes[1].end(signal.SIGKILL)
    machines.node(name="n1", store=f"127.0.0.1:{port}")
    store = machines.store(port=port)
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: all(direct.has([key for key, _ in made])))


def test_without_a_store_what_only_the_leaving_node_has_moves_on(machines: Machines) -> None:
    nodes, clients = cluster(machines, "", [(), (), ()])
    both, alone = chain(3, "both"), chain(3, "alone")
    for client in clients[:2]:
        for key, data in both:
            client.put(key, data)
    for key, data in alone:
        clients[0].put(key, data)
    wait_for(lambda: clients[2].get_many([k for k, _ in both]) == dict(both))
    assert nodes[0].end() == 0
    assert clients[1].get_many([key for key, _ in alone], 10.0) == dict(alone)
    assert sum(event(node, "handovers_taken") for node in nodes[1:]) >= len(alone)


def test_nobody_but_a_peer_is_taken_over_from_and_no_more_than_the_budget(
    machines: Machines,
) -> None:
    nodes, clients = cluster(machines, NOBODY, [("--handover-bytes", "10000"), ()])
    small, large = blob("small", size=4000), blob("large", size=9000)
    for key, data in (small, large):
        clients[1].put(key, data)
    told = told_of([(key, len(data), 0, None) for key, data in (small, large)])
    known = clients[1].status().incarnation
    request = peer_pb2.TakeOverRequest(node_id="n1", incarnation=known, blobs=told)
    with pytest.raises(FencedError):
        take_over(
            nodes[0], peer_pb2.TakeOverRequest(node_id="n1", incarnation=known - 1, blobs=told)
        )
    with pytest.raises(ProtocolError, match="no peer"):
        take_over(nodes[0], peer_pb2.TakeOverRequest(node_id="n9", incarnation=known, blobs=told))
    many = [told[0]] * (MAX_BLOBS + 1)
    with pytest.raises(ProtocolError, match="at most"):
        take_over(nodes[0], peer_pb2.TakeOverRequest(node_id="n1", incarnation=known, blobs=many))
    assert take_over(nodes[0], request) == [True, False]
    assert event(nodes[0], "handovers_over_budget") == 1
    # What the other one does not have, or is of another size, is not taken.
    odd = told_of([(blob("nowhere")[0], 100, 0, None), (large[0], 77, 0, None)])
    wrong = peer_pb2.TakeOverRequest(node_id="n1", incarnation=known, blobs=odd)
    assert take_over(nodes[0], wrong) == [False, False]
    assert clients[0].status().uploads_pending == 1


def test_what_is_read_often_is_copied_once_it_is_quiet(machines: Machines) -> None:
    store = machines.store()
    options = ("--copies", "2", "--copy-bytes-per-hour", "200000")
    nodes, clients = cluster(machines, store.address, [options, options])
    hot, cold, huge = blob("hot", size=50_000), blob("cold"), blob("huge", size=300_000)
    for key, data in (hot, cold, huge):
        clients[0].put(key, data)
    assert clients[0].flush(20.0)
    for _ in range(4):
        assert clients[0].get(hot[0]) == hot[1]
        assert clients[0].get(huge[0]) == huge[1]
    clients[0].get(cold[0])
    wait_for(lambda: event(nodes[0], "copies_made") == 1)
    assert event(nodes[1], "copies_taken") == 1
    # It is the second node's own now.
    store.end(signal.SIGKILL)
    nodes[0].end(signal.SIGKILL)
    assert clients[1].get(hot[0]) == hot[1]
    assert event(nodes[1], "hits_memory") + event(nodes[1], "hits_disk") >= 1
