"""Pages to stored blobs and back: the codec's sections in the container's frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvferry import __version__
from kvferry.codec.base import (
    CalibrationSource,
    Codec,
    CodedPage,
    PageTensors,
    RunCodec,
    Wanted,
    drops_tokens,
)
from kvferry.codec.blob_streams import read_streams, stored_shape
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.registry import reader
from kvferry.errors import (
    CalibrationCorruptError,
    CodecError,
    CorruptBlobError,
    IdentityMismatchError,
    UnsupportedTensorError,
)
from kvferry.proto import container
from kvferry.proto.container import DEFAULT_LIMITS, Limits
from kvferry.proto.keys import BlobKey, canonical_json, codec_id, kind_number
from kvferry.proto.v1 import blob_pb2

TokenRange = tuple[int, int]
LayerRange = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobMeta:
    """What a blob says about its place in the model and in the sequence.

    Attributes:
        kind: "page", "tail" or "state".
        page_key: key of the page, or of the tail or state.
        previous_key: key of the page before, or the root.
        model_layers, model_heads: of the whole model: completeness is judged by them.
        namespace_tag: see `kvferry.proto.keys.namespace_tag`; 0: not told.
    """

    kind: str
    model_id: bytes
    page_key: bytes
    previous_key: bytes
    model_layers: int
    model_heads: int
    namespace_tag: int = 0


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
    name = codec_id(codec.name, codec.version, codec.params, codec.calibration_id)
    return BlobKey(meta.kind, meta.page_key, layers, heads, name)


def encode_blob(codec: Codec, page: PageTensors, meta: BlobMeta) -> tuple[BlobKey, bytes]:
    """Encode and frame. Raises: UnsupportedTensorError, InvalidKeyError."""
    key = blob_key(codec, meta, page.layers, page.heads)
    if page.kept is not None and not drops_tokens(codec):
        raise UnsupportedTensorError("*", f"{codec.name} stores no pages that lack tokens")
    encoded = codec.encode(page)
    header = blob_pb2.BlobHeader(
        kind=kind_number(meta.kind),
        model_id=meta.model_id,
        page_key=meta.page_key,
        previous_key=meta.previous_key,
        token_start=page.tokens[0],
        token_end=page.tokens[1],
        layer_start=page.layers[0],
        layer_end=page.layers[1],
        head_start=page.heads[0],
        head_end=page.heads[1],
        model_layers=meta.model_layers,
        model_heads=meta.model_heads,
        codec=blob_pb2.CodecSpec(
            name=codec.name,
            version=codec.version,
            params_json=canonical_json(dict(codec.params)).decode(),
            calibration_id=codec.calibration_id,
        ),
        rope_fingerprint=encoded.rope_fingerprint,
        streams=[
            blob_pb2.StreamInfo(
                name=name, shape=stored_shape(stream, encoded.entries), dtype=stream.dtype.value
            )
            for name, stream in sorted(page.streams.items())
        ],
        producer=f"kvferry {__version__}",
        namespace_tag=meta.namespace_tag,
    )
    return key, container.pack(header, encoded.sections)


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
    checked = _check(StoredBlob(data, key, tokens), model_id, cut, calibrations, rope, limits)
    return checked.codec.decode(checked.page.wanted, checked.page.sections, calibrations)


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
    Blobs of equal layers, heads and codec are decoded together; pages may be views of
    one array.
    """
    results: list[PageTensors | CodecError] = []
    groups: dict[object, list[tuple[int, _Checked]]] = {}
    for index, blob in enumerate(blobs):
        try:
            checked = _check(blob, model_id, cut, calibrations, rope, limits)
        except CodecError as exc:
            results.append(exc)
            continue
        groups.setdefault(checked.batch, []).append((index, checked))
        results.append(CorruptBlobError("blob", "was not decoded"))
    for members in groups.values():
        decoded = _decode_together([checked for _, checked in members], calibrations)
        for (index, _), result in zip(members, decoded, strict=True):
            results[index] = result
    return results


@dataclass(frozen=True, slots=True, eq=False)
class _Checked:
    """A blob that is what was asked for; only its codec's own bytes are unread."""

    codec: Codec
    page: CodedPage
    batch: object


def _decode_together(
    members: Sequence[_Checked], calibrations: CalibrationSource
) -> Sequence[PageTensors | CodecError]:
    codec = members[0].codec
    if len(members) > 1 and isinstance(codec, RunCodec):
        try:
            return codec.decode_run([member.page for member in members], calibrations)
        except CodecError:
            pass  # one by one, to learn which
    results: list[PageTensors | CodecError] = []
    for member in members:
        try:
            page = member.page
            results.append(member.codec.decode(page.wanted, page.sections, calibrations))
        except CodecError as exc:
            results.append(exc)
    return results


def _check(
    blob: StoredBlob,
    model_id: bytes,
    cut: LayerRange | None,
    calibrations: CalibrationSource,
    rope: Mapping[int, bytes] | None,
    limits: Limits,
) -> _Checked:
    parsed = container.parse(blob.data, limits)
    header = parsed.header
    _check_identity(header, blob, model_id)
    codec = reader(header.codec.name, header.codec.version)
    wanted = _wanted(header, blob, cut, limits, fewer=drops_tokens(codec))
    if wanted.calibration_id:
        _check_calibration(wanted, model_id, calibrations, rope)
    shapes = tuple(
        (name, shape[:2] + shape[3:], wanted.dtypes[name]) for name, shape in wanted.shapes.items()
    )
    batch = (blob.key.codec_id, wanted.layers, wanted.heads, shapes)
    return _Checked(codec, CodedPage(wanted, parsed.sections), batch)


def _check_identity(header: blob_pb2.BlobHeader, blob: StoredBlob, model_id: bytes) -> None:
    found = container.key_of(header)
    if found != blob.key:
        raise IdentityMismatchError("key", str(found), str(blob.key))
    if blob.key.kind == "calibration":
        raise IdentityMismatchError("kind", "calibration", "page, tail or state")
    if header.model_id != model_id:
        raise IdentityMismatchError("model", header.model_id.hex()[:16], model_id.hex()[:16])
    tokens = (header.token_start, header.token_end)
    if tokens != tuple(blob.tokens):
        raise IdentityMismatchError("tokens", str(tokens), str(tuple(blob.tokens)))


def _wanted(
    header: blob_pb2.BlobHeader,
    blob: StoredBlob,
    cut: LayerRange | None,
    limits: Limits,
    *,
    fewer: bool,
) -> Wanted:
    layers, heads = blob.key.layers, blob.key.heads
    cut = layers if cut is None else cut
    if not layers[0] <= cut[0] < cut[1] <= layers[1]:
        raise IdentityMismatchError("layers", f"{layers[0]}-{layers[1]}", f"{cut[0]}-{cut[1]}")
    shapes, dtypes = read_streams(header, limits, fewer=fewer)
    return Wanted(
        layers=layers,
        heads=heads,
        tokens=blob.tokens,
        shapes=shapes,
        dtypes=dtypes,
        cut=cut,
        params=container.codec_params(header),
        calibration_id=header.codec.calibration_id,
        rope_fingerprint=header.rope_fingerprint,
    )


def _check_calibration(
    wanted: Wanted,
    model_id: bytes,
    calibrations: CalibrationSource,
    rope: Mapping[int, bytes] | None,
) -> None:
    known = calibrations.get(wanted.calibration_id)
    if known.id != wanted.calibration_id:
        raise CalibrationCorruptError(wanted.calibration_id.hex()[:16], "the source gave another")
    if not isinstance(known, GroupCalibration):
        return
    if known.model_id != model_id:
        found = known.model_id.hex()[:16]
        raise IdentityMismatchError("model (calibration)", found, model_id.hex()[:16])
    for layer, fingerprints in known.layer_ropes.items():
        live = (rope or {}).get(layer)
        if live is not None and fingerprints - {live}:
            found = min(fingerprints - {live}).hex()[:16]
            raise IdentityMismatchError(f"rope of layer {layer}", found, live.hex()[:16])
