"""Restores against prefill: what does not pay is not stored, and is said to be so."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_samples import GB, KB, MB, MODEL, curve, holder

from kvferry.cluster import policy as policies
from kvferry.cluster.member_state import Link, MemberState
from kvferry.cluster.optimizer.decide import Facts, Judged, look
from kvferry.cluster.optimizer.deliberate import PATIENCE, Deliberation
from kvferry.cluster.optimizer.explain import explain_rings
from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.rules import base_of
from kvferry.cluster.policy_decider import with_peers
from kvferry.proto.v1 import coordinator_pb2 as pb

# 2,000 values a token: some 1,400 bits at 0.005 nats, so that 1 KB/s is 6 tokens a second.
SLOW = holder("a", (0, 8), KB, prefill=1000, latency_s=0.01, nearer={"itself": KB})
QUICK = replace(SLOW, bytes_per_s=MB)


def judged(*holders: Holder, policy: pb.Policy | None = None) -> tuple[Judged, ...]:
    policy = policy or policies.default_policy()
    return look(Facts(policy, {MODEL: holders}, {MODEL: curve()})).rings


def hopeless(*holders: Holder) -> bool:
    return all(ring.worth.hopeless for ring in judged(*holders))


def settled(policy: pb.Policy, *holders: Holder, looks: int = PATIENCE + 1) -> pb.Policy:
    thinking = Deliberation()
    for _ in range(looks):
        _, policy = thinking.look(Facts(policy, {MODEL: holders}, {MODEL: curve()}))
    return policy


def explained(policy: pb.Policy, *holders: Holder) -> pb.Decision:
    return explain_rings(look(Facts(policy, {MODEL: holders}, {MODEL: curve()})))[0]


def codec(policy: pb.Policy, model: bytes = MODEL) -> str:
    return policies.rule_for(policy, model, 3, "a").codec


def test_a_model_that_is_computed_sooner_is_not_stored_and_stored_again_when_that_is_over() -> None:
    default = policies.default_policy()
    assert codec(settled(default, SLOW, looks=PATIENCE - 1)) == "ferry"  # not in haste
    policy = settled(default, SLOW)
    policies.check_policy(policy)
    assert codec(policy) == "none"
    assert codec(policy, bytes(32)) == "ferry"  # other models are
    assert base_of(policy) == default
    assert policies.parse_policy(policies.dump_policy(policy).encode()) == policy
    assert settled(policy, SLOW) == policy
    told = explained(policy, SLOW)
    assert told.not_stored
    assert told.never_pays
    assert told.prefill_s == pytest.approx(4.096)
    assert told.seconds > told.prefill_s
    assert "nothing is stored" in told.why
    why = policies.explain(policy, MODEL, 1)[0][1]
    assert "of the optimizer: not stored" in why
    back = settled(policy, QUICK)
    assert codec(back) == "ferry"
    assert base_of(back) == default


def test_an_explanation_says_from_how_many_tokens_a_restore_pays() -> None:
    (told,) = explain_rings(
        look(Facts(policies.default_policy(), {MODEL: [QUICK]}, {MODEL: curve()}))
    )
    (node,) = told.nodes
    # latency + t * each < t / prefill from there on, and not before.
    each = (node.seconds - 0.01) / told.tokens
    at = told.pays_from_tokens
    assert 0.01 + at * each <= at / 1000
    assert 0.01 + (at - 1) * each > (at - 1) / 1000
    assert f"from {at:,} tokens on" in told.why
    assert not told.never_pays
    (ring,) = judged(replace(QUICK, prefill_tokens_per_s=0))
    assert (ring.worth.from_tokens, ring.worth.prefill_s) == (0, 0)


def test_what_is_not_known_speaks_for_storing() -> None:
    assert hopeless(SLOW)
    assert not hopeless(replace(SLOW, prefill_tokens_per_s=0))
    assert not hopeless(replace(SLOW, bytes_per_s=0))
    untold = replace(SLOW, nearer=())
    assert not hopeless(untold)  # its own tiers may have it at once
    told = explained(policies.default_policy(), untold)
    assert (told.never_pays, told.not_stored) == (True, False)
    assert "still stored" in told.why
    assert hopeless(replace(untold, decode_tokens_per_s=500))  # even so
    halves = (holder("a", (0, 4), KB, prefill=1e6, nearer={"itself": KB}), holder("b", (4, 8), 0.0))
    assert not hopeless(*halves)
    assert hopeless(halves[0], replace(halves[1], bytes_per_s=GB))  # the slowest decides


def test_whoever_has_it_nearer_than_the_store_still_gains() -> None:
    assert not hopeless(replace(SLOW, nearer=(("itself", GB),)))
    assert not hopeless(replace(SLOW, nearer=(*SLOW.nearer, ("b", 100 * MB))))
    assert hopeless(replace(SLOW, nearer=(*SLOW.nearer, ("b", 2 * KB))))
    # And what decoding takes is not to be had nearer.
    assert hopeless(replace(SLOW, decode_tokens_per_s=500, nearer=(("itself", GB),)))
    near = replace(SLOW, nearer=(("itself", GB),))
    (told,) = explain_rings(
        look(Facts(policies.default_policy(), {MODEL: [near]}, {MODEL: curve()}))
    )
    assert told.seconds > told.prefill_s
    assert "nearer than the store" in told.why
    assert (told.nodes[0].best_source, told.nodes[0].best_bytes_per_s) == ("itself", GB)


def test_one_set_of_nodes_that_gains_has_all_store() -> None:
    other = holder("b", (0, 8), 100 * MB, prefill=100)
    policy = settled(policies.default_policy(), SLOW, other)
    assert codec(policy) == "ferry"
    told = explain_rings(look(Facts(policy, {MODEL: [SLOW, other]}, {MODEL: curve()})))
    assert [one.never_pays for one in told] == [True, False]
    assert "other nodes" in told[0].why


def test_a_peer_counts_where_it_is_awake_and_holds_all_that_a_node_holds() -> None:
    def member(name: str, to: str) -> MemberState:
        links = {to: Link(50 * MB, 0.001), "store": Link(KB, 0.001)}
        return MemberState(
            node_id=name, incarnation=1, address="", version="", seen_s=0.0, links=links
        )

    a, b = member("a", "b"), member("b", "a")
    whole, half = holder("a", (0, 8), KB), holder("b", (0, 4), KB)
    assert with_peers([(a, "ready", whole), (b, "ready", half)]) == [
        whole, replace(half, nearer=(("a", 50 * MB),)),
    ]  # fmt: skip
    assert with_peers([(a, "away", whole), (b, "ready", half)]) == [whole, half]


def test_a_model_that_nobody_holds_now_keeps_its_rule_for_a_while() -> None:
    policy = settled(policies.default_policy(), SLOW)
    gone = frozenset({("", MODEL.hex()[:16])})
    assert Deliberation().look(Facts(policy, {}, {}, gone))[1] == policy
    assert codec(Deliberation().look(Facts(policy, {}, {}))[1]) == "ferry"


_rates = st.floats(2, 8).map(lambda power: 10**power)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Holder, ...]:
    cut, prefill = draw(st.integers(1, 7)), draw(_rates)
    return tuple(
        holder(
            name, span, draw(_rates), prefill=prefill,
            latency_s=draw(st.sampled_from([0.0, 0.1])),
            decode=draw(st.sampled_from([0.0, 1e3, 1e6])),
            codecs=draw(st.sampled_from([{}, {"ferry": 1e6, "affine": 1e8}])),
            nearer={"itself": draw(_rates)} if draw(st.booleans()) else {},
        )
        for name, span in (("a", (0, cut)), ("b", (cut, 8)))
    )  # fmt: skip


@given(clusters(), st.integers(0, 1), st.floats(1, 1e4))
@settings(max_examples=30, deadline=None)
def test_more_bandwidth_never_makes_it_not_worth_storing(
    holders: tuple[Holder, ...], which: int, more: float
) -> None:
    wider = list(holders)
    wider[which] = replace(wider[which], bytes_per_s=more * wider[which].bytes_per_s)
    if hopeless(*wider):
        assert hopeless(*holders)


@given(clusters(), st.floats(1, 1e4))
@settings(max_examples=30, deadline=None)
def test_a_quicker_prefill_never_makes_it_worth_storing(
    holders: tuple[Holder, ...], more: float
) -> None:
    quicker = [replace(h, prefill_tokens_per_s=more * h.prefill_tokens_per_s) for h in holders]
    if hopeless(*holders):
        assert hopeless(*quicker)
