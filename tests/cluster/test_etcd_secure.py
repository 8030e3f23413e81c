"""Two coordinator processes with TLS and tokens over a real etcd: the leader falls."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from etcd_servers import EtcdCluster, until
from security_samples import of

from kvferry.cli.cluster_bench.coordinators import Coordinators
from kvferry.cli.cluster_bench.failover import leader_of
from kvferry.cluster import policy as policies
from kvferry.cluster.authority import ADMIN_FILE, Authority
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.credentials import Credentials
from kvferry.errors import NotAllowedError, StoreUnavailableError, TokenRefusedError
from kvferry.node.client import NodeClient
from kvferry.proto.v1 import coordinator_pb2 as pb

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.long]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca")


class Guarded(Coordinators):
    """Every process with a certificate of its own."""

    def __init__(
        self, folder: Path, etcd: str, authority: Authority, patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(folder, etcd, "--lease-ttl-s", "3", "--heartbeat-interval-s", "0.3")
        self._authority, self._patch = authority, patch

    def _as(self, name: str) -> None:
        bundle = self._authority.folder / "machines" / name
        if not bundle.is_dir():
            self._authority.issue(name)
        self._patch.setenv("KVFERRY_SECURITY_TLS_DIR", str(bundle))

    def start(self, address: str) -> None:
        self._as(f"coordinator{self.all.index(address)}")
        super().start(address)

    def start_node(self, *flags: str) -> NodeClient:
        self._as("node")
        return super().start_node(*flags)


@pytest.fixture
def coordinators(
    members: EtcdCluster, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Guarded]:
    for name, namespace in (("desk", "default"), ("guest", "guests")):
        authority.issue(name, namespace=namespace)  # known to all before they start
    with Guarded(tmp_path, members.endpoints, authority, monkeypatch) as running:
        yield running


@pytest.fixture
async def admin(coordinators: Guarded, authority: Authority) -> AsyncIterator[CoordinatorClient]:
    desk = authority.folder / "machines" / "desk"
    shown = of(desk, token_file=authority.folder / ADMIN_FILE)
    async with CoordinatorClient(
        coordinators.addresses, timeout_s=30.0, credentials=shown
    ) as client:
        yield client


def _named(name: str) -> pb.Policy:
    policy = policies.default_policy()
    policy.name = name
    return policy


async def _push(admin: CoordinatorClient, node: NodeClient, name: str) -> int:
    """The version that a policy of this name got, once the node has it."""
    version = await admin.set_policy(_named(name))

    async def has_it() -> bool:
        return (await asyncio.to_thread(node.status)).policy_name == name

    await until(has_it)
    return version


async def _salt(addresses: str, shown: Credentials, name: str) -> bytes:
    async with CoordinatorClient(addresses, timeout_s=30.0, credentials=shown) as client:
        joined = await client.register(pb.RegisterRequest(node_id=name, incarnation=1))
        return joined.namespace_salt


async def _refuses_strangers(coordinators: Guarded, authority: Authority) -> None:
    """Who has no certificate, no token, or no right; leader and standby alike."""
    machine = of(authority.folder / "machines" / "desk")
    up = [a for a, service in coordinators.running.items() if service.process.poll() is None]
    nameless = Credentials(tls=machine.tls, pem=machine.pem)
    for address in up:
        for shown, error in (
            (Credentials(token=machine.token), StoreUnavailableError),
            (nameless, TokenRefusedError),
            (machine, NotAllowedError),
        ):
            async with CoordinatorClient(address, timeout_s=10.0, credentials=shown) as client:
                with pytest.raises(error):
                    await client.set_policy(_named("a stranger's"))


async def test_nodes_with_tokens_follow_when_the_leader_is_killed(
    coordinators: Guarded, authority: Authority, admin: CoordinatorClient
) -> None:
    with ExitStack() as stack:
        node = stack.enter_context(coordinators.start_node())
        first = await leader_of(admin)
        (second,) = set(coordinators.all) - {first}
        version = await _push(admin, node, "one")
        ours, guests = (of(authority.folder / "machines" / name) for name in ("desk", "guest"))
        salts = {
            name: await _salt(coordinators.addresses, shown, name)
            for name, shown in (("x", ours), ("g", guests))
        }
        assert node.hello().namespace_salt == salts["x"] != salts["g"]
        await _refuses_strangers(coordinators, authority)
        term = admin.term
        coordinators.signal(first, signal.SIGKILL)
        assert await _push(admin, node, "two") == version + 1
        assert await leader_of(admin) == second
        assert admin.term > term
        # Whose token it is decides about the salt, at the new leader as well.
        for name, shown in (("x", ours), ("g", guests)):
            assert await _salt(coordinators.addresses, shown, name) == salts[name]
        await _refuses_strangers(coordinators, authority)

        async def registered() -> bool:
            return "n" in {member.node_id for member in (await admin.members()).members}

        await until(registered)
        # The one that fell comes back and stands by, and the next failure is its turn.
        coordinators.start(first)
        coordinators.signal(second, signal.SIGKILL)
        assert await _push(admin, node, "three") == version + 2
        assert await leader_of(admin) == first
        assert node.hello().namespace_salt == salts["x"]
