"""A lookup without the store: what this node and its peers hold of the layers asked for.

Whether *all* layers of a page exist cannot be told here; the group's agreement decides,
because every rank looks for its own layers and all act on the minimum.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from kvferry.cluster.coverage import covers
from kvferry.cluster.repository import (
    BlobInfo,
    ListQuery,
    LookupQuery,
    LookupResult,
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
    anchors = {query.root, *query.page_keys}
    by_tail: defaultdict[bytes, list[BlobInfo]] = defaultdict(list)
    for info in await tiers.list(ListQuery(kind="tail")):
        if info.previous_key in anchors and _accepted([info], query):
            by_tail[info.key.page_key].append(info)
    tails = [
        TailFound(tail_key=key, tokens=blobs[0].tokens[1] - blobs[0].tokens[0], blobs=blobs)
        for key, blobs in by_tail.items()
    ]
    return LookupResult(pages=pages, tails=tails, partial=True)


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
    anchor = query.page_keys[len(pages) - 1] if pages else query.root
    by_tail: defaultdict[bytes, dict[str, BlobInfo]] = defaultdict(dict)
    for result in results:
        for tail in result.tails:
            for info in tail.blobs:
                if info.previous_key == anchor:
                    by_tail[tail.tail_key][str(info.key)] = info
    tails = [
        TailFound(
            tail_key=key,
            tokens=(first := next(iter(blobs.values()))).tokens[1] - first.tokens[0],
            blobs=list(blobs.values()),
        )
        for key, blobs in by_tail.items()
        if covers_wanted(blobs.values(), query)
    ]
    return LookupResult(pages=pages, tails=tails, partial=True)


def _accepted(blobs: Iterable[BlobInfo], query: LookupQuery) -> list[BlobInfo]:
    return [b for b in blobs if not query.codecs or b.key.codec_name in query.codecs]
