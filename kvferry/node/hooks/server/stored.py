"""What of a served model's caches is stored: one prefix cache, or several side by side.

A server with ``--kv-bits`` quantizes a cache on its way, so there are plain and quantized
ones, each under an identity of its own. With a draft model a cache holds the layers of two
models, each with a prefix cache of its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvferry.codec.mlx.leaves import cache_form
from kvferry.codec.mlx.parts import length as held_by
from kvferry.node.hooks.loaded import Loaded
from kvferry.node.hooks.prefix_cache import PrefixCache
from kvferry.node.hooks.server.turns import RestoredPages, Turn

Cache = list[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A cache that was restored, the tokens that it holds, and what was fetched for it."""

    cache: Cache
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in a conversation a cache is offered; see `PrefixCache.offer`.

    Attributes:
        turn: the request that it was filled for, where that is known.
    """

    event: str
    lasting: bool
    turn: Turn | None


class Stored(Protocol):
    """Everything is for the model's thread; ranks call it alike."""

    @property
    def counters(self) -> Counter[str]:
        """Of the `PrefixCache`s."""

    def ahead(self, tokens: Sequence[int], beyond: int) -> Loaded | None:
        """What `restore` does beside the model, on any thread; None: it does not do that."""

    def restore(
        self, tokens: Sequence[int], beyond: int, loaded: Loaded | None = None
    ) -> Found | None:
        """The longest stored prefix; None where it is no more than ``beyond`` tokens.

        Args:
            loaded: what `ahead` gave for the same tokens.
        """

    def offer(self, tokens: list[int], cache: Cache, moment: Moment) -> None:
        """Have a cache stored that holds ``tokens``, or the first of them."""

    def aligned(self, tokens: list[int], cache: Cache) -> list[int]:
        """The tokens that ``cache`` holds, after cutting its parts to one length."""

    def ready(self, timeout_s: float) -> None:
        """Wait for its identity. A collective."""

    def idle(self) -> None:
        """At most a short piece of work."""

    def close(self) -> None:
        """Hand over what is still queued."""


class Plain:
    """One prefix cache, and which of its pages came out of the store."""

    def __init__(self, prefix: PrefixCache) -> None:
        self.prefix, self._pages = prefix, RestoredPages()

    @property
    def counters(self) -> Counter[str]:
        """See `Stored`."""
        return self.prefix.counters

    def ahead(self, tokens: Sequence[int], beyond: int) -> Loaded | None:
        """See `Stored`."""
        return self.prefix.ahead(tokens, beyond)

    def restore(
        self, tokens: Sequence[int], beyond: int, loaded: Loaded | None = None
    ) -> Found | None:
        """See `Stored`."""
        cache, rest = self.prefix.restore(tokens, beyond=beyond, loaded=loaded)
        held = len(tokens) - len(rest)
        report = self.prefix.last_restore
        if held <= beyond or report is None:
            return None
        self._pages.add(tokens, report.restored_pages)
        return Found(cache, held, report.bytes)

    def offer(self, tokens: list[int], cache: Cache, moment: Moment) -> None:
        """See `Stored`."""
        turn = moment.turn
        before = turn.tokens[: turn.cached] if turn is not None else []
        since = turn.began if turn is not None and turn.alone else None
        self.prefix.remember(cache, len(before), self._pages.count(tokens), since, before)
        self.prefix.offer(tokens, cache, moment.event, lasting=moment.lasting)

    def aligned(self, tokens: list[int], cache: Cache) -> list[int]:
        """See `Stored`."""
        return tokens

    def ready(self, timeout_s: float) -> None:
        """See `Stored`."""
        self.prefix.ready(timeout_s)

    def idle(self) -> None:
        """See `Stored`."""
        self.prefix.idle()

    def close(self) -> None:
        """See `Stored`."""
        self.prefix.close()


class Quantizing:
    """Caches that are quantized once they hold ``start`` tokens.

    Shorter ones are the model's own, and shared with servers that quantize nothing; the
    server quantizes what was restored of them when it goes on.
    """

    def __init__(self, plain: Plain, quantized: Plain, start: int) -> None:
        self._plain, self._quantized, self._start = plain, quantized, start

    @property
    def counters(self) -> Counter[str]:
        """Of both."""
        return self._plain.counters + self._quantized.counters

    def ahead(self, tokens: Sequence[int], beyond: int) -> Loaded | None:
        """See `Stored`: requests of such servers wait for each other anyway."""
        return None

    def restore(
        self, tokens: Sequence[int], beyond: int, loaded: Loaded | None = None
    ) -> Found | None:
        """See `Stored`."""
        found = None
        if len(tokens) > self._start:
            # Cut shorter, it would not be what the server makes of so many tokens.
            found = self._quantized.restore(tokens, max(beyond, self._start - 1))
        held = found.tokens if found is not None else beyond
        if len(tokens) - held <= 1:
            return found
        return self._plain.restore(tokens, held) or found

    def offer(self, tokens: list[int], cache: Cache, moment: Moment) -> None:
        """See `Stored`."""
        (self._quantized if cache_form(cache) else self._plain).offer(tokens, cache, moment)

    def aligned(self, tokens: list[int], cache: Cache) -> list[int]:
        """See `Stored`."""
        return tokens

    def ready(self, timeout_s: float) -> None:
        """See `Stored`."""
        self._plain.ready(timeout_s)
        self._quantized.ready(timeout_s)

    def idle(self) -> None:
        """See `Stored`."""
        self._plain.idle()

    def close(self) -> None:
        """See `Stored`."""
        self._plain.close()
        self._quantized.close()


class WithDraft:
    """Caches whose first ``split`` entries are the model's, and the others its draft model's.

    Both must stand at one position. What is not stored of the draft's is prefilled: it is
    the small model.

    Args:
        draft_prefill: (tokens, cache of the draft's, or None) -> one that holds these too.
    """

    def __init__(
        self,
        main: Stored,
        draft: Stored,
        split: int,
        draft_prefill: Callable[[Sequence[int], Cache | None], Cache],
    ) -> None:
        self._main, self._draft, self._split = main, draft, split
        self._draft_prefill = draft_prefill

    @property
    def counters(self) -> Counter[str]:
        """The model's, and the draft's with a name of their own."""
        theirs = {f"draft_{name}": count for name, count in self._draft.counters.items()}
        return self._main.counters + Counter(theirs)

    def ahead(self, tokens: Sequence[int], beyond: int) -> Loaded | None:
        """See `Stored`: requests of such servers wait for each other anyway."""
        return None

    def restore(
        self, tokens: Sequence[int], beyond: int, loaded: Loaded | None = None
    ) -> Found | None:
        """See `Stored`."""
        found = self._main.restore(tokens, beyond)
        if found is None:
            return None
        draft = self._draft.restore(tokens[: found.tokens + 1], 0)
        cache, held, size = (draft.cache, draft.tokens, draft.bytes) if draft else (None, 0, 0)
        if held < found.tokens or cache is None:
            cache = self._draft_prefill(tokens[held : found.tokens], cache)
        return Found([*found.cache, *cache], found.tokens, found.bytes + size)

    def offer(self, tokens: list[int], cache: Cache, moment: Moment) -> None:
        """See `Stored`."""
        self._main.offer(tokens, cache[: self._split], moment)
        self._draft.offer(tokens, cache[self._split :], moment)

    def aligned(self, tokens: list[int], cache: Cache) -> list[int]:
        """See `Stored`.

        mlx-lm keeps the last token or two of an answer under the cache's name though the
        model, or the draft model, has not seen them; used again it would lack these.
        """
        parts = (cache[: self._split], cache[self._split :])
        lengths = [held_by(part) for part in parts]
        held = min(len(tokens), *(n for n in lengths if n is not None))
        for part, length in zip(parts, lengths, strict=True):
            if length is not None and length > held:
                for layer in part:
                    layer.trim(length - held)
        return tokens[:held]

    def ready(self, timeout_s: float) -> None:
        """See `Stored`."""
        self._main.ready(timeout_s)
        self._draft.ready(timeout_s)

    def idle(self) -> None:
        """See `Stored`."""
        self._main.idle()

    def close(self) -> None:
        """See `Stored`."""
        self._main.close()
        self._draft.close()
