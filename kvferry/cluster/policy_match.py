"""Which rule of a policy holds for which layer of a model on which node. Pure functions."""

import math
from collections.abc import Sequence

from kvferry.cluster.policy_rules import unruled
from kvferry.proto.v1 import coordinator_pb2 as pb


def rules_for(policy: pb.Policy, model_id: bytes, node: str = "") -> list[tuple[int, pb.LayerRule]]:
    """Rules that may hold for a model on a node, in order, with their places from 1 on.

    Args:
        node: its id; empty: as nodes do that no rule names.
    """
    model = model_id.hex()
    return [
        (place, rule)
        for place, rule in enumerate(policy.rules, start=1)
        if (not rule.node or rule.node == node) and model.startswith(rule.model.lower())
    ]


def holding(
    rules: Sequence[tuple[int, pb.LayerRule]], layer: int
) -> tuple[int, pb.LayerRule] | None:
    """The first of ``rules`` that names a layer, and its place; None: none does."""
    for place, rule in rules:
        if rule.layer_start <= layer < (rule.layer_end or math.inf):
            return place, rule
    return None


def rule_for(policy: pb.Policy, model_id: bytes, layer: int, node: str = "") -> pb.LayerRule:
    """The rule that holds for one layer (absolute index) of a model; `unruled` if none."""
    found = holding(rules_for(policy, model_id, node), layer)
    return unruled() if found is None else found[1]


def layer_rules(
    policy: pb.Policy, model_id: bytes, layers: tuple[int, int], node: str = ""
) -> list[tuple[tuple[int, int], pb.LayerRule]]:
    """``layers`` cut into runs that are coded alike: (half-open range, rule), in order.

    Neighbours under different rules with the same codec and options are one run.
    """
    rules = rules_for(policy, model_id, node)
    runs: list[tuple[tuple[int, int], pb.LayerRule]] = []
    for layer in range(*layers):
        found = holding(rules, layer)
        rule = unruled() if found is None else found[1]
        if runs and _alike(runs[-1][1], rule):
            (start, _), first = runs[-1]
            runs[-1] = ((start, layer + 1), first)
        else:
            runs.append(((layer, layer + 1), rule))
    return runs


def _alike(a: pb.LayerRule, b: pb.LayerRule) -> bool:
    return a.codec == b.codec and a.options == b.options
