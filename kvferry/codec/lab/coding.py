"""A context through a codec and back, as the hook would do it, with every byte counted."""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.base import CalibrationSource, Codec, PageTensors, takes_whole_context
from kvferry.codec.blob import BlobMeta, StoredBlob, decode_blobs, encode_blob
from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.join import join_layers
from kvferry.codec.mlx.adapters import CacheSnapshot
from kvferry.codec.registry import make_codec
from kvferry.errors import CalibrationMissingError, CodecError
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, root_key, tail_key

__all__ = [
    "Coded",
    "Coder",
    "GroupSource",
    "LayerRange",
    "decode_pages",
    "encode_page",
    "group_codecs",
    "join_layers",
    "page_meta",
]

LayerRange = tuple[int, int]
_SALT = bytes(16)


class GroupSource:
    """A `CalibrationSource` of calibrations at hand."""

    def __init__(self, groups: Sequence[GroupCalibration] = ()) -> None:
        self._groups = {group.id: group for group in groups}

    def get(self, calibration_id: bytes) -> GroupCalibration:
        """Raises: CalibrationMissingError."""
        if calibration_id not in self._groups:
            raise CalibrationMissingError(calibration_id.hex())
        return self._groups[calibration_id]


def page_meta(model_id: bytes, index: int, layers: int, heads: int, kind: str = "page") -> BlobMeta:
    """Of the ``index``-th page of a text that nobody will look for.

    Args:
        layers, heads: of the model.
        kind: "page" or "tail".
    """
    root = root_key(_SALT, model_id)
    return BlobMeta(
        kind=kind,
        model_id=model_id,
        page_key=tail_key(root, [index]),
        previous_key=root,
        model_layers=layers,
        model_heads=heads,
    )


def encode_page(codec: Codec, page: PageTensors, meta: BlobMeta) -> StoredBlob:
    """As the hook would. Raises: CodecError."""
    key, data = encode_blob(codec, page, meta)
    return StoredBlob(data, key, page.tokens)


def decode_pages(
    blobs: Sequence[StoredBlob], model_id: bytes, calibrations: CalibrationSource
) -> list[PageTensors]:
    """Blobs of one layer range, all of its layers. Raises: CodecError."""
    pages = []
    for page in decode_blobs(blobs, model_id=model_id, cut=None, calibrations=calibrations):
        if isinstance(page, CodecError):
            raise page
        pages.append(page)
    return pages


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """What came back, and what it cost.

    Attributes:
        pages: all layers, one entry per run of tokens, in order.
        values: numbers that were coded.
        blob_bytes: everything that would be shipped for them.
    """

    pages: Sequence[PageTensors]
    values: int
    blob_bytes: int
    encode_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Coder:
    """A codec per layer range of one model.

    Attributes:
        codecs: layer range -> codec, covering all layers.
        kind: "page" or "tail".
    """

    model_id: bytes
    codecs: Mapping[LayerRange, Codec]
    calibrations: CalibrationSource
    model_heads: int
    kind: str = "page"

    def run(
        self, snapshot: CacheSnapshot, tokens: tuple[int, int], page: int = DEFAULT_PAGE_TOKENS
    ) -> Coded:
        """Encode ``tokens`` of a snapshot page by page, then decode them.

        Codecs that choose among all tokens are given all of them as one page.

        Raises: CodecError.
        """
        if any(takes_whole_context(codec) for codec in self.codecs.values()):
            page = tokens[1] - tokens[0]
        edges = [*range(tokens[0], tokens[1], page), tokens[1]]
        spans = list(itertools.pairwise(edges))
        stored: dict[LayerRange, list[StoredBlob]] = {}
        values = encoding = 0.0
        model_layers = max(end for _, end in self.codecs)
        for layers, codec in self.codecs.items():
            told = snapshot.told(codec, layers)
            for index, span in enumerate(spans):
                tensors = snapshot.page(layers, span)
                values += tensors.raw_bytes_fp16 / 2
                meta = page_meta(self.model_id, index, model_layers, self.model_heads, self.kind)
                started = time.perf_counter()
                stored.setdefault(layers, []).append(encode_page(told, tensors, meta))
                encoding += time.perf_counter() - started
        started = time.perf_counter()
        decoded = {
            layers: decode_pages(blobs, self.model_id, self.calibrations)
            for layers, blobs in stored.items()
        }
        decoding = time.perf_counter() - started
        size = sum(len(blob.data) for blobs in stored.values() for blob in blobs)
        pages = [join_layers([parts[i] for parts in decoded.values()]) for i in range(len(spans))]
        return Coded(pages, int(values), size, encoding, decoding)


def group_codecs(
    name: str,
    options: Mapping[str, object],
    ranges: Sequence[LayerRange],
    groups: Sequence[GroupCalibration] = (),
    curve: Sequence[CurvePoint] = (),
) -> dict[LayerRange, Codec]:
    """The same codec for every range; with ``groups`` each has its own calibration.

    Raises: ConfigError; CalibrationMissingError.
    """
    known = {group.layers: group for group in groups}
    return {layers: make_codec(name, options, known.get(layers), curve) for layers in ranges}
