"""Generations, attention and keys in the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.experiment.fidelity_report import percent
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import Series, measured, series_of, shown, table, text_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTENTION, KEYS = "report_attention.png", "report_keys_{plane}.png"
_EXCERPT = 160
_PANELS = 9


def onoff_section(results: Sequence[Result], folder: Path) -> list[str]:
    """A table, attention by layer, keys on planes, and how generations begin."""
    own = series_of(results)
    if not own:
        return ["No run was measured."]
    head = (
        "codec", "ratio", "same tokens", "same until", "BLEU", "ROUGE-L",
        "perplexity without / with",
    )  # fmt: skip
    rows = [
        (
            series.shown,
            shown(series.middle("compression_ratio"), ".1f", "x"),
            percent(series.mean("token_match")),
            shown(series.mean("first_difference"), ".0f"),
            shown(series.mean("bleu"), ".1f"),
            shown(series.mean("rouge_l"), ".3f"),
            f"{shown(series.middle('ppl_off'), '.3g')} / {shown(series.middle('ppl_on'), '.3g')}",
        )
        for series in own
    ]
    note = (
        "The text with compression against that without, both greedy and in full; perplexity "
        "is that of either text under the exact cache. A text that it would not have said often "
        "has a higher one, but not always: the likeliest word at each place does not make the "
        "likeliest text."
    )
    lines = [*table(head, rows), "", note, ""]
    lines += _attention(own, folder)
    for plane in ("pca", "umap"):
        lines += _planes(own, plane, folder)
    lines += [
        "Keys with RoPE undone. Crosses are what came back, the larger the more tokens one stands "
        "for; dots are the keys as they were, coloured, where tokens are dropped or merged, by "
        "the cross that is nearest.",
        "",
    ]
    return lines + _excerpts(results)


def _attention(own: Sequence[Series], folder: Path) -> list[str]:
    figure = style.new_figure(8.0, 4.6)
    axes = figure.add_subplot()
    style.title(figure, axes, "Attention with and without compression", "outputs of each layer")
    drawn = False
    styles = style.looks(series.shown for series in own)
    for series in own:
        found = [r.metrics.get("attention_difference") for r in series.results]
        lists = [[float(v) for v in f] for f in found if isinstance(f, list) and f]
        if not lists:
            continue
        colour, marker, dash = styles[series.shown]
        mean = [max(sum(c) / len(c), 1e-6) for c in zip(*lists, strict=False)]
        axes.plot(
            mean, color=colour, marker=marker, linestyle=dash, markersize=3, label=series.shown
        )
        drawn = True
    if not drawn:
        return ["Attention was not recorded.", ""]
    axes.set_yscale("log")
    style.plain_log_axis(axes.yaxis, *axes.get_ylim(), dense=True)
    axes.set_xlabel("layer")
    axes.set_ylabel("norm of difference / norm")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    style.tidy(axes)
    style.save_png(figure, folder / ATTENTION)
    return [f"![attention by layer]({ATTENTION})", ""]


def _planes(own: Sequence[Series], plane: str, folder: Path) -> list[str]:
    """A panel for each series: keys that went in, coloured by what they came back as."""
    name = {"pca": "PCA", "umap": "UMAP"}[plane]
    panels = []
    for series in own:
        keys = series.results[0].metrics.get("keys")
        planes = keys.get("planes") if isinstance(keys, dict) else None
        if isinstance(keys, dict) and isinstance(planes, dict) and plane in planes:
            panels.append((series, keys, planes[plane]))
    if not panels:
        if plane == "umap":
            return ["No UMAP pictures: `pip install 'kvferry[lab]'`, and `umap` not false.", ""]
        return ["No keys were drawn.", ""]
    panels = panels[:_PANELS]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = style.new_figure(max(6.8, 3.4 * columns), 3.2 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False)
    keys = panels[0][1]
    where = f"Keys of layer {keys['layer']}, head {keys['head']} ({name})"
    figure.suptitle(
        f"{where}: dots in, crosses back",
        x=0.02, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (series, keys, found) in zip(grid.flat, panels, strict=False):
        _panel(axes, keys, found)
        axes.set_title(
            f"{series.shown}: {keys['entries']} of {keys['tokens']}", fontsize=8, loc="left"
        )
    file = KEYS.format(plane=plane)
    style.save_png(figure, folder / file)
    return [f"![keys, {name}]({file})", ""]


def _panel(axes: "Axes", keys: Mapping[str, object], plane: Mapping[str, object]) -> None:
    exact, restored = _points(plane["exact"]), _points(plane["restored"])
    cluster, weights = keys["cluster"], keys["weights"]
    if not isinstance(cluster, list) or not isinstance(weights, list):
        return
    whole = keys["entries"] == keys["tokens"]
    colours = [style.GREY if whole else style.COLOURS[int(c) % 7] for c in cluster]
    axes.scatter(*exact, c=colours, s=9, alpha=0.5, linewidth=0)
    most = max([1.0, *weights])
    sizes = [10 + 60 * float(w) / most if most > 1 else 10.0 for w in weights]
    axes.scatter(*restored, c="black", s=sizes, marker="x", linewidth=0.7)
    axes.set_xticks([])
    axes.set_yticks([])


def _points(value: object) -> tuple[list[float], list[float]]:
    pairs = value if isinstance(value, list) else []
    return [float(p[0]) for p in pairs], [float(p[1]) for p in pairs]


def _excerpts(results: Sequence[Result]) -> list[str]:
    """How generations on one text begin."""
    found = measured(results)
    text = found[0].run.text
    lines = [f"How the generations on *{text_name(text)}* begin:", ""]
    rows = [("without", _start(found[0].metrics.get("text_off")))]
    rows += [
        (result.run.codec.described(), _start(result.metrics.get("text_on")))
        for result in found
        if result.run.text == text
    ]
    return [*lines, *table(("codec", "text"), rows), ""]


def _start(text: object) -> str:
    words = " ".join(str(text or "").split())
    return words[:_EXCERPT].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
