"""Node daemons with peers and a coordinator, and without them."""

import asyncio
import signal
import stat
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from node_samples import ANY, MODEL, ROOT, Machines, Service, blob, chain, wait_for

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.repository import ListQuery, LookupQuery
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import FerryError, ProtocolError
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2

pytestmark = pytest.mark.processes
NOBODY = "127.0.0.1:1"


def event(service: Service, name: str) -> float:
    return service.metrics().get(f'kvferry_node_events_total{{event="{name}"}}', 0.0)


def two_nodes(machines: Machines, store: str, *options: str) -> tuple[Service, Service]:
    """Two daemons that know each other."""
    coordinator = machines.coordinator()
    nodes = [
        machines.node(*options, name=name, store=store, coordinator=coordinator.address)
        for name in ("n0", "n1")
    ]
    for name in ("n0", "n1"):
        client = machines.client(name)
        wait_for(lambda c=client: len(c.status().peers) == 1)
    return nodes[0], nodes[1]


def test_peers_exchange_blobs_without_a_store(machines: Machines) -> None:
    _, second = two_nodes(machines, NOBODY)
    low, high = chain(3, layers=(0, 2)), chain(3, layers=(2, 4))
    for (a, b), (c, d) in zip(low, high, strict=True):
        machines.client("n0").put(a, b)
        machines.client("n1").put(c, d)
    asked = [key.page_key for key, _ in low]
    client = machines.client("n1")
    # The second machine now wants layers that lie with both.
    found = client.lookup(LookupQuery(root=ROOT, page_keys=asked, layers=(1, 3)))
    assert found.partial
    assert found.complete_pages == 3
    assert {info.key for page in found.pages for info in page} == {k for k, _ in low + high}
    assert client.get_many([k for k, _ in low]) == dict(low)
    assert event(second, "hits_peer") == 3
    assert client.get_many([k for k, _ in low]) == dict(low)
    assert event(second, "hits_peer") == 3
    # A chain with a hole in the layers ends there.
    assert client.lookup(LookupQuery(root=ROOT, page_keys=[*asked[:1], bytes(32)])).partial


def test_damaged_blob_of_a_peer_is_taken_from_the_store(machines: Machines) -> None:
    store = machines.store()
    # No memory tier: what the peer sends comes from its disk.
    options = ("--memory-bytes", "0", "--holdings-interval-s", "0.2")
    first, second = two_nodes(machines, store.address, *options)
    key, data = blob("damaged", size=50_000)
    assert machines.client("n0").put(key, data)
    assert machines.client("n0").flush(20.0)
    asked = event(second, "holdings_asked")
    wait_for(lambda: event(second, "holdings_asked") >= asked + 2)
    (file,) = (machines.folder / "n0" / "blobs" / "blobs").rglob("page-*")
    changed = bytearray(file.read_bytes())
    changed[20_000] ^= 0x40
    file.write_bytes(changed)
    client = machines.client("n1")
    # The store is held up until the peer has been asked, however quick it is otherwise.
    store.send(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as threads:
        got = threads.submit(client.get, key)
        wait_for(lambda: sum(event(second, f"peer_{r}") for r in ("corrupt", "not_found")))
        store.send(signal.SIGCONT)
        assert got.result(20) == data
    assert event(second, "hits_store") == 1
    assert event(second, "hits_peer") == 0
    assert sum(event(second, f"peer_{r}") for r in ("corrupt", "not_found")) >= 1
    assert event(first, "corrupt_disk") == 1
    # The peer itself heals from the store too.
    assert machines.client("n0").get(key) == data


def test_stopped_peer_costs_little(machines: Machines) -> None:
    store = machines.store()
    first, _ = two_nodes(machines, store.address)
    made = chain(6)
    for key, data in made:
        machines.client("n0").put(key, data)
    assert machines.client("n0").flush(20.0)
    first.send(signal.SIGSTOP)
    started = time.monotonic()
    assert machines.client("n1").get_many([k for k, _ in made], 15.0) == dict(made)
    assert time.monotonic() - started < 10.0
    first.send(signal.SIGCONT)


def test_others_can_only_read(machines: Machines) -> None:
    node = machines.node()
    key, data = blob("own")
    machines.client().put(key, data)
    with SyncBlobStoreClient(node.address) as peer:
        assert peer.has([key]) == [True]
        assert bytes(peer.get(key)) == data
        for call in (
            lambda: peer.put(*blob("foreign")),
            lambda: peer.delete([key]),
            lambda: peer.pin([key], 60),
            lambda: peer.commit([key]),
        ):
            with pytest.raises(ProtocolError):
                call()
    with pytest.raises(ProtocolError):
        machines.client()._blobs.put(*blob("staged"), stage=True)


POLICY = """
name = "{name}"
when = ["after_prefill", "memory_pressure", "idle"]
memory_mark = {mark}
idle_s = {idle}

[[rules]]
codec = "zstd"

[tail]
codec = "raw"
ttl_s = 600
"""


class Events:
    """What a hook's watch has heard."""

    def __init__(self) -> None:
        self.heard: list[node_pb2.NodeEvent] = []
        self._lock = threading.Lock()

    def __call__(self, event: node_pb2.NodeEvent) -> None:
        with self._lock:
            self.heard.append(event)

    @property
    def policies(self) -> list[str]:
        return [e.policy.name for e in self.heard if e.HasField("policy")]

    @property
    def triggers(self) -> list[int]:
        return [e.trigger for e in self.heard if e.HasField("trigger")]

    @property
    def salts(self) -> list[bytes]:
        return [e.namespace_salt for e in self.heard if e.namespace_salt]


def test_policy_and_salt_reach_hooks_and_outlive_the_coordinator(machines: Machines) -> None:
    file = machines.folder / "policy.toml"
    file.write_text(POLICY.format(name="first", mark=1.0, idle=3600))
    port = free_port()
    coordinator = machines.coordinator("--policy-file", str(file), port=port)
    node = machines.node(coordinator=coordinator.address)
    client, events = machines.client(), Events()
    client.watch(events)
    wait_for(lambda: "first" in events.policies and events.salts)
    file.write_text(POLICY.format(name="second", mark=1.0, idle=3600))
    wait_for(lambda: events.policies[-1] == "second")
    salt = client.hello().namespace_salt
    assert salt == events.salts[-1]
    assert stat.S_IMODE((machines.folder / "n0" / "salt").stat().st_mode) == 0o600
    before = client.status()
    assert before.coordinator_reachable
    assert coordinator.end() == 0
    wait_for(lambda: not client.status().coordinator_reachable)
    assert node.end() == 0
    # The next start knows the policy and the namespace without anybody.
    machines.node(coordinator=coordinator.address)
    hello = wait_for(client.hello)
    assert (hello.policy.name, hello.namespace_salt) == ("second", salt)
    assert client.status().incarnation > before.incarnation
    # And it registers by itself when the coordinator is back.
    machines.coordinator("--policy-file", str(file), port=port)
    wait_for(lambda: client.status().coordinator_reachable)
    # The watch came back by itself too.
    wait_for(lambda: events.policies[-1] == "second" and len(events.policies) >= 3)


def test_hooks_hear_of_pressure_idleness_and_sleep(machines: Machines) -> None:
    file = machines.folder / "policy.toml"
    file.write_text(POLICY.format(name="eager", mark=0.001, idle=1))
    coordinator = machines.coordinator("--policy-file", str(file))
    node = machines.node(coordinator=coordinator.address)
    client, events = machines.client(), Events()
    wait_for(lambda: client.hello().policy.name == "eager")
    client.watch(events)
    wait_for(lambda: events.policies)
    client.has([blob("any")[0]])
    wait_for(lambda: pb.TRIGGER_IDLE in events.triggers)
    assert event(node, "trigger_memory_pressure") == 1
    node.send(signal.SIGUSR1)
    wait_for(lambda: events.triggers.count(pb.TRIGGER_BEFORE_SLEEP) == 1)
    assert node.end() == 0
    wait_for(lambda: events.triggers.count(pb.TRIGGER_BEFORE_SLEEP) == 2)


def test_last_offers_at_the_end_are_kept(machines: Machines) -> None:
    port = free_port()
    node = machines.node(store=f"127.0.0.1:{port}")
    client = machines.client()
    key, data = blob("last moment")

    def offload(happened: node_pb2.NodeEvent) -> None:
        if happened.trigger == pb.TRIGGER_BEFORE_SLEEP:
            client.put(key, data)

    client.watch(offload)
    wait_for(lambda: event(node, "x") == 0 and node.metrics()["kvferry_node_hooks"] == 1)
    assert node.end() == 0
    store = machines.store(port=port)
    machines.node(store=store.address)
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: direct.has([key]) == [True])


def test_reports_are_counted_and_reach_the_coordinator(machines: Machines) -> None:
    coordinator = machines.coordinator()
    node = machines.node(coordinator=coordinator.address)
    client = machines.client()
    wait_for(lambda: client.status().coordinator_reachable)
    shard = pb.ShardInfo(model_id=MODEL, layer_start=0, layer_end=2)
    client.report(
        restore=pb.RestoreReport(
            model_id=MODEL, tokens=512, bytes=9, seconds=0.1, outcome="restored"
        ),
        misses={"corrupt": 2, "no reason at all\n": 1},
        prefill_tokens_per_s=120.0,
        decode_values_per_s={"ferry": 1e8, "no codec\n": 1.0},
        near_bytes_per_s=1e9,
        shard=shard,
    )
    wait_for(lambda: event(node, "hook_miss_corrupt") == 2)
    assert event(node, "hook_restores") == 1
    wait_for(lambda: any("restore" in k and v for k, v in coordinator.metrics().items()))

    async def told() -> pb.HeartbeatRequest:
        async with CoordinatorClient(coordinator.address) as asking:
            return (await asking.members()).members[0].last

    wait_for(lambda: asyncio.run(told()).near_bytes_per_s == 1e9)
    assert dict(asyncio.run(told()).decode_values_per_s) == {"ferry": 1e8}


def test_calibrations_go_the_same_way(machines: Machines) -> None:
    from kvferry.proto import container
    from kvferry.proto.v1 import blob_pb2

    header = blob_pb2.BlobHeader(
        kind=blob_pb2.BLOB_KIND_CALIBRATION,
        model_id=MODEL,
        page_key=bytes(range(32)),
        codec=blob_pb2.CodecSpec(name="manifest", version=1),
    )
    raw = container.pack(header, [container.SectionData("x", b"abc", 3)])
    key = container.key_of(container.read_header(raw))
    store = machines.store()
    machines.node(store=store.address)
    client = machines.client()
    client.put(key, raw)
    client.flush(20.0)
    listed = client.list(ListQuery(model_id=MODEL, kind="calibration"))
    assert [info.key for info in listed] == [key]
    assert client.get(key) == raw
    store.end(signal.SIGKILL)
    assert [i.key for i in client.list(ListQuery(model_id=MODEL, kind="calibration"))] == [key]


def test_one_folder_one_daemon(machines: Machines) -> None:
    machines.node()
    with pytest.raises(AssertionError, match="no other"):
        machines.node("--socket", str(machines.folder / "other.sock"), "--listen", ANY)


def test_daemon_runs_without_mlx() -> None:
    import subprocess

    code = (
        "import sys, kvferry.node.daemon, kvferry.cli.node; "
        "print([m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_lm', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_client_without_a_daemon_fails_in_time(machines: Machines) -> None:
    client = machines.client("nobody", timeout_s=1.0)
    key, data = blob("x")
    client.report(misses={"x": 1})
    for call in (
        client.hello,
        client.status,
        lambda: client.put(key, data),
        lambda: client.get(key),
        lambda: client.has([key]),
        lambda: client.lookup(LookupQuery(root=ROOT, page_keys=[])),
        lambda: client.flush(0.1),
    ):
        with pytest.raises(FerryError):
            call()
    assert isinstance(client.get_many([key], 0.5)[key], FerryError)
    client.close()
    with pytest.raises(FerryError):
        client.hello()
    client.report(misses={"x": 1})
