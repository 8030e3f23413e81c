"""Transfer of 16 MiB blobs over loopback against a raw socket, plain and with TLS."""

import asyncio
from collections.abc import Callable

from kvferry.cluster.allocator import tune_allocator
from kvferry.cluster.bench_transport import MIB
from kvferry.cluster.bench_transport import measure as transport

FIGURES = ("put_ratio", "get_ratio", "put_tls_ratio", "get_tls_ratio")


def measure(
    rounds: int = 21, size: int = 16 * MIB, on_round: Callable[[int], None] | None = None
) -> dict[str, float]:
    """Medians of ``rounds`` puts and gets of blobs of ``size`` bytes, in turn.

    Returns: `FIGURES`, shares of a raw blocking socket's rate without TLS; beside them
        shares of a raw TLS socket's, and all rates in bytes/s.
    Raises: StoreUnavailableError: a peer process did not start.
    """
    tune_allocator()
    found = asyncio.run(transport(size, rounds, on_round, tls=True))
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
