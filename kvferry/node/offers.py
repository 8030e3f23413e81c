"""Offers: what a hook gives away after prefill or a turn, encoded and put in the background.

The model's thread only drops an offer into a bounded queue; a background thread asks
which blobs are missing, encodes those in idle time and hands them to the node daemon. Offers whose
moment the policy has not named wait for a trigger (memory pressure, idle, before sleep).
"""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from kvferry.cluster.repository import BlobInfo
from kvferry.codec.base import Codec, PageTensors
from kvferry.codec.blob import BlobMeta, blob_key, encode_blob
from kvferry.errors import FerryError
from kvferry.node.already import complete_pages, is_stored
from kvferry.node.background import Background, OneThread, lower_priority
from kvferry.node.coding import CodedRange, state_codec
from kvferry.node.offer import Coding, Offer, OfferClient, TensorSource
from kvferry.node.pace import SHARE
from kvferry.node.patience import RESTART_S, Patience
from kvferry.node.puts import Puts
from kvferry.node.tails import Tail, Tails, key_of_tail
from kvferry.proto.keys import BlobKey, media_by_page, page_keys, state_key
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1 import node_pb2

log = logging.getLogger(__name__)

QUEUE_LENGTH = 4
DEFERRED_LENGTH = 4
EVENTS = {
    "prefix": pb.TRIGGER_AFTER_PREFILL,
    "prefill": pb.TRIGGER_AFTER_PREFILL,
    "turn_end": pb.TRIGGER_TURN_END,
}


class Offers:
    """The queue, its thread, and what waits for a trigger.

    ``coding`` is asked before each offer is encoded, so that a policy change takes hold
    at once; it may return None (nothing is to be stored now) or raise a FerryError.
    ``busy_share`` is what encoding takes of the time where all cores are busy. Where the
    daemon restarts, an offer waits for it ``restart_wait_s``, and those behind it queue up.
    """

    def __init__(
        self,
        client: OfferClient,
        coding: Callable[[], Coding | None],
        counters: Counter[str],
        busy_share: float = SHARE,
        restart_wait_s: float = RESTART_S,
    ) -> None:
        self._client, self._coding, self._counters = client, coding, counters
        self._patience = Patience(client, restart_wait_s)
        self._told: dict[BlobKey, node_pb2.Admission.ValueType] = {}
        self._queue: queue.Queue[Offer | None] = queue.Queue(QUEUE_LENGTH)
        self._deferred: list[Offer] = []
        self._tails = Tails()
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

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until all that was submitted is encoded and handed to the daemon, or dropped.

        False: it is not, after that time.
        """
        ended, queued = self._queue.all_tasks_done, self._queue
        with self._background.hurry(), ended:
            return ended.wait_for(lambda: not queued.unfinished_tasks, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Encode what is queued, then stop. False: the time was not enough.

        A daemon that is away is not waited for.
        """
        self._patience.close()
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
                self._told.clear()
                self._patience.run(partial(self._process, offer))
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
        with self._one_thread:
            self._store(offer)

    def _store(self, offer: Offer) -> None:
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
        puts = Puts(self._counters)
        try:
            whole = not shard.writes_rows or self._put_pages(offer, coding, keys, puts)
            if coding.tail is not None and len(offer.tokens) > count * shard.page_tokens:
                previous = keys[-1] if keys else coding.root
                if whole and (keys or self._wants_tail(offer, coding, previous)):
                    self._put_tail(offer, coding, previous, count, puts)
            puts.finish()
        finally:  # after an error the others are waited for all the same, and counted
            with contextlib.suppress(FerryError):
                puts.finish()

    def _put_pages(self, offer: Offer, coding: Coding, keys: Sequence[bytes], puts: Puts) -> bool:
        """Put what is wanted; False: not all of it was, so nothing behind it is of use."""
        shard = coding.shard
        jobs: list[tuple[BlobKey, CodedRange, int, BlobMeta]] = []
        for index in range(offer.restored_pages, len(keys)):
            meta = _meta(coding, "page", keys[index], keys[index - 1] if index else coding.root)
            for coded in coding.pages:
                key = blob_key(coded.codec, meta, coded.layers, shard.heads)
                jobs.append((key, coded, index, meta))
        asked = [job[0] for job in jobs]
        answers = self._admit(asked, offer.again) if jobs else []
        known: Sequence[Sequence[BlobInfo]] = []
        if any(answer != node_pb2.ADMISSION_HELD for answer in answers):
            known = complete_pages(self._client, coding.root, keys, shard, coding.accept)
        whole = True
        for (_, coded, index, meta), answer in zip(jobs, answers, strict=True):
            if answer == node_pb2.ADMISSION_HELD:
                continue
            if index < len(known) and is_stored(known[index], coded, shard):
                self._counters["blobs_stored_finer"] += 1
            elif answer == node_pb2.ADMISSION_WANTED:
                span = index * shard.page_tokens, (index + 1) * shard.page_tokens
                key, data, raw = self._background.run(
                    partial(_encode, offer.source, coded, span, meta)
                )
                puts.add(self._client.put_later(key, data), len(data), raw)
            else:
                self._counters["declined"] += 1
                whole = False
        return whole

    def _admit(self, keys: Sequence[BlobKey], again: bool) -> "list[node_pb2.Admission.ValueType]":
        """What the daemon wants; done again, an offer is told what it was told before."""
        held = node_pb2.ADMISSION_HELD
        answers = self._client.admit(keys, again=again)
        return [
            answer if answer == held else self._told.setdefault(key, answer)
            for key, answer in zip(keys, answers, strict=True)
        ]

    def _wants_tail(self, offer: Offer, coding: Coding, previous: bytes) -> bool:
        """Whether a tail without pages before it is to be put."""
        shard, codec = coding.shard, coding.tail
        identity = key_of_tail(previous, offer, 0, len(offer.tokens))
        layers = shard.layers if shard.layers[0] < shard.layers[1] else shard.states
        if codec is None or layers[0] >= layers[1]:
            return True
        heads = shard.heads if shard.heads[0] < shard.heads[1] else (0, 1)
        key = blob_key(codec, _meta(coding, "tail", identity, previous), layers, heads)
        (answer,) = self._admit([key], offer.again)
        if answer == node_pb2.ADMISSION_DECLINED:
            self._counters["declined"] += 1
        return answer != node_pb2.ADMISSION_DECLINED

    def _put_tail(
        self, offer: Offer, coding: Coding, previous: bytes, pages: int, puts: Puts
    ) -> None:
        """The tail and the states after it, in the place of those that they go on from."""
        shard, codec = coding.shard, coding.tail
        assert codec is not None  # noqa: S101 - narrowed by the caller
        span = pages * shard.page_tokens, len(offer.tokens)
        identity = key_of_tail(previous, offer, *span)
        old = self._tails.outdated(offer)
        key, states = None, {}
        if shard.writes_rows and shard.layers[0] < shard.layers[1]:
            meta = _meta(coding, "tail", identity, previous)
            page = offer.source.page(shard.layers, span)
            replaces = old.key if old is not None else None
            key = self._put_short(codec, page, meta, coding, replaces, puts)
        if shard.states[0] < shard.states[1]:
            part, parts = shard.state_part
            meta = _meta(coding, "state", state_key(identity, parts), previous)
            for page in offer.source.state_pages(span, part):
                coded = state_codec(page.streams, codec)
                replaces = old.states.get(page.layers) if old is not None else None
                put = self._put_short(coded, page, meta, coding, replaces, puts)
                states[page.layers] = put
        puts.finish()
        self._tails.replaced(old)
        if offer.lasting:
            return
        tail = Tail(span[0], previous, identity, span[1] - span[0], key, states)
        self._tails.put(tail)

    def _put_short(
        self,
        codec: Codec,
        page: PageTensors,
        meta: BlobMeta,
        coding: Coding,
        replaces: BlobKey | None,
        puts: Puts,
    ) -> BlobKey:
        key, data = self._background.run(partial(encode_blob, codec, page, meta))
        put = self._client.put_later(key, data, ttl_s=coding.tail_ttl_s, replaces=replaces)
        puts.add(put, len(data), page.raw_bytes_fp16)
        return key


def _encode(
    source: TensorSource, coded: CodedRange, span: tuple[int, int], meta: BlobMeta
) -> tuple[BlobKey, bytes, int]:
    """Key, bytes, and how many bytes the tensors were as float16."""
    page = source.page(coded.layers, span)
    key, data = encode_blob(coded.codec, page, meta)
    return key, data, page.raw_bytes_fp16


def _meta(coding: Coding, kind: str, key: bytes, previous: bytes) -> BlobMeta:
    shard, states = coding.shard, kind == "state"
    return BlobMeta(
        kind=kind,
        model_id=shard.model_id,
        page_key=key,
        previous_key=previous,
        model_layers=shard.model_states if states else shard.model_layers,
        model_heads=shard.state_part[1] if states else shard.model_heads,
        namespace_tag=coding.namespace_tag,
    )


def wanted_now(policy: pb.Policy, event: str) -> bool:
    """Whether the policy stores at this event ("prefix", "prefill", "turn_end")."""
    return EVENTS[event] in policy.when


def wanted_later(policy: pb.Policy) -> bool:
    """Whether the policy names a trigger that a deferred offer could wait for."""
    later = {pb.TRIGGER_MEMORY_PRESSURE, pb.TRIGGER_IDLE, pb.TRIGGER_BEFORE_SLEEP}
    return not later.isdisjoint(policy.when)
