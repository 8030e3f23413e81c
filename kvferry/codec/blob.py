"""Pages to stored blobs and back: the codec's sections in the container's frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry.codec.base import CalibrationSource, Codec, PageTensors
from kvferry.errors import CodecError
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import BlobKey

TokenRange = tuple[int, int]
LayerRange = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobMeta:
    """What a blob says about its place in the model and in the sequence.

    Attributes:
        kind: "page" or "tail".
        page_key: key of the page, or of the tail.
        previous_key: key of the page before, or the root.
        model_layers, model_heads: of the whole model: completeness is judged by them.
    """

    kind: str
    model_id: bytes
    page_key: bytes
    previous_key: bytes
    model_layers: int
    model_heads: int


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob to be decoded: its bytes, the key asked for, and the tokens it must cover."""

    data: bytes | memoryview
    key: BlobKey
    tokens: TokenRange


def blob_key(
    codec: Codec, meta: BlobMeta, layers: tuple[int, int], heads: tuple[int, int]
) -> BlobKey:
    """The key that `encode_blob` will give, before anything is encoded."""
    raise NotImplementedError


def encode_blob(codec: Codec, page: PageTensors, meta: BlobMeta) -> tuple[BlobKey, bytes]:
    """Encode and frame. Raises: UnsupportedTensorError, InvalidKeyError."""
    raise NotImplementedError


def decode_blob(
    data: bytes | memoryview,
    *,
    key: BlobKey,
    model_id: bytes,
    tokens: TokenRange,
    cut: LayerRange | None,
    calibrations: CalibrationSource,
    rope: Mapping[int, bytes] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> PageTensors:
    """Check everything, then decode.

    Args:
        key: what was asked for; the blob must be exactly that.
        tokens: absolute range that the page must cover.
        cut: layers to return, within the blob's; None: all of them.
        rope: absolute layer -> fingerprint of the running model's RoPE; layers that
            it lacks are not compared.
    Raises:
        CodecError: one of its documented kinds, whatever the bytes are.
    """
    raise NotImplementedError


def decode_blobs(
    blobs: Sequence[StoredBlob],
    *,
    model_id: bytes,
    cut: LayerRange | None,
    calibrations: CalibrationSource,
    rope: Mapping[int, bytes] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> list[PageTensors | CodecError]:
    """`decode_blob` for a run of pages, with one matmul per stream for all of them.

    Returns: one entry per blob, in order: its page, or the error that it caused.
    Blobs of equal layers, heads and codec are decoded together.
    """
    raise NotImplementedError
