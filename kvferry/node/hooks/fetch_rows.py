"""Rows on their way: fetched in runs, and decoded while the next ones are still coming.

A run is a few pages of one layer group. It is decoded, on threads, as soon as it is there;
calibrations that the blobs name are read meanwhile.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from kvferry.codec.base import PageTensors
from kvferry.codec.blob import StoredBlob, decode_blobs
from kvferry.errors import CodecError
from kvferry.node.coding import Shard
from kvferry.node.hooks.fetch import BlobSource
from kvferry.node.hooks.loaded import Data, Loaded
from kvferry.node.restore import Assembly, Parts, RestorePlan, Run, runs_of
from kvferry.proto.keys import BlobKey


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A run: for each part what went wrong; codec -> values, and seconds on the thread."""

    problems: Sequence[CodecError | None]
    codecs: Mapping[str, tuple[int, float]]


class RowsFetch:
    """One plan on its way: what is still wanted, what is being decoded, where it ends."""

    def __init__(
        self,
        source: BlobSource,
        shard: Shard,
        plan: RestorePlan,
        loaded: Loaded,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._source = source
        self._plan, self._loaded, self._threads = plan, loaded, threads
        self._assembly = Assembly(plan.tokens, shard.layers, shard.heads)
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
        self._decoding: list[tuple[Parts, Future[_Decoded]]] = []

    @property
    def keys(self) -> Sequence[BlobKey]:
        """Early tokens first."""
        return list(self._place)

    @property
    def wanted(self) -> Collection[BlobKey]:
        """Those before the first gap that are not there yet."""
        return self._wanted

    @property
    def reach(self) -> int:
        """Tokens before the first gap that is known of; all of the plan if there is none."""
        return self._gap[0]

    def warm(self) -> None:
        """Begin to read calibrations; before any blob is there."""
        # First in the queue of the threads, so that no run waits there for one behind it.
        for piece in self._plan.pieces():
            wanted = piece.info.codec.calibration_id
            if wanted and wanted not in self._warm:
                warm = self._source.calibrations.warm
                self._warm[wanted] = self._threads.submit(warm, wanted)

    def came(self, key: BlobKey, data: Data) -> None:
        """Decode the runs that are whole with it."""
        self._wanted.discard(key)
        self._blobs[key] = data
        self._loaded.came(self._infos[key], len(data))
        self._start(self._place[key][2])

    def failed(self, key: BlobKey, reason: str) -> None:
        """What lies behind is of no use."""
        self._wanted.discard(key)
        self._end_at(*self._place[key][:2], reason)

    def upto(self, tokens: int) -> None:
        """Segments that begin at ``tokens`` or later are of no use to the caller."""
        self._end_at(tokens, 0, "")

    def _end_at(self, token: int, layer: int, reason: str) -> None:
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
                codecs = [p.info.codec.name for _, p in parts]
                future = self._threads.submit(self._decode, run, blobs, codecs, warm)
                self._decoding.append((parts, future))

    def _decode(
        self,
        run: Run,
        blobs: Sequence[StoredBlob],
        codecs: Sequence[str],
        warm: Sequence[Future[None]],
    ) -> _Decoded:
        """On a thread: decode a run into its place, one codec after the other."""
        wait(warm)  # what failed there fails here again, and is told
        problems: list[CodecError | None] = [None] * len(blobs)
        taken: dict[str, tuple[int, float]] = {}
        for codec in sorted(set(codecs)):
            started, values = time.monotonic(), 0
            places = [place for place, name in enumerate(codecs) if name == codec]
            pages = decode_blobs(
                [blobs[place] for place in places],
                model_id=self._source.model_id,
                cut=run.cut,
                calibrations=self._source.calibrations,
                rope=self._source.rope,
            )
            for place, page in zip(places, pages, strict=True):
                if isinstance(page, CodecError):
                    problems[place] = page
                else:
                    problems[place] = self._add(page, run.heads)
                    values += page.raw_bytes_fp16 // 2
            taken[codec] = values, time.monotonic() - started
        return _Decoded(problems, taken)

    def _add(self, page: PageTensors, heads: tuple[int, int]) -> CodecError | None:
        try:
            self._assembly.add(page if page.heads == heads else page.cut_heads(heads))
        except CodecError as exc:
            return exc
        return None

    def finish(self) -> None:
        """Wait for the threads; the prefix ends at the first piece that is not there."""
        loaded, plan = self._loaded, self._plan
        done = set()
        problems = [self._gap[2]] if self._gap[2] else []
        for parts, future in self._decoding:
            decoded = future.result()
            for codec, (values, seconds) in decoded.codecs.items():
                loaded.decoding(codec, values, seconds)
            for (segment, piece), problem in zip(parts, decoded.problems, strict=True):
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
