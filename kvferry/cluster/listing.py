"""What a lookup lists of the blobs that are there, whatever index they were found in."""

from collections.abc import Sequence
from dataclasses import replace

from kvferry.cluster.coverage import Range, covers
from kvferry.cluster.repository import BlobInfo, LookupQuery

MAX_TAILS = 64
TAIL_ANCHORS = 2
MAX_STATES = 64
EXACT_STATES = "zstd"


class Listed(list[BlobInfo]):
    """Blobs of a page that are listed again and again; never changed.

    Attributes:
        wire: the page as it stands in an answer, once it was put into one.
    """

    wire: bytes = b""


def _overlap(a: Range, b: Range) -> bool:
    return b == (0, 0) or (a[0] < b[1] and b[0] < a[1])


def listed(query: LookupQuery, live: Sequence[BlobInfo], whole: bool) -> list[BlobInfo] | None:
    """The blobs to list of one page, tail or state; None where this caller lacks a part.

    Args:
        live: those that are there and have not expired; of one model, one place in a chain.
        whole: they are known to cover all layers and heads.
    """
    accepted = live
    if query.codecs:
        accepted = [info for info in live if info.codec.name in query.codecs]
    if not whole or len(accepted) < len(live):
        parts = [(info.layers, info.heads) for info in accepted]
        if not parts or not covers(parts, live[0].model_layers, live[0].model_heads):
            return None
    return [
        info
        for info in accepted
        if _overlap(info.layers, query.layers) and _overlap(info.heads, query.heads)
    ]


def of_states(query: LookupQuery) -> LookupQuery:
    """What ``query`` asks of states: recurrent ones are exact whatever else is accepted."""
    codecs = query.codecs | {EXACT_STATES} if query.codecs else query.codecs
    return replace(query, layers=query.states, heads=(0, 0), codecs=codecs)


def tail_anchors(query: LookupQuery, pages: int) -> Sequence[bytes]:
    """Where tails may be anchored that reach beyond ``pages`` complete pages: the last of
    them may be another conversation's, and lie within a tail of this one."""
    return [query.root, *query.page_keys][: pages + 1][-TAIL_ANCHORS:]
