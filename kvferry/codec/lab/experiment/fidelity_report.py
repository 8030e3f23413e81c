"""Fidelity in the report: the rate picture, MSE against ratio, tables."""

from collections.abc import Sequence
from pathlib import Path

from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.experiment.results import Result
from kvferry.codec.lab.experiment.series import (
    Series,
    at_context,
    main_context,
    measured,
    ratio_at,
    series_of,
    shown,
    table,
    text_name,
    usual,
)
from kvferry.codec.lab.plot_rate import RatePoint, draw_rate

RATE, MSE, LAYERS = "report_rate.png", "report_mse.png", "report_layers.png"
_NEAR_RATIO = 4.0
_KL = 0.01
_MAX_LINES = 10


def fidelity_section(results: Sequence[Result], folder: Path) -> list[str]:
    """Pictures and tables of runs with the user's calibrations, then of others."""
    mine = [result for result in results if not result.run.codec.calibration]
    context, at_main = main_context(mine), usual(mine)
    own = series_of(at_main)
    apart = _calibrations([r for r in results if r.run.codec.calibration], context)
    if not own:
        return ["Nothing was measured with the usual calibrations.", "", *apart]
    texts = sorted({text_name(text) for series in own for text in series.texts})
    about = (
        f"{context:,} tokens coded, {at_main[0].run.continuation} predicted, on {', '.join(texts)}"
    )
    others = len(measured(at_context(mine, context))) - len(measured(at_main))
    left = f" Not in here: {others} that predict more or fewer." if others else ""
    lines = [f"{about[0].upper()}{about[1:]}; means over texts.{left}", ""]
    lines += _rate(own, about, folder)
    lines += _table(own)
    lines += _by_text(own)
    lines += _mse(own, about, folder)
    lines += _layers(own, about, folder)
    return [*lines, *_lengths(mine, context), *apart]


def rate_points(own: Sequence[Series]) -> list[RatePoint]:
    """A point for each text of each series that lost something."""
    points = []
    for series in own:
        for result in series.results:
            ratio, kl = result.number("compression_ratio"), result.number("kl_mean")
            if ratio is None or kl is None:
                continue
            ppl = result.number("ppl_delta_pct") or 0.0
            options = result.run.codec.options
            text = result.run.text
            points.append(RatePoint(series.label, series.index, options, text, ratio, kl, ppl))
    return points


def _styles(own: Sequence[Series]) -> dict[str, tuple[str, str, str]]:
    return style.looks(series.label for series in own)


def _rate(own: Sequence[Series], about: str, folder: Path) -> list[str]:
    points = rate_points(own)
    if not points:
        return ["No rate was measured.", ""]
    below = f"{about}; down and right is better"
    draw_rate(points, "Bytes against fidelity of the KV cache", below, folder / RATE)
    return [f"![ratio against KL]({RATE})", ""]


def _table(own: Sequence[Series]) -> list[str]:
    head = (
        "codec", "ratio", "bits", "KL (nats)", "perplexity", "same top-1", "same greedy tokens",
        "logit cosine", "K error", "V error",
    )  # fmt: skip
    rows = [
        (
            series.shown,
            shown(series.middle("compression_ratio"), ".1f", "x"),
            shown(series.mean("bits_per_value"), ".2f"),
            shown(series.mean("kl_mean"), ".2g"),
            shown(series.mean("ppl_delta_pct"), "+.2f", " %"),
            percent(series.mean("top1_agreement")),
            percent(series.mean("token_match")),
            shown(series.mean("logit_cosine"), ".5f"),
            percent(series.mean("errors", "k", "relative")),
            percent(series.mean("errors", "v", "relative")),
        )
        for series in own
    ]
    note = (
        "Errors of K and V are mean absolute errors over mean absolute values, keys rotated; "
        "codecs that drop or merge tokens have none (-). Greedy tokens run freely, so that "
        "one difference makes all that follow it differ."
    )
    return [*table(head, rows), "", note, ""]


def _by_text(own: Sequence[Series]) -> list[str]:
    """Of each codec that comes to one loss, how far on which text."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for point in rate_points(own):
        texts = found.setdefault(point.codec, {})
        texts.setdefault(text_name(point.text), []).append((point.ratio, point.kl))
    names = sorted({name for texts in found.values() for name in texts})
    rows = [
        (codec, *(shown(ratio_at(texts.get(name, []), _KL), ".1f", "x") for name in names))
        for codec, texts in found.items()
    ]
    rows = [row for row in rows if set(row[1:]) != {"-"}]
    if not rows:
        return []
    note = (
        f"Ratio at which each codec comes to a KL of {_KL:g} on each text. Calibrations choose "
        "steps and bit plans on the beginnings of prose and source; a text from a file has had "
        "no part in them."
    )
    return [note, "", *table(("codec", *names), rows), ""]


def percent(value: float | None) -> str:
    """A share as per cent."""
    return shown(None if value is None else 100 * value, ".1f", " %")


def _mse(own: Sequence[Series], about: str, folder: Path) -> list[str]:
    found = [s for s in own if s.middle("errors", "k", "mse") is not None]
    if not found:
        return ["No errors of K and V were measured.", ""]
    figure = style.new_figure(9.6, 4.6)
    panels = figure.subplots(1, 2, sharex=True)
    style.title(figure, panels[0], "Squared error against compression", about)
    styles = _styles(own)
    for axes, stream in zip(panels, ("k", "v"), strict=True):
        for label, (colour, marker, dash) in styles.items():
            rows = sorted(
                (ratio, max(mse, 1e-9))
                for s in found
                if s.label == label
                and (ratio := s.middle("compression_ratio")) is not None
                and (mse := s.middle("errors", stream, "mse")) is not None
            )
            if rows:
                axes.plot(
                    *zip(*rows, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=dash,
                    label=label,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        style.plain_log_axis(axes.xaxis, *axes.get_xlim(), dense=True)
        axes.set_xlabel("compression ratio")
        axes.set_ylabel(f"mean squared error of {stream.upper()}")
        style.tidy(axes)
    panels[1].legend(frameon=False)
    style.save_png(figure, folder / MSE)
    return [f"![MSE against ratio]({MSE})", ""]


def _layers(own: Sequence[Series], about: str, folder: Path) -> list[str]:
    """One setting of each codec: that nearest to a ratio that all reach."""
    chosen: dict[str, Series] = {}
    for series in own:
        ratio = series.middle("compression_ratio")
        if ratio is None or not _by_layer(series, "k"):
            continue
        before = chosen.get(series.label)
        far = abs(ratio - _NEAR_RATIO)
        if before is None or far < abs((before.middle("compression_ratio") or 0) - _NEAR_RATIO):
            chosen[series.label] = series
    if not chosen:
        return []
    figure = style.new_figure(9.6, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    style.title(figure, panels[0], "Error of each layer", f"{about}; nearest to {_NEAR_RATIO:g}x")
    styles = _styles(own)
    for axes, stream in zip(panels, ("k", "v"), strict=True):
        for series in list(chosen.values())[:_MAX_LINES]:
            colour, marker, dash = styles[series.label]
            size = shown(series.middle("compression_ratio"), ".1f", "x")
            axes.plot(
                [max(v, 1e-6) for v in _by_layer(series, stream)],
                color=colour,
                marker=marker,
                linestyle=dash,
                markersize=3,
                label=f"{series.label} {size}",
            )
        axes.set_yscale("log")
        style.plain_log_axis(axes.yaxis, *axes.get_ylim(), dense=True)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"mean error of {stream.upper()} / mean size")
        style.tidy(axes)
    panels[1].legend(frameon=False, fontsize=8)
    style.save_png(figure, folder / LAYERS)
    return [f"![error by layer]({LAYERS})", ""]


def _by_layer(series: Series, stream: str) -> list[float]:
    """Means over texts."""
    found = []
    for result in series.results:
        errors = result.metrics.get("errors")
        own = errors.get(stream) if isinstance(errors, dict) else None
        if isinstance(own, dict) and own.get("relative_by_layer"):
            found.append([float(v) for v in own["relative_by_layer"]])
    return [sum(column) / len(column) for column in zip(*found, strict=False)]


def _lengths(results: Sequence[Result], usual: int) -> list[str]:
    lengths = sorted({r.run.context for r in measured(results)} - {usual})
    if not lengths:
        return ["No other lengths were measured.", ""]
    rows = []
    for length in lengths:
        rows += [
            (
                f"{length:,}",
                series.shown,
                ", ".join(sorted({text_name(r.run.text) for r in series.results})),
                shown(series.middle("compression_ratio"), ".2f", "x"),
                shown(series.mean("kl_mean"), ".2g"),
                percent(series.mean("top1_agreement")),
            )
            for series in series_of(at_context(results, length))
        ]
    head = ("tokens coded", "codec", "texts", "ratio", "KL (nats)", "same top-1")
    return ["### Short and long", "", *table(head, rows), ""]


def _calibrations(results: Sequence[Result], context: int) -> list[str]:
    """What was calibrated on one kind of text, on others; at one length, ``context`` if it can."""
    found = measured(usual(at_context(measured(results), context) or results))
    if not found:
        return ["Nothing was measured with calibrations of other texts.", ""]
    texts = sorted({result.run.text for result in found})
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in found:
        codec = result.run.codec
        rows.setdefault((codec.described(), codec.calibration), {})[result.run.text] = result
    cells = [
        (codec, calibration, *(_cell(own.get(text)) for text in texts))
        for (codec, calibration), own in sorted(rows.items())
    ]
    head = ("codec", "calibrated on", *(f"{text_name(text)}: ratio, KL" for text in texts))
    about = f"{found[0].run.context:,} tokens coded:"
    return ["### Calibrated on one text, tested on another", "", about, "", *table(head, cells), ""]


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    ratio = shown(result.number("compression_ratio"), ".1f", "x")
    return f"{ratio}, {shown(result.number('kl_mean'), '.2g')}"
