"""A scenario played through: the same requests with the optimizer, with one step for all
layers of all nodes, and without stored caches.

What is modelled: a set of nodes serves one request after the other; what is stored of its
conversation is restored where that is quicker than prefill (as `kvferry.node.hooks.worth`
decides), and the rest is prefilled; the restore ends with the slowest node's link and
decoding; what is new is stored as the policy says. The coordinator sees links with the
jitter of real measurements and decides with the very code that a running one decides with.
Not modelled: losses, uploads that wait, and memory that runs out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvferry.cluster.optimizer.decide import Facts, Outlook
from kvferry.cluster.optimizer.deliberate import Deliberation
from kvferry.cluster.optimizer.ladder import Floats, Ints, Ladder, make_ladder
from kvferry.cluster.optimizer.pressure import budget_of
from kvferry.cluster.optimizer.rings import Ring, make_rings
from kvferry.cluster.optimizer.rules import Decided, base_of, digits
from kvferry.cluster.optimizer.scenario import MODEL_ID, Scenario
from kvferry.cluster.optimizer.serving import Cluster, World
from kvferry.cluster.optimizer.simulated import Run
from kvferry.cluster.optimizer.trace import Request, requests_of
from kvferry.cluster.policy import load_policy, named_policy, policy_names
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

WAYS = ("optimizer", "one step", "prefill")


def base_policy(name: str) -> pb.Policy:
    """A built-in policy, or a file's. Raises: ConfigError."""
    if name in policy_names():
        return named_policy(name)
    if not Path(name).is_file():
        raise ConfigError("policy", name, f"one of {', '.join(policy_names())}, or a file")
    return base_of(load_policy(Path(name)))


def play(scenario: Scenario, way: str, advance: Callable[[int], None] = lambda _: None) -> Run:
    """One way through a scenario's requests; see `WAYS`.

    Args:
        advance: called with requests done since the last call.
    Raises: ConfigError: the policy cannot be used, or no machines hold the whole model.
    """
    ladder, run = make_ladder(scenario.curve), Run(way)
    policy = base_policy(scenario.policy)
    whole = scenario.curve.model_layers, scenario.curve.model_heads
    world = World(scenario)
    rings = make_rings(MODEL_ID, world.measure(), *whole)
    if not rings:
        raise ConfigError("machines", len(scenario.machines), "enough to hold all layers")
    cluster, thinking = Cluster(scenario, ladder, rings), Deliberation()
    coding = _Coding.of(scenario.curve, rings, cluster.share, policy)
    coded = coding.bits()
    looked = -scenario.decide_every_s
    for request in _with_looks(requests_of(scenario), scenario):
        if world.until(request.at_s) or request.at_s - looked >= scenario.decide_every_s:
            looked = request.at_s
            if way == "optimizer":
                facts = Facts(
                    policy, {MODEL_ID: world.measure()}, {MODEL_ID: scenario.curve},
                    memory_used_share=world.fullest,
                )  # fmt: skip
                outlook, made = thinking.look(facts)
                if made != policy:
                    _note(run, request.at_s, outlook, policy, made)
                    policy = made
                    coding = _Coding.of(scenario.curve, rings, cluster.share, policy)
                    coded = coding.bits()
        if request.tokens:
            cluster.serve(request, world.machines, coded, way != "prefill", run, coding.stored)
            advance(1)
    if way != "prefill":
        run.bits_per_value, run.kl_nats = coding.at_the_end()
    return run


def _with_looks(requests: Sequence[Request], scenario: Scenario) -> Iterator[Request]:
    """Requests, and empty ones where the coordinator looks although nothing is asked."""
    looks = np.arange(0.0, scenario.trace.seconds, scenario.decide_every_s)
    empty = [Request(float(at), 0, 0, 0) for at in looks]
    yield from sorted([*requests, *empty], key=lambda request: request.at_s)


@dataclass(frozen=True, slots=True)
class _Coding:
    """A policy on paper: per ring, (nodes, groups) columns of the ladder."""

    ladder: Ladder
    rings: Sequence[Ring]
    shares: Sequence[Floats]
    columns: Sequence[Ints]
    stored: bool = True

    @classmethod
    def of(
        cls,
        curve: pb.ModelCurve,
        rings: Sequence[Ring],
        shares: Sequence[Floats],
        policy: pb.Policy,
    ) -> "_Coding":
        ladder = make_ladder(curve, budget_of(base_of(policy), policy.tier))
        decided = Decided.of(policy)
        found = [decided.columns(ladder, MODEL_ID, ring.holders) for ring in rings]
        columns = [
            np.full(share.shape, ladder.alike) if known is None else known
            for share, known in zip(shares, found, strict=True)
        ]
        return cls(ladder, rings, shares, columns, digits(MODEL_ID) not in decided.unstored)

    def bits(self) -> list[Floats]:
        """Per ring, (groups,) bits of a token."""
        every = np.arange(len(self.ladder.layers))
        taken = zip(self.shares, self.columns, strict=True)
        return [(share * self.ladder.bits[every, at]).sum(axis=0) for share, at in taken]

    def at_the_end(self) -> tuple[dict[str, float], float]:
        """Machine -> bits per value, and the KL of the worst ring."""
        every, worst, ladder = np.arange(len(self.ladder.layers)), 0.0, self.ladder
        density: dict[str, float] = {}
        for ring, share, at in zip(self.rings, self.shares, self.columns, strict=True):
            worst = max(worst, float((share * ladder.kl[every, at]).sum()))
            bits = (share * ladder.bits[every, at]).sum(axis=1) / (share @ ladder.widths)
            density |= {h.node_id: float(b) for h, b in zip(ring.holders, bits, strict=True)}
        return density, worst


def _note(run: Run, at_s: float, outlook: Outlook, old: pb.Policy, new: pb.Policy) -> None:
    if new.tier != old.tier:
        run.tiers.append((at_s, new.tier))
    run.changes.append((at_s, max((r.best.deadline for r in outlook.rings), default=0.0)))
