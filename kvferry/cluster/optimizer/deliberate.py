"""A decision that is not taken in haste: what is better has to stay better."""

import logging
from collections import Counter

from kvferry.cluster.optimizer.decide import Facts, Outlook, decide, look, with_rings_of_change
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

PATIENCE = 3  # looks in a row


class Deliberation:
    """Remembers from one look to the next which sets of nodes could do better."""

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
        gaining = {ring.key for ring in outlook.rings if ring.gain and not ring.urgent}
        self._better = Counter({key: self._better[key] + 1 for key in gaining})
        ripe = [r for r in outlook.rings if r.urgent or self._better[r.key] >= PATIENCE]
        changing = with_rings_of_change(outlook, ripe)
        for ring in changing:
            self._better.pop(ring.key, None)
            best, now = ring.best.deadline, ring.now.deadline
            log.info("restores on %s: %.3g s, not %.3g s", sorted(ring.ring.names), best, now)
        return outlook, decide(outlook, changing)
