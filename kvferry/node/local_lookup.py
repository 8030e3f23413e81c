"""A lookup without the store: what this node and its peers hold of the layers asked for.

Whether *all* layers of a page exist cannot be told here; the group's agreement decides,
because every rank looks for its own layers and all act on the minimum.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace

from kvferry.cluster.coverage import covers
from kvferry.cluster.listing import MAX_STATES, of_states, tail_anchors
from kvferry.cluster.repository import (
    BlobInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
    StateFound,
    TailFound,
)
from kvferry.node.tiers import Tiers


def covers_wanted(blobs: Iterable[BlobInfo], query: LookupQuery) -> bool:
    """Whether blobs cover the layers and heads that a query asks for."""
    infos = list(blobs)
    if not infos:
        return False
    layers = query.layers if query.layers[1] else (0, infos[0].model_layers)
    heads = query.heads if query.heads[1] else (0, infos[0].model_heads)
    parts = [(_shift(i.layers, layers), _shift(i.heads, heads)) for i in infos]
    whole = [(a, b) for a, b in parts if a[0] < a[1] and b[0] < b[1]]
    return covers(whole, layers[1] - layers[0], heads[1] - heads[0])


def _shift(held: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The overlap, counted from the start of what is wanted."""
    start, end = max(held[0], wanted[0]), min(held[1], wanted[1])
    return start - wanted[0], end - wanted[0]


async def look_up_locally(tiers: Tiers, query: LookupQuery) -> LookupResult:
    """Pages of which anything asked for is here, without judging whether it is enough."""
    pages: list[Sequence[BlobInfo]] = []
    for page_key in query.page_keys:
        found = _accepted(await tiers.of_page(page_key), query)
        if not found:
            break
        pages.append(found)
    anchors = _anchors(query)
    tails = [
        TailFound(tail_key=key, tokens=_length(blobs), blobs=blobs)
        for key, blobs in (await _anchored(tiers, "tail", anchors, query)).items()
    ]
    states = _nearest(
        (await _anchored(tiers, "state", anchors, of_states(query))).items()
        if query.states != (0, 0)
        else (),
        query,
    )
    return LookupResult(pages=pages, tails=tails, states=states, partial=True)


def _anchors(query: LookupQuery) -> dict[bytes, int]:
    """Key -> pages up to it."""
    return {key: index for index, key in enumerate([query.root, *query.page_keys])}


async def _anchored(
    tiers: Tiers, kind: str, anchors: Container[bytes], query: LookupQuery
) -> dict[bytes, list[BlobInfo]]:
    found: defaultdict[bytes, list[BlobInfo]] = defaultdict(list)
    for info in await tiers.list(ListQuery(kind=kind)):
        if info.previous_key in anchors and _accepted([info], query):
            found[info.key.page_key].append(info)
    return found


def _length(blobs: Sequence[BlobInfo]) -> int:
    return blobs[0].tokens[1] - blobs[0].tokens[0]


def merge_local(results: Sequence[LookupResult], query: LookupQuery) -> LookupResult:
    """One answer from those of this node and its peers: pages covered for the caller."""
    pages: list[Sequence[BlobInfo]] = []
    for index in range(max((r.complete_pages for r in results), default=0)):
        together = {
            info.key: info for r in results if index < len(r.pages) for info in r.pages[index]
        }
        if not covers_wanted(together.values(), query):
            break
        pages.append(list(together.values()))
    ends = tail_anchors(query, len(pages))
    by_tail = _together(
        (tail.tail_key, info)
        for result in results
        for tail in result.tails
        for info in tail.blobs
        if info.previous_key in ends
    )
    tails = [
        TailFound(tail_key=key, tokens=_length(blobs), blobs=blobs)
        for key, blobs in by_tail.items()
        if covers_wanted(blobs, query)
    ]
    by_state = _together(
        (state.key, info) for result in results for state in result.states for info in state.blobs
    )
    wanted = of_states(query)
    states = _nearest(
        ((key, blobs) for key, blobs in by_state.items() if covers_wanted(blobs, wanted)), query
    )
    return LookupResult(pages=pages, tails=tails, states=states, partial=True)


def _nearest(
    found: Iterable[tuple[bytes, Sequence[BlobInfo]]], query: LookupQuery
) -> list[StateFound]:
    """States of use to the caller, those nearest to the end of its tokens first."""
    anchors = _anchors(query)
    states = [
        StateFound(
            key=key, pages=anchors[blobs[0].previous_key], tokens=_length(blobs), blobs=blobs
        )
        for key, blobs in found
        if blobs[0].previous_key in anchors and not 0 < query.tokens < blobs[0].tokens[1]
    ]
    states.sort(key=lambda state: state.blobs[0].tokens[1], reverse=True)
    return states[: 2 * MAX_STATES]


def with_states_of(found: LookupResult, other: LookupResult) -> LookupResult:
    """``found``, and the states that only another lookup of the same chain has found."""
    known = {state.key for state in found.states}
    more = [state for state in other.states if state.key not in known]
    return replace(found, states=[*found.states, *more]) if more else found


def _together(blobs: Iterable[tuple[bytes, BlobInfo]]) -> dict[bytes, list[BlobInfo]]:
    """By unit, each blob once."""
    found: defaultdict[bytes, dict[str, BlobInfo]] = defaultdict(dict)
    for unit, info in blobs:
        found[unit][str(info.key)] = info
    return {unit: list(infos.values()) for unit, infos in found.items()}


def _accepted(blobs: Iterable[BlobInfo], query: LookupQuery) -> list[BlobInfo]:
    return [b for b in blobs if not query.codecs or b.key.codec_name in query.codecs]
