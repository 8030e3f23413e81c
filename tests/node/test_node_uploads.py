"""What a hook puts reaches the store, whatever happens to either process meanwhile."""

import signal
import time

import pytest
from node_samples import ROOT, Machines, blob, chain, wait_for

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.repository import LookupQuery
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import (
    CorruptBlobError,
    FerryError,
    IdentityMismatchError,
    QueueFullError,
    StoreFullError,
)
from kvferry.proto.v1 import blob_pb2

pytestmark = pytest.mark.processes
NOBODY = "127.0.0.1:1"


def event(service: object, name: str) -> float:
    found: dict[str, float] = service.metrics()  # type: ignore[attr-defined]
    return found.get(f'kvferry_node_events_total{{event="{name}"}}', 0.0)


def test_accepted_put_reaches_the_store(machines: Machines) -> None:
    store = machines.store()
    node = machines.node(store=store.address)
    client = machines.client()
    made = chain(3)
    for key, data in made:
        assert client.put(key, data)
    assert client.flush(30.0)
    with SyncBlobStoreClient(store.address) as direct:
        assert [bytes(direct.get(key)) for key, _ in made] == [data for _, data in made]
    assert client.has([made[0][0], blob("other")[0]]) == [True, False]
    query = LookupQuery(root=ROOT, page_keys=[key.page_key for key, _ in made])
    found = client.lookup(query)
    assert found.complete_pages == 3
    assert not found.partial
    assert client.get_many([key for key, _ in made]) == dict(made)
    assert event(node, "uploads_done") == 3
    assert event(node, "puts_accepted") == 3
    assert client.status().store_reachable


def test_store_that_comes_up_later_gets_it(machines: Machines) -> None:
    port = free_port()
    machines.node(store=f"127.0.0.1:{port}")
    client = machines.client()
    key, data = blob("early")
    assert client.put(key, data)
    assert not client.flush(0.3)
    assert client.status().uploads_pending == 1
    store = machines.store(port=port)
    assert client.flush(40.0)
    with SyncBlobStoreClient(store.address) as direct:
        assert bytes(direct.get(key)) == data


@pytest.mark.parametrize(
    ("end", "tiers"),
    [
        (signal.SIGTERM, []),
        (signal.SIGKILL, []),
        (signal.SIGTERM, ["--disk-bytes", "0"]),
    ],
)
def test_restarted_daemon_goes_on_uploading(
    machines: Machines, end: signal.Signals, tiers: list[str]
) -> None:
    port = free_port()
    where = f"127.0.0.1:{port}"
    node = machines.node(*tiers, store=where)
    client = machines.client()
    made = chain(4)
    for key, data in made:
        assert client.put(key, data)
    code = node.end(end)
    assert code == (0 if end is signal.SIGTERM else -signal.SIGKILL), node.log.read_text()
    store = machines.store(port=port)
    again = machines.node(*tiers, store=where)
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: all(direct.has([key for key, _ in made])))
        assert [bytes(direct.get(key)) for key, _ in made] == [data for _, data in made]
    wait_for(lambda: client.status().uploads_pending == 0)
    assert event(again, "uploads_done") == 4
    assert not list((machines.folder / "n0" / "spool").glob("*"))


def test_full_queue_drops_and_counts(machines: Machines) -> None:
    node = machines.node("--upload-queue-bytes", "10000", store=NOBODY)
    client = machines.client()
    made = [blob(str(i), size=4000) for i in range(3)]
    assert client.put(*made[0])
    assert client.put(*made[1])
    for _ in range(3):
        with pytest.raises(QueueFullError):
            client.put(*made[2])
    assert event(node, "drop_queue_full") == 3
    assert client.status().uploads_pending == 2


def test_refused_puts_give_their_room_back(machines: Machines) -> None:
    node = machines.node("--upload-queue-bytes", "10000", store=NOBODY)
    client = machines.client()
    key, data = blob("good", size=6000)
    damaged = bytearray(data)
    damaged[-40] ^= 1
    for _ in range(5):
        with pytest.raises(CorruptBlobError):
            client.put(key, bytes(damaged))
        with pytest.raises(IdentityMismatchError):
            client.put(blob("another")[0], data)
    assert client.put(key, data)
    with pytest.raises(QueueFullError):
        client.put(*blob("too much", size=6000))
    assert client.status().uploads_pending == 1
    assert event(node, "drop_corrupt") == 5
    assert event(node, "drop_identity") == 5


def test_store_that_refuses_has_the_last_word(machines: Machines) -> None:
    store = machines.store("--budget-bytes", "600000")
    node = machines.node(store=store.address)
    client = machines.client()
    key, data = blob("too large for it", size=700_000)
    assert client.put(key, data)
    assert client.flush(20.0)
    # It is not offered again at once.
    assert client.has([key, blob("another")[0]]) == [True, False]
    assert event(node, "upload_refused_full") == 1
    assert client.put(*blob("small"))
    assert client.flush(20.0)
    assert event(node, "uploads_done") == 1


def test_without_a_store_the_node_is_one(machines: Machines) -> None:
    machines.node("--upload-queue-bytes", "10000")
    client = machines.client()
    made = chain(6)
    for key, data in made:
        assert client.put(key, data)
    assert client.flush(1.0)
    query = LookupQuery(root=ROOT, page_keys=[key.page_key for key, _ in made])
    assert client.lookup(query).complete_pages == 6
    assert client.hello().namespace_salt == client.hello().namespace_salt != b""


def test_memory_only_node_refuses_beyond_its_budget(machines: Machines) -> None:
    machines.node("--disk-bytes", "0", "--memory-bytes", "10000", store=NOBODY)
    client = machines.client()
    assert client.put(*blob("a", size=6000))
    with pytest.raises(StoreFullError):
        client.put(*blob("b", size=6000))
    status = client.status()
    assert [(t.name, t.budget_bytes) for t in status.tiers] == [("memory", 10_000)]
    assert status.tiers[0].bytes <= 10_000


def test_pending_blobs_are_not_evicted(machines: Machines) -> None:
    machines.node(
        "--disk-bytes", "1500000", "--memory-bytes", "200000", "--upload-queue-bytes", "9000000",
        store=NOBODY,
    )  # fmt: skip
    client = machines.client()
    accepted = {}
    for i in range(30):
        key, data = blob(str(i), size=100_000)
        try:
            client.put(key, data)
        except StoreFullError:
            break
        accepted[key] = data
    assert 2 <= len(accepted) < 30
    assert client.get_many(list(accepted)) == accepted


def test_replaced_tail_is_gone(machines: Machines) -> None:
    store = machines.store()
    machines.node(store=store.address)
    client = machines.client()
    kind = blob_pb2.BLOB_KIND_TAIL
    old, new = (blob(n, kind=kind, tokens=(0, t)) for n, t in (("old", 10), ("new", 20)))
    assert client.put(*old, ttl_s=600)
    assert client.flush(20.0)
    assert client.put(*new, ttl_s=600, replaces=old[0])
    assert client.flush(20.0)
    found = client.lookup(LookupQuery(root=ROOT, page_keys=[]))
    assert [tail.tail_key for tail in found.tails] == [new[0].page_key]
    with pytest.raises(FerryError):
        client.get(old[0])


def test_just_accepted_pages_are_found_at_once(machines: Machines) -> None:
    store = machines.store()
    machines.node(store=store.address)
    client = machines.client()
    made = chain(8, size=200_000)
    for key, data in made:
        client.put(key, data)
        query = LookupQuery(root=ROOT, page_keys=[k.page_key for k, _ in made])
        found = client.lookup(query)
        assert found.complete_pages == made.index((key, data)) + 1
        assert not found.partial


def test_stopped_store_delays_nobody_beyond_the_deadline(machines: Machines) -> None:
    store = machines.store()
    machines.node(store=store.address)
    client = machines.client(timeout_s=5.0)
    made = chain(2)
    for key, data in made:
        client.put(key, data)
    assert client.flush(20.0)
    store.send(signal.SIGSTOP)
    query = LookupQuery(root=ROOT, page_keys=[k.page_key for k, _ in made], layers=(0, 4))
    for _ in range(4):
        found = client.lookup(query)
        assert found.partial
        assert found.complete_pages == 2
    started = time.monotonic()
    answers = client.get_many([blob("nowhere")[0], made[0][0]], deadline_s=3.0)
    assert time.monotonic() - started < 6.0
    assert isinstance(answers[blob("nowhere")[0]], FerryError)
    assert answers[made[0][0]] == made[0][1]
    store.send(signal.SIGCONT)
    wait_for(lambda: not client.lookup(query).partial)
