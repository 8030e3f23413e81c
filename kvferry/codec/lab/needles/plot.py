"""Recall against compression, as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.needles.summary import Recall

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One setting of a codec: fp16 bytes over bytes shipped, and what was still found."""

    ratio: float
    recall: Recall


@dataclass(frozen=True, slots=True)
class Curve:
    """One codec, from fine to coarse."""

    codec: str
    points: Sequence[CurvePoint]


@dataclass(frozen=True, slots=True)
class Part:
    """Curves of the very same needles.

    Attributes:
        told: which needles.
        exact: of them with the model's own cache.
    """

    told: str
    curves: Sequence[Curve]
    exact: Recall


def draw_recall(parts: Sequence[Part], told: str, path: Path) -> int:
    """Above: needles still found; below: how likely the key still is; a column for each part.

    Args:
        parts: one at least, each with a point at least.
        told: what the reader must know of the model.
    Returns: bytes written. Raises: ConfigError.
    """
    figure = style.new_figure(3.0 + 5.0 * len(parts), 7.2)
    grid = figure.subplots(
        2, len(parts), sharex="col", sharey="row", height_ratios=(3, 2), squeeze=False
    )
    figure.suptitle(
        "Passkeys found again in a compressed cache",
        x=0.02, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    styles = style.looks(curve.codec for part in parts for curve in part.curves)
    for index, part in enumerate(parts):
        before = f"{told}\n" if not index else ""
        about = f"{before}{part.told}, bars are 95 % intervals"
        grid[0, index].set_title(about, loc="left", fontsize=9, color=style.GREY)
        _draw_part(grid[0, index], grid[1, index], part, styles)
    grid[0, 0].set_ylim(-3, 103)
    grid[0, 0].set_ylabel("still found (%)")
    grid[1, 0].set_ylabel("key (nats per token)")
    named: dict[str, Artist] = {}
    for axes in grid.flat:
        style.tidy(axes)
        named |= {label: h for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(named)
    figure.legend(
        [named[name] for name in names], names,
        frameon=False, loc="outside right upper", fontsize=9,
    )  # fmt: skip
    return style.save_png(figure, path)


def _draw_part(
    upper: "Axes", lower: "Axes", part: Part, styles: Mapping[str, tuple[str, str, str]]
) -> None:
    for index, curve in enumerate(part.curves):
        # Curves that meet at 100 % would hide each other's bars.
        aside = 1.02 ** (index - (len(part.curves) - 1) / 2)
        _draw(upper, lower, curve, styles[curve.codec], aside)
    ratios = [point.ratio for curve in part.curves for point in curve.points]
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    upper.set_xscale("log")
    upper.set_xlim(low, high)
    lower.set_xlabel("compression ratio (fp16 bytes / bytes shipped)")
    style.plain_log_axis(lower.xaxis, low, high, dense=True)
    base = part.exact.log_prob
    lower.axhline(base, color=style.GREY, linestyle="--", linewidth=1)
    lower.margins(y=0.12)  # room for what the line is
    lower.annotate(
        "its own cache",
        (0.995, base),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=style.GREY,
    )


def _draw(
    upper: "Axes", lower: "Axes", curve: Curve, look: tuple[str, str, str], aside: float
) -> None:
    colour, marker, line = look
    ratios = [point.ratio * aside for point in curve.points]
    found = [point.recall for point in curve.points]
    shares = [100 * r.share for r in found]
    bars = [
        [100 * max(0.0, r.share - r.low) for r in found],
        [100 * max(0.0, r.high - r.share) for r in found],
    ]
    upper.errorbar(
        ratios,
        shares,
        yerr=bars,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2,
        elinewidth=1,
        capsize=2,
        label=curve.codec,
    )
    log_probs = [r.log_prob for r in found]
    lower.plot(ratios, log_probs, color=colour, marker=marker, linestyle=line, linewidth=2)
