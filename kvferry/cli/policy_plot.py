"""A picture of ``kvferry policy simulate``."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvferry.codec.lab.plot_style import (
    COLOURS,
    GREY,
    new_figure,
    plain_log_axis,
    save_png,
    tidy,
    title,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from kvferry.cluster.optimizer.scenario import Scenario
    from kvferry.cluster.optimizer.simulated import Run

_BARS = 24


def draw_simulation(scenario: "Scenario", runs: "Sequence[Run]", out: Path) -> int:
    """Restores over time, waits as a distribution, and how finely each machine codes.

    Returns: bytes written. Raises: ConfigError: the file cannot be.
    """
    figure = new_figure(10.0, 7.2)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1.0))
    over_time = figure.add_subplot(grid[0, :])
    title(
        figure,
        over_time,
        f"{scenario.name}: {len(scenario.machines)} machines",
        "seconds until the slowest node has restored its part; dotted: another policy",
    )
    _draw_restores(over_time, runs)
    _draw_waits(figure.add_subplot(grid[1, 0]), runs)
    _draw_bits(figure.add_subplot(grid[1, 1]), scenario, runs)
    return save_png(figure, out)


def _draw_restores(axes: "Axes", runs: "Sequence[Run]") -> None:
    values: list[float] = []
    for run, colour in zip(runs[:2], COLOURS, strict=False):
        restored = [served for served in run.served if served.restored]
        per_token = [1e3 * 1e3 * s.restore_s / s.restored for s in restored]
        values += per_token
        axes.scatter(
            [s.at_s for s in restored], per_token, s=9, color=colour, alpha=0.55,
            linewidths=0, label=run.way,
        )  # fmt: skip
    for at, _ in runs[0].changes:
        axes.axvline(at, color=GREY, linewidth=0.8, linestyle=":")
    for at, tier in runs[0].tiers:
        axes.annotate(tier or "back", (at, 1.0), xycoords=("data", "axes fraction"),
                      fontsize=8, color=GREY, ha="left", va="top", rotation=90)  # fmt: skip
    axes.set_xlabel("second of the trace")
    axes.set_ylabel("restore, ms per 1,000 tokens")
    if values:
        low, high = np.percentile(values, [0, 100])
        axes.set_yscale("log")
        axes.set_ylim(0.8 * low, 1.25 * high)
        plain_log_axis(axes.yaxis, 0.8 * low, 1.25 * high, dense=high < 30 * low)
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2)
    tidy(axes)


def _draw_waits(axes: "Axes", runs: "Sequence[Run]") -> None:
    slowest = 0.0
    for run, colour in zip(runs, COLOURS, strict=False):
        waits = np.sort([served.ttft_s for served in run.served])
        slowest = max(slowest, float(waits[-1]))
        axes.step(waits, np.linspace(0, 100, len(waits)), color=colour, label=run.way, where="post")
    axes.set_xscale("log")
    least = max(1e-3, min(s.ttft_s for run in runs for s in run.served))
    plain_log_axis(axes.xaxis, least, slowest, dense=slowest < 30 * least)
    axes.set_title("time to first token", loc="left", fontsize=9, color=GREY)
    axes.set_xlabel("seconds")
    axes.set_ylabel("% of requests within")
    axes.legend(frameon=False, loc="lower right")
    tidy(axes)


def _draw_bits(axes: "Axes", scenario: "Scenario", runs: "Sequence[Run]") -> None:
    names = [machine.name for machine in scenario.machines]
    axes.set_title("bits per value at the end", loc="left", fontsize=9, color=GREY)
    places = np.arange(len(names))
    if len(names) <= _BARS:
        for shift, run, colour in zip((-0.2, 0.2), runs[:2], COLOURS, strict=False):
            bits = [run.bits_per_value.get(name, 0.0) for name in names]
            axes.bar(places + shift, bits, 0.38, color=colour, label=run.way)
        axes.set_xticks(places, names, rotation=30 if len(names) > 4 else 0, fontsize=8)
        top = max((max(run.bits_per_value.values(), default=0.0) for run in runs[:2]), default=1)
        axes.set_ylim(0, 1.25 * top)
        axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=8)
    else:
        link = {machine.name: machine.bytes_per_s / 1e6 for machine in scenario.machines}
        for run, colour in zip(runs[:2], COLOURS, strict=False):
            held = list(run.bits_per_value)
            axes.scatter(
                [link[n] for n in held], [run.bits_per_value[n] for n in held], s=9,
                color=colour, alpha=0.6, linewidths=0, label=run.way,
            )  # fmt: skip
        axes.set_xscale("log")
        plain_log_axis(axes.xaxis, min(link.values()), max(link.values()), dense=False)
        axes.set_xlabel("link to the store, MB/s")
        axes.legend(frameon=False, loc="best")
    tidy(axes)
