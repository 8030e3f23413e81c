"""exo's prefix cache with kvferry behind it: local entries first, then the node daemon.

The class is made from exo's own, so that whatever exo does with its entries (media regions,
snapshots, exact hits, eviction by all ranks alike) stays as it is.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvferry.codec.mlx.leaves import leaves, rows_adapter
from kvferry.codec.mlx.parts import length, parts_of

log = logging.getLogger(__name__)

KEEP_LAST = 2  # exo prefills all tokens of a prompt but the last two into what it keeps
_MOST_SNAPSHOTS = 2


class Ferry(Protocol):
    """What is used of `kvferry.node.hooks.PrefixCache`."""

    def restore(self, tokens: Sequence[int], *, beyond: int = 0) -> tuple[list[Any], list[int]]:
        """A collective of all ranks; never raises."""

    def offer(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str = "prefill",
        *,
        lasting: bool = False,
    ) -> bool:
        """Never raises."""

    def trigger(self) -> None:
        """Store now what waits."""


def with_ferry(base: type[Any], connect: Callable[[], Ferry | None], threshold: float) -> type[Any]:
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
            self.ferry = connect()

        def get_kv_cache(
            self, model: Any, prompt_tokens: Any, media_regions: Any = None
        ) -> tuple[Any, Any, int | None, bool]:
            found = super().get_kv_cache(model, prompt_tokens, media_regions)
            cache, remaining, index, exact = found
            if self.ferry is None or exact:
                return cache, remaining, index, exact
            held = len(prompt_tokens) - len(remaining)
            tokens = _plain_tokens(prompt_tokens, media_regions)
            restored, rest = self.ferry.restore(tokens, beyond=held)
            got = len(tokens) - len(rest)
            if got <= held:
                return cache, remaining, index, exact
            # Not one of exo's entries: it will add it, and counts it as cached.
            return restored, prompt_tokens[got:], None, False

        def add_kv_cache(
            self,
            prompt_tokens: Any,
            cache: Any,
            ssm_snapshots: Any = None,
            media_regions: Any = None,
            prefill_tps: float = 0.0,
        ) -> None:
            super().add_kv_cache(prompt_tokens, cache, ssm_snapshots, media_regions, prefill_tps)
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
            super().update_kv_cache(
                index, prompt_tokens, cache, snapshots, restore_pos, media_regions, prefill_tps
            )
            self._offer(prompt_tokens, cache, snapshots, media_regions)

        def _evict_if_needed(self) -> None:
            # Every rank has as many entries, and asks as often.
            ferry = self.ferry if self.caches else None
            if ferry is not None and self.get_memory_used_percentage() > threshold:
                ferry.trigger()
            super()._evict_if_needed()

        def _offer(self, prompt_tokens: Any, cache: Any, snapshots: Any, regions: Any) -> None:
            if self.ferry is None:
                return
            try:
                for tokens, part, lasting in offers(prompt_tokens, cache, snapshots, regions):
                    self.ferry.offer(tokens, part, "prefill", lasting=lasting)
            except Exception:
                log.exception("nothing of this prompt is stored")

    return FerryPrefixCache


def _plain_tokens(prompt_tokens: Any, media_regions: Any) -> list[int]:
    """Tokens up to the first image or sound: what follows depends on more than tokens."""
    starts = [int(region.start_pos) for region in media_regions or []]
    end = min([len(prompt_tokens), *starts])
    return [int(token) for token in prompt_tokens.tolist()[:end]]


def offers(
    prompt_tokens: Any, cache: Sequence[Any], snapshots: Any, media_regions: Any
) -> list[tuple[list[int], list[Any], bool]]:
    """(tokens, cache, lasting) of each position to be stored.

    Args:
        cache: of all but the last tokens of the prompt.
        snapshots: states at earlier positions, where a cache cannot be trimmed.
    Raises: ModelError: a cache that cannot be stored.
    """
    tokens = _plain_tokens(prompt_tokens, media_regions)
    held = length(cache)
    if held is None:
        held = len(prompt_tokens) - KEEP_LAST
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
