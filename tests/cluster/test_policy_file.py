"""Policy files: what is read, what is refused, and that writing reads back."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cluster import policy as policies
from kvferry.cluster.policy_rules import CODEC_OPTIONS, DROPPING, TRIGGERS
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

FULL = """
name = "laptop"
when = ["turn_end", "memory_pressure", "idle"]
accept = ["ferry", "affine"]
idle_s = 30
memory_mark = 0.7
min_tokens = 512
budget_nats = 0.01

[switch]
high_compression = 0.9

[[rules]]
layers = ["0-4", "10-14"]
model = "AB12"
codec = "affine"
options = { bits = 4 }

[[rules]]
layers = "20-"
codec = "none"

[[rules]]
layers = "7"
codec = "raw"
node = "laptop.local"

[[rules]]
codec = "ferry"
options = { target_kl = 0.02 }

[tail]
codec = "recompute"
ttl_s = 60
"""


def _text(text: str) -> pb.Policy:
    return policies.parse_policy(text.encode(), "p.toml", "p")


def test_every_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(FULL)
    policy = policies.load_policy(path)
    assert policy.version == 0
    assert policy.name == "laptop"
    assert list(policy.when) == [
        pb.TRIGGER_TURN_END, pb.TRIGGER_MEMORY_PRESSURE, pb.TRIGGER_IDLE,
    ]  # fmt: skip
    assert list(policy.accept) == ["ferry", "affine"]
    assert (policy.idle_s, policy.memory_mark, policy.min_tokens) == (30, 0.7, 512)
    spans = [(r.layer_start, r.layer_end, r.model, r.codec) for r in policy.rules]
    assert spans == [
        (0, 4, "ab12", "affine"),
        (10, 14, "ab12", "affine"),
        (20, 0, "", "none"),
        (7, 8, "", "raw"),
        (0, 0, "", "ferry"),
    ]
    assert [r.node for r in policy.rules] == ["", "", "", "laptop.local", ""]
    assert policy.budget_nats == 0.01
    assert policy.switch == pb.PressureSwitch(high_compression=0.9, hysteresis=0.05)
    assert dict(policy.rules[0].options) == {"bits": "4"}
    assert dict(policy.rules[4].options) == {"target_kl": "0.02"}
    assert (policy.tail.codec, policy.tail.ttl_s) == ("recompute", 60)


def test_what_a_file_leaves_out_is_as_in_the_default_policy() -> None:
    policy = _text('name = "default"\n[[rules]]\ncodec = "ferry"\noptions = {target_kl = 0.005}')
    assert not policy.budget_nats  # the optimizer decides nothing that it is not told to
    policy.budget_nats = 0.005
    assert policy == policies.default_policy()
    assert _text("").name == "p"  # the file's name


@pytest.mark.parametrize(
    ("text", "field", "part"),
    [
        ("colour = 1", "colour", "known are name, rules"),
        ("when = ['sunrise']", "when[0]", "after_prefill"),
        ("when = 'idle'", "when", "list"),
        (r'"a\nb" = 1', r"'a\nb'", "known are"),
        ("idle_s = 0.5", "idle_s", "whole number"),
        ("idle_s = true", "idle_s", "whole number"),
        ("memory_mark = 2", "memory_mark", "at most 1"),
        ("memory_mark = 'much'", "memory_mark", "share"),
        ("min_tokens = -1", "min_tokens", "whole number"),
        ("accept = ['gzip']", "accept", "ferry"),
        ("budget_nats = -1", "budget_nats", "nats from 0"),
        ("budget_nats = nan", "budget_nats", "nats from 0"),
        ("budget_nats = '1'", "budget_nats", "number of nats"),
        ("budget_nats = 1" + "0" * 400, "budget_nats", "number of nats"),
        ("switch = 3", "switch", "[switch]"),
        ("[switch]\nlow = 1", "switch.low", "high_compression"),
        ("[switch]\nhigh_compression = 2", "switch.high_compression", "share of memory"),
        ("[switch]\nhysteresis = 0.9", "switch.hysteresis", "0 to 0.5"),
        (
            "[switch]\nhigh_compression = 0.9\nmemory_emergency = 0.8",
            "switch.memory_emergency",
            "above",
        ),
        ("tier = 3", "tier", "text"),
        ("[[rules]]\ncodec = 'raw'\nnode = 'a b'", "rules[0].node", "without spaces"),
        ("[[rules]]\ncodec = 'none'\nnode = 'a'", "rules[0].node", "none"),
        ("[[rules]]\ncodec = 'raw'\ndecided = 1", "rules[0].decided", "true or false"),
        ("rules = 3", "rules", "[[rules]]"),
        ("tail = 3", "tail", "[tail]"),
        ("[tail]\nttl = 3", "tail.ttl", "ttl_s"),
        ("[tail]\ncodec = 'ferry'", "tail.codec", "recompute"),
        ("[tail]\noptions = {bits = 5}", "tail.options.bits", "2, 3, 4, 8"),
        ("[[rules]]", "rules[0].codec", "given"),
        ("[[rules]]\ncodec = 'feryr'", "rules[0].codec", "ferry"),
        ("[[rules]]\ncodec = 'raw'\nlayer = '0'", "rules[0].layer", "layers"),
        ("[[rules]]\ncodec = 'raw'\nlayers = '9-3'", "rules[0].layers", "half-open"),
        ("[[rules]]\ncodec = 'raw'\nlayers = '3-3'", "rules[0].layers", "half-open"),
        ("[[rules]]\ncodec = 'raw'\nlayers = 3", "rules[0].layers", "half-open"),
        ("[[rules]]\ncodec = 'raw'\nlayers = '0-999999'", "rules[0].layers", "half-open"),
        ("[[rules]]\ncodec = 'raw'\nlayers = []", "rules[0].layers", "at least one"),
        ("[[rules]]\ncodec = 'raw'\nmodel = 'llama'", "rules[0].model", "hex"),
        ("[[rules]]\ncodec = 'raw'\noptions = {bits = 8}", "rules[0].options.bits", "none"),
        ("[[rules]]\ncodec = 'ferry'\noptions = {step = [1]}", "rules[0].options.step", "number"),
        ("[[rules]]\ncodec = 'ferry'", "rules[0].options", "either target_kl or step"),
        ("[[rules]]\ncodec = 'ferry'\noptions = 1", "rules[0].options", "table"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_field(
    text: str, field: str, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _text(text)
    assert caught.value.name == f"p.toml: {field}"
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_toml_says_where() -> None:
    with pytest.raises(ConfigError, match=r"p\.toml.*line 2"):
        _text("name = 'x'\nrules = \n")
    with pytest.raises(ConfigError, match="TOML"):
        policies.parse_policy(b"\xff\xfe", "p.toml")
    with pytest.raises(ConfigError, match="TOML"):
        _text("a = " + "[" * 100_000)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        policies.load_policy(tmp_path / "none.toml")
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="at most"):
        policies.load_policy(huge)


def _options(codec: str) -> st.SearchStrategy[dict[str, str]]:
    values: dict[str, Any] = {
        "ferry": st.floats(1e-9, 10).map(str),
        "zstd": {"level": st.integers(1, 22).map(str)},
        "affine": {"bits": st.sampled_from(["2", "3", "4", "8"])},
        "streaming": {
            "window": st.integers(1, 999).map(str),
            "sinks": st.integers(0, 9).map(str),
            "positions": st.sampled_from(["contiguous", "original"]),
        },
        "random": {"keep": st.floats(0.01, 1).map(str), "seed": st.integers(0, 99).map(str)},
    }
    if codec == "ferry":  # exactly one of the two
        return st.sampled_from(["target_kl", "step"]).flatmap(
            lambda name: st.fixed_dictionaries({name: values["ferry"]})
        )
    return st.fixed_dictionaries({}, optional=values.get(codec, {}))


_rule = st.sampled_from([*CODEC_OPTIONS, "none"]).flatmap(
    lambda codec: st.builds(
        pb.LayerRule,
        layer_start=st.integers(0, 9),
        layer_end=st.integers(10, 99) | st.just(0),
        codec=st.just(codec),
        options=_options(codec),
        model=st.sampled_from(["", "ab", "00ff" * 16]),
        node=st.just("") if codec == "none" else st.text('aé"\\😀', max_size=5),
        decided=st.booleans(),
    )
)
_switches = st.builds(
    pb.PressureSwitch,
    high_compression=st.floats(0, 0.5),
    memory_emergency=st.floats(0.51, 1) | st.just(0.0),
    hysteresis=st.floats(0, 0.5),
)
_policies = st.builds(
    pb.Policy,
    name=st.text("abÄé09 .+-_", min_size=1, max_size=20),
    rules=st.lists(_rule, max_size=4),
    when=st.lists(st.sampled_from(sorted(TRIGGERS.values())), unique=True),
    accept=st.lists(st.sampled_from(sorted(set(CODEC_OPTIONS) - set(DROPPING))), max_size=3),
    idle_s=st.integers(1, 86_400),
    memory_mark=st.floats(0.01, 1.0),
    min_tokens=st.integers(0, 1 << 31),
    budget_nats=st.floats(0, 10),
    switch=st.none() | _switches,
    tier=st.sampled_from(["", "high_compression"]),
    tail=st.builds(
        pb.TailRule,
        codec=st.sampled_from(["raw", "recompute"]),
        ttl_s=st.integers(1, 1000),
    ),
)


@given(_policies)
def test_a_policy_that_is_written_reads_back_equal(policy: pb.Policy) -> None:
    policies.check_policy(policy)
    assert _text(policies.dump_policy(policy)) == policy


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_a_policy_or_a_config_error(raw: bytes) -> None:
    try:
        policy = policies.parse_policy(raw)
    except ConfigError as exc:
        policy, said = policies.default_policy(), str(exc)
    else:
        said = ""
    policies.check_policy(policy)
    assert "\n" not in said
