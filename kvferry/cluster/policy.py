"""What a policy means: which layers are coded how, when, and why. Pure functions.

A policy is the message `kvferry.v1.Policy` everywhere. The first rule that fits a layer
holds; a layer that no rule fits is stored exactly (`unruled`). A rule with codec "none"
keeps its layers out of the store, and a page that lacks layers is never complete: such a
model is not stored at all. Files are read by `load_policy` (see `policy_file`).
"""

import math
from collections.abc import Mapping

from kvferry.cluster.policy_file import (
    dump_policy,
    load_policy,
    parse_policy,
    read_policy_file,
)
from kvferry.cluster.policy_rules import TRIGGERS, check_policy, span_text, unruled
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

__all__ = [
    "check_policy",
    "default_policy",
    "dump_policy",
    "explain",
    "layer_rules",
    "load_policy",
    "named_policy",
    "parse_policy",
    "policy_names",
    "read_policy_file",
    "rule_for",
    "triggers",
]

DAY_S = 86_400
# KL budgets in nats of the tiers that differ in nothing else (design section 10).
_BUDGETS: Mapping[str, float] = {
    "default": 0.005,
    "high_compression": 0.02,
    "memory_emergency": 0.1,
}


def policy_names() -> tuple[str, ...]:
    """Built-in policies, from exact to coarse."""
    return ("exact", *_BUDGETS)


def named_policy(name: str) -> pb.Policy:
    """A built-in policy, version 0. Raises: ConfigError for an unknown name."""
    if name == "exact":
        policy = _base(name, pb.LayerRule(codec="zstd"), pb.TailRule(codec="raw"))
        policy.accept.extend(("raw", "zstd"))
        return policy
    if name not in _BUDGETS:
        raise ConfigError("policy", name, f"one of {', '.join(policy_names())}, or a file")
    rule = pb.LayerRule(codec="ferry", options={"target_kl": f"{_BUDGETS[name]:g}"})
    policy = _base(name, rule, pb.TailRule(codec="affine", options={"bits": "8"}))
    if name == "memory_emergency":
        policy.when.append(pb.TRIGGER_MEMORY_PRESSURE)
    return policy


def _base(name: str, rule: pb.LayerRule, tail: pb.TailRule) -> pb.Policy:
    tail.ttl_s = DAY_S
    return pb.Policy(
        name=name,
        rules=[rule],
        when=[pb.TRIGGER_AFTER_PREFILL, pb.TRIGGER_TURN_END],
        tail=tail,
        idle_s=60,
        memory_mark=0.85,
        min_tokens=256,
    )


def default_policy() -> pb.Policy:
    """What holds where nobody has decided: all layers ``ferry`` at 0.005 nats."""
    return named_policy("default")


def _fits(rule: pb.LayerRule, model: str, layer: int) -> bool:
    if not model.startswith(rule.model.lower()):
        return False
    return rule.layer_start <= layer < (rule.layer_end or math.inf)


def rule_for(policy: pb.Policy, model_id: bytes, layer: int) -> pb.LayerRule:
    """The rule that holds for one layer (absolute index) of a model; `unruled` if none."""
    model = model_id.hex()
    return next((rule for rule in policy.rules if _fits(rule, model, layer)), unruled())


def layer_rules(
    policy: pb.Policy, model_id: bytes, layers: tuple[int, int]
) -> list[tuple[tuple[int, int], pb.LayerRule]]:
    """``layers`` cut into runs that are coded alike: (half-open range, rule), in order.

    Neighbours under different rules with the same codec and options are one run.
    """
    runs: list[tuple[tuple[int, int], pb.LayerRule]] = []
    for layer in range(*layers):
        rule = rule_for(policy, model_id, layer)
        if runs and _alike(runs[-1][1], rule):
            (start, _), first = runs[-1]
            runs[-1] = ((start, layer + 1), first)
        else:
            runs.append(((layer, layer + 1), rule))
    return runs


def _alike(a: pb.LayerRule, b: pb.LayerRule) -> bool:
    return a.codec == b.codec and a.options == b.options


def triggers(policy: pb.Policy) -> frozenset["pb.Trigger.ValueType"]:
    """The moments at which the policy stores."""
    return frozenset(policy.when)


def explain(policy: pb.Policy, model_id: bytes, layers: int) -> list[tuple[str, str]]:
    """For each layer from 0 on: its codec, and in one sentence why."""
    model = model_id.hex()
    names = {number: name for name, number in TRIGGERS.items()}
    when = ", ".join(names.get(t, str(t)) for t in policy.when) or "never by itself"
    head = f"policy {policy.name!r} version {policy.version}"
    told: list[tuple[str, str]] = []
    for layer in range(layers):
        for place, rule in enumerate(policy.rules, start=1):
            if _fits(rule, model, layer):
                told.append((rule.codec, f"{head}, {_because(place, rule)}; stored: {when}"))
                break
        else:
            codec = unruled().codec
            told.append((codec, f"{head}: no rule names this layer, so exactly; stored: {when}"))
    return told


def _because(place: int, rule: pb.LayerRule) -> str:
    whose = f"models {rule.model}..." if rule.model else "every model"
    span = span_text(rule)
    which = "all layers" if span == "all" else f"layers {span}"
    text = f"rule {place} ({which} of {whose})"
    options = " ".join(f"{name}={value}" for name, value in sorted(rule.options.items()))
    if rule.codec == "none":
        return f"{text}: not stored, so that no page of the model is"
    if rule.codec == "ferry":
        options = f"{options}; affine bits=8 where there is no calibration"
    return f"{text}: {rule.codec} {options}".rstrip()
