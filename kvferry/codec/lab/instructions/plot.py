"""Figure 1: accuracy against what is held of a conversation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.lab import plot_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: what was held, and the share of right answers with its interval."""

    share: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """One codec; or, ``flat``, a condition that the others are compared with."""

    name: str
    points: Sequence[Point]
    flat: bool = False


def draw_accuracy(lines: Sequence[Line], below: str, path: Path) -> int:
    """Returns: bytes written. Raises: ConfigError."""
    figure = style.new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    style.title(
        figure,
        axes,
        "Instructions remembered, by what is kept of the cache",
        f"{below}; bars and bands are 95 % intervals",
    )
    for line in lines:
        if line.flat:
            _draw_flat(axes, line)
    codecs = [line for line in lines if not line.flat]
    styles = style.looks(line.name for line in codecs)
    for index, line in enumerate(codecs):
        # Equal shares are the rule: bars at one place would hide each other.
        _draw(axes, line, styles[line.name], 0.7 * (index - (len(codecs) - 1) / 2))
    axes.set_ylim(-3, 103)
    axes.set_xlim(0, 103)
    axes.set_xlabel("held after the last turn (% of all tokens at two bytes a value)")
    axes.set_ylabel("answers that keep every rule (%)")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    style.tidy(axes)
    return style.save_png(figure, path)


def _draw_flat(axes: "Axes", line: Line) -> None:
    point = line.points[0]
    dashes = "--" if point.share >= 1 and line.name == "uncompressed" else ":"
    axes.axhspan(100 * point.low, 100 * point.high, color=style.GREY, alpha=0.1, linewidth=0)
    axes.axhline(
        100 * point.accuracy, color=style.GREY, linestyle=dashes, linewidth=1.5, label=line.name
    )


def _draw(axes: "Axes", line: Line, look: tuple[str, str, str], aside: float) -> None:
    colour, marker, dashes = look
    axes.errorbar(
        [100 * point.share + aside for point in line.points],
        [100 * point.accuracy for point in line.points],
        yerr=[
            [100 * max(0.0, p.accuracy - p.low) for p in line.points],
            [100 * max(0.0, p.high - p.accuracy) for p in line.points],
        ],
        color=colour,
        marker=marker,
        linestyle=dashes,
        linewidth=2,
        elinewidth=1,
        capsize=3,
        label=line.name,
    )
