"""Which of the blobs that a lookup found need no link: this node holds them itself."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from kvferry.cluster.repository import BlobInfo, LookupResult
from kvferry.node.tiers import Tiers
from kvferry.proto.keys import BlobKey


async def mark_near(tiers: Tiers, found: LookupResult) -> LookupResult:
    """The same answer, with `BlobInfo.near` of what is in ``tiers``."""
    groups = [
        *found.pages,
        *(tail.blobs for tail in found.tails),
        *(state.blobs for state in found.states),
    ]
    keys = [info.key for blobs in groups for info in blobs]
    held = await tiers.has(keys) if keys else []
    near = {key for key, here in zip(keys, held, strict=True) if here}
    if not near:
        return found
    return replace(
        found,
        pages=[_marked(blobs, near) for blobs in found.pages],
        tails=[replace(tail, blobs=_marked(tail.blobs, near)) for tail in found.tails],
        states=[replace(state, blobs=_marked(state.blobs, near)) for state in found.states],
    )


def _marked(blobs: Sequence[BlobInfo], near: Collection[BlobKey]) -> list[BlobInfo]:
    return [replace(info, near=True) if info.key in near else info for info in blobs]
