"""A decision that is not taken in haste: what is better has to stay better."""

import logging
from collections import Counter

from kvferry.cluster.optimizer.decide import Facts, Outlook, decide, look, with_rings_of_change
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

PATIENCE = 3  # looks in a row


class Deliberation:
    """Remembers from one look to the next which sets of nodes could do better, and which
    models should no longer be stored, or be stored again."""

    def __init__(self) -> None:
        self._better: Counter[object] = Counter()

    @property
    def pending(self) -> bool:
        """Whether another look may change something although nothing else does."""
        return bool(self._better)

    def look(self, facts: Facts) -> tuple[Outlook, pb.Policy]:
        """What there is to decide, and the policy that shall hold: that of ``facts``, or
        another, its version the same."""
        outlook = look(facts)
        better: set[object] = {r.key for r in outlook.rings if r.gain and not r.urgent}
        better |= {("turn", model) for model in outlook.turning}
        self._better = Counter({key: self._better[key] + 1 for key in better})
        ripe = [r for r in outlook.rings if r.urgent or self._better[r.key] >= PATIENCE]
        changing = with_rings_of_change(outlook, ripe)
        for ring in changing:
            self._better.pop(ring.key, None)
            best, now = ring.best.deadline, ring.now.deadline
            log.info("restores on %s: %.3g s, not %.3g s", sorted(ring.ring.names), best, now)
        turning = {m for m in outlook.turning if self._better[("turn", m)] >= PATIENCE}
        for model in turning:
            self._better.pop(("turn", model), None)
            word = "pay again" if model in outlook.unstored else "do not pay: not stored any more"
            log.info("restores of model %s %s", model.hex()[:12], word)
        return outlook, decide(outlook, changing, turning)
