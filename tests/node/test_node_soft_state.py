"""The coordinator is killed under load and comes back empty: nothing is lost, nothing is wrong."""

import asyncio
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from node_samples import MODEL, ROOT, Machines, Service, chain, wait_for

from kvferry.cli.cluster_bench.ports import free_port
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.repository import LookupQuery
from kvferry.errors import FerryError
from kvferry.node.client import NodeClient
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = [pytest.mark.processes, pytest.mark.long]
NODES = ("n0", "n1", "n2")
# Longer than it takes to look, so that heartbeats can be counted.
BEAT = ("--heartbeat-interval-s", "2")


class Load:
    """A thread that stores pages on one node and reads them on another, and checks every bit."""

    def __init__(self, writer: NodeClient, reader: NodeClient, name: str) -> None:
        self._writer, self._reader, self._name = writer, reader, name
        self.stored: list[tuple[BlobKey, bytes]] = []
        self.wrong: list[str] = []
        self.rounds = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._over.is_set():
            made = chain(2, f"{self._name}-{self.rounds}")
            try:
                for key, data in made:
                    self._writer.put(key, data)
                self.stored += made
                keys = [key.page_key for key, _ in made]
                found = self._reader.lookup(LookupQuery(root=ROOT, page_keys=keys))
                held = [info.key for page in found.pages for info in page]
                if held != [key for key, _ in made][: len(held)]:
                    self.wrong.append(f"lookup of round {self.rounds}")
                for key, data in made:
                    if self._reader.get(key) != data:
                        self.wrong.append(str(key))
            except FerryError as exc:
                self.wrong.append(f"round {self.rounds}: {exc}")
            self.rounds += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()


def members(coordinator: Service) -> dict[str, pb.Member]:
    async def ask() -> pb.MembersReply:
        async with CoordinatorClient(coordinator.address) as client:
            return await client.members()

    return {member.node_id: member for member in asyncio.run(ask()).members}


def whole(coordinator: Service) -> bool:
    """Whether it knows of every node all that it did."""
    found = members(coordinator)
    return set(found) == set(NODES) and all(
        member.state == "ready"
        and [s.model_id for s in member.last.shards] == [MODEL]
        and {link.to for link in member.last.links} == {"store", *NODES} - {name}
        for name, member in found.items()
    )


def keep_intent(data: Path) -> None:
    """Membership was never written down: what an operator would restore is all there is."""
    kept = {path.relative_to(data).parts[0] for path in data.rglob("*") if path.is_file()}
    assert kept == {"lock", "namespaces", "policy.json"}


def lose_all(data: Path) -> None:
    shutil.rmtree(data)


@pytest.mark.parametrize("lose", [keep_intent, lose_all])
def test_killed_under_load_it_comes_back_empty_and_knows_all_again(
    machines: Machines, lose: object
) -> None:
    port = free_port()
    store, coordinator = machines.store(), machines.coordinator(*BEAT, port=port)
    for name in NODES:
        machines.node(name=name, store=store.address, coordinator=coordinator.address)
    clients = {name: machines.client(name) for name in NODES}
    shard = pb.ShardInfo(model_id=MODEL, layer_start=0, layer_end=4)
    for client in clients.values():
        client.hello(shard)
    wait_for(lambda: whole(coordinator))
    salt = clients["n0"].hello().namespace_salt
    version = members(coordinator)["n0"].last.policy_version
    load = Load(clients["n0"], clients["n1"], "load")
    with load.running():
        wait_for(lambda: load.rounds > 5)
        coordinator.end(signal.SIGKILL)
        before = load.rounds
        wait_for(lambda: load.rounds > before + 5)
        lose(machines.folder / "coordinator")  # type: ignore[operator]
        again = machines.coordinator(*BEAT, port=port)
        wait_for(lambda: whole(again))
        beats = again.metrics()["kvferry_coordinator_heartbeats_total"]
        assert beats <= 2 * len(NODES)
        before = load.rounds
        wait_for(lambda: load.rounds > before + 5)
    assert not load.wrong
    # The namespace is the same, so everything stored is still found, here and elsewhere.
    assert {client.hello().namespace_salt for client in clients.values()} == {salt}
    fresh = machines.node(name="n3", store=store.address, coordinator=again.address)
    stranger = machines.client("n3")
    wait_for(lambda: stranger.hello().namespace_salt == salt)
    assert clients["n0"].flush(30.0)
    assert stranger.get_many([key for key, _ in load.stored]) == dict(load.stored)
    assert fresh.end() == 0
    # A policy that nodes have seen is not followed by an older one.
    wait_for(lambda: members(again)["n0"].last.policy_version >= version)
