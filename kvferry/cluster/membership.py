"""The members as a running coordinator sees them: the pure state, and a clock."""

from collections.abc import Callable

from kvferry.cluster import state as states
from kvferry.proto.v1 import coordinator_pb2 as pb

GONE_AFTER_AWAYS = 60  # 10 minutes where away is 10 seconds
FORGET_AFTER_S = 86_400.0
WILDCARDS = ("0.0.0.0", "[::]", "[::0]")  # noqa: S104 - compared with, not bound


class Membership:
    """Who is there. Belongs to one event loop.

    Args:
        away_after_s: so long without a heartbeat, a member that said nothing is away.
        clock: seconds that only grow.
        settle_s: within which every member that is there speaks up.
    """

    def __init__(self, away_after_s: float, clock: Callable[[], float], settle_s: float) -> None:
        self._away_after_s, self._clock = away_after_s, clock
        self._settle_s = settle_s
        self.begin()

    def begin(self) -> None:
        """We are the one that members speak to from now on, and know nothing of them yet.

        What was said to us in an earlier term is void: orders may have been taken back since.
        """
        self._state = states.ClusterState()
        self._settled_s = self._clock() + self._settle_s

    def register(self, request: pb.RegisterRequest) -> None:
        """A node joins. Raises: FencedError, QueueFullError."""
        self._apply(states.Registered(request, self._clock()))

    def beat(self, request: pb.HeartbeatRequest) -> states.MemberState | None:
        """A node is alive; None: it has to register first. Raises: FencedError."""
        self._apply(states.Beat(request, self._clock()))
        if not states.is_known(self._state, request.node_id, request.incarnation):
            return None
        return self._state.members[request.node_id]

    def leave(self, request: pb.GoodbyeRequest) -> None:
        """A node goes, and says so. Raises: FencedError."""
        self._apply(states.Left(request, self._clock()))

    def drain(self, node_id: str, undo: bool) -> states.MemberState:
        """The operator's order. Raises: ConfigError: no such member."""
        self._apply(states.DrainAsked(node_id, undo))
        return self._state.members[node_id]

    def sweep(self) -> None:
        """Forget who has not been heard of for a day."""
        self._apply(states.Swept(self._clock(), FORGET_AFTER_S))

    def _apply(self, event: states.Event) -> None:
        self._state = states.apply(self._state, event)

    def presence(self, member: states.MemberState) -> states.Presence:
        """How a member stands now."""
        away = self._away_after_s
        return states.presence(member, self._clock(), away, away * GONE_AFTER_AWAYS)

    def peers_of(self, node_id: str) -> list[pb.NodeAddress]:
        """Where the others are that can be asked for blobs; draining ones still can."""
        return [
            pb.NodeAddress(node_id=name, address=member.address, incarnation=member.incarnation)
            for name, member in sorted(self._state.members.items())
            if name != node_id
            and tells(member.address)
            and self.presence(member) in ("ready", "draining")
        ]

    @property
    def partial(self) -> bool:
        """Whether members may be there that have not been heard of yet.

        Nodes keep such peers, and what they have measured of them.
        """
        return self._clock() < self._settled_s

    def members(self) -> list[tuple[states.MemberState, states.Presence, float]]:
        """All known nodes by name: what they said, how present, seconds since then."""
        now = self._clock()
        ordered = sorted(self._state.members.items())
        return [(m, self.presence(m), max(0.0, now - m.seen_s)) for _, m in ordered]

    def counts(self) -> dict[str, int]:
        """How many members are in each state."""
        counts: dict[str, int] = dict.fromkeys(states.PRESENCES, 0)
        for member in self._state.members.values():
            counts[self.presence(member)] += 1
        return counts


def tells(address: str) -> bool:
    """Whether others can use an address: there is one, and it is not "all interfaces"."""
    return bool(address) and address.rpartition(":")[0] not in WILDCARDS
