"""Text through the live model, and out comes what `ferry` needs to know about it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from kvferry.codec.calibration import (
    CalibrationSet,
    CurvePoint,
    GroupAccumulator,
    GroupCalibration,
    GroupEntry,
    fit_group,
    layer_groups,
)
from kvferry.codec.lab.coding import Coder, GroupSource, group_codecs
from kvferry.codec.lab.compare import compare
from kvferry.codec.lab.fisher import CONTINUATION, Fisher
from kvferry.codec.lab.forward import prefill
from kvferry.codec.mlx import adapters
from kvferry.codec.mlx.device import device_products
from kvferry.codec.mlx.load import LoadedModel
from kvferry.codec.mlx.rope import rope_specs
from kvferry.codec.mlx.shape import ModelShape, describe
from kvferry.errors import ConfigError
from kvferry.proto.keys import WINDOW_TOKENS

MIN_TOKENS = 512
Report = Callable[[float, str], None]
# One token of prefill is one unit of work; the rest was measured in it.
_PASS_WORK, _FIT_WORK, _POINT_WORK = 3.2 * CONTINUATION, 50.0, 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and on how much text. Sizes in tokens.

    Attributes:
        tokens: of text that the bases are fitted on.
        sequence: such many at a time; each sequence ends with one backward pass.
        ridge: see `Fisher.weights`; None: identity weights, no backward passes.
        held_context, held_continuation: of text after the rest, for the curve.
        curve_bits: where the curve is measured, as estimated bits per value.
    """

    tokens: int = 8192
    sequence: int = 1024
    ridge: float | None = 1.0
    held_context: int = 1024
    held_continuation: int = 384
    curve_bits: tuple[float, ...] = (1.6, 0.9, 0.6, 0.4, 0.25)

    def __post_init__(self) -> None:
        if self.tokens < MIN_TOKENS:
            raise ConfigError("tokens", self.tokens, f"at least {MIN_TOKENS}")

    @property
    def fitted_tokens(self) -> int:
        """Tokens of text to fit on, with those that follow the last sequence."""
        return self.tokens + CONTINUATION

    @property
    def held_tokens(self) -> int:
        """Tokens of text to measure the curve on."""
        return self.held_context + WINDOW_TOKENS + self.held_continuation + 1

    def work(self, layers: int) -> float:
        """The whole for a model of so many layers, in prefilled tokens."""
        passes = 0 if self.ridge is None else -(-self.tokens // self.sequence)
        points = len(self.curve_bits)
        compared = (1 + points) * (self.held_continuation * 1.2 + _POINT_WORK)
        held = self.held_context + WINDOW_TOKENS + compared if points else 0
        return self.tokens + passes * _PASS_WORK + layers * _FIT_WORK + held


def calibrate(
    loaded: LoadedModel,
    model_id: bytes,
    tokens: Sequence[int],
    source: str,
    plan: Plan,
    report: Report,
) -> tuple[CalibrationSet, list[GroupCalibration]]:
    """Fit all layer groups and measure their rate against KL.

    Args:
        tokens: ``plan.fitted_tokens``, then ``plan.held_tokens`` of them.
        source: where the text came from, for people.
        report: called with work done so far, of ``plan.work``, and a note.
    Raises: ModelError: a cache that is not supported; ConfigError: too little text.
    """
    wanted = plan.fitted_tokens + plan.held_tokens
    if len(tokens) != wanted:
        raise ConfigError("text", f"{len(tokens)} tokens", f"{wanted} tokens")
    shape = describe(loaded.model, loaded.config)
    run = _Run(loaded.model, model_id, shape, plan, report)
    groups = run.fit(tokens, source)
    curve = run.curve(tokens[plan.fitted_tokens :], groups) if plan.curve_bits else ()
    found = CalibrationSet(
        model_id=model_id,
        model_layers=shape.layers,
        model_heads=shape.kv_heads,
        groups=tuple(GroupEntry(g.id, g.layers, g.heads) for g in groups),
        curve=tuple(curve),
        text_source=source,
        tokens=plan.tokens,
    )
    return found, groups


class _Run:
    def __init__(
        self, model: Any, model_id: bytes, shape: ModelShape, plan: Plan, report: Report
    ) -> None:
        self._model, self._model_id, self._shape, self._plan = model, model_id, shape, plan
        self._report = report
        self._done = 0.0
        self._ropes = {name: rope_specs(model) for name, s in shape.streams.items() if s.rotated}

    def _advance(self, work: float, note: str) -> None:
        self._done += work
        self._report(self._done, note)

    def fit(self, tokens: Sequence[int], source: str) -> list[GroupCalibration]:
        """Gather, then fit group by group."""
        shape, plan = self._shape, self._plan
        heads = (0, shape.kv_heads)
        seen = [
            GroupAccumulator(
                model_id=self._model_id,
                layers=(a, b),
                heads=heads,
                ropes={name: specs[a:b] for name, specs in self._ropes.items()},
            )
            for a, b in layer_groups(shape.layers, shape.kv_heads, shape.head_dim)
        ]
        fisher = self._gather(tokens, seen)
        fitted = []
        for group in seen:
            weights = None if plan.ridge is None else fisher.weights(group.layers, plan.ridge)
            made = fit_group(group, weights=weights, source=source)
            fitted.append(made.using(device_products()))
            self._advance(_FIT_WORK * (group.layers[1] - group.layers[0]), "fitting")
        return fitted

    def _gather(self, tokens: Sequence[int], seen: Sequence[GroupAccumulator]) -> Fisher:
        plan = self._plan
        fisher = Fisher(self._ropes)
        for start in range(0, plan.tokens, plan.sequence):
            part = tokens[start : min(start + plan.sequence, plan.tokens)]
            cache = make_prompt_cache(self._model)
            prefill(self._model, part, cache, lambda n: self._advance(n, "reading"))
            snapshot = adapters.snapshot(cache, len(part))
            for group in seen:
                group.add(snapshot.page(group.layers, (0, len(part))))
            if plan.ridge is not None:
                follows = tokens[start + len(part) : start + len(part) + CONTINUATION]
                fisher.add(self._model, cache, follows)
                self._advance(_PASS_WORK, "weighing")
        return fisher

    def curve(self, tokens: Sequence[int], groups: Sequence[GroupCalibration]) -> list[CurvePoint]:
        """Measure some steps on text that the bases have not seen."""
        plan = self._plan
        held = plan.held_context + WINDOW_TOKENS
        exact = make_prompt_cache(self._model)
        prefill(self._model, tokens[:held], exact, lambda n: self._advance(n, "measuring"))
        snapshot = adapters.snapshot(exact, held)
        window = snapshot.page((0, self._shape.layers), (plan.held_context, held))
        points, restored = [], []
        for step in steps_for_bits(groups, plan.curve_bits):
            ranges = [group.layers for group in groups]
            codecs = group_codecs("ferry", {"step": step}, ranges, groups)
            coder = Coder(self._model_id, codecs, GroupSource(groups), self._shape.kv_heads)
            coded = coder.run(snapshot, (0, plan.held_context))
            cache = make_prompt_cache(self._model)
            adapters.restore(cache, [*coded.pages, window])
            restored.append(cache)
            points.append((step, 8 * coded.blob_bytes / coded.values))
            self._advance(_POINT_WORK, "measuring")
        end = held + plan.held_continuation + 1
        per_token = 1.2 * (1 + len(points))
        found = compare(
            self._model,
            exact,
            restored,
            tokens[held:end],
            lambda n: self._advance(n * per_token, "measuring"),
        )
        return [
            CurvePoint(step, bits, max(0.0, result.kl_mean))
            for (step, bits), result in zip(points, found, strict=True)
        ]


def steps_for_bits(groups: Sequence[GroupCalibration], bits: Sequence[float]) -> list[float]:
    """Steps that should give about so many bits per value, coefficients taken as Gaussian."""
    streams = [stream for group in groups for stream in group.streams.values()]
    sigma = np.concatenate([stream.sigma for stream in streams]).astype(np.float64)
    width = sum(stream.width for stream in streams)

    def estimated(step: float) -> float:
        return float(0.5 * np.log2(1 + 2 * math.pi * math.e * (sigma / step) ** 2).sum() / width)

    found = []
    for wanted in bits:
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if estimated(2**middle) > wanted else (low, middle)
        found.append(float(2**high))
    return found
