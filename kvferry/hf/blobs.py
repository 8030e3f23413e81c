"""A prompt's cache as blobs, and back: keys, pages and tails as everywhere in kvferry."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DynamicCache

from kvferry.codec.base import CalibrationSource, Codec, NoCalibrations, PageTensors
from kvferry.codec.blob import (
    BlobMeta,
    StoredBlob,
    blob_key,
    decode_blobs,
    encode_blob,
)
from kvferry.codec.calibration import layer_groups
from kvferry.codec.raw import ZstdCodec
from kvferry.errors import CodecError, ModelError
from kvferry.hf.identity import TorchModel
from kvferry.hf.lacking import check_keeps, shortens
from kvferry.hf.tensors import Devices, fill, length, read, rows_of
from kvferry.proto.keys import (
    DEFAULT_PAGE_TOKENS,
    BlobKey,
    namespace_tag,
    page_keys,
    pages_behind_window,
    root_key,
    tail_key,
    token_ids,
)

Range = tuple[int, int]
Codecs = Codec | Mapping[Range, Codec]
EXACT = ZstdCodec()


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """A blob that is known by its key and not encoded yet."""

    key: BlobKey
    meta: BlobMeta
    codec: Codec
    layers: Range
    tokens: Range


def layer_codecs(codec: Codecs, model: TorchModel) -> Mapping[Range, Codec]:
    """Layer range -> codec, covering all layers in order.

    A single codec is used for kvferry's own layer groups; one with a calibration covers
    its calibration's layers and needs a mapping unless those are all.

    Raises: ModelError: layers without a codec, or with two.
    """
    if isinstance(codec, Mapping):
        found = dict(sorted(codec.items()))
    else:
        known = getattr(codec, "calibration", None)
        spans = layer_groups(model.layers, model.heads, model.head_dim)
        found = dict.fromkeys(spans if known is None else [tuple(known.layers)], codec)
    at = 0
    for start, end in found:
        if start != at or end <= start:
            break
        at = end
    if at != model.layers:
        raise ModelError(f"codecs of layers {sorted(found)} do not cover 0 to {model.layers} once")
    return found


def plan(
    cache: Any,
    tokens: Sequence[int],
    codec: Codecs,
    model: TorchModel,
    *,
    salt: bytes,
    tail: Codec | None = EXACT,
    page_tokens: int = DEFAULT_PAGE_TOKENS,
) -> list[Pending]:
    """The blobs of a cache's first tokens; arguments and errors as `offload`."""
    rows_of(cache)  # which refuses one that lacks tokens
    ids = token_ids(tokens)[: length(cache)]
    _check(cache, model)
    root = root_key(salt, model.model_id, page_tokens)
    chain = [root, *page_keys(root, ids, page_tokens)]
    codecs = layer_codecs(codec, model)
    count = pages_behind_window(len(ids), page_tokens)
    tag = namespace_tag(salt)
    made: list[Pending] = []

    def add(kind: str, codecs: Mapping[Range, Codec], key: bytes, before: bytes, at: Range) -> None:
        meta = BlobMeta(
            kind=kind,
            model_id=model.model_id,
            page_key=key,
            previous_key=before,
            model_layers=model.layers,
            model_heads=model.heads,
            namespace_tag=tag,
        )
        for layers, used in codecs.items():
            name = blob_key(used, meta, layers, (0, model.heads))
            made.append(Pending(name, meta, used, layers, at))

    start = count * page_tokens
    if shortens(codecs) and count:
        # It chooses among all tokens; and as a tail of that root it is nobody's page.
        add("tail", codecs, tail_key(root, ids[:start]), root, (0, start))
    else:
        for index in range(count):
            span = (index * page_tokens, (index + 1) * page_tokens)
            add("page", codecs, chain[index + 1], chain[index], span)
    if tail is not None:
        check_keeps(tail, "a tail")
    if tail is not None and start < len(ids):
        key = tail_key(chain[count], ids[start:])
        add("tail", {(0, model.layers): tail}, key, chain[count], (start, len(ids)))
    return made


def encode(cache: Any, pending: Pending) -> StoredBlob:
    """Encode one of `plan`'s. Raises: UnsupportedTensorError."""
    page = read(cache, pending.layers, pending.tokens)
    key, data = encode_blob(pending.codec, page, pending.meta)
    return StoredBlob(data, key, pending.tokens)


def offload(
    cache: Any,
    tokens: Sequence[int],
    codec: Codecs,
    model: TorchModel,
    *,
    salt: bytes,
    tail: Codec | None = EXACT,
    page_tokens: int = DEFAULT_PAGE_TOKENS,
) -> list[StoredBlob]:
    """A cache as blobs: whole pages behind the window, and a tail to the last token.

    Args:
        cache: a `DynamicCache` on any device, of one sequence without padding.
        tokens: ids that it holds, from position 0; what goes beyond either is left out.
        codec: of pages; or one for each range of layers. One that drops tokens
            (``streaming``, ``random``; the same for all layers, ``positions`` contiguous) is
            given all pages as one blob.
        model: from `identify`.
        salt: of the namespace, 16 to 64 bytes (`root_key`); who has another finds nothing.
        tail: codec of what is not a whole page 128 tokens behind the end, exact by default
            (8-bit ``affine`` is enough for most uses); None: left out.
        page_tokens: a setting of the whole namespace, not of a caller.
    Returns: blobs in token order; store each under its key.
    Raises: ModelError: this cache or model cannot be stored; CodecError: nor these numbers;
        ConfigError: a codec from whose blobs no `DynamicCache` can be made.
    """
    wanted = plan(cache, tokens, codec, model, salt=salt, tail=tail, page_tokens=page_tokens)
    return [encode(cache, pending) for pending in wanted]


def restore(
    blobs: Sequence[StoredBlob],
    model: TorchModel,
    *,
    calibrations: CalibrationSource | None = None,
    device: Devices = "cpu",
) -> DynamicCache:
    """`offload`'s blobs as a cache again, bit by bit where their codecs are exact.

    Where they lack tokens, what is left is put side by side, and the model goes on at
    position ``length(cache)``: run ``model(ids)`` with ids that are new, or put so many ids
    before those for ``model.generate``, which skips as many as the cache has rows. It cannot
    be stored again.

    Args:
        blobs: of all layers, of tokens 0 to some end without gaps.
        calibrations: where blobs' calibrations are found, if they have any.
        device: see `kvferry.hf.fill`.
    Raises: CodecError: damaged blobs, or another model's; ModelError: they do not fit;
        ConfigError: layers without a device.
    """
    return filled(list(decoded(blobs, model, calibrations)), model, device)


def decoded(
    blobs: Sequence[StoredBlob], model: TorchModel, calibrations: CalibrationSource | None
) -> Iterator[PageTensors]:
    """Pages of blobs, in their order, all verified. Raises: CodecError, the first one."""
    rope = {layer: spec.fingerprint() for layer, spec in enumerate(model.ropes)}
    for page in decode_blobs(
        blobs,
        model_id=model.model_id,
        cut=None,
        calibrations=calibrations or NoCalibrations(),
        rope=rope,
    ):
        if isinstance(page, CodecError):
            raise page
        yield page


def filled(pages: Sequence[PageTensors], model: TorchModel, device: Devices) -> DynamicCache:
    """A cache of pages of all of a model's layers. Raises: ModelError."""
    held = {layer for page in pages for layer in range(*page.layers)}
    if held != set(range(model.layers)):
        missing = sorted(set(range(model.layers)) ^ held)
        raise ModelError(f"blobs of layers {missing[:8]} are missing or too many")
    cache = fill(pages, device, model.ropes)
    _check(cache, model)
    return cache


def _check(cache: Any, model: TorchModel) -> None:
    """Raises: ModelError: not all layers, other heads or another dtype than the model's."""
    whole = read(cache, tokens=(0, 1), lacking=True)
    if whole.layers != (0, model.layers) or whole.heads != (0, model.heads):
        raise ModelError(
            f"the cache has layers {whole.layers} and {whole.heads[1]} heads, the model "
            f"{model.layers} layers and {model.heads} KV heads"
        )
    found = {stream.dtype for stream in whole.streams.values()}
    if found != {model.dtype}:
        raise ModelError(
            f"the cache is in {', '.join(sorted(found))} and the model in {model.dtype}: what was "
            "computed otherwise (autocast) is another model's"
        )
