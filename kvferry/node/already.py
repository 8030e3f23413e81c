"""Pages that need not be stored again: the store has them, coded no more coarsely.

A change of policy changes codec ids, and with them the keys of blobs. What was stored under
an earlier policy is as good to a reader as long as the policy accepts its codec, so that it
is left as it is, unless

- it is coarser than wanted, or by another calibration, whose steps cannot be compared;
- it is many times larger than what the policy asks for, as 8 bits and exact are beside
  ``ferry``: over a slow link its restore would not pay, the prompt would be prefilled and
  offered anew each time, and nothing would ever take its place.

Then it is stored anew beside what is there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from kvferry.cluster.repository import BlobInfo, CodecInfo, LookupQuery, LookupResult
from kvferry.codec.base import Codec
from kvferry.codec.registry import restorable
from kvferry.errors import FerryError
from kvferry.node.coding import CodedRange, Shard
from kvferry.node.restore import choose_pieces

EXACT = ("raw", "zstd")
BY_BITS = ("affine", "bitpack")
MOST_FINER = 8.0  # times the step: no more than three bits a value


class LookupClient(Protocol):
    """What is asked of the node daemon."""

    def lookup(self, query: LookupQuery) -> LookupResult:
        """Raises: FerryError."""


def complete_pages(
    client: LookupClient, root: bytes, keys: Sequence[bytes], shard: Shard, accept: frozenset[str]
) -> Sequence[Sequence[BlobInfo]]:
    """Blobs of this shard of the pages that are complete; none where the store is silent."""
    query = LookupQuery(
        root=root, page_keys=keys, codecs=accept, layers=shard.layers, heads=shard.heads
    )
    try:
        found = client.lookup(query)
    except FerryError:
        return []
    # What this node and its peers hold themselves may lack other ranks' layers.
    return [] if found.partial else found.pages


def is_stored(blobs: Iterable[BlobInfo], coded: CodedRange, shard: Shard) -> bool:
    """Whether blobs of a page hold a range as finely as it would be coded now."""
    usable = [blob for blob in blobs if stands_in(blob.codec, coded.codec)]
    return choose_pieces(usable, coded.layers, shard.heads) is not None


def stands_in(stored: CodecInfo, codec: Codec) -> bool:
    """Whether what was stored does instead of what ``codec`` would store."""
    found, wanted = _params(stored.params_json), codec.params
    if not restorable(codec.name):
        return (stored.name, stored.version, found) == (codec.name, codec.version, dict(wanted))
    if stored.name in EXACT:
        return codec.name in EXACT or (codec.name == "affine" and _number(wanted, "bits") >= 8)
    if stored.name in BY_BITS:
        return codec.name == stored.name and _number(found, "bits") >= _number(wanted, "bits")
    if (stored.name, codec.name) != ("ferry", "ferry") or stored.version != codec.version:
        return False
    same = stored.calibration_id == codec.calibration_id
    same = same and found.get("adapt") == wanted.get("adapt")
    step, most = _number(found, "step"), _number(wanted, "step")
    return same and most / MOST_FINER <= step <= most


def _params(text: str) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(params: Mapping[str, object], name: str) -> float:
    value = params.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
