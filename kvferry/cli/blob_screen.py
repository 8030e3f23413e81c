"""Reports on blobs as JSON and as a screen. Text of blobs is shown, never obeyed."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kvferry.cli.blob_report import BlobReport, KeptTokens
from kvferry.cli.blob_sizes import LayerSize
from kvferry.proto.v1 import blob_pb2

MIB = 1 << 20
_MAX_TEXT = 300
_SPANS_SHOWN = 12


def clean(text: str) -> str:
    """Text of a blob without what a terminal would obey, and not at any length."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:_MAX_TEXT])
    return shown + ("..." if len(text) > _MAX_TEXT else "")


def mib_number(size: float) -> str:
    """A size in MiB without the unit, with about three digits that count."""
    value = size / MIB
    digits = 1 if value >= 100 else 3 if value >= 0.1 else 5 if value else 0
    return f"{value:,.{digits}f}"


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{mib_number(size)} MiB"


def as_json(report: BlobReport, calibration: str | None) -> dict[str, object]:
    """One JSON object. ``calibration``: where it was found, "" for nowhere, None: not needed."""
    value: dict[str, object] = {
        "source": report.source,
        "ok": report.ok,
        "bytes": report.size,
        "kind": report.kind,
        "key": str(report.key) if report.key else None,
        "checks": [{"field": c.field, "ok": c.ok, "detail": c.detail} for c in report.checks],
    }
    header = report.header
    if header is None:
        return value
    codec = header.codec
    return value | {
        "format_version": header.format_version,
        "producer": header.producer,
        "created_unix_s": header.created_unix_s,
        "model_id": header.model_id.hex(),
        "page_key": header.page_key.hex(),
        "previous_key": header.previous_key.hex(),
        "tokens": [header.token_start, header.token_end],
        "layers": [header.layer_start, header.layer_end],
        "heads": [header.head_start, header.head_end],
        "model_layers": header.model_layers,
        "model_heads": header.model_heads,
        "rope_fingerprint": header.rope_fingerprint.hex(),
        "codec": {"name": codec.name, "version": codec.version, "params": dict(report.params)},
        "calibration": {"id": codec.calibration_id.hex() or None, "found": calibration},
        "content": dict(report.content) or None,
        "kept": _kept_json(report.kept),
        "header_bytes": report.header_bytes,
        "streams": [
            {
                "name": s.name, "shape": list(s.shape), "dtype": s.dtype, "bytes": s.size,
                "fp16_bytes": s.fp16_bytes,
            }
            for s in report.streams
        ],
        "per_layer": [
            {"layer": x.layer, "bytes": round(x.size, 1), "exact": x.exact} for x in report.layers
        ],
        "sections": [
            {"name": s.name, "bytes": s.length, "raw_bytes": s.raw_length}
            for s in header.sections
        ],
        "fp16_bytes": report.fp16_bytes,
        "compression_ratio": round(report.ratio, 4) if report.streams else None,
        "bits_per_value": round(report.bits_per_value, 4) if report.streams else None,
    }  # fmt: skip


def _kept_json(kept: KeptTokens | None) -> dict[str, object] | None:
    if kept is None:
        return None
    spans = [list(span) for span in kept.spans]
    return {"tokens": kept.tokens, "entries": kept.entries, "spans": spans}


def print_report(
    report: BlobReport, calibration: str | None, console: Console | None = None
) -> None:
    """The screen: what it is, how large its parts are, and whether they are whole."""
    parts: list[RenderableType] = []
    if report.header is not None:
        parts.append(_identity(report, report.header, calibration))
    if report.streams:
        parts += [Text(), _streams(report), Text(), _layers(report.layers)]
    parts += [Text(), _checks(report)] if parts else [_checks(report)]
    state, style = ("whole", "green") if report.ok else ("damaged", "red")
    title = Text.assemble(report.kind, "  ", (state, f"bold {style}"), f"  {mib(report.size)}")
    head = Rule(title, align="left", style=style)
    out = console or Console()
    # Not folded: paths and keys are there to be copied.
    out.print(Text(clean(report.source)), soft_wrap=True)
    if report.key is not None and str(report.key) != report.source:
        out.print(Text(str(report.key), style="dim"), soft_wrap=True)
    out.print(head, *parts, sep="\n")


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _identity(report: BlobReport, header: blob_pb2.BlobHeader, calibration: str | None) -> Table:
    grid = _grid()
    rows: dict[str, str] = {"model": header.model_id.hex()}
    if report.kind == "calibration":
        rows |= {"calibration": header.page_key.hex(), "covers": _covers(header)}
    else:
        rows |= {
            report.kind: header.page_key.hex(),
            "after": header.previous_key.hex(),
            "tokens": f"{header.token_start:,} to {header.token_end - 1:,} "
            f"({header.token_end - header.token_start:,})",
            "covers": _covers(header),
        }
    if report.kept is not None:
        rows["kept"] = _kept_text(report.kept)
    rows |= _content(report.content) if report.content else {}
    codec = header.codec
    given = " ".join(f"{name}={_brief(value)}" for name, value in report.params.items())
    rows["codec"] = f"{codec.name}.{codec.version}  {given}"
    if codec.calibration_id:
        where = f"found: {calibration}" if calibration else "not found here"
        rows["calibration"] = f"{codec.calibration_id.hex()[:16]}  {where}"
    if header.rope_fingerprint:
        rows["rope"] = header.rope_fingerprint.hex()[:16]
    rows["written by"] = header.producer or "not said"
    for name, value in rows.items():
        style = "red" if value.endswith("not found here") else ""
        grid.add_row(name, Text(clean(value), style=style))
    return grid


def _kept_text(kept: KeptTokens) -> str:
    if not kept.spans:
        return f"{kept.tokens:,} tokens in at most {kept.entries:,} entries, of each head its own"
    text = f"{kept.entries:,} of {kept.tokens:,} tokens, {kept.tokens - kept.entries:,} dropped"
    shown = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in kept.spans[:_SPANS_SHOWN]]
    more = len(kept.spans) - len(shown)
    return f"{text}: {', '.join(shown)}{f' and {more} more runs' if more else ''}"


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{name}:{_brief(v)}" for name, v in value.items()) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _covers(header: blob_pb2.BlobHeader) -> str:
    layers = _span("layer", header.layer_start, header.layer_end, header.model_layers)
    heads = _span("KV head", header.head_start, header.head_end, header.model_heads)
    return f"{layers}, {heads}"


def _span(what: str, start: int, end: int, of: int) -> str:
    """A half-open range in words; ``of`` 0: of how many is not known."""
    which = f"{what} {start}" if end == start + 1 else f"{what}s {start} to {end - 1}"
    return f"{which} of {of}" if of else which


def _content(content: Mapping[str, object]) -> dict[str, str]:
    """Rows on what is in a calibration."""
    rows = {"learned from": f"{content['text_tokens']:,} tokens of {content['text_source']}"}
    if content.get("parent"):
        rows["cut from"] = str(content["parent"])
    for name, value in dict(content.get("streams", {})).items():  # type: ignore[call-overload]
        weighted = ", weighted" if value["weighted"] else ""
        rows[f"stream {name}"] = f"rank {value['rank']:,} of {value['width']:,}{weighted}"
    if "norm" in content:
        empty = dict(content.get("empty_directions", {}))  # type: ignore[call-overload]
        heads = ", ".join(f"{count} heads of {name}" for name, count in empty.items())
        rows["norm"] = f"{content['norm']} before attention leaves {heads or 'nothing'} empty"
    if content["type"] == "set":
        groups: Sequence[Mapping[str, Sequence[int]]] = content["groups"]  # type: ignore[assignment]
        spans = ", ".join("{}-{}".format(*group["layers"]) for group in groups)
        rows["groups"] = f"{len(groups)}, of layers {spans} (half-open)"
        curve: Sequence[Mapping[str, float]] = content["curve"]  # type: ignore[assignment]
        points = (f"{p['bits_per_value']:.3g} bits: {p['kl']:.2g}" for p in curve)
        rows["mean KL"] = ", ".join(points) or "not measured"
    return rows


def _streams(report: BlobReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stream")
    table.add_column("layers, heads, tokens, dim")
    for name in ("fp16 MiB", "stored MiB", "ratio", "bits/value"):
        table.add_column(name, justify="right", no_wrap=True)
    for stream in report.streams:
        ratio = stream.fp16_bytes / stream.size if stream.size else 0.0
        bits = 8 * stream.size / stream.values if stream.values else 0.0
        shape = ", ".join(str(n) for n in stream.shape)
        table.add_row(
            Text(clean(stream.name)), Text(clean(f"({shape}) {stream.dtype}")),
            mib_number(stream.fp16_bytes), mib_number(stream.size), f"{ratio:.2f}", f"{bits:.3f}",
        )  # fmt: skip
    rest = report.size - sum(stream.size for stream in report.streams)
    table.add_row("frame", "header and checksums", "", mib_number(rest), "", "")
    table.add_row(
        "all", "", mib_number(report.fp16_bytes), mib_number(report.size),
        f"{report.ratio:.2f}", f"{report.bits_per_value:.3f}", style="bold",
    )  # fmt: skip
    return table


def _layers(layers: Sequence[LayerSize]) -> RenderableType:
    """Runs of layers of the same size, so that thirty equal rows are one."""
    lines = []
    for size, run in groupby(layers, key=lambda layer: layer.size):
        same = list(run)
        first, last = same[0].layer, same[-1].layer
        span = f"layer {first}" if first == last else f"layers {first} to {last}"
        how = "each" if same[0].exact else "each on average, coded together"
        lines.append(f"{span}: {mib(size)} {how}")
    return Text("\n".join(lines))


def _checks(report: BlobReport) -> RenderableType:
    """What failed, one line each; what held, in one line."""
    held = [check for check in report.checks if check.ok]
    sections = sum(check.field.startswith("section ") for check in held)
    names = [check.field for check in held if not check.field.startswith("section ")]
    if sections:
        names.append(f"{sections} section{'s' * (sections > 1)}")
    lines = Table.grid(padding=(0, 2))
    lines.add_column()
    lines.add_column(overflow="fold")
    for check in report.checks:
        if not check.ok:
            lines.add_row(Text(clean(check.field), style="bold red"), Text(clean(check.detail)))
    if names:
        lines.add_row(Text("in order", style="green"), Text(clean(", ".join(names))))
    return lines
