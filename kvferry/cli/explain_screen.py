"""An `Explanation` as JSON and as a screen."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.cli.blob_screen import clean, mib
from kvferry.node.hooks.explanation import Explanation, PageReport, Placed, TailReport
from kvferry.node.hooks.gap import layers_text, missing_layers
from kvferry.node.hooks.steps import Step

SHOWN_PAGES = 64
_STYLES = {"complete": "green", "in_tail": "green", "behind_gap": "yellow"}


def as_json(found: Explanation) -> dict[str, object]:
    """One JSON object. Sizes in bytes, times in seconds, ids in hex."""
    return {
        "prompt_tokens": found.prompt_tokens,
        "page_tokens": found.page_tokens,
        "root": found.root.hex(),
        "restorable_tokens": found.whole.tokens,
        "ends": found.ends,
        "reason": found.reason,
        "partial": found.partial,
        "silent": list(found.silent),
        "pages": [
            {
                "page": index,
                "tokens": list(page.tokens),
                "key": page.key.hex(),
                "state": _state(page),
                "why": page.gap.why if page.gap else "",
                "blobs": [_blob(blob) for blob in page.blobs],
            }
            for index, page in enumerate(found.pages)
        ],
        "tails": [_tail(tail) for tail in found.tails],
        "states": [_tail(state) for state in found.states],
        "calibrations": {name.hex(): list(at) for name, at in found.calibrations.items()},
        "rates": {
            "prefill_tokens_per_s": found.cost.prefill,
            "link_bytes_per_s": found.cost.link,
            "decode_tokens_per_s": found.cost.decode,
            "margin": found.margin,
        },
        "lookup_seconds": found.wait_s,
        "restores": [
            {
                "tokens": step.tokens,
                "far_bytes": step.far_bytes,
                "near_bytes": step.near_bytes,
                "restore_seconds": found.wait_s + found.cost.seconds(step),
                "prefill_seconds": _prefill(found, step),
            }
            for step in found.steps
        ],
        "worth_tokens": found.chosen,
    }


def _tail(tail: TailReport) -> dict[str, object]:
    return {
        "tokens": list(tail.tokens),
        "why": tail.why,
        "blobs": [_blob(blob) for blob in tail.blobs],
    }


def _blob(blob: Placed) -> dict[str, object]:
    info = blob.info
    return {
        "key": str(info.key),
        "layers": list(info.layers),
        "heads": list(info.heads),
        "codec": info.key.codec_name,
        "bytes": info.size,
        "calibration": info.codec.calibration_id.hex() or None,
        "places": list(blob.places),
    }


def _state(page: PageReport) -> str:
    return page.gap.state if page.gap else "complete"


def _prefill(found: Explanation, step: Step) -> float | None:
    return step.tokens / found.cost.prefill if found.cost.prefill else None


def print_explanation(
    about: Mapping[str, object], found: Explanation, console: Console | None = None
) -> None:
    """Pages, tails, then what a restore would bring and cost."""
    out = console or Console()
    out.print(
        f"model {clean(str(about['model']))} ({str(about['model_id'])[:16]}), node "
        f"{clean(str(about['node']))}, policy {about['policy']!r}; prompt of "
        f"{found.prompt_tokens:,} tokens, root {found.root.hex()[:16]}",
        markup=False,
        highlight=False,
    )
    if found.partial:
        out.print("The store does not answer: this is what node and peers have.", style="yellow")
    elif found.silent:
        out.print(f"No answer from {', '.join(found.silent)}.", style="yellow", markup=False)
    if found.pages or found.tails or found.states:
        out.print(_table(found))
    if len(found.pages) > SHOWN_PAGES:
        out.print(f"({len(found.pages) - SHOWN_PAGES} more pages; --json lists all)")
    for name, places in found.calibrations.items():
        if not places:
            out.print(
                f"Calibration {name.hex()[:16]} is nowhere: blobs that name it cannot be decoded.",
                style="red",
            )
    for line in _summary(found):
        out.print(line, markup=False, highlight=False)


def _table(found: Explanation) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("page", "tokens", "key", "state", "what", "where"):
        table.add_column(name, overflow="fold", no_wrap=name in ("page", "tokens", "key"))
    for index, page in enumerate(found.pages[:SHOWN_PAGES]):
        state = _state(page)
        words = Text(state.replace("_", " "), style=_STYLES.get(state, "red"))
        table.add_row(
            str(index), _span(page.tokens), page.key.hex()[:12], words, *_held(page.blobs)
        )
    short = [("tail", tail) for tail in found.tails] + [("state", at) for at in found.states]
    for kind, tail in short:
        fits = Text("complete", "green") if not tail.why else Text("does not fit")
        table.add_row(kind, _span(tail.tokens), "", fits, *_held(tail.blobs))
    return table


def _span(tokens: tuple[int, int]) -> str:
    return f"{tokens[0]:,}-{tokens[1] - 1:,}"


def _held(blobs: Sequence[Placed]) -> tuple[str, str]:
    if not blobs:
        return "", ""
    infos = [blob.info for blob in blobs]
    codecs = ", ".join(sorted({info.key.codec_name for info in infos}))
    layers = f", {layers_text(sorted({i.layers for i in infos}))}" if missing_layers(infos) else ""
    count = "1 blob" if len(blobs) == 1 else f"{len(blobs)} blobs"
    return f"{count}, {codecs}{layers}, {mib(sum(i.size for i in infos))}", _where(blobs)


def _where(blobs: Sequence[Placed]) -> str:
    """Places that hold all of these, then those that hold some."""
    names: list[str] = list(dict.fromkeys(place for blob in blobs for place in blob.places))
    counts = {name: sum(name in blob.places for blob in blobs) for name in names}
    return ", ".join(
        name if count == len(blobs) else f"{name} ({count} of {len(blobs)})"
        for name, count in counts.items()
    )


def _summary(found: Explanation) -> Iterable[str]:
    step = found.whole
    yield f"A restore can bring {step.tokens:,} of {found.prompt_tokens:,} tokens: {found.ends}."
    if not found.steps:
        return
    cost = found.cost
    if step.far_bytes:
        rate = f" at {cost.link / 1e6:,.1f} MB/s" if cost.link else ", at a rate not measured yet"
        yield f"  over a link: {mib(step.far_bytes)}{rate}"
    if step.near_bytes:
        yield f"  from this node itself: {mib(step.near_bytes)}"
    decode = f"{cost.decode:,.0f} tokens/s" if cost.decode else "not measured yet"
    yield f"  decoding: {decode}"
    restore = found.wait_s + cost.seconds(step)
    prefill = _prefill(found, step)
    if prefill is None:
        yield (
            "  prefill: no hook of this node has measured it since the node started, so a hook "
            "restores all of it (--prefill-rate asks what if)"
        )
        return
    yield (
        f"  restore about {restore:.2f} s, prefill of these tokens about {prefill:.2f} s "
        f"at {cost.prefill:,.0f} tokens/s"
    )
    if found.chosen == step.tokens:
        yield "It is worth it: all of that would be restored."
    elif found.chosen:
        yield (
            f"Only the first {found.chosen:,} tokens are worth it: more would take longer than "
            f"prefill (a restore must be {found.margin} times quicker)."
        )
    else:
        yield (
            "It is not worth it: prefill is quicker (a restore must be "
            f"{found.margin} times quicker to be begun)."
        )
