"""What a restore asks for, and what one rank has in hand before the ranks agree."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kvferry.cluster.repository import BlobInfo, LookupQuery, LookupResult
from kvferry.codec.base import CalibrationSource, PageTensors
from kvferry.errors import FerryError
from kvferry.node.restore import StatePlan
from kvferry.proto.keys import BlobKey

T = TypeVar("T")
Data = bytes | memoryview


class LoadClient(Protocol):
    """What a restore asks of the node daemon."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Raises: StoreUnavailableError."""

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, Data | FerryError], None, None]:
        """Every key has an answer within the deadline; closing the iterator ends it."""


class WarmSource(CalibrationSource, Protocol):
    """Calibrations that can be read before they are needed."""

    def warm(self, calibration_id: bytes) -> None:
        """Have it in memory, ready for use. Raises: as `get`."""


@dataclass(slots=True)
class Loaded:
    """What one rank has in hand before the ranks agree.

    Attributes:
        tensors: streams (layers, heads, tokens, dim) of tokens from 0, or None.
        states: position -> state layers of this rank, those that were loaded.
        positions: where there are states, the longest prefix first.
        tokens: how many; 0 for a miss.
        pages: whole pages among them.
        reason: why there is not more; empty if the plan held.
        problems: reasons of everything that went wrong on the way.
        bytes: bytes fetched.
        far_bytes: those of them that crossed a link.
        first_bytes: size of the first blob that has to cross one.
        skipped: blobs that are there and were not worth fetching.
        decoded: codec -> values that were decoded, and seconds of threads that it took.
        seconds: step -> time; "decode" is what decoding took beyond the last arrival.
    """

    tensors: PageTensors | None = None
    states: dict[int, list[PageTensors]] = field(default_factory=dict)
    positions: Sequence[StatePlan] = ()
    tokens: int = 0
    pages: int = 0
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    bytes: int = 0
    far_bytes: int = 0
    first_bytes: int = 0
    skipped: Sequence[BlobInfo] = ()
    decoded: dict[str, tuple[int, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def decoding(self, codec: str, values: int, seconds: float) -> None:
        """Count what was decoded."""
        before = self.decoded.get(codec, (0, 0.0))
        self.decoded[codec] = before[0] + values, before[1] + seconds

    def came(self, info: BlobInfo, size: int) -> None:
        """Count a blob that was fetched."""
        self.bytes += size
        self.far_bytes += 0 if info.near else size

    def timed(self, step: str, run: Callable[[], T]) -> T:
        """Run, and add what it took to a step."""
        started = time.monotonic()
        try:
            return run()
        finally:
            took = time.monotonic() - started
            self.seconds[step] = self.seconds.get(step, 0.0) + took
