"""The optimizer inside a coordinator that serves: heartbeats in, policies out."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from optimizer_samples import GB, MB, MODEL, curve

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator import Coordinator
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.coordinator_service import start_coordinator
from kvferry.cluster.curves import curve_id
from kvferry.cluster.optimizer.rules import base_of
from kvferry.errors import ProtocolError
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import CoordinatorSettings


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[tuple[Coordinator, CoordinatorClient]]:
    settings = CoordinatorSettings(listen="127.0.0.1:0", data_dir=folder)
    coordinator = await Coordinator.open(settings)
    up = await start_coordinator(coordinator, settings)
    try:
        async with CoordinatorClient(up.addresses[0]) as client:
            yield coordinator, client
    finally:
        await up.stop()


def beat(node: str, layers: tuple[int, int], speed: float, **more: object) -> pb.HeartbeatRequest:
    shard = pb.ShardInfo(
        model_id=MODEL, layer_start=layers[0], layer_end=layers[1], curve_id=curve_id(curve())
    )
    link = pb.LinkSample(to="store", bytes_per_s=speed, latency_s=0.001)
    return pb.HeartbeatRequest(node_id=node, incarnation=1, shards=[shard], links=[link], **more)  # type: ignore[arg-type]


async def told(client: CoordinatorClient, *beats: pb.HeartbeatRequest) -> None:
    """As nodes do: register where unknown, beat, and tell the curves that are asked for."""
    for request in beats:
        reply = await client.heartbeat(request)
        if not reply.known:
            joined = pb.RegisterRequest(node_id=request.node_id, incarnation=1)
            await client.register(joined)
            reply = await client.heartbeat(request)
        if reply.wanted_curves:
            assert list(reply.wanted_curves) == [curve_id(curve())]
            again = pb.HeartbeatRequest()
            again.CopyFrom(request)
            again.curves.append(curve())
            assert not (await client.heartbeat(again)).wanted_curves


async def until(
    client: CoordinatorClient, what: Callable[[pb.Policy], bool], *beats: pb.HeartbeatRequest
) -> pb.Policy:
    async with asyncio.timeout(30):
        while True:
            await told(client, *beats)
            policy = (await client.explain(0)).policy
            if what(policy):
                return policy
            await asyncio.sleep(0.1)


async def decided(client: CoordinatorClient) -> pb.Decision:
    """Once the coordinator has looked again, with its own policy in force."""
    async with asyncio.timeout(30):
        while True:
            (decision,) = (await client.explain(8)).decisions
            if decision.why.startswith("decided"):
                return decision
            await asyncio.sleep(0.1)


def steps(policy: pb.Policy) -> dict[str, float]:
    return {r.node: float(r.options["step"]) for r in policy.rules if r.decided and r.node}


def decided_for_both(policy: pb.Policy) -> bool:
    return {"studio", "laptop"} <= set(steps(policy))


STUDIO, LAPTOP = beat("studio", (0, 4), GB), beat("laptop", (4, 8), 1 * MB)


async def test_links_and_curves_make_a_policy_that_is_pushed_kept_and_explained(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as (coordinator, client):
        watch = client.watch_policy("laptop")
        assert (await anext(watch)).version == 1
        policy = await until(client, decided_for_both, STUDIO, LAPTOP)
        async with asyncio.timeout(10):
            while await anext(watch) != policy:  # one of them may have been known before
                pass
        await watch.aclose()
        assert steps(policy)["studio"] < steps(policy)["laptop"]
        assert coordinator.policies.source == "optimizer"
        explained = await client.explain(8, MODEL, "laptop")
        assert "of the optimizer" in explained.layers[5].why
        assert "of the optimizer" not in explained.layers[0].why
        decision = await decided(client)
        assert (decision.slowest, len(decision.parts)) == ("laptop", 2)
        assert not (await client.explain(8, bytes(32))).decisions
    # Started anew it goes on with what was decided, before and after it knows its members.
    async with serving(tmp_path) as (coordinator, client):
        again = (await client.explain(0)).policy
        assert again == policy
        await asyncio.sleep(1.5)
        await told(client, STUDIO, LAPTOP)
        await asyncio.sleep(2.5)
        assert (await client.explain(0)).policy == policy
        # The operator's word replaces all of it, and is optimized in its turn.
        version = await client.set_policy(policies.named_policy("high_compression"))
        assert version == policy.version + 1
        coarse = await until(client, decided_for_both, STUDIO, LAPTOP)
        assert base_of(coarse).name == "high_compression"
        assert all(steps(coarse)[node] > steps(policy)[node] for node in steps(policy))


async def test_memory_pressure_switches_the_tier_and_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        base = policies.default_policy()
        base.switch.CopyFrom(pb.PressureSwitch(high_compression=0.8, hysteresis=0.1))
        await client.set_policy(base)
        full = beat("studio", (0, 4), GB, memory_used_share=0.9)
        tight = await until(client, lambda p: p.tier == "high_compression", full, LAPTOP)
        assert policies.rule_for(tight, bytes(32), 0).options["target_kl"] == "0.02"
        relaxed = await until(client, lambda p: not p.tier, STUDIO, LAPTOP)
        assert base_of(relaxed).rules == base.rules


async def test_what_is_computed_sooner_than_restored_is_not_stored_until_links_are_better(
    tmp_path: Path,
) -> None:
    def alone(speed: float) -> pb.HeartbeatRequest:
        rates = {"prefill_tokens_per_s": 1e5, "decode_tokens_per_s": 1e7, "near_bytes_per_s": 1e3}
        return beat("alone", (0, 8), speed, **rates, decode_values_per_s={"ferry": 1e10})

    def codec(policy: pb.Policy) -> str:
        return policies.rule_for(policy, MODEL, 0, "alone").codec

    async with serving(tmp_path) as (_, client):
        none = await until(client, lambda p: codec(p) == "none", alone(1e3))
        assert codec(policies.default_policy()) == "ferry"
        assert policies.rule_for(none, bytes(32), 0).codec == "ferry"
        (member,) = (await client.members()).members
        assert dict(member.last.decode_values_per_s) == {"ferry": 1e10}
    async with serving(tmp_path) as (_, client):  # the rule has come back with the policy
        assert codec((await client.explain(0)).policy) == "none"
        await until(client, lambda p: codec(p) == "ferry", alone(1e9))


async def test_a_decision_that_is_overtaken_is_not_put_in_force(tmp_path: Path) -> None:
    async with serving(tmp_path) as (coordinator, _):
        keeper = coordinator.policies
        exact = policies.named_policy("exact")
        await keeper.decide(exact, "admin")
        late = await keeper.decide(policies.default_policy(), "optimizer", based_on=1)
        assert (late.name, keeper.source) == ("exact", "admin")
        now = await keeper.decide(policies.default_policy(), "optimizer", based_on=2)
        assert (now.version, keeper.source) == (3, "optimizer")


@pytest.mark.parametrize("bad", ["curve", "many", "heads", "id"])
async def test_curves_and_shards_against_the_contract_are_refused(tmp_path: Path, bad: str) -> None:
    request = beat("a", (0, 4), MB)
    if bad == "curve":
        request.curves.add()
    elif bad == "many":
        request.curves.extend([curve()] * 5)
    elif bad == "heads":
        request.shards[0].head_start = 3
    else:
        request.shards[0].curve_id = b"short"
    async with serving(tmp_path) as (_, client):
        await client.register(pb.RegisterRequest(node_id="a", incarnation=1))
        with pytest.raises(ProtocolError):
            await client.heartbeat(request)
