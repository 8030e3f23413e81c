"""From a cache that the model has filled to an offer, or to nothing: on the model's thread."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from kvferry.codec.mlx.parts import length
from kvferry.node.coding import exact
from kvferry.node.hooks.live import Live
from kvferry.node.hooks.part import Part
from kvferry.node.hooks.rates import Rate
from kvferry.node.hooks.standing import Standing
from kvferry.node.hooks.worth import Worth
from kvferry.node.offer import Offer
from kvferry.node.offers import Offers, wanted_later, wanted_now
from kvferry.proto.keys import Medium, token_ids


@dataclass(frozen=True, slots=True)
class Came:
    """What a restore put into a cache.

    Attributes:
        tokens: that were there before prefill.
        pages: whole pages of them, as they were stored.
        at: ``time.monotonic()`` when prefill began; None: not to be measured.
        ids: those tokens, where they are known.
    """

    tokens: int
    pages: int
    at: float | None
    ids: list[int] | None

    def begins(self, ids: list[int]) -> bool:
        """Whether a cache of ``ids`` still holds it; True where that is not known."""
        return self.ids is None or self.ids[: len(ids)] == ids[: self.tokens]


class Offering:
    """Decides whether a cache is stored and when, and takes a snapshot of it."""

    def __init__(
        self,
        part: Part,
        offers: Offers,
        live: Live,
        standing: Standing,
        prefill: Rate,
        worth: Worth,
        counters: Counter[str],
    ) -> None:
        self._part, self._offers, self._live = part, offers, live
        self._standing, self._prefill, self._counters = standing, prefill, counters
        self._worth = worth
        self._came: WeakKeyDictionary[Any, Came] = WeakKeyDictionary()

    def remember(self, cache: Sequence[Any], came: Came) -> None:
        """Say what of a cache came out of the store."""
        if cache:  # a rank may hold layers that need none
            self._came[cache[0]] = came

    def take(
        self,
        tokens: Sequence[int],
        cache: list[Any],
        event: str,
        lasting: bool,
        media: tuple[Medium, ...],
    ) -> bool:
        """See `kvferry.node.hooks.PrefixCache.offer`.

        Raises: ModelError: this cache cannot be stored.
        """
        filled = length(cache)
        held = len(tokens) if filled is None else min(len(tokens), filled)
        ids = token_ids(tokens[:held])  # here: an array of MLX's belongs to this thread
        came = self._came.get(cache[0]) if cache else None
        if came is not None and not came.begins(ids):
            came = None  # trimmed since, and gone on with another conversation
        if came is not None and came.at is not None and event == "prefill":
            self._prefill.add(held - came.tokens, time.monotonic() - came.at)
        policy = self._standing.policy
        now = wanted_now(policy, event)
        if held < max(1, policy.min_tokens):
            self._counters["drop_short"] += 1
            return False
        if not now and not wanted_later(policy):
            self._counters["drop_policy"] += 1
            return False
        if not self._worth.stores(held):
            self._counters["drop_not_worth_it"] += 1
            return False
        snapshot = self._part.snapshot(cache, held, packed=exact(policy))
        if not media:  # the model cannot be asked again with tokens alone
            self._live.offered(self._standing, ids, snapshot, came.tokens if came else 0)
        shared = event == "prefix"
        pages = came.pages if came else 0
        again = event == "turn_end" and wanted_now(policy, "prefill")
        offer = Offer(tuple(ids), snapshot, pages, lasting or shared, shared, media, again)
        if now:
            return self._offers.submit(offer)
        self._offers.defer(offer)
        return True
