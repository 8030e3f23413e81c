"""From what a coordinator knows to a policy: rings, hysteresis, tiers, what is left alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_samples import GB, MB, MODEL, curve, holder

from kvferry.cluster import policy as policies
from kvferry.cluster.optimizer.decide import Facts, look
from kvferry.cluster.optimizer.deliberate import PATIENCE, Deliberation
from kvferry.cluster.optimizer.explain import explain_rings
from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.pressure import next_tier
from kvferry.cluster.optimizer.rings import make_rings, mixture
from kvferry.cluster.optimizer.rules import base_of
from kvferry.proto.v1 import coordinator_pb2 as pb

UNLIKE = (holder("studio", (0, 4), GB), holder("laptop", (4, 8), 4 * MB))


def facts(policy: pb.Policy, *holders: Holder, **more: object) -> Facts:
    made = curve()
    return Facts(policy, {MODEL: holders}, {MODEL: made}, **more)  # type: ignore[arg-type]


def settled(policy: pb.Policy, *holders: Holder, **more: object) -> pb.Policy:
    """What holds once nothing changes any more."""
    thinking = Deliberation()
    for _ in range(PATIENCE + 1):
        _, policy = thinking.look(facts(policy, *holders, **more))
    return policy


def steps(policy: pb.Policy, node: str, layers: tuple[int, int] = (0, 8)) -> list[str]:
    runs = policies.layer_rules(policy, MODEL, layers, node)
    return [f"{a}-{b} {rule.options.get('step', rule.codec)}" for (a, b), rule in runs]


def test_nodes_with_unlike_links_get_unlike_steps_and_others_what_the_operator_said() -> None:
    policy = settled(policies.default_policy(), *UNLIKE)
    policies.check_policy(policy)
    rules = {(r.node, r.layer_start, r.layer_end): r for r in policy.rules if r.decided}
    assert set(rules) == {("studio", 0, 4), ("laptop", 4, 8)}
    studio, laptop = rules["studio", 0, 4], rules["laptop", 4, 8]
    assert float(studio.options["step"]) < float(laptop.options["step"])
    # A node that is not named, and layers that a node does not hold, are coded as before.
    other = policies.rule_for(policy, MODEL, 0, "other")
    assert dict(other.options) == {"target_kl": "0.005"}
    assert dict(policies.rule_for(policy, MODEL, 5, "studio").options) == {"target_kl": "0.005"}
    assert policies.rule_for(policy, bytes(32), 5, "laptop").options["target_kl"] == "0.005"
    assert base_of(policy) == policies.default_policy()
    # And it reads back from a file as it was written.
    assert policies.parse_policy(policies.dump_policy(policy).encode()) == policy


def test_nothing_is_decided_where_nothing_is_gained() -> None:
    default = policies.default_policy()
    assert settled(default, holder("a", (0, 4)), holder("b", (4, 8))) == default
    assert settled(default, holder("alone", (0, 8), 3 * MB)) == default
    quick = (holder("a", (0, 4), GB), holder("b", (4, 8), 100 * MB))
    assert settled(default, *quick) == default  # some milliseconds
    assert settled(default, holder("half", (0, 4), MB)) == default  # a page is never complete


def test_a_change_has_to_be_the_better_one_for_a_while() -> None:
    thinking, default = Deliberation(), policies.default_policy()
    for _ in range(PATIENCE - 1):
        assert thinking.look(facts(default, *UNLIKE))[1] == default
    # One look without it, and it begins anew.
    assert (
        thinking.look(facts(default, *(replace(h, bytes_per_s=MB) for h in UNLIKE)))[1] == default
    )
    for _ in range(PATIENCE - 1):
        assert thinking.look(facts(default, *UNLIKE))[1] == default
    assert thinking.look(facts(default, *UNLIKE))[1] != default


def test_noise_of_measurements_changes_nothing() -> None:
    policy, rng = settled(policies.default_policy(), *UNLIKE), np.random.default_rng(0)
    thinking = Deliberation()
    for _ in range(100):
        noisy = [
            replace(h, bytes_per_s=h.bytes_per_s * float(np.exp(rng.normal(0, 0.05))))
            for h in UNLIKE
        ]
        assert thinking.look(facts(policy, *noisy))[1] == policy
    slower = [UNLIKE[0], replace(UNLIKE[1], bytes_per_s=1 * MB)]
    other_way = [replace(UNLIKE[0], bytes_per_s=4 * MB), replace(UNLIKE[1], bytes_per_s=GB)]
    assert settled(policy, *other_way) != policy
    assert look(facts(policy, *slower)).rings[0].now.kl <= 0.005 * 1.001


def test_a_gain_of_less_than_a_tenth_is_worth_no_new_blobs() -> None:
    first, second = holder("a", (0, 4), MB), holder("b", (4, 8), 0.5 * MB)
    policy = settled(policies.default_policy(), first, second)
    for share, worth_it in ((0.9, False), (0.8, True)):
        slower = replace(first, bytes_per_s=share * MB), second
        (ring,) = look(facts(policy, *slower)).rings
        assert ring.best.deadline < 0.95 * ring.now.deadline
        assert (settled(policy, *slower) != policy) is worth_it


def test_nodes_that_are_away_keep_their_rules_and_those_that_are_forgotten_do_not() -> None:
    policy = settled(policies.default_policy(), *UNLIKE)
    keys = frozenset((node, MODEL.hex()[:16]) for node in ("studio", "laptop"))
    assert settled(policy, absent=keys) == policy
    assert settled(policy, UNLIKE[0], absent=keys) == policy
    left = settled(policy, UNLIKE[0])
    assert {rule.node for rule in left.rules} == {"studio", ""}


def test_what_the_operator_fixed_is_left_alone() -> None:
    base = policies.default_policy()
    base.rules.insert(0, pb.LayerRule(layer_end=1, codec="affine", options={"bits": "8"}))
    policy = settled(base, *UNLIKE)
    assert steps(policy, "studio")[0] == "0-1 affine"
    assert {r.layer_start for r in policy.rules if r.node == "studio"} == {1}
    # Without a budget, and where all rules are plain ones, nothing is decided at all.
    plain = policies.default_policy()
    plain.budget_nats = 0
    assert settled(plain, *UNLIKE) == plain
    exact = policies.named_policy("exact")
    assert settled(exact, *UNLIKE) == exact


def test_an_operators_new_budget_takes_hold_at_once() -> None:
    policy = settled(policies.named_policy("high_compression"), *UNLIKE)
    coarse = look(facts(policy, *UNLIKE)).rings[0].now
    assert 0.005 < coarse.kl <= 0.02 * 1.001
    policy.budget_nats = 0.005
    _, mended = Deliberation().look(facts(policy, *UNLIKE))
    assert look(facts(mended, *UNLIKE)).rings[0].now.kl <= 0.005 * 1.001


def test_tiers_follow_memory_pressure_with_hysteresis() -> None:
    marks = pb.PressureSwitch(high_compression=0.8, memory_emergency=0.95, hysteresis=0.1)
    tier, seen = "", []
    for used in (0.5, 0.79, 0.8, 0.75, 0.71, 0.69, 0.96, 0.9, 0.84, 0.75, 0.6):
        tier = next_tier(marks, tier, used)
        seen.append(tier)
    high, emergency = "high_compression", "memory_emergency"
    assert seen == ["", "", high, high, high, "", emergency, emergency, high, high, ""]
    assert next_tier(pb.PressureSwitch(), "", 1.0) == ""


def test_a_tier_has_the_larger_budget_also_for_models_without_a_curve() -> None:
    base = policies.default_policy()
    base.switch.CopyFrom(pb.PressureSwitch(high_compression=0.8, hysteresis=0.1))
    policy = settled(base, *UNLIKE, memory_used_share=0.85)
    assert policy.tier == "high_compression"
    assert policies.rule_for(policy, bytes(32), 0).options["target_kl"] == "0.02"
    assert look(facts(policy, *UNLIKE, memory_used_share=0.85)).budget == 0.02
    assert settled(policy, *UNLIKE, memory_used_share=0.75).tier == "high_compression"
    back = settled(policy, *UNLIKE, memory_used_share=0.5)
    assert back.tier == ""
    assert base_of(back) == base
    assert look(facts(back, *UNLIKE)).rings[0].now.kl <= 0.005 * 1.001


def test_an_emergency_adds_the_pressure_trigger_and_takes_it_back() -> None:
    base = policies.default_policy()
    base.switch.CopyFrom(pb.PressureSwitch(memory_emergency=0.9, hysteresis=0.1))
    policy = settled(base, *UNLIKE, memory_used_share=0.95)
    assert policy.tier == "memory_emergency"
    assert pb.TRIGGER_MEMORY_PRESSURE in policy.when
    assert policies.parse_policy(policies.dump_policy(policy).encode()) == policy
    assert base_of(policy) == base
    assert list(settled(policy, *UNLIKE, memory_used_share=0.5).when) == list(base.when)
    # An operator who named it himself keeps it.
    base.when.append(pb.TRIGGER_MEMORY_PRESSURE)
    held = settled(base, *UNLIKE, memory_used_share=0.95)
    assert not held.tier_trigger
    assert list(settled(held, *UNLIKE, memory_used_share=0.5).when) == list(base.when)


def test_sets_of_nodes_are_found_whatever_their_splits() -> None:
    holders = [
        holder("a", (0, 4)), holder("b", (4, 8)), holder("c", (0, 8)),
        holder("d", (0, 6)), holder("e", (6, 8)), holder("f", (0, 2)),
    ]  # fmt: skip
    rings = make_rings(MODEL, holders, 8, 1)
    assert {ring.names for ring in rings} == {
        frozenset("ab"), frozenset("c"), frozenset("de"),
    }  # fmt: skip
    twice = Holder(node_id="x", parts=(((0, 4), (0, 1)), ((0, 8), (0, 1))))
    assert len(make_rings(MODEL, [twice, holder("y", (4, 8))], 8, 1)) == 1
    tensor = [holder(n, (0, 8), heads=h) for n, h in (("a", (0, 1)), ("b", (1, 4)), ("c", (0, 2)))]
    assert {ring.names for ring in make_rings(MODEL, tensor, 8, 4)} == {frozenset("ab")}


def test_several_sets_of_nodes_keep_the_budget_however_their_blobs_are_mixed() -> None:
    # The first pair would code the first half coarsely, the second pair the second half.
    holders = (
        holder("a", (0, 4), 2 * MB), holder("b", (4, 8), GB),
        holder("c", (0, 4), GB), holder("d", (4, 8), 2 * MB),
    )  # fmt: skip
    policy = settled(policies.default_policy(), *holders)
    first, second = (ring.now for ring in look(facts(policy, *holders)).rings)
    lost = [
        plan.problem.share * plan.problem.ladder.kl[[0, 1], plan.choice] for plan in (first, second)
    ]
    worst = np.maximum(lost[0].sum(axis=0), lost[1].sum(axis=0))
    assert first.kl < 0.005 > second.kl
    assert 0.0045 < worst.sum() <= 0.005 * 1.001


def test_explanations_name_the_slowest_node_and_what_the_next_choices_cost() -> None:
    policy = settled(policies.default_policy(), *UNLIKE)
    (told,) = explain_rings(look(facts(policy, *UNLIKE)))
    assert told.slowest == "laptop"
    assert told.budget_nats == 0.005
    assert told.kl_nats == pytest.approx(sum(part.kl_nats for part in told.parts))
    assert told.kl_nats <= 0.005
    assert {(p.node_id, p.layer_start, p.layer_end) for p in told.parts} == {
        ("laptop", 4, 8), ("studio", 0, 4),
    }  # fmt: skip
    for part in told.parts:
        assert part.finer.bytes > 0 > part.finer.kl_nats
        assert part.coarser.bytes < 0 < part.coarser.kl_nats
        assert part.finer.seconds > 0 > part.coarser.seconds
    laptop = next(part for part in told.parts if part.node_id == "laptop")
    assert "slowest" in laptop.why
    assert "decided by the optimizer" in told.why
    nodes = {node.node_id: node for node in told.nodes}
    assert nodes["laptop"].seconds == told.seconds == max(n.seconds for n in told.nodes)
    (near,) = explain_rings(look(facts(policy, *UNLIKE)), "studio", MODEL[:4])
    assert {part.node_id for part in near.parts} == {"studio"}
    assert near.slowest == "laptop"
    assert not explain_rings(look(facts(policy, *UNLIKE)), "other")
    assert not explain_rings(look(facts(policy, *UNLIKE)), model=b"xyz")
    fast = [replace(h, prefill_tokens_per_s=1e6) for h in UNLIKE]
    assert "do not pay" in explain_rings(look(facts(policy, *fast)))[0].why
    slow = [replace(h, prefill_tokens_per_s=100) for h in UNLIKE]
    assert "prefill takes 41" in explain_rings(look(facts(policy, *slow)))[0].why
    (before,) = explain_rings(look(facts(policies.default_policy(), *UNLIKE)))
    assert "about to change" in before.why


def any_cluster(seed: int) -> tuple[Holder, ...]:
    """Pipelines, tensor-parallel sets and whole copies of a model of 8 layers and 4 heads."""
    rng = np.random.default_rng(seed)
    made: list[Holder] = []
    for ring in range(int(rng.integers(1, 4))):
        across = bool(rng.random() < 0.3)
        whole = 4 if across else 8
        cuts = np.sort(rng.choice(np.arange(1, whole), int(rng.integers(0, 3)), replace=False))
        edges = [0, *cuts.tolist(), whole]
        for place, span in enumerate(itertools.pairwise(edges)):
            made.append(
                holder(
                    f"r{ring}-{place}",
                    (0, 8) if across else span,
                    float(10 ** rng.uniform(5, 9)) if rng.random() < 0.9 else 0.0,
                    heads=span if across else (0, 4),
                    latency_s=float(rng.uniform(0, 0.05)),
                    decode=float(rng.choice([0, 1e4, 1e6])),
                )
            )
    return tuple(made)


@pytest.mark.long
@given(st.integers(0, 2**32 - 1), st.sampled_from(["default", "high_compression"]))
@settings(max_examples=40, deadline=None)
def test_whatever_the_cluster_the_policy_holds_stays_and_keeps_the_budget(
    seed: int, name: str
) -> None:
    holders, base = any_cluster(seed), policies.named_policy(name)
    made = curve(heads=4)

    def given_policy(policy: pb.Policy) -> Facts:
        return Facts(policy, {MODEL: holders}, {MODEL: made})

    policy, thinking = base, Deliberation()
    for _ in range(2 * PATIENCE + 2):
        outlook, policy = thinking.look(given_policy(policy))
    policies.check_policy(policy)
    assert policies.parse_policy(policies.dump_policy(policy).encode()) == policy
    assert base_of(policy) == base
    # Nothing is left to change, and however blobs are mixed, the budget is kept.
    outlook, again = thinking.look(given_policy(policy))
    assert again == policy
    assert not any(ring.urgent or ring.gain for ring in outlook.rings)
    plans = [(ring.ring, ring.now) for ring in outlook.rings]
    ladder = outlook.rings[0].now.problem.ladder
    assert mixture(ladder, plans, [(0, 8)]) <= base.budget_nats * 1.002
    for decision in explain_rings(outlook):
        assert decision.seconds == max(node.seconds for node in decision.nodes)
