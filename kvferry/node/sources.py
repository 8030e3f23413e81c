"""Which of several places a blob is fetched from: the one it is expected from first."""

from collections.abc import Sequence
from dataclasses import dataclass

# Of a link that nothing is known of, where nothing is known of the others either.
DEFAULT_BYTES_PER_S = 50e6
# What comes from a peer at about the same time spares the store.
STORE_HANDICAP = 1.1


@dataclass(frozen=True, slots=True)
class Source:
    """A place that may have a blob, as it stands now.

    Attributes:
        bytes_per_s: of the link; 0: not known.
        latency_s: of a short question.
        queued_bytes: asked for there already.
    """

    name: str
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    queued_bytes: int = 0
    is_store: bool = False


def expected_s(source: Source, size: int, otherwise: Source) -> float:
    """Seconds until a blob of ``size`` bytes is here. ``otherwise``: has what is not known."""
    rate = source.bytes_per_s or otherwise.bytes_per_s
    return (source.latency_s or otherwise.latency_s) + (source.queued_bytes + size) / rate


def unknown(sources: Sequence[Source]) -> Source:
    """What is taken for the rate and latency of links that nothing is known of.

    The best known rate, so that they are tried; the longest latency, so that a quick answer
    is not expected of who never gave one.
    """
    rate = max((s.bytes_per_s for s in sources), default=0.0) or DEFAULT_BYTES_PER_S
    return Source("", rate, max((s.latency_s for s in sources), default=0.0))


def by_arrival(sources: Sequence[Source], size: int) -> list[tuple[float, Source]]:
    """(seconds until a blob of ``size`` bytes is here, from where), soonest first.

    List scheduling, as in Graham, "Bounds on multiprocessing timing anomalies" (1969): when
    each blob goes to the first, the last blob of a batch, of size p, comes at most
    (sources - 1) x p / (sum of rates) later than in the best of all splits.
    """
    otherwise = unknown(sources)
    timed = [(expected_s(source, size, otherwise), source) for source in sources]
    return sorted(timed, key=lambda t: (t[0] * (STORE_HANDICAP if t[1].is_store else 1), t[1].name))
