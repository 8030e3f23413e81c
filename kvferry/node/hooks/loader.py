"""Fetch and decode: from a prompt's tokens to tensors that are verified and whole."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.codec.base import CalibrationSource, PageTensors
from kvferry.codec.blob import StoredBlob, decode_blobs
from kvferry.errors import CodecError, FerryError
from kvferry.node.coding import Shard
from kvferry.node.restore import Piece, RestorePlan, Segment, assemble, plan_restore
from kvferry.proto.keys import BlobKey, page_keys

T = TypeVar("T")
Data = bytes | memoryview


class LoadClient(Protocol):
    """What a restore asks of the node daemon."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Raises: StoreUnavailableError."""

    def get_many(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Mapping[BlobKey, Data | FerryError]:
        """Every key has an answer within the deadline."""


@dataclass(slots=True)
class Loaded:
    """What one rank has in hand before the ranks agree.

    Attributes:
        tensors: streams (layers, heads, tokens, dim) of tokens from 0, or None.
        tokens: how many; 0 for a miss.
        pages: whole pages among them.
        reason: why there is not more; empty if the plan held.
        problems: reasons of everything that went wrong on the way.
        bytes: bytes fetched.
        seconds: step -> time.
    """

    tensors: PageTensors | None = None
    tokens: int = 0
    pages: int = 0
    reason: str = ""
    problems: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads prefixes of one shard in one namespace."""

    client: LoadClient
    calibrations: CalibrationSource
    shard: Shard
    root: bytes
    accept: frozenset[str]
    rope: Mapping[int, bytes]

    def load(self, tokens: Sequence[int], deadline_s: float) -> Loaded:
        """The longest prefix of ``tokens`` that can be had whole within the deadline.

        Raises: FerryError where not even the lookup worked.
        """
        loaded = Loaded()
        started = time.monotonic()
        shard = self.shard
        keys = page_keys(self.root, tokens, shard.page_tokens)
        query = LookupQuery(
            root=self.root,
            page_keys=keys,
            codecs=self.accept,
            layers=shard.layers,
            heads=shard.heads,
        )
        found = _timed(loaded, "lookup", lambda: self.client.lookup(query))
        plan = plan_restore(
            found, keys, self.root, tokens, shard.page_tokens, shard.layers, shard.heads
        )
        if not plan.segments:
            loaded.reason = "not_stored"
            return loaded
        left = deadline_s - (time.monotonic() - started)
        wanted = list(dict.fromkeys(piece.info.key for piece in plan.pieces()))
        blobs = _timed(loaded, "fetch", lambda: self.client.get_many(wanted, max(left, 0.0)))
        loaded.bytes = sum(len(b) for b in blobs.values() if not isinstance(b, FerryError))
        _timed(loaded, "decode", lambda: self._decode(plan, blobs, loaded))
        return loaded

    def _decode(
        self, plan: RestorePlan, blobs: Mapping[BlobKey, Data | FerryError], loaded: Loaded
    ) -> None:
        fetched = _run_without_gap(plan, blobs, loaded)
        decoded: dict[tuple[bytes, tuple[int, int]], PageTensors] = {}
        for cut, jobs in _by_cut(fetched).items():
            stored = [
                StoredBlob(_bytes(blobs[piece.info.key]), piece.info.key, segment.tokens)
                for segment, piece in jobs
            ]
            pages = decode_blobs(
                stored,
                model_id=self.shard.model_id,
                cut=cut,
                calibrations=self.calibrations,
                rope=self.rope,
            )
            for (_, piece), page in zip(jobs, pages, strict=True):
                if isinstance(page, CodecError):
                    loaded.problems.append(page.reason)
                else:
                    decoded[piece.info.key.page_key, piece.cut] = page
        whole = _whole(fetched, decoded)
        if whole:
            loaded.tensors = assemble(whole, decoded, self.shard.layers, self.shard.heads)
            loaded.tokens = whole[-1].tokens[1]
            tail_whole = plan.has_tail and len(whole) == len(plan.segments)
            loaded.pages = len(whole) - tail_whole
        if len(whole) < len(plan.segments):
            loaded.reason = loaded.problems[0] if loaded.problems else "incomplete"


def _timed(loaded: Loaded, step: str, run: Callable[[], T]) -> T:
    started = time.monotonic()
    try:
        return run()
    finally:
        loaded.seconds[step] = time.monotonic() - started


def _bytes(value: Data | FerryError) -> Data:
    assert not isinstance(value, FerryError)  # noqa: S101 - `_run_without_gap` saw to it
    return value


def _run_without_gap(
    plan: RestorePlan, blobs: Mapping[BlobKey, Data | FerryError], loaded: Loaded
) -> list[Segment]:
    """Segments up to the first that lacks a blob; why it does is noted."""
    run: list[Segment] = []
    for segment in plan.segments:
        for piece in segment.pieces:
            got = blobs.get(piece.info.key)
            if got is None or isinstance(got, FerryError):
                loaded.problems.append("not_found" if got is None else got.reason)
                return run
        run.append(segment)
    return run


def _by_cut(segments: Sequence[Segment]) -> dict[tuple[int, int], list[tuple[Segment, Piece]]]:
    jobs: dict[tuple[int, int], list[tuple[Segment, Piece]]] = {}
    for segment in segments:
        for piece in segment.pieces:
            jobs.setdefault(piece.cut, []).append((segment, piece))
    return jobs


def _whole(
    segments: Sequence[Segment], decoded: Mapping[tuple[bytes, tuple[int, int]], PageTensors]
) -> list[Segment]:
    """Segments up to the first of which a piece did not decode."""
    run: list[Segment] = []
    for segment in segments:
        if any((p.info.key.page_key, p.cut) not in decoded for p in segment.pieces):
            break
        run.append(segment)
    return run
