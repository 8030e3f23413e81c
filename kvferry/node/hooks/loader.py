"""From a prompt's tokens to tensors that are verified and whole."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.codec.registry import restorable_names
from kvferry.codec.state_parts import StateLayout
from kvferry.node.coding import Shard
from kvferry.node.hooks.fetch import BlobSource, decoding_threads, fetch
from kvferry.node.hooks.fetch_prefix import PrefixFetch
from kvferry.node.hooks.fetch_rows import RowsFetch
from kvferry.node.hooks.fetch_states import StateFetch
from kvferry.node.hooks.loaded import LoadClient, Loaded, WarmSource
from kvferry.node.hooks.steps import Step, steps_of
from kvferry.node.restore import (
    RestorePlan,
    choose_pieces,
    plan_restore,
    plan_states,
    without_droppers,
)
from kvferry.proto.keys import Medium, media_by_page, page_keys

_POSITIONS_TRIED = 2
NOT_WORTH_IT = "not_worth_it"
NOT_STORED, LACKS_TOKENS = "not_stored", "lacks_tokens"


# Prefixes that can be had, what the lookup took, and tokens that are at hand anyway ->
# tokens that this rank would fetch, and tokens that all ranks fetch.
Choose = Callable[[Sequence[Step], float, int], tuple[int, int]]


def everything(steps: Sequence[Step], _: float, __: int) -> tuple[int, int]:
    """The longest."""
    return steps[-1].tokens, steps[-1].tokens


@dataclass(frozen=True, slots=True)
class Loader:
    """Loads prefixes of one shard in one namespace."""

    client: LoadClient
    calibrations: WarmSource
    shard: Shard
    root: bytes
    accept: frozenset[str]
    rope: Mapping[int, bytes]
    layout: StateLayout | None = None

    def load(
        self,
        tokens: Sequence[int],
        deadline_s: float,
        limit: int | None = None,
        beyond: int = 0,
        choose: Choose = everything,
        media: Sequence[Medium] = (),
    ) -> Loaded:
        """The longest prefix of ``tokens`` that can be had whole within the deadline.

        Args:
            limit: no state beyond so many tokens is of use.
            beyond: nothing is fetched where no more tokens than these are to be had.
            choose: how much of what there is to fetch.
            media: what the tokens do not tell.
        Raises: FerryError where not even the lookup worked.
        """
        loaded = Loaded()
        end = time.monotonic() + deadline_s
        shard = self.shard
        keys = page_keys(
            self.root, tokens, shard.page_tokens, media_by_page(media, shard.page_tokens)
        )
        query = LookupQuery(
            root=self.root,
            page_keys=keys,
            codecs=self.accept,
            layers=shard.layers if shard.layers[0] < shard.layers[1] else (0, 0),
            heads=shard.heads,
            states=shard.states if shard.states[0] < shard.states[1] else (0, shard.model_states),
            tokens=len(tokens) if limit is None else limit,
        )
        found, none = loaded.timed("lookup", lambda: self._look_up(query))
        plan = plan_restore(
            found, keys, self.root, tokens, shard.page_tokens, shard.layers, shard.heads, media
        )
        if shard.model_states:
            states = plan_states(
                found,
                keys,
                self.root,
                tokens,
                shard.page_tokens,
                shard.states,
                shard.state_part,
                any_parts=self.layout is not None and self.layout.told,
                media=media,
            )
            most = len(tokens) if limit is None else limit
            reach = min(most, plan.tokens) if shard.model_layers else most
            loaded.positions = [state for state in states if state.tokens <= reach]
            if not loaded.positions:
                loaded.reason = "no_state" if plan.segments else none
                return loaded
            plan = plan.upto(loaded.positions[0].tokens)
        elif not plan.segments:
            loaded.reason = none
            return loaded
        if (loaded.positions[0].tokens if loaded.positions else plan.tokens) <= beyond:
            loaded.positions, loaded.reason = [], "no_gain"
            return loaded
        plan = _chosen(plan, loaded, beyond, choose)
        if not (loaded.positions if shard.model_states else plan.segments):
            return loaded
        self._load(plan, loaded, end)
        if shard.model_states:
            self._settle(loaded, end)
        return loaded

    def _look_up(self, query: LookupQuery) -> tuple[LookupResult, str]:
        """What can be put back into a live cache, and the reason if that is nothing.

        Where a page is there only without some of its tokens, codecs that have all of them
        are asked for by name: the run of pages may then be another.
        """
        found = self.client.lookup(query)
        whole = without_droppers(found)
        shard = self.shard
        if all(
            len(some) == len(every) for some, every in zip(whole.pages, found.pages, strict=True)
        ):
            return whole, NOT_STORED
        if all(choose_pieces(page, shard.layers, shard.heads) is not None for page in whole.pages):
            return whole, NOT_STORED
        names = query.codecs & restorable_names() or restorable_names()
        return without_droppers(self.client.lookup(replace(query, codecs=names))), LACKS_TOKENS

    def _load(self, plan: RestorePlan, loaded: Loaded, end: float) -> None:
        """Rows, and the states of the longest position, in one request."""
        source, shard, at = self._source(), self.shard, loaded.positions[:_POSITIONS_TRIED]
        with decoding_threads() as threads:
            rows = states = None
            if shard.layers[0] < shard.layers[1]:
                rows = RowsFetch(source, shard, plan, loaded, threads)
            if at:
                states = StateFetch(source, self.layout, at[0], loaded, threads)
            tokens = at[0].tokens if at else plan.tokens
            prefix = PrefixFetch(rows, states, tokens, at[1].tokens if len(at) > 1 else 0)
            loaded.timed("fetch", lambda: fetch(self.client, prefix, end))
            loaded.timed("decode", lambda: prefix.finish(loaded))

    def _settle(self, loaded: Loaded, end: float) -> None:
        """The longest position that rows reach and whose states are here and whole."""
        rows, loaded.tokens = loaded.tokens, 0
        for index, at in enumerate(loaded.positions[:_POSITIONS_TRIED]):
            # The first was asked for together with the rows, and cannot be had if not here.
            if at.tokens <= rows and (
                at.tokens in loaded.states or (index and self.load_state(at.tokens, loaded, end))
            ):
                loaded.tokens = at.tokens
                return
        loaded.reason = loaded.reason or "no_state"

    def load_state(self, tokens: int, loaded: Loaded, end: float) -> bool:
        """Have the states at one of ``loaded.positions``; False: they cannot be had whole.

        Args:
            end: until when, on the monotonic clock.
        """
        if tokens in loaded.states:
            return True
        plan = next((plan for plan in loaded.positions if plan.tokens == tokens), None)
        if plan is None:
            return False
        with decoding_threads() as threads:
            states = StateFetch(self._source(), self.layout, plan, loaded, threads)
            loaded.timed("fetch", lambda: fetch(self.client, states, end))
            return loaded.timed("decode", states.finish)

    def _source(self) -> BlobSource:
        return BlobSource(self.client, self.calibrations, self.rope, self.shard.model_id)


def _chosen(plan: RestorePlan, loaded: Loaded, beyond: int, choose: Choose) -> RestorePlan:
    """The part of a plan that is fetched; ``loaded`` says why it is not all."""
    steps = steps_of(plan, loaded.positions)
    longest = steps[-1].tokens
    mine, agreed = choose(steps, loaded.seconds["lookup"], beyond)
    pieces = [*plan.pieces(), *(p for at in loaded.positions[:1] for p in at.pieces)]
    loaded.first_bytes = next((p.info.size for p in pieces if not p.info.near), 0)
    if agreed >= longest:
        return plan
    loaded.reason = "agreement" if mine == longest else NOT_WORTH_IT
    loaded.positions = [state for state in loaded.positions if state.tokens <= agreed]
    kept = plan.upto(loaded.positions[0].tokens if loaded.positions else agreed)
    if mine < longest:
        fetched = {piece.info.key for piece in kept.pieces()}
        loaded.skipped = [p.info for p in pieces if p.info.key not in fetched]
    return kept
