"""How a node stands, over real processes: asleep, awake, drained, gone; found by name; exo."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from exo_samples import LAPTOP, giving, serving, state
from node_samples import ANY, Machines, Service, blob, wait_for

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.errors import QueueFullError
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = [pytest.mark.processes, pytest.mark.long]
T = TypeVar("T")


def members(coordinator: Service) -> dict[str, pb.Member]:
    async def ask() -> pb.MembersReply:
        async with CoordinatorClient(coordinator.address) as client:
            return await client.members()

    return {member.node_id: member for member in asyncio.run(ask()).members}


def member(coordinator: Service, node: str = "n0") -> pb.Member:
    """What is told of a node; empty where nothing is."""
    return members(coordinator).get(node, pb.Member())


def state_of(coordinator: Service, node: str = "n0") -> str:
    return member(coordinator, node).state


def kvferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def stays(what: Callable[[], T], value: T, looks: int = 20) -> None:
    """True at each of so many looks, a heartbeat or so apart from the first to the last."""
    for _ in range(looks):
        assert what() == value


def test_a_node_says_that_it_sleeps_wakes_and_ends(machines: Machines) -> None:
    # Nobody is away by silence here, so whatever is said was said.
    coordinator = machines.coordinator("--away-after-s", "3600")
    node = machines.node(coordinator=coordinator.address)
    other = machines.node(coordinator=coordinator.address, name="n1")
    wait_for(lambda: state_of(coordinator) == state_of(coordinator, "n1") == "ready")
    node.send(signal.SIGUSR1)
    wait_for(lambda: state_of(coordinator) == "away")
    wait_for(lambda: not machines.client("n1").status().peers)
    stays(lambda: state_of(coordinator), "away")
    node.send(signal.SIGUSR2)
    wait_for(lambda: state_of(coordinator) == "ready")
    wait_for(lambda: machines.client("n1").status().peers)
    # Work wakes it too: the sleep did not come.
    node.send(signal.SIGUSR1)
    wait_for(lambda: state_of(coordinator) == "away")
    machines.client().has([blob("any")[0]])
    wait_for(lambda: state_of(coordinator) == "ready")
    assert node.end() == 0
    assert state_of(coordinator) == "gone"
    machines.node(coordinator=coordinator.address)
    wait_for(lambda: state_of(coordinator) == "ready")
    # One that is killed says nothing.
    other.end(signal.SIGKILL)
    assert state_of(coordinator, "n1") == "ready"


def test_what_waited_is_uploaded_before_sleep(machines: Machines) -> None:
    port = free_port()
    coordinator = machines.coordinator()
    node = machines.node(store=f"127.0.0.1:{port}", coordinator=coordinator.address)
    key, data = blob("late")
    machines.client().put(key, data)
    store = machines.store(port=port)
    wait_for(lambda: state_of(coordinator) == "ready")
    node.send(signal.SIGUSR1)
    wait_for(lambda: state_of(coordinator) == "away")
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: direct.has([key]) == [True])


def test_a_drained_node_takes_nothing_and_leaves_nothing_behind(machines: Machines) -> None:
    port = free_port()
    coordinator = machines.coordinator()
    machines.node(store=f"127.0.0.1:{port}", coordinator=coordinator.address)
    client, where = machines.client(), ("--coordinator", coordinator.address)
    (key, data), late = blob("kept"), blob("late")
    client.put(key, data)
    wait_for(lambda: state_of(coordinator) == "ready")
    # The store is down: what waits for it is only here, so it is not drained.
    done = kvferry("drain", "n0", *where, "--timeout-s", "2")
    assert (done.returncode, done.stdout) == (1, "n0: draining\n"), done.stderr
    with pytest.raises(QueueFullError):
        client.put(*late)
    store = machines.store(port=port)
    done = kvferry("drain", "n0", *where, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"node_id": "n0", "state": "draining", "drained": True}
    with SyncBlobStoreClient(store.address) as direct:
        assert direct.has([key, late[0]]) == [True, False]
    assert client.get(key) == data  # it still serves
    told = kvferry("status", *where, "--socket", str(machines.socket()), "--store", store.address)
    assert "n0: drained" in told.stdout
    assert "takes no new blobs" in told.stdout
    assert kvferry("drain", "n0", "--undo", *where).returncode == 0
    wait_for(lambda: state_of(coordinator) == "ready")
    assert client.put(*late)
    gone = kvferry("drain", "nobody", *where)
    assert gone.returncode == 2
    assert "the name of a member (n0)" in gone.stderr


def test_without_a_store_what_a_drained_node_had_is_on_its_peer(machines: Machines) -> None:
    coordinator = machines.coordinator()
    for name in ("n0", "n1"):
        machines.node(coordinator=coordinator.address, name=name)
    wait_for(lambda: machines.client().status().peers)
    made = [blob(f"sole {number}") for number in range(5)]
    for key, data in made:
        machines.client().put(key, data)
    done = kvferry("drain", "n0", "--coordinator", coordinator.address)
    assert (done.returncode, done.stdout) == (0, "n0: drained\n"), done.stderr
    with SyncBlobStoreClient(member(coordinator, "n1").address) as peer:
        assert peer.has([key for key, _ in made]) == [True] * 5


def test_orders_and_what_seldom_changes_outlive_the_coordinator(machines: Machines) -> None:
    port = free_port()
    coordinator = machines.coordinator(port=port)
    store = machines.store()
    with serving(giving(state())) as url:
        machines.node("--exo-url", url, store=store.address, coordinator=coordinator.address)
        wait_for(lambda: member(coordinator).last.exo.reachable)
        done = kvferry("drain", "n0", "--coordinator", coordinator.address)
        assert (done.returncode, done.stdout) == (0, "n0: drained\n")
        coordinator.end(signal.SIGKILL)
        again = machines.coordinator(port=port)
        wait_for(lambda: member(again).drained)
        assert state_of(again) == "draining"
        assert member(again).last.exo.reachable


def test_without_addresses_store_and_coordinator_are_found(machines: Machines) -> None:
    pytest.importorskip("zeroconf")
    name = ("--discovery", uuid4().hex)
    node = machines._run(
        "n0", "node", "--listen", ANY, "--metrics-listen", ANY, "--node-id", "n0",
        "--socket", str(machines.socket()), "--data-dir", str(machines.folder / "n0"),
        "--disk-reserve-bytes", "0", *name,
    )  # fmt: skip
    client = machines.client()
    key, data = blob("early")
    machines.store("--discovery", uuid4().hex, name="foreign")
    coordinator = machines.coordinator(*name)
    wait_for(lambda: client.status().coordinator_reachable)
    # Nobody has found a store: what is put waits for it.
    client.put(key, data)
    assert not client.status().store_reachable
    store = machines.store(*name)
    with SyncBlobStoreClient(store.address) as direct:
        wait_for(lambda: direct.has([key]) == [True])
    assert state_of(coordinator) == "ready"
    # It comes back somewhere else.
    store.end()
    moved = machines.store(*name, port=free_port())
    assert moved.address != store.address
    later = blob("later")
    client.put(*later)
    with SyncBlobStoreClient(moved.address) as direct:
        wait_for(lambda: direct.has([later[0]]) == [True])
    assert node.process.poll() is None


def test_links_kinds_and_exo_reach_the_coordinator_and_the_screen(machines: Machines) -> None:
    store, coordinator = machines.store(), machines.coordinator()
    with serving(giving(state())) as url:
        machines.node("--exo-url", url, store=store.address, coordinator=coordinator.address)
        wait_for(lambda: member(coordinator).last.exo.reachable)
        (link,) = wait_for(lambda: [k for k in member(coordinator).last.links if k.bytes_per_s])
        assert (link.to, link.kind, link.probed) == ("store", "loopback", True)
        assert link.age_s > 0
        where = ["--socket", str(machines.socket()), "--store", store.address]
        where += ["--coordinator", coordinator.address]
        found: dict[str, Any] = json.loads(kvferry("status", *where, "--json", "-").stdout)
        (told,) = found["coordinator"]["members"]
        assert told["exo"]["nodes"][1]["node_id"] == LAPTOP
        assert told["links"][0]["kind"] == "loopback"
        assert found["node"]["exo"]["shards"][0]["layer_end"] == 32
        screen = kvferry("status", *where).stdout
        for part in ("loopback", "MiB/s", "Ada's", "Qwen3-30B"):
            assert part in screen, screen
    # exo ends, and the next heartbeat after that says so.
    wait_for(lambda: not member(coordinator).last.exo.reachable)


def test_a_blob_measures_its_link_by_itself(machines: Machines) -> None:
    store, coordinator = machines.store(), machines.coordinator()
    machines.node(
        "--probe-bytes-per-hour", "0", store=store.address, coordinator=coordinator.address
    )
    client = machines.client()
    client.put(*blob("large", size=400_000))
    assert client.flush(20.0)
    (link,) = wait_for(lambda: [k for k in member(coordinator).last.links if k.age_s])
    assert link.bytes_per_s > 0
    assert not link.probed
