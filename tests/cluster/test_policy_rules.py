"""Which rule holds for which layer, and why."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster import policy as policies
from kvferry.cluster.policy_rules import CODEC_OPTIONS, DROPPING, TAIL_CODECS, check_rule
from kvferry.codec.base import drops_tokens
from kvferry.codec.registry import CODECS, codec_names
from kvferry.errors import CalibrationMissingError, ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

MODEL = bytes(range(32))
OTHER = bytes([255]) * 32


def _policy(*rules: pb.LayerRule) -> pb.Policy:
    policy = policies.default_policy()
    del policy.rules[:]
    policy.rules.extend(rules)
    return policy


def test_the_first_rule_that_fits_a_layer_holds() -> None:
    policy = _policy(
        pb.LayerRule(layer_start=2, layer_end=4, codec="raw"),
        pb.LayerRule(layer_start=0, layer_end=10, codec="affine"),
    )
    codecs = [policies.rule_for(policy, MODEL, layer).codec for layer in range(12)]
    assert codecs == ["affine"] * 2 + ["raw"] * 2 + ["affine"] * 6 + ["zstd"] * 2


def test_an_end_of_zero_reaches_the_last_layer() -> None:
    policy = _policy(pb.LayerRule(layer_start=5, codec="raw"))
    assert policies.rule_for(policy, MODEL, 4).codec == "zstd"
    assert policies.rule_for(policy, MODEL, 60_000).codec == "raw"


def test_a_rule_for_one_model_leaves_others_alone() -> None:
    policy = _policy(
        pb.LayerRule(model=MODEL.hex()[:6].upper(), codec="raw"), pb.LayerRule(codec="affine")
    )
    assert policies.rule_for(policy, MODEL, 0).codec == "raw"
    assert policies.rule_for(policy, OTHER, 0).codec == "affine"
    assert policies.rule_for(policy, b"", 0).codec == "affine"


def test_a_rule_for_one_node_leaves_others_alone() -> None:
    policy = _policy(
        pb.LayerRule(node="a", layer_end=2, codec="raw"),
        pb.LayerRule(node="b", model=OTHER.hex(), codec="zstd"),
        pb.LayerRule(codec="affine"),
    )
    assert [policies.rule_for(policy, MODEL, 0, n).codec for n in ("a", "b", "")] == [
        "raw", "affine", "affine",
    ]  # fmt: skip
    assert policies.rule_for(policy, OTHER, 5, "b").codec == "zstd"
    assert [s for s, _ in policies.layer_rules(policy, MODEL, (0, 4), "a")] == [(0, 2), (2, 4)]
    assert [s for s, _ in policies.layer_rules(policy, MODEL, (0, 4))] == [(0, 4)]
    told = policies.explain(policy, MODEL, 3, "a")
    assert "on a" in told[0][1]
    assert [codec for codec, _ in told] == ["raw", "raw", "affine"]


def test_neighbours_that_are_coded_alike_are_one_run() -> None:
    policy = _policy(
        pb.LayerRule(layer_end=3, codec="affine", options={"bits": "4"}),
        pb.LayerRule(layer_start=3, layer_end=5, codec="affine", options={"bits": "4"}),
        pb.LayerRule(codec="affine", options={"bits": "8"}),
    )
    runs = policies.layer_rules(policy, MODEL, (1, 9))
    assert [(span, rule.options["bits"]) for span, rule in runs] == [((1, 5), "4"), ((5, 9), "8")]


_rules = st.builds(
    pb.LayerRule,
    layer_start=st.integers(0, 12),
    layer_end=st.integers(13, 24) | st.just(0),
    codec=st.sampled_from(sorted(CODEC_OPTIONS)),
)


@given(st.lists(_rules, max_size=5), st.integers(0, 20), st.integers(0, 20))
def test_runs_cover_the_layers_once_and_agree_with_each_layer(
    rules: list[pb.LayerRule], start: int, length: int
) -> None:
    policy = _policy(*rules)
    runs = policies.layer_rules(policy, MODEL, (start, start + length))
    covered = [layer for (a, b), _ in runs for layer in range(a, b)]
    assert covered == list(range(start, start + length))
    for (a, b), rule in runs:
        for layer in range(a, b):
            assert policies.rule_for(policy, MODEL, layer).codec == rule.codec
    assert all(x[1].codec != y[1].codec for x, y in itertools.pairwise(runs))


def test_built_in_policies_hold_and_differ_as_the_design_says() -> None:
    assert policies.policy_names() == ("exact", "default", "high_compression", "memory_emergency")
    for name in policies.policy_names():
        policy = policies.named_policy(name)
        policies.check_policy(policy)
        assert (policy.name, policy.version) == (name, 0)
    budgets = [
        policies.named_policy(name).rules[0].options["target_kl"]
        for name in policies.policy_names()[1:]
    ]
    assert budgets == ["0.005", "0.02", "0.1"]
    tiers = [policies.named_policy(name).budget_nats for name in policies.policy_names()]
    assert tiers == [0, 0.005, 0.02, 0.1]
    exact = policies.named_policy("exact")
    assert (exact.rules[0].codec, exact.tail.codec) == ("zstd", "raw")
    assert set(exact.accept) == {"raw", "zstd"}
    default = policies.default_policy()
    assert policies.triggers(default) == {pb.TRIGGER_AFTER_PREFILL, pb.TRIGGER_TURN_END}
    assert (default.idle_s, default.memory_mark, default.min_tokens) == (60, 0.85, 256)
    assert (default.tail.codec, dict(default.tail.options)) == ("affine", {"bits": "8"})
    assert default.tail.ttl_s == 86_400
    with pytest.raises(ConfigError, match="one of exact, default"):
        policies.named_policy("fast")


def test_explain_names_the_rule_of_each_layer() -> None:
    policy = _policy(
        pb.LayerRule(layer_end=1, codec="none"),
        pb.LayerRule(layer_start=1, layer_end=2, codec="affine", options={"bits": "4"}),
    )
    policy.version = 7
    told = policies.explain(policy, MODEL, 3)
    assert [codec for codec, _ in told] == ["none", "affine", "zstd"]
    assert "rule 1" in told[0][1]
    assert "not stored" in told[0][1]
    assert "affine bits=4" in told[1][1]
    assert "version 7" in told[1][1]
    assert "after_prefill, turn_end" in told[1][1]
    assert "no rule names this layer" in told[2][1]


def test_the_policy_knows_the_registrys_codecs_and_their_options() -> None:
    assert set(CODEC_OPTIONS) == set(codec_names()) - {"kvtc"}
    assert set(TAIL_CODECS) <= set(codec_names())
    assert {name for name, codec in CODECS.items() if drops_tokens(codec)} <= set(DROPPING)
    samples = {
        "step": ["0.5"],
        "bits": ["2", "3", "4", "6", "8", "16"],
        "level": ["0", "1", "22", "23"],
        "page_size_kb": ["15", "16", "64", "65"],
        "ratio": ["0.9", "1", "4", "1e6", "1e7", "nan", "x"],
        "similarity": ["-1.1", "-1", "0.9", "1", "2"],
        "init_preserve": ["-1", "0", "16777217"],
        "flush": ["0", "1", "1024", "1025"],
        "persistence": ["-1", "0", "3", "0.5"],
        "min_merge": ["0", "1", "9"],
        "window": ["0", "1", "512", "16777216", "16777217", "1.5"],
        "sinks": ["-1", "0", "4", "65536", "65537"],
        "keep": ["0", "0.25", "1", "1.1", "inf"],
        "seed": ["-1", "0", "7", str(2**53)],
        "positions": ["contiguous", "original", "both"],
        "rank": ["0", "1", "4096", "4097", "1.5"],
        "target": ["v", "k", "kv", "q"],
        "identity": ["0-4,29", "3", "4-4", "a", "0-", "-1", "0-4096, 7", "0-4097", "", "1,,2"],
        "ln_nullspace": ["true", "false", "auto", "True"],
        "policy": ["default", "high_compression", "memory_emergency", "exact"],
    }
    for codec, known in CODEC_OPTIONS.items():
        if codec == "ferry":
            continue  # needs a calibration before it looks at options
        for name, (holds, _) in known.items():
            for text in samples[name]:
                try:
                    CODECS[codec].from_options({name: text}, None, ())
                except ConfigError:
                    assert not holds(text), (codec, name, text)
                except CalibrationMissingError:  # asked for last
                    assert holds(text), (codec, name, text)
                else:
                    assert holds(text), (codec, name, text)


@pytest.mark.parametrize("codec", sorted(set(CODEC_OPTIONS) - {"ferry", "lowrank"}))
def test_the_policy_takes_the_pairs_of_options_that_the_codec_takes(codec: str) -> None:
    sample = {"positions": "original", "similarity": "0.9", "keep": "0.5", "page_size_kb": "32"}
    sample |= {"bits": "8", "level": "3", "ratio": "4"}
    for pair in itertools.combinations(CODEC_OPTIONS[codec], 2):
        options = {name: sample.get(name, "8") for name in pair}
        rule = pb.LayerRule(codec=codec, options=options)
        try:
            CODECS[codec].from_options(options, None, ())
        except ConfigError:
            with pytest.raises(ConfigError, match="either"):
                check_rule(rule, "rules[0]")
        else:
            check_rule(rule, "rules[0]")


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"step": "1", "adapt": "1"}, True),
        ({"target_kl": "0.01", "adapt": "0.5"}, True),
        ({"step": "1", "target_kl": "0.01"}, False),
        ({"adapt": "1"}, False),
        ({}, False),
    ],
)
def test_ferry_is_given_a_step_or_a_target(options: dict[str, str], taken: bool) -> None:
    rule = pb.LayerRule(codec="ferry", options=options)
    if taken:
        check_rule(rule, "rules[0]")
        return
    with pytest.raises(ConfigError, match="either target_kl or step"):
        check_rule(rule, "rules[0]")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda p: setattr(p.rules[0], "codec", "gzip"), "rules[0].codec"),
        (lambda p: setattr(p.rules[0], "model", "xyz"), "rules[0].model"),
        (lambda p: setattr(p.rules[0], "layer_start", 70_000), "rules[0].layers"),
        (lambda p: p.rules.add(layer_start=4, layer_end=4, codec="raw"), "rules[1].layers"),
        (lambda p: p.rules[0].options.update(target_kl="0"), "rules[0].options.target_kl"),
        (lambda p: p.rules[0].options.update(target_kl="nan"), "rules[0].options.target_kl"),
        (lambda p: p.rules[0].options.update(step="1"), "rules[0].options"),
        (lambda p: p.rules[0].options.clear(), "rules[0].options"),
        (lambda p: p.rules[0].options.update(bits="8"), "rules[0].options.bits"),
        (lambda p: p.tail.options.update(bits="8.0"), "tail.options.bits"),
        (lambda p: setattr(p.tail, "codec", "ferry"), "tail.codec"),
        (lambda p: setattr(p.tail, "ttl_s", 0), "tail.ttl_s"),
        (lambda p: p.when.append(99), "when"),
        (lambda p: p.when.append(pb.TRIGGER_TURN_END), "when"),
        (lambda p: p.accept.append("gzip"), "accept"),
        (lambda p: p.accept.append("streaming"), "accept"),
        (lambda p: setattr(p, "memory_mark", 1.5), "memory_mark"),
        (lambda p: setattr(p, "memory_mark", float("nan")), "memory_mark"),
        (lambda p: setattr(p, "idle_s", 0), "idle_s"),
        (lambda p: setattr(p, "budget_nats", float("inf")), "budget_nats"),
        (lambda p: setattr(p.switch, "high_compression", -1), "switch.high_compression"),
        (lambda p: setattr(p, "tier", "\n"), "tier"),
        (lambda p: setattr(p.rules[0], "node", "n" * 200), "rules[0].node"),
        (lambda p: setattr(p, "name", 'a"\n'), "name"),
    ],
)
def test_a_policy_that_cannot_hold_is_refused_by_field(change: object, field: str) -> None:
    policy = policies.default_policy()
    change(policy)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        policies.check_policy(policy)
    assert caught.value.name == field
    assert "\n" not in str(caught.value)
