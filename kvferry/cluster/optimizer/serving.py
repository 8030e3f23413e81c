"""Machines of a scenario at work: what they are now, what was measured, what they serve."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from kvferry.cluster.optimizer.holder import Holder
from kvferry.cluster.optimizer.ladder import Floats, Ladder
from kvferry.cluster.optimizer.problem import shares_of
from kvferry.cluster.optimizer.rings import Ring
from kvferry.cluster.optimizer.scenario import Machine, Scenario
from kvferry.cluster.optimizer.simulated import Run, Served
from kvferry.cluster.optimizer.trace import Request
from kvferry.cluster.optimizer.worth import ITSELF

MARGIN = 1.2  # as kvferry.node.hooks.worth has it
SMOOTHING = 0.3


class World:
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
        nearer=((ITSELF, 0.0),),  # only the store keeps anything here
    )


class Cluster:
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
