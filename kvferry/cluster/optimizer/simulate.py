"""A scenario played through: the same requests with the optimizer, with one step for all
layers of all nodes, and without stored caches.

What is modelled: a set of nodes serves one request after the other; what is stored of its
conversation is restored where that is quicker than prefill (as `kvferry.node.hooks.worth`
decides), and the rest is prefilled; the restore ends with the slowest node's link and
decoding; what is new is stored as the policy says. The coordinator sees links with the
jitter of real measurements and decides with the very code that a running one decides with.
Not modelled: losses, uploads that wait, and memory that runs out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from kvferry.cluster.optimizer.decide import Facts, Outlook
from kvferry.cluster.optimizer.deliberate import Deliberation
from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.ladder import Floats, Ints, Ladder, make_ladder
from kvferry.cluster.optimizer.pressure import budget_of
from kvferry.cluster.optimizer.problem import shares_of
from kvferry.cluster.optimizer.rings import Ring, make_rings
from kvferry.cluster.optimizer.rules import Decided, base_of, digits
from kvferry.cluster.optimizer.scenario import MODEL_ID, Machine, Scenario
from kvferry.cluster.policy import load_policy, named_policy, policy_names
from kvferry.errors import ConfigError
from kvferry.proto.v1 import coordinator_pb2 as pb

MARGIN = 1.2  # as kvferry.node.hooks.worth has it
SMOOTHING = 0.3
WAYS = ("optimizer", "one step", "prefill")


@dataclass(frozen=True, slots=True)
class Request:
    """At a time, of a conversation: so many tokens, of which the last ``new`` are new."""

    at_s: float
    conversation: int
    tokens: int
    new: int


@dataclass(frozen=True, slots=True)
class Served:
    """How one request went."""

    at_s: float
    ttft_s: float
    restore_s: float
    restored: int
    tokens: int


@dataclass(slots=True)
class Run:
    """One way through the trace.

    Attributes:
        served: requests in order.
        stored_bytes: put into the store.
        changes: (second, deadline in seconds) whenever another policy came into force.
        kl_nats: of the policy in force at the end, the worst set of nodes.
        bits_per_value: machine -> of what it stores at the end.
        tiers: (second, tier) whenever memory pressure changed it.
    """

    way: str
    served: list[Served] = field(default_factory=list)
    stored_bytes: float = 0.0
    changes: list[tuple[float, float]] = field(default_factory=list)
    kl_nats: float = 0.0
    bits_per_value: dict[str, float] = field(default_factory=dict)
    tiers: list[tuple[float, str]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """What is worth comparing."""
        ttft = np.array([s.ttft_s for s in self.served]) if self.served else np.zeros(1)
        restores = np.array([s.restore_s for s in self.served if s.restored])
        restores = restores if restores.size else np.zeros(1)
        tokens = sum(s.tokens for s in self.served)
        return {
            "requests": len(self.served),
            "ttft_p50_s": float(np.percentile(ttft, 50)),
            "ttft_p90_s": float(np.percentile(ttft, 90)),
            "restore_p50_s": float(np.percentile(restores, 50)),
            "restore_p90_s": float(np.percentile(restores, 90)),
            "restored_share": sum(s.restored for s in self.served) / max(1, tokens),
            "stored_bytes": self.stored_bytes,
            "policy_changes": len(self.changes),
            "kl_nats": self.kl_nats,
        }


def base_policy(name: str) -> pb.Policy:
    """A built-in policy, or a file's. Raises: ConfigError."""
    if name in policy_names():
        return named_policy(name)
    if not Path(name).is_file():
        raise ConfigError("policy", name, f"one of {', '.join(policy_names())}, or a file")
    return base_of(load_policy(Path(name)))


def requests_of(scenario: Scenario) -> list[Request]:
    """The trace, the same for every run of a seed."""
    trace, rng = scenario.trace, np.random.default_rng(scenario.seed)
    weights = 1.0 / np.arange(1, trace.conversations + 1) ** trace.popularity
    weights /= weights.sum()
    first = np.maximum(1, rng.lognormal(0, 0.5, trace.conversations) * trace.prompt_tokens)
    length = first.astype(int)
    fresh = np.ones(trace.conversations, dtype=bool)
    made, at = [], 0.0
    while (at := at + rng.exponential(1 / trace.requests_per_s)) < trace.seconds:
        which = int(rng.choice(trace.conversations, p=weights))
        new = int(length[which]) if fresh[which] else int(rng.poisson(trace.turn_tokens)) + 1
        length[which] += 0 if fresh[which] else new
        fresh[which] = False
        made.append(Request(at, which, int(length[which]), new))
    return made


class _World:
    """Machines as they are now, and as they were measured."""

    def __init__(self, scenario: Scenario) -> None:
        self._rng = np.random.default_rng(scenario.seed + 1)
        self._left = list(scenario.changes)
        self.machines = {machine.name: machine for machine in scenario.machines}
        self._measured: dict[str, float] = {}

    def until(self, at_s: float) -> bool:
        """Make what happens until then happen. Whether anything did."""
        happened = False
        while self._left and self._left[0].at_s <= at_s:
            change = self._left.pop(0)
            for name, machine in self.machines.items():
                if change.machine in (name, machine.kind):
                    self.machines[name] = replace(machine, **change.values)  # type: ignore[arg-type]
            happened = True
        return happened

    def measure(self) -> list[Holder]:
        """What heartbeats would say now."""
        found = []
        for name, machine in self.machines.items():
            seen = machine.bytes_per_s * float(np.exp(self._rng.normal(0, machine.jitter)))
            old = self._measured.get(name, seen)
            self._measured[name] = old + SMOOTHING * (seen - old)
            found.append(_holder(machine, float(f"{self._measured[name]:.2g}")))
        return found

    @property
    def fullest(self) -> float:
        """Share of memory in use."""
        return max(machine.memory_used_share for machine in self.machines.values())


def _holder(machine: Machine, bytes_per_s: float) -> Holder:
    return Holder(
        node_id=machine.name,
        parts=((machine.layers, machine.heads),),
        bytes_per_s=bytes_per_s,
        latency_s=machine.latency_s,
        decode_tokens_per_s=machine.decode_tokens_per_s,
        prefill_tokens_per_s=machine.prefill_tokens_per_s,
    )


class _Cluster:
    """Sets of machines that serve, and what is stored of each conversation."""

    def __init__(self, scenario: Scenario, ladder: Ladder, rings: Sequence[Ring]) -> None:
        self._ladder, self._rings = ladder, rings
        whole = [(0, scenario.curve.model_layers)]
        self.share = [shares_of(ladder, ring.holders, whole) for ring in rings]
        self._free_at = np.zeros(len(rings))
        self._tokens: dict[int, float] = {}
        self._bits: dict[int, Floats] = {}  # conversation -> (groups,) of all its tokens

    def serve(
        self,
        request: Request,
        machines: Mapping[str, Machine],
        coded: Sequence[Floats],
        store: bool,
        run: Run,
        kept: bool = True,
    ) -> None:
        """One request, by the first set of machines that is free."""
        ring = int(np.argmin(self._free_at))
        mine = [machines[holder.node_id] for holder in self._rings[ring].holders]
        per_token = 1.0 / min(machine.prefill_tokens_per_s for machine in mine)
        known = min(self._tokens.get(request.conversation, 0.0), request.tokens - request.new)
        wait = max(self._free_at[ring] - request.at_s, 0.0)
        restore = 0.0
        if store and known > 0:
            bits = (
                self.share[ring]
                @ self._bits[request.conversation]
                * (known / self._tokens[request.conversation])
            )
            restore = max(
                m.latency_s
                + carried / 8 / m.bytes_per_s
                + (known / m.decode_tokens_per_s if m.decode_tokens_per_s else 0.0)
                for m, carried in zip(mine, bits, strict=True)
            )
        if not restore or MARGIN * restore >= known * per_token:
            known, restore = 0.0, 0.0
        took = restore + (request.tokens - known) * per_token
        self._free_at[ring] = request.at_s + wait + took
        run.served.append(Served(request.at_s, wait + took, restore, int(known), request.tokens))
        if store and kept:
            fresh = request.tokens - self._tokens.get(request.conversation, 0.0)
            added = fresh * coded[ring]
            run.stored_bytes += float(added.sum()) / 8
            self._bits[request.conversation] = self._bits.get(request.conversation, 0.0) + added
            self._tokens[request.conversation] = float(request.tokens)


def play(scenario: Scenario, way: str, advance: Callable[[int], None] = lambda _: None) -> Run:
    """One way through a scenario's requests; see `WAYS`.

    Args:
        advance: called with requests done since the last call.
    Raises: ConfigError: the policy cannot be used, or no machines hold the whole model.
    """
    ladder, run = make_ladder(scenario.curve), Run(way)
    policy = base_policy(scenario.policy)
    whole = scenario.curve.model_layers, scenario.curve.model_heads
    world = _World(scenario)
    rings = make_rings(MODEL_ID, world.measure(), *whole)
    if not rings:
        raise ConfigError("machines", len(scenario.machines), "enough to hold all layers")
    cluster, thinking = _Cluster(scenario, ladder, rings), Deliberation()
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
