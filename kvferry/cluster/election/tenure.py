"""A time in office, and how to prove it."""

from dataclasses import dataclass

from kvferry.cluster.etcd import operations as ops

MAX_TERM = 1 << 53


@dataclass(frozen=True, slots=True)
class Tenure:
    """From winning an office to losing it.

    Attributes:
        term: fencing token: greater than that of every holder before. Whoever is told
            something under a term refuses an older one from then on.
        key: the office's key in etcd.
        created: revision at which this holder created it.
    """

    term: int
    key: bytes
    created: int

    def guard(self) -> ops.Compare:
        """The condition that makes a transaction one of this tenure, or none at all."""
        return ops.created_at(self.key, self.created)
