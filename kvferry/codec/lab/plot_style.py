"""What the figures have in common: size, colours, and a PNG without a display."""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvferry.codec.registry import codec_names
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito (2008), told apart with any kind of colour vision, and two of Tol's (2021) that
# are as dark or light as none of those. Markers differ as well.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
    "#882255", "#999933",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*")
GREY = "#555555"
_FEW_DECADES, _MANY_DECADES = 1.6, 2.5
_LINES = ("-", "--", ":", "-.")
_PLAIN = ("raw", "zstd")  # without loss: in no picture
DPI = 150


def looks(labels: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and line for each label: a codec's colour is the same in all pictures.

    Args: labels: begin with the codec's name; several of one codec differ in marker and line.
    """
    codecs = [name for name in codec_names() if name not in _PLAIN]
    places: dict[str, int] = {}
    counts: dict[int, int] = {}
    found = {}
    for label in dict.fromkeys(labels):
        name = re.split(r"[ ,]", label, maxsplit=1)[0]
        known = codecs.index(name) if name in codecs else places.setdefault(name, len(places))
        place = known if name in codecs else len(codecs) + known
        again = counts[place] = counts.get(place, -1) + 1
        marker = MARKERS[(place + 3 * again) % len(MARKERS)]
        found[label] = COLOURS[place % len(COLOURS)], marker, _LINES[again % len(_LINES)]
    return found


def check_matplotlib() -> None:
    """Raises: ConfigError: it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as exc:
        allowed = "installed: pip install 'kvferry[plot]'"
        raise ConfigError("matplotlib", "missing", allowed) from exc


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches, that nothing but the caller holds."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_png(figure: "Figure", path: Path) -> int:
    """Write the figure; never half of it. Returns: bytes. Raises: ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(str(temporary), format="png")
        temporary.replace(path)
        return path.stat().st_size
    except OSError as exc:
        raise ConfigError("--out", str(path), f"a file to write ({exc.strerror or exc})") from exc
    finally:
        temporary.unlink(missing_ok=True)


def title(figure: "Figure", axes: "Axes", first: str, second: str) -> None:
    """A headline, and above the topmost axes, smaller, what the reader must know."""
    figure.suptitle(first, x=0.02, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(second, loc="left", fontsize=9, color=GREY)


def plain_log_axis(axis: "Axis", low: float, high: float, *, dense: bool) -> None:
    """Ticks of a logarithmic axis as plain numbers.

    Args:
        dense: as many ticks as have room; else two a decade.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    decades = math.log10(high / low) if 0 < low < high else 0.0
    mantissas: tuple[float, ...] = (1.0, 3.0)
    if dense and decades < _FEW_DECADES:
        mantissas = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    elif dense and decades < _MANY_DECADES:
        mantissas = (1.0, 2.0, 5.0)
    ticks = [m * 10.0**e for e in range(-12, 9) for m in mantissas]
    axis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def tidy(axes: "Axes") -> None:
    """A light grid, and no frame where there is nothing to bound."""
    axes.grid(True, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
