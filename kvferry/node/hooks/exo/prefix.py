"""exo's prefix cache with kvferry behind it: local entries first, then the node daemon.

The class is made from exo's own, so that whatever exo does with its entries (media regions,
snapshots, exact hits, eviction by all ranks alike) stays as it is.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from kvferry.codec.mlx.leaves import leaves, rows_adapter
from kvferry.codec.mlx.parts import length, parts_of
from kvferry.node.hooks.exo.media import clipped, media_of
from kvferry.proto.keys import Medium

log = logging.getLogger(__name__)

KEEP_LAST = 2  # exo prefills all tokens of a prompt but the last two into what it keeps
_MOST_SNAPSHOTS = 2


class Ferry(Protocol):
    """What is used of `kvferry.node.hooks.PrefixCache`."""

    def restore(
        self, tokens: Sequence[int], *, beyond: int = 0, media: Sequence[Medium] = ()
    ) -> tuple[list[Any], list[int]]:
        """A collective of all ranks; never raises."""

    def offer(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str = "prefill",
        *,
        lasting: bool = False,
        media: Sequence[Medium] = (),
    ) -> bool:
        """Never raises."""

    def trigger(self) -> None:
        """Store now what waits."""


@dataclass(frozen=True, slots=True)
class Link:
    """What a runner has of kvferry.

    Attributes:
        ferry: the way to the store.
        fresh: makes an empty cache.
        all_min: element-wise minimum over all ranks; a collective.
        vision: see `media.media_of`.
        settle: waits for collectives that the model has under way.
    """

    ferry: Ferry
    fresh: Callable[[], list[Any]]
    all_min: Callable[[Sequence[int]], list[int]]
    vision: bytes = b""
    settle: Callable[[], None] = lambda: None


def with_ferry(base: type[Any], connect: Callable[[], Link | None], threshold: float) -> type[Any]:
    """exo's ``KVPrefixCache`` with a store behind it.

    Args:
        base: exo's class.
        connect: called once per runner; None: work as ``base`` does. The same on all ranks.
        threshold: share of memory above which ``base`` drops entries.
    """

    class FerryPrefixCache(base):  # type: ignore[misc]
        """Same duck type; see ``base``."""

        def __init__(self, group: Any) -> None:
            super().__init__(group)
            self.kvferry = connect()
            self._room_made = False

        @property
        def ferry(self) -> Ferry | None:
            """None: works as ``base`` does."""
            return None if self.kvferry is None else self.kvferry.ferry

        def get_kv_cache(
            self, model: Any, prompt_tokens: Any, media_regions: Any = None
        ) -> tuple[Any, Any, int | None, bool]:
            link = self.kvferry
            if link is None:
                found: tuple[Any, Any, int | None, bool]
                found = super().get_kv_cache(model, prompt_tokens, media_regions)
                return found
            cache, remaining, index, exact = self._agreed(link, model, prompt_tokens, media_regions)
            if exact:
                return cache, remaining, index, exact
            held = len(prompt_tokens) - len(remaining)
            tokens, media = _told(prompt_tokens, media_regions, link.vision)
            restored, rest = link.ferry.restore(tokens, beyond=held, media=media)
            got = len(tokens) - len(rest)
            if got <= held:
                return cache, remaining, index, exact
            # Not one of exo's entries: it will add it, and counts it as cached.
            return restored, prompt_tokens[got:], None, False

        def _agreed(
            self, link: Link, model: Any, prompt_tokens: Any, media_regions: Any
        ) -> tuple[Any, Any, int | None, bool]:
            """exo's own entry, where all ranks found the same; else none.

            exo never compares: a rank that failed to keep an entry, or has none of the
            layers that know their length, would leave the others waiting for it.
            """
            link.settle()
            found: Any = None
            mine = [-1] * 4
            try:
                found = super().get_kv_cache(model, prompt_tokens, media_regions)
                _, remaining, index, exact = found
                held = len(prompt_tokens) - len(remaining)
                mine = [len(self.caches), held, -1 if index is None else index, int(exact)]
            except Exception:
                # The collective below must be entered on every rank.
                log.exception("exo's own entries cannot be used")
            lowest = link.all_min([*mine, *(-value for value in mine)])
            highest = [-value for value in lowest[4:]]
            if found is not None and lowest[:4] == highest:
                agreed: tuple[Any, Any, int | None, bool] = found
                return agreed
            if lowest[0] != highest[0] or lowest[0] < 0:
                # They are dropped as memory runs short, one collective for each.
                log.warning("ranks hold different entries: all of them are dropped")
                self.clear()
            return link.fresh(), prompt_tokens, None, False

        def add_kv_cache(
            self,
            prompt_tokens: Any,
            cache: Any,
            ssm_snapshots: Any = None,
            media_regions: Any = None,
            prefill_tps: float = 0.0,
        ) -> None:
            if self.kvferry is not None:
                # Now, as nothing can have failed on one rank alone: there are collectives
                # in it, and exo goes on after whatever fails later.
                self.kvferry.settle()
                self._evict_if_needed()
                self._compute(cache)
            self._room_made = self.kvferry is not None
            try:
                super().add_kv_cache(
                    prompt_tokens, cache, ssm_snapshots, media_regions, prefill_tps
                )
            finally:
                self._room_made = False
            self._offer(prompt_tokens, cache, ssm_snapshots, media_regions)

        def update_kv_cache(
            self,
            index: int,
            prompt_tokens: Any,
            cache: Any,
            snapshots: Any,
            restore_pos: int,
            media_regions: Any = None,
            prefill_tps: float = 0.0,
        ) -> None:
            if self.kvferry is not None:
                self._compute(cache)
            super().update_kv_cache(
                index, prompt_tokens, cache, snapshots, restore_pos, media_regions, prefill_tps
            )
            self._offer(prompt_tokens, cache, snapshots, media_regions)

        def _compute(self, cache: Any) -> None:
            """What exo leaves for later may hold collectives: on all ranks now, or on none."""
            mx.eval([vars(leaf) for layer in cache for leaf in leaves(layer)])

        def _evict_if_needed(self) -> None:
            # Every rank has as many entries, and asks as often.
            if self.kvferry is not None:
                if self._room_made or not self.caches:
                    return
                if self.get_memory_used_percentage() <= threshold:
                    return
                self.kvferry.ferry.trigger()
            super()._evict_if_needed()

        def _offer(self, prompt_tokens: Any, cache: Any, snapshots: Any, regions: Any) -> None:
            if self.kvferry is None:
                return
            try:
                tokens, media = _told(prompt_tokens, regions, self.kvferry.vision)
                for ids, part, lasting in offers(tokens, len(prompt_tokens), cache, snapshots):
                    seen = clipped(media, len(ids))
                    self.kvferry.ferry.offer(ids, part, "prefill", lasting=lasting, media=seen)
            except Exception:
                log.exception("nothing of this prompt is stored")

    return FerryPrefixCache


def _told(
    prompt_tokens: Any, media_regions: Any, vision: bytes
) -> tuple[list[int], tuple[Medium, ...]]:
    """Tokens up to the first image or sound that nothing tells apart; the media before it."""
    media, end = media_of(media_regions, vision, len(prompt_tokens))
    return [int(token) for token in prompt_tokens.tolist()[:end]], media


def offers(
    tokens: list[int], prompt_tokens: int, cache: Sequence[Any], snapshots: Any
) -> list[tuple[list[int], list[Any], bool]]:
    """(tokens, cache, lasting) of each position to be stored.

    Args:
        tokens: what of the prompt can be stored.
        prompt_tokens: how long it is.
        cache: of all but the last tokens of the prompt.
        snapshots: states at earlier positions, where a cache cannot be trimmed.
    Raises: ModelError: a cache that cannot be stored.
    """
    held = length(cache)
    if held is None:
        held = prompt_tokens - KEEP_LAST
    trimmable = not parts_of(cache).states
    made: list[tuple[list[int], list[Any], bool]] = []
    earlier = [s for s in snapshots or [] if 0 < s.token_count < min(held, len(tokens) + 1)]
    # The first, which other prompts are likeliest to share, and the last.
    for snapshot in [*earlier[:1], *earlier[1:][-(_MOST_SNAPSHOTS - 1) :]]:
        part = [
            _at(layer, state, snapshot.token_count)
            for layer, state in zip(cache, snapshot.states, strict=True)
        ]
        made.append((tokens[: snapshot.token_count], part, True))
    if trimmable or held <= len(tokens):
        made.append((tokens[:held], list(cache), False))
    return made


def _at(layer: Any, state: Any, tokens: int) -> Any:
    """A layer's cache as it was at an earlier position; nothing is copied."""
    if state is not None:
        return state
    made = copy.copy(layer)
    if type(layer).__name__ == "CacheList":
        made.caches = tuple(_at(child, None, tokens) for child in layer.caches)
    elif all(rows_adapter(leaf) for leaf in leaves(layer)):
        made.offset = tokens
    return made
