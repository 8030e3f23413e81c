"""Prompts' caches in a store: what any process of the same model has prefilled comes back."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import DynamicCache

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.codec.base import Codec
from kvferry.codec.blob import StoredBlob
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.registry import restorable_names
from kvferry.errors import FerryError
from kvferry.hf.blobs import EXACT, Codecs, decoded, encode, filled, layer_codecs, plan
from kvferry.hf.identity import TorchModel
from kvferry.hf.lacking import check_keeps
from kvferry.hf.tensors import Devices, check_devices, length
from kvferry.node.calibrations import Calibrations
from kvferry.node.restore import Assembly, RestorePlan, plan_restore
from kvferry.places import user_dir
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, BlobKey, page_keys, root_key, token_ids

log = logging.getLogger(__name__)

DAY_S = 86_400


class BlobClient(Protocol):
    """`kvferry.cluster.sync_client.SyncBlobStoreClient` or `kvferry.node.client.NodeClient`."""

    def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are held."""

    def put(self, key: BlobKey, data: bytes, *, ttl_s: int = 0) -> bool:
        """Durable once it returns; False: it was there."""

    def get_many(self, keys: Sequence[BlobKey]) -> list[Any]:
        """Blobs, or errors in their place."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of complete pages, and tails at its end."""


class PrefixCache:
    """Restores the longest stored prefix of a prompt, and stores what a model has computed.

    Neither call raises for anything that goes wrong on our side: `restore` then gives an
    empty cache and `offer` stores nothing, counted by reason in ``counters``. Both work in
    the caller's thread. Blobs that restore were verified to the last bit.

    Args:
        model: from `kvferry.hf.identify`.
        client: of a store or of a node daemon; closed by whoever opened it.
        codec: of pages, exact by default; or one for each range of layers.
        salt: of the namespace, 16 to 64 bytes. All who are to share use the same; a node
            daemon's is ``NodeClient.hello().namespace_salt``.
        tail: codec of a prompt's end (see `kvferry.hf.offload`); None: computed again.
        tail_ttl_s: seconds after which an end is forgotten.
        calibrations: of codecs that need one, to be found in the store by readers.
        device: where restored caches are put; see `kvferry.hf.fill`.
        cache_dir: where fetched calibrations are kept; the user's cache folder if None.
    Raises: ModelError: codecs that do not cover the model; ConfigError: one that drops tokens,
        or layers without a device.
    """

    def __init__(
        self,
        model: TorchModel,
        client: Any,
        *,
        salt: bytes,
        codec: Codecs = EXACT,
        tail: Codec | None = EXACT,
        tail_ttl_s: int = DAY_S,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        calibrations: Sequence[GroupCalibration] = (),
        device: Devices = "cpu",
        cache_dir: Path | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._model, self._client, self._salt = model, client, salt
        self._codecs, self._tail = layer_codecs(codec, model), tail
        for used in (*self._codecs.values(), *(() if tail is None else (tail,))):
            check_keeps(used, "a prompt in a store")
        check_devices(device, range(model.layers))
        self._tail_ttl_s, self._page_tokens, self._device = tail_ttl_s, page_tokens, device
        self._root = root_key(salt, model.model_id, page_tokens)
        self._own = calibrations
        self._calibrations = Calibrations(client, cache_dir or user_dir("cache"))

    def restore(self, tokens: Sequence[int]) -> tuple[DynamicCache, int]:
        """The longest stored prefix, at most all tokens but the last, which must be run.

        Returns: (cache, tokens that it holds). Give ``model.generate`` the whole prompt
        with the cache, or ``model(...)`` what is left of it.
        """
        started = time.monotonic()
        try:
            cache = self._restored(token_ids(tokens))
        except FerryError as exc:
            log.info("nothing is restored: %s", exc)
            self.counters[f"miss_{exc.reason}"] += 1
            return DynamicCache(), 0
        held = 0 if cache is None else length(cache)
        if cache is None:
            self.counters["miss_absent"] += 1
            return DynamicCache(), 0
        if held >= len(tokens):
            cache.crop(len(tokens) - 1 - held)
            held = len(tokens) - 1
        self.counters["restores"] += 1
        self.counters["restored_tokens"] += held
        log.debug("%d tokens restored in %.3f s", held, time.monotonic() - started)
        return cache, held

    def offer(self, tokens: Sequence[int], cache: Any) -> int:
        """Store what the store lacks of a cache; returns once it is durable.

        Args:
            tokens: the ids of the sequence; those that the cache holds are stored.
            cache: as `kvferry.hf.offload` takes it.
        Returns: bytes put.
        """
        try:
            return self._put(token_ids(tokens), cache)
        except FerryError as exc:
            log.warning("nothing more is stored: %s", exc)
            self.counters[f"drop_{exc.reason}"] += 1
            return 0

    def _put(self, ids: list[int], cache: Any) -> int:
        wanted = plan(
            cache,
            ids,
            self._codecs,
            self._model,
            salt=self._salt,
            tail=self._tail,
            page_tokens=self._page_tokens,
        )
        self._publish()
        held = self._client.has([pending.key for pending in wanted])
        put = 0
        for pending, there in zip(wanted, held, strict=True):
            if there:
                continue
            blob = encode(cache, pending)
            ttl_s = self._tail_ttl_s if pending.meta.kind == "tail" else 0
            self._client.put(blob.key, blob.data, ttl_s=ttl_s)
            put += len(blob.data)
        self.counters["offers"] += 1
        return put

    def _publish(self) -> None:
        """Readers must find a blob's calibration: it goes before."""
        while self._own:
            key, data = self._own[0].to_blob()
            if not self._client.has([key])[0]:
                self._client.put(key, data)
            self._own = self._own[1:]

    def _restored(self, ids: list[int]) -> DynamicCache | None:
        model = self._model
        keys = page_keys(self._root, ids, self._page_tokens)
        query = LookupQuery(root=self._root, page_keys=keys, codecs=restorable_names())
        found = self._client.lookup(query)
        planned = plan_restore(
            found,
            keys,
            self._root,
            ids,
            self._page_tokens,
            (0, model.layers),
            (0, model.heads),
        )
        return self._fetched(planned) if planned.segments else None

    def _fetched(self, planned: RestorePlan) -> DynamicCache:
        """Raises: FerryError: a blob that is gone or damaged."""
        parts = [(segment, piece) for segment in planned.segments for piece in segment.pieces]
        blobs = []
        for (segment, piece), data in zip(
            parts, self._client.get_many([piece.info.key for _, piece in parts]), strict=True
        ):
            if isinstance(data, FerryError):
                raise data
            blobs.append(StoredBlob(data, piece.info.key, segment.tokens))
        assembly = Assembly(planned.tokens, (0, self._model.layers), (0, self._model.heads))
        for (_, piece), page in zip(
            parts, decoded(blobs, self._model, self._calibrations), strict=True
        ):
            part = page if page.layers == piece.cut else page.cut_layers(piece.cut)
            assembly.add(part if part.heads == piece.heads else part.cut_heads(piece.heads))
        return filled([assembly.upto(planned.tokens)], self._model, self._device)
