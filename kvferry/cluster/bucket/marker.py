"""Markers: small objects that say which blobs together are a whole page, tail or state.

Bytes: a digest of the message, then `UnitMarker`. A damaged one counts as none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blake3 import blake3
from google.protobuf.message import DecodeError

from kvferry.cluster.bucket.layout import UnitKey, blob_path
from kvferry.cluster.convert import info_from_proto, info_to_proto
from kvferry.cluster.coverage import covers
from kvferry.cluster.index_units import Identity, identity_of
from kvferry.cluster.repository import BlobInfo
from kvferry.errors import InvalidKeyError
from kvferry.proto.keys import DIGEST_BYTES, BlobKey
from kvferry.proto.v1 import bucket_pb2

_MAGIC = b"KVFMARK\x01"


@dataclass(frozen=True, slots=True)
class Part:
    """A blob of a unit. ``ends``: unix seconds; 0: never."""

    info: BlobInfo
    ends: int = 0

    @property
    def path(self) -> str:
        """Where it lies."""
        return blob_path(self.info.key, self.ends)

    def live(self, now_s: float) -> bool:
        """Whether its time is not over."""
        return not 0 < self.ends <= now_s


def longer(a: int, b: int) -> bool:
    """Whether a life that ends at ``a`` is longer than one that ends at ``b``; 0: never."""
    return b != 0 and (a == 0 or a > b)


def pack_marker(parts: Sequence[Part]) -> bytes:
    """Bytes of a marker."""
    message = bucket_pb2.UnitMarker(
        blobs=[info_to_proto(part.info) for part in parts],
        ends_unix_s=[part.ends for part in parts],
    ).SerializeToString(deterministic=True)
    return _MAGIC + blake3(message).digest() + message


def parse_marker(data: bytes, unit: UnitKey) -> list[Part] | None:
    """What a marker says of ``unit``; None where it is damaged or of another one."""
    at = len(_MAGIC) + DIGEST_BYTES
    message = data[at:]
    if data[: len(_MAGIC)] != _MAGIC or blake3(message).digest() != data[len(_MAGIC) : at]:
        return None
    try:
        marker = bucket_pb2.UnitMarker.FromString(message)
        infos = [info_from_proto(entry) for entry in marker.blobs]
    except (DecodeError, InvalidKeyError):
        return None
    if len(infos) != len(marker.ends_unix_s) or not infos:
        return None
    if any(UnitKey.of(info.key) != unit for info in infos):
        return None
    return [Part(info, ends) for info, ends in zip(infos, marker.ends_unix_s, strict=True)]


def is_whole(parts: Iterable[Part]) -> bool:
    """Whether blobs of one unit cover all layers and heads of their model."""
    infos = [part.info for part in parts]
    if not infos:
        return False
    ranges = [(info.layers, info.heads) for info in infos]
    return covers(ranges, infos[0].model_layers, infos[0].model_heads)


def whole_of(parts: Sequence[Part]) -> list[Part]:
    """The blobs that make a unit complete; none where it is not.

    Two servers may have taken blobs of one page that disagree about model or place, each
    before it saw the other's: those that agree are judged among themselves.
    """
    lasting: dict[BlobKey, Part] = {}
    for part in parts:  # a life that was prolonged leaves two of a blob for a moment
        other = lasting.get(part.info.key)
        if other is None or longer(part.ends, other.ends):
            lasting[part.info.key] = part
    groups: dict[Identity, list[Part]] = {}
    for part in sorted(lasting.values(), key=lambda p: (p.info.layers, p.info.heads, p.info.key)):
        groups.setdefault(identity_of(part.info), []).append(part)
    return next((groups[name] for name in sorted(groups) if is_whole(groups[name])), [])
