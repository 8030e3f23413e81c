"""What a policy means: which layers are coded how, when, and why. Pure functions.

A policy is the message `kvferry.v1.Policy` everywhere. The first rule that fits a layer and
the node holds; a layer that no rule fits is stored exactly (`unruled`). A rule with codec
"none" keeps its layers out of the store, and a page that lacks layers is never complete: such
a model is not stored at all. Files are read by `load_policy` (see `policy_file`).

Where ``budget_nats`` is set, rules with a ``target_kl`` say no more than that: how the layers
under them are coded is left to the optimizer (`kvferry.cluster.optimizer`), whose own rules
stand before them and are marked ``decided``.
"""

from kvferry.cluster.optimizer.pressure import TIER_BUDGETS
from kvferry.cluster.policy_file import (
    dump_policy,
    load_policy,
    parse_policy,
    read_policy_file,
)
from kvferry.cluster.policy_match import holding, layer_rules, rule_for, rules_for
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


def policy_names() -> tuple[str, ...]:
    """Built-in policies, from exact to coarse."""
    return ("exact", *TIER_BUDGETS)


def named_policy(name: str) -> pb.Policy:
    """A built-in policy, version 0. Raises: ConfigError for an unknown name."""
    if name == "exact":
        policy = _base(name, pb.LayerRule(codec="zstd"), pb.TailRule(codec="raw"))
        policy.accept.extend(("raw", "zstd"))
        return policy
    if name not in TIER_BUDGETS:
        raise ConfigError("policy", name, f"one of {', '.join(policy_names())}, or a file")
    rule = pb.LayerRule(codec="ferry", options={"target_kl": f"{TIER_BUDGETS[name]:g}"})
    policy = _base(name, rule, pb.TailRule(codec="affine", options={"bits": "8"}))
    policy.budget_nats = TIER_BUDGETS[name]
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


def triggers(policy: pb.Policy) -> frozenset["pb.Trigger.ValueType"]:
    """The moments at which the policy stores."""
    return frozenset(policy.when)


def explain(
    policy: pb.Policy, model_id: bytes, layers: int, node: str = ""
) -> list[tuple[str, str]]:
    """For each layer from 0 on: its codec, and in one sentence why."""
    rules = rules_for(policy, model_id, node)
    names = {number: name for name, number in TRIGGERS.items()}
    when = ", ".join(names.get(t, str(t)) for t in policy.when) or "never by itself"
    head = f"policy {policy.name!r} version {policy.version}"
    told: list[tuple[str, str]] = []
    for layer in range(layers):
        found = holding(rules, layer)
        if found is None:
            codec = unruled().codec
            told.append((codec, f"{head}: no rule names this layer, so exactly; stored: {when}"))
        else:
            why = f"{head}, {_because(*found)}; stored: {when}"
            told.append((found[1].codec, why))
    return told


def _because(place: int, rule: pb.LayerRule) -> str:
    whose = f"models {rule.model}..." if rule.model else "every model"
    span = span_text(rule)
    which = "all layers" if span == "all" else f"layers {span}"
    where = f" on {rule.node}" if rule.node else ""
    text = f"rule {place} ({which} of {whose}{where})"
    if rule.decided:
        text = f"{text}, of the optimizer"
    options = " ".join(f"{name}={value}" for name, value in sorted(rule.options.items()))
    if rule.codec == "none":
        return f"{text}: not stored, so that no page of the model is"
    if rule.codec == "ferry":
        options = f"{options}; affine bits=8 where there is no calibration"
    return f"{text}: {rule.codec} {options}".rstrip()
