"""How long a cluster goes without new policies when its coordinator, or etcd's leader, dies."""

import asyncio
import signal
import statistics
import tempfile
import time
from pathlib import Path

from kvferry.cli.cluster_bench.coordinators import Coordinators
from kvferry.cli.cluster_bench.etcd_members import EtcdMembers, etcd_program
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.policy import default_policy
from kvferry.errors import StoreUnavailableError
from kvferry.node.client import NodeClient
from kvferry.proto.v1 import coordinator_pb2 as pb

LOOK_S = 0.02
PATIENCE_S = 60.0


def measure(rounds: int = 3) -> dict[str, float]:
    """Real processes: three members of etcd, two coordinators, a node daemon.

    ``failover_s`` is the longest of ``rounds``: from kill -9 of the leading coordinator
    until the node has a policy that was set after it. ``etcd_failover_s`` is the same for
    the leading member of etcd.

    Raises: ConfigError where etcd is not installed; StoreUnavailableError.
    """
    with tempfile.TemporaryDirectory(prefix="kvferry-") as name:
        folder = Path(name)
        with (
            EtcdMembers(etcd_program(), folder / "etcd") as etcd,
            Coordinators(folder, etcd.endpoints) as coordinators,
            coordinators.start_node() as node,
        ):
            return asyncio.run(_measure(etcd, coordinators, node, rounds))


async def _measure(
    etcd: EtcdMembers, coordinators: Coordinators, node: NodeClient, rounds: int
) -> dict[str, float]:
    killed_leader, killed_etcd = [], []
    async with CoordinatorClient(coordinators.addresses, timeout_s=10.0) as client:
        for round_ in range(rounds):
            await _pushed(client, node, f"before {round_}")
            address = await leader_of(client)
            begun = time.monotonic()
            await asyncio.to_thread(coordinators.signal, address, signal.SIGKILL)
            await _pushed(client, node, f"after {round_}")
            killed_leader.append(time.monotonic() - begun)
            await asyncio.to_thread(coordinators.start, address)
        for round_ in range(rounds):
            member = await asyncio.to_thread(etcd.leader)
            begun = time.monotonic()
            await asyncio.to_thread(member.signal, signal.SIGKILL)
            await _pushed(client, node, f"without a member {round_}")
            killed_etcd.append(time.monotonic() - begun)
            await asyncio.to_thread(etcd.heal)
    return {
        "failover_s": round(max(killed_leader), 2),
        "failover_median_s": round(statistics.median(killed_leader), 2),
        "etcd_failover_s": round(max(killed_etcd), 2),
        "etcd_failover_median_s": round(statistics.median(killed_etcd), 2),
        "rounds": rounds,
    }


async def leader_of(client: CoordinatorClient) -> str:
    """The address of the coordinator that leads; waits for one.

    Raises: StoreUnavailableError after `PATIENCE_S`.
    """
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for address, said in (await client.leadership()).items():
            if isinstance(said, pb.LeadershipReply) and said.role == "leader":
                return address
        await asyncio.sleep(LOOK_S)
    raise StoreUnavailableError(f"coordinators {client.address}", "none of them leads")


async def _pushed(client: CoordinatorClient, node: NodeClient, name: str) -> None:
    """Set a policy of this name, and wait until the node has it."""
    policy = default_policy()
    policy.name = name
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            await client.set_policy(policy)
            break
        except StoreUnavailableError:
            if time.monotonic() > end:
                raise
    while (await asyncio.to_thread(node.status)).policy_name != name:
        if time.monotonic() > end:
            raise StoreUnavailableError("the node", f"it never got policy {name!r}")
        await asyncio.sleep(LOOK_S)
