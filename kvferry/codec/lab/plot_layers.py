"""Which layers and heads of a cache matter: predicted from Fisher weights, and measured.

Predicted is what the calibration's weights say of an error: with A the weight of a head,
an error e in every token costs e' A'A e nats a token (`kvferry.codec.lab.fisher`; the
weights hold a ridge, which raises the prediction of heads that matter in few directions).
Measured is what the model loses when one stream of one layer alone is coded coarsely.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import PageTensors, Stream
from kvferry.codec.calibration import GroupCalibration
from kvferry.codec.lab import plot_style as style
from kvferry.codec.lab.coding import Coder, GroupSource, group_codecs
from kvferry.codec.lab.compare import compare_with
from kvferry.codec.lab.evaluate import Prepared
from kvferry.codec.rope import positions_of, undo
from kvferry.errors import ConfigError
from kvferry.proto.keys import SINK_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Array = npt.NDArray[np.float64]
Report = Callable[[int, str], None]
RELATIVE_ERROR = 0.1
COARSE: tuple[str, Mapping[str, object]] = ("affine", {"bits": 3})
_FLOOR = 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class LayerMap:
    """Sensitivities of a model on one text.

    Attributes:
        heads: stream -> (layers, heads): predicted KL in nats per token of an error of
            `RELATIVE_ERROR` of that head's root mean square about its mean.
        error: stream -> (layers,): root mean square of what `COARSE` left of the
            stream, as a share of the same.
        predicted: stream -> (layers,): KL of just that error, in nats per token.
        measured: stream -> (layers,): the KL that it had; empty where not measured.
    """

    heads: Mapping[str, _Array]
    error: Mapping[str, _Array]
    predicted: Mapping[str, _Array]
    measured: Mapping[str, _Array]

    def to_json(self) -> dict[str, object]:
        """For ``--json``; lists in layer order."""
        return {
            "relative_error": RELATIVE_ERROR,
            "predicted_kl_per_head": {n: a.tolist() for n, a in self.heads.items()},
            "coarse_codec": {"codec": COARSE[0], "options": dict(COARSE[1])},
            "coarse_relative_error": {n: a.tolist() for n, a in self.error.items()},
            "coarse_kl_predicted": {n: a.tolist() for n, a in self.predicted.items()},
            "coarse_kl_measured": {n: a.tolist() for n, a in self.measured.items()},
        }


def layer_map(
    text: Prepared, groups: Sequence[GroupCalibration], *, measured: bool, report: Report
) -> LayerMap:
    """Predict, and measure layer by layer.

    Args:
        report: called with tokens run and what is being measured: the continuation
            once for each layer and stream.
    Raises: ConfigError: a calibration without weights; CodecError; ModelError.
    """
    if any(stream.weight is None for group in groups for stream in group.streams.values()):
        allowed = "with Fisher weights: run `kvferry calibrate` without --weights identity"
        raise ConfigError("calibration", "identity weights", allowed)
    layers = (0, text.shape.layers)
    exact = text.snapshot.page(layers, (0, text.context))
    coder = Coder(
        text.model_id, group_codecs(*COARSE, [layers]), GroupSource(), text.shape.kv_heads
    )
    coarse = _with_sinks(exact, _joined(coder.run(text.snapshot, (0, text.context)).pages))
    heads, error, predicted = {}, {}, {}
    for name in exact.streams:
        parts = [predict(exact, coarse, name, group) for group in groups]
        heads[name], error[name], predicted[name] = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
    found = _measure(text, exact, coarse, report) if measured else {}
    return LayerMap(heads, error, predicted, found)


def _joined(pages: Sequence[PageTensors]) -> PageTensors:
    first = pages[0]
    streams = {
        name: Stream(
            name, np.concatenate([p.streams[name].data for p in pages], axis=2), stream.dtype
        )
        for name, stream in first.streams.items()
    }
    return PageTensors(first.layers, first.heads, (0, pages[-1].tokens[1]), streams)


def _with_sinks(exact: PageTensors, coarse: PageTensors) -> PageTensors:
    """The first tokens are never coded coarsely."""
    for name, stream in coarse.streams.items():
        stream.data[:, :, :SINK_TOKENS] = exact.streams[name].data[:, :, :SINK_TOKENS]
    return coarse


def predict(
    exact: PageTensors, coarse: PageTensors, name: str, group: GroupCalibration
) -> tuple[_Array, _Array, _Array]:
    """What the weights say of one stream of a group's layers.

    Args:
        exact, coarse: pages with all of the group's layers, from token 0 on; their first tokens
            are exact and left out.
    Returns: (layers, heads), (layers,) and (layers,): ``heads``, ``error`` and
        ``predicted`` of `LayerMap`.
    """
    own = group.streams[name]
    values = _coded(exact, name, group)
    error = _coded(coarse, name, group) - values
    centred = values - values.mean(axis=2, keepdims=True)
    energy = np.square(centred).sum(axis=3).mean(axis=2)
    weight = np.asarray(own.weight, dtype=np.float64)
    # White noise of variance s in each of d dimensions costs s tr(A'A), and its energy is d s.
    trace = np.square(weight).sum(axis=(2, 3))
    heads = RELATIVE_ERROR**2 * energy / own.dim * trace
    weighted = np.matmul(error, weight.swapaxes(-1, -2))
    predicted = np.square(weighted).sum(axis=3).mean(axis=2).sum(axis=1)
    left = np.square(error).sum(axis=3).mean(axis=2).sum(axis=1)
    return heads, np.sqrt(left / energy.sum(axis=1)), predicted


def _coded(page: PageTensors, name: str, group: GroupCalibration) -> _Array:
    """A group's layers of a stream behind the sinks, RoPE undone: (layers, heads, tokens, dim)."""
    values = page.cut_layers(group.layers).streams[name].float32()
    ropes = group.ropes.get(name)
    if ropes is not None:
        positions = positions_of(page.tokens)
        values = np.stack([undo(v, r, positions) for v, r in zip(values, ropes, strict=True)])
    return values[:, :, SINK_TOKENS:].astype(np.float64)


def _measure(
    text: Prepared, exact: PageTensors, coarse: PageTensors, report: Report
) -> dict[str, _Array]:
    layers, held = text.shape.layers, text.snapshot.tokens
    window = text.snapshot.page((0, layers), (text.context, held))
    found: dict[str, _Array] = {}
    run = 0
    for name, stream in exact.streams.items():
        kls = []
        for layer in range(layers):
            data = stream.data.copy()
            data[layer] = coarse.streams[name].data[layer]
            changed = {**exact.streams, name: Stream(name, data, stream.dtype)}
            page = PageTensors(exact.layers, exact.heads, exact.tokens, changed)
            cache: list[Any] = make_prompt_cache(text.model)
            text.snapshot.refill(cache, [page, window])
            kls.append(compare_with(text.model, text.reference, [cache])[0].kl_mean)
            run += text.continuation
            report(run, f"layer {layer} {name}")
        found[name] = np.array(kls)
    return found


def draw_layers(found: LayerMap, headline: str, below: str, path: Path) -> int:
    """Heat maps of heads over layers, and below them what one layer costs.

    Returns: bytes written. Raises: ConfigError.
    """
    layers, heads = next(iter(found.heads.values())).shape
    height = min(0.34 * heads, 2.4) + 0.6
    figure = style.new_figure(max(8.0, min(0.28 * layers + 2.5, 16.0)), 2 * height + 4.2)
    panels = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [height, height, 3.0]}
    )
    style.title(figure, panels[0], headline, below)
    _draw_heads(figure, panels[:2], found)
    _draw_measured(panels[2], found)
    return style.save_png(figure, path)


def _draw_heads(figure: "Figure", panels: Sequence["Axes"], found: LayerMap) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    every = np.concatenate([array.ravel() for array in found.heads.values()])
    norm = LogNorm(max(float(every.min()), _FLOOR), max(float(every.max()), 2 * _FLOOR))
    image = None
    for axes, (name, array) in zip(panels, found.heads.items(), strict=True):
        shown = np.maximum(array.T, _FLOOR)
        image = axes.imshow(shown, aspect="auto", cmap="cividis", norm=norm, origin="lower")
        axes.set_ylabel(f"{name.upper()} head")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if image is not None:
        bar = figure.colorbar(image, ax=list(panels), pad=0.01)
        bar.set_label(f"predicted KL, nats per token,\nat {RELATIVE_ERROR:.0%} error", fontsize=9)


def _draw_measured(axes: "Axes", found: LayerMap) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = np.inf, _FLOOR
    for index, (name, predicted) in enumerate(found.predicted.items()):
        colour, marker = style.COLOURS[index], style.MARKERS[index]
        x = np.arange(len(predicted))
        label = name.upper()
        axes.plot(x, predicted, color=colour, linestyle="--", label=f"{label} predicted")
        low, high = min(low, predicted.min()), max(high, predicted.max())
        if name in found.measured:
            measured = np.maximum(found.measured[name], _FLOOR)
            axes.plot(x, measured, color=colour, marker=marker, ms=5, label=f"{label} measured")
            low, high = min(low, measured.min()), max(high, measured.max())
    axes.set_yscale("log")
    axes.set_ylim(max(low, _FLOOR) / 1.5, high * 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    options = " ".join(f"{key}={value}" for key, value in COARSE[1].items())
    axes.set_xlabel("layer")
    axes.set_ylabel(f"KL, nats per token, with only\nthis layer in {COARSE[0]} {options}")
    axes.legend(
        frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, fontsize=9
    )
    style.tidy(axes)
