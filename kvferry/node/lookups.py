"""Lookups of a node: the store's answer, or what this node and its peers hold together."""

import asyncio
from collections import Counter
from dataclasses import replace

from kvferry.cluster.repository import LookupQuery, LookupResult
from kvferry.errors import FerryError
from kvferry.node.directory import Directory
from kvferry.node.local_lookup import look_up_locally, merge_local, with_states_of
from kvferry.node.near import mark_near
from kvferry.node.remotes import Remote
from kvferry.node.tiers import Tiers
from kvferry.node.upload_queue import UploadQueue

LOOKUP_TIMEOUT_S = 2.0
# However many there are: those that hold the first page are among them.
PEERS_ASKED = 16


def _reach(found: LookupResult) -> tuple[int, int]:
    return found.complete_pages, len(found.tails)


class Lookups:
    """Belongs to the event loop."""

    def __init__(
        self,
        tiers: Tiers,
        uploads: UploadQueue,
        directory: Directory,
        store: Remote | None,
        counters: Counter[str],
    ) -> None:
        self._tiers, self._uploads, self._directory = tiers, uploads, directory
        self._store, self._counters = store, counters

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """From the store; ``partial`` from this node and its peers where it is gone."""
        found = await mark_near(self._tiers, await self._look_up(query))
        self._directory.note_sizes(found)
        return found

    async def _look_up(self, query: LookupQuery) -> LookupResult:
        if self._store is not None and not query.local_only:
            try:
                async with self._store.asking():
                    result = await self._store.client.lookup(query, timeout_s=LOOKUP_TIMEOUT_S)
                return await self._with_pending(query, result)
            except FerryError as exc:
                self._counters[f"lookup_{exc.reason}"] += 1
        local = await look_up_locally(self._tiers, query)
        if query.local_only:
            return local
        return merge_local([local, *await self._ask_peers(query)], query)

    async def _with_pending(self, query: LookupQuery, found: LookupResult) -> LookupResult:
        """Pages that are all here, but not all in the store yet, count as well."""
        if not self._uploads.count:
            return found
        own = await self._tiers.complete_run(query)
        more = _reach(own) > _reach(found)
        return with_states_of(own, found) if more else with_states_of(found, own)

    async def _ask_peers(self, query: LookupQuery) -> list[LookupResult]:
        asked = replace(query, local_only=True)

        async def ask(peer: Remote) -> LookupResult:
            async with peer.asking():
                answer = await peer.client.lookup(asked)
            for blobs in (*answer.pages, *(t.blobs for t in answer.tails)):
                self._directory.learn(peer.name, blobs)
            for state in answer.states:
                self._directory.learn(peer.name, state.blobs)
            return answer

        peers = self._directory.with_page(query.page_keys, PEERS_ASKED)
        answers = await asyncio.gather(*(ask(peer) for peer in peers), return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, LookupResult)]
