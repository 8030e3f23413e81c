"""What came of a scenario's requests."""

from dataclasses import dataclass, field

import numpy as np


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
