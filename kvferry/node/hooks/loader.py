"""Fetch and decode: from a prompt's tokens to tensors that are verified and whole.

Blobs are fetched in runs of a few pages of one layer group. A run is decoded, on threads,
as soon as it is there, while the next ones are on their way; calibrations that the blobs
name are read meanwhile.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from kvferry.cluster.repository import BlobInfo, LookupQuery, LookupResult
from kvferry.codec.base import CalibrationSource, PageTensors
from kvferry.codec.blob import StoredBlob, decode_blob, decode_blobs
from kvferry.errors import CodecError, FerryError
from kvferry.node.coding import Shard
from kvferry.node.hooks.steps import Step, steps_of
from kvferry.node.restore import (
    Assembly,
    Parts,
    RestorePlan,
    Run,
    StatePlan,
    plan_restore,
    plan_states,
    runs_of,
)
from kvferry.proto.keys import BlobKey, page_keys

T = TypeVar("T")
Data = bytes | memoryview

_MOST_THREADS = 4
_STATES_TRIED = 2
NOT_WORTH_IT = "not_worth_it"


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
    seconds: dict[str, float] = field(default_factory=dict)

    def came(self, info: BlobInfo, size: int) -> None:
        """Count a blob that was fetched."""
        self.bytes += size
        self.far_bytes += 0 if info.near else size


# Prefixes that can be had, what the lookup took, and tokens that are at hand anyway ->
# tokens that this rank would fetch, and tokens that all ranks fetch.
Choose = Callable[[Sequence[Step], float, int], tuple[int, int]]


def everything(steps: Sequence[Step], _: float, __: int) -> tuple[int, int]:
    """The longest."""
    return steps[-1].tokens, steps[-1].tokens


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads prefixes of one shard in one namespace."""

    client: LoadClient
    calibrations: WarmSource
    shard: Shard
    root: bytes
    accept: frozenset[str]
    rope: Mapping[int, bytes]

    def load(
        self,
        tokens: Sequence[int],
        deadline_s: float,
        limit: int | None = None,
        beyond: int = 0,
        choose: Choose = everything,
    ) -> Loaded:
        """The longest prefix of ``tokens`` that can be had whole within the deadline.

        Args:
            limit: no state beyond so many tokens is of use.
            beyond: nothing is fetched where no more tokens than these are to be had.
            choose: how much of what there is to fetch.
        Raises: FerryError where not even the lookup worked.
        """
        loaded = Loaded()
        end = time.monotonic() + deadline_s
        shard = self.shard
        keys = page_keys(self.root, tokens, shard.page_tokens)
        query = LookupQuery(
            root=self.root,
            page_keys=keys,
            codecs=self.accept,
            layers=shard.layers if shard.layers[0] < shard.layers[1] else (0, 0),
            heads=shard.heads,
            states=shard.states if shard.states[0] < shard.states[1] else (0, shard.model_states),
        )
        found = _timed(loaded, "lookup", lambda: self.client.lookup(query))
        plan = plan_restore(
            found, keys, self.root, tokens, shard.page_tokens, shard.layers, shard.heads
        )
        if shard.model_states:
            states = plan_states(
                found, keys, self.root, tokens, shard.page_tokens, shard.states, shard.state_part
            )
            most = len(tokens) if limit is None else limit
            reach = min(most, plan.tokens) if shard.model_layers else most
            loaded.positions = [state for state in states if state.tokens <= reach]
            if not loaded.positions:
                loaded.reason = "no_state" if plan.segments else "not_stored"
                return loaded
            plan = plan.upto(loaded.positions[0].tokens)
        elif not plan.segments:
            loaded.reason = "not_stored"
            return loaded
        if (loaded.positions[0].tokens if loaded.positions else plan.tokens) <= beyond:
            loaded.positions, loaded.reason = [], "no_gain"
            return loaded
        plan = _chosen(plan, loaded, beyond, choose)
        if not plan.segments and not loaded.positions:
            return loaded
        self._load_rows(plan, loaded, end)
        if shard.model_states:
            self._load_longest_state(loaded, end)
        return loaded

    def _load_rows(self, plan: RestorePlan, loaded: Loaded, end: float) -> None:
        if self.shard.layers[0] == self.shard.layers[1]:
            loaded.tokens = loaded.positions[0].tokens
            return
        threads = ThreadPoolExecutor(_threads(), "kvferry-decode")
        try:
            _Restore(self, plan, loaded, threads).run(max(end - time.monotonic(), 0.0))
        finally:  # a calibration that is still being read serves the next restore
            threads.shutdown(wait=False, cancel_futures=True)

    def _load_longest_state(self, loaded: Loaded, end: float) -> None:
        """The longest position that rows reach and whose states are here and whole."""
        rows, loaded.tokens = loaded.tokens, 0
        for plan in loaded.positions[:_STATES_TRIED]:
            load = partial(self.load_state, plan.tokens, loaded, end)
            if plan.tokens <= rows and _timed(loaded, "fetch", load):
                loaded.tokens = plan.tokens
                return
        loaded.reason = loaded.reason or "no_state"

    def load_state(self, tokens: int, loaded: Loaded, end: float) -> bool:
        """Have the states at one of ``loaded.positions``; False: they cannot be had whole.

        Args:
            end: until when, on the monotonic clock.
        """
        if tokens in loaded.states:
            return True
        plan = next((plan for plan in loaded.positions if plan.tokens == tokens), None)
        if plan is None:
            return False
        blobs: list[StoredBlob] = []
        infos = {piece.info.key: piece.info for piece in plan.pieces}
        span = (plan.start, plan.tokens)
        answers = self.client.get_each(
            [piece.info.key for piece in plan.pieces], max(end - time.monotonic(), 0.0)
        )
        with contextlib.closing(answers):
            for key, answer in answers:
                if isinstance(answer, FerryError):
                    loaded.problems.append(answer.reason)
                    return False
                loaded.came(infos[key], len(answer))
                blobs.append(StoredBlob(answer, key, span))
        cuts = {piece.info.key: piece.cut for piece in plan.pieces}
        pages = []
        for blob in blobs:
            try:
                pages.append(
                    decode_blob(
                        blob.data,
                        key=blob.key,
                        model_id=self.shard.model_id,
                        tokens=span,
                        cut=cuts[blob.key],
                        calibrations=self.calibrations,
                    )
                )
            except CodecError as exc:
                loaded.problems.append(exc.reason)
                return False
        if len(pages) < len(plan.pieces):
            loaded.problems.append("not_found")
            return False
        loaded.states[tokens] = pages
        return True


def _chosen(plan: RestorePlan, loaded: Loaded, beyond: int, choose: Choose) -> RestorePlan:
    """The part of a plan that is fetched; ``loaded`` says why it is not all."""
    steps = steps_of(plan, loaded.positions)
    longest = steps[-1].tokens
    mine, agreed = choose(steps, loaded.seconds["lookup"], beyond)
    pieces = [*plan.pieces(), *(p for at in loaded.positions[:1] for p in at.pieces)]
    loaded.first_bytes = next((p.info.size for p in pieces if not p.info.near), 0)
    if agreed >= longest:
        return plan
    loaded.reason = "agreement" if mine == longest else NOT_WORTH_IT
    loaded.positions = [state for state in loaded.positions if state.tokens <= agreed]
    kept = plan.upto(loaded.positions[0].tokens if loaded.positions else agreed)
    if mine < longest:
        fetched = {piece.info.key for piece in kept.pieces()}
        loaded.skipped = [p.info for p in pieces if p.info.key not in fetched]
    return kept


class _Restore:
    """One plan on its way: what is still wanted, what is being decoded, where it ends."""

    def __init__(
        self, loader: Loader, plan: RestorePlan, loaded: Loaded, threads: ThreadPoolExecutor
    ) -> None:
        self._loader, self._plan, self._loaded, self._threads = loader, plan, loaded, threads
        self._assembly = Assembly(plan.tokens, loader.shard.layers, loader.shard.heads)
        self._runs = runs_of(plan)
        # Where a blob's first token and layer lie, and the runs that it is a part of.
        self._place: dict[BlobKey, tuple[int, int, list[Run]]] = {}
        for run in self._runs:
            for segment, piece in run.parts:
                place: tuple[int, int, list[Run]] = (segment.tokens[0], piece.cut[0], [])
                self._place.setdefault(piece.info.key, place)[2].append(run)
        self._infos = {piece.info.key: piece.info for piece in plan.pieces()}
        self._wanted = set(self._place)
        # Token, layer and reason of the first gap; what lies behind it is of no use.
        self._gap = (plan.tokens, 0, "")
        self._blobs: dict[BlobKey, Data] = {}
        self._warm: dict[bytes, Future[None]] = {}
        self._started: set[int] = set()
        self._decoding: list[tuple[Parts, Future[list[CodecError | None]]]] = []

    def run(self, deadline_s: float) -> None:
        """Fetch, decode, and say in ``loaded`` what came of it."""
        # First in the queue of the threads, so that no run waits there for one behind it.
        for piece in self._plan.pieces():
            wanted = piece.info.codec.calibration_id
            if wanted and wanted not in self._warm:
                warm = self._loader.calibrations.warm
                self._warm[wanted] = self._threads.submit(warm, wanted)
        _timed(self._loaded, "fetch", lambda: self._fetch(deadline_s))
        _timed(self._loaded, "decode", self._finish)

    def _fetch(self, deadline_s: float) -> None:
        answers = self._loader.client.get_each(list(self._place), deadline_s)
        with contextlib.closing(answers):
            for key, answer in answers:
                self._wanted.discard(key)
                if isinstance(answer, FerryError):
                    self._note_gap(key, answer.reason)
                else:
                    self._blobs[key] = answer
                    self._loaded.came(self._infos[key], len(answer))
                    self._start(self._place[key][2])
                if not self._wanted:
                    return
        for key in self._wanted.copy():
            self._note_gap(key, "not_found")

    def _note_gap(self, key: BlobKey, reason: str) -> None:
        token, layer, _ = self._place[key]
        self._gap = min(self._gap, (token, layer, reason))
        self._wanted = {k for k in self._wanted if self._place[k][0] < self._gap[0]}
        self._start(self._runs)

    def _start(self, runs: Iterable[Run]) -> None:
        """Have those decoded of which nothing more is awaited."""
        for run in runs:
            if id(run) in self._started or any(p.info.key in self._wanted for _, p in run.parts):
                continue
            self._started.add(id(run))
            parts = tuple((s, p) for s, p in run.parts if s.tokens[0] < self._gap[0])
            if parts:
                blobs = [
                    StoredBlob(self._blobs[p.info.key], p.info.key, s.tokens) for s, p in parts
                ]
                names = {p.info.codec.calibration_id for _, p in parts}
                warm = [future for name, future in self._warm.items() if name in names]
                future = self._threads.submit(self._decode, run, blobs, warm)
                self._decoding.append((parts, future))

    def _decode(
        self, run: Run, blobs: Sequence[StoredBlob], warm: Sequence[Future[None]]
    ) -> list[CodecError | None]:
        """On a thread: decode a run into its place; for each part, what went wrong."""
        wait(warm)  # what failed there fails here again, and is told
        pages = decode_blobs(
            blobs,
            model_id=self._loader.shard.model_id,
            cut=run.cut,
            calibrations=self._loader.calibrations,
            rope=self._loader.rope,
        )
        return [
            page if isinstance(page, CodecError) else self._add(page, run.heads) for page in pages
        ]

    def _add(self, page: PageTensors, heads: tuple[int, int]) -> CodecError | None:
        try:
            self._assembly.add(page if page.heads == heads else page.cut_heads(heads))
        except CodecError as exc:
            return exc
        return None

    def _finish(self) -> None:
        """Wait for the threads; the prefix ends at the first piece that is not there."""
        loaded, plan = self._loaded, self._plan
        done = set()
        problems = [self._gap[2]] if self._gap[2] else []
        for parts, future in self._decoding:
            for (segment, piece), problem in zip(parts, future.result(), strict=True):
                if problem is None:
                    done.add((segment.tokens, piece.cut, piece.heads))
                else:
                    problems.append(problem.reason)
        whole = 0
        for segment in plan.segments:
            if not done.issuperset((segment.tokens, p.cut, p.heads) for p in segment.pieces):
                break
            whole += 1
        loaded.problems += problems
        if whole:
            loaded.tokens = plan.segments[whole - 1].tokens[1]
            loaded.tensors = self._assembly.upto(loaded.tokens)
            loaded.pages = whole - (plan.has_tail and whole == len(plan.segments))
        if whole < len(plan.segments):
            loaded.reason = problems[0] if problems else "incomplete"


def _threads() -> int:
    return max(2, min(_MOST_THREADS, os.cpu_count() or 1))


def _timed(loaded: Loaded, step: str, run: Callable[[], T]) -> T:
    started = time.monotonic()
    try:
        return run()
    finally:
        took = time.monotonic() - started
        loaded.seconds[step] = loaded.seconds.get(step, 0.0) + took
