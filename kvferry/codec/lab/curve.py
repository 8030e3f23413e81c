"""Rate against KL on texts that the bases have not seen: predicted and measured."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.base import Codec, FloatArray, PageTensors
from kvferry.codec.calibration import (
    GroupCalibration,
    RateDistortion,
    StreamCurve,
    TextCurve,
)
from kvferry.codec.calibration_curve import mean_curves, total_prediction
from kvferry.codec.lab.coding import (
    GroupSource,
    decode_pages,
    encode_page,
    group_codecs,
    join_layers,
    page_meta,
)
from kvferry.codec.lab.compare import compare
from kvferry.codec.lab.forward import prefill
from kvferry.codec.lab.plan import COMPARE_WORK, POINT_WORK, HeldText, Plan
from kvferry.codec.mlx import adapters
from kvferry.codec.rope import positions_of, undo
from kvferry.proto import container
from kvferry.proto.keys import DEFAULT_PAGE_TOKENS, SINK_TOKENS, WINDOW_TOKENS

# Stream -> (layers, heads, dim, dim), A'A of the calibration's weights A.
Metric = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True, eq=False)
class CodedGroup:
    """One layer group at one step: what it cost, and what it came back as."""

    pages: Sequence[PageTensors]
    bits: Mapping[str, float]
    error: Mapping[str, float]


def metric_of(group: GroupCalibration) -> Metric:
    """In which squared error is predicted KL: F with its ridge, as the weights have it.

    The ridge stands for what few passes have not seen; without it predictions are too
    low by another half.
    """
    weights = {name: stream.weight for name, stream in group.streams.items()}
    return {n: np.matmul(w.swapaxes(-1, -2), w) for n, w in weights.items() if w is not None}


def code_group(exact: Sequence[PageTensors], codec: Codec, group: GroupCalibration) -> CodedGroup:
    """Encode and decode pages of one layer group, as the hook would.

    Returns: with stored bits per value and, summed over values and averaged over tokens,
        the squared error in the weighted space, by stream.
    Raises: CodecError.
    """
    metric = metric_of(group)
    stored, sizes = [], dict.fromkeys(exact[0].streams, 0.0)
    for index, page in enumerate(exact):
        meta = page_meta(group.model_id, index, group.layers[1], group.heads[1])
        stored.append(encode_page(codec, page, meta))
        _share_size(stored[-1].data, page, sizes)
    pages = decode_pages(stored, group.model_id, GroupSource([group]))
    errors = dict.fromkeys(sizes, 0.0)
    tokens = 0
    for page, found in zip(exact, pages, strict=True):
        tokens += page.tokens[1] - page.tokens[0]
        for name in errors:
            errors[name] += weighted_error(page, found, name, group, metric.get(name))
    coded = max(1, tokens - max(0, SINK_TOKENS - exact[0].tokens[0]))
    values = {name: sum(page.streams[name].data.size for page in exact) for name in sizes}
    return CodedGroup(
        pages,
        {name: 8 * size / values[name] for name, size in sizes.items()},
        {name: error / coded for name, error in errors.items()},
    )


def _share_size(data: bytes | memoryview, page: PageTensors, sizes: dict[str, float]) -> None:
    """Add a blob's bytes to its streams'; what belongs to none is shared by values."""
    total = sum(stream.data.size for stream in page.streams.values())
    left = float(len(data))
    for name, section in container.parse(data).sections.items():
        owner = name.partition("/")[0]
        if owner in sizes:
            sizes[owner] += len(section.data)
            left -= len(section.data)
    for name, stream in page.streams.items():
        sizes[name] += left * stream.data.size / total


def weighted_error(
    exact: PageTensors,
    found: PageTensors,
    name: str,
    group: GroupCalibration,
    metric: FloatArray | None,
) -> float:
    """Sum over a page's tokens of e' A'A e, keys with RoPE undone."""
    error = found.streams[name].float32() - exact.streams[name].float32()
    ropes, total = group.ropes.get(name), 0.0
    for layer in range(error.shape[0]):
        part = error[layer]
        if ropes is not None:
            part = undo(part, ropes[layer], positions_of(exact.tokens))
        if metric is None:
            total += float(np.square(part, dtype=np.float64).sum())
            continue
        weighted = np.matmul(part, metric[layer])
        total += float((weighted * part).sum(dtype=np.float64))
    return total


def measure_text(
    model: Any,
    text: HeldText,
    groups: Sequence[GroupCalibration],
    steps: Sequence[float],
    plan: Plan,
    advance: Callable[[float], None],
) -> tuple[TextCurve, list[StreamCurve]]:
    """One text through the model, coded at each step, and what that cost.

    Args:
        text: ``plan.held_tokens`` of it.
        advance: called with work done, in units of `Plan.work`.
    """
    layers = (0, groups[-1].layers[1])
    held = plan.held_context + WINDOW_TOKENS
    exact = make_prompt_cache(model)
    prefill(model, text.tokens[:held], exact, advance)
    snapshot = adapters.snapshot(exact, held, latent="latent" in groups[0].streams)
    window = snapshot.page(layers, (plan.held_context, held))
    edges = [*range(0, plan.held_context, DEFAULT_PAGE_TOKENS), plan.held_context]
    spans = list(itertools.pairwise(edges))
    pages = [[snapshot.page(group.layers, span) for span in spans] for group in groups]
    restored: list[list[Any]] = []
    coded_at: list[list[CodedGroup]] = []
    for step in steps:
        codecs = group_codecs("ferry", {"step": step}, [g.layers for g in groups], groups)
        coded = [
            code_group(exact_pages, codecs[group.layers], group)
            for exact_pages, group in zip(pages, groups, strict=True)
        ]
        joined = [join_layers([c.pages[i] for c in coded]) for i in range(len(spans))]
        cache = make_prompt_cache(model)
        snapshot.refill(cache, [*joined, window])
        restored.append(cache)
        coded_at.append([CodedGroup([], c.bits, c.error) for c in coded])
        advance(POINT_WORK)
    del pages
    per_token = COMPARE_WORK * (1 + len(steps))
    follows = text.tokens[held : plan.held_tokens]
    found = compare(model, exact, restored, follows, lambda n: advance(n * per_token))
    streams = stream_curves(groups, coded_at)
    return (
        TextCurve(
            name=text.name,
            tokens=plan.held_continuation,
            bits=total_bits(streams),
            kl=tuple(max(0.0, result.kl_mean) for result in found),
            predicted=total_prediction(streams),
        ),
        streams,
    )


def stream_curves(
    groups: Sequence[GroupCalibration], coded_at: Sequence[Sequence[CodedGroup]]
) -> list[StreamCurve]:
    """What `code_group` found at each step, by group and stream."""
    return [
        StreamCurve(
            layers=group.layers,
            stream=name,
            width=(group.layers[1] - group.layers[0]) * stream.heads * stream.dim,
            bits=tuple(coded[index].bits[name] for coded in coded_at),
            kl=tuple(coded[index].error[name] for coded in coded_at),
        )
        for index, group in enumerate(groups)
        for name, stream in sorted(group.streams.items())
    ]


def total_bits(streams: Sequence[StreamCurve]) -> tuple[float, ...]:
    """Bits per value of the whole model at each step."""
    width = sum(stream.width for stream in streams)
    rows = [[stream.width * b / width for b in stream.bits] for stream in streams]
    return tuple(sum(column) for column in zip(*rows, strict=True))


def rate_distortion(
    steps: Sequence[float],
    found: Sequence[tuple[TextCurve, Sequence[StreamCurve]]],
    *,
    scale: float = 1.0,
) -> RateDistortion:
    """The curves of several texts as one.

    Args:
        steps: falling.
        scale: of the predictions; identity weights predict in no unit of their own.
    """
    streams = mean_curves([curves for _, curves in found])
    return RateDistortion(
        steps=tuple(steps),
        streams=tuple(replace(curve, kl=tuple(scale * kl for kl in curve.kl)) for curve in streams),
        texts=tuple(
            replace(text, predicted=tuple(scale * kl for kl in text.predicted)) for text, _ in found
        ),
    )
