"""Choices as rules of a policy, and rules as choices; and the operator's part of a policy."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvferry.cluster.optimizer.holder import Holder, Range
from kvferry.cluster.optimizer.ladder import AFFINE_BITS, EXACT_BITS, Choice, Ints, Ladder
from kvferry.cluster.optimizer.pressure import EMERGENCY
from kvferry.cluster.policy_match import layer_rules
from kvferry.cluster.policy_rules import NOT_STORED
from kvferry.proto.v1 import coordinator_pb2 as pb

MODEL_DIGITS = 16
MAX_DECIDED = 6400
MAX_DECIDED_BYTES = 768 << 10


def base_of(policy: pb.Policy) -> pb.Policy:
    """What the operator decided: without the optimizer's rules and tier."""
    base = pb.Policy()
    base.CopyFrom(policy)
    del base.rules[:]
    base.rules.extend(rule for rule in policy.rules if not rule.decided)
    base.tier = ""
    if base.tier_trigger:
        base.when.remove(pb.TRIGGER_MEMORY_PRESSURE)
        base.tier_trigger = False
    return base


def leaves_open(rule: pb.LayerRule) -> bool:
    """Whether a rule of the operator's says how much may be lost, and nothing of how."""
    return rule.codec == "ferry" and set(rule.options) == {"target_kl"}


def free_layers(base: pb.Policy, model_id: bytes, layers: int) -> list[Range]:
    """Runs of layers whose coding the operator's rules leave open on every node."""
    named = {rule.node for rule in base.rules if rule.node}
    open_ = np.ones(layers, dtype=bool)
    for node in ("", *sorted(named)):
        for span, rule in layer_rules(base, model_id, (0, layers), node):
            if not leaves_open(rule):
                open_[slice(*span)] = False
    edges = np.flatnonzero(np.diff(np.r_[0, open_.astype(np.int8), 0]))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def fixed_bits(
    base: pb.Policy, ladder: Ladder, model_id: bytes, holder: Holder, free: Sequence[Range]
) -> float:
    """Bits a token of what a node holds and the operator's rules decide."""
    if list(free) == [(0, ladder.layers[-1][1])]:
        return 0.0
    taken = {layer for span in free for layer in range(*span)}
    bits = 0.0
    for layers, heads in holder.parts:
        share = (heads[1] - heads[0]) / ladder.heads
        for span, rule in layer_rules(base, model_id, layers, holder.node_id):
            for group, (start, end) in enumerate(ladder.layers):
                rows = range(max(span[0], start), min(span[1], end))
                left = sum(1 for layer in rows if layer not in taken)
                bits += left / (end - start) * share * ladder.widths[group] * _per_value(rule)
    return bits


def _per_value(rule: pb.LayerRule) -> float:
    if rule.codec == "affine":
        return AFFINE_BITS - 8 + int(rule.options.get("bits", "8"))
    if rule.codec == "bitpack":
        return int(rule.options.get("bits", "6")) + 0.2
    return 1.0 if rule.codec == "ferry" else EXACT_BITS


@dataclass(frozen=True, slots=True)
class Decided:
    """The optimizer's rules of a policy.

    Attributes:
        runs: (node, model digits) -> runs of layers and choices.
        unstored: model digits of those that are not stored, as no restore pays.
    """

    runs: Mapping[tuple[str, str], tuple[tuple[Range, Choice], ...]] = field(default_factory=dict)
    unstored: frozenset[str] = frozenset()

    @classmethod
    def of(cls, policy: pb.Policy) -> "Decided":
        """Those in a policy."""
        found: dict[tuple[str, str], list[tuple[Range, Choice]]] = {}
        none = {rule.model for rule in policy.rules if rule.decided and rule.codec == NOT_STORED}
        for rule in policy.rules:
            if rule.decided and rule.node:
                choice = Choice(rule.codec, tuple(sorted(rule.options.items())))
                span = (rule.layer_start, rule.layer_end)
                found.setdefault((rule.node, rule.model), []).append((span, choice))
        runs = {k: tuple(sorted(runs, key=lambda run: run[0])) for k, runs in found.items()}
        return cls(runs, frozenset(none))

    def choice_at(self, node: str, model_id: bytes, layer: int) -> Choice | None:
        """None: no rule of the optimizer's holds there."""
        runs = self.runs.get((node, digits(model_id)), ())
        at = bisect_right(runs, layer, key=lambda run: run[0][0]) - 1
        return runs[at][1] if at >= 0 and layer < runs[at][0][1] else None

    def columns(self, ladder: Ladder, model_id: bytes, holders: Sequence[Holder]) -> Ints | None:
        """(nodes, groups) columns as these rules have them; None where one is not known.

        What they say nothing of has the one step for all of ``ladder``.
        """
        found = np.full((len(holders), len(ladder.layers)), ladder.alike)
        for node, holder in enumerate(holders):
            for group, (start, end) in enumerate(ladder.layers):
                held = [max(a, start) for (a, b), _ in holder.parts if a < end and start < b]
                choice = self.choice_at(holder.node_id, model_id, held[0]) if held else None
                if choice is not None:
                    if choice not in ladder.index:
                        return None
                    found[node, group] = ladder.index[choice]
        return found


def digits(model_id: bytes) -> str:
    """How decided rules name a model."""
    return model_id.hex()[:MODEL_DIGITS]


def runs_of(
    ladder: Ladder, holder: Holder, columns: Ints, free: Iterable[Range]
) -> tuple[tuple[Range, Choice], ...]:
    """One node's (groups,) columns as runs of the free layers that it holds."""
    by_layer: dict[int, Choice] = {}
    open_ = [layer for span in free for layer in range(*span)]
    group_at = np.searchsorted([end for _, end in ladder.layers], open_, side="right")
    held = [layers for layers, _ in holder.parts]
    for layer, group in zip(open_, group_at, strict=True):
        if any(a <= layer < b for a, b in held):
            by_layer[layer] = ladder.choices[int(columns[group])]
    runs: list[tuple[Range, Choice]] = []
    for layer in sorted(by_layer):
        choice = by_layer[layer]
        if runs and runs[-1][0][1] == layer and runs[-1][1] == choice:
            runs[-1] = ((runs[-1][0][0], layer + 1), choice)
        else:
            runs.append(((layer, layer + 1), choice))
    return tuple(runs)


def compose(base: pb.Policy, decided: Decided, tier: str, tier_budget: float) -> pb.Policy:
    """The operator's policy with the optimizer's part in it; version as in ``base``.

    Rules that leave the coding open are preceded, under a tier, by their like with the
    tier's budget: for models without a curve, and nodes that nothing was decided for.
    In an emergency, what waits for another moment is stored under memory pressure too, as
    the built-in policy of that name has it.
    """
    made = base_of(base)
    operators = list(made.rules)
    del made.rules[:]
    made.tier = tier
    if tier == EMERGENCY and pb.TRIGGER_MEMORY_PRESSURE not in made.when:
        made.when.append(pb.TRIGGER_MEMORY_PRESSURE)
        made.tier_trigger = True
    for model in sorted(decided.unstored):
        made.rules.add(codec=NOT_STORED, model=model, decided=True)
    for (node, model), runs in sorted(decided.runs.items()):
        for (start, end), choice in runs:
            made.rules.add(
                layer_start=start,
                layer_end=end,
                codec=choice.codec,
                options=dict(choice.options),
                model=model,
                node=node,
                decided=True,
            )
    for rule in operators:
        if tier and leaves_open(rule) and float(rule.options["target_kl"]) < tier_budget:
            coarser = made.rules.add()
            coarser.CopyFrom(rule)
            coarser.options["target_kl"] = f"{tier_budget:g}"
            coarser.decided = True
        made.rules.append(rule)
    return made


def too_many(policy: pb.Policy) -> bool:
    """Whether a policy has grown beyond what every node can be told."""
    decided = sum(rule.decided for rule in policy.rules)
    return decided > MAX_DECIDED or policy.ByteSize() > MAX_DECIDED_BYTES
