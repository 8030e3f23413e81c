"""Recall against compression, as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.needles.summary import Recall

if TYPE_CHECKING:
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


def draw_recall(curves: Sequence[Curve], exact: Recall | None, told: str, path: Path) -> int:
    """Above: needles still found; below: how likely the key still is.

    Args:
        exact: of the same needles with the model's own cache.
        told: what the reader must know of the model.
    Returns: bytes written. Raises: ConfigError.
    """
    figure = style.new_figure(8.0, 7.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    asked = max(point.recall.asked for curve in curves for point in curve.points)
    style.title(
        figure,
        upper,
        "Passkeys found again in a compressed cache",
        f"{told}\nhere: up to {asked} of those, bars are 95 % intervals",
    )
    styles = style.looks(curve.codec for curve in curves)
    for index, curve in enumerate(curves):
        # Curves that meet at 100 % would hide each other's bars.
        aside = 1.02 ** (index - (len(curves) - 1) / 2)
        _draw(upper, lower, curve, styles[curve.codec], aside)
    ratios = [point.ratio for curve in curves for point in curve.points]
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    upper.set_xscale("log")
    upper.set_xlim(low, high)
    upper.set_ylim(-3, 103)
    upper.set_ylabel("still found (%)")
    lower.set_ylabel("key (nats per token)")
    lower.set_xlabel("compression ratio (fp16 bytes / bytes shipped, headers included)")
    style.plain_log_axis(lower.xaxis, low, high, dense=True)
    if exact is not None:
        lower.axhline(exact.log_prob, color=style.GREY, linestyle="--", linewidth=1)
        lower.annotate(
            "its own cache",
            (0.995, exact.log_prob),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=style.GREY,
        )
    figure.legend(frameon=False, loc="outside right upper", fontsize=9)
    for axes in (upper, lower):
        style.tidy(axes)
    return style.save_png(figure, path)


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
