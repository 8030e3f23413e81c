"""What can be said about the bytes of a blob, whole or damaged. Decodes no tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError

from kvferry.cli.blob_sizes import (
    SHAPE_DIMS,
    LayerSize,
    StreamSize,
    layer_sizes,
    stream_sizes,
)
from kvferry.codec.kept_sections import TOKENS, read_tokens
from kvferry.codec.registry import restorable
from kvferry.errors import CodecError, FerryError
from kvferry.proto.container import (
    DEFAULT_LIMITS,
    PREFIX_BYTES,
    Finding,
    Limits,
    codec_params,
    examine,
    header_bytes_needed,
    key_of,
    parse,
)
from kvferry.proto.keys import DIGEST_BYTES, BlobKey, kind_name
from kvferry.proto.v1 import blob_pb2

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """What is left of a blob's tokens where its codec drops or merges some.

    Attributes:
        tokens: that the blob stands for.
        entries: that each head has in their place.
        spans: half-open absolute runs of tokens that are kept; empty where heads differ.
    """

    tokens: int
    entries: int
    spans: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class BlobReport:
    """All that `report_on` found. ``header`` is None where it could not be read."""

    source: str
    size: int
    checks: Sequence[Finding]
    header: blob_pb2.BlobHeader | None = None
    header_bytes: int = 0
    key: BlobKey | None = None
    params: Mapping[str, object] = field(default_factory=dict)
    content: Mapping[str, object] = field(default_factory=dict)  # of a whole calibration
    streams: Sequence[StreamSize] = ()
    layers: Sequence[LayerSize] = ()
    kept: KeptTokens | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    @property
    def kind(self) -> str:
        """ "page", "tail", "calibration" or "unknown"."""
        return kind_name(self.header.kind) if self.header is not None else "unknown"

    @property
    def fp16_bytes(self) -> int:
        """What the tensors take at two bytes a value; 0 for a calibration."""
        return sum(stream.fp16_bytes for stream in self.streams)

    @property
    def ratio(self) -> float:
        """fp16 bytes over all bytes of the blob."""
        return self.fp16_bytes / self.size if self.size else 0.0

    @property
    def bits_per_value(self) -> float:
        """All bits of the blob over its values."""
        values = sum(stream.values for stream in self.streams)
        return 8 * self.size / values if values else 0.0


def report_on(
    data: bytes | memoryview,
    source: str,
    expected: BlobKey | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> BlobReport:
    """Examine a blob field by field; never raises for what the bytes are.

    Args:
        source: a path or key, to be shown.
        expected: the key that it was asked for, or that its file name says.
    """
    checks = [_shorter(finding) for finding in examine(data, limits)]
    header, end = _header(data, limits)
    if header is None:
        return BlobReport(source, len(data), checks)
    fits = all(check.ok for check in checks if check.field in ("ranges", "sections"))
    key, params = None, {}
    try:
        key, params = key_of(header), codec_params(header)
    except FerryError as exc:
        fits = False
        if not any(check.field == "ranges" and not check.ok for check in checks):
            checks.append(Finding("key", False, str(exc)))
    if expected is not None and key is not None:
        same = key == expected
        checks.append(Finding("key", same, "as asked for" if same else f"is another: {key}"))
    checks += _stream_checks(header)
    content: Mapping[str, object] = {}
    if header.kind == blob_pb2.BLOB_KIND_CALIBRATION and all(check.ok for check in checks):
        check, content = _calibration(data, header, limits)
        checks.append(check)
    streams = stream_sizes(header) if fits else []
    kept = None
    if streams and all(check.ok for check in checks):
        try:
            kept = _kept(data, header, limits)
        except CodecError as exc:
            checks.append(Finding("kept", False, str(exc)))
    return BlobReport(
        source=source,
        size=len(data),
        checks=checks,
        header=header,
        header_bytes=end,
        key=key,
        params=params,
        content=content,
        streams=streams,
        layers=layer_sizes(header) if streams else (),
        kept=kept,
    )


def _kept(
    data: bytes | memoryview, header: blob_pb2.BlobHeader, limits: Limits
) -> KeptTokens | None:
    if restorable(header.codec.name):
        return None
    tokens = (header.token_start, header.token_end)
    entries = header.streams[0].shape[2]
    spans: Sequence[tuple[int, int]] = ()
    section = parse(data, limits).sections.get(TOKENS)
    if section is not None:
        found = read_tokens(section, entries, tokens)
        ends = np.flatnonzero(np.diff(found) > 1)
        starts = found[np.concatenate([[0], ends + 1])]
        spans = list(zip(starts.tolist(), (found[[*ends, -1]] + 1).tolist(), strict=True))
    return KeptTokens(tokens[1] - tokens[0], entries, spans)


def _header(data: bytes | memoryview, limits: Limits) -> tuple[blob_pb2.BlobHeader | None, int]:
    view = memoryview(data)
    try:
        end = header_bytes_needed(view[:PREFIX_BYTES], limits)
        if end > len(view) - DIGEST_BYTES:
            return None, 0
        return blob_pb2.BlobHeader.FromString(bytes(view[PREFIX_BYTES:end])), end
    except (FerryError, DecodeError):
        return None, 0


def _stream_checks(header: blob_pb2.BlobHeader) -> list[Finding]:
    """Shapes and dtypes against the header's own ranges."""
    checks = []
    layers = header.layer_end - header.layer_start
    tokens = header.token_end - header.token_start
    whole = restorable(header.codec.name)
    if header.kind != blob_pb2.BLOB_KIND_CALIBRATION and not header.streams:
        checks.append(Finding("streams", False, "there are none"))
    for stream in header.streams:
        shape = tuple(stream.shape)
        problem = ""
        if len(shape) != SHAPE_DIMS or not all(shape):
            problem = f"shape {list(shape[:8])} is not layers, heads, tokens, dim"
        elif shape[0] != layers or (shape[2] != tokens and (whole or shape[2] > tokens)):
            problem = f"shape {list(shape)} is not {layers} layers and {tokens} tokens"
        elif stream.dtype not in DTYPES:
            problem = f"dtype {stream.dtype[:32]!r} is unknown"
        if problem:
            checks.append(Finding(f"stream {stream.name}", False, problem))
    return checks


def _calibration(
    data: bytes | memoryview, header: blob_pb2.BlobHeader, limits: Limits
) -> tuple[Finding, Mapping[str, object]]:
    """Whether its content hashes to its id and fits together, and what it is."""
    from kvferry.codec.calibration import CalibrationSet
    from kvferry.codec.calibration_format import MANIFEST_NAME
    from kvferry.codec.calibration_kinds import group_from_blob
    from kvferry.codec.lowrank_calibration import LowRankCalibration

    whole = Finding("calibration", True, "content hashes to its id")
    try:
        if header.codec.name == MANIFEST_NAME:
            known = CalibrationSet.from_blob(data, limits)
            groups = [{"id": g.id.hex(), "layers": list(g.layers)} for g in known.groups]
            points = [
                {"step": p.step, "bits_per_value": p.bits_per_value, "kl": p.kl}
                for p in known.curve
            ]
            learned = {"text_source": known.text_source, "text_tokens": known.tokens}
            return whole, {"type": "set", **learned, "groups": groups, "curve": points}
        group = group_from_blob(data, limits)
    except CodecError as exc:
        return Finding("calibration", False, str(exc)), {}
    ranks = {
        name: {
            "rank": bundle.rank,
            "width": bundle.width,
            "weighted": all(part.weight is not None for part in bundle.parts),
        }
        for name, bundle in group.bundles.items()
    }
    about: dict[str, object] = {"text_source": group.source, "text_tokens": group.tokens}
    if isinstance(group, LowRankCalibration):
        ranks = {
            name: {"rank": basis.rank, "width": basis.dim, "weighted": False}
            for name, basis in sorted(group.bases.items())
        }
        about["norm"] = group.norm
        about["empty_directions"] = {n: int(flags.sum()) for n, flags in group.nulls.items()}
    return whole, {"type": "group", **about, "parent": group.parent.hex(), "streams": ranks}


def _shorter(finding: Finding) -> Finding:
    """Without what the field's name says already."""
    detail = finding.detail.removeprefix("damaged blob, ").removeprefix(f"{finding.field}: ")
    return Finding(finding.field, finding.ok, detail)
