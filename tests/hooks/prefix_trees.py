"""Random prefix trees, caches whose rows say where they belong, and a store at hand.

Each row holds its token, its position and a digest of model and whole prefix: a restored
row that belongs to any other conversation, position or layer is noticed.
"""

from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
import numpy as np
from blake3 import blake3
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from kvferry.cluster.backends.memory import MemoryBackend
from kvferry.cluster.loop_thread import LoopThread
from kvferry.cluster.repository import LookupQuery, LookupResult, PutSpec
from kvferry.cluster.store import LocalStore, StoreLimits
from kvferry.errors import FerryError
from kvferry.node.admission import admit
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import node_pb2

HEADS, DIM, RING = 2, 16, 32
_VALUES_PER_PLACE = 1 << 16
_STATE_PLACE = 200

Rows = np.ndarray[Any, np.dtype[np.float32]]


def rows_of(model_id: bytes, tokens: Sequence[int]) -> Rows:
    """(tokens, DIM): token, position, and a digest of the prefix that ends here."""
    found = np.empty((len(tokens), DIM), dtype=np.float32)
    digest = model_id
    for position, token in enumerate(tokens):
        digest = blake3(digest + token.to_bytes(4, "little")).digest()
        found[position, 3:] = np.frombuffer(digest, dtype="<u2")[: DIM - 3]
    found[:, 0] = [token & 0xFFFF for token in tokens]
    found[:, 1] = [token >> 16 for token in tokens]
    found[:, 2] = np.arange(len(tokens))
    return found


def placed(rows: Rows, layer: int) -> tuple[Rows, Rows]:
    """Keys and values (HEADS, tokens, DIM) of one layer; exact in float32."""
    heads = [rows + _VALUES_PER_PLACE * (2 * (layer * HEADS + head)) for head in range(HEADS)]
    return np.stack(heads), np.stack(heads) + np.float32(_VALUES_PER_PLACE)


def empty_cache(kinds: str) -> list[Any]:
    """One letter a layer: "k" rows, "r" ring, "a" recurrent state."""
    makers: Any = {"k": KVCache, "r": lambda: RotatingKVCache(max_size=RING, keep=0)}
    return [makers[kind]() if kind != "a" else ArraysCache(1) for kind in kinds]


def filled_cache(kinds: str, model_id: bytes, tokens: Sequence[int], single: int = 0) -> list[Any]:
    """As a model would have filled it, the last ``single`` tokens one by one."""
    cache, rows = empty_cache(kinds), rows_of(model_id, tokens)
    ends = [max(0, len(tokens) - single), *range(max(0, len(tokens) - single) + 1, len(tokens) + 1)]
    for layer, (kind, leaf) in enumerate(zip(kinds, cache, strict=True)):
        if kind == "a":
            leaf[0] = mx.array(_state(rows, layer)[None])
            continue
        keys, values = placed(rows, layer)
        start = 0
        for end in ends:
            if start < end:
                leaf.update_and_fetch(
                    mx.array(keys[None, :, start:end]), mx.array(values[None, :, start:end])
                )
            start = end
    return cache


def _state(rows: Rows, layer: int) -> Rows:
    """(2, DIM): the last two rows, as a convolution would keep them."""
    padded = np.concatenate([np.zeros((2, DIM), dtype=np.float32), rows])
    return np.asarray(padded[-2:] + _VALUES_PER_PLACE * (_STATE_PLACE + layer), dtype=np.float32)


def assert_belongs(
    kinds: str, cache: Sequence[Any], model_id: bytes, tokens: Sequence[int]
) -> None:
    """Every row and every state is that of exactly these tokens, and of no others."""
    rows = rows_of(model_id, tokens)
    for layer, (kind, leaf) in enumerate(zip(kinds, cache, strict=True)):
        if kind == "a":
            np.testing.assert_array_equal(np.array(leaf[0])[0], _state(rows, layer))
            continue
        assert leaf.offset == len(tokens)
        keys, values = placed(rows[-RING:] if kind == "r" else rows, layer)
        held = keys.shape[1]
        np.testing.assert_array_equal(np.array(leaf.keys)[0, :, :held], keys)
        np.testing.assert_array_equal(np.array(leaf.values)[0, :, :held], values)


class Tree:
    """Conversations that share prefixes and part anywhere, also within a page."""

    def __init__(self, rng: np.random.Generator, page: int, longest: int) -> None:
        self._rng, self._page, self._longest = rng, page, longest
        self.paths: list[list[int]] = [self._grow([])]
        for _ in range(int(rng.integers(1, 4))):
            self.branch()

    def branch(self) -> list[int]:
        """One more, off any of those that are there; or one of them with another token."""
        old = self.paths[int(self._rng.integers(len(self.paths)))]
        if self._rng.random() < 0.4:
            at = int(self._rng.integers(0, len(old) // 4 + 1))
            self.paths.append([*old[:at], old[at] ^ 1, *old[at + 1 :]])
        else:
            self.paths.append(self._grow(self.cut(old)))
        return self.paths[-1]

    def cut(self, path: list[int]) -> list[int]:
        """A prefix, often at a page's edge or one or two tokens off it."""
        at = int(self._rng.integers(0, len(path) + 1))
        if self._rng.random() < 0.5:
            at = round(at / self._page) * self._page + int(self._rng.integers(-2, 3))
        return path[: max(0, min(at, len(path)))]

    def _grow(self, prefix: list[int]) -> list[int]:
        room = max(1, self._longest - len(prefix))
        count = room if self._rng.random() < 0.4 else int(self._rng.integers(1, room + 1))
        # Few ids, so that conversations also meet by chance, and the largest there is.
        ids = [0, 1, 2, 7, 0xFFFF, 0xFFFF_FFFF]
        return [*prefix, *(ids[i] for i in self._rng.integers(0, len(ids), count))]


class StoreAtHand:
    """A real store in this process, with what a hook asks of its node daemon."""

    def __init__(self, budget_bytes: int) -> None:
        self._thread = LoopThread("store-at-hand")
        limits = StoreLimits(budget_bytes=budget_bytes)
        self.store = self._thread.run(LocalStore.open(MemoryBackend(), limits))
        self.budget_bytes = budget_bytes
        self._recent: deque[BlobKey] = deque(maxlen=12)

    def close(self) -> None:
        self._thread.run(self.store.aclose())
        self._thread.close()

    def evict_some(self, rng: np.random.Generator) -> None:
        """Of the blobs that came last, about every third."""
        keys = [key for key in self._recent if rng.random() < 0.3]
        self._thread.run(self.store.delete(keys))

    def lookup(self, query: LookupQuery) -> LookupResult:
        return self._thread.run(self.store.lookup(query))

    def admit(
        self, keys: Sequence[BlobKey], *, again: bool = False
    ) -> "list[node_pb2.Admission.ValueType]":
        return admit(keys, self._thread.run(self.store.has(keys)), None, Counter(), again)

    def get_each(
        self, keys: Sequence[BlobKey], deadline_s: float
    ) -> Generator[tuple[BlobKey, bytes | FerryError], None, None]:
        for key in keys:
            try:
                yield key, self._thread.run(self._get(key))
            except FerryError as exc:
                yield key, exc

    async def _get(self, key: BlobKey) -> bytes:
        session = await self.store.open_get(key)
        return b"".join([bytes(chunk) async for chunk in session.chunks])

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        self._recent.append(key)
        spec = PutSpec(key=key, size=len(data), ttl_s=ttl_s, replaces=replaces)
        return self._thread.start(self._put(spec, data))

    def lost(self, error: FerryError) -> bool:
        return False

    def connected(self, timeout_s: float) -> bool:
        return True

    async def _put(self, spec: PutSpec, data: bytes) -> bool:
        session = await self.store.open_put(spec)
        if session is None:
            return False
        try:
            await session.write(data)
            return await session.finish()
        except BaseException:
            await session.abort()
            raise
