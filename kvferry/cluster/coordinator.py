"""The coordinator: knows the members, holds the policy, tells who watches.

The asyncio shell around `state` and `policy`. It is never on the data path, and nodes go
on with the last policy they saw while it is away.
"""

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from kvferry.cluster import state as states
from kvferry.cluster.coordinator_metrics import CoordinatorMetrics
from kvferry.cluster.durable import private_folder
from kvferry.cluster.intent import Intent, load_intent
from kvferry.cluster.namespaces import namespace_salt
from kvferry.cluster.policy_keeper import PolicyKeeper
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import CoordinatorSettings

log = logging.getLogger(__name__)

POLL_S = 0.5
GONE_AFTER_AWAYS = 60  # 10 minutes where away is 10 seconds
FORGET_AFTER_S = 86_400.0
_WILDCARDS = ("0.0.0.0", "[::]", "[::0]")  # noqa: S104 - compared with, not bound


class Coordinator:
    """Members, policy and salt of one cluster. Lives on one event loop.

    Open with `open`, keep `run` going beside it, end with `aclose`.
    """

    def __init__(self, settings: CoordinatorSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._state = states.ClusterState()
        self._salt = b""
        self._lock_handle = -1
        self.metrics = CoordinatorMetrics(self.member_counts)
        self.policies = PolicyKeeper(settings.data_dir, settings.policy_file, self.metrics)

    @classmethod
    async def open(
        cls, settings: CoordinatorSettings, clock: Callable[[], float] = time.monotonic
    ) -> "Coordinator":
        """Take the data folder, read salt and policy, and look at the policy file.

        Raises: ConfigError: a folder in use or not writable, a damaged salt, or a
            policy file that cannot be used where no policy was in force before.
        """
        made = cls(settings, clock)
        files = await asyncio.to_thread(_open_files, settings.data_dir)
        made._lock_handle, made._salt, kept = files
        try:
            await made.policies.begin(kept)
        except BaseException:
            await made.aclose()
            raise
        return made

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """A node joins. Raises: FencedError, QueueFullError."""
        self._state = states.apply(self._state, states.Registered(request, self._clock()))
        log.info("node %r registered from %s", request.node_id, request.address or "no address")
        if request.address and not _tells(request.address):
            log.warning(
                "node %r listens on all interfaces (%s), which tells its peers nothing: set its "
                "`listen` to an address or name of its machine",
                request.node_id,
                request.address,
            )
        self.metrics.registrations.inc()
        await self.policies.outgrow(request.policy_version)
        return pb.RegisterReply(
            heartbeat_interval_ms=max(1, round(self._settings.heartbeat_interval_s * 1000)),
            namespace_salt=self._salt,
            peers=self._peers_of(request.node_id),
            policy_version=self.policies.policy.version,
        )

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """A node is alive. Raises: FencedError."""
        self._state = states.apply(self._state, states.Beat(request, self._clock()))
        self.metrics.heartbeats.inc()
        if not states.is_known(self._state, request.node_id, request.incarnation):
            return pb.HeartbeatReply(known=False)
        await self.policies.outgrow(request.policy_version)
        return pb.HeartbeatReply(known=True, peers=self._peers_of(request.node_id))

    def _peers_of(self, node_id: str) -> list[pb.NodeAddress]:
        return [
            pb.NodeAddress(node_id=name, address=member.address)
            for name, member in sorted(self._state.members.items())
            if name != node_id and _tells(member.address) and self._presence(member) == "ready"
        ]

    def _presence(self, member: states.MemberState) -> states.Presence:
        away = self._settings.away_after_s
        return states.presence(member, self._clock(), away, away * GONE_AFTER_AWAYS)

    def members(self) -> list[tuple[states.MemberState, states.Presence, float]]:
        """All known nodes by name: what they said, how present, seconds since then."""
        now = self._clock()
        ordered = sorted(self._state.members.items())
        return [(m, self._presence(m), max(0.0, now - m.seen_s)) for _, m in ordered]

    def member_counts(self) -> dict[str, int]:
        """How many members are in each state."""
        counts: dict[str, int] = {"ready": 0, "away": 0, "gone": 0}
        for member in self._state.members.values():
            counts[self._presence(member)] += 1
        return counts

    async def run(self) -> None:
        """Follow the policy file and forget members long gone; ends only when cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            self._state = states.apply(self._state, states.Swept(self._clock(), FORGET_AFTER_S))
            await self.policies.look_at_file()

    async def aclose(self) -> None:
        """End all watches and give the data folder back."""
        self.policies.close()
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1


def _tells(address: str) -> bool:
    """Whether others can use an address: there is one, and it is not "all interfaces"."""
    return bool(address) and address.rpartition(":")[0] not in _WILDCARDS


def _open_files(data_dir: Path) -> tuple[int, bytes, Intent | None]:
    folder = private_folder(data_dir)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError("data_dir", str(folder), "used by no other coordinator") from exc
        return handle, namespace_salt(folder), load_intent(folder)
    except BaseException:
        os.close(handle)
        raise
