"""Two coordinator processes over three etcd members, and a node: one falls, the others go on."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from etcd_servers import EtcdCluster, until

from kvferry.cli.cluster_bench.coordinators import Coordinators
from kvferry.cli.cluster_bench.failover import leader_of
from kvferry.cluster import policy as policies
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.errors import NotLeaderError, StoreUnavailableError
from kvferry.node.client import NodeClient
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.long]
TTL_S = 3.0


@pytest.fixture
def coordinators(
    members: EtcdCluster, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Coordinators]:
    members.heal()
    flags = (
        "--etcd-prefix", f"/{request.node.name[:40]}", "--lease-ttl-s", f"{TTL_S:g}",
        "--heartbeat-interval-s", "0.3",
    )  # fmt: skip
    with Coordinators(tmp_path, members.endpoints, *flags) as running:
        yield running


@pytest.fixture
async def client(coordinators: Coordinators) -> AsyncIterator[CoordinatorClient]:
    async with CoordinatorClient(coordinators.addresses, timeout_s=30.0) as made:
        yield made


@pytest.fixture
def node(coordinators: Coordinators) -> Iterator[NodeClient]:
    with ExitStack() as stack:
        yield stack.enter_context(coordinators.start_node())


async def _roles(client: CoordinatorClient) -> dict[str, str]:
    said = await client.leadership()
    return {a: s.role if isinstance(s, pb.LeadershipReply) else "down" for a, s in said.items()}


async def _until_roles(client: CoordinatorClient, wanted: Callable[[dict[str, str]], bool]) -> None:
    async def reached() -> bool:
        return wanted(await _roles(client))

    await until(reached)


def _named(name: str) -> pb.Policy:
    policy = policies.default_policy()
    policy.name = name
    return policy


async def _push(client: CoordinatorClient, node: NodeClient, name: str) -> int:
    """The version that a policy of this name got, once the node has it."""
    version = await client.set_policy(_named(name))

    async def has_it() -> bool:
        return (await asyncio.to_thread(node.status)).policy_name == name

    await until(has_it)
    return version


async def test_pushes_go_on_when_the_leader_and_then_etcds_leader_is_killed(
    members: EtcdCluster,
    coordinators: Coordinators,
    client: CoordinatorClient,
    node: NodeClient,
) -> None:
    first = await leader_of(client)
    (second,) = set(coordinators.all) - {first}
    version = await _push(client, node, "one")
    salt = (await client.register(pb.RegisterRequest(node_id="x", incarnation=1))).namespace_salt
    term = client.term
    coordinators.signal(first, signal.SIGKILL)
    assert await _push(client, node, "two") == version + 1
    assert await leader_of(client) == second
    joined = await client.register(pb.RegisterRequest(node_id="x", incarnation=1))
    assert joined.namespace_salt == salt
    assert joined.term > term

    # The node has registered there by itself.
    async def registered() -> bool:
        return "n" in {m.node_id for m in (await client.members()).members}

    await until(registered)
    members.leader().signal(signal.SIGKILL)
    assert await _push(client, node, "three") == version + 2
    coordinators.start(first)
    await _until_roles(client, lambda roles: sorted(roles.values()) == ["leader", "standby"])


async def test_a_leader_that_stood_still_longer_than_its_lease_does_not_act(
    coordinators: Coordinators, client: CoordinatorClient, node: NodeClient
) -> None:
    first = await leader_of(client)
    await _push(client, node, "before")
    async with CoordinatorClient(first, timeout_s=30.0) as to_first:
        await to_first.members()
        term = to_first.term
        coordinators.signal(first, signal.SIGSTOP)
        # This one is on its way while it stands still, and is read when it goes on.
        late = asyncio.ensure_future(to_first.set_policy(_named("too late")))
        await asyncio.sleep(0.2)
        version = await _push(client, node, "meanwhile")
        coordinators.signal(first, signal.SIGCONT)
        try:
            # The old leader refuses it, or sends us to the new one, which may take it.
            assert await late > version
            assert to_first.term > term
        except NotLeaderError:
            assert (await client.explain(0)).policy.name == "meanwhile"
    await _until_roles(client, lambda roles: roles[first] == "standby")
    assert await leader_of(client) != first
    newest = await _push(client, node, "after")
    assert newest > version

    async def knows() -> bool:
        said = (await client.leadership())[first]
        return isinstance(said, pb.LeadershipReply) and said.leader == await leader_of(client)

    await until(knows)
    await _until_follows(client, first, newest)


async def _until_follows(client: CoordinatorClient, address: str, version: int) -> None:
    """A standby knows what the leader decided."""

    async def follows() -> bool:
        said = (await client.leadership())[address]
        return isinstance(said, pb.LeadershipReply) and said.policy_version == version

    await until(follows)


async def test_without_etcd_nobody_leads_and_it_comes_back_by_itself(
    members: EtcdCluster, coordinators: Coordinators, client: CoordinatorClient, node: NodeClient
) -> None:
    version = await _push(client, node, "before")
    members.signal(signal.SIGKILL)
    await _until_roles(client, lambda roles: "leader" not in roles.values())
    assert set((await _roles(client)).values()) == {"standby"}
    async with CoordinatorClient(coordinators.addresses, timeout_s=2.0) as hasty:
        with pytest.raises(StoreUnavailableError):
            await hasty.set_policy(_named("never"))
    assert node.status().policy_name == "before"
    await asyncio.to_thread(members.heal)
    assert await _push(client, node, "again") > version


async def test_an_etcd_that_was_set_up_anew_is_filled_from_copies(
    members: EtcdCluster, coordinators: Coordinators, client: CoordinatorClient, node: NodeClient
) -> None:
    joined = await client.register(pb.RegisterRequest(node_id="x", incarnation=1))
    for place in range(5):
        version = await _push(client, node, f"before {place}")
    for address in coordinators.all:
        await _until_follows(client, address, version)
    await asyncio.to_thread(members.forget)
    await asyncio.to_thread(members.heal)
    # Its revisions begin at 1 again, and yet no term and no version goes back. One that
    # only commands is new each time; those that stay are nodes, and register.
    async with CoordinatorClient(coordinators.addresses, timeout_s=30.0) as fresh:
        assert await _push(fresh, node, "after") > version
        again = await fresh.register(
            pb.RegisterRequest(node_id="x", incarnation=2, policy_version=version)
        )
    assert again.namespace_salt == joined.namespace_salt
    assert (
        await client.register(pb.RegisterRequest(node_id="y", incarnation=1))
    ).term > joined.term


def _kvferry(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvferry", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


async def test_commands_take_several_addresses_and_tell_who_leads(
    coordinators: Coordinators, client: CoordinatorClient
) -> None:
    leader = await leader_of(client)
    # The standby first: it must not matter.
    both = ",".join(sorted(coordinators.all, key=lambda address: address == leader))
    done = await asyncio.to_thread(_kvferry, "policy", "set", "exact", "--coordinator", both)
    assert done.returncode == 0, done.stderr
    shown = await asyncio.to_thread(
        _kvferry, "policy", "show", "--coordinator", both, "--json", "-"
    )
    assert json.loads(shown.stdout)["name"] == "exact"
    status = ("status", "--coordinator", both, "--store", "")
    told = await asyncio.to_thread(_kvferry, *status, "--json", "-")
    found = json.loads(told.stdout)["coordinator"]
    roles = {c["address"]: c["role"] for c in found["coordinators"]}
    assert roles == {a: "leader" if a == leader else "standby" for a in coordinators.all}
    assert found["term"] > 0
    assert found["policy_name"] == "exact"
    screen = (await asyncio.to_thread(_kvferry, *status)).stdout
    assert "leader, term" in screen
    assert "standby" in screen
    coordinators.signal(leader, signal.SIGKILL)
    status_of_one = await asyncio.to_thread(_kvferry, *status, "--timeout-s", "20")
    assert status_of_one.returncode == 0, status_of_one.stderr
    assert "down" in status_of_one.stdout


def test_a_folder_with_another_salt_does_not_join(
    coordinators: Coordinators, tmp_path: Path, members: EtcdCluster, request: pytest.FixtureRequest
) -> None:
    async def settle() -> None:
        async with CoordinatorClient(coordinators.addresses, timeout_s=30.0) as client:
            await client.register(pb.RegisterRequest(node_id="x", incarnation=1))

    asyncio.run(settle())
    salts = tmp_path / "other" / "namespaces"
    salts.mkdir(parents=True)
    (salts / "default.salt").write_bytes(bytes(32))
    begun = time.monotonic()
    done = _kvferry(
        "coordinator", "--listen", "127.0.0.1:0", "--metrics-listen", "",
        "--data-dir", str(tmp_path / "other"), "--etcd", members.endpoints,
        "--etcd-prefix", f"/{request.node.name[:40]}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "move it away" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 60
