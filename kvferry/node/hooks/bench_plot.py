"""Restores and prefill against length, and time to first token against bandwidth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.codec.lab.plot_style import (
    COLOURS,
    GREY,
    MARKERS,
    new_figure,
    plain_log_axis,
    save_png,
    tidy,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREFILL, _RESTORE = 1, 0


def draw_restore(result: Mapping[str, Any], path: Path) -> int:
    """Draw the JSON object of ``kvferry bench restore``; returns bytes written.

    Raises: ConfigError: the file cannot be written.
    """
    sweep = result.get("sweep")
    figure = new_figure(11.0 if sweep else 6.5, 4.6)
    axes = figure.subplots(1, 2 if sweep else 1, squeeze=False)[0]
    _draw_lengths(axes[0], result["points"])
    headline = f"Restored {result['speedup']:.0f} times faster than computed"
    title(
        figure,
        axes[0],
        headline,
        f"{result['model']}, {result['tokens']:,} tokens; everything included, store over loopback",
    )
    if sweep:
        _draw_sweep(axes[1], sweep)
    return save_png(figure, path)


def _draw_lengths(axes: "Axes", points: Sequence[Mapping[str, Any]]) -> None:
    lengths = [point["tokens"] for point in points]
    for index, name, label in (
        (_PREFILL, "prefill", "prefill"),
        (_RESTORE, "restore", "restore"),
    ):
        times = [point[f"{name}_seconds"] for point in points]
        axes.plot(lengths, times, marker=MARKERS[index], color=COLOURS[index], label=label)
        low, high = zip(*(point[f"{name}_spread"] for point in points), strict=True)
        axes.fill_between(lengths, low, high, color=COLOURS[index], alpha=0.15, linewidth=0)
    for point in points:
        where = (point["tokens"], point["restore_seconds"])
        axes.annotate(
            f"{point['speedup']:.0f}x",
            where,
            xytext=(0, -14),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=GREY,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    every = [
        s for point in points for name in ("prefill", "restore") for s in point[f"{name}_spread"]
    ]
    axes.set_ylim(min(every) / 1.8, max(every) * 1.5)
    plain_log_axis(axes.yaxis, min(every) / 1.8, max(every) * 1.5, dense=False)
    axes.set_xlabel("tokens of the prefix")
    axes.set_ylabel("seconds until the cache is filled")
    axes.legend(frameon=False)
    tidy(axes)


def _draw_sweep(axes: "Axes", sweep: Mapping[str, Any]) -> None:
    points = sweep["points"]
    open_end = 4 * max(point["bytes_per_s"] for point in points)
    places = [(point["bytes_per_s"] or open_end) / 1e6 for point in points]
    for index, name, label in (
        (_PREFILL, "without", "without kvferry"),
        (_RESTORE, "with", "with kvferry"),
    ):
        times = [point[f"ttft_{name}_seconds"] for point in points]
        axes.plot(places, times, marker=MARKERS[index], color=COLOURS[index], label=label)
    if sweep["break_even_bytes_per_s"]:
        low, high = (rate / 1e6 for rate in sweep["break_even_bytes_per_s"])
        axes.axvspan(low, high, color=GREY, alpha=0.15, linewidth=0)
        axes.annotate(
            "begins\nto fetch", ((low * high) ** 0.5, 0.04), xycoords=("data", "axes fraction"),
            ha="center", fontsize=8, color=GREY,
        )  # fmt: skip
    for place, point in zip(places, points, strict=True):
        if point["restored_tokens"]:
            axes.annotate(
                f"{point['restored_tokens']:,}",
                (place, point["ttft_with_seconds"]),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=GREY,
            )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    plain_log_axis(axes.xaxis, min(places), max(places), dense=False)
    axes.set_xlabel("MB/s between node and store (rightmost: not throttled)")
    axes.set_ylabel("seconds to the first token")
    axes.set_title(
        f"prompt of {sweep['tokens']:,} tokens; small figures: tokens restored",
        loc="left",
        fontsize=9,
        color=GREY,
    )
    axes.legend(frameon=False)
    tidy(axes)
