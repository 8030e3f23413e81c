"""Membership as a pure function: fencing, presence, soft state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster import state as states
from kvferry.errors import FencedError, QueueFullError
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


def _beat(incarnation: int = 5, node_id: str = "a", **fields: object) -> pb.HeartbeatRequest:
    return pb.HeartbeatRequest(node_id=node_id, incarnation=incarnation, **fields)  # type: ignore[arg-type]


def test_a_heartbeat_replaces_vitals_and_keeps_links_it_does_not_measure() -> None:
    first = _beat(memory_used_share=0.5, links=[pb.LinkSample(to="store", bytes_per_s=1e9)])
    state = states.apply(_joined(), states.Beat(first, 1.0))
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
    member = _joined(at_s=50.0).members["a"]
    assert states.presence(member, 50.0 + age, 10.0, 100.0) == expected


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


_events = st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(1, 4)), max_size=30)


@given(_events)
def test_a_members_incarnation_never_goes_back(events: list[tuple[bool, str, int]]) -> None:
    state, latest = states.ClusterState(), dict.fromkeys("ab", 0)
    for at, (joins, node, incarnation) in enumerate(events):
        event: states.Event = (
            states.Registered(pb.RegisterRequest(node_id=node, incarnation=incarnation), at)
            if joins
            else states.Beat(_beat(incarnation, node), at)
        )
        if incarnation < latest[node]:
            with pytest.raises(FencedError):
                states.apply(state, event)
            continue
        state = states.apply(state, event)
        if joins:
            latest[node] = incarnation
        known = {name: m.incarnation for name, m in state.members.items()}
        assert known == {name: n for name, n in latest.items() if n}
