"""The coordinator: knows the members, holds the policy, tells who watches.

The asyncio shell around `Membership` and `PolicyKeeper`. It is never on the data path, and
nodes go on with the last policy they saw while it is away.
"""

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from kvferry.cluster import state as states
from kvferry.cluster.coordinator_metrics import CoordinatorMetrics
from kvferry.cluster.durable import private_folder
from kvferry.cluster.guard import callers_namespace
from kvferry.cluster.membership import Membership, tells
from kvferry.cluster.namespaces import DEFAULT_NAMESPACE
from kvferry.cluster.policy_decider import PolicyDecider
from kvferry.cluster.policy_keeper import PolicyKeeper
from kvferry.cluster.seat import Seat
from kvferry.errors import ConfigError, NotLeaderError
from kvferry.proto.keys import namespace_tag
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.settings import CoordinatorSettings

log = logging.getLogger(__name__)

POLL_S = 0.5
SETTLE_BEATS = 3


class Coordinator:
    """Members, policy and salt of one cluster. Lives on one event loop.

    Open with `open`, keep `run` going beside it, end with `aclose`.

    Attributes:
        leadership: whether this one acts, or stands by for another.
        rounds: called one after the other, every `POLL_S`, for as long as this one acts.
    """

    def __init__(
        self, settings: CoordinatorSettings, clock: Callable[[], float], seat: Seat
    ) -> None:
        self._settings = settings
        self._seat = seat
        self.leadership = seat.leadership
        self._salts: dict[str, bytes] = {}
        self._salting = asyncio.Lock()
        self._lock_handle = -1
        settle_s = SETTLE_BEATS * settings.heartbeat_interval_s
        self.membership = Membership(settings.away_after_s, clock, settle_s)
        self.metrics = CoordinatorMetrics(self.membership.counts)
        self.leadership.add_metrics(self.metrics.registry)
        self.policies = PolicyKeeper(seat.intents, settings.policy_file, self.metrics)
        self.decider = PolicyDecider(self.policies, self.membership.members)
        self.rounds: list[Callable[[], Awaitable[None]]] = [
            self.policies.look_at_file,
            self.decider.look,
        ]

    @classmethod
    async def open(
        cls, settings: CoordinatorSettings, clock: Callable[[], float] = time.monotonic
    ) -> "Coordinator":
        """Take the data folder; where we are alone read salt and policy, and the policy file.

        Raises: ConfigError: a folder in use or not writable, a damaged salt, or a
            policy file that cannot be used where no policy was in force before.
        """
        handle = await asyncio.to_thread(_lock, settings.data_dir)
        try:
            made = cls(settings, clock, await Seat.open(settings))
        except BaseException:
            os.close(handle)
            raise
        made._lock_handle = handle
        try:
            if made.leadership.acting:
                await made._check_salt()
                await made.policies.begin()
        except BaseException:
            await made.aclose()
            raise
        return made

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """A node joins. Raises: FencedError, QueueFullError, ConfigError (the salt)."""
        self.membership.register(request)
        log.info("node %r registered from %s", request.node_id, request.address or "no address")
        if request.address and not tells(request.address):
            log.warning(
                "node %r listens on all interfaces (%s), which tells its peers nothing: set its "
                "`listen` to an address or name of its machine",
                request.node_id,
                request.address,
            )
        self.metrics.registrations.inc()
        salt = await self._salt_for(request)
        await self.leadership.outgrow(request.term)
        await self.policies.outgrow(request.policy_version)
        return pb.RegisterReply(
            heartbeat_interval_ms=max(1, round(self._settings.heartbeat_interval_s * 1000)),
            namespace_salt=salt,
            peers=self.membership.peers_of(request.node_id),
            policy_version=self.policies.policy.version,
            partial_peers=self.membership.partial,
        )

    async def _salt_for(self, request: pb.RegisterRequest) -> bytes:
        """The salt of the caller's namespace. Where there is none of the default one, the first
        node to register says what it was; that of another is never taken from outside, as a
        node whose token has changed would bring the one of its last namespace."""
        name = callers_namespace()
        async with self._salting:
            if not self._salts.get(name):
                intents = self._seat.intents
                brought = request.namespace_salt if name == DEFAULT_NAMESPACE else b""
                kept = await intents.kept_salt(name)
                salt = self._salts[name] = kept or await intents.salt(name, brought)
                if not kept and salt == brought:
                    log.warning("no salt was kept here: that of node %r holds", request.node_id)
        if request.namespace_salt not in (b"", self._salts[name]):
            log.warning(
                "node %r comes from another namespace: what it stored there is not found here",
                request.node_id,
            )
        return self._salts[name]

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """A node is alive. Raises: FencedError."""
        member = self.membership.beat(request)
        self.metrics.heartbeats.inc()
        if member is None:
            return pb.HeartbeatReply(known=False)
        await self.policies.outgrow(request.policy_version)
        peers = self.membership.peers_of(request.node_id)
        return pb.HeartbeatReply(
            known=True,
            peers=peers,
            drain=member.drain,
            partial_peers=self.membership.partial,
            wanted_curves=self.decider.told(request),
        )

    async def goodbye(self, request: pb.GoodbyeRequest) -> pb.GoodbyeReply:
        """A node goes, and says so. Raises: FencedError."""
        self.membership.leave(request)
        sleeps = request.phase == pb.NODE_PHASE_AWAY
        log.info("node %r %s", request.node_id, "goes to sleep" if sleeps else "ends")
        return pb.GoodbyeReply()

    async def drain(self, request: pb.DrainRequest) -> pb.DrainReply:
        """The operator's order to one node. Raises: ConfigError: no such member."""
        member = self.membership.drain(request.node_id, request.undo)
        log.info("node %r %s", request.node_id, "is wanted back" if request.undo else "is to drain")
        return pb.DrainReply(state=self.membership.presence(member), drained=member.drained)

    async def namespaces(self, name: str = "") -> dict[str, int]:
        """Names, and the tags that blobs carry for them: the default one, those of nodes that
        registered here, and ``name``, if there is one of that name."""
        salts = {}
        for each in {DEFAULT_NAMESPACE, *self._salts, *([name] if name else [])}:
            salts[each] = self._salts.get(each) or await self._seat.intents.kept_salt(each)
        return {each: namespace_tag(salt) for each, salt in salts.items() if salt}

    def members(self) -> list[tuple[states.MemberState, states.Presence, float]]:
        """All known nodes by name: what they said, how present, seconds since then."""
        return self.membership.members()

    def announce(self, address: str) -> None:
        """Where we serve, for the others to send nodes to."""
        if self.leadership.role != "alone" and not (tells(address) or self._settings.advertise):
            log.warning("%s tells nodes nothing: set `advertise` to this one's address", address)
        self.leadership.announce(address if tells(address) else "")

    async def _check_salt(self) -> None:
        """Raises: ConfigError for a damaged one, or not the others'; StoreUnavailableError."""
        await self._seat.intents.kept_salt(DEFAULT_NAMESPACE)

    async def run(self) -> None:
        """Lead or stand by, as elected; ends only when cancelled.

        Raises: ConfigError: a salt that is not that of the other coordinators.
        """
        await self.leadership.prepare(self._check_salt)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._go_round())
            tasks.create_task(self.policies.follow())
            tasks.create_task(self.leadership.run(self._accede, self.policies.retire))

    async def _accede(self) -> None:
        """We were elected: go on from what the last leader decided; members will register."""
        self.membership.begin()
        await self.policies.begin(strict=False)

    async def _go_round(self) -> None:
        """While we lead do the `rounds`, and forget members long gone."""
        while True:
            await asyncio.sleep(POLL_S)
            self.membership.sweep()
            for do in self.rounds:
                try:
                    if self.leadership.acting:
                        await do()
                except NotLeaderError as exc:  # deposed in the middle of it
                    log.info("%s", exc)

    async def aclose(self) -> None:
        """End all watches and give the data folder back."""
        self.policies.close()
        await self._seat.aclose()
        if self._lock_handle >= 0:
            os.close(self._lock_handle)
            self._lock_handle = -1


def _lock(data_dir: Path) -> int:
    folder = private_folder(data_dir)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(handle)
        raise ConfigError("data_dir", str(folder), "used by no other coordinator") from exc
    return handle
