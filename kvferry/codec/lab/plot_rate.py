"""Measured compression against measured KL, for several codecs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.calibration import CurvePoint, GroupCalibration
from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.evaluate import Prepared, measure
from kvferry.codec.lab.forward import Done
from kvferry.codec.lab.knobs import Knob, Options

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Below this KL is what float32 leaves between two runs of the same model.
FLOOR_KL = 1e-6
_MOST_BANDS = 4  # of more, bands hide each other


@dataclass(frozen=True, slots=True)
class RatePoint:
    """One codec at one setting on one text.

    Attributes:
        setting: index of the setting, from fine to coarse.
        ratio: fp16 bytes of the pages over the bytes shipped for them.
        kl: mean, in nats per token.
    """

    codec: str
    setting: int
    options: Options
    text: str
    ratio: float
    kl: float
    ppl_delta_pct: float

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "codec": self.codec,
            "options": dict(self.options),
            "text": self.text,
            "compression_ratio": self.ratio,
            "kl_mean": self.kl,
            "ppl_delta_pct": self.ppl_delta_pct,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A codec to measure."""

    knob: Knob
    groups: Sequence[GroupCalibration] = ()
    curve: Sequence[CurvePoint] = ()


def spread_out(settings: Sequence[float], count: int) -> list[float]:
    """``count`` of the settings, first and last among them; all if there are no more."""
    if count >= len(settings):
        return list(settings)
    if count == 1:
        return [settings[len(settings) // 2]]
    last = len(settings) - 1
    return [settings[round(index * last / (count - 1))] for index in range(count)]


def rate_points(
    texts: Mapping[str, Prepared],
    codecs: Sequence[Measured],
    points: int,
    done: Done,
    note: Callable[[str], None],
) -> list[RatePoint]:
    """Measure every codec at some of its settings on every text.

    Args:
        points: settings per codec, at most.
        done: called with numbers of tokens run.
        note: called with what is about to be measured.
    Raises: CodecError, ModelError.
    """
    found = []
    for codec in codecs:
        for index, value in enumerate(spread_out(codec.knob.settings, points)):
            options = codec.knob.options(value)
            for name, text in texts.items():
                note(f"{codec.knob.codec} {name}")
                setup = text.setup(codec.knob.codec, options, codec.groups, codec.curve)
                result = measure(text, setup, done)
                ratio = 2 * result.pages.values / result.pages.blob_bytes
                kl, ppl = result.found.kl_mean, result.found.ppl_delta_pct
                found.append(RatePoint(setup.codec, index, options, name, ratio, kl, ppl))
    return found


def draw_rate(points: Sequence[RatePoint], headline: str, below: str, path: Path) -> int:
    """A line per codec through the medians over texts, its band their whole spread.

    Returns: bytes written. Raises: ConfigError.
    """
    figure = style.new_figure(8.0, 5.6)
    axes = figure.add_subplot()
    style.title(figure, axes, headline, below)
    axes.set_xscale("log")
    axes.set_yscale("log")
    names = list(dict.fromkeys(point.codec for point in points))
    for name, look in style.looks(names).items():
        own = [point for point in points if point.codec == name]
        _draw_codec(axes, own, look, bands=len(names) <= _MOST_BANDS)
    texts = len({point.text for point in points})
    kls = [max(point.kl, FLOOR_KL) for point in points]
    ratios = [point.ratio for point in points]
    axes.set_xlim(min(ratios) / 1.1, max(ratios) * 1.1)
    axes.set_ylim(min(kls) / 1.5, max(kls) * 1.5)
    style.plain_log_axis(axes.xaxis, *axes.get_xlim(), dense=True)
    style.plain_log_axis(axes.yaxis, *axes.get_ylim(), dense=False)
    axes.set_xlabel("compression ratio (fp16 bytes / bytes shipped, headers included)")
    axes.set_ylabel("mean KL (nats per token)")
    band = ", band: their spread" if len(names) <= _MOST_BANDS else ""
    spread = f"line: median of {texts} texts{band}" if texts > 1 else "one text"
    legend: dict[str, object] = {"frameon": False, "title_fontsize": 8, "alignment": "left"}
    if len(names) <= _MOST_BANDS:
        axes.legend(title=spread, loc="lower right", **legend)
    else:  # beside the lines: of so many some would run through it
        figure.legend(title=spread, loc="outside right upper", **legend)
    style.tidy(axes)
    return style.save_png(figure, path)


def _draw_codec(
    axes: "Axes", points: Sequence[RatePoint], look: tuple[str, str, str], *, bands: bool
) -> None:
    colour, marker, dash = look
    settings: dict[int, list[RatePoint]] = {}
    for point in points:
        settings.setdefault(point.setting, []).append(point)
    rows = sorted(
        (
            _middle([p.ratio for p in own]),
            _middle([max(p.kl, FLOOR_KL) for p in own]),
            min(max(p.kl, FLOOR_KL) for p in own),
            max(max(p.kl, FLOOR_KL) for p in own),
        )
        for own in settings.values()
    )
    ratios, median, low, high = (list(column) for column in zip(*rows, strict=True))
    if bands:
        axes.fill_between(ratios, low, high, color=colour, alpha=0.18, linewidth=0)
    name = points[0].codec
    axes.plot(ratios, median, dash, color=colour, marker=marker, linewidth=2, label=name)
    kls = [max(p.kl, FLOOR_KL) for p in points]
    axes.scatter([p.ratio for p in points], kls, color=colour, s=7, alpha=0.6, linewidth=0)


def _middle(values: Sequence[float]) -> float:
    """Median where the axis is logarithmic."""
    return math.exp(statistics.median(math.log(value) for value in values))
