"""What a chain of page keys finds in a bucket: a small GET a page, many at once.

Pages that were asked for a moment ago cost nothing. What hangs on a page is found by one
listing; which order, and how much of it, is as in `kvferry.cluster.index_lookup`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.cluster.bucket.layout import (
    UnitKey,
    anchored,
    page_marker,
    parse_marker_path,
)
from kvferry.cluster.bucket.marker import Part
from kvferry.cluster.bucket.objects import Bucket, Listed
from kvferry.cluster.bucket.units import Units
from kvferry.cluster.listing import MAX_STATES, MAX_TAILS, listed, of_states, tail_anchors
from kvferry.cluster.repository import BlobInfo, LookupQuery, LookupResult, StateFound, TailFound
from kvferry.errors import InvalidKeyError

# Pages asked for at once: few at first, since many a chain is not there at all.
_WAVES = (4, 28, 64)
_STATE_WAVE = 32
_MOST_ANCHORED = 1000


@dataclass(frozen=True, slots=True)
class _Anchored:
    unit: UnitKey
    path: str
    start: int
    end: int
    stored_unix_s: float


class Lookups:
    """Lookups of one bucket."""

    def __init__(self, bucket: Bucket, units: Units) -> None:
        self._bucket, self._units = bucket, units

    async def find(
        self, query: LookupQuery, now_s: float
    ) -> tuple[LookupResult, list[tuple[UnitKey, int]]]:
        """The answer, and what it uses: (unit, its first token)."""
        states = asyncio.create_task(self._states(query, now_s))
        try:
            pages = await self._pages(query, now_s)
            tails = await self._tails(query, tail_anchors(query, len(pages)), now_s)
            found = await states
        finally:
            states.cancel()
        result = LookupResult(pages=pages, tails=tails, states=found)
        listings = [*pages, *(t.blobs for t in tails), *(s.blobs for s in found)]
        used = [(UnitKey.of(b[0].key), b[0].tokens[0]) for b in listings if b]
        return result, used

    async def _pages(self, query: LookupQuery, now_s: float) -> list[list[BlobInfo]]:
        pages: list[list[BlobInfo]] = []
        previous, at = query.root, 0
        for number in range(len(query.page_keys)):
            wave = query.page_keys[at : at + _WAVES[min(number, len(_WAVES) - 1)]]
            if not wave:
                break
            at += len(wave)
            for page_key, parts in zip(wave, await self._wave(wave), strict=True):
                listing = _listing(query, parts, previous, now_s)
                if listing is None:
                    return pages
                pages.append(listing)
                previous = page_key
        return pages

    async def _wave(self, keys: Sequence[bytes]) -> list[list[Part] | None]:
        units = [UnitKey("page", key) for key in keys]
        found = [self._units.known(unit) for unit in units]
        missing = [i for i, parts in enumerate(found) if parts is None]
        asked = await asyncio.gather(
            *(self._units.marked(units[i], page_marker(keys[i])) for i in missing)
        )
        for i, parts in zip(missing, asked, strict=True):
            found[i] = parts
        return found

    async def _listed(self, kind: str, anchor: bytes) -> list[_Anchored]:
        """What hangs on an anchor, the longest first."""
        entries = await self._bucket.names(anchored(kind, anchor), _MOST_ANCHORED)
        return [hanging for entry in entries if (hanging := _parsed(entry)) is not None]

    async def _whole(
        self, query: LookupQuery, found: Sequence[_Anchored], anchor: bytes, now_s: float
    ) -> list[tuple[_Anchored, list[BlobInfo]]]:
        asked = await asyncio.gather(*(self._units.marked(f.unit, f.path) for f in found))
        listings = [_listing(query, parts, anchor, now_s) for parts in asked]
        return [(f, blobs) for f, blobs in zip(found, listings, strict=True) if blobs is not None]

    async def _tails(
        self, query: LookupQuery, anchors: Sequence[bytes], now_s: float
    ) -> list[TailFound]:
        async def of(anchor: bytes) -> list[tuple[_Anchored, list[BlobInfo]]]:
            found = await self._listed("tail", anchor)
            found.sort(key=lambda f: (f.start, f.stored_unix_s), reverse=True)
            return await self._whole(query, found[:MAX_TAILS], anchor, now_s)

        found = [pair for part in await asyncio.gather(*map(of, anchors)) for pair in part]
        found.sort(key=lambda pair: (pair[0].start, pair[0].stored_unix_s), reverse=True)
        return [
            TailFound(tail_key=f.unit.page_key, tokens=f.end - f.start, blobs=blobs)
            for f, blobs in found[:MAX_TAILS]
        ]

    async def _states(self, query: LookupQuery, now_s: float) -> list[StateFound]:
        """From the end of the chain backwards, until there are enough."""
        if query.states == (0, 0):
            return []
        wanted = of_states(query)
        anchors = [query.root, *query.page_keys]
        hanging: list[tuple[_Anchored, int]] = []
        for end in range(len(anchors), 0, -_STATE_WAVE):
            wave = range(max(0, end - _STATE_WAVE), end)
            parts = await asyncio.gather(*(self._listed("state", anchors[i]) for i in wave))
            hanging += [
                (found, pages)
                for pages, part in zip(wave, parts, strict=True)
                for found in part
                if not query.tokens or found.end <= query.tokens
            ]
            if len(hanging) >= MAX_STATES:
                break
        chosen = _nearest(hanging)
        asked = await asyncio.gather(*(self._units.marked(f.unit, f.path) for f, _ in chosen))
        states: list[StateFound] = []
        for (f, pages), parts_of in zip(chosen, asked, strict=True):
            blobs = _listing(wanted, parts_of, anchors[pages], now_s)
            if blobs:
                tokens = f.end - f.start
                states.append(
                    StateFound(key=f.unit.page_key, pages=pages, tokens=tokens, blobs=blobs)
                )
        return sorted(states, key=lambda state: state.blobs[0].tokens[1], reverse=True)


def _nearest(hanging: Sequence[tuple[_Anchored, int]]) -> list[tuple[_Anchored, int]]:
    """Of one conversation the longest are wanted; of many that hang on one anchor the newest
    are likelier to be the caller's: both kinds."""
    longest = sorted(hanging, key=lambda h: (h[0].start, h[0].end), reverse=True)
    newest = sorted(hanging, key=lambda h: (h[0].start, h[0].stored_unix_s), reverse=True)
    return list(dict.fromkeys([*longest[:MAX_STATES], *newest[:MAX_STATES]]))


def _parsed(entry: Listed) -> _Anchored | None:
    try:
        unit, start, end = parse_marker_path(entry.path)
    except InvalidKeyError:
        return None
    return _Anchored(unit, entry.path, start, end, entry.modified_unix_s)


def _listing(
    query: LookupQuery, parts: Sequence[Part] | None, previous: bytes, now_s: float
) -> list[BlobInfo] | None:
    """None where the unit is not complete for this caller, or hangs elsewhere."""
    if not parts or parts[0].info.previous_key != previous:
        return None
    live = [part.info for part in parts if part.live(now_s)]
    return listed(query, live, len(live) == len(parts))
