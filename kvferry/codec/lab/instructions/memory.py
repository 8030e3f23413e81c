"""What becomes of a conversation's cache after each turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import Codec, PageTensors
from kvferry.codec.lab.coding import Coded
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.mlx.gapped_cache import GappedKVCache

Compress = Callable[[list[Any], Codec], list[Any]]
Snap = Callable[[list[Any], int], CacheSnapshot]


class Memory(Protocol):
    """What is done with a cache after a turn. One for each conversation."""

    def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
        """The cache to go on with.

        Args:
            tokens: of the conversation so far.
        Raises: FerryError.
        """

    @property
    def share(self) -> float:
        """What is held after the last turn, of all its tokens at two bytes a value."""


@dataclass(frozen=True, slots=True)
class Whole:
    """Nothing is forgotten: the condition that all others are compared with."""

    def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
        """The same."""
        return cache

    @property
    def share(self) -> float:
        """All."""
        return 1.0


@dataclass(slots=True)
class Dropping:
    """A codec that drops tokens, on the live cache; one that merges them does so but once.

    Attributes:
        codec: gives the codec that makes one entry of so many; what it is given is what
            earlier turns left, so that a fixed ratio would take more from them each time.
        retention: entries to be held, of all tokens so far; None: as the codec says.
        compress: a cache through a codec, as a cache.
    """

    codec: Callable[[float | None], Codec]
    retention: float | None
    compress: Compress
    share: float = 1.0

    def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
        """Fewer entries, unless there are few enough."""
        held, ratio = entries(cache), None
        if self.retention is not None:
            budget = max(1, round(self.retention * tokens))
            ratio = held / budget
        if ratio is None or ratio > 1:
            cache = self.compress(cache, self.codec(ratio))
        self.share = entries(cache) / tokens
        return cache


@dataclass(slots=True)
class Recoding:
    """A codec that keeps all tokens: each is coded once, after its turn, never again.

    Attributes:
        model: an mlx-lm model.
        snap: a cache's first tokens, held.
        code: tokens of a snapshot through the codec and back.
    """

    model: Any
    snap: Snap
    code: Callable[[CacheSnapshot, tuple[int, int]], Coded]
    share: float = 1.0
    _pages: list[PageTensors] = field(default_factory=list)
    _values: int = 0
    _bytes: int = 0

    def after_turn(self, cache: list[Any], tokens: int) -> list[Any]:
        """A cache of what came back."""
        done = self._pages[-1].tokens[1] if self._pages else 0
        held = self.snap(cache, tokens)
        coded = self.code(held, (done, tokens))
        self._pages += coded.pages
        self._values += coded.values
        self._bytes += coded.blob_bytes
        self.share = self._bytes / (2 * self._values)
        made: list[Any] = make_prompt_cache(self.model)
        held.refill(made, self._pages)
        return made


def entries(cache: Sequence[Any]) -> int:
    """Rows that a cache holds, for as many tokens or more."""
    first = cache[0]
    return int(first.entries if isinstance(first, GappedKVCache) else first.offset)
