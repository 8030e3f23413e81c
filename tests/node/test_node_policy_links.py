"""Two machines, one behind a slow link: what the optimizer decides is what is stored."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
from curve_samples import GROUPS, MODEL, Cache, calibration, shard
from node_samples import Machines, blob, wait_for
from slow_link import SlowLink

from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.curves import curve_id
from kvferry.cluster.repository import ListQuery, LookupQuery
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.node.client import NodeClient
from kvferry.node.coding import page_coding
from kvferry.node.curve import model_curve
from kvferry.node.offers import Coding, Offer, Offers
from kvferry.proto.keys import page_keys
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2

pytestmark = pytest.mark.processes

TOKENS = tuple(range(3 * 256 + 128))
SALT = b"s" * 32
T = TypeVar("T")


class Rank:
    """What a hook does about its layers, without a model."""

    def __init__(self, client: NodeClient, layers: tuple[int, int]) -> None:
        self.client, self.shard = client, shard(layers)
        self.set, self.groups = calibration()
        self.policy = pb.Policy()
        self.counters: Counter[str] = Counter()
        client.watch(self._on_event)
        curve = model_curve(self.set)
        assert curve is not None
        info = pb.ShardInfo(
            model_id=MODEL, layer_start=layers[0], layer_end=layers[1], curve_id=curve_id(curve)
        )
        client.tell(info, curve)

    def _on_event(self, event: node_pb2.NodeEvent) -> None:
        if event.HasField("policy"):
            self.policy = event.policy

    @property
    def decided(self) -> bool:
        node = self.client.hello().node_id
        return any(rule.node == node for rule in self.policy.rules)

    def offer(self) -> None:
        """Code and store the pages of `TOKENS` as the policy has them now."""
        policy, node = self.policy, self.client.hello().node_id
        pages = page_coding(
            policy, self.shard, self.set, lambda known, _, __: self.groups[known], node
        )
        coding = Coding(self.shard, self.shard.root(SALT), pages, None, 60)
        offers = Offers(self.client, lambda: coding, self.counters)
        assert offers.submit(Offer(TOKENS, Cache()))
        assert offers.close(30.0)
        assert self.client.flush(30.0)


def ask(port: int, question: Callable[[CoordinatorClient], Awaitable[T]]) -> T:
    async def run() -> T:
        async with CoordinatorClient(f"127.0.0.1:{port}") as client:
            return await question(client)

    return asyncio.run(run())


def measured_link(client: NodeClient) -> float:
    return next((link.bytes_per_s for link in client.status().links if link.to == "store"), 0.0)


def stored_steps(store: SyncBlobStoreClient) -> dict[tuple[int, int], set[float]]:
    found: dict[tuple[int, int], set[float]] = {}
    for batch in store.list(ListQuery(model_id=MODEL, kind="page")):
        for info in batch:
            found.setdefault(info.layers, set()).add(json.loads(info.codec.params_json)["step"])
    return found


def test_unlike_links_get_unlike_steps_and_the_store_shows_them(machines: Machines) -> None:
    store, coordinator = machines.store(), machines.coordinator()
    with (
        SlowLink(store.address, 400e3) as slow,
        SyncBlobStoreClient(store.address) as direct,
    ):
        for name, way in (("n0", store.address), ("n1", slow.address)):
            machines.node(name=name, store=way, coordinator=coordinator.address)
        ranks = [Rank(machines.client(f"n{i}"), layers) for i, layers in enumerate(GROUPS)]
        wait_for(lambda: all(rank.policy.name == "default" for rank in ranks))
        for place, rank in enumerate(ranks):  # real transfers measure the links
            rank.client.put(*blob(f"ballast {place}", size=200_000))
            assert rank.client.flush(30.0)
        assert measured_link(ranks[0].client) > 4 * measured_link(ranks[1].client) > 0
        wait_for(lambda: all(rank.decided for rank in ranks))
        for rank in ranks:
            rank.offer()
        steps = stored_steps(direct)
        assert set(steps) == set(GROUPS)
        (near,), (far,) = steps[GROUPS[0]], steps[GROUPS[1]]
        assert near < far
        keys = page_keys(ranks[0].shard.root(SALT), TOKENS)[:3]
        query = LookupQuery(root=ranks[0].shard.root(SALT), page_keys=keys)
        assert direct.lookup(query).complete_pages == 3
        sizes = {info.layers: info.size for info in direct.lookup(query).pages[0]}
        assert sizes[GROUPS[1]] < 0.9 * sizes[GROUPS[0]]
        # Under a coarser policy what is stored already does; under a finer one it does not.
        for name, stored in (("high_compression", 0), ("exact", 3)):
            before = ranks[1].counters["blobs_put"]
            machines.run("policy", "set", name, "--coordinator", coordinator.address)
            wait_for(lambda n=name: all(rank.policy.name == n for rank in ranks))
            ranks[1].offer()
            assert ranks[1].counters["blobs_put"] - before == stored
        assert ranks[1].counters["blobs_stored_finer"] == 3


def test_shards_and_curves_are_told_again_and_those_of_ended_hooks_forgotten(
    machines: Machines,
) -> None:
    store, coordinator = machines.store(), machines.coordinator()
    node = machines.node(store=store.address, coordinator=coordinator.address)
    rank = Rank(machines.client(), (0, 4))

    port = int(coordinator.address.rpartition(":")[2])

    def explained() -> pb.ExplainReply | None:
        reply = ask(port, lambda client: client.explain(4))
        return reply if reply.decisions else None

    def shards() -> list[list[tuple[int, int]]]:
        members = ask(port, lambda client: client.members()).members
        return [[(s.layer_start, s.layer_end) for s in m.last.shards] for m in members]

    assert wait_for(explained).decisions[0].nodes[0].node_id == "n0"
    # Coordinator and node start anew, with nothing but what is told to them.
    coordinator.end()
    machines.coordinator(port=port)
    assert wait_for(explained)
    node.end()
    machines.node(store=store.address, coordinator=coordinator.address)
    wait_for(lambda: rank.client.status().coordinator_reachable)
    wait_for(lambda: shards() == [[(0, 4)]])
    rank.client.close()
    wait_for(lambda: shards() == [[]])
