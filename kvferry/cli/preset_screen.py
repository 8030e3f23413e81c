"""What a model's cache holds, as JSON and as a screen."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kvferry.codec.mlx.preset_report import CacheKind, PresetReport, RopeReport


def as_json(model: str, weights: bool, found: "PresetReport") -> dict[str, object]:
    """One JSON object. Layers are the model's own, counted from 0; bytes are of all layers.

    Args:
        weights: they are on this machine.
    """
    shape, pages = found.shape, list(found.shape.page_layers)
    return {
        "model": model,
        "family": found.family,
        "architecture": found.architecture,
        "mode": found.mode,
        "weights_found": weights,
        "model_layers": shape.all_layers,
        "page_layers": pages,
        "state_layers": sorted(set(shape.state_layers)),
        "kinds": [
            {
                "cache": kind.classes,
                "holds": "rows" if kind.rows else "ring" if kind.window else "state",
                "layers": list(kind.layers),
                "window_tokens": kind.window or None,
                "arrays": {name: list(shape) for name, shape in (kind.arrays or {}).items()},
                "bytes_per_layer": kind.bytes or None,
            }
            for kind in found.kinds
        ],
        "kv_heads": shape.kv_heads,
        "head_dim": found.head_dim,
        "streams": [
            {
                "name": s.name, "heads": s.heads, "dim": s.dim, "rotated": s.rotated,
                "dtype": s.dtype, "bytes_per_token": s.bytes_per_token,
            }
            for s in found.streams
        ],
        "rope": [
            {
                "layers": list(rope.layers), "dims": rope.dims, "traditional": rope.traditional,
                "base": rope.base, "slowed": rope.slowed, "still_pairs": rope.still,
                "key_scale": rope.key_scale, "position_scale": rope.position_scale,
            }
            for rope in found.ropes
        ],
        "bytes_per_token_fp16": found.bytes_per_token_fp16,
        "bytes_per_token": found.bytes_per_token,
        "cache_dtypes": list(found.dtypes),
        "page_tokens": found.page_tokens,
        "page_bytes_fp16": found.bytes_per_token_fp16 * found.page_tokens,
        "page_bytes": found.bytes_per_token * found.page_tokens,
        "state_bytes_fp16": found.state_bytes_fp16,
        "state_bytes": found.state_bytes,
        "layer_groups": [pages[start:end] for start, end in found.groups],
    }  # fmt: skip


def print_preset(
    model: str, weights: bool, found: "PresetReport", console: Console | None = None
) -> None:
    """The screen; plain lines where standard output is no terminal."""
    out = console or Console()
    what = found.architecture if found.family == found.architecture else (
        f"{found.architecture}, of the {found.family} family"
    )  # fmt: skip
    out.print(Rule(Text.assemble((model, "bold"), f"  {what}"), align="left"))
    if not weights:
        out.print("Told from config.json: the weights are not here.", style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(found):
        grid.add_row(name, Text(value))
    out.print(grid)
    for title, table in (
        ("What layers hold", _kinds(found.kinds)),
        ("Rows of tokens", _streams(found)),
        ("RoPE", _ropes(found.ropes)),
    ):
        if table.row_count:
            out.print(Text(f"\n{title}", style="bold"))
            out.print(table)


def _facts(found: "PresetReport") -> Iterable[tuple[str, str]]:
    shape = found.shape
    yield "layers", f"{shape.all_layers} of the model, {_layers_of(found)}"
    if found.streams:
        own = "" if list(found.dtypes) == ["float16"] else (
            f", {_size(found.bytes_per_token)} as {' and '.join(found.dtypes)}"
        )  # fmt: skip
        yield "KV heads", f"{shape.kv_heads}, {_mode(found)}"
        yield "a token", f"{_size(found.bytes_per_token_fp16)} as fp16{own}"
        pages = [_size(found.page_tokens * found.bytes_per_token_fp16) + " as fp16"]
        if own:
            size = _size(found.page_tokens * found.bytes_per_token)
            pages.append(f"{size} as {' and '.join(found.dtypes)}")
        yield f"a page ({found.page_tokens} tokens)", ", ".join(pages)
    if found.state_bytes:
        full = ", rings full" if any(kind.window for kind in found.kinds) else ""
        yield "states at a position", f"{_size(found.state_bytes)}{full}"
    if found.groups:
        pages_ = found.shape.page_layers
        spans = (_ranges(pages_[start:end]) for start, end in found.groups)
        yield "layer groups", f"{len(found.groups)}, coded together: {'; '.join(spans)}"


def _layers_of(found: "PresetReport") -> str:
    rows, states = found.shape.layers, len(set(found.shape.state_layers))
    parts = [f"{rows} with rows of tokens"] if rows else []
    parts += [f"{states} with states"] if states else []
    return ", ".join(parts) or "none with a cache"


def _mode(found: "PresetReport") -> str:
    if found.mode == "single_stream":
        return "one latent in place of K and V (single_stream)"
    return "K and V apart (dual_stream)"


def _kinds(kinds: "Sequence[CacheKind]") -> Table:
    table = _table("cache", "holds", "layers", "arrays")
    table.add_column("a layer", justify="right", no_wrap=True)
    for kind in kinds:
        holds = "rows" if kind.rows else f"ring of {kind.window:,}" if kind.window else "state"
        arrays = (f"{name} {shape}" for name, shape in (kind.arrays or {}).items())
        table.add_row(
            kind.classes, holds, _ranges(kind.layers), "\n".join(arrays) or "see below",
            _size(kind.bytes) if kind.bytes else "",
        )  # fmt: skip
    return table


def _streams(found: "PresetReport") -> Table:
    table = _table("stream", "heads x dim", "type", "rotated")
    table.add_column("a token", justify="right", no_wrap=True)
    for s in found.streams:
        rotated = "yes" if s.rotated else "no"
        table.add_row(s.name, f"{s.heads} x {s.dim}", s.dtype, rotated, _size(s.bytes_per_token))
    return table


def _ropes(ropes: "Sequence[RopeReport]") -> Table:
    table = _table("layers", "rotated dims", "pairs", "frequencies", "keys")
    for rope in ropes:
        if not rope.dims:
            table.add_row(_ranges(rope.layers), "none", "", "", "")
            continue
        pairs = "2i, 2i+1 (traditional)" if rope.traditional else "i, i + dims/2"
        keys = "" if rope.key_scale == 1 else f"scaled by {rope.key_scale:g}"
        table.add_row(_ranges(rope.layers), str(rope.dims), pairs, _frequencies(rope), keys)
    return table


def _frequencies(rope: "RopeReport") -> str:
    parts = ["of the model's own" if rope.base is None else f"base {rope.base:,.10g}"]
    if rope.slowed != 1:
        parts.append(f"slowest pair {rope.slowed:g} times slower")
    if rope.still:
        parts.append(f"{rope.still} pairs do not turn")
    if rope.position_scale != 1:
        parts.append(f"positions times {rope.position_scale:g}")
    return ", ".join(parts)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _ranges(layers: Sequence[int]) -> str:
    """Layers in words: runs, or from which on every how many."""
    found = list(layers)
    step = found[1] - found[0] if len(found) > 2 else 0
    if step > 1 and found == list(range(found[0], found[-1] + 1, step)):
        return f"{found[0]}, {found[1]}, .. {found[-1]} ({len(found)})"
    parts = []
    for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0]):
        held = [layer for _, layer in run]
        parts.append(f"{held[0]}-{held[-1]}" if len(held) > 1 else str(held[0]))
    return ", ".join(parts) + (f" ({len(found)})" if len(found) > 1 else "")


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return (
                f"{size:.0f} {unit}" if unit == "B" or size == int(size) else f"{size:.1f} {unit}"
            )
        size /= 1024
    return f"{size:.1f} GiB"
