"""Membership as a pure function: fencing, presence, soft state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster import state as states
from kvferry.cluster.membership import Membership
from kvferry.errors import ConfigError, FencedError, QueueFullError
from kvferry.proto.v1 import coordinator_pb2 as pb

MODEL = bytes(32)


def _joined(node_id: str = "a", incarnation: int = 5, at_s: float = 0.0) -> states.ClusterState:
    request = pb.RegisterRequest(
        node_id=node_id,
        incarnation=incarnation,
        address="127.0.0.1:1",
        version="0.1.0",
        shards=[pb.ShardInfo(model_id=MODEL, layer_start=0, layer_end=15)],
    )
    return states.apply(states.ClusterState(), states.Registered(request, at_s))


def _with_other(state: states.ClusterState) -> states.ClusterState:
    return states.apply(state, states.Registered(pb.RegisterRequest(node_id="b"), 0.0))


def _left(phase: int, incarnation: int = 5, sequence: int = 0) -> states.Left:
    request = pb.GoodbyeRequest(
        node_id="a",
        incarnation=incarnation,
        phase=phase,
        sequence=sequence,  # type: ignore[arg-type]
    )
    return states.Left(request, 2.0)


def _beat(incarnation: int = 5, node_id: str = "a", **fields: object) -> pb.HeartbeatRequest:
    return pb.HeartbeatRequest(node_id=node_id, incarnation=incarnation, **fields)  # type: ignore[arg-type]


def test_a_heartbeat_replaces_vitals_and_keeps_links_it_does_not_measure() -> None:
    first = _beat(memory_used_share=0.5, links=[pb.LinkSample(to="store", bytes_per_s=1e9)])
    state = states.apply(_with_other(_joined()), states.Beat(first, 1.0))
    second = _beat(
        free_disk_bytes=7,
        policy_version=3,
        counters={"hits": 2},
        links=[pb.LinkSample(to="b", bytes_per_s=1e6, latency_s=0.01)],
        shards=[pb.ShardInfo(model_id=MODEL, layer_start=15, layer_end=30)],
    )
    member = states.apply(state, states.Beat(second, 2.0)).members["a"]
    assert member.vitals == states.Vitals(free_disk_bytes=7, policy_version=3, counters={"hits": 2})
    assert member.links == {"store": states.Link(1e9, 0.0), "b": states.Link(1e6, 0.01)}
    assert member.shards == (states.Shard(MODEL, (15, 30)),)
    assert (member.seen_s, member.address, member.version) == (2.0, "127.0.0.1:1", "0.1.0")


def test_an_older_start_of_a_node_is_refused_and_changes_nothing() -> None:
    state = _joined(incarnation=5)
    with pytest.raises(FencedError, match="started again"):
        states.apply(state, states.Beat(_beat(4), 9.0))
    late = pb.RegisterRequest(node_id="a", incarnation=4)
    with pytest.raises(FencedError):
        states.apply(state, states.Registered(late, 9.0))
    assert state.members["a"].seen_s == 0.0


def test_a_later_start_takes_the_nodes_place_and_begins_anew() -> None:
    link = _beat(links=[pb.LinkSample(to="store", bytes_per_s=1.0)], memory_used_share=0.9)
    state = states.apply(_joined(), states.Beat(link, 1.0))
    again = pb.RegisterRequest(node_id="a", incarnation=6, address="127.0.0.1:2")
    member = states.apply(state, states.Registered(again, 2.0)).members["a"]
    assert (member.incarnation, member.address) == (6, "127.0.0.1:2")
    assert not member.links
    assert not member.shards
    assert member.vitals == states.Vitals()


@pytest.mark.parametrize(("node_id", "incarnation"), [("b", 5), ("a", 6)])
def test_a_heartbeat_of_one_who_never_registered_is_not_known(
    node_id: str, incarnation: int
) -> None:
    state = _joined()
    after = states.apply(state, states.Beat(_beat(incarnation, node_id), 1.0))
    assert after is state
    assert not states.is_known(after, node_id, incarnation)
    assert states.is_known(after, "a", 5)


@pytest.mark.parametrize(
    ("age", "expected"),
    [(0.0, "ready"), (9.9, "ready"), (10.0, "away"), (99.9, "away"), (100.0, "gone")],
)
def test_presence_follows_the_age_of_the_last_sign_of_life(age: float, expected: str) -> None:
    state = states.apply(_joined(at_s=50.0), states.Beat(_beat(), 50.0))
    assert states.presence(state.members["a"], 50.0 + age, 10.0, 100.0) == expected


def test_a_node_is_joining_until_it_says_that_it_can_be_used() -> None:
    state = _joined()
    assert state.members["a"].said == "joining"
    busy = _beat(phase=pb.NODE_PHASE_JOINING)
    state = states.apply(state, states.Beat(busy, 1.0))
    assert state.members["a"].said == "joining"
    # Silence makes no difference between one that joins and one that had.
    assert states.presence(state.members["a"], 20.0, 10.0, 100.0) == "away"
    state = states.apply(state, states.Beat(_beat(phase=pb.NODE_PHASE_READY), 2.0))
    assert state.members["a"].said == "ready"


def test_who_says_that_it_sleeps_is_away_at_once_and_not_given_up() -> None:
    state = states.apply(_joined(), states.Beat(_beat(), 1.0))
    asleep = states.apply(state, _left(pb.NODE_PHASE_AWAY)).members["a"]
    assert states.presence(asleep, 2.0, 10.0, 100.0) == "away"
    assert states.presence(asleep, 9999.0, 10.0, 100.0) == "away"
    state = states.apply(state, _left(pb.NODE_PHASE_AWAY))
    assert states.apply(state, states.Beat(_beat(), 3.0)).members["a"].said == "ready"


def test_who_says_that_it_ends_is_gone_and_has_to_register() -> None:
    state = states.apply(_joined(), _left(pb.NODE_PHASE_GONE))
    assert states.presence(state.members["a"], 2.0, 10.0, 100.0) == "gone"
    assert not states.is_known(state, "a", 5)
    assert states.apply(state, states.Beat(_beat(), 3.0)) is state
    again = pb.RegisterRequest(node_id="a", incarnation=6)
    assert states.apply(state, states.Registered(again, 4.0)).members["a"].said == "joining"


def test_a_heartbeat_that_a_goodbye_overtook_changes_nothing() -> None:
    state = states.apply(_joined(), states.Beat(_beat(sequence=1), 1.0))
    state = states.apply(state, _left(pb.NODE_PHASE_AWAY, sequence=3))
    assert states.apply(state, states.Beat(_beat(sequence=2), 2.5)) is state
    assert states.is_known(state, "a", 5)
    assert states.apply(state, states.Beat(_beat(sequence=4), 3.0)).members["a"].said == "ready"


def test_draining_is_the_operators_word_until_taken_back_or_started_again() -> None:
    state = states.apply(_joined(), states.Beat(_beat(drained=True), 1.0))
    assert not state.members["a"].drained  # nobody asked
    state = states.apply(state, states.DrainAsked("a"))
    assert state.members["a"].said == "draining"
    state = states.apply(state, states.Beat(_beat(phase=pb.NODE_PHASE_READY), 2.0))
    assert state.members["a"].said == "draining"
    drained = _beat(phase=pb.NODE_PHASE_DRAINING, drained=True)
    state = states.apply(state, states.Beat(drained, 3.0))
    assert state.members["a"].drained
    same = pb.RegisterRequest(node_id="a", incarnation=5)
    assert states.apply(state, states.Registered(same, 4.0)).members["a"].said == "draining"
    later = pb.RegisterRequest(node_id="a", incarnation=6)
    assert states.apply(state, states.Registered(later, 4.0)).members["a"].said == "joining"
    state = states.apply(state, states.DrainAsked("a", undo=True))
    # Until the node has heard of it, it is of no use yet.
    state = states.apply(state, states.Beat(drained, 5.0))
    assert (state.members["a"].said, state.members["a"].drained) == ("joining", False)
    state = states.apply(state, states.Beat(_beat(phase=pb.NODE_PHASE_READY), 6.0))
    assert state.members["a"].said == "ready"
    with pytest.raises(ConfigError, match="the name of a member"):
        states.apply(state, states.DrainAsked("z"))


def test_a_coordinator_that_forgot_hears_of_an_order_from_the_node() -> None:
    request = pb.RegisterRequest(node_id="a", incarnation=5, draining=True)
    state = states.apply(states.ClusterState(), states.Registered(request, 0.0))
    assert (state.members["a"].said, state.members["a"].drain) == ("draining", True)


def test_who_leads_again_has_forgotten_the_orders_of_its_last_term() -> None:
    clock = iter(float(second) for second in range(100))
    members = Membership(10.0, lambda: next(clock), 6.0)
    request = pb.RegisterRequest(node_id="a", incarnation=5, address="127.0.0.1:1")
    members.register(request)
    members.drain("a", undo=False)
    for _ in range(10):
        next(clock)
    assert not members.partial
    members.begin()
    assert members.partial
    assert members.beat(_beat()) is None  # it has to register
    members.register(request)
    assert [presence for _, presence, _ in members.members()] == ["joining"]


def test_links_to_who_is_no_member_any_more_are_forgotten() -> None:
    state = _with_other(_joined())
    links = [pb.LinkSample(to=to, bytes_per_s=1.0, kind="wifi", age_s=4.0) for to in ("b", "store")]
    state = states.apply(state, states.Beat(_beat(links=links), 10.0))
    assert state.members["a"].links["b"] == states.Link(1.0, 0.0, "wifi", 6.0)
    members = {name: m for name, m in state.members.items() if name != "b"}
    state = states.apply(states.ClusterState(members), states.Beat(_beat(), 11.0))
    assert set(state.members["a"].links) == {"store"}


def test_what_exo_says_is_kept_until_it_says_something_else() -> None:
    exo = pb.ExoState(reachable=True, nodes=[pb.ExoNode(node_id="x")])
    state = states.apply(_joined(), states.Beat(_beat(exo=exo), 1.0))
    state = states.apply(state, states.Beat(_beat(), 2.0))
    assert state.members["a"].exo == exo
    state = states.apply(state, states.Beat(_beat(exo=pb.ExoState()), 3.0))
    assert state.members["a"].exo is None


def test_who_was_silent_for_too_long_is_forgotten() -> None:
    state = states.apply(_joined(at_s=0.0), states.Swept(10.0, 10.0))
    assert "a" in state.members
    assert not states.apply(state, states.Swept(10.1, 10.0)).members


def test_the_number_of_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "MAX_MEMBERS", 1)
    state = _joined()
    with pytest.raises(QueueFullError):
        states.apply(state, states.Registered(pb.RegisterRequest(node_id="b"), 1.0))
    states.apply(state, states.Registered(pb.RegisterRequest(node_id="a", incarnation=9), 1.0))


_nodes, _starts = st.sampled_from("ab"), st.integers(1, 4)
_phases = st.sampled_from(
    [pb.NODE_PHASE_UNSPECIFIED, pb.NODE_PHASE_JOINING, pb.NODE_PHASE_READY, pb.NODE_PHASE_DRAINING]
)
_joins = st.builds(pb.RegisterRequest, node_id=_nodes, incarnation=_starts, draining=st.booleans())
_beats = st.builds(
    pb.HeartbeatRequest,
    node_id=_nodes,
    incarnation=_starts,
    phase=_phases,
    drained=st.booleans(),
    sequence=st.integers(0, 6),
)
_goodbyes = st.builds(
    pb.GoodbyeRequest,
    node_id=_nodes,
    incarnation=_starts,
    phase=st.sampled_from([pb.NODE_PHASE_AWAY, pb.NODE_PHASE_GONE]),
    sequence=st.integers(0, 6),
)
_orders = st.builds(states.DrainAsked, _nodes, st.booleans())
_events = st.lists(st.one_of(_joins, _beats, _goodbyes, _orders), max_size=40)

# What may become of a member by each kind of event, as the module's text draws it.
_HERE = {"joining", "ready", "draining"}
_MAY = {
    pb.RegisterRequest: {said: {"joining", "draining"} for said in (None, *states.PRESENCES)},
    pb.HeartbeatRequest: dict.fromkeys((*_HERE, "away"), _HERE) | {"gone": {"gone"}},
    pb.GoodbyeRequest: {said: {"away", "gone"} for said in (*_HERE, "away")} | {"gone": {"gone"}},
    states.DrainAsked: {
        "joining": {"draining"},
        "ready": {"draining"},
        "draining": {"joining"},
        "away": {"away"},
        "gone": {"gone"},
    },
}
_Message = pb.RegisterRequest | pb.HeartbeatRequest | pb.GoodbyeRequest | states.DrainAsked


def _event(message: _Message, at_s: float) -> states.Event:
    match message:
        case pb.RegisterRequest():
            return states.Registered(message, at_s)
        case pb.HeartbeatRequest():
            return states.Beat(message, at_s)
        case pb.GoodbyeRequest():
            return states.Left(message, at_s)
        case _:
            return message


@given(_events)
def test_no_sequence_of_events_lets_an_older_start_or_a_late_message_change_anything(
    events: list[_Message],
) -> None:
    state = states.ClusterState()
    for at, message in enumerate(events):
        before = state.members.get(message.node_id)
        event = _event(message, float(at))
        if isinstance(message, states.DrainAsked):
            if before is None:
                with pytest.raises(ConfigError):
                    states.apply(state, event)
                continue
        elif before is not None and message.incarnation < before.incarnation:
            with pytest.raises(FencedError):
                states.apply(state, event)
            continue
        after = states.apply(state, event)
        member = after.members.get(message.node_id)
        others = {name: m for name, m in state.members.items() if name != message.node_id}
        assert others == {n: m for n, m in after.members.items() if n != message.node_id}
        if isinstance(message, pb.HeartbeatRequest | pb.GoodbyeRequest):
            stranger = before is None or message.incarnation != before.incarnation
            late = before is not None and 0 < message.sequence <= before.sequence
            if stranger or late:
                assert after is state
        if member is not None:
            assert before is None or member.incarnation >= before.incarnation
            assert (member.said == "draining") <= member.drain
            assert member.drained <= member.drain
            if member != before:
                said = before.said if before is not None else None
                assert member.said in _MAY[type(message)][said] | {said}
        state = after
