"""Operator intent over real etcd: one version, one content; secrets the same for all."""

import asyncio
import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from etcd_servers import EtcdCluster, until

from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator_metrics import CoordinatorMetrics
from kvferry.cluster.election.election import Election
from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.intent_etcd import EtcdIntentStore
from kvferry.cluster.intent_file import FileIntentStore
from kvferry.cluster.policy_keeper import PolicyKeeper
from kvferry.errors import ConfigError, NotLeaderError, StoreUnavailableError
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = pytest.mark.processes
TTL_S = 4.0


class Voter:
    """What a coordinator has of it: an election, a store, a keeper, a folder."""

    def __init__(self, members: EtcdCluster, prefix: str, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.etcd = members.client()
        self.election = Election(self.etcd, "coordinator", folder.name, prefix=prefix, ttl_s=TTL_S)
        self.files = FileIntentStore(folder)
        self.store = EtcdIntentStore(self.etcd, prefix, lambda: self.election.tenure, self.files)
        self.keeper = PolicyKeeper(self.store, None, CoordinatorMetrics(dict))
        self.task = asyncio.ensure_future(self.election.run())

    async def wins(self) -> None:
        """Lead, and know all that was decided before."""
        async with asyncio.timeout(60):
            await self.election.won()
            await self.keeper.begin()

    async def end(self) -> None:
        """Resign."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.etcd.aclose()


@asynccontextmanager
async def _voters(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path, *names: str
) -> AsyncIterator[list[Voter]]:
    members.heal()
    made: list[Voter] = []
    try:
        for name in names:
            made.append(Voter(members, f"/{request.node.name}", tmp_path / name))
            await made[0].election.won()
        await made[0].wins()
        yield made
    finally:
        for voter in made:
            await voter.end()


async def test_a_successor_goes_on_where_the_last_one_was(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with _voters(members, request, tmp_path, "a", "b") as (a, b):
        assert a.keeper.policy.version == 1
        await a.keeper.decide(policies.named_policy("exact"), "admin")
        with pytest.raises(NotLeaderError):
            await b.keeper.decide(policies.named_policy("high_compression"), "admin")
        await a.end()
        await b.wins()
        assert (b.keeper.policy.name, b.keeper.policy.version) == ("exact", 2)
        assert b.keeper.source == "admin"
        new = await b.keeper.decide(policies.named_policy("high_compression"), "admin")
        assert new.version == 3


async def test_one_that_stands_by_follows(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with _voters(members, request, tmp_path, "a", "b") as (a, b):
        following = asyncio.ensure_future(b.keeper.follow())
        await a.keeper.decide(policies.named_policy("exact"), "admin")

        async def told() -> bool:
            return b.keeper.policy.name == "exact"

        await until(told)
        assert b.keeper.policy == a.keeper.policy
        # And has a copy of its own, to begin with should etcd be lost.
        assert json.loads((b.folder / "policy.json").read_text())["version"] == 2
        following.cancel()


async def test_a_deposed_leader_writes_nothing(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with _voters(members, request, tmp_path, "a", "b") as (a, b):
        tenure = a.election.tenure
        assert tenure is not None
        # One that has not noticed yet: it still believes in its tenure.
        stale = EtcdIntentStore(
            a.etcd, f"/{request.node.name}", lambda: tenure, FileIntentStore(tmp_path / "a")
        )
        assert await stale.read("policy") is not None
        a.task.cancel()
        await asyncio.gather(a.task, return_exceptions=True)
        await b.wins()
        before = await b.store.read("policy")
        with pytest.raises(NotLeaderError, match="ask the one at b"):
            await stale.write("policy", b"{}")
        assert await b.store.read("policy") == before


async def test_a_write_thought_lost_is_found_again(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with _voters(members, request, tmp_path, "a") as (a,):
        # What etcd carried out after our deadline looks as if another one had written it.
        unseen = EtcdIntentStore(
            a.etcd, f"/{request.node.name}", lambda: a.election.tenure, a.files
        )
        assert await unseen.write("quotas", b"1")
        assert await a.store.write("quotas", b"1")  # the same: so it was ours
        assert await unseen.write("quotas", b"2")
        assert not await a.store.write("quotas", b"3")
        assert await a.store.read("quotas") == b"2"
        assert await a.store.write("quotas", b"3")


async def test_documents_hold_what_was_written_and_no_more_than_a_mebibyte(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    async with _voters(members, request, tmp_path, "a") as (a,):
        assert await a.store.read("quotas") is None
        assert await a.store.write("quotas", b"one")
        assert await a.store.write("quotas", b"two")
        assert await a.store.read("quotas") == b"two"
        with pytest.raises(ConfigError, match="at most"):
            await a.store.write("quotas", bytes((1 << 20) + 1))
        for name in ("", "../policy", "Policy", "x" * 65):
            with pytest.raises(ConfigError):
                await a.store.read(name)


async def test_a_damaged_policy_is_set_aside(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prefix = f"/{request.node.name}"
    async with _voters(members, request, tmp_path, "a", "b") as (a, b):
        await a.keeper.decide(policies.named_policy("exact"), "admin")
        key = f"{prefix}/intent/policy".encode()
        await a.etcd.transact([], [ops.put(key, b"{not json")])
        await a.end()
        await b.wins()
        assert b.keeper.policy.name == "default"
        found = (await b.etcd.get(key + b".damaged")).item
        assert found is not None
        assert found.value == b"{not json"


async def test_an_empty_etcd_gets_what_a_coordinator_had_before(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # It was alone until now.
    alone = PolicyKeeper(FileIntentStore(tmp_path), None, CoordinatorMetrics(dict))
    await alone.begin()
    await alone.decide(policies.named_policy("exact"), "admin")
    salt = await FileIntentStore(tmp_path).salt("default")
    (tmp_path / "a").symlink_to(tmp_path)
    async with _voters(members, request, tmp_path, "a", "b") as (a, b):
        assert (a.keeper.policy.name, a.keeper.policy.version) == ("exact", 2)
        assert await a.store.kept_salt("default") == salt
        await a.end()
        await b.wins()
        assert (b.keeper.policy.name, b.keeper.policy.version) == ("exact", 2)
        assert await b.store.salt("default") == salt


async def test_all_get_the_same_salt_and_another_one_is_refused(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prefix = f"/{request.node.name}"
    members.heal()
    stores = []
    for place in range(4):
        (tmp_path / f"{place}").mkdir()
        files = FileIntentStore(tmp_path / f"{place}")
        stores.append(EtcdIntentStore(members.client(), prefix, lambda: None, files))
    assert await stores[0].kept_salt("default") == b""
    salts = await asyncio.gather(*(store.salt("default") for store in stores))
    assert len(set(salts)) == 1
    assert len(salts[0]) == 32
    assert await stores[1].salt("team") != salts[0]
    assert await FileIntentStore(tmp_path / "3").kept_salt("default") == salts[0]
    (tmp_path / "other").mkdir()
    other = FileIntentStore(tmp_path / "other")
    await other.salt("default")
    joining = EtcdIntentStore(members.client(), prefix, lambda: None, other)
    with pytest.raises(ConfigError, match="move it away"):
        await joining.kept_salt("default")


async def test_a_salt_that_a_node_brings_holds_where_there_is_none(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    members.heal()
    store = EtcdIntentStore(
        members.client(), f"/{request.node.name}", lambda: None, FileIntentStore(tmp_path)
    )
    brought = bytes(range(32))
    assert await store.salt("default", brought) == brought
    assert await store.salt("default", bytes(32)) == brought


@pytest.mark.long
async def test_racing_decisions_never_give_one_version_two_contents(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two that take turns, are deposed in the middle of deciding, and an etcd member dies."""
    rng = random.Random(7)
    given: dict[int, set[bytes]] = {}
    prefix = f"/{request.node.name}"

    def note(policy: pb.Policy) -> None:
        given.setdefault(policy.version, set()).add(policy.SerializeToString(deterministic=True))

    async def decide_on(voter: Voter, end: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            try:
                async with asyncio.timeout(max(0.01, end - loop.time())):
                    await voter.election.won()
                    await voter.keeper.begin()
                    for _ in range(rng.randrange(1, 12)):
                        wanted = policies.default_policy()
                        wanted.name = f"p{rng.randrange(1 << 30)}"
                        note(await voter.keeper.decide(wanted, "admin"))
                    # Deposed without being told: others may win while we still decide.
                    tenure = voter.election.tenure
                    if tenure is not None and (item := (await voter.etcd.get(tenure.key)).item):
                        await voter.etcd.revoke(item.lease)
            except (NotLeaderError, StoreUnavailableError, TimeoutError):
                await asyncio.sleep(0.05)

    async def kill_members(end: float) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(3)
        await asyncio.to_thread(members.leader().signal, signal.SIGKILL)
        await asyncio.sleep(max(0.0, end - loop.time() - 3))
        await asyncio.to_thread(members.heal)

    members.heal()
    voters = [Voter(members, prefix, tmp_path / name) for name in "ab"]
    end = asyncio.get_running_loop().time() + 12
    await asyncio.gather(kill_members(end), *(decide_on(v, end) for v in (*voters, *voters)))
    for voter in voters:
        await voter.end()
    assert len(given) > 20
    assert all(len(contents) == 1 for contents in given.values())
