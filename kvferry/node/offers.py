"""Offers: what a hook gives away after prefill or a turn, encoded and put in the background.

The model's thread only drops an offer into a bounded queue; a background thread asks
which blobs are missing, encodes those in idle time and hands them to the node daemon. Offers whose
moment the policy has not named wait for a trigger (memory pressure, idle, before sleep).
"""

import contextlib
import logging
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from kvferry.codec.base import Codec, PageTensors
from kvferry.codec.blob import BlobMeta, blob_key, encode_blob
from kvferry.errors import FerryError
from kvferry.node.background import Background, OneThread, lower_priority
from kvferry.node.coding import CodedRange, Shard, state_codec
from kvferry.node.pace import SHARE
from kvferry.proto.keys import (
    BlobKey,
    Medium,
    media_by_page,
    media_within,
    page_keys,
    state_key,
    tail_key,
)
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

QUEUE_LENGTH = 4
PUTS_UNDER_WAY = 2
DEFERRED_LENGTH = 4
REMEMBERED_TAILS = 64
EVENTS = {
    "prefix": pb.TRIGGER_AFTER_PREFILL,
    "prefill": pb.TRIGGER_AFTER_PREFILL,
    "turn_end": pb.TRIGGER_TURN_END,
}


class TensorSource(Protocol):
    """A snapshot of a cache that can be read from another thread."""

    def page(self, layers: tuple[int, int], tokens: tuple[int, int]) -> PageTensors:
        """Host tensors of absolute layers and tokens."""

    def state_pages(self, tokens: tuple[int, int], part: int = 0) -> Iterable[PageTensors]:
        """States at the end of ``tokens``, of consecutive state layers of one form; ``heads``
        says which part of them it is."""


class OfferClient(Protocol):
    """What an offer needs of the node daemon; see `kvferry.node.client.NodeClient`."""

    def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are held by the store or this node."""

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        """Whether it was new, once it is durable. Raises, also later: FerryError."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Tokens that a cache holds, and the cache's tensors.

    Attributes:
        restored_pages: so many pages came out of the store and are never coded again.
        lasting: its tail stays where it is when a conversation goes on from it.
        shared: its prompt goes on, and so do others in other ways: every whole page is
            coded as one, so that the tail stands where all their pages end.
        media: what the tokens do not tell.
    """

    tokens: tuple[int, ...]
    source: TensorSource
    restored_pages: int = 0
    lasting: bool = False
    shared: bool = False
    media: tuple[Medium, ...] = ()

    def goes_on_from(self, other: "Offer") -> bool:
        """Whether it holds all that ``other`` does."""
        end = len(other.tokens)
        mine = media_within(self.media, 0, end)
        return self.tokens[:end] == other.tokens and mine == media_within(other.media, 0, end)


@dataclass(frozen=True, slots=True)
class Coding:
    """How offers are coded now: a policy made concrete for one shard and namespace.

    Attributes:
        pages: how pages of this shard are coded.
        tail: codec of tails; None: they are computed again.
        enabled: False: the policy stores nothing.
    """

    shard: Shard
    root: bytes
    pages: Sequence[CodedRange]
    tail: Codec | None
    tail_ttl_s: int
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class _Tail:
    """A tail that was put, with its states, to be replaced when its conversation goes on."""

    start: int
    previous: bytes
    tail_key: bytes
    tokens: int
    key: BlobKey | None
    states: Mapping[tuple[int, int], BlobKey]


@dataclass(slots=True)
class _Puts:
    """Blobs of one offer on their way to the daemon, while the next one is encoded."""

    counters: Counter[str]
    under_way: deque[tuple[Future[bool], int, int]] = field(default_factory=deque)

    def add(self, put: Future[bool], size: int, raw: int) -> None:
        """One more, as soon as fewer than `PUTS_UNDER_WAY` are left. Raises: FerryError."""
        self.under_way.append((put, size, raw))
        self.finish(PUTS_UNDER_WAY - 1)

    def finish(self, left: int = 0) -> None:
        """Wait until no more than ``left`` are under way. Raises: FerryError."""
        while len(self.under_way) > left:
            put, size, raw = self.under_way.popleft()
            stored = put.result()
            self.counters["blobs_put" if stored else "blobs_known"] += 1
            self.counters["bytes_put"] += size
            self.counters["bytes_raw_fp16"] += raw


class Offers:
    """The queue, its thread, and what waits for a trigger.

    ``coding`` is asked before each offer is encoded, so that a policy change takes hold
    at once; it may return None (nothing is to be stored now) or raise a FerryError.
    ``busy_share`` is what encoding takes of the time where all cores are busy.
    """

    def __init__(
        self,
        client: OfferClient,
        coding: Callable[[], Coding | None],
        counters: Counter[str],
        busy_share: float = SHARE,
    ) -> None:
        self._client, self._coding, self._counters = client, coding, counters
        self._queue: queue.Queue[Offer | None] = queue.Queue(QUEUE_LENGTH)
        self._deferred: list[Offer] = []
        self._tails: OrderedDict[bytes, _Tail] = OrderedDict()
        self._lock = threading.Lock()
        self._one_thread, self._background = OneThread(), Background(share=busy_share)
        self._thread = threading.Thread(target=self._run, name="kvferry-offers", daemon=True)
        self._thread.start()

    def submit(self, offer: Offer) -> bool:
        """Never blocks. False: the queue is full, the offer is dropped and counted."""
        try:
            self._queue.put_nowait(offer)
        except queue.Full:
            self._counters["queue_full"] += 1
            return False
        return True

    def defer(self, offer: Offer) -> None:
        """Keep for a trigger; a longer offer of the same conversation takes its place."""
        with self._lock:
            kept = [old for old in self._deferred if not offer.goes_on_from(old)]
            self._deferred = [*kept, offer][-DEFERRED_LENGTH:]

    def trigger(self) -> int:
        """Queue all that waited; returns how many."""
        with self._lock:
            waiting, self._deferred = self._deferred, []
        return sum(self.submit(offer) for offer in waiting)

    def wait(self) -> None:
        """Until all that was submitted is encoded and handed to the daemon."""
        with self._background.hurry():
            self._queue.join()

    def close(self, timeout_s: float) -> bool:
        """Encode what is queued, then stop. False: the time was not enough."""
        with self._background.hurry():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)
        self._background.close()
        return not self._thread.is_alive()

    def _run(self) -> None:
        lower_priority()
        while (offer := self._queue.get()) is not None:
            try:
                with self._one_thread:
                    self._process(offer)
            except FerryError as exc:
                self._counters[exc.reason] += 1
                log.info("offer of %d tokens dropped: %s", len(offer.tokens), exc)
            except Exception:
                # A bug here must cost an offer, never the generation that made it.
                self._counters["bug"] += 1
                log.exception("offer of %d tokens dropped", len(offer.tokens))
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _process(self, offer: Offer) -> None:
        coding = self._coding()
        if coding is None or not coding.enabled:
            self._counters["policy"] += 1
            return
        shard = coding.shard
        count = shard.pages_before_tail(len(offer.tokens))
        if offer.shared and shard.model_layers:
            count = (len(offer.tokens) - 1) // shard.page_tokens
        media = media_by_page(offer.media, shard.page_tokens)
        keys = page_keys(coding.root, offer.tokens, shard.page_tokens, media)[:count]
        puts = _Puts(self._counters)
        try:
            if shard.writes_rows:
                self._put_pages(offer, coding, keys, puts)
            if coding.tail is not None and len(offer.tokens) > count * shard.page_tokens:
                self._put_tail(offer, coding, keys[-1] if keys else coding.root, count, puts)
            puts.finish()
        finally:  # after an error the others are waited for all the same, and counted
            with contextlib.suppress(FerryError):
                puts.finish()

    def _put_pages(self, offer: Offer, coding: Coding, keys: Sequence[bytes], puts: _Puts) -> None:
        shard = coding.shard
        jobs: list[tuple[BlobKey, CodedRange, int, BlobMeta]] = []
        for index in range(offer.restored_pages, len(keys)):
            meta = _meta(shard, "page", keys[index], keys[index - 1] if index else coding.root)
            for coded in coding.pages:
                key = blob_key(coded.codec, meta, coded.layers, shard.heads)
                jobs.append((key, coded, index, meta))
        held = self._client.has([job[0] for job in jobs]) if jobs else []
        for (_, coded, index, meta), present in zip(jobs, held, strict=True):
            if not present:
                span = index * shard.page_tokens, (index + 1) * shard.page_tokens
                key, data, raw = self._background.run(
                    partial(_encode, offer.source, coded, span, meta)
                )
                puts.add(self._client.put_later(key, data), len(data), raw)

    def _put_tail(
        self, offer: Offer, coding: Coding, previous: bytes, pages: int, puts: _Puts
    ) -> None:
        """The tail and the states after it, in the place of those that they go on from."""
        shard, codec = coding.shard, coding.tail
        assert codec is not None  # noqa: S101 - narrowed by the caller
        span = pages * shard.page_tokens, len(offer.tokens)
        identity = _tail_key(previous, offer, *span)
        old = self._outdated(offer)
        key, states = None, {}
        if shard.writes_rows and shard.layers[0] < shard.layers[1]:
            meta = _meta(shard, "tail", identity, previous)
            page = offer.source.page(shard.layers, span)
            replaces = old.key if old is not None else None
            key = self._put_short(codec, page, meta, coding, replaces, puts)
        if shard.states[0] < shard.states[1]:
            part, parts = shard.state_part
            meta = _meta(shard, "state", state_key(identity, parts), previous)
            for page in offer.source.state_pages(span, part):
                coded = state_codec(page.streams, codec)
                replaces = old.states.get(page.layers) if old is not None else None
                put = self._put_short(coded, page, meta, coding, replaces, puts)
                states[page.layers] = put
        puts.finish()
        if offer.lasting:
            return
        self._tails[identity] = _Tail(span[0], previous, identity, span[1] - span[0], key, states)
        while len(self._tails) > REMEMBERED_TAILS:
            self._tails.popitem(last=False)

    def _put_short(
        self,
        codec: Codec,
        page: PageTensors,
        meta: BlobMeta,
        coding: Coding,
        replaces: BlobKey | None,
        puts: _Puts,
    ) -> BlobKey:
        key, data = self._background.run(partial(encode_blob, codec, page, meta))
        put = self._client.put_later(key, data, ttl_s=coding.tail_ttl_s, replaces=replaces)
        puts.add(put, len(data), page.raw_bytes_fp16)
        return key

    def _outdated(self, offer: Offer) -> _Tail | None:
        """The newest tail of ours that an offer goes on from; forgotten here."""
        for identity, tail in reversed(self._tails.items()):
            end = tail.start + tail.tokens
            longer = end < len(offer.tokens)
            if longer and _tail_key(tail.previous, offer, tail.start, end) == identity:
                del self._tails[identity]
                return tail
        return None


def _tail_key(previous: bytes, offer: Offer, start: int, end: int) -> bytes:
    return tail_key(previous, offer.tokens[start:end], media_within(offer.media, start, end))


def _encode(
    source: TensorSource, coded: CodedRange, span: tuple[int, int], meta: BlobMeta
) -> tuple[BlobKey, bytes, int]:
    """Key, bytes, and how many bytes the tensors were as float16."""
    page = source.page(coded.layers, span)
    key, data = encode_blob(coded.codec, page, meta)
    return key, data, page.raw_bytes_fp16


def _meta(shard: Shard, kind: str, key: bytes, previous: bytes) -> BlobMeta:
    states = kind == "state"
    return BlobMeta(
        kind=kind,
        model_id=shard.model_id,
        page_key=key,
        previous_key=previous,
        model_layers=shard.model_states if states else shard.model_layers,
        model_heads=shard.state_part[1] if states else shard.model_heads,
    )


def wanted_now(policy: pb.Policy, event: str) -> bool:
    """Whether the policy stores at this event ("prefix", "prefill", "turn_end")."""
    return EVENTS[event] in policy.when


def wanted_later(policy: pb.Policy) -> bool:
    """Whether the policy names a trigger that a deferred offer could wait for."""
    later = {pb.TRIGGER_MEMORY_PRESSURE, pb.TRIGGER_IDLE, pb.TRIGGER_BEFORE_SLEEP}
    return not later.isdisjoint(policy.when)
